"""Products with dense weights by the kernel that is fastest on this processor: measured once, kept in the user's cache.

torch's own choice is far from it in places: its float32 products on AMD's processors, and those in 16 bits where the
processor has no instruction for them, which are up to seven times as fast in float32.
"""

import hashlib
import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from llama.parallel.device import cache_folder, processor

_lock = threading.Lock()
Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x [.., k] and weight [n, k] -> [.., n]

# Numbers of rows of x that are measured; other numbers use the kernel of the next larger one, or of the last.
ROWS = (1, 16, 128)
MANY = ROWS[-1]
REPEATS, ENOUGH = 15, 0.3  # of a product; and after so many seconds, three
GAIN = 0.95  # of the time of torch's own kernel: what another must stay below
MEASURED = 2**22  # numbers of a weight, so that measuring takes little time and memory
BLOCK, X_ROWS = 2**19, 256  # numbers of a weight, and rows of x, that are widened at a time


def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """oneDNN's float32 product, without packing the weight."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def widened(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product in float32, rounded once. Block by block: what is widened stays in the processor's cache."""
    rows = x.reshape(-1, x.shape[-1])
    y = rows.new_empty(len(rows), len(weight))
    at = 0
    for block in weight.split(max(1, BLOCK // weight.shape[1])):
        wide = block.float()
        for some, out in zip(rows.split(X_ROWS), y[:, at : at + len(block)].split(X_ROWS), strict=True):
            out.copy_(F.linear(some.float(), wide))
        at += len(block)
    return y.view(*x.shape[:-1], len(weight))


def candidates(dtype: torch.dtype) -> dict[str, Kernel]:
    """Kernels by name, torch's own first."""
    found: dict[str, Kernel] = {"torch": F.linear}
    if dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # which some builds lack
        found["onednn"] = onednn
    if dtype in (torch.bfloat16, torch.float16):
        found["widened"] = widened
    return found


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [.., k] times weight [n, k] -> [.., n], both of one dtype."""
    return kernel(weight, measured_rows(x.numel() // x.shape[-1]))(x, weight)


def measured_rows(m: int) -> int:
    """The one of ROWS whose kernel multiplies m rows."""
    return next((rows for rows in ROWS if m <= rows), MANY)


def kernel(weight: torch.Tensor, rows: int) -> Kernel:
    """What multiplies by a weight of this dtype and shape fastest. rows: one of ROWS."""
    known = candidates(weight.dtype)
    if not weight.is_cpu or len(known) == 1:
        return F.linear
    threads, key = torch.get_num_threads(), f"{weight.dtype} {len(weight)}x{weight.shape[1]} {rows}"
    with _lock:
        choices = _choices(threads)
        name = choices.get(key)
        if not isinstance(name, str) or name not in known:
            choices[key] = name = measure(weight, rows)
            _keep(choices, threads)
    return known[name]


@torch.inference_mode()
def measure(weight: torch.Tensor, rows: int) -> str:
    """The name of the fastest kernel for so many rows: torch's own unless another is clearly faster."""
    if rows > 1:  # one row reads its weight from memory, where a part could be in the processor's cache
        weight = weight[: max(1, MEASURED // weight.shape[1])]
    x = torch.ones(rows, weight.shape[1], dtype=weight.dtype)
    seconds: dict[str, list[float]] = {name: [] for name in candidates(x.dtype)}
    for i in range(REPEATS):
        for name, compute in candidates(x.dtype).items():
            started = time.perf_counter()
            compute(x, weight)
            seconds[name].append(time.perf_counter() - started)
        if i > 1 and sum(map(sum, seconds.values())) > ENOUGH:
            break
    medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}  # the first one warms up
    best = min(medians, key=lambda name: medians[name])
    return best if medians[best] < GAIN * medians["torch"] else "torch"


# What was measured --------------------------------------------------------------------------------


def _path(threads: int) -> Path:
    key = hashlib.sha256("\0".join([processor(), torch.__version__, str(threads)]).encode()).hexdigest()
    return cache_folder() / f"linear-{key[:16]}.json"


@cache
def _choices(threads: int) -> dict[str, Any]:
    """Names of kernels by dtype and shape."""
    try:
        found = json.loads(_path(threads).read_text())
    except (OSError, ValueError):
        return {}  # nothing was measured yet
    return found if isinstance(found, dict) else {}


def _keep(choices: dict[str, Any], threads: int) -> None:
    try:
        path = _path(threads)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        written = path.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(choices, indent=0))
        written.replace(path)
    except OSError:
        pass  # measured again by the next process
