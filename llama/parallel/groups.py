"""Ranks and their process group: rendezvous, exchanges of objects, shutdown.

Plain Python and torchrun run the same code. The environment variables RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT describe the ranks. Without them this process is a world of one, which needs no port.

Several models may be open at once. The first one creates the groups, all share them, and the last `shutdown` destroys
them.
"""

import atexit
import contextlib
import io
import logging
import os
import sys
import weakref
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale_groups
from torch.distributed import distributed_c10d

from llama.parallel.heartbeat import (
    LOST_FACTOR,
    Heartbeat,
    PeerError,
    Stores,
    exit_timeout,
    lost_rank_excepthook,
    lost_rank_message,
    rendezvous,
)

log = logging.getLogger(__name__)


class World(NamedTuple):
    """This process is `rank` of `size` ranks in all, and `local_rank` of the `local_size` on its host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def current_world() -> World:
    """The world of the default process group if there is one, else of torchrun's variables, else a world of one."""
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    else:
        return World()
    return World(rank, size, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def is_main_rank() -> bool:
    """True on rank 0, the only one that prints and samples."""
    return current_world().rank == 0


MESSAGE_BYTES = 4096  # of `broadcast_bytes`

# Process group ------------------------------------------------------------------------------------

_open_models = 0  # models that use the groups
_owns_default_group = False  # whether this package created it, and so must destroy it
_owns_model_parallel_group = False  # the same for fairscale's groups
_owners: "weakref.WeakSet[Any]" = weakref.WeakSet()  # of what must be released before the groups are destroyed
_stores: Stores | None = None  # one per process: rank 0 can bind torchrun's port only once
_heartbeat: Heartbeat | None = None  # None in a world of one
_generation = 0  # how often the ranks have connected; each time uses its own store keys
_devnull: TextIO | None = None  # sys.stdout on ranks that print nothing
_excepthooks = (sys.excepthook, sys.excepthook)  # the program's, and ours that wraps it


def connect_ranks(world: World) -> None:
    """Connect to the other ranks and start the heartbeat. Runs before devices are known and checkpoints are read.

    Every call needs a later `shutdown`, even if it raises. Raises LostRankError if ranks are missing.
    """
    global _open_models, _stores, _heartbeat, _generation
    _open_models += 1
    if _open_models == 1 and world.size > 1:
        _generation += 1
        if dist.is_initialized():
            stores = Stores.of(distributed_c10d._get_default_store())
        else:
            stores = _stores = _stores or rendezvous(world.rank, world.size)
        _heartbeat = Heartbeat(stores, _generation, world.rank, world.size)
    all_gather_object(None)  # a barrier: ranks that arrive late are waited for here, not in a collective with a timeout


def init_process_groups(world: World, device: torch.device) -> None:
    """Create torch's default process group and fairscale's model-parallel group, unless they exist.

    The backend is nccl for a cuda device if this torch has it, else gloo. Raises ValueError if existing groups use
    another backend or have another size. Until `shutdown`, print() shows nothing on any rank of a host but its first.
    """
    global _owns_default_group, _owns_model_parallel_group, _excepthooks
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    if not dist.is_initialized():
        if device.type == "cuda" and backend == "gloo":
            log.warning("this torch has no NCCL: ranks use gloo, which is slower")
        excepthook = sys.excepthook  # init_process_group wraps it, to prefix each line with the rank
        store = _stores.for_process_group(_generation) if _stores and world.size > 1 else dist.HashStore()
        # Keep torch's own timeout: the program may use the default group, too, and wait for hours in it.
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
        _owns_default_group = True
        _excepthooks = (excepthook, lost_rank_excepthook(sys.excepthook) if world.size > 1 else excepthook)
        sys.excepthook = _excepthooks[1]
    elif world.size > 1 and _owns_default_group and dist.get_backend() != backend:
        raise ValueError(
            f"ranks already use {dist.get_backend()}, but {device} needs {backend}: close() the other model"
        )
    if not fairscale_groups.model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # it prints three lines
            fairscale_groups.initialize_model_parallel(world.size)
        timeout = timedelta(seconds=LOST_FACTOR * exit_timeout(device.type))
        distributed_c10d._set_pg_timeout(timeout, process_group())
        _owns_model_parallel_group = True
    if fairscale_groups.get_model_parallel_world_size() != world.size:
        raise ValueError(f"fairscale is initialised with another model-parallel size than the {world.size} ranks here")
    if world.local_rank > 0:
        _mute_stdout()


def _mute_stdout() -> None:
    """Send print() to os.devnull until the last model is closed; `sys.__stdout__` and stderr still print.

    Meta's `build` does so on these ranks, and programs written for it call print() on every rank to print once. A
    sys.stdout that the program has redirected stays.
    """
    global _devnull
    if sys.__stdout__ is not None and sys.stdout is sys.__stdout__:
        sys.__stdout__.flush()
        _devnull = _devnull or open(os.devnull, "w")  # noqa: SIM115  (never closed, as the program may keep it)
        sys.stdout = _devnull


def release_before_shutdown(owner: Any) -> None:
    """Call `owner.release()` before the process group is destroyed, if `owner` still exists then."""
    _owners.add(owner)


def shutdown() -> None:
    """Undo one `connect_ranks`. The last one stops the heartbeat and destroys the groups that this package created."""
    global _open_models
    _open_models -= 1
    if _open_models == 0:
        _destroy()


@atexit.register
def _destroy() -> None:
    global _owns_default_group, _owns_model_parallel_group, _heartbeat
    heartbeat, _heartbeat = _heartbeat, None
    if heartbeat is not None:
        heartbeat.stop()
    if _devnull is not None and sys.stdout is _devnull:
        sys.stdout = sys.__stdout__
    for owner in list(_owners):
        owner.release()
    _owners.clear()
    if _owns_model_parallel_group:
        fairscale_groups.destroy_model_parallel()
        _owns_model_parallel_group = False
    if _owns_default_group:
        if dist.is_initialized():  # a process that exits with a gloo group sometimes aborts
            dist.destroy_process_group()
        if sys.excepthook is _excepthooks[1]:
            sys.excepthook = _excepthooks[0]
        _owns_default_group = False


def model_parallel() -> tuple[int, int]:
    """(rank, size) in the model-parallel group; (0, 1) before it is created."""
    if not fairscale_groups.model_parallel_is_initialized():
        return 0, 1
    return fairscale_groups.get_model_parallel_rank(), fairscale_groups.get_model_parallel_world_size()


def process_group() -> dist.ProcessGroup:
    """fairscale's model-parallel group, which contains all ranks. This package runs its collectives there only.

    Its timeout is a third of LLAMA_TIMEOUT: a collective in which a rank arrives later than that raises on the others.
    """
    return fairscale_groups.get_model_parallel_group()


def broadcast(ids: torch.Tensor) -> torch.Tensor:
    """Overwrite `ids` in place with rank 0's, and return it, so that all ranks continue with the same ids."""
    if model_parallel()[1] > 1:
        dist.broadcast(ids, src=0, group=process_group())
    return ids


def broadcast_bytes(content: bytes) -> bytes:
    """Rank 0's `content`, on every rank: one collective for up to MESSAGE_BYTES, two for more."""
    if model_parallel()[1] == 1:
        return content
    device = torch.device("cuda") if dist.get_backend(process_group()) == "nccl" else torch.device("cpu")
    first = len(content).to_bytes(8, "little") + content[:MESSAGE_BYTES]
    message = torch.frombuffer(bytearray(first.ljust(8 + MESSAGE_BYTES, b"\0")), dtype=torch.uint8).to(device)
    received = broadcast(message).cpu().numpy().tobytes()
    length = int.from_bytes(received[:8], "little")
    if length <= MESSAGE_BYTES:
        return received[8 : 8 + length]
    rest = bytearray(content[MESSAGE_BYTES:] or length - MESSAGE_BYTES)
    message = torch.frombuffer(rest, dtype=torch.uint8).to(device)
    return received[8:] + broadcast(message).cpu().numpy().tobytes()


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank; `[value]` in a world of one. Up to 8 MB each.

    Waits without limit for a slow rank. Raises LostRankError if a rank is lost.
    """
    return [value] if _heartbeat is None else _heartbeat.all_gather(value)


def broadcast_object(value: Any = None) -> Any:
    """Rank 0's `value`, of any size, on every rank. The others wait without limit, for example while a user types.

    Raises LostRankError if a rank is lost.
    """
    if _heartbeat is None:
        return value
    all_gather_object(None)  # the wait: the collective below has a timeout
    values = [value]
    dist.broadcast_object_list(values, src=0, group=process_group())
    return values[0]


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Context for a block that all ranks run: if it raises on one rank, it raises on all, and none waits forever.

    A rank that failed raises its own error, the others PeerError with the message of the first rank that failed. An
    error that means a lost rank is raised at once, on this rank only.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if lost_rank_message(caught):
            raise
        error = caught
    messages = all_gather_object(str(error) if error else None)
    failed = next((rank for rank, message in enumerate(messages) if message is not None), None)
    if failed is not None and len(messages) > 1:
        error = error or PeerError(f"rank {failed} failed: {messages[failed]}")
        error.__dict__["reporting_rank"] = 0  # one report is enough: rank 0 has the same error, or a PeerError about it
    if error is not None:
        raise error
