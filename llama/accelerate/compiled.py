"""Compiled decode steps: whether this machine can compile them, and the step for torch.compile."""

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from llama.accelerate import gpu, native
from llama.accelerate.cuda_graph import Batch, Step, torch_step
from llama.accelerate.fused import FusedLayer
from llama.model import Transformer
from llama.parallel.device import cache_folder
from llama.parallel.groups import all_gather_object, model_parallel, process_group

log = logging.getLogger(__name__)


def start_compiling(compile: bool | str, device: torch.device) -> Future[float] | None:
    """Start compiling native.c in a thread, so that files are opened and checked meanwhile. None where it is not used.

    The future's result is the time in seconds, 0 if the library was there. It raises what `native.compile_library`
    raises. Compiles also for float16, which does not use it, as the dtype is not known yet.
    """

    def compile_library() -> float:
        started = time.perf_counter()
        return time.perf_counter() - started if native.compile_library() else 0

    if not compile or device.type != "cpu":
        return None
    pool = ThreadPoolExecutor(1)
    future = pool.submit(compile_library)
    pool.shutdown(wait=False)
    return future


def choose_decoder(
    compile: bool | str, device: torch.device, dtype: torch.dtype, compiling: Future[float] | None
) -> str | None:
    """What computes decode steps: "native" (native.c, on CPUs), or a CUDA graph of the kernels of "triton", "torch" or
    torch.compile ("compiled"). None: the layers, one by one.

    All ranks must call this, and all get the same answer, because their collectives must match.
    compile: as in `Llama.build`. If it is True but the device or dtype is not supported, or if native.c cannot be
    compiled, the reason is logged. compiling: what `start_compiling` returned; this waits for its result.
    """
    if device.type != "cuda":
        return "native" if _can_compile_native(compile, device, dtype, compiling) else None
    # With gloo, a collective waits for the device, which a CUDA graph cannot contain.
    if not compile or (model_parallel()[1] > 1 and dist.get_backend(process_group()) != "nccl"):
        return None
    if compile is True:
        return "compiled"
    return "triton" if all(all_gather_object(gpu.triton_kernels() is not None)) else "torch"


def _can_compile_native(
    compile: bool | str, device: torch.device, dtype: torch.dtype, compiling: Future[float] | None
) -> bool:
    """For CPUs; logs why not."""
    if not compile or (compile == "auto" and (device.type != "cpu" or dtype not in native.KINDS)):
        return False
    if device.type != "cpu":
        log.info(f"llama: nothing is compiled on {device.type}: the decode step runs uncompiled")
        return False
    if dtype not in native.KINDS:
        log.info("llama: float16 is not compiled on CPUs, only bfloat16 and float32: the decode step runs uncompiled")
        return False
    seconds, problem = 0.0, ""
    try:
        assert compiling is not None  # `compile` is not False
        seconds = compiling.result()
    except native.NoCompilerError as error:
        problem = str(error)
    # All ranks or none: compiled and uncompiled steps would all_reduce different tensors.
    if problems := list(filter(None, all_gather_object(problem))):
        why = problem or f"another rank: {problems[0]}"
        log.info(f"llama: {why}: the decode step runs uncompiled, which is slower (--no-compile hides this message)")
        return False
    if seconds:
        log.info(f"llama: decode step compiled in {seconds:.1f} s, saved in {cache_folder()}")
    elif compile is True:
        log.info(f"llama: decode step compiled earlier, loaded from {cache_folder()}")
    return True


def compiled_step(model: Transformer, layers: Sequence[FusedLayer]) -> Step:
    """`torch_step` compiled by torch.compile, once for each number of rows after rounding up.

    The compiled code is saved in the cache folder, from which later processes load it in seconds.
    """
    with contextlib.suppress(OSError):  # a user without a home, or a folder that cannot be written
        cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        if native.only_we_can_write(cache_folder()):  # torch runs the code that it finds there
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "torch.compile"))
    # The steps for 1, 2, 4, ... rows are recompilations of one function, of which torch allows eight.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    compiled: Any = torch.compile(torch_step(model, layers), fullgraph=True, dynamic=False)
    seen: set[int] = set()

    def step(batch: Batch) -> torch.Tensor:
        started, bsz = time.perf_counter(), len(batch.h)
        out: torch.Tensor = compiled(batch)
        if bsz not in seen:
            seen.add(bsz)
            rows = "1 row" if bsz == 1 else f"{bsz} rows"
            log.info(f"llama: decode step for {rows} compiled in {time.perf_counter() - started:.1f} s")
        return out

    return step
