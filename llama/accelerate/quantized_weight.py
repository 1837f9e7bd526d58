"""A parameter whose weight is stored in 8 or 4 bits and dequantized when it is read."""

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

from llama.accelerate.native import NativeQuantizedLinear
from llama.accelerate.quantize import QuantizedLinear, quantized_linear, scheme_of, should_quantize
from llama.checkpoint.layout import FUSED

NO_ORIGINAL = (
    "this weight is stored in {} bits, its original is gone and it cannot be written: build without quantize, or "
    "replace the parameter (layer.weight = torch.nn.Parameter(...)), which computes with the new one"
)


class QuantizedWeight(torch.Tensor):
    """Rows [start, start + n) of a quantized matrix, as a tensor of the model's dtype.

    Every read dequantizes the weight again. Writing to it (also through a view) and requesting gradients raise
    RuntimeError, whose message suggests a fix. When it is saved or copied, it becomes an ordinary tensor.

    source: the quantized matrix, which may contain several weights. read: computes the values of this tensor.
    """

    source: QuantizedLinear | NativeQuantizedLinear
    start: int
    read: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(
        cls,
        source: QuantizedLinear | NativeQuantizedLinear,
        start: int,
        shape: torch.Size,
        read: Callable[[], torch.Tensor],
        like: torch.Tensor,
    ) -> "QuantizedWeight":
        weight: QuantizedWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=False
        )
        weight.source, weight.start, weight.read = source, start, read
        return weight

    @staticmethod
    def of(source: QuantizedLinear | NativeQuantizedLinear, start: int, stop: int) -> nn.Parameter:
        """The parameter for rows [start, stop) of a quantized matrix."""
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
            result = func(*tree_map_only(QuantizedWeight, lambda w: w.read(), args), **kwargs)
            if func is torch.Tensor.numpy:
                result.setflags(write=False)  # a dequantized copy: writes to it would be lost
            return result
        with torch._C.DisableTorchFunctionSubclass():  # by default results would be of this class
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub declares a plain method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func._schema.is_mutable:
            values = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
            for argument in func._schema.arguments:
                value = values.get(argument.name)
                for item in value if isinstance(value, list | tuple) else [value]:  # lists: torch._foreach_zero_
                    if isinstance(item, QuantizedWeight) and argument.alias_info and argument.alias_info.is_write:
                        raise RuntimeError(NO_ORIGINAL.format(item.source.bits))
        if isinstance(first, QuantizedWeight) and func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return QuantizedWeight(first.source, first.start, first.shape, first.read, first)
        result = func(*tree_map_only(QuantizedWeight, lambda w: w.read(), args), **kwargs)
        if func.is_view and isinstance(first, QuantizedWeight):
            # The result is a view of a dequantized copy. Writes to it would be lost, so it must refuse them, too.
            return tree_map_only(
                torch.Tensor, lambda t: QuantizedWeight(first.source, first.start, t.shape, lambda: t, t), result
            )
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return nn.Parameter(self.read().clone(), requires_grad=False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = self.read().clone()
        return (nn.Parameter(plain, requires_grad=False) if isinstance(self, nn.Parameter) else plain).__reduce_ex__(
            protocol
        )


# Functions that write to a parameter or its `.data` or request gradients, and functions that read all values.
WRITES = {
    torch.Tensor.data.__set__,  # type: ignore[attr-defined]  # a property, which the stub calls a tensor
    torch.Tensor.requires_grad.__set__,  # type: ignore[attr-defined]  # the same, called a bool
    torch.Tensor.requires_grad_,
    torch.Tensor.__setitem__,
}
READS = {F.linear, torch.Tensor.numpy, torch.Tensor.__repr__, torch.Tensor.tolist}


def quantize_part(part: nn.Module, scheme: str | None, is_native: bool, key: str = "") -> int:
    """Quantize the weights of a block, or of the output layer (key OUTPUT). Layers with the same input share a matrix.

    Returns the number of weights that the scheme leaves unquantized only because of their width.
    """
    unchanged = 0
    groups = {key: [part]} if key else {name: [part.get_submodule(n) for n in layers] for name, layers in FUSED.items()}
    for name, layers in groups.items():
        weights = [layer.get_parameter("weight") for layer in layers]
        kind = scheme_of(name, weights[0].shape[1], scheme)
        if kind is None:
            unchanged += len(weights) * (should_quantize(name, scheme) is not None)
            continue
        rows = [len(weight) for weight in weights]
        matrix = quantized_linear(kind, is_native, *weights)
        del weights
        for layer in layers:  # frees the originals before native.c's layout is allocated
            layer.register_parameter("weight", None)
        source = NativeQuantizedLinear(matrix) if is_native else matrix
        del matrix
        for layer, stop, n in zip(layers, accumulate(rows), rows, strict=True):
            layer.weight = QuantizedWeight.of(source, stop - n, stop)
    return unchanged


def held_bytes(weights: Iterable[torch.Tensor]) -> int:
    """Bytes that the weights occupy. A quantized matrix that contains several of them counts once."""
    sizes: dict[int, int] = {}
    for weight in weights:
        if isinstance(weight, QuantizedWeight):
            sizes[id(weight.source)] = sum(buffer.nbytes for buffer in weight.source.buffers())
        else:
            sizes[id(weight)] = weight.nbytes
    return sum(sizes.values())
