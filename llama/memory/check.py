"""Checks before loading whether a model fits into memory. If not, suggests flags that make it fit."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llama.checkpoint.layout import legal_world_sizes
from llama.memory.sizes import Sizes, largest, sizes
from llama.parallel.groups import current_world
from llama.params import ModelArgs

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# The schemes that need less memory than a value of --quantize.
SMALLER: dict[str | None, tuple[str, ...]] = {None: ("int8", "int4"), "int8": ("int4",), "fp8": ("int4",), "int4": ()}
STEP = 64  # suggested contexts are multiples of this many positions


class InsufficientMemoryError(ValueError):
    """The model is too large for the device; the message says by how much, and what would fit."""


@dataclass(frozen=True)
class Choice:
    """The settings that determine how much memory a rank needs."""

    args: ModelArgs
    world_size: int
    dtype: torch.dtype
    quantize: str | None
    device: str
    tied: bool
    embedding_axis: int
    prefill_chunk: int

    @property
    def sizes(self) -> Sizes:
        return sizes(
            self.args,
            self.world_size,
            self.dtype,
            tied=self.tied,
            embedding_axis=self.embedding_axis,
            quantize=self.quantize,
            device=self.device,
            prefill_chunk=self.prefill_chunk,
        )

    def resized(self, max_seq_len: int | None = None, max_batch_size: int | None = None) -> "Choice":
        """A copy with another number of positions or rows."""
        length, rows = max_seq_len or self.args.max_seq_len, max_batch_size or self.args.max_batch_size
        return replace(self, args=replace(self.args, max_seq_len=length, max_batch_size=rows))


def check_memory(
    args: ModelArgs,
    world_size: int,
    dtype: torch.dtype,
    device: torch.device,
    tied: bool,
    embedding_axis: int,
    quantize: str | None,
    prefill_chunk: int,
) -> Choice:
    """Raise InsufficientMemoryError if this rank needs more memory than its device has free.

    Arguments are as in `sizes.sizes`. If the free memory is unknown, nothing is checked.
    """
    choice = Choice(args, world_size, dtype, quantize, device.type, tied, embedding_axis, prefill_chunk)
    free = free_bytes(device)
    if free is None or choice.sizes.total <= free:
        return choice
    share = "" if device.type == "cuda" or current_world().local_size == 1 else " for each rank"
    raise InsufficientMemoryError(
        f"{_needs(choice)}, {_gib(free)} GiB are free on {device}{share}: {_answer(choice, free)}"
    )


def _needs(choice: Choice) -> str:
    need = choice.sizes
    return (
        f"the model needs {_gib(need.total)} GiB (weights {_gib(need.weights)}, cache {_gib(need.cache + need.rope)}, "
        f"prefill {_gib(need.prefill)})"
    )


def _answer(choice: Choice, free: int) -> str:
    """The part of the message that says what would fit into `free` bytes."""
    if found := suggestions(choice, free):
        listed = [f"{flags} ({_gib(changed.sizes.total)} GiB)" for flags, changed in found]
        return f"{', '.join(listed[:-1])} or {listed[-1]} would fit" if found[1:] else f"{listed[0]} would fit"
    smallest = replace(choice, quantize="int4").resized(STEP, 1).sizes.total
    return (
        f"no flags make it fit, as --quantize int4 --max_seq_len {STEP} --max_batch_size 1 still needs "
        f"{_gib(smallest)} GiB: use a smaller model or more memory"
    )


def explained(
    choice: Choice, device: torch.device, held: int, doing: str, error: BaseException
) -> InsufficientMemoryError:
    """The error for memory that ran out although `check_memory` passed: other processes use it, or the estimate is low.

    held: bytes that the model has allocated. doing: what failed, or a fix that does not need another `build`.
    """
    units = {"gib": 2**30, "mib": 2**20, "kib": 2**10, "bytes": 1}
    match = re.search(r"(?i)tried to allocate ([\d.]+) ?(GiB|MiB|KiB|bytes)", str(error))
    requested = float(match[1]) * units[match[2].lower()] if match else 0.0
    free, more = free_bytes(device), f", {_gib(requested)} GiB more were requested" if requested else ""
    if free is None:
        return InsufficientMemoryError(f"out of memory on {device}{more}, {doing}: {_needs(choice)}")
    # Other settings must also save the part of the request that did not fit.
    available = min(free + held, choice.sizes.total - max(0, int(requested) - free))
    where = f"out of memory on {device}{more}, {_gib(free)} GiB are free, {doing}"
    return InsufficientMemoryError(f"{where}: {_needs(choice)}, {_answer(choice, available)}")


def suggestions(choice: Choice, free: int) -> list[tuple[str, Choice]]:
    """Changes of flags, as (flags, the changed choice), that need no more than `free` bytes.

    Lists each flag that is enough by itself, or combinations if none is; on CUDA also more ranks. The suggested numbers
    are the largest that fit.
    """
    smaller = [(f"--quantize {scheme}", replace(choice, quantize=scheme)) for scheme in SMALLER[choice.quantize]]
    if choice.dtype == torch.float32:
        smaller.insert(0, ("--dtype bfloat16", replace(choice, dtype=torch.bfloat16)))
    found = [(flags, changed) for flags, changed in smaller if changed.sizes.total <= free] + _resized(choice, free)
    if not found:
        found = [(f"{flags} {more}", changed) for flags, start in smaller for more, changed in _resized(start, free)]
    if not found and choice.args.max_batch_size > 1:
        found = [
            (f"{flags} --max_batch_size 1 {more}".strip(), changed)
            for flags, start in [("", choice), *smaller]
            for more, changed in _resized(start.resized(max_batch_size=1), free)
        ]
    if choice.device == "cuda":  # on a CPU the ranks of a host share its memory
        more_ranks = [
            (f"{flags} on {n} ranks with a GPU each".removeprefix(" on "), replace(start, world_size=n))
            for flags, start in [("", choice), *smaller]
            for n in legal_world_sizes(choice.args)
            if n > choice.world_size
        ]
        found += [(flags, changed) for flags, changed in more_ranks if changed.sizes.total <= free][:1]
    return found


def _resized(choice: Choice, free: int) -> list[tuple[str, Choice]]:
    """The largest max_seq_len and the largest max_batch_size below the current ones that fit, each by itself."""

    def fits(max_seq_len: int | None = None, max_batch_size: int | None = None) -> bool:
        return choice.resized(max_seq_len, max_batch_size).sizes.total <= free

    length = STEP * largest(lambda n: fits(max_seq_len=STEP * n), (choice.args.max_seq_len - 1) // STEP)
    rows = largest(lambda n: fits(max_batch_size=n), choice.args.max_batch_size - 1)
    shorter = [(f"--max_seq_len {length}", choice.resized(max_seq_len=length))] if length else []
    return shorter + ([(f"--max_batch_size {rows}", choice.resized(max_batch_size=rows))] if rows else [])


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


# What is free -------------------------------------------------------------------------------------


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this rank can still allocate on its device; None if unknown.

    The ranks of a host share its memory evenly. The page cache, such as a mapped checkpoint's pages, counts as free, as
    the system reclaims it when memory is needed.
    """
    if device.type == "cuda":
        try:
            free, _ = torch.cuda.mem_get_info(device)
        except (AssertionError, RuntimeError):  # the driver does not report it
            return None
        # torch can still allocate the memory that it has reserved and does not use.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    limits = [*_host_free(), *_cgroups_free(), *_limit_free()]
    return min(limits) // current_world().local_size if limits else None


def _host_free() -> Iterator[int]:
    for name, kilobytes in _numbers(PROC / "meminfo").items():
        if name == "MemAvailable":
            yield kilobytes * 1024


def _limit_free() -> Iterator[int]:
    """What `ulimit -v` leaves to this process, times the number of ranks on the host.

    The limit applies to each rank by itself, and `free_bytes` divides by that number.
    """
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _numbers(PROC / "self" / "status").get("VmSize")
    if limit != resource.RLIM_INFINITY and used is not None:
        yield max(0, limit - used * 1024) * current_world().local_size


def _cgroups_free() -> Iterator[int]:
    """What is left below the limit of each cgroup of this process that has one."""
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2
            root, limit, usage, prefix = CGROUPS, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            root, limit, usage, prefix = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        # In a container the path may be the host's, which does not exist here. The root always exists.
        for folder in (root.joinpath(*parts[:n]) for n in range(len(parts), -1, -1)):
            try:
                maximum, used = (int((folder / name).read_text()) for name in (limit, usage))
            except (OSError, ValueError):  # no such file, or "max": no limit
                continue
            stat = _numbers(folder / "memory.stat")
            yield max(0, maximum - used + sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active")))


def _numbers(path: Path) -> dict[str, int]:
    """Read a file with a name and a number on each line."""
    try:
        return {name: int(number) for name, number in re.findall(r"(?m)^(\w+):?\s+(\d+)", path.read_text())}
    except OSError:
        return {}
