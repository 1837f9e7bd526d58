"""A transformer block with merged matmuls: one for queries, keys and values, one for the gate and up projections.

A merged matrix needs no copy, because `llama.model` allocates these weights as adjacent rows of one storage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from torch import nn

from llama.accelerate import native
from llama.accelerate.linear import LARGEST_ROWS, MEASURED_ROWS, kernel, measured_rows
from llama.accelerate.quantize import MAX_GEMV_ROWS
from llama.accelerate.quantized_weight import QuantizedWeight
from llama.accelerate.snapshot import is_hooked
from llama.cache import KVCache, Rows
from llama.model import Attention, FeedForward, RMSNorm, TransformerBlock, apply_rope
from llama.parallel.groups import model_parallel
from llama.parallel.layers import ColumnLinear, RowLinear

Linear = Callable[[torch.Tensor], torch.Tensor]  # x [.., k] -> [.., n]


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks, in place."""
    if model_parallel()[1] > 1:
        dist.all_reduce(x, group=get_model_parallel_group())
    return x


# Matmuls ------------------------------------------------------------------------------------------


class Dense:
    """x [.., k] -> [.., n] by a weight [n, k] in the model's dtype. is_native: use native.c for few rows."""

    def __init__(self, weight: torch.Tensor, is_native: bool):
        self.weight, self.is_native = weight, is_native and weight.dtype in native.KINDS
        # With native.c for few rows, only prompts use a measured kernel, which may be that of native.c.
        rows = (LARGEST_ROWS,) if self.is_native else MEASURED_ROWS
        others = {native.library_name(): native.linear_blocks} if self.is_native else {}
        self.kernels = {m: kernel(weight, m, others) for m in rows}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        m = x.numel() // x.shape[-1]
        if self.is_native and m <= MAX_GEMV_ROWS:
            return native.multiply(native.matrix(self.weight), x, self.weight.dtype)
        x = x.to(self.weight.dtype)
        return self.kernels[LARGEST_ROWS if self.is_native else measured_rows(m)](x, self.weight)


def merge_weights(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """A view of adjacent weights [n, k] of one storage as one matrix; None if they are not adjacent."""
    first = weights[0]
    address = first.data_ptr()
    for weight in weights:
        if (
            weight.dim() != 2
            or weight.shape[1] != first.shape[1]
            or weight.dtype != first.dtype
            or not weight.is_contiguous()
            or weight.data_ptr() != address
            or weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return None
        address += weight.nbytes
    n, k = sum(map(len, weights)), first.shape[1]
    return first.detach().as_strided((n, k), (k, 1), first.storage_offset())


def merge_linears(layers: Sequence[nn.Module], is_native: bool) -> Linear | None:
    """One matmul for layers with the same input; None if their weights are not parts of one matrix."""
    weights = [cast(torch.Tensor, layer.weight) for layer in layers]
    if not any(isinstance(weight, QuantizedWeight) for weight in weights):
        matrix = merge_weights(weights)
        return None if matrix is None else Dense(matrix, is_native)
    source, row = getattr(weights[0], "source", None), 0
    for weight in weights:
        if not isinstance(weight, QuantizedWeight) or weight.source is not source or weight.start != row:
            return None
        row += len(weight)
    return source if source is not None and row == source.n else None


# Blocks -------------------------------------------------------------------------------------------


def rms_norm(module: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm. For many rows on a CPU it uses `vector_norm`, which is several times as fast as `F.rms_norm`."""
    weight = module.weight
    if x.numel() <= 16 * x.shape[-1] or not x.is_cpu:
        return F.rms_norm(x, weight.shape, weight, module.eps)
    x32 = x.float()
    mean = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return (x32 * mean.add_(module.eps).rsqrt_()).mul_(weight).to(x.dtype)


@dataclass(frozen=True)
class Positions:
    """Positions of the ids of one forward, the same for all layers.

    start_pos: position of each row's first id, one int or [bsz]. ctx_len: number of positions that queries may attend
    to, counted from 0. freqs_cis: rotary angles of the ids, [.., seqlen, head_dim / 2].
    mask: True where a query may attend, [.., seqlen, ctx_len]; None for a single query, and for a prefill from position
    0, which is causal.
    rows: the cache rows. runs: those of a decode step, in parts that are adjacent and ascending, if they are not
    altogether. Keys and values of a part are views of the cache; those of scattered rows would have to be copied.
    stored: the cache rows for new keys and values, if these are not `rows`.
    """

    start_pos: int | torch.Tensor
    ctx_len: int
    freqs_cis: torch.Tensor
    mask: torch.Tensor | None
    rows: Rows
    runs: "Sequence[Run]" = ()
    stored: torch.Tensor | None = None

    @staticmethod
    def of(
        tokens: torch.Tensor,
        start_pos: int | torch.Tensor,
        ctx_len: int,
        freqs_cis: torch.Tensor,
        cache: KVCache,
        slots: Sequence[int] | None,
    ) -> "Positions":
        bsz, seqlen = tokens.shape
        rows = cache.rows(slots, bsz)
        if isinstance(start_pos, int):
            mask = causal_mask(seqlen, ctx_len, tokens.device) if start_pos > 0 and seqlen > 1 else None
            freqs_cis = freqs_cis[start_pos : start_pos + seqlen]
        else:
            positions = start_pos[:, None] + torch.arange(seqlen, device=tokens.device)  # [bsz, seqlen]
            keys = torch.arange(ctx_len, device=tokens.device)
            mask = (keys <= positions[..., None])[:, None]  # [bsz, 1, seqlen, ctx_len]
            freqs_cis = freqs_cis[positions]
        is_scattered = seqlen == 1 and isinstance(rows, torch.Tensor)
        runs = split_runs(slots or (), start_pos, ctx_len, mask) if is_scattered else ()
        return Positions(start_pos, ctx_len, freqs_cis, mask, rows, runs)


@dataclass(frozen=True)
class Run:
    """A part of the rows of a decode step, in cache rows that are adjacent and ascending. ctx_len and mask: as in
    `Positions`, for these rows."""

    part: slice
    rows: slice
    ctx_len: int
    mask: torch.Tensor | None


def split_runs(
    slots: Sequence[int], start_pos: int | torch.Tensor, ctx_len: int, mask: torch.Tensor | None
) -> list[Run]:
    """The runs of a decode step, as few as possible. On CPUs each ends at its own longest position; reading positions
    from another device would wait for it."""
    ends = [i for i in range(1, len(slots) + 1) if i == len(slots) or slots[i] != slots[i - 1] + 1]
    positions: list[int] | None = None
    if isinstance(start_pos, torch.Tensor) and start_pos.is_cpu:
        positions = start_pos.tolist()
    runs = []
    for start, end in zip([0, *ends], ends, strict=False):
        length = max(positions[start:end]) + 1 if positions else ctx_len
        part = slice(start, end)
        is_even = positions is not None and len(set(positions[part])) == 1
        own = None if mask is None or is_even else mask[part, ..., :length]
        runs.append(Run(part, slice(slots[start], slots[start] + end - start), length, own))
    return runs


def causal_mask(seqlen: int, ctx_len: int, device: torch.device) -> torch.Tensor:
    """Which of `ctx_len` positions each of the last `seqlen` may attend to: bool [seqlen, ctx_len].

    On CUDA it is torch's `causal_lower_right`, as the flash kernel does not accept a mask tensor.
    """
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right  # imports all of torch's compiler

        return causal_lower_right(seqlen, ctx_len)
    return torch.ones(seqlen, ctx_len, dtype=torch.bool, device=device).tril(ctx_len - seqlen)


class FusedLayer:
    """A `TransformerBlock` with four matmuls: wqkv, wo, w13 and w2. It uses the block's weights and cache in place."""

    def __init__(self, block: TransformerBlock, linears: Sequence[Linear], is_native: bool):
        self.attention_norm = block.attention_norm
        self.ffn_norm = block.ffn_norm
        attention = block.attention
        self.cache, self.head_dim = attention.cache, attention.head_dim
        self.n_local_heads, self.n_local_kv_heads = attention.n_local_heads, attention.n_local_kv_heads
        self.wqkv, self.wo, self.w13, self.w2 = linears
        self.shapes = [layer.weight.shape for layer in (attention.wo, block.feed_forward.w2)]
        self.is_native = is_native

    @staticmethod
    def of(block: nn.Module, is_native: bool) -> "FusedLayer | None":
        """The fused layer of a block; None if the user has changed the block, which then runs as a module."""
        if type(block) is not TransformerBlock:
            return None
        attention, feed_forward = block.attention, block.feed_forward
        linears = [
            [getattr(owner, name, None) for name in names.split()]
            for owner, names in (
                (attention, "wq wk wv"),
                (attention, "wo"),
                (feed_forward, "w1 w3"),
                (feed_forward, "w2"),
            )
        ]
        norms = [block.attention_norm, block.ffn_norm]
        parts: list[Any] = [attention, feed_forward, *norms, *chain.from_iterable(linears)]
        kinds = [Attention, FeedForward, RMSNorm, RMSNorm]
        kinds += [ColumnLinear, ColumnLinear, ColumnLinear, RowLinear, ColumnLinear, ColumnLinear, RowLinear]
        modules = list(block.modules())
        if [type(part) for part in parts] != kinds or len(modules) != 1 + len(parts):
            return None
        if any(map(is_hooked, modules)) or any(len(module._parameters) != 1 for module in norms):
            return None
        if any(set(layer._parameters) - {"weight", "bias"} or layer.bias is not None for layer in parts[4:]):
            return None
        merged = [merge_linears(cast(list[nn.Module], layers), is_native) for layers in linears]
        if any(linear is None for linear in merged):
            return None
        layer = FusedLayer(block, cast(list[Linear], merged), is_native)
        return layer if layer._fits(*linears) else None

    def _fits(self, qkv: Any, wo: Any, w13: Any, w2: Any) -> bool:
        """Whether shapes, dtypes and devices are those that the merged matmuls and native.c rely on."""
        heads, kv = self.n_local_heads * self.head_dim, self.n_local_kv_heads * self.head_dim
        dim, width = len(wo[0].weight), len(w13[0].weight)
        shapes = [(heads, dim), (kv, dim), (kv, dim), (dim, heads), (width, dim), (width, dim), (dim, width)]
        weights = [layer.weight for layer in (*qkv, *wo, *w13, *w2)]
        norms = [self.attention_norm.weight, self.ffn_norm.weight]
        k, v = self.cache.k, self.cache.v
        return (
            [tuple(weight.shape) for weight in weights] == shapes
            and all(weight.shape == (dim,) and weight.is_contiguous() for weight in norms)
            and all(t.dtype == k.dtype and t.device == k.device for t in (*weights, *norms, v))
            and k.shape == v.shape
            and k.shape[1] == self.n_local_kv_heads
            and k.shape[3] == self.head_dim
            and k.is_contiguous()
            and v.is_contiguous()
        )

    def __call__(self, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        """[bsz, seqlen, dim] -> [bsz, seqlen, dim], and fill the cache."""
        q, kv = self.n_local_heads, self.n_local_kv_heads
        qkv = self.wqkv(rms_norm(self.attention_norm, x)).unflatten(-1, (-1, self.head_dim))
        qk, values = qkv.split((q + kv, kv), dim=2)  # [bsz, seqlen, heads, head_dim]
        queries, keys = apply_rope(qk, positions.freqs_cis).split((q, kv), dim=2)
        h = x + all_reduce(self.wo(self.attend(queries, keys, values, positions)))
        gate, up = self.w13(rms_norm(self.ffn_norm, h)).chunk(2, dim=-1)
        return h + all_reduce(self.w2(F.silu(gate).mul_(up)))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Store keys and values, then attend: [bsz, seqlen, heads, head_dim] each -> [bsz, seqlen, local width]."""
        bsz, seqlen, _, _ = q.shape
        start_pos, ctx_len, mask, rows = positions.start_pos, positions.ctx_len, positions.mask, positions.rows
        cache = self.cache
        stored = rows if positions.stored is None else positions.stored
        cache.store(k.transpose(1, 2), v.transpose(1, 2), start_pos, ctx_len, stored)
        if self.is_native and q.dtype == torch.bfloat16:  # in float32 torch is faster
            return native.attend(q, cache, start_pos, rows).flatten(2)
        q = q.transpose(1, 2)  # [bsz, heads, seqlen, head_dim]
        if seqlen == 1:
            # The heads that share a KV head become its queries, so that keys and values need not be repeated.
            q = q.view(bsz, self.n_local_kv_heads, -1, self.head_dim)
            if positions.runs:
                out = torch.cat([self._attend_run(q, run) for run in positions.runs])
            else:
                keys, values = cache.k[rows, :, :ctx_len], cache.v[rows, :, :ctx_len]
                out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        else:
            # is_causal aligns the first query with the first key, which is correct only if the cache was empty.
            out = F.scaled_dot_product_attention(
                q,
                cache.k[rows, :, :ctx_len],
                cache.v[rows, :, :ctx_len],
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=self.n_local_heads != self.n_local_kv_heads,
            )
        out = out.reshape(bsz, self.n_local_heads, seqlen, self.head_dim).transpose(1, 2)
        return out.reshape(bsz, seqlen, -1)

    def _attend_run(self, q: torch.Tensor, run: Run) -> torch.Tensor:
        keys, values = (buffer[run.rows, :, : run.ctx_len] for buffer in (self.cache.k, self.cache.v))
        return F.scaled_dot_product_attention(q[run.part], keys, values, attn_mask=run.mask)
