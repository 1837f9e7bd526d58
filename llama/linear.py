"""Products with dense weights by the kernel that is fastest on this processor: measured once, kept in the user's cache.

torch's own choice is far from it in places: its float32 products on AMD's processors, and those in 16 bits where the
processor has no instruction for them, which are up to seven times as fast in float32.
"""

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from llama.device import cache_folder, processor

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x [.., k] and weight [n, k] -> [.., n]

# Numbers of rows of x that are measured; other numbers use the kernel of the next larger one, or of the last.
ROWS = (1, 16, 128)
SIZE = 2048  # of the square weights that are measured
WEIGHTS = 8  # of them in turn, so that a product of few rows reads its weight from memory as in a model
REPEATS = 7
GAIN = 0.95  # of the time of torch's own kernel: what another must stay below


def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """oneDNN's float32 product, from the weight as it is."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def widened(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product in float32, rounded once."""
    return F.linear(x.float(), weight.float()).to(x.dtype)


def candidates(dtype: torch.dtype) -> dict[str, Kernel]:
    found: dict[str, Kernel] = {"torch": F.linear}
    if (
        dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        found["onednn"] = onednn
    if dtype in (torch.bfloat16, torch.float16):
        found["widened"] = widened
    return found


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [.., k] times weight [n, k] -> [.., n], both of one dtype."""
    return kernel_for(kernels(weight), x)(x, weight)


def kernels(weight: torch.Tensor) -> tuple[Kernel, ...]:
    """A kernel for each of ROWS."""
    if not weight.is_cpu or len(candidates(weight.dtype)) == 1:
        return (F.linear,) * len(ROWS)
    return _chosen(weight.dtype, torch.get_num_threads())


def kernel_for(kernels: tuple[Kernel, ...], x: torch.Tensor) -> Kernel:
    m = x.numel() // x.shape[-1]
    return kernels[next((i for i, rows in enumerate(ROWS) if m <= rows), -1)]


@cache
def _chosen(dtype: torch.dtype, threads: int) -> tuple[Kernel, ...]:
    known = candidates(dtype)
    key = hashlib.sha256("\0".join([processor(), torch.__version__, str(threads), str(dtype)]).encode()).hexdigest()
    path = cache_folder() / f"linear-{key[:16]}.json"
    try:
        names = json.loads(path.read_text())
        if len(names) == len(ROWS):
            return tuple(known[name] for name in names)
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not measured yet, or by another version of this file
    names = measure(dtype)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        written = path.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(names))
        written.replace(path)
    except OSError:
        pass  # measured again by the next process
    return tuple(known[name] for name in names)


@torch.inference_mode()
def measure(dtype: torch.dtype) -> list[str]:
    """The name of the fastest kernel for each of ROWS: torch's own unless another is clearly faster."""
    weights = [torch.ones(SIZE, SIZE, dtype=dtype) for _ in range(WEIGHTS)]
    names = []
    for rows in ROWS:
        x = torch.ones(rows, SIZE, dtype=dtype)
        seconds: dict[str, list[float]] = {name: [] for name in candidates(dtype)}
        for i in range(REPEATS):
            for name, kernel in candidates(dtype).items():
                started = time.perf_counter()
                kernel(x, weights[i % WEIGHTS])
                seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}
        best = min(medians, key=lambda name: medians[name])
        names.append(best if medians[best] < GAIN * medians["torch"] else "torch")
    return names
