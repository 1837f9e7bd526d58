"""The ranks: who they are, which one speaks, and their process group.

Plain Python and torchrun take the same path. torchrun's environment variables (RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) describe the ranks; without them this process
is a world of one, which needs no port and no variable.
"""

import atexit
import contextlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale_groups


class PeerError(RuntimeError):
    """Another rank failed; the message is that rank's."""


@dataclass(frozen=True)
class World:
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
    return World(
        rank,
        size,
        int(os.environ.get("LOCAL_RANK", rank)),
        int(os.environ.get("LOCAL_WORLD_SIZE", size)),
    )


def is_main_rank() -> bool:
    """True on the one rank that prints and samples."""
    return current_world().rank == 0


def say(text: str) -> None:
    """Print one line to stderr, on rank 0 only: stdout belongs to results."""
    if is_main_rank():
        print(text, file=sys.stderr, flush=True)


# Process group ------------------------------------------------------------------------------------

_members = 0  # models that use the group; the last one to leave destroys it
_ours = False  # False: somebody else initialised torch.distributed and will destroy it
_our_groups = False  # the same for fairscale's groups
_store: dist.Store | None = None  # one per process: torchrun's port can be bound once
_told = 0  # values that rank 0 has told the others
_rounds = 0  # groups made so far; each uses its own keys of the store
_hooks = (sys.excepthook, sys.excepthook)  # before and after torch wrapped it, to put the rank before each line


def join(world: World, device: torch.device) -> None:
    """Enter the process group and fairscale's model-parallel group, making them if this is the first model."""
    global _members, _ours, _our_groups, _store, _rounds, _hooks
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    if not dist.is_initialized():
        if device.type == "cuda" and backend == "gloo":
            say("warning: this torch has no NCCL, ranks talk over gloo (slower)")
        if _store is None:
            single = world.size == 1
            _store = dist.HashStore() if single else next(dist.rendezvous("env://", world.rank, world.size))[0]
        _rounds += 1
        hook = sys.excepthook
        store = dist.PrefixStore(f"llama/{_rounds}", _store)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
        _ours, _hooks = True, (hook, sys.excepthook)
        if world.size == 1:
            sys.excepthook = hook
    elif world.size > 1 and _ours and dist.get_backend() != backend:
        raise ValueError(
            f"ranks already talk over {dist.get_backend()}, {device} needs {backend}: close() the other model"
        )
    if not fairscale_groups.model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # it prints three lines there
            fairscale_groups.initialize_model_parallel(world.size)
        _our_groups = True
    if fairscale_groups.get_model_parallel_world_size() != world.size:
        raise ValueError(f"fairscale is initialised with another model-parallel size than the {world.size} ranks here")
    _members += 1


def leave() -> None:
    """Give the group back; with the last model it is destroyed."""
    global _members, _ours, _our_groups
    _members -= 1
    if _members == 0 and _our_groups:
        fairscale_groups.destroy_model_parallel()
        _our_groups = False
    if _members == 0 and _ours:
        if dist.is_initialized():
            dist.destroy_process_group()
        if sys.excepthook is _hooks[1]:
            sys.excepthook = _hooks[0]
        _ours = False


@atexit.register
def _leave_at_exit() -> None:
    # A gloo rank that exits with its group alive aborts now and then.
    if _ours and dist.is_initialized():
        dist.destroy_process_group()


def model_parallel() -> tuple[int, int]:
    """(rank, size) in the model-parallel group."""
    return fairscale_groups.get_model_parallel_rank(), fairscale_groups.get_model_parallel_world_size()


def from_rank_0(ids: torch.Tensor) -> torch.Tensor:
    """Replace `ids` by rank 0's, in place, so that ranks cannot drift apart."""
    if dist.get_world_size() > 1:
        dist.broadcast(ids, src=0)
    return ids


def told_by_rank_0(value: Any = None) -> Any:
    """Rank 0's value on every rank. The others wait as long as it takes, for a user who types for instance, where a
    collective alone would run into its timeout."""
    global _told
    if dist.get_world_size() == 1:
        return value
    if _store is not None:
        _told += 1
        key = f"llama/told/{_told}"
        if is_main_rank():
            _store.set(key, "")
        while not is_main_rank():
            with contextlib.suppress(dist.DistStoreError):  # the store's own timeout
                _store.wait([key])
                break
    values = [value]  # a store takes 8 MB at most
    dist.broadcast_object_list(values, src=0)
    return values[0]


@contextlib.contextmanager
def raising_together() -> Iterator[None]:
    """Leave the block with an error on every rank if any rank has one: nobody waits for a rank that is gone.

    A rank that failed raises its own error, the others PeerError with the message of the first that failed.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if dist.get_world_size() > 1:
        messages: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, str(error) if error else None)
        first = next((rank for rank, message in enumerate(messages) if message is not None), None)
        if first is not None:
            error = error or PeerError(f"rank {first} failed: {messages[first]}")
            error.__dict__["told_by"] = 0  # rank 0 has either the same error or a PeerError about it
    if error is not None:
        raise error


def should_tell(error: BaseException) -> bool:
    """Whether this rank is the one to print an error: each its own, but one of those that all raise together."""
    rank = current_world().rank
    return error.__dict__.get("told_by", rank) == rank
