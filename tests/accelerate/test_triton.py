"""Triton kernels against dequantized weights and float64: on the GPU if there is one, else in the interpreter."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F

if find_spec("triton") is None:
    pytest.skip("Triton is not installed; it exists for Linux only", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined

from helpers.captures import replace_captures
from helpers.tolerance import LOGPROB
from llama import Llama
from llama.accelerate import triton_kernels, triton_step
from llama.accelerate.cuda_graph import Batch, torch_step
from llama.accelerate.executor import Executor
from llama.accelerate.fused import FusedLayer
from llama.accelerate.quantize import Fp8, Int4, Int8
from llama.model import apply_rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows, outputs and columns, few of them multiples of a block; int4 needs whole groups of 32 columns.
SHAPES = [(1, 1, 32), (1, 70, 96), (1, 9, 2080), (2, 33, 160), (5, 70, 96), (16, 130, 1056), (9, 1, 32)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def bound(dtype: torch.dtype, x: torch.Tensor, weight: torch.Tensor) -> float:
    """The allowed error: one rounding of the result, and one of each weight if it is rounded before the product. Twice
    the unit roundoff, because the interpreter truncates where a GPU rounds."""
    largest = (x.double().abs() @ weight.double().abs().T).max().item()
    return largest * (2**-18 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("kind", [Int8, Fp8])
def test_one_scale_for_each_row(kind: type[Int8 | Fp8], m: int, n: int, k: int, dtype: torch.dtype) -> None:
    layer, x = kind(random(n, k)), random(m, k).to(dtype)
    weight = layer.data.double() * layer.scale.double()[:, None]
    found = triton_kernels.multiply(x, layer.data, layer.scale)
    assert found.shape == (m, n) and found.dtype == dtype
    torch.testing.assert_close(found.double(), x.double() @ weight.T, rtol=0, atol=bound(dtype, x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int4(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    layer, x = Int4(random(n, k).cpu() + 0.5), random(m, k).to(dtype)
    weight = layer.dequantize().double().to(DEVICE)  # on the CPU, without these kernels
    layer.to(DEVICE)
    found = triton_kernels.multiply_int4(x, layer.data, layer.scale, layer.zero)
    assert found.shape == (m, n) and found.dtype == dtype
    torch.testing.assert_close(found.double(), x.double() @ weight.T, rtol=0, atol=bound(dtype, x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (70, 96), (33, 2080)])
def test_dequantized_int4(n: int, k: int, dtype: torch.dtype) -> None:
    layer = Int4(random(n, k).cpu() + 0.5)
    expected = layer.dequantize().to(DEVICE, dtype)
    layer.to(DEVICE)
    found = triton_kernels.dequantize_int4(layer.data, layer.scale, layer.zero, dtype)
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_damaged_weights_are_not_hidden() -> None:
    weight = random(4, 64)
    weight[2, 33] = float("nan")
    for rows in (1, 3):
        x = random(rows, 64)
        int8, fp8, int4 = Int8(weight), Fp8(weight), Int4(weight)
        for found in (
            triton_kernels.multiply(x, int8.data, int8.scale),
            triton_kernels.multiply(x, fp8.data, fp8.scale),
            triton_kernels.multiply_int4(x, int4.data, int4.scale, int4.zero),
        ):
            assert found.isfinite().all(dim=0).tolist() == [True, True, False, True]


# Between the matmuls ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 200])
def test_add_norm(dim: int, dtype: torch.dtype) -> None:
    x, y, weight = (random(3, dim + i)[:, i:].to(dtype).contiguous() for i in range(3))
    h, normed = triton_kernels.add_norm(x, y, weight[0], 1e-5)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(h, x + y, rtol=eps, atol=eps)
    expected = F.rms_norm(h.double(), (dim,), weight[0].double(), 1e-5)
    torch.testing.assert_close(normed.double(), expected, rtol=2 * eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul(dtype: torch.dtype) -> None:
    gate_up = random(3, 2 * 1100).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    found = triton_kernels.silu_mul(gate_up)
    torch.testing.assert_close(found.double(), F.silu(gate) * up, rtol=3 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 24), (8, 1, 64)])
def test_attention(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Each row at its own position and in any row of the cache: what is stored, and what is attended to."""
    rows, max_seq_len, half = 4, 200, head_dim // 2
    shape = rows + 1, kv_heads, max_seq_len, head_dim
    keys, values = (random(*shape[:3], head_dim + i)[..., i:].to(dtype).contiguous() for i in (0, 1))
    expected = keys.clone(), values.clone()
    positions, slots = torch.tensor([0, 199, 70, 5], device=DEVICE), torch.tensor([2, 4, 0, 1], device=DEVICE)
    angle = random(max_seq_len, half)
    freqs_cis = torch.polar(torch.ones_like(angle), angle)
    qkv = random(rows, (heads + 2 * kv_heads) * head_dim).to(dtype)
    angles = torch.view_as_real(freqs_cis)
    queries = triton_step.rotate_and_store(qkv, angles, positions, slots, keys, values)
    qk, new_values = qkv.unflatten(1, (-1, head_dim)).split((heads + kv_heads, kv_heads), dim=1)
    rotated = apply_rope(qk[:, None], freqs_cis[positions][:, None])[:, 0]
    wanted, new_keys = rotated.split((heads, kv_heads), dim=1)
    eps = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(queries, wanted, rtol=eps, atol=1e-5)
    for buffer, old, new in zip((keys, values), expected, (new_keys, new_values), strict=True):
        old[slots, :, positions] = new
        torch.testing.assert_close(buffer, old, rtol=eps, atol=1e-5)
    for splits in (1, 3, 8):
        found = triton_step.attend(queries, keys, values, positions, slots, splits)
        for row, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
            k, v = (
                buffer[slot, :, : position + 1].double().repeat_interleave(heads // kv_heads, 0)
                for buffer in (keys, values)
            )
            weights = (k @ queries[row].double()[..., None] * head_dim**-0.5).softmax(dim=1)
            torch.testing.assert_close(found[row].double(), (weights * v).sum(1), rtol=eps, atol=eps)


@pytest.mark.parametrize("name", ["mha", "gqa", "llama31"])
def test_a_step(name: str, build: Callable[..., Llama]) -> None:
    llama = build(name, max_seq_len=140, max_batch_size=5, dtype="float32", device=DEVICE, compile=False)
    layers = [layer for _, layer in llama.executor._layers if isinstance(layer, FusedLayer)]
    steps = [make(llama.model, layers) for make in (triton_step.triton_step, torch_step)]
    llama.executor.hidden(torch.randint(3, 512, (5, 139)).to(DEVICE), 0, 139)
    h = llama.model.tok_embeddings(torch.tensor([[5], [6], [7], [7]], device=DEVICE))
    angles = torch.view_as_real(llama.model.freqs_cis.to(DEVICE))
    positions, slots = torch.tensor([0, 100, 139, 139], device=DEVICE), torch.tensor([4, 0, 2, 2], device=DEVICE)
    with torch.inference_mode():
        found, expected = (step(Batch(h, angles, positions, slots, 140, False)) for step in steps)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: tests/gpu.py has this case")
def test_golden_answers(golden: dict[str, Any], build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decode step by these kernels."""
    replace_captures(monkeypatch, strict=False)  # the interpreter copies arguments
    llama = build("gqa", max_seq_len=256, max_batch_size=3, dtype="float32", compile=False)
    llama.scheduler.executor = Executor(llama.model, decoder="triton")
    expected = golden["gqa"]["single"]
    found, logprobs = llama.generate(expected["prompt_tokens"], expected["max_gen_len"], temperature=0, logprobs=True)
    assert found == expected["tokens"] and logprobs is not None
    for ours, theirs in zip(logprobs, expected["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=LOGPROB)


SIGNATURES = {
    "triton_kernels": {
        "_multiply_one_row": "x=*t data=*w scale=*s y=*t n=i32 k=i32; block_n=8 block_k=1024",
        "_multiply_rows": "x=*t data=*w scale=*s y=*t m=i32 n=i32 k=i32; rows=16 block_n=32 block_k=128",
        "_multiply_one_row_int4": "x=*t data=*u8 scale=*bf16 zero=*bf16 y=*t n=i32 k=i32; block_n=8 block_k=1024",
        "_multiply_rows_int4": "x=*t data=*u8 scale=*bf16 zero=*bf16 y=*t m=i32 n=i32 k=i32; rows=16 block_n=32 "
        "block_k=128",
        "_dequantize_int4": "data=*u8 scale=*bf16 zero=*bf16 weight=*t count=i32; block=1024",
        "_add_norm": "x=*t y=*t weight=*t h=*t normed=*t eps=fp32 dim=i32; block=4096",
        "_silu_mul": "gate_up=*t out=*t width=i32; block=1024",
    },
    "triton_step": {
        "_rotate_and_store": "qkv=*t angles=*fp32 positions=*i64 slots=*i64 queries=*t keys=*t values=*t "
        "max_seq_len=i32; heads=32 kv_heads=8 head_dim=128 block=64",
        "_attend_part": "queries=*t keys=*t values=*t positions=*i64 slots=*i64 sums=*fp32 maxima=*fp32 totals=*fp32 "
        "max_seq_len=i32 scale=fp32 splits=i32; group=4 kv_heads=8 head_dim=128 padded_group=16 padded_head=128 "
        "block=64",
        "_join_parts": "sums=*fp32 maxima=*fp32 totals=*fp32 out=*t splits=i32; group=4 head_dim=128 padded_head=128 "
        "padded_splits=16",
    },
}
COMPILE = """
from importlib import import_module
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for module, kernels in {signatures}.items():
    for name, line in kernels.items():
        kernel = getattr(import_module("llama.accelerate." + module), name)
        types, sizes = (dict(pair.split("=") for pair in part.split()) for part in line.split(";"))
        kinds = [("bf16", "i8", "bf16")]
        kinds += [("fp16", "fp8e4nv", "fp32")] * ("*w" in line) + [("fp32", "", "")] * (name == "_attend_part")
        for dtype, weight, scale in kinds:
            names = {{"*t": "*" + dtype, "*w": "*" + weight, "*s": "*" + scale}}
            given = {{n: names.get(types.get(n), types.get(n, "constexpr")) for n in kernel.arg_names}}
            fixed = {{(kernel.arg_names.index(n),): int(size) for n, size in sizes.items()}}
            triton.compile(ASTSource(kernel, given, fixed), target=GPUTarget("cuda", 90, 32))
"""


def test_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    """The interpreter accepts code that the compiler rejects, such as a variable whose type changes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = COMPILE.format(signatures=SIGNATURES)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
