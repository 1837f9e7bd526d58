"""The reference implementation of the Llama architecture, with the names of Meta's model.py: pre-norm blocks, rotary
positions, grouped-query attention, SwiGLU feed-forward.

Shapes use bsz (rows), seqlen (new positions), ctx_len (positions that a query may attend to, including the new ones),
dim, head_dim and vocab. "Local" means this rank's part of something that is split over the ranks.

Users may read, hook, write and replace the modules and their weights. `llama.accelerate.executor` derives faster code
from them and leaves them in place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import (  # noqa: F401  Meta's module has them, and programs use them in isinstance
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import nn
from typing_extensions import Self

from llama.cache import KVCache
from llama.parallel.groups import model_parallel
from llama.parallel.layers import ColumnLinear, DimEmbedding, RowLinear, VocabEmbedding, init_weight, share_storage
from llama.params import ModelArgs, ffn_width

# Norm and positions -------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.weight.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).type_as(x) * self.weight


def precompute_freqs_cis(
    dim: int,
    end: int,
    theta: float = 10000.0,
    use_scaled: bool = False,
    *,
    scale_factor: float = 8.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_context_length: float = 8192,
    linear_factor: float | None = None,
) -> torch.Tensor:
    """cos + i sin of position * frequency: complex64 [end, dim / 2], where dim is the dimension of a head.

    Always computed on the CPU, so that all devices use the same angles.

    Pair i of a head is rotated by theta^(-2i / dim) radians per position (Su et al. 2021, arXiv:2104.09864).
    linear_factor divides these frequencies (arXiv:2306.15595). use_scaled (Llama 3.1, arXiv:2407.21783): wavelengths
    above original_context_length / low_freq_factor are multiplied by scale_factor, those below original_context_length
    / high_freq_factor are unchanged, and in between the two frequencies are blended.
    """
    pair = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")
    freqs = 1.0 / (theta ** (pair / dim))  # [dim / 2]
    if use_scaled:
        periods = original_context_length * freqs / (2 * torch.pi)  # full turns within the original context
        span = high_freq_factor - low_freq_factor or 1e-30  # if the factors are equal, there is nothing to blend
        keep = ((periods - low_freq_factor) / span).clamp(0, 1)
        freqs = (1 - keep) * freqs / scale_factor + keep * freqs
    elif linear_factor is not None:
        freqs = freqs / linear_factor
    angles = torch.outer(torch.arange(end, dtype=torch.float32, device="cpu"), freqs)
    return torch.complex(angles.cos(), angles.sin())


def rotary_angles(args: ModelArgs, positions: int) -> torch.Tensor:
    """`precompute_freqs_cis` for a model's heads and scaling."""
    return precompute_freqs_cis(
        args.head_dim,
        positions,
        args.rope_theta,
        args.use_scaled_rope,
        scale_factor=args.rope_factor,
        low_freq_factor=args.rope_low_freq_factor,
        high_freq_factor=args.rope_high_freq_factor,
        original_context_length=args.rope_original_context_length,
        linear_factor=args.rope_linear_factor,
    )


def reshape_for_broadcast(freqs_cis: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """View freqs_cis so that it broadcasts over x [bsz, seqlen, heads, head_dim / 2].

    freqs_cis: [seqlen, head_dim / 2], or [bsz, seqlen, head_dim / 2] if each row has its own positions. Raises
    ValueError if the shapes do not match.
    """
    if freqs_cis.shape[-2:] != (x.shape[1], x.shape[-1]) or freqs_cis.dim() > 3:
        raise ValueError(
            f"freqs_cis has shape {tuple(freqs_cis.shape)}, expected {(x.shape[1], x.shape[-1])} for x {tuple(x.shape)}"
        )
    return freqs_cis.unsqueeze(-2) if freqs_cis.dim() == 3 else freqs_cis[None, :, None]


def apply_rope(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """Rotate adjacent pairs of x [bsz, seqlen, heads, head_dim]; freqs_cis as for `reshape_for_broadcast`."""
    if x.is_cpu:  # on CPUs complex numbers are eight times as fast as the code below
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))  # even + i odd
        return torch.view_as_real(pairs * reshape_for_broadcast(freqs_cis, pairs)).flatten(-2).type_as(x)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [bsz, seqlen, heads, head_dim / 2] each
    cos, sin = torch.view_as_real(reshape_for_broadcast(freqs_cis, even)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)


def apply_rotary_emb(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys [bsz, seqlen, heads, head_dim] by their positions' angles [seqlen, head_dim / 2]."""
    return apply_rope(xq, freqs_cis), apply_rope(xk, freqs_cis)


def repeat_kv(x: torch.Tensor, n_rep: int) -> torch.Tensor:
    """Repeat each KV head: [bsz, seqlen, n_kv_heads, head_dim] -> [bsz, seqlen, n_kv_heads * n_rep, head_dim]."""
    return x if n_rep == 1 else x.repeat_interleave(n_rep, dim=2)


def causal_mask(seqlen: int, start_pos: int, like: torch.Tensor) -> torch.Tensor | None:
    """The mask to add to attention scores, [seqlen, start_pos + seqlen]: -inf at later positions, 0 elsewhere. None for
    a single query, which may attend to all of them."""
    if seqlen == 1:
        return None
    mask = torch.full((seqlen, start_pos + seqlen), -torch.inf, dtype=like.dtype, device=like.device)
    return mask.triu_(start_pos + 1)


# Blocks -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Grouped-query attention over this rank's heads, with the cache of their keys and values.

    cache_k, cache_v: writable views of the cache in Meta's layout, [max_batch_size, max_seq_len, n_local_kv_heads,
    head_dim]. Assign a tensor of that layout to replace the cache.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        _, world_size = model_parallel()
        self.head_dim = args.head_dim
        self.n_kv_heads = args.kv_heads
        self.n_local_heads = args.n_heads // world_size
        # With more ranks than KV heads, neighbouring ranks hold the same head.
        self.n_local_kv_heads = max(1, args.kv_heads // world_size)
        self.n_rep = self.n_local_heads // self.n_local_kv_heads
        copies = max(1, world_size // args.kv_heads)
        q, kv = self.n_local_heads * self.head_dim, self.n_local_kv_heads * self.head_dim
        wq, wk, wv = share_storage(
            init_weight((q, args.dim), 0),
            init_weight((kv, args.dim), 0, copies),
            init_weight((kv, args.dim), 0, copies),
        )
        self.wq, self.wk, self.wv = ColumnLinear(wq), ColumnLinear(wk), ColumnLinear(wv)
        self.wo = RowLinear(init_weight((args.dim, q), 1))
        shape = (args.max_batch_size, self.n_local_kv_heads, args.max_seq_len, self.head_dim)
        self.cache = KVCache(shape, wq.dtype, wq.device)

    @property
    def cache_k(self) -> torch.Tensor:
        return self.cache.k.transpose(1, 2)

    @cache_k.setter
    def cache_k(self, value: torch.Tensor) -> None:
        self.cache.k = self._as_cache("cache_k", value)

    @property
    def cache_v(self) -> torch.Tensor:
        return self.cache.v.transpose(1, 2)

    @cache_v.setter
    def cache_v(self, value: torch.Tensor) -> None:
        self.cache.v = self._as_cache("cache_v", value)

    def _as_cache(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if value.dim() != 4 or value.shape[2:] != (self.n_local_kv_heads, self.head_dim):
            expected = f"[rows, positions, {self.n_local_kv_heads}, {self.head_dim}]"
            raise ValueError(f"{name} of shape {list(value.shape)}: expected {expected}")
        return value.transpose(1, 2)

    def forward(
        self,
        x: torch.Tensor,
        start_pos: int | torch.Tensor,
        freqs_cis: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from x [bsz, seqlen, dim], whose first position is start_pos; store its keys and values in the cache.

        start_pos: one int, or an int64 tensor [bsz] if each row has its own position.
        freqs_cis: the angles of these positions, [seqlen, head_dim / 2] or [bsz, seqlen, head_dim / 2].
        mask: added to the scores, [.., seqlen, ctx_len]. None: attend to all positions up to the last one of x.

        Returns [bsz, seqlen, dim].
        """
        bsz, seqlen, _ = x.shape
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        xq = xq.view(bsz, seqlen, self.n_local_heads, self.head_dim)
        xk = xk.view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)
        xv = xv.view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis)
        q, k, v = (y.transpose(1, 2) for y in (xq, xk, xv))  # [bsz, heads, seqlen, head_dim]

        self.cache.to(k)
        ctx_len = mask.shape[-1] if mask is not None else int(start_pos) + seqlen
        keys, values = self.cache.update(k.detach(), v.detach(), start_pos, ctx_len)  # [.., ctx_len, head_dim]
        if torch.is_grad_enabled() and k.requires_grad:
            # The cache is outside the autograd graph, and a later forward pass may overwrite it, so the new positions
            # use k and v themselves. Earlier positions are constants.
            before = ctx_len - seqlen
            keys, values = torch.cat((keys[:, :, :before], k), dim=2), torch.cat((values[:, :, :before], v), dim=2)
        keys, values = (repeat_kv(y.transpose(1, 2), self.n_rep).transpose(1, 2) for y in (keys, values))
        mask = None if mask is None else mask.to(q.dtype)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)  # [bsz, n_local_heads, seqlen, head_dim]
        out = out.transpose(1, 2)  # [bsz, seqlen, n_local_heads, head_dim]
        return self.wo(out.reshape(bsz, seqlen, -1))


class FeedForward(nn.Module):
    """w2(silu(w1(x)) * w3(x)).

    width: the number of hidden units. By default it is derived as in Meta's code: 2/3 of hidden_dim (4 * dim in a
    Llama), times ffn_dim_multiplier, rounded up to a multiple of multiple_of.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        *,
        width: int | None = None,
    ):
        super().__init__()
        width = width or ffn_width(hidden_dim, multiple_of, ffn_dim_multiplier)
        local = (width // model_parallel()[1], dim)
        w1, w3 = share_storage(init_weight(local, 0), init_weight(local, 0))
        self.w1 = ColumnLinear(w1)
        self.w2 = RowLinear(init_weight(local[::-1], 1))
        self.w3 = ColumnLinear(w3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then h + feed_forward(norm(h))."""

    def __init__(self, layer_id: int, args: ModelArgs):
        super().__init__()
        self.layer_id = layer_id
        self.n_heads, self.dim, self.head_dim = args.n_heads, args.dim, args.head_dim
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, 4 * args.dim, width=args.hidden_dim)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        start_pos: int | torch.Tensor,
        freqs_cis: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Arguments as in `Attention.forward`; [bsz, seqlen, dim] -> [bsz, seqlen, dim]."""
        h = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """Token ids to logits, with a KV cache for max_batch_size rows of max_seq_len positions.

    A new model has random weights in torch's default dtype, on its default device, and can be trained. With several
    ranks each rank holds its slices, under the names in Meta's files.

    embedding_axis: the axis on which the embedding is split over ranks: 0, the vocabulary (Llama 3), or 1, dim (Llama 1
        and 2). `load_state_dict` changes it to the axis of the weights that it loads.
    freqs_cis: the rotary angles, complex64 [2 * max_seq_len, head_dim / 2].
    passes: number of calls of `hidden`, an executor's included. As long as it stays the same, so does the cache.
    """

    def __init__(self, params: ModelArgs, *, embedding_axis: int = 0):
        super().__init__()
        if params.vocab_size < 1:
            raise ValueError(f"vocab_size is {params.vocab_size}: set it to the tokenizer's n_words first")
        self.params = params
        self.vocab_size, self.n_layers = params.vocab_size, params.n_layers
        self.tok_embeddings = (DimEmbedding if embedding_axis else VocabEmbedding)(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(TransformerBlock(i, params) for i in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        vocab = params.vocab_size // model_parallel()[1]
        self.output = ColumnLinear(init_weight((vocab, params.dim), 0), gather_output=True)
        self.freqs_cis = rotary_angles(params, 2 * params.max_seq_len)
        self.passes = 0

    def forward(self, tokens: torch.Tensor, start_pos: int = 0) -> torch.Tensor:
        """Logits of all positions: ids [bsz, seqlen], the first at position start_pos -> fp32 [bsz, seqlen, vocab].

        Keys and values before start_pos are those that earlier calls left in the cache; gradients do not reach them.
        Raises ValueError for more rows or positions than max_batch_size or max_seq_len, and on the CPU for ids outside
        the vocabulary.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, expected [bsz, seqlen]")
        bsz, seqlen = tokens.shape
        # On a GPU this check would wait for the device.
        if tokens.is_cpu and tokens.numel() and not 0 <= tokens.min() <= tokens.max() < self.params.vocab_size:
            raise ValueError(f"tokens hold ids outside the vocabulary of {self.params.vocab_size}")
        if bsz > self.params.max_batch_size or not 0 <= start_pos <= self.params.max_seq_len - seqlen:
            raise ValueError(
                f"{bsz} rows at positions {start_pos} to {start_pos + seqlen - 1} do not fit max_batch_size "
                f"{self.params.max_batch_size} and max_seq_len {self.params.max_seq_len}: build with larger ones"
            )
        return self.logits(self.hidden(tokens, start_pos, start_pos + seqlen))

    def hidden(self, tokens: torch.Tensor, start_pos: int | torch.Tensor, ctx_len: int) -> torch.Tensor:
        """Hidden states before the output layer: ids [bsz, seqlen] -> [bsz, seqlen, dim]. Fills the cache.

        start_pos: position of each row's first id, one int for all rows or an int64 tensor [bsz].
        ctx_len: queries may attend to positions 0 to ctx_len - 1. It must exceed every position of `tokens`.
        """
        self.passes += 1
        h = self.tok_embeddings(tokens)  # [bsz, seqlen, dim]
        freqs_cis, mask = self.angles_and_mask(tokens, start_pos, ctx_len, h)
        for layer in self.layers:
            h = layer(h, start_pos, freqs_cis, mask)
        return self.norm(h)

    def angles_and_mask(
        self, tokens: torch.Tensor, start_pos: int | torch.Tensor, ctx_len: int, h: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """freqs_cis and mask for `Attention.forward`, on the device of the embeddings `h`. Arguments as in `hidden`."""
        seqlen = tokens.shape[1]
        self.freqs_cis = self.freqs_cis.to(h.device)
        if isinstance(start_pos, int):
            return self.freqs_cis[start_pos : start_pos + seqlen], causal_mask(seqlen, start_pos, h)
        positions = start_pos[:, None] + torch.arange(seqlen, device=h.device)  # [bsz, seqlen]
        is_later = torch.arange(ctx_len, device=h.device) > positions[..., None]  # [bsz, seqlen, ctx_len]
        mask = torch.zeros(is_later.shape, dtype=h.dtype, device=h.device).masked_fill_(is_later, -torch.inf)
        return self.freqs_cis[positions], mask[:, None]  # [bsz, 1, seqlen, ctx_len]

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Hidden states [.., dim] -> fp32 logits [.., vocab], the same on every rank."""
        logits: torch.Tensor = self.output(h).float()
        return logits

    def place_caches(self, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the caches and move the angles of a model that was created on the meta device."""
        for module in self.modules():
            if isinstance(module, Attention):
                rows, heads, positions, head_dim = module.cache.k.shape
                module.cache = KVCache((rows, heads, positions, head_dim), dtype, device)
        self.freqs_cis = self.freqs_cis.to(device)

    @property
    def caches(self) -> list[KVCache]:
        return [module.cache for module in self.modules() if isinstance(module, Attention)]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Called by `to`, `float`, `cuda` ... Raises TypeError if it would convert quantized weights."""
        if (weight := next((w for w in self.parameters() if hasattr(w, "source")), None)) is not None:
            probe = torch.empty(1, dtype=weight.dtype, device=weight.device)
            moved = fn(probe)
            if (moved.dtype, moved.device) != (probe.dtype, probe.device):
                raise TypeError(
                    f"quantized weights stay {probe.dtype} on {probe.device}: build with another dtype or device"
                )
            return self
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Llama 2's files split the embedding on dim, Llama 3's on the vocabulary: choose by the weight's shape."""
        weight = state_dict.get(f"{prefix}tok_embeddings.weight")
        _, world_size = model_parallel()
        if weight is not None and world_size > 1 and weight.shape != self.tok_embeddings.weight.shape:
            vocab, dim = self.params.vocab_size, self.params.dim
            axes: dict[tuple[int, int], type[VocabEmbedding | DimEmbedding]] = {
                (vocab // world_size, dim): VocabEmbedding,
                (vocab, dim // world_size): DimEmbedding,
            }
            if (kind := axes.get(tuple(weight.shape))) is not None:
                old = self.tok_embeddings.weight
                with torch.device(old.device):
                    self.tok_embeddings = kind(vocab, dim).to(old.dtype).requires_grad_(old.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *rest)
