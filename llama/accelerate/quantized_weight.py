"""A weight that is stored in 8 or 4 bits and read as the tensor that it stands for."""

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

from llama.accelerate.native import NativeQuantized
from llama.accelerate.quantize import Quantized, quantized, scheme_of, should_quantize
from llama.checkpoint.layout import FUSED

NO_ORIGINAL = (
    "this weight is stored in {} bits, its original is gone and it cannot be written: build without quantize, or "
    "replace the parameter (layer.weight = torch.nn.Parameter(...)), which computes with the new one"
)


class QuantizedWeight(torch.Tensor):
    """Rows [start, start + n) of a quantized matrix, as a tensor of the model's dtype.

    Reading it in any way gives the dequantized numbers, computed each time. Writing, also through a view, and asking
    for gradients raise RuntimeError, which names the way. Saved and copied, it becomes an ordinary tensor.

    source: the matrix, of which several weights may be parts. read: what gives the numbers of this tensor.
    """

    source: Quantized | NativeQuantized
    start: int
    read: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(
        cls,
        source: Quantized | NativeQuantized,
        start: int,
        shape: torch.Size,
        read: Callable[[], torch.Tensor],
        like: torch.Tensor,
    ) -> "QuantizedWeight":
        made: QuantizedWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=False
        )
        made.source, made.start, made.read = source, start, read
        return made

    @staticmethod
    def of(source: Quantized | NativeQuantized, start: int, stop: int) -> nn.Parameter:
        """The parameter for some rows of a quantized matrix."""
        like = torch.empty(0, dtype=source.dtype, device=cast(torch.Tensor, source.data).device)
        shape = torch.Size((stop - start, source.k))
        weight = QuantizedWeight(source, start, shape, lambda: source.dequantize()[start:stop], like)
        return nn.Parameter(weight, requires_grad=False)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in WRITES and isinstance(args[0], QuantizedWeight) and not (args[1:] and args[1] is False):
            raise RuntimeError(NO_ORIGINAL.format(args[0].source.bits))
        if func in READS:
            found = func(*tree_map_only(QuantizedWeight, lambda w: w.read(), args), **kwargs)
            if func is torch.Tensor.numpy:
                found.setflags(write=False)  # numbers that were just made: what is written to them would be lost
            return found
        with torch._C.DisableTorchFunctionSubclass():  # the default would make results of this class
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func._schema.is_mutable:
            named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
            for argument in func._schema.arguments:
                given = named.get(argument.name)
                for each in given if isinstance(given, list | tuple) else [given]:  # lists: torch._foreach_zero_
                    if isinstance(each, QuantizedWeight) and argument.alias_info and argument.alias_info.is_write:
                        raise RuntimeError(NO_ORIGINAL.format(each.source.bits))
        if isinstance(first, QuantizedWeight) and func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return QuantizedWeight(first.source, first.start, first.shape, first.read, first)
        found = func(*tree_map_only(QuantizedWeight, lambda w: w.read(), args), **kwargs)
        if func.is_view and isinstance(first, QuantizedWeight):
            # A view of numbers that were just made: what is written to it would be lost, so it refuses, too.
            return tree_map_only(
                torch.Tensor, lambda t: QuantizedWeight(first.source, first.start, t.shape, lambda: t, t), found
            )
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return nn.Parameter(self.read().clone(), requires_grad=False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = self.read().clone()
        return (nn.Parameter(plain, requires_grad=False) if isinstance(self, nn.Parameter) else plain).__reduce_ex__(
            protocol
        )


# Of a parameter, or of the tensor that its `.data` is.
WRITES = {
    torch.Tensor.data.__set__,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad_,
    torch.Tensor.__setitem__,
}
READS = {F.linear, torch.Tensor.numpy, torch.Tensor.__repr__, torch.Tensor.tolist}


def quantize_part(part: nn.Module, scheme: str | None, is_native: bool, key: str = "") -> int:
    """Replace the weights of a block, or of the output layer (key OUTPUT), by quantized ones: those of layers with the
    same input as parts of one matrix. Returns how many a scheme leaves unchanged because of their width."""
    kept = 0
    groups = {key: [part]} if key else {name: [part.get_submodule(n) for n in layers] for name, layers in FUSED.items()}
    for name, layers in groups.items():
        weights = [layer.get_parameter("weight") for layer in layers]
        kind = scheme_of(name, weights[0].shape[1], scheme)
        if kind is None:
            kept += len(weights) * (should_quantize(name, scheme) is not None)
            continue
        rows = [len(weight) for weight in weights]
        matrix = quantized(kind, is_native, *weights)
        del weights
        for layer in layers:  # frees the originals before native.c's order is made
            layer.register_parameter("weight", None)
        source = NativeQuantized(matrix) if is_native else matrix
        del matrix
        for layer, stop, n in zip(layers, accumulate(rows), rows, strict=True):
            layer.weight = QuantizedWeight.of(source, stop - n, stop)
    return kept


def held_bytes(weights: Iterable[torch.Tensor]) -> int:
    """Bytes in which weights are stored; those of one quantized matrix count once."""
    found: dict[int, int] = {}
    for weight in weights:
        if isinstance(weight, QuantizedWeight):
            found[id(weight.source)] = sum(buffer.nbytes for buffer in weight.source.buffers())
        else:
            found[id(weight)] = weight.nbytes
    return sum(found.values())
