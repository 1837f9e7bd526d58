"""The ranks: who they are, which one speaks, and their process group.

Plain Python and torchrun take the same path: the environment variables RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT describe the ranks; without them this process is a world of one, which needs no port.
"""

import atexit
import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale_groups
from torch.distributed import distributed_c10d

from llama.parallel.heartbeat import (
    GROUP_TIMEOUT_FACTOR,
    Heartbeat,
    PeerError,
    Stores,
    find_stores,
    hide_lost_rank_traceback,
    lost_rank_message,
    timeout,
)

log = logging.getLogger(__name__)


class World(NamedTuple):
    """This process among the ranks: `rank` of `size` in all, `local_rank` of `local_size` on its host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def current_world() -> World:
    """The process group where there is one, else torchrun's variables, else a world of one."""
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    else:
        return World()
    return World(rank, size, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def is_main_rank() -> bool:
    """True on the one rank that prints and samples."""
    return current_world().rank == 0


# Process group ------------------------------------------------------------------------------------

_members = 0  # models that use the group; the last one to leave destroys it
_ours = False  # False: somebody else initialised torch.distributed and will destroy it
_our_groups = False  # the same for fairscale's groups
_stores: Stores | None = None  # one per process: torchrun's port can be bound once
_heartbeat: Heartbeat | None = None  # of this rank, among several
_generation = 0  # meetings so far; each uses its own keys of the store
_devnull: TextIO | None = None  # what sys.stdout is on ranks that print nothing; made once
_hooks = (sys.excepthook, sys.excepthook)  # before and after it was wrapped


def connect_ranks(world: World) -> None:
    """Rendezvous with the other ranks, whatever device each uses. Call `shutdown` afterwards, also if this fails."""
    global _members, _stores, _heartbeat, _generation
    _members += 1
    if _members == 1 and world.size > 1:
        _generation += 1
        if dist.is_initialized():
            stores = Stores.of(distributed_c10d._get_default_store())
        else:
            stores = _stores = _stores or find_stores(world.rank, world.size)
        _heartbeat = Heartbeat(stores, _generation, world.rank, world.size)
    all_gather_object(None)  # all are there: what follows keeps pace


def init_process_groups(world: World, device: torch.device) -> None:
    """Enter the process group and fairscale's model-parallel group, making them if this is the first model."""
    global _ours, _our_groups, _hooks
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    if not dist.is_initialized():
        if device.type == "cuda" and backend == "gloo":
            log.warning("this torch has no NCCL, ranks talk over gloo (slower)")
        hook = sys.excepthook  # torch puts the rank before each line of it
        store = _stores.group(_generation) if _stores and world.size > 1 else dist.HashStore()
        # With torch's own timeout, as the default group is the program's, too: it may wait for hours there.
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
        _ours, _hooks = True, (hook, hide_lost_rank_traceback(sys.excepthook) if world.size > 1 else hook)
        sys.excepthook = _hooks[1]
    elif world.size > 1 and _ours and dist.get_backend() != backend:
        raise ValueError(
            f"ranks already talk over {dist.get_backend()}, {device} needs {backend}: close() the other model"
        )
    if not fairscale_groups.model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # it prints three lines there
            fairscale_groups.initialize_model_parallel(world.size)
        patience = timedelta(seconds=GROUP_TIMEOUT_FACTOR * timeout(device.type))
        distributed_c10d._set_pg_timeout(patience, process_group())
        _our_groups = True
    if fairscale_groups.get_model_parallel_world_size() != world.size:
        raise ValueError(f"fairscale is initialised with another model-parallel size than the {world.size} ranks here")
    if world.local_rank > 0:
        _mute_stdout()


def _mute_stdout() -> None:
    """Send print() to os.devnull until the last model is closed; `sys.__stdout__` and stderr still print.

    Meta's build does it on these ranks, and programs written for it print() on all of them and mean one. A program that
    has redirected sys.stdout itself keeps that.
    """
    global _devnull
    if sys.__stdout__ is not None and sys.stdout is sys.__stdout__:
        sys.__stdout__.flush()
        _devnull = _devnull or open(os.devnull, "w")  # noqa: SIM115  (a program may hold it: it is never closed)
        sys.stdout = _devnull


def shutdown() -> None:
    """Part from the other ranks; with the last model the group is destroyed."""
    global _members
    _members -= 1
    if _members == 0:
        _destroy()


@atexit.register
def _destroy() -> None:
    global _ours, _our_groups, _heartbeat
    pulse, _heartbeat = _heartbeat, None
    if pulse is not None:
        pulse.stop()
    if _devnull is not None and sys.stdout is _devnull:
        sys.stdout = sys.__stdout__
    if _our_groups:
        fairscale_groups.destroy_model_parallel()
        _our_groups = False
    if _ours:
        if dist.is_initialized():  # a gloo rank that exits with its group alive aborts now and then
            dist.destroy_process_group()
        if sys.excepthook is _hooks[1]:
            sys.excepthook = _hooks[0]
        _ours = False


def model_parallel() -> tuple[int, int]:
    """(rank, size) in the model-parallel group; (0, 1) before there is one."""
    if not fairscale_groups.model_parallel_is_initialized():
        return 0, 1
    return fairscale_groups.get_model_parallel_rank(), fairscale_groups.get_model_parallel_world_size()


def process_group() -> dist.ProcessGroup:
    """fairscale's model-parallel group, which holds all ranks and is the one group that this package talks over.

    A rank that keeps the others waiting there for more than a third of LLAMA_TIMEOUT counts as lost.
    """
    return fairscale_groups.get_model_parallel_group()


def broadcast(ids: torch.Tensor) -> torch.Tensor:
    """Replace `ids` by rank 0's, in place, so that ranks cannot drift apart."""
    if model_parallel()[1] > 1:
        dist.broadcast(ids, src=0, group=process_group())
    return ids


def all_gather_object(value: Any) -> list[Any]:
    """What each rank gives, in rank order, on every rank. A slow rank is waited for, a lost one is not."""
    return [value] if _heartbeat is None else _heartbeat.all_gather(value)


def broadcast_object(value: Any = None) -> Any:
    """Rank 0's value on every rank. The others wait as long as it takes, for a user who types for instance."""
    if _heartbeat is None:
        return value
    all_gather_object(None)
    values = [value]  # a store takes 8 MB at most
    dist.broadcast_object_list(values, src=0, group=process_group())
    return values[0]


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Leave the block with an error on every rank if any rank has one: nobody waits for a rank that is gone.

    A rank that failed raises its own error, the others PeerError with the message of the first that failed.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if lost_rank_message(caught):
            raise
        error = caught
    messages = all_gather_object(str(error) if error else None)
    first = next((rank for rank, message in enumerate(messages) if message is not None), None)
    if first is not None and len(messages) > 1:
        error = error or PeerError(f"rank {first} failed: {messages[first]}")
        error.__dict__["told_by"] = 0  # rank 0 has either the same error or a PeerError about it
    if error is not None:
        raise error
