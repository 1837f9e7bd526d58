"""A decode step on CUDA: the layers' own matmuls, and Triton kernels for what is between them. Imported only where
Triton runs, as `triton_kernels` is."""

# mypy: disable-error-code="no-untyped-def"
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from llama.accelerate.cuda_graph import Batch, Step
from llama.accelerate.fused import FusedLayer, all_reduce, rms_norm
from llama.accelerate.triton_kernels import _add_dot, add_norm, silu_mul
from llama.model import Transformer

MAX_PROGRAMS = 512  # programs of attention: enough to keep all multiprocessors of a large GPU busy
MIN_KEYS = 64  # keys that a program of attention reads at least, in the longest context
MAX_SPLITS = 64  # `_join_parts` holds this many partial results in registers


def triton_step(model: Transformer, layers: Sequence[FusedLayer]) -> Step:
    """`cuda_graph.torch_step` with Triton kernels. Attention reads each row's keys up to its position, in any rows of
    the cache, so ctx_len and is_in_order are not used."""
    first = layers[0]
    following_norms = [*(layer.attention_norm for layer in layers[1:]), model.norm]
    _, kv_heads, max_seq_len, _ = first.cache.k.shape

    def step(batch: Batch) -> torch.Tensor:
        bsz, _, dim = batch.h.shape
        positions, slots = batch.positions, batch.slots
        splits = count_splits(bsz * kv_heads, max_seq_len)
        x = batch.h.view(bsz, dim)
        normed = rms_norm(first.attention_norm, x)
        for layer, next_norm in zip(layers, following_norms, strict=True):
            ffn_norm, k, v = layer.ffn_norm, layer.cache.k, layer.cache.v
            queries = rotate_and_store(layer.wqkv(normed), batch.angles, positions, slots, k, v)
            attended = attend(queries, k, v, positions, slots, splits).view(bsz, -1)
            x, normed = add_norm(x, all_reduce(layer.wo(attended)), ffn_norm.weight, ffn_norm.eps)
            activated = silu_mul(layer.w13(normed))
            x, normed = add_norm(x, all_reduce(layer.w2(activated)), next_norm.weight, next_norm.eps)
        return normed[:, None]

    return step


# Rotary positions ---------------------------------------------------------------------------------


@triton.jit
def _rotate_and_store(
    qkv, angles, positions, slots, queries, keys, values, max_seq_len,
    heads: tl.constexpr, kv_heads: tl.constexpr, head_dim: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One head of one row: rotate a query, or rotate and store a key, or store a value."""
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row)
    pair = tl.arange(0, block)
    is_pair = pair < head_dim // 2
    start = qkv + row * ((heads + 2 * kv_heads) * head_dim) + head * head_dim
    even = tl.load(start + 2 * pair, mask=is_pair, other=0)
    odd = tl.load(start + 2 * pair + 1, mask=is_pair, other=0)
    if head < heads + kv_heads:
        angle = angles + (position * (head_dim // 2) + pair) * 2
        cos, sin = tl.load(angle, mask=is_pair, other=0), tl.load(angle + 1, mask=is_pair, other=0)
        a, b = even.to(tl.float32), odd.to(tl.float32)
        even, odd = (a * cos - b * sin).to(even.dtype), (a * sin + b * cos).to(even.dtype)
    if head < heads:
        query = queries + (row * heads + head) * head_dim + 2 * pair
        tl.store(query, even, mask=is_pair)
        tl.store(query + 1, odd, mask=is_pair)
    else:
        line = (tl.load(slots + row) * kv_heads + (head - heads) % kv_heads) * max_seq_len + position
        place = line * head_dim + 2 * pair
        if head < heads + kv_heads:
            tl.store(keys + place, even, mask=is_pair)
            tl.store(keys + place + 1, odd, mask=is_pair)
        else:
            tl.store(values + place, even, mask=is_pair)
            tl.store(values + place + 1, odd, mask=is_pair)


def rotate_and_store(
    qkv: torch.Tensor,
    angles: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Rotate queries and keys, and store keys and values in the cache. Returns the queries [m, heads, head_dim].

    qkv: queries, keys and values, [m, (heads + 2 * kv_heads) * head_dim]. angles: cos and sin of all positions, fp32
    [n, head_dim / 2, 2]. positions, slots: int64 [m]. keys, values: [rows, kv_heads, max_seq_len, head_dim].
    """
    _, kv_heads, max_seq_len, head_dim = keys.shape
    m, heads = len(qkv), qkv.shape[1] // head_dim - 2 * kv_heads
    queries = qkv.new_empty(m, heads, head_dim)
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    block = triton.next_power_of_2(head_dim // 2)
    _rotate_and_store[(m, heads + 2 * kv_heads)](
        qkv, angles, positions, slots, queries, keys, values, max_seq_len, **sizes, block=block, num_warps=1
    )
    return queries


# Attention ----------------------------------------------------------------------------------------


@triton.jit
def _attend_part(
    queries, keys, values, positions, slots, sums, maxima, totals, max_seq_len, scale, splits,
    group: tl.constexpr, kv_heads: tl.constexpr, head_dim: tl.constexpr,
    padded_group: tl.constexpr, padded_head: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Attention of the queries of one row and KV head to one of `splits` parts of the keys. Stores the values' sum,
    weighted by exp(score - maximum), the maximum of the scores, and the sum of the weights."""
    pair, split = tl.program_id(0), tl.program_id(1)  # pair: a row and a KV head
    row = pair // kv_heads
    n = tl.load(positions + row).to(tl.int32) + 1
    share = tl.cdiv(tl.cdiv(n, splits), block) * block
    begin, end = split * share, tl.minimum(n, split * share + share)
    query, of_head = tl.arange(0, padded_group), tl.arange(0, padded_head)
    is_query, is_head = query < group, of_head < head_dim
    at = (pair * group + query[:, None]) * head_dim + of_head[None, :]
    q = tl.load(queries + at, mask=is_query[:, None] & is_head[None, :], other=0)
    first = (tl.load(slots + row) * kv_heads + pair % kv_heads) * max_seq_len * head_dim
    # Finite, so that a part without keys has the weight exp(-1e30 - maximum) = 0 and not NaN.
    maximum = tl.full((padded_group,), -1e30, tl.float32)
    total = tl.zeros((padded_group,), tl.float32)
    out = tl.zeros((padded_group, padded_head), tl.float32)
    for start in range(begin, end, block):
        position = start + tl.arange(0, block)
        is_key = position < end
        places = first + position[:, None] * head_dim + of_head[None, :]
        k = tl.load(keys + places, mask=is_key[:, None] & is_head[None, :], other=0)
        scores = _add_dot(q, tl.trans(k), tl.zeros((padded_group, block), tl.float32)) * scale
        scores = tl.where(is_key[None, :], scores, -1e30)
        higher = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.where(is_key[None, :], tl.exp(scores - higher[:, None]), 0)
        shrink = tl.exp(maximum - higher)
        v = tl.load(values + places, mask=is_key[:, None] & is_head[None, :], other=0)
        out = _add_dot(weights.to(v.dtype), v, out * shrink[:, None])
        total = total * shrink + tl.sum(weights, 1)
        maximum = higher
    to = (pair * splits + split) * group + query
    tl.store(maxima + to, maximum, mask=is_query)
    tl.store(totals + to, total, mask=is_query)
    tl.store(sums + to[:, None] * head_dim + of_head[None, :], out, mask=is_query[:, None] & is_head[None, :])


@triton.jit
def _join_parts(
    sums, maxima, totals, out, splits, group: tl.constexpr, head_dim: tl.constexpr,
    padded_head: tl.constexpr, padded_splits: tl.constexpr,
):  # fmt: skip
    """Combine the parts of one query's attention."""
    pair, query = tl.program_id(0), tl.program_id(1)
    part, of_head = tl.arange(0, padded_splits), tl.arange(0, padded_head)
    is_part, is_head = part < splits, of_head < head_dim
    at = (pair * splits + part) * group + query
    maximum = tl.load(maxima + at, mask=is_part, other=-1e30)
    weight = tl.exp(maximum - tl.max(maximum, 0))
    total = tl.sum(weight * tl.load(totals + at, mask=is_part, other=0), 0)
    parts = tl.load(sums + at[:, None] * head_dim + of_head[None, :], mask=is_part[:, None] & is_head[None, :], other=0)
    joined = tl.sum(parts * weight[:, None], 0) / total
    tl.store(out + (pair * group + query) * head_dim + of_head, joined.to(out.dtype.element_ty), mask=is_head)


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    splits: int,
) -> torch.Tensor:
    """Attention of one query per head to its row's keys up to its position: [m, heads, head_dim] -> the same shape.

    keys, values: [rows, kv_heads, max_seq_len, head_dim]. positions, slots: int64 [m]. splits: parts of the keys that
    are read at the same time (flash-decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
    """
    (m, heads, head_dim), (_, kv_heads, max_seq_len, _) = queries.shape, keys.shape
    group, padded_head = heads // kv_heads, max(16, triton.next_power_of_2(head_dim))
    sums = torch.empty(m * kv_heads, splits, group, head_dim, dtype=torch.float32, device=queries.device)
    maxima, totals = torch.empty(2, m * kv_heads, splits, group, dtype=torch.float32, device=queries.device)
    sizes: dict[str, Any] = {"group": group, "head_dim": head_dim, "padded_head": padded_head}
    padded_group = max(16, triton.next_power_of_2(group))  # the tensor cores multiply 16 rows at a time
    _attend_part[(m * kv_heads, splits)](
        queries, keys, values, positions, slots, sums, maxima, totals, max_seq_len, head_dim**-0.5, splits,
        kv_heads=kv_heads, padded_group=padded_group, block=64, num_warps=4, num_stages=2, **sizes,
    )  # fmt: skip
    out = torch.empty_like(queries)
    padded_splits = triton.next_power_of_2(splits)
    _join_parts[(m * kv_heads, group)](
        sums, maxima, totals, out, splits, padded_splits=padded_splits, num_warps=4, **sizes
    )
    return out


def count_splits(pairs: int, max_seq_len: int) -> int:
    """The number of parts into which `attend` divides the keys. pairs: rows times KV heads."""
    return max(1, min(MAX_PROGRAMS // pairs, max_seq_len // MIN_KEYS, MAX_SPLITS))
