"""Compiled decode steps: whether this machine can compile one, and the step for CUDA (`native.py` has the CPU's)."""

import logging
import time
from typing import Any

import torch

from llama.accelerate import native
from llama.accelerate.fused import FusedLayer, Positions, rms_norm
from llama.model import Transformer
from llama.parallel.device import cache_folder
from llama.parallel.groups import all_gather_object

log = logging.getLogger(__name__)


def can_compile(compile: bool | str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether to compile decode steps. For a CPU, also compiles native.c.

    All ranks must call this, and all get the same answer. compile: as in `Llama.build`. If it is True but this device
    or dtype is not supported, or if native.c cannot be compiled, the reason is logged.
    """
    if device.type == "cuda":
        return compile is True
    if not compile or (compile == "auto" and (device.type != "cpu" or dtype not in native.KINDS)):
        return False
    if device.type != "cpu":
        log.info(f"llama: nothing is compiled on {device.type}: the decode step runs uncompiled")
        return False
    if dtype not in native.KINDS:
        log.info("llama: float16 is not compiled on CPUs, only bfloat16 and float32: the decode step runs uncompiled")
        return False
    started, is_new, problem = time.perf_counter(), False, ""
    try:
        is_new = native.compile_library()
    except native.NoCompilerError as error:
        problem = str(error)
    # All ranks or none: compiled and uncompiled steps would all_reduce different tensors.
    if problems := list(filter(None, all_gather_object(problem))):
        why = problem or f"another rank: {problems[0]}"
        log.info(f"llama: {why}: the decode step runs uncompiled, which is slower (--no-compile hides this message)")
        return False
    if is_new:
        log.info(f"llama: decode step compiled in {time.perf_counter() - started:.1f} s, saved in {cache_folder()}")
    elif compile is True:
        log.info(f"llama: decode step compiled earlier, loaded from {cache_folder()}")
    return True


class CudaGraphDecoder:
    """A decode step on CUDA: ids [bsz, 1] -> hidden states [bsz, 1, dim]. torch.compile's kernels are replayed as one
    CUDA graph, compiled once for each number of rows.

    Shapes are static: attention runs over the whole cache with a mask, so a longer text needs no new compilation.
    When debugging on a GPU, first check two things. TORCH_LOGS=cudagraphs must report no skipped graphs: torch may skip
    one because the caches are written in place. And with NCCL, all ranks must replay graphs in the same order.
    """

    def __init__(self, model: Transformer, layers: list[FusedLayer]):
        self.embed, self.freqs_cis = model.tok_embeddings, model.freqs_cis
        final_norm, ctx_len = model.norm, layers[0].cache.k.shape[2]

        def step(h: torch.Tensor, start_pos: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
            mask = (torch.arange(ctx_len, device=h.device) <= start_pos[:, None])[:, None, None]  # [bsz, 1, 1, ctx_len]
            positions = Positions(start_pos, ctx_len, torch.view_as_complex(angles), mask, slice(0, len(h)))
            for layer in layers:
                h = layer(h, positions)
            return rms_norm(final_norm, h)

        self.compiled: Any = torch.compile(step, mode="reduce-overhead", fullgraph=True)
        self.seen: set[int] = set()

    def __call__(self, tokens: torch.Tensor, start_pos: int | torch.Tensor) -> torch.Tensor:
        started, bsz = time.perf_counter(), len(tokens)
        positions = torch.as_tensor(start_pos, device=tokens.device).expand(bsz).contiguous()
        h = self.embed(tokens)  # outside the graph: torch.compile cannot trace fairscale's embedding
        angles = torch.view_as_real(self.freqs_cis.to(h.device)[positions][:, None])  # [bsz, 1, head_dim / 2, 2]
        torch.compiler.cudagraph_mark_step_begin()
        h = self.compiled(h, positions, angles).clone()  # the next replay overwrites the graph's own output
        if bsz not in self.seen:
            self.seen.add(bsz)
            rows = "1 row" if bsz == 1 else f"{bsz} rows"
            log.info(f"llama: decode step for {rows} compiled in {time.perf_counter() - started:.1f} s")
        return h
