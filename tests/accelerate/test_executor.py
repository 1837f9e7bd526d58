"""Fused layers, quantized weights and compiled decode steps against the plain model; their parts against float64."""

import gc
import json
import os
import platform
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from golden.make_checkpoint import TOKENIZER
from helpers.captures import replace_captures
from helpers.tolerance import BFLOAT16, LOGPROB, gamma, near
from llama import Llama, ModelArgs, loading, model
from llama.accelerate import executor, fused, native
from llama.accelerate.fused import Dense
from llama.accelerate.linear import BLOCK_ROWS
from llama.accelerate.quantize import MAX_GEMV_ROWS, Int4, Int8, QuantizedLinear
from llama.cache import KVCache
from llama.checkpoint.layout import tensor_shapes


def ids(bsz: int, seqlen: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 512, (bsz, seqlen), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


# Decode steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mha", "gqa", "llama31"])
@pytest.mark.parametrize("form", ["eager", "compile"])
def test_steps_at_any_positions(form: str, name: str, dtype: str, build: Callable[..., Llama]) -> None:
    """Decode steps with each row at its own position, some far beyond one block of keys, against a plain prefill."""
    bsz, lengths = 7, [1, 2, 17, 255, 256, 257, 600]
    plain = build(name, max_seq_len=640, max_batch_size=bsz, dtype=dtype, plain=True)
    texts = ids(bsz, 600)
    expected = plain.executor.hidden(texts, 0, 600)[range(bsz), [n - 1 for n in lengths]].float()

    llama = build(name, max_seq_len=640, max_batch_size=bsz, dtype=dtype, compile=form == "compile")
    assert llama.executor.is_compiled == (form == "compile")
    llama.executor.hidden(texts[:, :-1], 0, 599)
    last = torch.tensor(lengths) - 1
    for rows in (1, 3, 4, bsz):  # kernels take four rows at a time
        newest, at = texts[range(rows), last[:rows]], last[:rows]
        found = llama.executor.hidden(newest[:, None], at, int(at.max()) + 1)[:, 0].float()
        assert (found - expected[:rows]).abs().max() <= near(llama, expected, dtype), f"{rows} rows"


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (5, 1), (7, 1), (8, 1)])
def test_steps_of_heads_that_share_keys(heads: int, kv_heads: int, tmp_path: Path) -> None:
    """native.c computes up to four heads that share a KV head at a time: here groups of 3, 5, 7 and 8."""
    params: dict[str, Any] = {"dim": 16 * heads, "n_layers": 2, "n_heads": heads, "n_kv_heads": kv_heads}
    params |= {"vocab_size": 512, "hidden_dim": 96}
    (tmp_path / "params.json").write_text(json.dumps(params))
    stream = torch.Generator().manual_seed(heads)
    shapes = tensor_shapes(ModelArgs(**params))
    torch.save({k: torch.randn(s, generator=stream) * 0.1 for k, s in shapes.items()}, tmp_path / "consolidated.00.pth")
    texts, found = ids(2, 40), []
    for plain in (True, False):
        sizes: dict[str, Any] = {"max_seq_len": 64, "max_batch_size": 2, "dtype": "float32"}
        llama = Llama.build(tmp_path, TOKENIZER, **sizes, plain=plain, compile=not plain)
        llama.executor.hidden(texts[:, :-1], 0, 39)
        found.append(llama.executor.hidden(texts[:, -1:], 39, 40).float())
        bound = near(llama, found[0])
        llama.close()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=bound)


@pytest.mark.parametrize("form", [{}, {"compile": False}, {"quantize": "int8", "compile": False}, {"quantize": "int4"}])
def test_a_batch_equals_its_rows_alone(form: dict[str, Any], build: Callable[..., Llama]) -> None:
    llama = build("gqa", max_seq_len=128, max_batch_size=6, **form)
    prompts = [ids(1, n, seed=n)[0].tolist() for n in (3, 90, 17, 5, 64, 40)]
    together, scores = llama.generate(prompts, 12, temperature=0, logprobs=True)
    for prompt, tokens, logprobs in zip(prompts, together, scores or [], strict=True):
        (alone,), found = llama.generate([prompt], 12, temperature=0, logprobs=True)
        assert alone == tokens and found is not None
        torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(logprobs), rtol=0, atol=LOGPROB)


@pytest.mark.parametrize("form", [{}, {"quantize": "int8", "compile": False}, {"quantize": "int4"}])
def test_weights_damaged_after_the_check_are_reported(
    form: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.load(checkpoint("gqa") / "consolidated.00.pth", weights_only=True)
    weights["layers.1.feed_forward.w2.weight"][7, 40] = float("nan")
    torch.save(weights, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text((checkpoint("gqa") / "params.json").read_text())
    monkeypatch.setattr(loading, "check_before_loading", lambda *_: ([], {}))
    llama = Llama.build(tmp_path, TOKENIZER, max_seq_len=32, max_batch_size=1, **form)
    with pytest.raises(FloatingPointError, match="not finite"):
        llama.generate([[5, 6, 7]], 4, temperature=0)
    llama.close()


def test_a_rank_that_fails_in_the_middle_of_a_step(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception cannot pass through native.c: it is stored, and raised after native.c has returned."""
    llama = build("gqa", max_seq_len=32, max_batch_size=1, compile=True)
    step = llama.executor._decoder
    assert isinstance(step, native.NativeDecoder)
    step.struct.reduce = native.REDUCE(step._reduce)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("peer gone")

    monkeypatch.setattr(native.dist, "all_reduce", broken)
    with pytest.raises(ConnectionError, match="peer gone"):
        llama.generate([[5, 6, 7]], 4, temperature=0)


# Matrices of native.c -----------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 9, MAX_GEMV_ROWS, MAX_GEMV_ROWS + 1])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_products(kind: str, m: int) -> None:
    native.compile_library()
    narrow = {"int4": (9, 32), "int8": (9, 48)}.get(kind, (7, 50))  # no multiple of groups, or of vectors
    for n, k in ((1, 32), (6, 96), (50, 544), (33, 64), narrow):
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        quantized = {"int8": Int8, "int4": Int4}.get(kind)
        layer = quantized(weight) if quantized else None
        full = layer.dequantize() if layer else weight.to(dtype)
        x = torch.randn(1, m, k, generator=torch.Generator().manual_seed(m))
        product = native.NativeQuantizedLinear(layer) if layer else Dense(full, True)
        found = product(x.to(dtype))
        assert found.shape == (1, m, n) and found.dtype == dtype
        x, full = x.to(dtype).double(), full.double()
        exact, bound = x @ full.T, gamma(k + ROUNDINGS.get(kind, 0)) * sizes(x, full, layer)
        if kind == "bfloat16":  # the result is rounded to it
            bound += BFLOAT16 * (exact.abs() + bound)
        assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 17, BLOCK_ROWS + 3])
def test_products_in_blocks(m: int, dtype: torch.dtype) -> None:
    native.compile_library()
    weight = torch.randn(50, 99, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = torch.randn(1, m, 99, generator=torch.Generator().manual_seed(m)).to(dtype)
    found, exact = native.linear_blocks(x, weight), x.double() @ weight.double().T
    assert found.shape == (1, m, 50) and found.dtype == dtype
    bound = gamma(99) * (x.double().abs() @ weight.double().abs().T)
    if dtype == torch.bfloat16:
        bound += BFLOAT16 * (exact.abs() + bound)
    assert ((found.double() - exact).abs() <= bound).all()


# Roundings of a term besides those of additions. int8: the scale and that of x. int4: these, that of the weight, and
# those of the sum of x times (zero - 8 * scale), which is added to the sum of products.
ROUNDINGS = {"int8": 2, "int4": 6}


def sizes(x: torch.Tensor, full: torch.Tensor, layer: QuantizedLinear | None) -> torch.Tensor:
    """The sum of the terms' magnitudes, [m, n]. int4 multiplies by q, 0 to 15, and subtracts the 8 afterwards."""
    weight = full.abs()
    if isinstance(layer, Int4):
        terms = 2 * layer.zero.double().abs() + 16 * layer.scale.double()
        weight = weight + terms.repeat_interleave(32, dim=1)
    return x.abs() @ weight.T


@pytest.mark.parametrize("m", [1, 2, 4, 7, 13, MAX_GEMV_ROWS])
@pytest.mark.parametrize("kind", [Int8, Int4])
def test_products_of_integers(kind: type[Int8 | Int4], m: int) -> None:
    """In bfloat16, x is rounded to 65,535 steps between plus and minus its largest magnitude; all else is exact."""
    native.compile_library()
    for n, k in ((1, 32), (6, 96), (50, 544), (33, 1600)):
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n)).bfloat16()
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        x[:, 5] *= 100  # one large number, which makes the steps large for all others
        layer, x = kind(weight.float()), x.double()
        exact = layer.dequantize().double()
        found = native.NativeQuantizedLinear(kind(weight))(x.float()).double()
        step = x.abs().amax(dim=1, keepdim=True) / 32767
        error = found - x @ exact.T
        # Half a step of each x, and float32's roundings: two additions a group of 32, 12 for scales and conversions.
        bound = step / 2 * exact.abs().sum(dim=1) + gamma(k // 16 + 12) * sizes(x, exact, layer)
        assert (error.abs() <= bound).all()
        if n > 10:  # enough errors: evenly distributed ones have this standard deviation
            expected = step / 12**0.5 * exact.norm(dim=1)
            assert 0.6 < (error / expected).square().mean().sqrt() < 1.4


@pytest.mark.parametrize("kind", [Int8, Int4])
def test_the_largest_integers(kind: type[Int8 | Int4]) -> None:
    """Sums of equal terms of the largest magnitude must not overflow. A row with NaN or inf gives no finite result."""
    native.compile_library()
    weight = torch.ones(20, 4096)
    weight[::2] = -1
    layer = native.NativeQuantizedLinear(kind(weight.bfloat16()))
    x = torch.full((6, 4096), -3.0)
    x[1], x[2, 7], x[3, 8], x[4, 9], x[5] = 0, float("nan"), float("inf"), -float("inf"), 1e-36
    for rows in (x, x[:1]):
        found = layer(rows)
        near = BFLOAT16 + 2 * gamma(4096 // 16 + 12)  # the scale is a bfloat16
        torch.testing.assert_close(found[0], -3 * 4096 * weight[:, 0], rtol=near, atol=0)
        assert (found[1:2] == 0).all() and not found[2:5].isfinite().any() and (found[5:].abs() < 1e-30).all()


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, starts, seqlen",
    [
        (9, 3, 64, [0], 300),  # the demo model's; two blocks of keys
        (4, 4, 8, [0, 0, 0], 5),
        (8, 1, 128, [0, 0], 65),
        (6, 2, 48, [255, 255], 3),  # an odd number of keys, over the end of a block
        (2, 1, 80, [700], 1),
        (72, 1, 16, [0], 20),  # more heads than a thread processes at a time
        (6, 3, 20, [3, 250, 600], 40),
    ],
)
def test_attention_over_a_cache(heads: int, kv_heads: int, head_dim: int, starts: list[int], seqlen: int) -> None:
    """Against torch's in float64. Old keys beyond a query's position, here NaN, must not affect it."""
    native.compile_library()
    stream, end = torch.Generator().manual_seed(heads), max(starts) + seqlen
    slots = list(range(len(starts), 0, -1))
    cache = KVCache((len(starts) + 1, kv_heads, end + 9, head_dim), torch.bfloat16, torch.device("cpu"))
    for buffer in (cache.k, cache.v):
        buffer.copy_(torch.randn(buffer.shape, generator=stream))
        buffer[:, :, end:] = float("nan")
    q = torch.randn(len(starts), seqlen, heads, head_dim, generator=stream).mul(3).bfloat16()
    start_pos = starts[0] if len(starts) == 1 else torch.tensor(starts)
    found = native.attend(q, cache, start_pos, cache.rows(slots, len(slots)))
    for row, (start, slot) in enumerate(zip(starts, slots, strict=True)):
        mask = torch.ones(seqlen, end, dtype=torch.bool).tril(start)
        keys, values = (x[slot, :, :end].double() for x in (cache.k, cache.v))
        queries = q[row].transpose(0, 1).double()
        exact, size = (
            F.scaled_dot_product_attention(queries, keys, each, attn_mask=mask, enable_gqa=True).transpose(0, 1)
            for each in (values, values.abs())
        )
        # The error of a score is that of its dot product and three more roundings. It is a relative error of its
        # probability, and of their total. Exponentials are within two units (2^-22). Probabilities are rounded to
        # bfloat16 before they are multiplied by the values, and so is the result.
        score = queries.abs() @ keys.abs().repeat_interleave(heads // kv_heads, dim=0).mT / head_dim**0.5
        relative = BFLOAT16 + 2 * (gamma(head_dim + 3) * score.max() + 2**-22) + gamma(end)
        bound = relative * size * (1 + BFLOAT16) + BFLOAT16 * exact.abs()
        assert ((found[row].double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("seqlen", [1, 40])
def test_the_parts_of_a_layer(seqlen: int, dtype: str) -> None:
    """RMSNorm, RoPE and output layer, fused and plain, against float64."""
    kind = getattr(torch, dtype)
    stream = torch.Generator().manual_seed(seqlen)
    x = torch.randn(2, seqlen, 96, generator=stream).mul(50).to(kind)
    plain = model.RMSNorm(96, 1e-5)
    plain.weight = nn.Parameter(torch.randn(96, generator=stream).to(kind))
    last = 0.0 if dtype == "float32" else BFLOAT16  # the result is rounded to its dtype
    x64, weight = x.double(), plain.weight.double()
    exact = x64 / (x64.square().mean(dim=-1, keepdim=True) + plain.eps).sqrt() * weight
    with torch.no_grad():
        for found in (fused.rms_norm(plain, x), plain(x)):
            # A sum of 96 squares and about a dozen operations: mean, eps, root, its inverse, products.
            assert ((found.double() - exact).abs() <= (gamma(96 + 12) + last) * exact.abs()).all()

    angles = torch.rand(seqlen, 1, 16, generator=stream) * 7
    freqs_cis = torch.polar(torch.ones_like(angles), angles).squeeze(1)  # [seqlen, 16]
    heads = x.unflatten(-1, (-1, 32))
    even, odd = heads.double().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (part.double()[:, None] for part in (freqs_cis.real, freqs_cis.imag))
    exact = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    size = torch.stack(((even * cos).abs() + (odd * sin).abs(), (even * sin).abs() + (odd * cos).abs()), dim=-1)
    bound = gamma(2) * size.flatten(-2)
    bound += last * (exact.abs() + bound)
    assert ((model.apply_rope(heads, freqs_cis).double() - exact).abs() <= bound).all()

    for vocab in (96, 50):
        weight = torch.randn(vocab, 96, generator=stream).to(kind)
        for rows in (x[:1], x):
            exact = rows.double() @ weight.double().T
            bound = gamma(96) * (rows.double().abs() @ weight.double().abs().T)
            bound += last * (exact.abs() + bound)
            for found in (Dense(weight, False)(rows), F.linear(rows, weight)):
                assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("kind", [Int8, Int4])
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16])
def test_dequantize(kind: type[Int8 | Int4], to: torch.dtype) -> None:
    native.compile_library()
    layer = kind(torch.randn(37, 96, generator=torch.Generator().manual_seed(1)))
    found = native.NativeQuantizedLinear(layer).dequantize(to)
    # Bit for bit: (q - 8) * scale has 12 bits and is exact, so that float32 rounds once, and bfloat16 once more.
    assert torch.equal(found, layer.dequantize().to(to))


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these are vectors of x86")
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx512f -mno-avx2"])
def test_narrower_vectors(flags: str, tmp_path: Path) -> None:
    """The tests of this file with native.c as compiled for CPUs without AVX-512 and without AVX2."""
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CC") or "cc"} "$@" {flags}\n')
    compiler.chmod(0o755)
    which = "products or integers or over_a_cache or dequantize or (any_positions and compile)"
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", which, __file__],
        env=os.environ | {"CC": str(compiler), "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout
    assert " passed" in ended.stdout and "skipped" not in ended.stdout
    assert len(list((tmp_path / "llama-runner").glob("native-*.so"))) == 1  # compiled by this compiler


# Compiling ----------------------------------------------------------------------------------------


def test_compiled_once_and_kept(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    before = os.umask(0o002)  # a linker's file would be writable by the group
    try:
        for form, message in (
            ("auto", "llama: decode step compiled in "),
            ("auto", "llama: 0.2M parameters, "),
            (True, "llama: decode step compiled earlier, loaded from "),
        ):
            assert build("mha", max_seq_len=16, max_batch_size=1, compile=form).executor.is_compiled
            assert capfd.readouterr().err.startswith(message)
    finally:
        os.umask(before)
    (kept,) = (tmp_path / "llama-runner").glob("native-*.so")
    assert os.name != "posix" or kept.stat().st_mode & 0o777 == 0o700
    assert kept.name.startswith("native-") and kept.suffix == ".so"
    native.library.cache_clear()


@pytest.mark.skipif(os.name != "posix", reason="owners and rights as POSIX has them")
def test_code_is_taken_from_a_folder_that_is_ours_alone(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled: list[Path] = []

    def compile(_: str, path: Path) -> None:
        compiled.append(path)
        path.unlink(missing_ok=True)
        path.touch(0o700)

    monkeypatch.setattr(native, "_compile", compile)
    assert native.compile_library() and not native.compile_library()
    library = compiled.pop()
    folder = library.parent
    assert folder == tmp_path / "llama-runner" and folder.stat().st_mode & 0o777 == 0o700
    for rights in (0o720, 0o702):
        library.chmod(rights)
        assert native.compile_library() and compiled.pop() == library  # compiled again
        library.chmod(0o700)
        folder.chmod(rights)
        with pytest.raises(native.NoCompilerError, match=r"llama-runner can be written by others"):
            native.compile_library()
        folder.chmod(0o700)
    assert not native.compile_library()
    moved = library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(moved)
    assert native.compile_library() and compiled.pop() == library
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(native.NoCompilerError, match="can be written by others"):
        native.compile_library()
    assert not compiled
    build("mha", max_seq_len=16, max_batch_size=1, compile=True)  # runs uncompiled
    line = capfd.readouterr().err.splitlines()[0]
    assert "can be written by others" in line and "the decode step runs uncompiled" in line


@pytest.mark.parametrize(
    ("compiler", "folder", "message"),
    [
        ("not-there", "", "no C compiler found (not-there)"),
        ("false", "", "cannot compile"),
        ("cc", "/proc/nothing", "set XDG_CACHE_HOME"),
    ],
)
def test_without_a_compiler(
    compiler: str,
    folder: str,
    message: str,
    build: Callable[..., Llama],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    expected = build("mha", max_seq_len=16, max_batch_size=1).generate([[5, 6]], 8, temperature=0)
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", folder or str(tmp_path))
    capfd.readouterr()
    llama = build("mha", max_seq_len=16, max_batch_size=1)
    line = capfd.readouterr().err.splitlines()[0]
    assert message in line and "the decode step runs uncompiled, which is slower (--no-compile" in line
    assert not llama.executor.is_compiled and llama.generate([[5, 6]], 8, temperature=0) == expected
    capfd.readouterr()
    build("mha", max_seq_len=16, max_batch_size=1, compile=False)
    assert "compile" not in capfd.readouterr().err


@pytest.mark.parametrize("form", [{}, {"plain": True}, {"compile": False}, {"quantize": "int4"}])
def test_a_closed_model_is_freed(form: dict[str, Any], build: Callable[..., Llama]) -> None:
    llama = build("gqa", max_seq_len=16, max_batch_size=1, **form)
    llama.generate([[5, 6]], 4, temperature=0)
    held = weakref.ref(llama.model)
    gc.disable()
    llama.close()
    gc.enable()
    assert held() is None


def test_float16_is_not_compiled(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    llama = build("mha", max_seq_len=16, max_batch_size=1, dtype="float16", compile=True)
    assert "float16 is not compiled on CPUs" in capfd.readouterr().err and not llama.executor.is_compiled
    monkeypatch.setenv("CC", "not-there")
    assert not build("mha", max_seq_len=16, max_batch_size=1, dtype="float16").executor.is_compiled
    assert "compile" not in capfd.readouterr().err  # the missing compiler changes nothing


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_compile_takes_three_values(value: Any, build: Callable[..., Llama]) -> None:
    with pytest.raises(ValueError, match=f"compile is {value!r}, expected True, False or 'auto'"):
        build("mha", compile=value)


@pytest.fixture
def graph(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Llama, Any]]:
    """A model with the decode step of --compile on CUDA, traced by torch.compile but run by eager kernels."""
    import torch._dynamo.testing  # takes seconds, in every process that collects this file

    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **options: compiler(step, backend=counter, **options))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")  # or it would be set for the tests that follow
    torch._dynamo.reset()
    replace_captures(monkeypatch, strict=False)
    llama = build("gqa", max_seq_len=64, max_batch_size=4)
    llama.scheduler.executor = executor.Executor(llama.model, decoder="compiled")
    yield llama, counter
    torch._dynamo.reset()


def test_steps_are_compiled_once_per_bucket_of_rows(
    graph: tuple[Llama, Any], build: Callable[..., Llama], capfd: pytest.CaptureFixture[str]
) -> None:
    llama, counter = graph
    plain = build("gqa", max_seq_len=64, max_batch_size=4, plain=True)
    prompts = [ids(1, n, seed=n)[0].tolist() for n in (3, 20, 9, 5)]
    for rows, compiled in ((1, 1), (1, 1), (3, 2), (4, 2), (1, 2)):
        found = llama.generate(prompts[:rows], 30, temperature=0)
        assert found == plain.generate(prompts[:rows], 30, temperature=0)
        assert counter.frame_count == compiled, f"{rows} rows"
    assert capfd.readouterr().err.count("compiled in") == 2


def test_other_cache_rows_are_not_compiled(graph: tuple[Llama, Any]) -> None:
    """Steps are compiled for the first rows of the cache."""
    llama, counter = graph
    texts, found = ids(2, 9), []
    for slots in (None, [0, 1], [3, 1]):
        llama.executor.hidden(texts[:, :-1], 0, 8, slots)
        found.append(llama.executor.hidden(texts[:, -1:], 8, 9, slots))
        assert counter.frame_count == 1
        torch.testing.assert_close(found[-1], found[0], rtol=0, atol=near(llama, found[0]))


# Options ------------------------------------------------------------------------------------------


def test_plain_runs_the_modules_and_excludes_other_options(build: Callable[..., Llama]) -> None:
    llama = build("gqa", max_seq_len=32, max_batch_size=2, plain=True)
    layer = llama.model.layers[0]
    forward: Any = type(layer).forward
    calls = 0

    def counted(self: nn.Module, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward(self, *args)

    type(layer).forward = counted
    try:
        llama.generate([[5, 6]], 1, temperature=0)
    finally:
        type(layer).forward = forward
    assert calls == len(llama.model.layers)
    for other in ({"quantize": "int8"}, {"compile": True}):
        with pytest.raises(ValueError, match="plain excludes quantize and compile"):
            build("gqa", plain=True, **other)
    with pytest.raises(ValueError, match="quantize 'int3': expected int8, int4 or fp8"):
        build("gqa", quantize="int3")


# Prefill in parts ---------------------------------------------------------------------------------


def logits(llama: Llama, tokens: torch.Tensor) -> torch.Tensor:
    return llama.executor.logits(llama.executor.hidden(tokens, 0, tokens.shape[1]))


@pytest.mark.parametrize("form", [{}, {"compile": False}, {"plain": True}], ids=str)
def test_a_prefill_in_parts(form: dict[str, Any], build: Callable[..., Llama]) -> None:
    llama = build("gqa", max_seq_len=128, max_batch_size=3, **form)
    prompts = [ids(1, n, seed=n)[0].tolist() for n in (3, 100, 65)]
    whole = logits(llama, ids(2, 100))
    expected, scores = llama.generate(prompts, 16, temperature=0, logprobs=True, echo=True)
    for part in (1, 7, 64, 1024):
        llama = build("gqa", max_seq_len=128, max_batch_size=3, prefill_chunk=part, **form)
        torch.testing.assert_close(logits(llama, ids(2, 100)), whole, rtol=0, atol=near(llama, whole))
        found, logprobs = llama.generate(prompts, 16, temperature=0, logprobs=True, echo=True)
        assert found == expected
        for ours, theirs in zip(logprobs or [], scores or [], strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=LOGPROB)


def test_the_mask_for_cuda_is_that_for_cpus() -> None:
    """torch's causal_lower_right, as SDPA reads it, is the mask that CPUs get."""
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 12, 8)
    masks = [fused.causal_mask(5, 12, torch.device(device)) for device in ("cuda", "cpu")]
    found, expected = (F.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True) for mask in masks)
    assert torch.equal(found, expected) and fused.causal_mask(5, 12, torch.device("cpu"))[0].sum() == 8


def test_import_is_light() -> None:
    """What `import llama` adds to `import torch`: no compiler, no plots, no other frameworks."""
    heavy = "matplotlib, transformers, lm_eval, torch._dynamo, torch._inductor, tokenizers, gguf"
    code = f"import sys, llama; print([m for m in {heavy.split(', ')} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
