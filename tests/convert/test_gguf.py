"""GGUF to Meta folders: exact weights, the right axes, params.json, and errors for unsupported files."""

import hashlib
import json
import random
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import formats
from helpers.tiny_gguf import AXES, DIM, HIDDEN, LAYERS, TOKENS, TYPES, VOCAB, Q, write_gguf
from llama.checkpoint.folder import Checkpoint
from llama.convert import ConvertError, convert, meta
from llama.convert.params import feed_forward_params
from llama.params import ModelArgs

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")


def load(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("consolidated.*.pth"))]


# Weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_the_dequantized_ones(tmp_path: Path, kind: str, tied: bool, dtype: str) -> None:
    expected = write_gguf(tmp_path / "m.gguf", kind=kind, tied=tied)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of memory it may not write to
        convert(tmp_path / "m.gguf", tmp_path / "out", dtype)
    (weights,) = load(tmp_path / "out")
    if tied:
        del expected["output.weight"]
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_concatenate_to_the_full_tensor(tmp_path: Path, dtype: str) -> None:
    expected = write_gguf(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out", dtype, shards=2)
    shards = load(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.pth")) == ["consolidated.00.pth", "consolidated.01.pth"]
    for name, full in expected.items():
        parts, axis = [shard[name] for shard in shards], AXES[name]
        for part in parts:
            assert part.is_contiguous()
            assert part.untyped_storage().nbytes() == part.numel() * part.element_size(), f"{name}: a view was saved"
        full = full.to(parts[0].dtype)
        if axis is None:
            assert all(torch.equal(part, full) for part in parts), name
        else:
            assert torch.equal(torch.cat(parts, dim=axis), full), name
    checkpoint = Checkpoint(tmp_path / "out")  # the runner's own checks, of both files
    assert checkpoint.embedding_axis == 1
    assert checkpoint[1].keys() == expected.keys()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16)],
)
def test_auto_keeps_what_is_stored(tmp_path: Path, kind: str, expected: torch.dtype) -> None:
    weights = write_gguf(tmp_path / "m.gguf", kind=kind)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    (found,) = load(tmp_path / "out")
    for name, tensor in found.items():
        kept = torch.float32 if tensor.dim() == 1 else expected  # llama.cpp stores all norms in float32
        assert tensor.dtype == kept and torch.equal(tensor, weights[name].to(kept)), name


def test_params(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "params.json").read_text()) == {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": VOCAB,
        "multiple_of": 256,
        "norm_eps": 1e-05,  # 9.999999747378752e-06 in the file
        "rope_theta": 100000.0,
    }
    assert Checkpoint(tmp_path / "out").params.hidden_dim == HIDDEN


@pytest.mark.parametrize(
    "changes",
    [
        {"llama.rope.dimension_count": None, "llama.vocab_size": None},
        {"llama.attention.key_length": 16, "llama.attention.value_length": 16},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0},
        {"llama.expert_count": 0},
    ],
)
def test_harmless_keys_convert(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_gguf(tmp_path / "m.gguf", changes)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    assert Checkpoint(tmp_path / "out").params.rope_theta == 100000.0


def test_defaults_of_absent_keys(tmp_path: Path) -> None:
    """The default of KV heads is the number of heads, so wk and wv are as wide as wq; that of freq_base is 10000."""
    wide: dict[str, tuple[int, ...]] = {f"blk.{i}.attn_{x}.weight": (Q, DIM) for i in range(LAYERS) for x in "kv"}
    absent = {"llama.attention.head_count_kv": None, "llama.rope.freq_base": None}
    write_gguf(tmp_path / "m.gguf", absent, extra=wide)
    convert(tmp_path / "m.gguf", tmp_path / "out", shards=4)
    params = Checkpoint(tmp_path / "out").params
    assert (params.n_kv_heads, params.rope_theta) == (4, 10000.0)


@pytest.mark.parametrize(
    "dim, width, expected",
    [
        (576, 1536, {"multiple_of": 256}),  # the demo model
        (4096, 11008, {"multiple_of": 256}),  # Llama 2 7B
        (2048, 8192, {"multiple_of": 4096}),  # Llama 3.2 1B: the first power of two over 256 that does
        (64, 176, {"multiple_of": 16}),
        (4096, 14336, {"multiple_of": 256, "ffn_dim_multiplier": 1.3}),  # Llama 3 8B
        (64, 171, {"hidden_dim": 171}),
        (64, 201, {"hidden_dim": 201}),
        (4096, 8192, {"multiple_of": 1024, "ffn_dim_multiplier": 0.7}),  # narrower than 8/3 * dim
    ],
)
def test_feed_forward_params(dim: int, width: int, expected: dict[str, Any]) -> None:
    found = feed_forward_params(dim, width)
    assert ModelArgs(dim=dim, **found).hidden_dim == width  # type: ignore[arg-type]  # ints and a float
    assert found == expected


def test_feed_forward_params_reach_every_width() -> None:
    rng = random.Random(3)
    for _ in range(300):
        dim, width = rng.randrange(2, 9000, 2), rng.randrange(1, 40000)
        assert ModelArgs(dim=dim, **feed_forward_params(dim, width)).hidden_dim == width  # type: ignore[arg-type]  # the same


# Folder -------------------------------------------------------------------------------------------


def test_checklist(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out", shards=2)
    folder = tmp_path / "out"
    lines = [line.split("  ") for line in (folder / "checklist.chk").read_text().splitlines()]
    assert {name for _, name in lines} == {p.name for p in folder.iterdir()} - {"checklist.chk"}
    assert len(lines) == 5  # two shards, params.json, tokenizer.json, tokenizer_config.json
    for digest, name in lines:
        assert hashlib.md5((folder / name).read_bytes()).hexdigest() == digest
    if shutil.which("md5sum"):
        subprocess.run(["md5sum", "--check", "--strict", "checklist.chk"], cwd=folder, check=True, capture_output=True)


def test_logs_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "m.gguf")
    convert(str(tmp_path / "m.gguf"), str(tmp_path / "new" / "out"), shards=2)
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "21 tensors as float32 in 2 files" in err
    assert not (tmp_path / "new" / "out.partial").exists()


@pytest.mark.parametrize(
    "failure, raised",
    [
        (OSError(28, "No space left on device"), ConvertError),
        (RuntimeError("a fault of the program"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, raised: type[BaseException]
) -> None:
    write_gguf(tmp_path / "m.gguf")

    original = meta.TorchFile.add

    def add(self: meta.TorchFile, name: str, tensor: torch.Tensor) -> None:
        original(self, name, tensor)
        if name == "layers.1.ffn_norm.weight":
            raise failure

    monkeypatch.setattr(meta.TorchFile, "add", add)
    with pytest.raises(raised) as error:
        convert(tmp_path / "m.gguf", tmp_path / "out")
    if raised is ConvertError:
        assert "cannot be written" in one_line(error)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


# Errors -------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def refused(src: Path, dst: Path, part: str, **settings: Any) -> None:
    """The conversion fails with `part` in its message of one line, and leaves no folder."""
    before = sorted(dst.parent.iterdir()) if dst.parent.is_dir() else None
    with pytest.raises(ConvertError) as error:
        convert(src, dst, **settings)
    assert part in one_line(error)
    assert (sorted(dst.parent.iterdir()) if dst.parent.is_dir() else None) == before


def test_damaged_files(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    for size in (4, 8, 30, 5000, len(content) // 2, len(content) - 4):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        refused(tmp_path / "cut.gguf", tmp_path / "out", "cut.gguf: damaged, cut off")
    (tmp_path / "v9.gguf").write_bytes(content[:4] + struct.pack("<I", 9) + content[8:])
    refused(tmp_path / "v9.gguf", tmp_path / "out", "unknown GGUF version")


def test_existing_destination_is_kept(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        refused(tmp_path / "m.gguf", tmp_path / name, "exists and is left unchanged")
    assert (tmp_path / "file").read_text() == "mine"
    refused(tmp_path / "m.gguf", tmp_path / "file" / "out", "cannot be written")


def test_settings(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    for shards in (0, -1, 3, 4, 8, "two", None, True, 1.5):  # 4 heads, but 2 KV heads
        refused(tmp_path / "m.gguf", tmp_path / "out", "--shards can be 1, 2", shards=shards)
    refused(tmp_path / "m.gguf", tmp_path / "out", "dtype 'int8': expected auto, float32", dtype="int8")
    refused(tmp_path / "m.gguf", tmp_path / "out", "to 'gguf': expected meta or hf", to="gguf")


@pytest.mark.parametrize("package", ["gguf", "tokenizers"])
def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, package, None)
    refused(tmp_path / "m.gguf", tmp_path / "out", f"{package}: pip install 'llama-runner[convert]'")


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8"),
        ({"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window = 4096"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8"),
        ({"llama.attention.key_length": 32}, "llama.rope.dimension_count is 16: only 32"),
        ({"llama.attention.value_length": 32}, "llama.attention.value_length is 32"),
        ({"llama.attention.head_count": 5}, "64 is not a multiple of 5 heads"),
        ({"llama.attention.head_count_kv": 3}, "are inconsistent"),
        ({"llama.attention.head_count": [4, 4]}, "llama.attention.head_count is [4, 4]"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 1}, "layers.1.attention.wk.weight has shape (32, 64), but the model has no such tensor"),
        ({"llama.block_count": 3}, "layers.2.attention.wk.weight is missing"),
        ({"llama.feed_forward_length": 0}, "llama.feed_forward_length is 0"),
        ({"llama.block_count": 2**31}, "llama.block_count is 2147483648"),
        ({"llama.feed_forward_length": 512}, "w1.weight has shape (256, 64), expected (512, 64)"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.rope.freq_base": -1.0}, "llama.rope.freq_base is -1.0"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert' is not supported"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores is missing"),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre 'qwen2' is not supported"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre None"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.tokens": TOKENS[:-4]}, f"{VOCAB - 4} tokens and {VOCAB} token types"),
        ({"tokenizer.ggml.tokens": ["a", "a", *TOKENS[2:]]}, "holds 'a' twice"),
        ({"tokenizer.ggml.token_type": [6, *TYPES[1:]]}, "tokenizer.ggml.token_type 6"),
        ({"tokenizer.ggml.merges": ["t q"]}, "holds 't q', expected two tokens"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.eos_token_id": VOCAB}, f"eos_token_id is {VOCAB}"),
    ],
)
def test_metadata_errors(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    write_gguf(tmp_path / "m.gguf", changes)
    refused(tmp_path / "m.gguf", tmp_path / "out", part)


@pytest.mark.parametrize(
    "settings, part",
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'"),
        ({"extra": {"rope_freqs.weight": (8,)}}, "does not scale frequencies as Llama 3 does"),
        ({"extra": {"rope_freqs.weight": (7,)}}, "rope_freqs.weight has shape (7,), expected (8,)"),
        ({"extra": {"blk.0.attn_q.bias": (64,)}}, "tensor blk.0.attn_q.bias has no counterpart"),
        ({"extra": {"blk.0.attn_q.weight": (32, 64)}}, "layers.0.attention.wq.weight has shape (32, 64)"),
        ({"drop": "token_embd.weight"}, "token_embd.weight is missing"),
        ({"drop": "blk.1.ffn_up.weight"}, "layers.1.feed_forward.w3.weight is missing"),
        ({"kind": "I8"}, "is stored as I8"),
        ({"endianess": "BIG"}, "other byte order"),
    ],
)
def test_tensor_errors(tmp_path: Path, settings: dict[str, Any], part: str) -> None:
    write_gguf(tmp_path / "m.gguf", **settings)
    refused(tmp_path / "m.gguf", tmp_path / "out", part)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_read_from_its_divisors(
    checkpoint: Callable[..., Path], tmp_path: Path, factor: float
) -> None:
    formats.write_gguf(checkpoint("llama31"), tmp_path / "m.gguf", factor)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    params = json.loads((tmp_path / "out" / "params.json").read_text())
    assert params["use_scaled_rope"] is True and params["rope_scaling_factor"] == factor


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scaling.factor": 4.0}, 4.0),  # llama.cpp takes linear where no type is named
        ({"llama.rope.scale_linear": 2.5}, 2.5),  # the key of the first GGUF files
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.type": "linear"}, None),
        ({}, None),
    ],
)
def test_linear_scaling(tmp_path: Path, keys: dict[str, Any], expected: float | None) -> None:
    write_gguf(tmp_path / "m.gguf", keys)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    assert Checkpoint(tmp_path / "out").params.rope_linear_factor == expected


def test_heads_of_another_size(tmp_path: Path) -> None:
    """As in Mistral Nemo, n_heads * head_dim is not dim."""
    keys = {f"llama.{key}": 8 for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")}
    small: dict[str, tuple[int, ...]] = {}
    for i in range(LAYERS):
        small |= {f"blk.{i}.attn_{x}.weight": (n * 8, DIM) for x, n in (("q", 4), ("k", 2), ("v", 2))}
        small[f"blk.{i}.attn_output.weight"] = (DIM, 32)
    write_gguf(tmp_path / "m.gguf", keys, extra=small)
    convert(tmp_path / "m.gguf", tmp_path / "out", shards=2)
    assert Checkpoint(tmp_path / "out").params.head_dim == 8
