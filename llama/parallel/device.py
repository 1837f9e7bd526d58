"""What a rank computes on: device, dtype, threads."""

import os
import platform
import re
from functools import cache
from pathlib import Path

import torch

from llama.parallel.groups import World

# oneDNN keeps what it prepared for each number of rows that it met, up to 1 MB for each of the last 1,024: texts of all
# lengths would fill a gigabyte. A step needs half a dozen, and a prompt's cost a millisecond. Read at its first use.
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(name, "16")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str, world: World) -> torch.device:
    """Turn "auto", "cpu", "cuda", "cuda:N" or "mps" into this rank's device.

    "auto" is cuda where torch sees a GPU, else mps (which knows no process groups, so one rank only),
    else cpu. On cuda every rank takes the GPU of its LOCAL_RANK.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() and world.size == 1 else "cpu"
    if not isinstance(name, str) or not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"device {name!r}: expected auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "mps" and world.size > 1:
        raise ValueError(f"device 'mps' runs one rank, not {world.size}: start one, or use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps': this torch sees none; use --device cpu")
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError("device 'cuda': this torch sees no GPU; use --device cpu, or install a CUDA build of torch")
    if device.index is not None and world.local_size > 1:
        raise ValueError(f"device {name!r} would put all ranks on one GPU: use --device cuda, a GPU for each rank")
    index = world.local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {world.local_rank} needs GPU {index}, but this host shows {torch.cuda.device_count()}: "
            "start fewer ranks, or use --device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def pick_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Choose the dtype to compute in: the named one, or for "auto" the checkpoint's own where it fits the device.

    bfloat16 becomes float16 on GPUs that have no bfloat16 arithmetic (compute capability below 8.0, macOS before 14);
    both become float32 on a CPU that lacks theirs, where they would take several times as long.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"dtype {name!r}: expected auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cpu":
        return stored if _cpu_computes_in(stored) else torch.float32
    lacks_bfloat16 = (
        torch.cuda.get_device_capability(device) < (8, 0)
        if device.type == "cuda"
        else not torch.backends.mps.is_macos_or_newer(14, 0)
    )
    return torch.float16 if stored == torch.bfloat16 and lacks_bfloat16 else stored


def _cpu_computes_in(dtype: torch.dtype) -> bool:
    # The only place where torch tells is private operators of its oneDNN build.
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    probe = getattr(torch.ops.mkldnn, names.get(dtype, ""), None)
    return dtype == torch.float32 or bool(probe and probe())


def share_cores(world: World) -> None:
    """Give each of a host's ranks its part of the cores, unless the user chose a number of threads.

    torchrun sets OMP_NUM_THREADS=1 when it is absent, so 1 counts as not chosen.
    """
    if world.local_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // world.local_size))


def cache_folder() -> Path:
    """Where compiled code and measurements of this machine are kept. Raises FileNotFoundError where nobody said."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-runner"
    except RuntimeError as error:  # a user without a home, as in some containers
        raise FileNotFoundError("this user has no home folder: set XDG_CACHE_HOME") from error


@cache
def processor() -> str:
    """What -march=native stands for: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
