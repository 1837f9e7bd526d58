"""The device, dtype and threads of a rank, and the cache folder of this machine."""

import os
import platform
import re
from functools import cache
from pathlib import Path

import torch

from llama.parallel.groups import World

# oneDNN caches the last 1,024 primitives, one for each input shape, of up to 1 MB each: prompts of many lengths would
# fill a gigabyte. A decode step needs half a dozen, and recreating those of a prompt takes a millisecond. oneDNN reads
# these variables when it is first used.
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(name, "16")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str, world: World) -> torch.device:
    """This rank's device for "auto", "cpu", "cuda", "cuda:N" or "mps"; a GPU becomes torch's current device.

    "auto" is cuda if torch sees a GPU, else mps (for one rank only, as it has no process groups), else cpu. On cuda
    every rank uses the GPU of its LOCAL_RANK. Raises ValueError for other names and devices that this rank cannot use.
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
        raise ValueError(f"device 'mps' supports one rank, not {world.size}: start one, or use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not available to this torch: use --device cpu")
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError("device 'cuda': this torch sees no GPU; use --device cpu, or install a CUDA build of torch")
    if device.index is not None and world.local_size > 1:
        raise ValueError(f"device {name!r} would put all ranks on one GPU: use --device cuda, a GPU for each rank")
    index = world.local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {world.local_rank} needs GPU {index}, but torch sees {torch.cuda.device_count()} here: "
            "start fewer ranks, or use --device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def pick_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in: the named one, or for "auto" the `stored` dtype, if the device has instructions for it.

    Otherwise "auto" replaces bfloat16 by float16 on a GPU (compute capability below 8.0, macOS before 14), and both by
    float32 on a CPU, where they would be several times slower. Raises ValueError for other names.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"dtype {name!r}: expected auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cpu":
        return stored if _is_native_on_cpu(stored) else torch.float32
    lacks_bfloat16 = (
        torch.cuda.get_device_capability(device) < (8, 0)
        if device.type == "cuda"
        else not torch.backends.mps.is_macos_or_newer(14, 0)
    )
    return torch.float16 if stored == torch.bfloat16 and lacks_bfloat16 else stored


def _is_native_on_cpu(dtype: torch.dtype) -> bool:
    # torch reports this only through private operators, which exist in builds with oneDNN.
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    probe = getattr(torch.ops.mkldnn, names.get(dtype, ""), None)
    return dtype == torch.float32 or bool(probe and probe())


def share_cores(world: World) -> None:
    """Divide the host's cores among its ranks (torch.set_num_threads), unless the user has set OMP_NUM_THREADS.

    torchrun sets it to 1 if it is unset, so 1 counts as unset.
    """
    if world.local_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // world.local_size))


def cache_folder() -> Path:
    """The folder for compiled code and measurements of this machine: $XDG_CACHE_HOME or ~/.cache, then llama-runner.

    Raises FileNotFoundError if there is neither.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-runner"
    except RuntimeError as error:  # a user without a home, as in some containers
        raise FileNotFoundError("this user has no home folder: set XDG_CACHE_HOME") from error


@cache
def processor() -> str:
    """A string that identifies what -march=native compiles for. It is part of cache keys, as machines with different
    processors may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
