"""What is faster than the plain path and gives the same: merged and packed weights, compiled decode steps.

A model's layers are replaced, each as soon as it is loaded, by layers that hold the same weights in other forms. The
plain path does without all of this (`build(plain=True)`).
"""

import math
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import nn

from llama import native
from llama.checkpoint import OUTPUT
from llama.distributed import exchange, say
from llama.model import Attention, FeedForward, Positions, RMSNorm, Transformer, TransformerBlock, apply_rope
from llama.quantize import quantized, scheme_of, wanted
from llama.terminal import tell

# oneDNN reads packed weights at 27 GB/s for four rows, but at 18 for one (float32; AMD EPYC, 2 threads).
PACKED_ROWS = 4


class Packed(nn.Module):
    """A linear layer whose weight [n, k] stands in the order in which oneDNN computes: x [.., k] -> [.., n]."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight, None), persistent=False)

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.weight.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        m = len(rows)
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows.expand(PACKED_ROWS, -1) if m == 1 else rows, self.weight, None, "none", [], ""
        )
        return y[:m].view(*x.shape[:-1], y.shape[-1])


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have oneDNN's packed products; its operators are private."""
    try:
        return Packed(torch.ones(16, 16, dtype=dtype))(torch.ones(2, 16, dtype=dtype)).eq(16).all().item() is True
    except (AttributeError, RuntimeError):
        return False


# Layers with merged weights -----------------------------------------------------------------------


def summed(x: torch.Tensor) -> torch.Tensor:
    """Add up what the ranks have, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(x, group=get_model_parallel_group())
    return x


def rotated(x: torch.Tensor, at: Positions) -> torch.Tensor:
    """`apply_rope` as a product of complex numbers, for which CPUs need an eighth of the time."""
    if not x.is_cpu:
        return apply_rope(x, at.cos, at.sin)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # even + i odd
    return torch.view_as_real(pairs * torch.complex(at.cos, at.sin)).flatten(-2).to(x.dtype)


class FastNorm(RMSNorm):
    """RMSNorm by torch's norm of vectors: on CPUs, for many rows, several times as fast as `rms_norm`."""

    def __init__(self, plain: RMSNorm):
        nn.Module.__init__(self)
        self.weight, self.eps = plain.weight, plain.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() <= 16 * x.shape[-1] or not x.is_cpu:
            return super().forward(x)
        wide = x.float()
        mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        return (wide * mean.add_(self.eps).rsqrt_()).mul_(self.weight).to(x.dtype)


class FastAttention(Attention):
    """Attention with one product for queries, keys and values."""

    wo: Any

    def __init__(self, plain: Attention, linear: Callable[..., nn.Module], is_native: bool):
        nn.Module.__init__(self)
        self.is_native = is_native
        self.head_dim, self.cache = plain.head_dim, plain.cache
        self.n_local_heads, self.n_local_kv_heads = plain.n_local_heads, plain.n_local_kv_heads
        self.wqkv = linear("attention.wqkv.weight", plain.wq, plain.wk, plain.wv)
        self.wo = linear("attention.wo.weight", plain.wo)

    def forward(self, x: torch.Tensor, at: Positions) -> torch.Tensor:
        q, k = self.n_local_heads, self.n_local_kv_heads
        turned, values = self.wqkv(x).unflatten(-1, (-1, self.head_dim)).split((q + k, k), dim=2)
        queries, keys = rotated(turned, at).split((q, k), dim=2)
        return summed(self.wo(self.attend(queries, keys, values, at)))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: Positions) -> torch.Tensor:
        if not self.is_native or q.dtype != torch.bfloat16:  # in float32 torch is faster
            return super().attend(q, k, v, at)
        self.cache.update(k.transpose(1, 2), v.transpose(1, 2), at.start_pos, at.ctx_len, at.first_row)
        return native.attend(q, self.cache, at).flatten(2)


class FastFeedForward(FeedForward):
    """The feed-forward with one product for gates and values."""

    w2: Any

    def __init__(self, plain: FeedForward, linear: Callable[..., nn.Module]):
        nn.Module.__init__(self)
        self.w13 = linear("feed_forward.w13.weight", plain.w1, plain.w3)
        self.w2 = linear("feed_forward.w2.weight", plain.w2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates, values = self.w13(x).chunk(2, dim=-1)
        return summed(self.w2(F.silu(gates).mul_(values)))


class TiedOutput(native.Plain):
    """The output layer that the embedding serves as: packed, it would stand in memory twice. One row is multiplied in
    parts, which torch computes side by side; the whole it would read at a third of the memory's speed (float32)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() != x.shape[-1] or not x.is_cpu:
            return super().forward(x)
        parts = self.weight.unflatten(0, (math.gcd(16, len(self.weight)), -1))  # [parts, n / parts, k]
        row = x.reshape(1, -1).expand(len(parts), 1, -1)
        # Which side is turned decides which of torch's kernels computes.
        y = parts @ row.mT if x.dtype == torch.float32 else row @ parts.mT
        return y.reshape(*x.shape[:-1], -1)


class FastOutput(nn.Module):
    """The output layer: [.., dim] -> [.., vocab], gathered from the ranks."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = gather_from_model_parallel_region(self.linear(x))
        return y


class SpeedUp:
    """Turns a model, layer by layer, into its faster form.

    scheme: "int8", "int4" or None. compiled: decode by compiled code, which `can_compile` has found possible.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype, scheme: str | None, compiled: bool):
        self.model, self.dtype, self.scheme, self.compiled = model, dtype, scheme, compiled
        self.on_cpu = model.cos.is_cpu
        self.native = compiled and self.on_cpu and dtype in native.KINDS
        if compiled and self.on_cpu and not self.native:
            say("llama: float16 is not compiled on CPUs, bfloat16 and float32 are: the decode step runs uncompiled")
        self.kept = 0  # weights that the scheme leaves as they are because of their width

    def layer(self, block: nn.Module) -> None:
        """Take over one layer; `checkpoint.load_weights` calls it with each part of the model."""
        if isinstance(block, TransformerBlock):
            block.attention = FastAttention(block.attention, self._linear, self.native)
            block.feed_forward = FastFeedForward(block.feed_forward, self._linear)
            block.attention_norm, block.ffn_norm = FastNorm(block.attention_norm), FastNorm(block.ffn_norm)

    def finish(self) -> str:
        """Take over the output layer and the decode step -> what was done to the weights, for the line about it."""
        tied = self.model.output.weight is self.model.tok_embeddings.weight
        if tied and not self.native and scheme_of(OUTPUT, self.model.params.dim, self.scheme) is None:
            linear: nn.Module = TiedOutput(self.model.output.weight)
        else:
            linear = self._linear(OUTPUT, self.model.output)
        self.model.add_module("output", FastOutput(linear))
        if self.native:
            self.model.step = native.Step(self.model)
        elif self.compiled and not self.on_cpu:
            self.model.step = GraphStep(self.model)
        if self.scheme is None:
            return ""
        kept = f" but for {self.kept} whose width does not allow it" if self.kept else ""
        return f", weights in {self.scheme}{kept}"

    def _linear(self, key: str, *plain: nn.Module) -> nn.Module:
        """One layer out of several that have the same input; their own weights are let go."""
        weights: list[torch.Tensor] = [layer.get_parameter("weight") for layer in plain]
        kind = scheme_of(key, weights[0].shape[1], self.scheme)
        self.kept += len(weights) * (kind is None and wanted(key, self.scheme) is not None)
        if kind is not None:
            layer = quantized(kind, self.native, *weights)
            return native.Linear(layer) if self.native else layer
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        weights.clear()
        for each in plain:
            del each.weight  # before it is packed: then this matrix stands in memory twice, not three times
        if self.native:
            return native.Linear(native.Plain(weight))
        return Packed(weight) if self.on_cpu and can_pack(self.dtype) else native.Plain(weight)


def can_compile(device: torch.device) -> bool:
    """Whether decode steps can be compiled here, on all ranks; says so where not. Compiles native.c for CPUs."""
    if device.type == "mps":
        say("llama: nothing is compiled on mps: the decode step runs uncompiled")
    if device.type != "cpu":
        return device.type == "cuda"
    started, made, problem = time.perf_counter(), False, ""
    try:
        made = native.compile_library()
    except native.NoCompilerError as error:
        problem = str(error)
    if problems := list(filter(None, exchange(problem))):  # ranks that compile and others would add up different things
        tell(f"llama: {problem or f'another rank: {problems[0]}'}: the decode step runs uncompiled")
        return False
    how = f"compiled in {time.perf_counter() - started:.1f} s, kept in" if made else "compiled earlier, taken from"
    tell(f"llama: decode step {how} {native.cache_folder()}")
    return True


class GraphStep:
    """`Transformer.step` on CUDA: torch.compile's kernels, replayed as one CUDA graph for a number of rows.

    Static shapes: attention runs over the whole cache with a mask, so that nothing is compiled again as texts grow.
    On a GPU, look first whether TORCH_LOGS=cudagraphs reports skipped graphs (the caches are written in place), and
    whether ranks over NCCL replay in the same order.
    """

    def __init__(self, model: Transformer):
        self.model = model
        self.compiled: Any = torch.compile(partial(_static_step, model), mode="reduce-overhead", fullgraph=True)
        self.seen: set[int] = set()

    def __call__(self, tokens: torch.Tensor, start_pos: int | torch.Tensor) -> torch.Tensor:
        started, bsz = time.perf_counter(), len(tokens)
        positions = torch.as_tensor(start_pos, device=tokens.device).expand(bsz).contiguous()
        h = self.model.tok_embeddings(tokens)  # fairscale's, which torch.compile cannot take in
        torch.compiler.cudagraph_mark_step_begin()
        h = self.compiled(h, positions).clone()  # the graph's own output is written over by its next replay
        if bsz not in self.seen:
            self.seen.add(bsz)
            rows = "1 row" if bsz == 1 else f"{bsz} rows"
            say(f"llama: decode step for {rows} compiled in {time.perf_counter() - started:.1f} s")
        return h


def _static_step(model: Transformer, h: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Embeddings of the new ids [bsz, 1, dim] at positions [bsz] -> hidden states, shapes depending on bsz alone."""
    ctx_len = model.params.max_seq_len
    mask = (torch.arange(ctx_len, device=h.device) <= positions[:, None])[:, None, None]  # [bsz, 1, 1, ctx_len]
    cos, sin = model.cos[positions][:, None, None], model.sin[positions][:, None, None]
    at = Positions(positions, ctx_len, cos, sin, mask)
    for layer in model.layers:
        h = layer(h, at)
    out: torch.Tensor = model.norm(h)
    return out
