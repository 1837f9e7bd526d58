"""Detects whether the user has changed the model: replaced modules or parameters, added hooks, patched functions."""

from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as global_hooks

from llama import model as plain
from llama.accelerate.quantized_weight import QuantizedWeight
from llama.model import Attention, FeedForward, RMSNorm, Transformer, TransformerBlock
from llama.parallel.layers import ColumnLinear, DimEmbedding, RowLinear, VocabEmbedding

# Functions of `llama.model` that programs replace to change a forward, and the originals.
FUNCTIONS = ("apply_rotary_emb", "apply_rope", "reshape_for_broadcast", "repeat_kv", "causal_mask")
ORIGINALS = [getattr(plain, name) for name in FUNCTIONS]
CLASSES: tuple[Any, ...] = (Transformer, TransformerBlock, Attention, FeedForward, RMSNorm, ColumnLinear, RowLinear)
FORWARDS: dict[Any, Any] = {kind: kind.forward for kind in CLASSES}


def is_hooked(module: nn.Module) -> bool:
    """Whether the module has forward hooks or pre-hooks, or a forward of its own that replaces its class's."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def is_changed(module: nn.Module) -> bool:
    """Whether the module is hooked, or of a class that is not part of a model of this package."""
    return is_hooked(module) or type(module) not in (*CLASSES, nn.ModuleList, VocabEmbedding, DimEmbedding)


def is_patched() -> bool:
    """Whether a change affects all models: a function of `llama.model`, a class's forward, or a global hook."""
    return (
        any(map(lambda a, b: a is not b, map(plain.__dict__.get, FUNCTIONS), ORIGINALS))
        or any(kind.forward is not original for kind, original in FORWARDS.items())
        or bool(global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks)
    )


class Snapshot:
    """What an executor read from a model, to compare with later.

    Writing to weights in place is not a change, as the executor reads weights where the model stores them. Assigning
    `.data` is a change, detected by a new address, shape, stride or dtype.

    Keeps the storage of weights and caches alive, so that addresses in native structs stay valid until the executor is
    rebuilt.
    """

    def __init__(self, model: nn.Module):
        self.modules = list(model.modules())
        self.dicts: list[dict[str, Any]] = [d for m in self.modules for d in (m._modules, m._parameters)]
        self.attributes = [m.__dict__ for m in self.modules]
        self.hooks = [h for m in self.modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.norms = [m for m in self.modules if isinstance(m, RMSNorm)]
        self.attentions = [m for m in self.modules if isinstance(m, Attention)]
        self.children = self._children()
        self.caches = self._caches()
        self.tensors = [t for t in model.parameters() if not isinstance(t, QuantizedWeight)]
        self.storage = [t.detach() for t in self.tensors]
        self.model = model
        self.state = self._state()

    def is_current(self) -> bool:
        """Whether the model is unchanged. Takes about a millisecond."""
        children, caches = self._children(), self._caches()
        return (
            len(children) == len(self.children)
            and all(map(is_, children, self.children))
            and all(map(is_, caches, self.caches))
            and self._state() == self.state
        )

    def _children(self) -> list[Any]:
        """All submodules and parameters, compared by identity."""
        return list(chain.from_iterable(map(dict.values, self.dicts)))

    def _caches(self) -> list[torch.Tensor]:
        return [buffer for m in self.attentions for buffer in (m.cache.k, m.cache.v)]

    def _state(self) -> tuple[Any, ...]:
        """Everything that is compared by value."""
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
            is_patched(),
        )
