"""Matmuls with dense weights by the kernel that is fastest on this CPU. Kernels are timed once, and the choice is saved
in the user's cache folder.

torch's own choice can be far from the fastest: in float32 on AMD's CPUs, and in 16 bits on CPUs without 16-bit
instructions, where float32 is up to seven times as fast.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

from llama.parallel.device import cache_folder, processor

_lock = threading.Lock()
Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x [.., k] and weight [n, k] -> [.., n]

# Numbers of rows of x for which kernels are timed. Other numbers use the result of the next larger one, or of the last.
MEASURED_ROWS = (1, 16, 128)
LARGEST_ROWS = MEASURED_ROWS[-1]
REPEATS, MAX_SECONDS = 15, 0.3  # runs of each kernel; only three if they take longer than MAX_SECONDS together
MAX_TIME_RATIO = 0.95  # another kernel is used if its time divided by that of torch's own is below this
MEASURED_NUMEL = 2**22  # elements of the weight that is measured, to bound time and memory
BLOCK_NUMEL, BLOCK_ROWS = 2**19, 256  # elements of a weight and rows of x that are converted to float32 at a time


def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """oneDNN's float32 matmul, without packing the weight."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def transposed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(weight x^T)^T: for BLAS the weight is the left matrix then, which MKL multiplies faster by few rows of x."""
    y = (weight @ x.reshape(-1, x.shape[-1]).t()).t()
    return y.contiguous().view(*x.shape[:-1], len(weight))


def in_float32(x: torch.Tensor, weight: torch.Tensor, multiply: Kernel = F.linear) -> torch.Tensor:
    """Multiply 16-bit tensors in float32 and round once. Works in blocks that fit into the CPU's cache in float32."""
    rows = x.reshape(-1, x.shape[-1])
    y = rows.new_empty(len(rows), len(weight))
    start = 0
    for block in weight.split(max(1, BLOCK_NUMEL // weight.shape[1])):
        block32, end = block.float(), start + len(block)
        for x_rows, out in zip(rows.split(BLOCK_ROWS), y[:, start:end].split(BLOCK_ROWS), strict=True):
            out.copy_(multiply(x_rows.float(), block32))
        start = end
    return y.view(*x.shape[:-1], len(weight))


def candidates(dtype: torch.dtype) -> dict[str, Kernel]:
    """Kernels by name, torch's own first."""
    kernels: dict[str, Kernel] = {"torch": F.linear}
    if dtype == torch.float32:
        kernels["transposed"] = transposed
        if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # some builds of torch lack it
            kernels["onednn"] = onednn
    if dtype in (torch.bfloat16, torch.float16):
        kernels["in_float32"] = in_float32
        kernels["in_float32, transposed"] = partial(in_float32, multiply=transposed)
    return kernels


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """F.linear by the fastest kernel: x [.., k], weight [n, k] of the same dtype -> [.., n]."""
    return kernel(weight, measured_rows(x.numel() // x.shape[-1]))(x, weight)


def measured_rows(m: int) -> int:
    """The entry of MEASURED_ROWS whose kernel is used for m rows."""
    return next((rows for rows in MEASURED_ROWS if m <= rows), LARGEST_ROWS)


def kernel(weight: torch.Tensor, rows: int, others: Mapping[str, Kernel] = MappingProxyType({})) -> Kernel:
    """The fastest kernel for weights of this dtype and shape.

    rows: one of MEASURED_ROWS. others: kernels by name, in addition to `candidates`.
    """
    kernels = candidates(weight.dtype) | dict(others)
    if not weight.is_cpu or len(kernels) == 1:
        return F.linear
    threads = torch.get_num_threads()
    key = " ".join([f"{weight.dtype} {len(weight)}x{weight.shape[1]} {rows}", *others])
    with _lock:
        choices = _choices(threads)
        name = choices.get(key)
        if not isinstance(name, str) or name not in kernels:
            choices[key] = name = measure(weight, rows, kernels)
            _save(choices, threads)
    return kernels[name]


@torch.inference_mode()
def measure(weight: torch.Tensor, rows: int, kernels: Mapping[str, Kernel]) -> str:
    """Time the kernels for this number of rows. Returns the fastest: "torch" unless another is clearly faster."""
    if rows > 1:  # with one row memory bandwidth is the limit, but a part of the weight could fit into the CPU's cache
        weight = weight[: max(1, MEASURED_NUMEL // weight.shape[1])]
    x = torch.ones(rows, weight.shape[1], dtype=weight.dtype)
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    for i in range(REPEATS):
        for name, compute in kernels.items():
            started = time.perf_counter()
            compute(x, weight)
            seconds[name].append(time.perf_counter() - started)
        if i > 1 and sum(map(sum, seconds.values())) > MAX_SECONDS:
            break
    # The first run is a warm-up. Other programs only add time, so the shortest run is that of the kernel alone.
    shortest = {name: min(runs[1:]) for name, runs in seconds.items()}
    best = min(shortest, key=lambda name: shortest[name])
    return best if shortest[best] < MAX_TIME_RATIO * shortest["torch"] else "torch"


# The file of results ------------------------------------------------------------------------------


def _path(threads: int) -> Path:
    names = [*candidates(torch.float32), *candidates(torch.bfloat16)]
    key = hashlib.sha256("\0".join([processor(), torch.__version__, str(threads), *names]).encode()).hexdigest()
    return cache_folder() / f"linear-{key[:16]}.json"


@cache
def _choices(threads: int) -> dict[str, Any]:
    """Names of kernels by dtype, shape and rows. The file is read once per process."""
    try:
        choices = json.loads(_path(threads).read_text())
    except (OSError, ValueError):
        return {}  # nothing was measured yet
    return choices if isinstance(choices, dict) else {}


def _save(choices: dict[str, Any], threads: int) -> None:
    try:
        path = _path(threads)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(choices, indent=0))
        temporary.replace(path)
    except OSError:
        pass  # the next process measures again
