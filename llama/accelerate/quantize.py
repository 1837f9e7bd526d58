"""Weights in 8 and 4 bits: how they are rounded, stored and multiplied. Activations are quantized in two places: in
native.c's kernels for few rows (`quantize_row` there), and with fp8 weights for many rows in bfloat16.

int8: one scale for each output row. fp8 (float8_e4m3fn, on GPUs only): the same. int4: one scale and one zero for each
group of 32 columns; q in 0..15 represents the value (q - 8) * scale + zero. q is computed from scales and zeros that
are already rounded to bfloat16; fp8's scales stay float32.

The output layer gets more bits: the schemes int8 and fp8 do not quantize it, int4 stores it as int8. Otherwise it would
cause half of int8's increase in perplexity.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from llama.accelerate import gpu
from llama.accelerate.linear import linear
from llama.checkpoint.layout import EMBEDDING, OUTPUT

GROUP = 32  # int4: columns that share a scale and a zero
# Up to this number of rows, x is multiplied by a kernel that reads the quantized weight (gemv). For more rows the
# weight is dequantized first, which is faster: at 512 rows the gemv kernels take several times as long.
MAX_GEMV_ROWS = 32
MAX_TRITON_ROWS = 16  # the same for Triton's kernels, which compute 16 rows at a time
FP8 = torch.float8_e4m3fn
CHUNK_ROWS = 256  # rows quantized at a time, so that no complete matrix is in memory in float32


def should_quantize(key: str, scheme: str | None) -> str | None:
    """How a scheme stores a weight if its width allows it: "int8", "int4", "fp8" or None. key: its name, without the
    layer."""
    if key == OUTPUT:
        return "int8" if scheme == "int4" else None
    return None if key == EMBEDDING or "norm" in key else scheme


def scheme_of(key: str, columns: int, scheme: str | None) -> str | None:
    """How a scheme stores a weight of this width: "int8", "int4", "fp8" or None.

    key: its name, without the layer. columns: its input features on this rank. int4 needs a multiple of 32, fp8
    and int8 one of 16: torch's int8 kernel returns garbage for other widths.
    """
    kind = should_quantize(key, scheme)
    return kind if columns % (GROUP if kind == "int4" else 16) == 0 else None


def stored_bytes(key: str, rows: int, columns: int, scheme: str | None, itemsize: int) -> int:
    """Bytes in which a weight [rows, columns] is stored. itemsize: that of the model's dtype."""
    kind = scheme_of(key, columns, scheme)
    if kind == "int8":
        return rows * columns + 2 * rows
    if kind == "fp8":
        return rows * columns + 4 * rows
    if kind == "int4":
        return rows * columns // 2 + 4 * rows * (columns // GROUP)
    return rows * columns * itemsize


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, k] -> q int8 [n, k], scales [n]. A row's largest magnitude becomes 127."""
    w = weight.float()
    scale = (w.abs().amax(dim=1) / 127).bfloat16()
    q = (w / _divisor(scale)[:, None]).round_().clamp_(-127, 127)
    return q.to(torch.int8), scale


def quantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[n, k] -> q uint8 [n, k], scales and zeros [n, k / 32]. A group's minimum becomes 0, its maximum 15."""
    n, k = weight.shape
    w = weight.float().view(n, k // GROUP, GROUP)
    low, high = w.aminmax(dim=-1)
    scale = ((high - low) / 15).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    q = (w - zero.float()[..., None]) / _divisor(scale)[..., None] + 8
    return q.round_().clamp_(0, 15).to(torch.uint8).view(n, k), scale, zero


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, k] -> q float8_e4m3fn [n, k], scales fp32 [n]. A row's largest magnitude becomes 448, the largest e4m3fn."""
    w = weight.float()
    scale = w.abs().amax(dim=1) / torch.finfo(FP8).max
    return (w / _divisor(scale)[:, None]).to(FP8), scale


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    return scale.float().masked_fill(scale == 0, 1)  # all values are equal: any q represents them


class QuantizedLinear(nn.Module):
    """x [.., k] -> [.., n] by a quantized weight [n, k], or by several that are stacked along n.

    quantize: a function from a weight to its buffers (data, scale and, in int4, zero).
    """

    bits: int
    data: torch.Tensor
    scale: torch.Tensor
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]

    def __init__(self, *weights: torch.Tensor):
        super().__init__()
        self.n, self.k = sum(map(len, weights)), weights[0].shape[1]
        self.dtype = weights[0].dtype  # of the dequantized weight
        parts = [type(self).quantize(part) for weight in weights for part in weight.split(CHUNK_ROWS)]
        for name, tensors in zip(("data", "scale", "zero"), zip(*parts, strict=True), strict=False):
            # As bytes: torch 2.5 cannot concatenate fp8 on CUDA.
            joined = torch.cat([tensor.view(torch.uint8) for tensor in tensors])
            self.register_buffer(name, joined.view(tensors[0].dtype))
        # Stored here, because torch.compile would trace the search for them.
        self.kernels: Any = gpu.triton_kernels() if self.data.is_cuda else None

    def extra_repr(self) -> str:
        return f"{self.n} x {self.k}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.k)
        if len(rows) > MAX_GEMV_ROWS or (y := self.gemv(rows)) is None:
            y = linear(rows, self.dequantize())
        return y.view(*x.shape[:-1], self.n)

    def gemv(self, x: torch.Tensor) -> torch.Tensor | None:
        """x [m, k] -> [m, n] for up to MAX_GEMV_ROWS rows; None where there is no kernel for it."""
        raise NotImplementedError  # each scheme's own

    def has_kernel_for(self, x: torch.Tensor) -> bool:
        """Whether a Triton kernel multiplies x [m, k]."""
        return self.kernels is not None and len(x) <= MAX_TRITON_ROWS

    def dequantize(self) -> torch.Tensor:
        """The weight in `dtype`, [n, k]."""
        raise NotImplementedError  # each scheme's own


class Int8(QuantizedLinear):
    bits = 8
    quantize = staticmethod(quantize_int8)

    def gemv(self, x: torch.Tensor) -> torch.Tensor | None:
        if self.has_kernel_for(x):
            return cast(torch.Tensor, self.kernels.multiply(x, self.data, self.scale))
        # In float32 torch's kernel takes four times as long as dequantizing the weight and multiplying by it.
        if self.dtype != torch.bfloat16 or not x.is_cpu or (op := _operator("_weight_int8pack_mm")) is None:
            return None
        y: torch.Tensor = op(x, self.data, self.scale)
        return y

    def dequantize(self) -> torch.Tensor:
        if self.data.is_cuda and self.dtype == torch.bfloat16:  # one pass; on CPUs two passes take half the time
            return self.data * self.scale[:, None]
        return self.data.to(self.dtype).mul_(self.scale[:, None])


class Fp8(QuantizedLinear):
    """Many rows in bfloat16 are multiplied in fp8: the activations are quantized, too, with one scale for each row."""

    bits = 8
    quantize = staticmethod(quantize_fp8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.k)
        # torch._scaled_mm needs multiples of 16.
        if len(rows) <= MAX_TRITON_ROWS or self.dtype != torch.bfloat16 or self.n % 16:
            return super().forward(x)
        q, scale = quantize_fp8(rows)
        y: torch.Tensor = torch._scaled_mm(
            q, self.data.t(), scale_a=scale[:, None], scale_b=self.scale[None], out_dtype=self.dtype
        )
        return y.view(*x.shape[:-1], self.n)

    def gemv(self, x: torch.Tensor) -> torch.Tensor | None:
        return self.kernels.multiply(x, self.data, self.scale) if self.has_kernel_for(x) else None

    def dequantize(self) -> torch.Tensor:
        return self.data.float().mul_(self.scale[:, None]).to(self.dtype)


class Int4(QuantizedLinear):
    """data [n, k / 2]: a byte holds columns j (low bits) and j + 16 of a group of 32."""

    bits = 4
    zero: torch.Tensor

    @staticmethod
    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, scale, zero = quantize_int4(weight)
        low, high = q.view(len(q), -1, 2, GROUP // 2).unbind(2)
        return (low | high << 4).flatten(1), scale, zero

    def gemv(self, x: torch.Tensor) -> torch.Tensor | None:
        return self.kernels.multiply_int4(x, self.data, self.scale, self.zero) if self.has_kernel_for(x) else None

    def dequantize(self) -> torch.Tensor:
        if self.kernels is not None:
            return cast(torch.Tensor, self.kernels.dequantize_int4(self.data, self.scale, self.zero, self.dtype))
        data = self.data.view(self.n, -1, 1, GROUP // 2)
        q = torch.cat((data & 15, data >> 4), dim=2).view(self.n, -1, GROUP).to(self.dtype)
        return q.sub_(8).mul_(self.scale[..., None]).add_(self.zero[..., None]).view(self.n, self.k)


class PackedInt4(QuantizedLinear):
    """int4 in the layout of torch's kernel for CPUs, which depends on the CPU.

    data: blocks of 2 * `packed_half()` output rows. In a block, byte i of a column holds rows
    i (low bits) and i + half (high bits).
    scale: scales and zeros, [k / 32, n, 2].
    """

    bits = 4

    @staticmethod
    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
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
        # Contiguous copies, as reading every second number takes three times as long.
        pairs = self.scale.view(-1, len(data), 2 * half, 2).permute(3, 1, 0, 2).contiguous()
        scale, zero = pairs.unsqueeze(3)  # [blocks, k / 32, 1, 2 half] each
        weight = q.sub_(8).mul_(scale).add_(zero)  # [blocks, k / 32, 32, 2 half]
        return weight.view(len(data), self.k, -1).transpose(0, 1).reshape(self.k, self.n).T  # copies long runs of bytes


@cache
def packed_half() -> int:
    """Half the rows of a block in torch's packed int4 layout, found by packing a test matrix; 0 if unknown."""
    if _operator("_convert_weight_to_int4pack_for_cpu") is None or _operator("_weight_int4pack_mm_for_cpu") is None:
        return 0
    q = torch.randint(0, 16, (128, GROUP), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    for half in (32, 16):
        blocks = data.view(-1, GROUP, half)
        if torch.equal(torch.cat((blocks & 15, blocks >> 4), dim=-1).transpose(1, 2).reshape(q.shape), q):
            return half
    return 0


def quantized_linear(kind: str, is_native: bool, *weights: torch.Tensor) -> QuantizedLinear:
    """One layer for several weights, stacked along n. kind: "int8", "int4" or "fp8". is_native: native.c will compute
    with it, so torch's packed layout is not used."""
    if kind != "int4":
        return (Int8 if kind == "int8" else Fp8)(*weights)
    first, half = weights[0], packed_half()
    can_pack = not is_native and first.is_cpu and first.dtype == torch.bfloat16 and half > 0
    return PackedInt4(*weights) if can_pack and all(len(w) % (2 * half) == 0 for w in weights) else Int4(*weights)


def _operator(name: str) -> Any:
    """A private operator of torch, None where this version lacks it."""
    return getattr(torch.ops.aten, name, None)
