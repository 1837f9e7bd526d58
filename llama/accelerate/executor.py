"""Computes a model's forwards faster than its modules do, with the same results.

An `Executor` is derived from a model and holds no weights of its own. It checks whether modules, parameters or hooks of
the model have changed since, and then derives everything again. Layers that the user has changed run as modules,
unfused.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import nn

from llama.accelerate.compiled import compiled_step
from llama.accelerate.cuda_graph import CudaGraphDecoder
from llama.accelerate.fused import FusedLayer, Linear, Positions, merge_linears, rms_norm
from llama.accelerate.native import NativeDecoder
from llama.accelerate.snapshot import FORWARDS, Snapshot, is_changed, is_hooked, is_patched
from llama.cache import KVCache
from llama.model import Attention, RMSNorm, Transformer, TransformerBlock
from llama.options import PREFILL_CHUNK
from llama.parallel.groups import model_parallel
from llama.parallel.layers import ColumnLinear

log = logging.getLogger(__name__)

# Number of fp32 logits computed at a time when positions are scored: 64 MB. Chunks of less than 32 MB would cost more
# memory, as glibc seldom reuses aligned blocks of that size.
SCORING_CHUNK = 2**24
# fp32 logits [n, vocab] and the ids that follow [n] -> fp32 [n, m].
Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
T = TypeVar("T", bound=Callable[..., torch.Tensor])


def _on_its_device(method: T) -> T:
    """Make the model's GPU the current one: Triton and CUDA graphs use the current GPU, and each thread has its own."""

    @wraps(method)
    def run(self: "Executor", *arguments: Any, **options: Any) -> torch.Tensor:
        device = self.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            result: torch.Tensor = method(self, *arguments, **options)
            return result

    return cast(T, run)


class Executor:
    """Computes forwards for the engine: `hidden` and `logits` as `Transformer` has them, on any model.

    fused: use merged matmuls in layers that allow it.
    decoder: what computes decode steps and matmuls of few rows (see `compiled.choose_decoder`); None: the layers do.
    prefill_chunk: positions of a prompt computed at a time, which bounds the memory of activations.

    A custom model (of another class, or with its own forward or hooks) is called as Meta's engine calls it:
    model(tokens, start_pos) -> logits. `hidden` then returns these logits, and `logits` leaves them unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        fused: bool = True,
        decoder: str | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ):
        self.model: Any = model
        self.fused, self.decoder, self.prefill_chunk = fused, decoder, prefill_chunk
        self.rebuilds = 0  # how often everything was derived from the model
        self._own_passes = 0  # for a custom model, which does not count its forwards
        self._snapshot: Snapshot | None = None
        self._decoder: NativeDecoder | CudaGraphDecoder | None = None
        self._has_logged_change = not fused
        self._rebuild()

    @property
    def passes(self) -> int:
        """Number of forwards so far. While it is unchanged, so is the cache."""
        return int(getattr(self.model, "passes", 0)) + self._own_passes

    @property
    def is_compiled(self) -> bool:
        """Whether a decoder computes complete decode steps: native.c on a CPU, CUDA graphs on a GPU."""
        return self._decoder is not None

    @property
    def runs_user_code(self) -> bool:
        """Whether a forward runs code or modules that the user has changed, which may depend on how prompts are divided
        into forwards. As of the last `refresh`."""
        return self._runs_user_code

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def caches(self) -> list[KVCache]:
        return [module.cache for module in self.model.modules() if isinstance(module, Attention)]

    # Derived from the model

    def refresh(self) -> None:
        """Derive everything from the model again if it was changed."""
        if self._snapshot is None or not self._snapshot.is_current():
            self._rebuild()

    def _rebuild(self) -> None:
        model = self.model
        self.rebuilds += 1
        self._snapshot = None  # frees weights that may have been replaced
        self._layers: list[tuple[nn.Module, FusedLayer | None]] = []
        patched = is_patched()
        self._is_custom = (
            not isinstance(model, Transformer) or type(model).forward is not FORWARDS[Transformer] or is_hooked(model)
        )
        # Whether all rows must be at the same position: custom code expects start_pos to be one int, as in Meta's code.
        self.is_aligned = self._is_custom or patched or not all(map(_takes_row_positions, model.layers))
        if self._is_custom:
            self._decoder, self._output_sees_all = None, False
        else:
            use = self.fused and not patched
            fused = [FusedLayer.of(block, self.decoder == "native") if use else None for block in model.layers]
            self._layers = list(zip(model.layers, fused, strict=True))
            self._norm_is_fused = use and type(model.norm) is RMSNorm and not is_hooked(model.norm)
            self._output = self._output_linear() if use else None
            # A hooked or replaced output layer is called as in Meta's code, on all positions.
            self._output_sees_all = is_hooked(model.output) or type(model.output) is not ColumnLinear
            self._decoder = self._make_decoder(fused)
            changed = [i for i, layer in enumerate(fused) if layer is None]
            if changed and not self._has_logged_change and model.layers:
                self._has_logged_change = True
                log.info(f"llama: {_layer_names(changed)} changed: not fused, which is slower")
        self._is_unchanged = (
            not self._is_custom
            and all(layer is not None for _, layer in self._layers)
            and self._norm_is_fused
            and self._output is not None
            and not is_hooked(model.tok_embeddings)
        )
        is_plain = not self.fused and not patched and not any(map(is_changed, model.modules()))
        self._runs_user_code = self._is_custom or not (self._is_unchanged or is_plain)
        self._snapshot = Snapshot(model)

    def _output_linear(self) -> Linear | None:
        output = self.model.output
        if type(output) is not ColumnLinear or is_hooked(output) or output.bias is not None or not output.gather_output:
            return None
        return merge_linears([output], self.decoder == "native")

    def _make_decoder(self, fused: Sequence[FusedLayer | None]) -> NativeDecoder | CudaGraphDecoder | None:
        """The decoder, which runs all layers in one call; None unless all layers are fused and of the same shape."""
        model = self.model
        layers = [layer for layer in fused if layer is not None]
        if not layers or len(layers) != len(fused) or not self._norm_is_fused or self.decoder is None:
            return None
        first = layers[0]
        are_alike = all(
            layer.cache.k.shape == first.cache.k.shape
            and (layer.n_local_heads, layer.attention_norm.eps, layer.ffn_norm.eps)
            == (first.n_local_heads, model.norm.eps, model.norm.eps)
            and layer.shapes == first.shapes
            for layer in layers
        )
        weight = model.norm.weight
        if not are_alike or weight.dtype != first.cache.k.dtype or len(weight) != len(first.attention_norm.weight):
            return None
        if self.decoder == "native":
            return NativeDecoder(model, layers)
        if self.decoder == "compiled":
            return CudaGraphDecoder(model, layers, compiled_step=compiled_step(model, layers))
        if self.decoder == "torch":
            return CudaGraphDecoder(model, layers)
        from llama.accelerate.triton_step import triton_step  # needs Triton

        return CudaGraphDecoder(model, layers, triton_step=triton_step(model, layers))

    # Forwards

    @_on_its_device
    @torch.inference_mode()
    def hidden(
        self,
        tokens: torch.Tensor,
        start_pos: int | torch.Tensor,
        ctx_len: int,
        slots: Sequence[int] | None = None,
        *,
        refresh: bool = True,
    ) -> torch.Tensor:
        """Fill the cache and return the hidden states before the output layer: ids [bsz, seqlen] -> [bsz, seqlen, dim].

        start_pos: position of each row's first id, one int for all rows or an int64 tensor [bsz].
        ctx_len: positions from 0 that queries may attend to; larger than every position of `tokens`.
        slots: the cache row of each row of `tokens`, all different; None: rows 0, 1, 2, ... Any order is right.
            Adjacent rows in ascending order are fastest.
        refresh: check whether the model was changed, which takes a millisecond. Not needed if no user code has run
            since the last step. A model with changed layers is always checked.
        Returns logits [bsz, seqlen, vocab] instead for a custom model, and if the output layer is hooked or replaced,
        as such a layer is called on all positions.
        """
        if refresh or not self._is_unchanged:
            self.refresh()
        if slots is not None and list(slots) == list(range(len(tokens))):
            slots = None
        if self.is_aligned and not (isinstance(start_pos, int) and slots is None):
            raise RuntimeError(
                "this model needs all rows at one position, in the first rows of the cache: run prompts of one length, "
                "or one at a time"
            )
        if self._is_custom:
            return self._call_model(tokens, cast(int, start_pos))
        h = self._hidden(tokens, start_pos, ctx_len, slots)
        return self.model.logits(h) if self._output_sees_all else h

    def _call_model(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
        self._own_passes += 1
        logits: torch.Tensor = self.model(tokens, start_pos)
        return logits.float()

    def _hidden(
        self, tokens: torch.Tensor, start_pos: int | torch.Tensor, ctx_len: int, slots: Sequence[int] | None
    ) -> torch.Tensor:
        model, seqlen, chunk = self.model, tokens.shape[1], self.prefill_chunk
        runs_modules = any(layer is None for _, layer in self._layers)
        if seqlen > chunk and not (runs_modules and self.fused):
            parts = []
            for at, ids in zip(range(0, seqlen, chunk), tokens.split(chunk, dim=1), strict=True):
                left = seqlen - at - ids.shape[1]
                parts.append(self._hidden(ids, start_pos + at, ctx_len - left, slots))
            return torch.cat(parts, dim=1)
        caches = self._snapshot_caches() if runs_modules and slots is not None else ()
        for cache in caches:
            cache.slots = list(slots or ())
        try:
            if not any(layer for _, layer in self._layers):
                return cast(torch.Tensor, model.hidden(tokens, start_pos, ctx_len))
            model.passes += 1
            if seqlen == 1 and (h := self._decoded(tokens, start_pos, ctx_len, slots)) is not None:
                return h if self._output is not None else h.to(model.norm.weight.dtype)
            h = model.tok_embeddings(tokens)  # [bsz, seqlen, dim]
            model.freqs_cis = model.freqs_cis.to(h.device)
            cache = next(layer.cache for _, layer in self._layers if layer is not None)
            positions = Positions.of(tokens, start_pos, ctx_len, model.freqs_cis, cache, slots)
            arguments: Any = None
            for block, layer in self._layers:
                if layer is not None:
                    h = layer(h, positions)
                else:
                    arguments = arguments or model.angles_and_mask(tokens, start_pos, ctx_len, h)
                    h = block(h, start_pos, *arguments)
            return rms_norm(model.norm, h) if self._norm_is_fused else model.norm(h)
        finally:
            for cache in caches:
                cache.slots = None

    def _decoded(
        self, tokens: torch.Tensor, start_pos: int | torch.Tensor, ctx_len: int, slots: Sequence[int] | None
    ) -> torch.Tensor | None:
        """A decode step by the decoder (float32 from native.c). None without one, or if it cannot run these rows."""
        if self._decoder is None or (self.decoder == "compiled" and slots is not None):
            return None  # torch.compile would compile once more for other rows of the cache
        return self._decoder(tokens, start_pos, ctx_len, slots)

    def _snapshot_caches(self) -> Iterable[KVCache]:
        assert self._snapshot is not None  # set by `_rebuild`
        return [attention.cache for attention in self._snapshot.attentions]

    @_on_its_device
    @torch.inference_mode()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of the states that `hidden` returned: [.., dim] -> fp32 [.., vocab], the same on every rank."""
        if self._is_custom or self._output_sees_all:
            return states
        if self._output is None:
            return cast(torch.Tensor, self.model.logits(states))
        y = self._output(states)
        if model_parallel()[1] > 1:
            y = gather_from_model_parallel_region(y)
        return y.float()

    @_on_its_device
    @torch.inference_mode()
    def measured(self, h: torch.Tensor, targets: torch.Tensor, measure: Measure) -> torch.Tensor:
        """measure(logits, targets) -> [n, m] for hidden states [n, dim] and the ids that follow them [n].

        Works in chunks of positions, so that the logits of all positions are never in memory at once.
        """
        chunk = SCORING_CHUNK // self.model.params.vocab_size + 1
        parts = zip(h.split(chunk), targets.split(chunk), strict=True)
        return torch.cat([measure(self.logits(states), ids) for states, ids in parts])


def _takes_row_positions(layer: nn.Module) -> bool:
    """Whether a layer runs this package's code, which takes start_pos as a tensor [bsz] and any cache rows."""
    attention = getattr(layer, "attention", None)
    return (
        isinstance(layer, TransformerBlock)
        and type(layer).forward is FORWARDS[TransformerBlock]
        and isinstance(attention, Attention)
        and type(attention).forward is FORWARDS[Attention]
        and "forward" not in layer.__dict__
        and "forward" not in attention.__dict__
    )


def _layer_names(layers: list[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]} was"
    first = ", ".join(map(str, layers[:4]))
    return f"layers {first}{f' and {len(layers) - 4} more' if layers[4:] else ''} were"
