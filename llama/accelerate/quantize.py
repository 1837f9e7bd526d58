"""Weights in 8 and 4 bits: how they are rounded, stored and multiplied.

Activations stay as they are (but see `whole_row` in native.c).

int8: a scale for each output row. int4: a scale and a zero for each group of 32 columns, q in 0..15 standing for
(q - 8) * scale + zero. Scales and zeros are bfloat16, and weights are rounded to the grid that those make. The output
layer has more bits: it is int8 in int4, and int8 leaves it as it is, of whose cost in perplexity it would be half.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from llama.accelerate.linear import linear
from llama.checkpoint.layout import EMBEDDING, OUTPUT

SCHEMES = ("int8", "int4")
GROUP = 32
# More rows than these are multiplied by weights dequantize for the occasion: torch's kernels for few rows would take
# several times as long (measured at 512).
FEW_ROWS = 32
ROUNDED_ROWS = 256  # at a time, so that no whole matrix stands in float32


def should_quantize(key: str, scheme: str | None) -> str | None:
    """What a scheme asks for a weight, whatever its width."""
    if key == OUTPUT:
        return {"int4": "int8"}.get(scheme or "")
    return None if key == EMBEDDING or "norm" in key else scheme


def scheme_of(key: str, columns: int, scheme: str | None) -> str | None:
    """What becomes of a weight: "int8", "int4", or None where it stays as it is.

    key: its name, without the layer. columns: its input features on this rank. torch's kernels want whole groups of 32
    for int4, and give garbage for int8 where 16 does not divide the columns.
    """
    kind = should_quantize(key, scheme)
    return kind if columns % (GROUP if kind == "int4" else 16) == 0 else None


def stored_bytes(key: str, rows: int, columns: int, scheme: str | None, itemsize: int) -> int:
    """Bytes of a weight [rows, columns] as it is stored; itemsize: of the dtype that is not quantized."""
    kind = scheme_of(key, columns, scheme)
    if kind == "int8":
        return rows * columns + 2 * rows
    if kind == "int4":
        return rows * columns // 2 + 4 * rows * (columns // GROUP)
    return rows * columns * itemsize


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, k] -> int8 [n, k] and scales [n]: the largest of a row becomes 127."""
    w = weight.float()
    scale = (w.abs().amax(dim=1) / 127).bfloat16()
    q = (w / _divisor(scale)[:, None]).round_().clamp_(-127, 127)
    return q.to(torch.int8), scale


def quantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[n, k] -> q in uint8 [n, k], 0 to 15, scales and zeros [n, k / 32]: the least and the largest of a group
    become 0 and 15."""
    n, k = weight.shape
    w = weight.float().view(n, k // GROUP, GROUP)
    low, high = w.aminmax(dim=-1)
    scale = ((high - low) / 15).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    q = (w - zero.float()[..., None]) / _divisor(scale)[..., None] + 8
    return q.round_().clamp_(0, 15).to(torch.uint8).view(n, k), scale, zero


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    return scale.float().masked_fill(scale == 0, 1)  # all of it equal: any q will do


class Quantized(nn.Module):
    """A linear layer in fewer bits, of one weight [n, k] or of several one below the other: x [.., k] -> [.., n]."""

    bits: int
    data: torch.Tensor
    scale: torch.Tensor
    round: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]

    def __init__(self, *weights: torch.Tensor):
        super().__init__()
        self.n, self.k = sum(map(len, weights)), weights[0].shape[1]
        self.dtype = weights[0].dtype  # what it computes in
        parts = [type(self).round(part) for weight in weights for part in weight.split(ROUNDED_ROWS)]
        for name, tensors in zip(("data", "scale", "zero"), zip(*parts, strict=True), strict=False):
            self.register_buffer(name, torch.cat(tensors))

    def extra_repr(self) -> str:
        return f"{self.n} x {self.k}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.k)
        if len(rows) > FEW_ROWS or (y := self.gemv(rows)) is None:
            y = linear(rows, self.dequantize())
        return y.view(*x.shape[:-1], self.n)

    def gemv(self, x: torch.Tensor) -> torch.Tensor | None:
        """x [m, k] -> [m, n] for few rows; None where torch has no kernel for it."""
        raise NotImplementedError  # each scheme's own

    def dequantize(self) -> torch.Tensor:
        """The weight in full, [n, k]."""
        raise NotImplementedError  # each scheme's own


class Int8(Quantized):
    bits = 8
    round = staticmethod(quantize_int8)

    def gemv(self, x: torch.Tensor) -> torch.Tensor | None:
        # In float32 torch's kernel is four times slower than the products with the dequantize weight.
        if self.dtype != torch.bfloat16 or not x.is_cpu or (op := _operator("_weight_int8pack_mm")) is None:
            return None
        y: torch.Tensor = op(x, self.data, self.scale)
        return y

    def dequantize(self) -> torch.Tensor:
        return self.data.to(self.dtype).mul_(self.scale[:, None])


class Int4(Quantized):
    """A byte holds columns j and j + 16 of a group of 32, low bits first."""

    bits = 4
    zero: torch.Tensor

    @staticmethod
    def round(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, scale, zero = quantize_int4(weight)
        low, high = q.view(len(q), -1, 2, GROUP // 2).unbind(2)
        return (low | high << 4).flatten(1), scale, zero

    def gemv(self, x: torch.Tensor) -> torch.Tensor | None:
        return None

    def dequantize(self) -> torch.Tensor:
        data = self.data.view(self.n, -1, 1, GROUP // 2)
        q = torch.cat((data & 15, data >> 4), dim=2).view(self.n, -1, GROUP).to(self.dtype)
        return q.sub_(8).mul_(self.scale[..., None]).add_(self.zero[..., None]).view(self.n, self.k)


class PackedInt4(Quantized):
    """int4 in the order that torch's kernel for CPUs reads, which depends on the machine.

    data: blocks of output rows; in each, for every column, a byte for the rows i and i + half of the block.
    scale: scales and zeros, [k / 32, n, 2].
    """

    bits = 4

    @staticmethod
    def round(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, scale, zero = quantize_int4(weight)
        data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
        return data, torch.stack((scale, zero), dim=-1)

    def __init__(self, *weights: torch.Tensor):
        super().__init__(*weights)
        self.scale = self.scale.transpose(0, 1).contiguous()

    def gemv(self, x: torch.Tensor) -> torch.Tensor | None:
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.data, GROUP, self.scale)
        return y

    def dequantize(self) -> torch.Tensor:
        half = packed_half()
        data = self.data.view(-1, self.k, half)  # [blocks, k, half]
        q = torch.cat((data & 15, data >> 4), dim=-1).view(len(data), -1, GROUP, 2 * half).to(self.dtype)
        # In a row of their own each, or torch reads every second number and takes three times as long.
        pairs = self.scale.view(-1, len(data), 2 * half, 2).permute(3, 1, 0, 2).contiguous()
        scale, zero = pairs.unsqueeze(3)  # [blocks, k / 32, 1, 2 half] each
        weight = q.sub_(8).mul_(scale).add_(zero)  # [blocks, k / 32, 32, 2 half]
        return weight.view(len(data), self.k, -1).transpose(0, 1).reshape(self.k, self.n).T  # copied in long runs


@cache
def packed_half() -> int:
    """Half the rows of a block of torch's packed int4 on this machine, tried out; 0 where the order is unknown."""
    if _operator("_convert_weight_to_int4pack_for_cpu") is None or _operator("_weight_int4pack_mm_for_cpu") is None:
        return 0
    q = torch.randint(0, 16, (128, GROUP), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    for half in (32, 16):
        blocks = data.view(-1, GROUP, half)
        if torch.equal(torch.cat((blocks & 15, blocks >> 4), dim=-1).transpose(1, 2).reshape(q.shape), q):
            return half
    return 0


def quantized(kind: str, native: bool, *weights: torch.Tensor) -> Quantized:
    """Weights in a scheme, one below the other. native: llama.native will read them."""
    if kind == "int8":
        return Int8(*weights)
    first, half = weights[0], packed_half()
    packs = not native and first.is_cpu and first.dtype == torch.bfloat16 and half > 0
    return PackedInt4(*weights) if packs and all(len(w) % (2 * half) == 0 for w in weights) else Int4(*weights)


def _operator(name: str) -> Any:
    """One of torch's private operators, or None where this torch lacks it."""
    return getattr(torch.ops.aten, name, None)
