"""Triton kernels for decode steps on CUDA: matmuls of 1 to 16 rows with int8, fp8 and int4 weights, which are not
dequantized first, and the operations between matmuls.

Imported only where Triton runs (see `gpu`); TRITON_INTERPRET=1 runs the kernels on a CPU, for tests. One row is
multiplied and summed in float32 without tensor cores, because memory bandwidth limits it. 2 to 16 rows use `tl.dot`,
which computes 16 rows at a time, in 16-bit dtypes on tensor cores.
"""

# mypy: disable-error-code="no-untyped-def"
import os
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import triton
import triton.language as tl

from llama.accelerate.quantize import GROUP, MAX_TRITON_ROWS

HALF = tl.constexpr(GROUP // 2)  # bytes of an int4 group
# In the interpreter, `tl.dot` and casts from integers give wrong results in bfloat16.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# A program computes block_n outputs, block_k columns at a time. The values were the fastest on an H200 at 7B's shapes.
ONE_ROW = {"block_n": 8, "block_k": 1024, "num_warps": 4, "num_stages": 1}
SEVERAL_ROWS = {"block_n": 32, "block_k": 128, "num_warps": 4, "num_stages": 4}


T = TypeVar("T", bound=Callable[..., torch.Tensor])


def _on_its_device(multiply: T) -> T:
    """Launch on the GPU of the tensors. Triton uses the current GPU, and any thread may read a weight."""

    @wraps(multiply)
    def run(*arguments: Any) -> torch.Tensor:
        with torch.cuda.device_of(arguments[0]):
            return multiply(*arguments)

    return cast(T, run)


# Matmuls ------------------------------------------------------------------------------------------


@triton.jit
def _add_dot(a, b, total):
    """total + a @ b in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _multiply_one_row(x, data, scale, y, n, k, block_n: tl.constexpr, block_k: tl.constexpr):
    """x [k], data [n, k] and scale [n] -> y [n]."""
    outputs = tl.program_id(0) * block_n + tl.arange(0, block_n)
    rows = data + outputs[:, None].to(tl.int64) * k
    total = tl.zeros((block_n, block_k), tl.float32)
    for start in range(0, k, block_k):
        columns = start + tl.arange(0, block_k)
        is_column = columns < k
        a = tl.load(x + columns, mask=is_column, other=0).to(tl.float32)
        w = tl.load(rows + columns[None, :], mask=(outputs < n)[:, None] & is_column[None, :], other=0.0)
        total += w.to(tl.float32) * a[None, :]
    scales = tl.load(scale + outputs, mask=outputs < n, other=0).to(tl.float32)
    tl.store(y + outputs, (tl.sum(total, 1) * scales).to(y.dtype.element_ty), mask=outputs < n)


@triton.jit
def _multiply_rows(x, data, scale, y, m, n, k, rows: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr):
    """x [m, k], data [n, k] and scale [n] -> y [m, n], m <= rows."""
    outputs, inputs = tl.program_id(0) * block_n + tl.arange(0, block_n), tl.arange(0, rows)
    data_rows = data + outputs[:, None].to(tl.int64) * k
    total = tl.zeros((block_n, rows), tl.float32)
    for start in range(0, k, block_k):
        columns = start + tl.arange(0, block_k)
        is_column = columns < k
        is_input = (inputs < m)[None, :] & is_column[:, None]
        a = tl.load(x + inputs[None, :] * k + columns[:, None], mask=is_input, other=0)
        w = tl.load(data_rows + columns[None, :], mask=(outputs < n)[:, None] & is_column[None, :], other=0.0)
        total = _add_dot(w.to(tl.float32).to(a.dtype), a, total)
    scales = tl.load(scale + outputs, mask=outputs < n, other=0).to(tl.float32)
    y_block = y + inputs[None, :] * n + outputs[:, None]
    result = (total * scales[:, None]).to(y.dtype.element_ty)
    tl.store(y_block, result, mask=(inputs < m)[None, :] & (outputs < n)[:, None])


@triton.jit
def _multiply_one_row_int4(x, data, scale, zero, y, n, k, block_n: tl.constexpr, block_k: tl.constexpr):
    """x [k], data [n, k / 2], scale and zero [n, k / 32] -> y [n].

    The sum over a group of x * ((q - 8) * scale + zero) is scale * sum(x * q) + (zero - 8 * scale) * sum(x). A thread
    reads the 16 bytes of a group at once: the low bits are its first 16 columns, the high bits the other 16.
    """
    groups: tl.constexpr = block_k // (2 * HALF)
    outputs = tl.program_id(0) * block_n + tl.arange(0, block_n)
    byte = tl.arange(0, HALF)
    n_groups = k // (2 * HALF)
    total = tl.zeros((block_n, groups), tl.float32)
    for start in range(0, n_groups, groups):
        group = start + tl.arange(0, groups)
        is_group = group < n_groups
        columns = group[:, None] * (2 * HALF) + byte[None, :]
        low = tl.load(x + columns, mask=is_group[:, None], other=0).to(tl.float32)
        high = tl.load(x + columns + HALF, mask=is_group[:, None], other=0).to(tl.float32)
        is_valid = (outputs < n)[:, None] & is_group[None, :]
        at = outputs[:, None].to(tl.int64) * n_groups + group[None, :]
        both = tl.load(data + at[:, :, None] * HALF + byte[None, None, :], mask=is_valid[:, :, None], other=0)
        products = (both & 15).to(tl.float32) * low[None, :, :] + (both >> 4).to(tl.float32) * high[None, :, :]
        scales = tl.load(scale + at, mask=is_valid, other=0).to(tl.float32)
        zeros = tl.load(zero + at, mask=is_valid, other=0).to(tl.float32)
        total += scales * tl.sum(products, 2) + (zeros - 8 * scales) * tl.sum(low + high, 1)[None, :]
    tl.store(y + outputs, tl.sum(total, 1).to(y.dtype.element_ty), mask=outputs < n)


@triton.jit
def _multiply_rows_int4(
    x, data, scale, zero, y, m, n, k, rows: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr
):
    """x [m, k], data [n, k / 2], scale and zero [n, k / 32] -> y [m, n], m <= rows.

    The low bits of all bytes are multiplied by their columns of x, then the high bits by theirs.
    """
    groups: tl.constexpr = block_k // (2 * HALF)
    outputs, inputs = tl.program_id(0) * block_n + tl.arange(0, block_n), tl.arange(0, rows)
    of_group, n_groups = tl.arange(0, HALF), k // (2 * HALF)
    total = tl.zeros((block_n, rows), tl.float32)
    for start in range(0, n_groups, groups):
        group, byte = start + tl.arange(0, groups), start * HALF + tl.arange(0, groups * HALF)
        is_valid = (outputs < n)[:, None] & (group < n_groups)[None, :]
        at = outputs[:, None].to(tl.int64) * n_groups + group[None, :]
        both = tl.load(data + at[:, :, None] * HALF + of_group[None, None, :], mask=is_valid[:, :, None], other=0)
        scales = tl.load(scale + at, mask=is_valid, other=0).to(tl.float32)
        zeros = tl.load(zero + at, mask=is_valid, other=0).to(tl.float32) - 8 * scales
        low = (both & 15).to(tl.float32) * scales[:, :, None] + zeros[:, :, None]
        high = (both >> 4).to(tl.float32) * scales[:, :, None] + zeros[:, :, None]
        columns = byte // HALF * (2 * HALF) + byte % HALF  # of the low bits, in the order of the bytes
        is_known = (inputs < m)[None, :] & (columns < k)[:, None]
        x_low = x + inputs[None, :] * k + columns[:, None]
        first, second = tl.load(x_low, mask=is_known, other=0), tl.load(x_low + HALF, mask=is_known, other=0)
        total = _add_dot(low.to(first.dtype).reshape(block_n, groups * HALF), first, total)
        total = _add_dot(high.to(first.dtype).reshape(block_n, groups * HALF), second, total)
    y_block = y + inputs[None, :] * n + outputs[:, None]
    tl.store(y_block, total.to(y.dtype.element_ty), mask=(inputs < m)[None, :] & (outputs < n)[:, None])


@triton.jit
def _dequantize_int4(data, scale, zero, weight, count, block: tl.constexpr):
    """data [n, k / 2], scale and zero [n, k / 32] -> weight [n, k]; count: bytes of data."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    is_byte = at < count
    group = at // HALF
    both = tl.load(data + at, mask=is_byte, other=0)
    scales = tl.load(scale + group, mask=is_byte, other=0).to(tl.float32)
    zeros = tl.load(zero + group, mask=is_byte, other=0).to(tl.float32) - 8 * scales
    low = weight + group * (2 * HALF) + at % HALF
    tl.store(low, ((both & 15).to(tl.float32) * scales + zeros).to(weight.dtype.element_ty), mask=is_byte)
    tl.store(low + HALF, ((both >> 4).to(tl.float32) * scales + zeros).to(weight.dtype.element_ty), mask=is_byte)


@_on_its_device
def multiply(x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [m, k] for m <= MAX_TRITON_ROWS, data [n, k] in int8 or fp8, scale [n] -> [m, n] in x's dtype."""
    (m, k), n = x.shape, len(data)
    x, y = x.contiguous(), x.new_empty(m, n)
    if m == 1:
        _multiply_one_row[(triton.cdiv(n, ONE_ROW["block_n"]),)](x, data, scale, y, n, k, **ONE_ROW)
    else:
        grid = (triton.cdiv(n, SEVERAL_ROWS["block_n"]),)
        _multiply_rows[grid](x, data, scale, y, m, n, k, rows=MAX_TRITON_ROWS, **SEVERAL_ROWS)
    return y


@_on_its_device
def multiply_int4(x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """x [m, k] for m <= MAX_TRITON_ROWS, data [n, k / 2], scale and zero [n, k / 32] as in `Int4` -> [m, n] as x."""
    (m, k), n = x.shape, len(data)
    x, y = x.contiguous(), x.new_empty(m, n)
    if m == 1:
        _multiply_one_row_int4[(triton.cdiv(n, ONE_ROW["block_n"]),)](x, data, scale, zero, y, n, k, **ONE_ROW)
    else:
        grid = (triton.cdiv(n, SEVERAL_ROWS["block_n"]),)
        _multiply_rows_int4[grid](x, data, scale, zero, y, m, n, k, rows=MAX_TRITON_ROWS, **SEVERAL_ROWS)
    return y


@_on_its_device
def dequantize_int4(data: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight [n, k] of an `Int4`, in one pass over its bytes."""
    weight = torch.empty(len(data), 2 * data.shape[1], dtype=dtype, device=data.device)
    block = 1024
    _dequantize_int4[(triton.cdiv(data.numel(), block),)](data, scale, zero, weight, data.numel(), block=block)
    return weight


# Between the matmuls ------------------------------------------------------------------------------


@triton.jit
def _add_norm(x, y, weight, h, normed, eps, dim, block: tl.constexpr):
    """For each row: h = x + y, normed = RMSNorm(h)."""
    at = tl.arange(0, block)
    is_column = at < dim
    row = tl.program_id(0).to(tl.int64) * dim + at
    total = tl.load(x + row, mask=is_column, other=0).to(tl.float32)
    total += tl.load(y + row, mask=is_column, other=0).to(tl.float32)
    total = total.to(h.dtype.element_ty)
    tl.store(h + row, total, mask=is_column)
    wide = total.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / dim + eps)
    scaled *= tl.load(weight + at, mask=is_column, other=0).to(tl.float32)
    tl.store(normed + row, scaled.to(normed.dtype.element_ty), mask=is_column)


@triton.jit
def _silu_mul(gate_up, out, width, block: tl.constexpr):
    """gate_up [m, 2 * width] -> silu(first half) * second half, [m, width]."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    is_column = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=is_column, other=0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=is_column, other=0).to(tl.float32)
    # Rounded before the product, because torch's two kernels do that.
    activated = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + at, (activated * up).to(out.dtype.element_ty), mask=is_column)


def add_norm(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x + y for x and y [m, dim], and the RMSNorm of the sum."""
    h, normed, (m, dim) = torch.empty_like(x), torch.empty_like(x), x.shape
    block = triton.next_power_of_2(dim)
    warps = min(16, max(1, block // 512))
    _add_norm[(m,)](x, y, weight, h, normed, eps, dim, block=block, num_warps=warps)
    return h, normed


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [m, 2 * width] -> silu(gate) * up, [m, width]."""
    m, width, block = len(gate_up), gate_up.shape[1] // 2, 1024
    out = gate_up.new_empty(m, width)
    _silu_mul[(m, triton.cdiv(width, block))](gate_up, out, width, block=block)
    return out
