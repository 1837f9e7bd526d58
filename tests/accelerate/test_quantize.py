"""int8, int4, fp8: the rounding against its definition, kernels against dequantized weights, the model's answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.paths import GOLDEN
from helpers.ranks import run_ranks
from helpers.tolerance import BFLOAT16, gamma
from llama import Llama, ModelArgs
from llama.accelerate import quantize
from llama.accelerate.quantize import (
    FP8,
    GROUP,
    MAX_GEMV_ROWS,
    MAX_TRITON_ROWS,
    Fp8,
    Int4,
    Int8,
    PackedInt4,
    quantized_linear,
    scheme_of,
    stored_bytes,
)
from llama.checkpoint.layout import EMBEDDING, OUTPUT, tensor_shapes
from llama.evaluate.scoring import rolling_loglikelihood, token_logprobs

needs_packing = pytest.mark.skipif(not quantize.packed_half(), reason="this torch has no int4 kernel for this CPU")


def random(n: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)).to(dtype)


# Rounding -----------------------------------------------------------------------------------------


def test_int8_is_the_nearest_of_255_steps() -> None:
    weight = random(70, 48)
    layer = Int8(weight)
    scale = (weight.abs().amax(dim=1) / 127).bfloat16().float()
    assert torch.equal(layer.scale.float(), scale)
    # As the scale is rounded, a row's largest value may be up to 2^-9 of it beyond step 127.
    error = (layer.dequantize() - weight).abs()
    assert (error <= scale[:, None] * (0.5 + 127 * 2**-9)).all()
    inside = weight.abs() < 126 * scale[:, None]
    assert (error[inside] <= (scale[:, None].expand_as(weight) * 0.5001)[inside]).all()


def test_fp8_has_three_bits_after_the_leading_one() -> None:
    weight = random(70, 48)
    layer = Fp8(weight)
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    torch.testing.assert_close(layer.scale[:, None], scale)
    # Half of the last bit: relative to the value, or to 2^-6, the smallest with a leading one.
    allowed = 2**-4 * torch.maximum(weight.abs(), scale * 2**-6) * 1.0001
    error = (layer.dequantize() - weight).abs()
    assert (error <= allowed).all() and error.max() > 0.4 * allowed.max()


def test_int4_is_the_nearest_of_16_steps() -> None:
    weight = random(70, 96)
    layer = Int4(weight)
    groups = weight.view(70, 3, GROUP)
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    step = (high - low) / 15
    assert torch.equal(layer.scale, step.bfloat16())
    error = (layer.dequantize().view_as(groups) - groups).abs()
    # Half a step, and the rounding to bfloat16 of scale (times 15 steps) and zero.
    allowed = step * (0.5 + 15 * 2**-9) + torch.maximum(low.abs(), high.abs()) * 2**-8
    assert (error <= allowed[..., None]).all()
    assert (layer.dequantize() - weight).pow(2).mean().sqrt() < 0.09  # of a standard deviation of 1


def test_a_grid_of_16_steps_is_kept() -> None:
    """Weights on a grid whose scale and zero are bfloat16 are restored exactly."""
    q = torch.randint(0, 16, (40, 64), generator=torch.Generator().manual_seed(0))
    q[:, ::GROUP], q[:, 1::GROUP] = 0, 15
    weight = (q.float() - 8) * 0.125 + 0.5
    assert torch.equal(Int4(weight).dequantize(), weight)


@pytest.mark.parametrize("kind", [Int8, Int4, Fp8])
def test_rows_of_one_value(kind: type[Int8 | Int4 | Fp8]) -> None:
    weight = torch.tensor([0.0, 1.0, -3.0])[:, None].expand(3, 64)
    torch.testing.assert_close(kind(weight).dequantize(), weight, rtol=2**-8, atol=0)


@pytest.mark.parametrize("kind", [Int8, Int4, Fp8])
@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_damage_is_not_rounded_away(kind: type[Int8 | Int4 | Fp8], damage: float) -> None:
    weight = random(4, 64)
    weight[2, 33] = damage
    assert kind(weight).dequantize().isfinite().all(dim=1).tolist() == [True, True, False, True]


# Storage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "columns", "scheme", "expected"),
    [
        ("attention.wq.weight", 576, None, None),
        ("attention.wq.weight", 576, "int8", "int8"),
        ("feed_forward.w2.weight", 11008 // 8, "int4", "int4"),
        ("feed_forward.w2.weight", 5632 // 512, "int4", None),  # 11 columns
        ("feed_forward.w2.weight", 176, "int8", "int8"),  # 11 * 16
        ("feed_forward.w2.weight", 176, "int4", None),
        (OUTPUT, 4096, "int4", "int8"),
        (OUTPUT, 4096, "int8", None),
        (OUTPUT, 4096, "fp8", None),
        ("feed_forward.w2.weight", 176, "fp8", "fp8"),
        ("feed_forward.w2.weight", 88, "fp8", None),
        (EMBEDDING, 4096, "int4", None),
        ("attention_norm.weight", 4096, "int8", None),
    ],
)
def test_schemes(key: str, columns: int, scheme: str | None, expected: str | None) -> None:
    assert scheme_of(key, columns, scheme) == expected


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_stored_bytes(kind: str, native: bool) -> None:
    layer = quantized_linear(kind, native, random(128, 96, torch.bfloat16))
    held = sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
    assert held == stored_bytes("attention.wq.weight", 128, 96, kind, 2)
    # By hand: 128 * 96 bytes and 128 scales of two (fp8: four) bytes; half of that and, of 3 groups a row, scales and
    # zeros.
    assert held == {"int8": 12288 + 256, "int4": 6144 + 128 * 3 * 4, "fp8": 12288 + 512}[kind]


@needs_packing
def test_torchs_order_holds_the_same_weights() -> None:
    weight = random(192, 544, torch.bfloat16)
    packed, rows = PackedInt4(weight), Int4(weight)
    assert torch.equal(packed.dequantize(), rows.dequantize())
    assert isinstance(quantized_linear("int4", False, weight), PackedInt4)
    assert isinstance(quantized_linear("int4", False, weight, weight[:70]), Int4)  # not a multiple of a block


@pytest.mark.parametrize("m", [1, 5, MAX_GEMV_ROWS, MAX_GEMV_ROWS + 1])
@pytest.mark.parametrize("kind", [Int8, pytest.param(PackedInt4, marks=needs_packing), Int4])
def test_products_with_few_and_many_rows(kind: type[quantize.QuantizedLinear], m: int) -> None:
    layer = kind(random(128, 96, torch.bfloat16))
    x = random(m, 96, torch.bfloat16)
    expected = x.double() @ layer.dequantize().double().T
    found = layer(x[None])
    assert found.shape == (1, m, 128) and found.dtype == torch.bfloat16
    # The kernels round the scaled weight, the sum or both to bfloat16.
    sums = x.double().abs() @ layer.dequantize().double().abs().T
    bound = (BFLOAT16 + gamma(96)) * sums
    assert ((found[0].double() - expected).abs() <= bound + BFLOAT16 * (expected.abs() + bound)).all()


@pytest.mark.parametrize("m", [1, MAX_TRITON_ROWS, MAX_TRITON_ROWS + 1, 100])
def test_products_in_fp8(m: int) -> None:
    """Many rows are rounded to fp8, too: each by half of its last bit, or of that of the smallest normal number."""
    layer, x = Fp8(random(64, 96, torch.bfloat16)), random(m, 96, torch.bfloat16)
    weight = layer.data.double() * layer.scale.double()[:, None]
    expected, sums = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    found = layer(x[None])[0].double()
    bound = (2 * BFLOAT16 + gamma(96)) * sums
    if m > MAX_TRITON_ROWS:
        lost = torch.maximum(x.double().abs(), x.double().abs().amax(dim=1, keepdim=True) / 448 * 2**-6) * 2**-4
        bound = bound + lost @ weight.abs().T
    assert found.shape == (m, 64) and ((found - expected).abs() <= bound).all()
    if m > MAX_TRITON_ROWS:  # in fp8 by torch's kernel, not with dequantized weights
        scale = x.float().abs().amax(dim=1) / torch.finfo(FP8).max
        q = (x.float() / scale[:, None]).to(FP8).double() * scale.double()[:, None]
        torch.testing.assert_close(found, q @ weight.T, rtol=2**-7, atol=1e-2)


def test_fp8_needs_a_gpu(build: Callable[..., Llama]) -> None:
    with pytest.raises(ValueError, match=r"'fp8' needs a GPU of compute capability 8\.9 or higher, .*: use int8"):
        build("mha", quantize="fp8")


# The model ----------------------------------------------------------------------------------------


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A weight after quantization, computed without the package: a loop over its rows, or groups of columns."""
    out = weight.clone()
    for row in out:
        for part in row.split(GROUP) if kind == "int4" else [row]:
            if kind == "int8":
                scale = float((part.abs().max() / 127).bfloat16())
                part.copy_((part / scale).round().clamp(-127, 127) * scale)
            else:
                scale = float(((part.max() - part.min()) / 15).bfloat16())
                zero = float((part.min() + 8 * scale).bfloat16())
                part.copy_(((part - zero) / scale + 8).round().clamp(0, 15).sub(8) * scale + zero)
    return out


def scores(folder: Path, ids: list[list[int]], form: dict[str, Any]) -> tuple[list[list[float]], list[list[float]]]:
    llama = Llama.build(folder, max_seq_len=64, max_batch_size=2, dtype="float32", **form)
    found = token_logprobs(llama, ids), llama.generate(ids, 4, temperature=0, logprobs=True)[1] or []
    llama.close()
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantized_model_is_one_with_rounded_weights(
    scheme: str, world_size: int, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Each rank rounds its part: an output row of wo and w2 has a scale for each."""
    weights = torch.load(checkpoint("gqa") / "consolidated.00.pth", weights_only=True)
    for key, weight in weights.items():
        if "norm" not in key and key != EMBEDDING:
            if key == OUTPUT and scheme == "int8":
                continue
            kind = "int8" if key == OUTPUT else scheme
            parts = weight.chunk(world_size, dim=1 if "wo" in key or "w2" in key else 0)
            weights[key] = torch.cat(
                [rounded(part, kind) for part in parts], dim=1 if len(parts[0]) == len(weight) else 0
            )
    torch.save(weights, tmp_path / "consolidated.00.pth")
    for name in ("params.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((checkpoint("gqa") / name).read_bytes())
    ids = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(5)).tolist()
    expected = scores(tmp_path, ids, {"plain": True})
    for form in ({}, {"compile": False}):
        for found in run_ranks(world_size, scores, checkpoint("gqa"), ids, {"quantize": scheme, **form}):
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-4)


def test_weights_that_do_not_fit_are_counted(
    checkpoint: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A feed-forward of 80 columns is a multiple of 16, but not of 32."""
    params = {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 80, "vocab_size": 512}
    (tmp_path / "params.json").write_text(json.dumps(params))
    shapes = tensor_shapes(ModelArgs(**params))  # type: ignore[arg-type]  # all ints
    torch.save({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "consolidated.00.pth")
    (tmp_path / "tokenizer.model").write_bytes((checkpoint("mha") / "tokenizer.model").read_bytes())
    for scheme, shown in (("int4", "int4 except 3 whose width does not allow it"), ("int8", "int8")):
        Llama.build(tmp_path, max_seq_len=16, max_batch_size=1, quantize=scheme).close()
        assert f", weights in {shown} on cpu" in capfd.readouterr().err


def perplexity(llama: Llama, ids: list[int]) -> float:
    (total,) = rolling_loglikelihood(llama, [ids])
    llama.close()
    return float(torch.tensor(-total / len(ids)).exp())


@pytest.mark.slow
def test_perplexity_of_the_demo(demo: Path, measured: Callable[[str, object], None]) -> None:
    """512 tokens, in float32: bfloat16 alone would change the perplexity of so few by half a percent. docs/ has
    that of all 20,097, by benchmarks/accuracy.py."""
    text = (GOLDEN / "text.txt").read_text()
    build: Callable[..., Llama] = lambda **form: Llama.build(demo, max_seq_len=512, dtype="float32", **form)  # noqa: E731
    llama = build()
    ids = llama.tokenizer.encode(text, bos=False, eos=False)[:512]
    exact = perplexity(llama, ids)
    for scheme, bound in (("int8", 0.005), ("int4", 0.06)):
        ratio = perplexity(build(quantize=scheme), ids) / exact - 1
        measured(f"perplexity of 512 tokens in {scheme}, relative to float32", ratio)
        assert abs(ratio) < bound
