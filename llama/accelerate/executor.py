"""What computes a model faster than its modules do and gives the same: merged products, native or compiled steps.

An `Executor` is derived from a model and holds no weights of its own: merged matrices are the storage that the model's
parameters are views of. Before each forward it looks whether modules, parameters and hooks are those that it was
derived from. Where they are not, it is derived anew, and a layer that was changed runs as its modules are written.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import nn
from torch.nn.modules import module as global_hooks

from llama import model as plain
from llama.accelerate import native
from llama.accelerate.linear import MANY, ROWS, kernel, measured_rows
from llama.accelerate.quantize import FEW_ROWS
from llama.accelerate.quantized_weight import QuantizedWeight
from llama.cache import KVCache
from llama.model import (
    Attention,
    ColumnLinear,
    FeedForward,
    RMSNorm,
    RowLinear,
    Transformer,
    TransformerBlock,
    rotate,
)
from llama.parallel.device import cache_folder
from llama.parallel.groups import all_gather_object, model_parallel

log = logging.getLogger(__name__)

# Positions are scored for so many fp32 logits at a time (64 MB): glibc seldom reuses aligned blocks of under 32 MB.
SCORING_CHUNK = 2**24
# Longer prompts are computed in parts of so many positions, whose activations alone are in memory.
PREFILL_CHUNK = 1024
# What is wanted of a position: fp32 logits [n, vocab] and the ids that follow [n] -> fp32 [n, m].
Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Product = Callable[[torch.Tensor], torch.Tensor]

# What programs replace in `llama.model` to change a forward, before anybody has.
FUNCTIONS = ("apply_rotary_emb", "rotate", "reshape_for_broadcast", "repeat_kv", "causal_mask")
ORIGINALS = [getattr(plain, name) for name in FUNCTIONS]
LINEARS = [ColumnLinear, ColumnLinear, ColumnLinear, RowLinear, ColumnLinear, ColumnLinear, RowLinear]
CLASSES: tuple[Any, ...] = (Transformer, TransformerBlock, Attention, FeedForward, RMSNorm, ColumnLinear, RowLinear)
FORWARDS: list[Any] = [kind.forward for kind in CLASSES]


# Products -----------------------------------------------------------------------------------------


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Add up what the ranks have, in place."""
    if model_parallel()[1] > 1:
        dist.all_reduce(x, group=get_model_parallel_group())
    return x


class Dense:
    """x [.., k] -> [.., n] by a weight [n, k], which is read where it is. native: few rows by native.c."""

    def __init__(self, weight: torch.Tensor, is_native: bool):
        self.weight, self.is_native = weight, is_native and weight.dtype in native.KINDS
        # native.c computes all but prompts.
        self.kernels = {rows: kernel(weight, rows) for rows in ((MANY,) if self.is_native else ROWS)}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        m = x.numel() // x.shape[-1]
        if self.is_native and m <= FEW_ROWS:
            return native.multiply(native.matrix(self.weight), x, self.weight.dtype)
        x = x.to(self.weight.dtype)
        return self.kernels[MANY if self.is_native else measured_rows(m)](x, self.weight)


def merged(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Weights that lie one below the other in one storage as a single matrix; None where they do not."""
    first = weights[0]
    at = first.data_ptr()
    for weight in weights:
        if (
            weight.dim() != 2
            or weight.shape[1] != first.shape[1]
            or weight.dtype != first.dtype
            or not weight.is_contiguous()
            or weight.data_ptr() != at
            or weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return None
        at += weight.nbytes
    n, k = sum(map(len, weights)), first.shape[1]
    return first.detach().as_strided((n, k), (k, 1), first.storage_offset())


def product(layers: Sequence[nn.Module], is_native: bool) -> Product | None:
    """One product for layers that have the same input; None where their weights are not in one matrix."""
    weights = [cast(torch.Tensor, layer.weight) for layer in layers]
    if not any(isinstance(weight, QuantizedWeight) for weight in weights):
        matrix = merged(weights)
        return None if matrix is None else Dense(matrix, is_native)
    source, at = getattr(weights[0], "source", None), 0
    for weight in weights:
        if not isinstance(weight, QuantizedWeight) or weight.source is not source or weight.start != at:
            return None
        at += len(weight)
    return source if source is not None and at == source.n else None


# Layers -------------------------------------------------------------------------------------------


def norm(module: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm by torch's norm of vectors: on CPUs, for many rows, several times as fast as `rms_norm`."""
    weight = module.weight
    if x.numel() <= 16 * x.shape[-1] or not x.is_cpu:
        return F.rms_norm(x, weight.shape, weight, module.eps)
    wide = x.float()
    mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return (wide * mean.add_(module.eps).rsqrt_()).mul_(weight).to(x.dtype)


@dataclass(frozen=True)
class Positions:
    """Where the ids of one forward are, the same for all layers.

    start_pos: position of each row's first id, one int or [bsz]. ctx_len: positions from 0 that queries may look at.
    freqs_cis: the angles of the ids, [.., seqlen, head_dim / 2].
    mask: True where a query may look, [.., seqlen, ctx_len]; None where causality alone says so.
    """

    start_pos: int | torch.Tensor
    ctx_len: int
    freqs_cis: torch.Tensor
    mask: torch.Tensor | None

    @staticmethod
    def of(tokens: torch.Tensor, start_pos: int | torch.Tensor, ctx_len: int, freqs_cis: torch.Tensor) -> "Positions":
        seqlen = tokens.shape[1]
        if isinstance(start_pos, int):
            mask = causal_mask(seqlen, ctx_len, tokens.device) if start_pos > 0 and seqlen > 1 else None
            return Positions(start_pos, ctx_len, freqs_cis[start_pos : start_pos + seqlen], mask)
        positions = start_pos[:, None] + torch.arange(seqlen, device=tokens.device)  # [bsz, seqlen]
        keys = torch.arange(ctx_len, device=tokens.device)
        mask = (keys <= positions[..., None])[:, None]  # [bsz, 1, seqlen, ctx_len]
        return Positions(start_pos, ctx_len, freqs_cis[positions], mask)


def causal_mask(seqlen: int, ctx_len: int, device: torch.device) -> torch.Tensor:
    """What the last `seqlen` of `ctx_len` positions look back on: bool [seqlen, ctx_len], on CUDA only torch's name for
    it, as numbers would rule out the flash kernel."""
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right  # which imports all of torch's compiler

        return causal_lower_right(seqlen, ctx_len)
    return torch.ones(seqlen, ctx_len, dtype=torch.bool, device=device).tril(ctx_len - seqlen)


class FusedLayer:
    """A block with one product for queries, keys and values, and one for gates and values."""

    def __init__(self, block: TransformerBlock, products: Sequence[Product], is_native: bool):
        self.attention_norm = block.attention_norm
        self.ffn_norm = block.ffn_norm
        attention = block.attention
        self.cache, self.head_dim = attention.cache, attention.head_dim
        self.n_local_heads, self.n_local_kv_heads = attention.n_local_heads, attention.n_local_kv_heads
        self.wqkv, self.wo, self.w13, self.w2 = products
        self.shape = [layer.weight.shape for layer in (attention.wo, block.feed_forward.w2)]
        self.is_native = is_native

    @staticmethod
    def of(block: nn.Module, is_native: bool) -> "FusedLayer | None":
        """None where the block is not what its class makes it: then it runs as its modules are written."""
        if not isinstance(block, TransformerBlock):
            return None
        attention, feed_forward = block.attention, block.feed_forward
        modules = list(block.modules())
        linears = [
            [getattr(owner, name, None) for name in names.split()]
            for owner, names in (
                (attention, "wq wk wv"),
                (attention, "wo"),
                (feed_forward, "w1 w3"),
                (feed_forward, "w2"),
            )
        ]
        kinds = [
            Attention,
            FeedForward,
            RMSNorm,
            RMSNorm,
            *[ColumnLinear] * 3,
            RowLinear,
            *[ColumnLinear] * 2,
            RowLinear,
        ]
        parts: list[Any] = [
            attention,
            feed_forward,
            block.attention_norm,
            block.ffn_norm,
            *chain.from_iterable(linears),
        ]
        if type(block) is not TransformerBlock or [type(part) for part in parts] != kinds or len(modules) != 12:
            return None
        if any(map(is_hooked, modules)) or any(len(module._parameters) != 1 for module in parts[2:4]):
            return None
        if any(set(module._parameters) - {"weight", "bias"} or module.bias is not None for module in parts[4:]):
            return None
        made = [product(cast(list[nn.Module], layers), is_native) for layers in linears]
        if any(one is None for one in made):
            return None
        layer = FusedLayer(block, cast(list[Product], made), is_native)
        return layer if layer._fits(*linears) else None

    def _fits(self, qkv: Any, wo: Any, w13: Any, w2: Any) -> bool:
        """Whether shapes, dtypes and devices are those that the products and native.c count on."""
        heads, kv = self.n_local_heads * self.head_dim, self.n_local_kv_heads * self.head_dim
        dim, width = len(wo[0].weight), len(w13[0].weight)
        shapes = [(heads, dim), (kv, dim), (kv, dim), (dim, heads), (width, dim), (width, dim), (dim, width)]
        tensors = [layer.weight for layer in (*qkv, *wo, *w13, *w2)]
        norms = [self.attention_norm.weight, self.ffn_norm.weight]
        like = self.cache.k
        return (
            [tuple(weight.shape) for weight in tensors] == shapes
            and all(weight.shape == (dim,) and weight.is_contiguous() for weight in norms)
            and all(t.dtype == like.dtype and t.device == like.device for t in (*tensors, *norms, self.cache.v))
            and like.shape == self.cache.v.shape
            and like.shape[1] == self.n_local_kv_heads
            and like.shape[3] == self.head_dim
            and like.is_contiguous()
            and self.cache.v.is_contiguous()
        )

    def __call__(self, x: torch.Tensor, at: Positions) -> torch.Tensor:
        q, k = self.n_local_heads, self.n_local_kv_heads
        turned, values = self.wqkv(norm(self.attention_norm, x)).unflatten(-1, (-1, self.head_dim)).split((q + k, k), 2)
        queries, keys = rotate(turned, at.freqs_cis).split((q, k), dim=2)
        h = x + all_reduce(self.wo(self.attend(queries, keys, values, at)))
        gates, up = self.w13(norm(self.ffn_norm, h)).chunk(2, dim=-1)
        return h + all_reduce(self.w2(F.silu(gates).mul_(up)))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: Positions) -> torch.Tensor:
        """Store the keys and values, look back: [bsz, seqlen, heads, head_dim] each -> [bsz, seqlen, local width]."""
        bsz, seqlen, _, _ = q.shape
        keys, values = self.cache.update(k.transpose(1, 2), v.transpose(1, 2), at.start_pos, at.ctx_len)
        if self.is_native and q.dtype == torch.bfloat16:  # in float32 torch is faster
            return native.attend(q, self.cache, at.start_pos).flatten(2)
        q = q.transpose(1, 2)  # [bsz, heads, seqlen, head_dim]
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


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of it does more, or something else, than its class's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _is_patched() -> bool:
    """Whether somebody changed what all modules do: functions of `llama.model`, its forwards, or global hooks."""
    return (
        any(map(lambda a, b: a is not b, map(plain.__dict__.get, FUNCTIONS), ORIGINALS))
        or any(kind.forward is not original for kind, original in zip(CLASSES, FORWARDS, strict=True))
        or bool(global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks)
    )


# The executor -------------------------------------------------------------------------------------


class Snapshot:
    """Everything that a derivation relied on, and whether it is still so. In-place writes change none of it, as weights
    are read where they are; `.data = ...` changes the address, the shape or the dtype.

    Keeps the storage of weights and caches: what was derived points there until it is derived anew.
    """

    def __init__(self, model: nn.Module):
        self.modules = list(model.modules())
        self.dicts: list[dict[str, Any]] = [d for m in self.modules for d in (m._modules, m._parameters)]
        self.attributes = [m.__dict__ for m in self.modules]
        self.hooks = [h for m in self.modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.norms = [m for m in self.modules if isinstance(m, RMSNorm)]
        self.attentions = [m for m in self.modules if isinstance(m, Attention)]
        self.children = list(chain.from_iterable(map(dict.values, self.dicts)))
        self.caches = self._caches()
        self.tensors = [t for t in model.parameters() if not isinstance(t, QuantizedWeight)]
        self.storage = [t.detach() for t in self.tensors]
        self.model = model
        self.state = self._state()

    def _state(self) -> tuple[Any, ...]:
        t = self.tensors
        return (
            [type(m) for m in self.modules],
            list(map(bool, self.hooks)),
            list(map(dict.__contains__, self.attributes, repeat("forward"))),
            list(map(torch.Tensor.data_ptr, t)),
            list(map(torch.Tensor.size, t)),
            list(map(torch.Tensor.stride, t)),
            list(map(attrgetter("dtype"), t)),
            [m.eps for m in self.norms],
            list(map(attrgetter("n_local_heads", "n_local_kv_heads", "head_dim"), self.attentions)),
            _is_patched(),
        )

    def holds(self) -> bool:
        now, caches = list(chain.from_iterable(map(dict.values, self.dicts))), self._caches()
        return (
            len(now) == len(self.children)
            and all(map(is_, now, self.children))
            and all(map(is_, caches, self.caches))
            and self._state() == self.state
        )

    def _caches(self) -> list[torch.Tensor]:
        return [each for m in self.attentions for each in (m.cache.k, m.cache.v)]


class Executor:
    """Computes a model's forwards for the engine: the interface of `Transformer.hidden` and `logits`, on any model.

    fused: by merged products where layers allow it. native: by native.c, which is compiled.
    graph: decode on CUDA by torch.compile's kernels in a CUDA graph.

    A model of another class, or with a forward or hooks of its own, is called as Meta's engine calls it,
    model(tokens, start_pos) -> logits; `hidden` then returns these logits, and `logits` leaves them unchanged.
    """

    def __init__(self, model: nn.Module, *, fused: bool = True, native: bool = False, graph: bool = False):
        self.model: Any = model
        self.fused, self.native, self.graph = fused, native, graph
        self._own_passes = 0  # of a model that does not count them
        self._snapshot: Snapshot | None = None
        self._said = not fused
        self._derive()

    @property
    def passes(self) -> int:
        """Forwards so far: who remembers the count knows whether the cache is unchanged."""
        return int(getattr(self.model, "passes", 0)) + self._own_passes

    @property
    def is_compiled(self) -> bool:
        """Whether one call of compiled code computes a whole decode step."""
        return self._decoder is not None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def caches(self) -> list[KVCache]:
        return [module.cache for module in self.model.modules() if isinstance(module, Attention)]

    # Following the model

    def follow(self) -> None:
        """Derive everything anew where the model is no longer what it was."""
        if self._snapshot is None or not self._snapshot.holds():
            self._derive()

    def _derive(self) -> None:
        model = self.model
        self._snapshot = None  # which keeps weights that may have been replaced
        self._runs: list[Any] = []
        self._decoder: native.NativeDecoder | CudaGraphDecoder | None = getattr(self, "_decoder", None)
        patched = _is_patched()
        self._is_foreign = (
            not isinstance(model, Transformer) or type(model).forward is not FORWARDS[0] or is_hooked(model)
        )
        # Whether all rows must be at one position: somebody's code gets start_pos, which is one int in Meta's code.
        self.is_aligned = self._is_foreign or patched or not all(map(_takes_rows, model.layers))
        if self._is_foreign:
            self._decoder, self._output_sees_all = None, False
        else:
            use = self.fused and not patched
            fused = [FusedLayer.of(layer, self.native) if use else None for layer in model.layers]
            self._runs = [(layer, each) for layer, each in zip(model.layers, fused, strict=True)]
            self._norm_is_ours = use and type(model.norm) is RMSNorm and not is_hooked(model.norm)
            self._output = self._output_product() if use else None
            self._output_sees_all = is_hooked(model.output) or type(model.output) is not ColumnLinear
            self._decoder = self._make_decoder(fused)
            if (left := [i for i, each in enumerate(fused) if each is None]) and not self._said and model.layers:
                self._said = True
                log.info(f"llama: {_named(left)} changed: computed as the modules are written, which is slower")
        self._is_untouched = (
            not self._is_foreign
            and all(layer is not None for _, layer in self._runs)
            and self._norm_is_ours
            and self._output is not None
            and not is_hooked(model.tok_embeddings)
        )
        self._snapshot = Snapshot(model)

    def _output_product(self) -> Product | None:
        output = self.model.output
        if type(output) is not ColumnLinear or is_hooked(output) or output.bias is not None or not output.gather_output:
            return None
        return product([output], self.native)

    def _make_decoder(self, fused: Sequence[FusedLayer | None]) -> "native.NativeDecoder | CudaGraphDecoder | None":
        """What computes a step through all layers at once, if all are fused."""
        model = self.model
        whole = [layer for layer in fused if layer is not None]
        if not whole or len(whole) != len(fused) or not self._norm_is_ours or not (self.native or self.graph):
            return None
        first = whole[0]
        same = all(
            layer.cache.k.shape == first.cache.k.shape
            and (layer.n_local_heads, layer.attention_norm.eps, layer.ffn_norm.eps)
            == (first.n_local_heads, model.norm.eps, model.norm.eps)
            and layer.shape == first.shape
            for layer in whole
        )
        norms = model.norm.weight
        if not same or norms.dtype != first.cache.k.dtype or len(norms) != len(first.attention_norm.weight):
            return None
        return native.NativeDecoder(model, whole) if self.native else CudaGraphDecoder(model, whole)

    # Forwards

    @torch.inference_mode()
    def hidden(
        self,
        tokens: torch.Tensor,
        start_pos: int | torch.Tensor,
        ctx_len: int,
        first_row: int = 0,
        *,
        follow: bool = True,
    ) -> torch.Tensor:
        """States before the output layer: ids [bsz, seqlen] -> [bsz, seqlen, dim], and fill the cache.

        start_pos: position of each row's first id, one int for all rows or an int64 tensor [bsz].
        ctx_len: positions from 0 that queries may look at; larger than every position of `tokens`.
        first_row: of the cache, the others follow it.
        follow: look whether the model was changed, which takes a millisecond. Not needed between the steps of a call
            that nobody reads as they come, unless the model runs somebody's code.
        Of models whose output layer is to see all positions these are their logits, [bsz, seqlen, vocab].
        """
        if follow or not self._is_untouched:
            self.follow()
        if self._is_foreign:
            return self._called(tokens, start_pos, first_row)
        h = self._hidden(tokens, start_pos, ctx_len, first_row)
        return self.model.logits(h) if self._output_sees_all else h

    def _called(self, tokens: torch.Tensor, start_pos: int | torch.Tensor, first_row: int) -> torch.Tensor:
        if not isinstance(start_pos, int) or first_row:
            raise RuntimeError("this model takes rows at one position: run prompts of one length, or one at a time")
        self._own_passes += 1
        logits: torch.Tensor = self.model(tokens, start_pos)
        return logits.float()

    def _hidden(
        self, tokens: torch.Tensor, start_pos: int | torch.Tensor, ctx_len: int, first_row: int
    ) -> torch.Tensor:
        model, seqlen = self.model, tokens.shape[1]
        touched = any(layer is None for _, layer in self._runs) and self.fused
        if isinstance(start_pos, int) and seqlen > PREFILL_CHUNK and not touched:
            starts = range(start_pos, start_pos + seqlen, PREFILL_CHUNK)
            parts = zip(tokens.split(PREFILL_CHUNK, dim=1), starts, strict=True)
            return torch.cat([self._hidden(ids, at, at + ids.shape[1], first_row) for ids, at in parts], dim=1)
        caches = self._snapshot_caches() if first_row else ()
        for cache in caches:
            cache.first_row = first_row
        try:
            if not any(layer for _, layer in self._runs):
                return cast(torch.Tensor, model.hidden(tokens, start_pos, ctx_len))
            model.passes += 1
            if seqlen == 1 and first_row == 0 and self._decoder is not None:
                h = self._decoder(tokens, start_pos)  # in float32 if it is native.c's
                return h if self._output is not None else h.to(model.norm.weight.dtype)
            h = model.tok_embeddings(tokens)  # [bsz, seqlen, dim]
            model.freqs_cis = model.freqs_cis.to(h.device)
            at = Positions.of(tokens, start_pos, ctx_len, model.freqs_cis)
            arguments: Any = None
            for block, layer in self._runs:
                if layer is not None:
                    h = layer(h, at)
                else:
                    arguments = arguments or model.angles_and_mask(tokens, start_pos, ctx_len, h)
                    h = block(h, start_pos, *arguments)
            return norm(model.norm, h) if self._norm_is_ours else model.norm(h)
        finally:
            for cache in caches:
                cache.first_row = 0

    def _snapshot_caches(self) -> Iterable[KVCache]:
        assert self._snapshot is not None  # `follow` made it
        return [attention.cache for attention in self._snapshot.attentions]

    @torch.inference_mode()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """What `hidden` returned, [.., dim] -> fp32 logits [.., vocab], the same on every rank."""
        if self._is_foreign or self._output_sees_all:
            return states
        if self._output is None:
            return cast(torch.Tensor, self.model.logits(states))
        y = self._output(states)
        if model_parallel()[1] > 1:
            y = gather_from_model_parallel_region(y)
        return y.float()

    @torch.inference_mode()
    def measured(self, h: torch.Tensor, targets: torch.Tensor, measure: Measure) -> torch.Tensor:
        """measure(logits, targets) -> [n, m] for states [n, dim] and the ids that follow them [n].

        Works in chunks of positions, so that the logits of all of them are never in memory together.
        """
        chunk = SCORING_CHUNK // self.model.params.vocab_size + 1
        parts = zip(h.split(chunk), targets.split(chunk), strict=True)
        return torch.cat([measure(self.logits(states), ids) for states, ids in parts])


def _takes_rows(layer: nn.Module) -> bool:
    """Whether start_pos may be a tensor there, and the cache's rows begin elsewhere: what this package's code takes."""
    attention = getattr(layer, "attention", None)
    ours = isinstance(layer, TransformerBlock) and type(layer).forward is FORWARDS[1]
    return (
        ours
        and isinstance(attention, Attention)
        and type(attention).forward is FORWARDS[2]
        and "forward" not in layer.__dict__
        and "forward" not in attention.__dict__
    )


def _named(layers: list[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]} was"
    first = ", ".join(map(str, layers[:4]))
    return f"layers {first}{f' and {len(layers) - 4} more' if layers[4:] else ''} were"


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


# Compiled steps -----------------------------------------------------------------------------------


def can_compile(compile: bool | str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether decode steps are compiled, the same on all ranks, which must all call it. Compiles native.c for CPUs.

    compile: as in `Llama.build`. What was asked for with True and cannot be is said, as is a missing C compiler.
    """
    if device.type == "cuda":
        return compile is True
    if not compile or (compile == "auto" and (device.type != "cpu" or dtype not in native.KINDS)):
        return False
    if device.type != "cpu":
        log.info(f"llama: nothing is compiled on {device.type}: the decode step runs uncompiled")
        return False
    if dtype not in native.KINDS:
        log.info("llama: float16 is not compiled on CPUs, bfloat16 and float32 are: the decode step runs uncompiled")
        return False
    started, is_new, problem = time.perf_counter(), False, ""
    try:
        is_new = native.compile_library()
    except native.NoCompilerError as error:
        problem = str(error)
    if problems := list(
        filter(None, all_gather_object(problem))
    ):  # ranks that compile and others would add up different things
        why = problem or f"another rank: {problems[0]}"
        log.info(f"llama: {why}: the decode step runs uncompiled, which is slower (--no-compile leaves this line out)")
        return False
    if is_new:
        log.info(f"llama: decode step compiled in {time.perf_counter() - started:.1f} s, kept in {cache_folder()}")
    elif compile is True:
        log.info(f"llama: decode step compiled earlier, taken from {cache_folder()}")
    return True


class CudaGraphDecoder:
    """A decode step on CUDA: torch.compile's kernels, replayed as one CUDA graph for a number of rows.

    Static shapes: attention runs over the whole cache with a mask, so that nothing is compiled again as texts grow.
    On a GPU, look first whether TORCH_LOGS=cudagraphs reports skipped graphs (the caches are written in place), and
    whether ranks over NCCL replay in the same order.
    """

    def __init__(self, model: Transformer, layers: list[FusedLayer]):
        self.embed, self.freqs_cis = model.tok_embeddings, model.freqs_cis
        final, ctx_len = model.norm, layers[0].cache.k.shape[2]

        def step(h: torch.Tensor, positions: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
            mask = (torch.arange(ctx_len, device=h.device) <= positions[:, None])[:, None, None]  # [bsz, 1, 1, ctx_len]
            at = Positions(positions, ctx_len, torch.view_as_complex(angles), mask)
            for layer in layers:
                h = layer(h, at)
            return norm(final, h)

        self.compiled: Any = torch.compile(step, mode="reduce-overhead", fullgraph=True)
        self.seen: set[int] = set()

    def __call__(self, tokens: torch.Tensor, start_pos: int | torch.Tensor) -> torch.Tensor:
        started, bsz = time.perf_counter(), len(tokens)
        positions = torch.as_tensor(start_pos, device=tokens.device).expand(bsz).contiguous()
        h = self.embed(tokens)  # fairscale's, which torch.compile cannot take in
        angles = torch.view_as_real(self.freqs_cis.to(h.device)[positions][:, None])  # [bsz, 1, head_dim / 2, 2]
        torch.compiler.cudagraph_mark_step_begin()
        h = self.compiled(h, positions, angles).clone()  # the graph's own output is written over by its next replay
        if bsz not in self.seen:
            self.seen.add(bsz)
            rows = "1 row" if bsz == 1 else f"{bsz} rows"
            log.info(f"llama: decode step for {rows} compiled in {time.perf_counter() - started:.1f} s")
        return h
