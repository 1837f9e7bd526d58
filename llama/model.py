"""The Llama architecture: pre-norm blocks, rotary positions, grouped-query attention, SwiGLU feed-forward.

Shapes use bsz (rows), seqlen (new positions), ctx_len (positions a query may look back on, the new ones
included), dim, head_dim and vocab. "Local" is this rank's part of what is split over the ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import nn

from llama.cache import KVCache
from llama.distributed import model_parallel
from llama.params import ModelArgs

# Positions are scored for so many fp32 logits at a time (64 MB): glibc seldom reuses aligned blocks of under 32 MB.
SCORING_CHUNK = 2**24
# Longer prompts are computed in parts of so many positions, whose activations alone stand in memory.
PREFILL_CHUNK = 1024
# What is wanted of a position: fp32 logits [n, vocab] and the ids that follow [n] -> fp32 [n, m].
Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# The newest id of each row [bsz, 1] at start_pos -> hidden states [bsz, 1, dim], filling the cache as `hidden` does.
Step = Callable[[torch.Tensor, int | torch.Tensor], torch.Tensor]


# Layers -------------------------------------------------------------------------------------------
# fairscale's constructors allocate and fill the weights of the whole model. These three take over the forward
# as it is and leave the weight on the meta device, to be assigned from the checkpoint.


def _meta_weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


class Shaped(nn.Module):
    """Shows the local shape of its weight where the model is printed."""

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.get_parameter("weight").shape))


class ColumnLinear(Shaped, ColumnParallelLinear):
    """x @ weight.T with the output features split: [.., in] -> [.., local_out], or [.., out] when gathered."""

    def __init__(self, in_features: int, local_out_features: int, gather_output: bool = False):
        nn.Module.__init__(self)
        self.weight = _meta_weight(local_out_features, in_features)
        self.bias = None
        self.gather_output = gather_output


class RowLinear(Shaped, RowParallelLinear):
    """x @ weight.T with the input features split, summed over the ranks: [.., local_in] -> [.., out]."""

    def __init__(self, local_in_features: int, out_features: int):
        nn.Module.__init__(self)
        self.weight = _meta_weight(out_features, local_in_features)
        self.bias = None
        self.input_is_parallel = True


class VocabEmbedding(Shaped, VocabParallelEmbedding):
    """Rows of a table that is split on the vocabulary, as in Llama 3's files: [bsz, seqlen] -> [bsz, seqlen, dim]."""

    def __init__(self, vocab_size: int, dim: int):
        nn.Module.__init__(self)
        rank, world_size = model_parallel()
        local_vocab = vocab_size // world_size
        self.weight = _meta_weight(local_vocab, dim)
        self.vocab_start_index, self.vocab_end_index = rank * local_vocab, (rank + 1) * local_vocab
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False


class DimEmbedding(Shaped, ParallelEmbedding):
    """Rows of a table that is split on dim, as in Llama 2's files: [bsz, seqlen] -> [bsz, seqlen, dim]."""

    def __init__(self, vocab_size: int, dim: int):
        nn.Module.__init__(self)
        self.weight = _meta_weight(vocab_size, dim // model_parallel()[1])
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False


class RMSNorm(Shaped):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = _meta_weight(dim)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_table(args: ModelArgs, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * frequency, fp32 [max_seq_len, head_dim / 2] each.

    Pair i of a head turns by theta^(-2i / head_dim) radians a position (Su et al. 2021, arXiv:2104.09864), or by that
    over the linear factor (arXiv:2306.15595). Scaling (Llama 3.1, arXiv:2407.21783) goes by the turns within the
    original context of 8192: below the low factor (1) a frequency is divided by the scaling factor, above the high one
    (4) it is kept, between them the two are blended.
    """
    # On the CPU whatever the device, so that all devices turn by the same angles.
    pair = torch.arange(0, args.head_dim, 2, dtype=torch.float32)
    freqs = 1.0 / (args.rope_theta ** (pair / args.head_dim))  # [head_dim / 2]
    if args.use_scaled_rope:
        low_factor, high_factor = args.rope_low_freq_factor, args.rope_high_freq_factor
        periods = args.rope_original_context_length * freqs / (2 * torch.pi)  # turns within the original context
        keep = ((periods - low_factor) / (high_factor - low_factor or 1e-30)).clamp(0, 1)  # equal factors: a step
        freqs = (1 - keep) * freqs / args.rope_factor + keep * freqs
    elif args.rope_linear_factor is not None:
        freqs = freqs / args.rope_linear_factor
    angles = torch.outer(torch.arange(args.max_seq_len, dtype=torch.float32), freqs)
    return angles.cos().to(device), angles.sin().to(device)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring pairs of x [bsz, seqlen, heads, head_dim]; cos and sin are [.., seqlen, 1, head_dim / 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [bsz, seqlen, heads, head_dim / 2] each
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


@dataclass
class Positions:
    """Where the ids of one forward stand, the same for all layers.

    start_pos: position of each row's first id, one int or [bsz]. ctx_len: positions from 0 that queries may look at.
    cos, sin: the rotary angles of the ids, [.., seqlen, 1, head_dim / 2].
    mask: True where a query may look, [.., seqlen, ctx_len]; None where causality alone says so.
    first_row: of the cache, the others follow it.
    """

    start_pos: int | torch.Tensor
    ctx_len: int
    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor | None
    first_row: int = 0


def causal_mask(seqlen: int, ctx_len: int, device: torch.device) -> torch.Tensor:
    """What the last `seqlen` of `ctx_len` positions look back on: bool [seqlen, ctx_len], on CUDA only torch's name for
    it, as numbers would rule out the flash kernel."""
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right  # which imports all of torch's compiler

        return causal_lower_right(seqlen, ctx_len)
    return torch.ones(seqlen, ctx_len, dtype=torch.bool, device=device).tril(ctx_len - seqlen)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, dtype: torch.dtype, device: torch.device):
        super().__init__()
        _, world_size = model_parallel()
        self.head_dim = args.head_dim
        self.n_local_heads = args.n_heads // world_size
        # With more ranks than KV heads, neighbouring ranks hold the same head.
        self.n_local_kv_heads = max(1, args.kv_heads // world_size)
        self.wq = ColumnLinear(args.dim, self.n_local_heads * self.head_dim)
        self.wk = ColumnLinear(args.dim, self.n_local_kv_heads * self.head_dim)
        self.wv = ColumnLinear(args.dim, self.n_local_kv_heads * self.head_dim)
        self.wo = RowLinear(self.n_local_heads * self.head_dim, args.dim)
        shape = (args.max_batch_size, self.n_local_kv_heads, args.max_seq_len, self.head_dim)
        self.cache = KVCache(shape, dtype, device)

    def forward(self, x: torch.Tensor, at: Positions) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (self.wq(x), self.wk(x), self.wv(x)))
        return self.wo(self.attend(apply_rope(q, at.cos, at.sin), apply_rope(k, at.cos, at.sin), v, at))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: Positions) -> torch.Tensor:
        """Store the keys and values, look back: [bsz, seqlen, heads, head_dim] each -> [bsz, seqlen, local width]."""
        bsz, seqlen, _, _ = q.shape
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [bsz, heads, seqlen, head_dim]
        keys, values = self.cache.update(k, v, at.start_pos, at.ctx_len, at.first_row)  # [.., ctx_len, head_dim]
        if seqlen == 1:
            # One query a head: the heads that share a KV head become its queries, and nothing is repeated.
            q = q.view(bsz, self.n_local_kv_heads, -1, self.head_dim)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=at.mask)
        else:
            # is_causal aligns the first query with the first key, which holds only when nothing came before.
            out = F.scaled_dot_product_attention(
                q,
                keys,
                values,
                attn_mask=at.mask,
                is_causal=at.mask is None,
                enable_gqa=self.n_local_heads != self.n_local_kv_heads,
            )
        out = out.reshape(bsz, self.n_local_heads, seqlen, self.head_dim).transpose(1, 2)
        return out.reshape(bsz, seqlen, -1)


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        local_width = args.hidden_dim // model_parallel()[1]
        self.w1 = ColumnLinear(args.dim, local_width)
        self.w2 = RowLinear(local_width, args.dim)
        self.w3 = ColumnLinear(args.dim, local_width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x), inplace=True).mul_(self.w3(x)))  # in place: the widest of all


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.attention = Attention(args, dtype, device)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: torch.Tensor, at: Positions) -> torch.Tensor:
        h = x + self.attention(self.attention_norm(x), at)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """Token ids to logits. Weights start on the meta device (`checkpoint.load_weights` assigns them); the KV cache
    for max_batch_size rows of max_seq_len positions is allocated here, in `dtype` on `device`.

    embedding_axis: how ranks divide the embedding, 0 on the vocabulary, 1 on dim. As the files do, so that a rank
    finds its part in few of them.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, args: ModelArgs, dtype: torch.dtype, device: torch.device, embedding_axis: int = 0):
        super().__init__()
        self.params = args
        self.tok_embeddings = (DimEmbedding if embedding_axis else VocabEmbedding)(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args, dtype, device) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = ColumnLinear(args.dim, args.vocab_size // model_parallel()[1], gather_output=True)
        cos, sin = rope_table(args, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.passes = 0  # calls of `hidden`: who remembers the count knows whether the cache is still as it was
        self.step: Step | None = None  # a faster way to add one id to each row, given by llama.fast

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
        """Logits of all positions: ids [bsz, seqlen] at positions start_pos ... -> fp32 [bsz, seqlen, vocab].

        Positions before start_pos are those of earlier calls, read from the cache.
        Raises ValueError when rows or positions lie outside max_batch_size or max_seq_len, and on the CPU when ids lie
        outside the vocabulary.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, expected [bsz, seqlen]")
        bsz, seqlen = tokens.shape
        # Not on a GPU, where looking would wait for the device. Ids outside would embed as zeros.
        if tokens.is_cpu and tokens.numel() and not 0 <= tokens.min() <= tokens.max() < self.params.vocab_size:
            raise ValueError(f"tokens hold ids outside the vocabulary of {self.params.vocab_size}")
        if bsz > self.params.max_batch_size or not 0 <= start_pos <= self.params.max_seq_len - seqlen:
            raise ValueError(
                f"{bsz} rows at positions {start_pos} to {start_pos + seqlen - 1} do not fit max_batch_size "
                f"{self.params.max_batch_size} and max_seq_len {self.params.max_seq_len}: build with larger ones"
            )
        return self.logits(self.hidden(tokens, start_pos, start_pos + seqlen))

    @torch.inference_mode()
    def hidden(
        self, tokens: torch.Tensor, start_pos: int | torch.Tensor, ctx_len: int, first_row: int = 0
    ) -> torch.Tensor:
        """Hidden states before the output layer: ids [bsz, seqlen] -> [bsz, seqlen, dim], and fill the cache.

        start_pos: position of each row's first id, one int for all rows or an int64 tensor [bsz].
        ctx_len: positions from 0 that queries may look at; larger than every position of `tokens`.
        first_row: of the cache, the others follow it.
        """
        _, seqlen = tokens.shape
        if isinstance(start_pos, int) and seqlen > PREFILL_CHUNK:
            starts = range(start_pos, start_pos + seqlen, PREFILL_CHUNK)
            parts = zip(tokens.split(PREFILL_CHUNK, dim=1), starts, strict=True)
            return torch.cat([self.hidden(ids, first, first + ids.shape[1], first_row) for ids, first in parts], dim=1)
        self.passes += 1
        if seqlen == 1 and first_row == 0 and self.step is not None:
            return self.step(tokens, start_pos)
        if isinstance(start_pos, int):
            positions = torch.arange(start_pos, start_pos + seqlen, device=tokens.device)  # [seqlen]
            mask = causal_mask(seqlen, ctx_len, tokens.device) if start_pos > 0 and seqlen > 1 else None
        else:
            positions = start_pos[:, None] + torch.arange(seqlen, device=tokens.device)  # [bsz, seqlen]
            keys = torch.arange(ctx_len, device=tokens.device)
            mask = (keys <= positions[..., None])[:, None]  # [bsz, 1, seqlen, ctx_len]
        cos, sin = self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)
        at = Positions(start_pos, ctx_len, cos, sin, mask, first_row)
        h = self.tok_embeddings(tokens)  # [bsz, seqlen, dim]
        for layer in self.layers:
            h = layer(h, at)
        return self.norm(h)

    @torch.inference_mode()
    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Hidden states [.., dim] -> fp32 logits [.., vocab], the same on every rank."""
        return self.output(h).float()

    @torch.inference_mode()
    def measured(self, h: torch.Tensor, targets: torch.Tensor, measure: Measure) -> torch.Tensor:
        """measure(logits, targets) -> [n, m] for hidden states [n, dim] and the ids that follow them [n].

        Works in chunks of positions, so that the logits of all of them never stand in memory together.
        """
        chunk = SCORING_CHUNK // self.params.vocab_size + 1
        parts = zip(h.split(chunk), targets.split(chunk), strict=True)
        return torch.cat([measure(self.logits(states), ids) for states, ids in parts])

    @property
    def caches(self) -> list[KVCache]:
        return [module for module in self.modules() if isinstance(module, KVCache)]


def log_norm(logits: torch.Tensor) -> torch.Tensor:
    """Logits less this are log-probabilities, [.., 1]; on a CPU `log_softmax` is off by up to 1e-5 in fp32."""
    return logits.logsumexp(dim=-1, keepdim=True)


def score(logits: torch.Tensor, targets: torch.Tensor, k: int) -> torch.Tensor:
    """Log-probabilities: logits [.., vocab], ids [..] -> [.., 1 + 2k]: the targets', the k best, and those k ids.

    fp32 holds every id below 2^24 exactly, so that one transfer from the device brings everything.
    """
    best, ids = logits.topk(k, dim=-1)
    chosen = torch.cat((logits.gather(-1, targets[..., None]), best), dim=-1) - log_norm(logits)
    return torch.cat((chosen, ids.float()), dim=-1)
