"""GGUF into Meta folders: exact weights, the right axes, the same token ids, and an error for all that will not do."""

import hashlib
import json
import random
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from golden.make_checkpoint import TOKENIZER
from helpers import formats
from helpers.paths import DEMO_GGUF, GOLDEN
from llama import Tokenizer
from llama.checkpoint.folder import Checkpoint
from llama.convert import ConvertError, convert, meta
from llama.convert.params import feed_forward_params
from llama.params import ModelArgs

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")


# A tiny model: 4 heads of 16, 2 KV heads, so 1 or 2 files.
DIM, LAYERS, HEADS, KV_HEADS, HIDDEN = 64, 2, 4, 2, 256
Q, KV = DIM, KV_HEADS * DIM // HEADS

# Byte-level BPE writes each byte as one printable character: itself, or one from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN_BYTES = [b for b in range(256) if b not in PRINTABLE]
BYTE_CHARS = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN_BYTES)}
SPACE = BYTE_CHARS[32]
# "1 2" is a merge that only single digits keep from happening, the two spaces one that only a cut before digits lets
# happen ahead of a digit.
MERGES = [
    (SPACE, "t"),
    ("h", "e"),
    (SPACE + "t", "he"),
    ("1", "2"),
    (SPACE, SPACE),
    ("Ã", "©"),
    (SPACE, "1"),
    ("l", "l"),
]
CONTROL_TOKENS, USER_TOKEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<tab>"
TOKENS = [*CONTROL_TOKENS, *BYTE_CHARS.values(), *(a + b for a, b in MERGES), USER_TOKEN, "[PAD0]"]
TOKENS += [f"[PAD{i}]" for i in range(1, 1 + -len(TOKENS) % 4)]
TYPES = [3 if t in CONTROL_TOKENS else 4 if t == USER_TOKEN else 5 if t.startswith("[PAD") else 1 for t in TOKENS]
VOCAB = len(TOKENS)

# GGUF's name, Meta's name, shape, and how Meta divides it over files.
LAYOUT: list[tuple[str, str, tuple[int, ...], int | None]] = [
    ("token_embd.weight", "tok_embeddings.weight", (VOCAB, DIM), 1),
    ("output_norm.weight", "norm.weight", (DIM,), None),
    ("output.weight", "output.weight", (VOCAB, DIM), 0),
]
for i in range(LAYERS):
    LAYOUT += [
        (f"blk.{i}.attn_q.weight", f"layers.{i}.attention.wq.weight", (Q, DIM), 0),
        (f"blk.{i}.attn_k.weight", f"layers.{i}.attention.wk.weight", (KV, DIM), 0),
        (f"blk.{i}.attn_v.weight", f"layers.{i}.attention.wv.weight", (KV, DIM), 0),
        (f"blk.{i}.attn_output.weight", f"layers.{i}.attention.wo.weight", (DIM, Q), 1),
        (f"blk.{i}.ffn_gate.weight", f"layers.{i}.feed_forward.w1.weight", (HIDDEN, DIM), 0),
        (f"blk.{i}.ffn_down.weight", f"layers.{i}.feed_forward.w2.weight", (DIM, HIDDEN), 1),
        (f"blk.{i}.ffn_up.weight", f"layers.{i}.feed_forward.w3.weight", (HIDDEN, DIM), 0),
        (f"blk.{i}.attn_norm.weight", f"layers.{i}.attention_norm.weight", (DIM,), None),
        (f"blk.{i}.ffn_norm.weight", f"layers.{i}.ffn_norm.weight", (DIM,), None),
    ]
AXES = {meta_name: axis for _, meta_name, _, axis in LAYOUT}

META: dict[str, Any] = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": DIM,
    "llama.feed_forward_length": HIDDEN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.freq_base": 100000.0,
    "llama.rope.dimension_count": DIM // HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": VOCAB,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": [f"{a} {b}" for a, b in MERGES],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def write_gguf(
    path: Path,
    meta: dict[str, Any] | None = None,
    kind: str = "F32",
    tied: bool = False,
    drop: str = "",
    extra: dict[str, tuple[int, ...]] | None = None,
    architecture: str = "llama",
    endianess: str = "LITTLE",
) -> dict[str, torch.Tensor]:
    """Write a tiny GGUF file; return its weights by Meta's names, as they should come out in float32.

    meta: changes to META, None removes a key. drop, extra: a tensor left out, further ones (also other shapes).
    """
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, architecture, endianess=gguf.GGUFEndian[endianess])
    types = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    for key, value in {**META, **(meta or {})}.items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType[types[type(value)]])
    shapes = {name: shape for name, _, shape, _ in LAYOUT if name != drop and not (tied and name == "output.weight")}
    expected = {}
    for name, shape in {**shapes, **(extra or {})}.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if kind == "F16" and len(shape) == 2:
            values = values.astype(np.float16)
            writer.add_tensor(name, values)
        elif kind == "BF16" and len(shape) == 2:
            bits = values.view(np.uint32) >> 16  # cut off: a bfloat16 is the upper half of a float32
            writer.add_tensor(name, bits.astype(np.uint16).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
            values = (bits << 16).view(np.float32)
        elif kind == "Q8_0" and len(shape) == 2:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            values = read_q8_0(packed.tobytes(), shape)
        elif kind == "I8" and len(shape) == 2:
            writer.add_tensor(name, values.astype(np.int8))
        else:
            writer.add_tensor(name, values)
        expected[name] = torch.tensor(values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if tied:
        expected["output.weight"] = expected["token_embd.weight"]
    return {meta_name: expected[name] for name, meta_name, _, _ in LAYOUT if name in expected}


def read_q8_0(packed: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Blocks of a float16 scale and 32 int8, without the package under test."""
    blocks = [struct.unpack("<e32b", packed[at : at + 34]) for at in range(0, len(packed), 34)]
    return np.array([[np.float32(scale) * np.float32(q) for q in qs] for scale, *qs in blocks]).reshape(shape)


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
def test_shards_concatenate_to_the_whole(tmp_path: Path, dtype: str) -> None:
    expected = write_gguf(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out", dtype, shards=2)
    shards = load(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.pth")) == ["consolidated.00.pth", "consolidated.01.pth"]
    for name, whole in expected.items():
        parts, axis = [shard[name] for shard in shards], AXES[name]
        for part in parts:
            assert part.is_contiguous()
            assert part.untyped_storage().nbytes() == part.numel() * part.element_size(), f"{name}: a view was saved"
        whole = whole.to(parts[0].dtype)
        if axis is None:
            assert all(torch.equal(part, whole) for part in parts), name
        else:
            assert torch.equal(torch.cat(parts, dim=axis), whole), name
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
    """Without KV heads there is one for each head, without a base it is 10000: wk and wv are as wide as wq."""
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


def test_says_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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

    whole = meta.TorchFile.add

    def add(self: meta.TorchFile, name: str, tensor: torch.Tensor) -> None:
        whole(self, name, tensor)
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
    """The conversion fails with `part` in its one line and leaves neither folder."""
    before = sorted(dst.parent.iterdir()) if dst.parent.is_dir() else None
    with pytest.raises(ConvertError) as error:
        convert(src, dst, **settings)
    assert part in one_line(error)
    assert (sorted(dst.parent.iterdir()) if dst.parent.is_dir() else None) == before


def test_damaged_files(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    for size in (4, 8, 30, 5000, len(whole) // 2, len(whole) - 4):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        refused(tmp_path / "cut.gguf", tmp_path / "out", "cut.gguf: damaged, cut off")
    (tmp_path / "v9.gguf").write_bytes(whole[:4] + struct.pack("<I", 9) + whole[8:])
    refused(tmp_path / "v9.gguf", tmp_path / "out", "unknown GGUF version")


def test_existing_destination_is_kept(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        refused(tmp_path / "m.gguf", tmp_path / name, "exists and is left as it is")
    assert (tmp_path / "file").read_text() == "mine"
    refused(tmp_path / "m.gguf", tmp_path / "file" / "out", "cannot be written")


def test_settings(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    for shards in (0, -1, 3, 4, 8, "two", None, True, 1.5):  # 4 heads, but 2 KV heads
        refused(tmp_path / "m.gguf", tmp_path / "out", "--shards takes 1, 2", shards=shards)
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
        ({"llama.attention.head_count": 5}, "64 is no multiple of 5 heads"),
        ({"llama.attention.head_count_kv": 3}, "do not go together"),
        ({"llama.attention.head_count": [4, 4]}, "llama.attention.head_count is [4, 4]"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 1}, "layers.1.attention.wk.weight has shape (32, 64), which this model has no place"),
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
        ({"tokenizer.ggml.merges": ["t q"]}, "holds 't q', not two tokens"),
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
        ({"extra": {"rope_freqs.weight": (8,)}}, "another scaling of frequencies than Llama 3's"),
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


# Tokenizer ----------------------------------------------------------------------------------------


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class ReferenceTokenizer:
    """Byte-level BPE written out: digits alone, GPT-2's pattern on the rest, merges by rank. No special tokens."""

    PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

    def __init__(self, tokens: list[str], merges: list[tuple[str, str]]):
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.regex = pytest.importorskip("regex")

    def encode(self, text: str) -> list[int]:
        pieces = self.regex.findall(r"\p{N}|\P{N}+", text)
        words = [word for piece in pieces for word in self.regex.findall(self.PATTERN, piece)]
        return [self.ids[part] for word in words for part in self.merged(word)]

    def merged(self, word: str) -> list[str]:
        parts = [BYTE_CHARS[b] for b in word.encode()]
        while pairs := [pair for pair in pairwise(parts) if pair in self.ranks]:
            best, at = min(pairs, key=self.ranks.__getitem__), 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = ["".join(best)]
                at += 1
        return parts


def random_texts(count: int, tokens: list[str]) -> list[str]:
    """Of letters, digits, spaces and any code point whose bytes the vocabulary has; the same ones each time."""
    rng = random.Random(5)
    missing = {b for b, char in BYTE_CHARS.items() if char not in tokens}

    def character() -> str:
        while True:
            code = rng.choice((rng.randrange(0x80), rng.randrange(0x800), rng.randrange(0x110000)))
            char = rng.choice((" ", " ", "\n", "1", "2", "t", "he", "'ll", "é", "²", chr(code)))
            if not 0xD800 <= code < 0xE000 and not missing & set(char.encode()):
                return char

    return ["".join(character() for _ in range(rng.randrange(40))) for _ in range(count)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_gguf(folder / "m.gguf", {"tokenizer.chat_template": "{{ messages }}"})
    convert(folder / "m.gguf", folder / "out")
    return folder / "out"


def test_tiny_tokenizer(tiny: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert [tokenizer.id_to_token(i) for i in range(VOCAB)] == TOKENS
    assert tokenizer.get_vocab_size() == VOCAB
    reference = ReferenceTokenizer(TOKENS, MERGES)
    for text in [*random_texts(400, TOKENS), "a  1 12 the   12", " 12", "the the12²"]:
        ids = tokenizer.encode(text).ids
        assert ids == reference.encode(text), repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_added_tokens(tiny: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    added = {t.content: (i, t.special, t.normalized) for i, t in tokenizer.get_added_tokens_decoder().items()}
    assert added == {
        "<|endoftext|>": (0, True, False),
        "<|im_start|>": (1, True, False),
        "<|im_end|>": (2, True, False),
        "<tab>": (TOKENS.index("<tab>"), False, False),
    }
    ids = tokenizer.encode("t<|im_end|><tab>[PAD0]").ids
    assert ids[:3] == [TOKENS.index("t"), 2, TOKENS.index("<tab>")]
    assert len(ids) == 3 + len("[PAD0]")  # unused tokens come from no text


def test_tokenizer_config(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    assert config == {
        "add_bos_token": False,  # llama.cpp's default for this pre-tokenizer
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": "{{ messages }}",
        "chat_format": None,  # nothing that is known
    }
    more = {"tokenizer.ggml.padding_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}
    write_gguf(tmp_path / "m.gguf", {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None, **more})
    convert(tmp_path / "m.gguf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {
        "add_bos_token": True,
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_format": None,
    }


@pytest.mark.parametrize("pre", ["llama-bpe", "gpt-2"])
def test_other_byte_level_vocabularies(tmp_path: Path, pre: str) -> None:
    """Llama 3's and GPT-2's way to cut texts, against tiktoken with the same ranks."""
    import tiktoken

    # "(t" goes together only where a word may begin with "(", and no merge leads to "zq".
    tokens = [{"ll": "(t", SPACE + "1": "zq"}.get(token, token) for token in TOKENS]
    merges = [pair for pair in MERGES if "".join(pair) in tokens] + [("(", "t")]
    meta = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges]}
    write_gguf(tmp_path / "m.gguf", {"tokenizer.ggml.pre": pre, **meta})
    convert(tmp_path / "m.gguf", tmp_path / "out")
    ours = Tokenizer(tmp_path / "out" / "tokenizer.json")
    assert ours.adds_bos == (pre == "llama-bpe")  # llama.cpp's default
    byte_of = {char: byte for byte, char in BYTE_CHARS.items()}
    first = len(CONTROL_TOKENS)  # the ids of the bytes begin behind them
    last = first + 256 + len(MERGES)
    ranks = {bytes(byte_of[char] for char in token): rank for rank, token in enumerate(tokens[first:last])}
    patterns = {"llama-bpe": LLAMA3_PATTERN, "gpt-2": ReferenceTokenizer.PATTERN}
    theirs = tiktoken.Encoding("theirs", pat_str=patterns[pre], mergeable_ranks=ranks, special_tokens={})
    for text in [*random_texts(500, TOKENS), "the 12 112 1122  1", "  t\n\n the'll LL'LL", "zq\nzq", "x(the (the"]:
        if pre == "gpt-2" and "zq" in text:
            continue  # tiktoken takes whole words without looking for merges, GPT-2 does not
        text = text.replace(USER_TOKEN, "")
        assert ours.encode(text, bos=False, eos=False) == [first + i for i in theirs.encode_ordinary(text)], text


def test_sentencepiece_vocabulary(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """tokenizer.model as it was before it became GGUF, on random texts; a base model, so no dialect."""
    formats.write_gguf(checkpoint("mha"), tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out")
    ours, theirs = Tokenizer(tmp_path / "out" / "tokenizer.model"), Tokenizer(TOKENIZER)
    assert (ours.n_words, ours.bos_id, ours.eos_id, ours.pad_id) == (512, 1, 2, -1)
    assert ours.encode("a", bos=False, eos=False) == theirs.encode("a", bos=False, eos=False)
    assert ours.chat_format is None and ours.adds_bos and ours.special_ids == theirs.special_ids
    for text in random_texts(500, TOKENS):
        ids = ours.encode(text, bos=True, eos=True)
        assert ids == theirs.encode(text, bos=True, eos=True)
        assert ours.decode(ids) == theirs.decode(ids)


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
    """Mistral Nemo's way: n_heads * head_dim is not the embedding's width."""
    keys = {f"llama.{key}": 8 for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")}
    small: dict[str, tuple[int, ...]] = {}
    for i in range(LAYERS):
        small |= {f"blk.{i}.attn_{x}.weight": (n * 8, DIM) for x, n in (("q", 4), ("k", 2), ("v", 2))}
        small[f"blk.{i}.attn_output.weight"] = (DIM, 32)
    write_gguf(tmp_path / "m.gguf", keys, extra=small)
    convert(tmp_path / "m.gguf", tmp_path / "out", shards=2)
    assert Checkpoint(tmp_path / "out").params.head_dim == 8


# The demo model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not DEMO_GGUF.exists():
        pytest.skip(f"{DEMO_GGUF.name} is not in checkpoints/: `make demo` fetches it")
    folder = tmp_path_factory.mktemp("demo") / "out"
    convert(DEMO_GGUF, folder, shards=3)
    return folder


@pytest.fixture(scope="module")
def demo_fields(demo: Path) -> dict[str, Any]:
    """What the file says, read by the test itself."""
    return {key: field.contents() for key, field in gguf.GGUFReader(DEMO_GGUF).fields.items()}


def test_demo_folder(demo: Path) -> None:
    assert json.loads((demo / "params.json").read_text()) == {
        "dim": 576,
        "n_layers": 30,
        "n_heads": 9,
        "n_kv_heads": 3,
        "vocab_size": 49152,
        "multiple_of": 256,
        "norm_eps": 1e-05,
        "rope_theta": 100000.0,
    }
    checkpoint = Checkpoint(demo)
    assert [len(checkpoint[i]) for i in range(3)] == [272, 272, 272]
    size = sum(t.numel() * t.element_size() for t in checkpoint[0].values())
    assert (demo / "consolidated.00.pth").stat().st_size < size * 1.01


def test_demo_config(demo: Path, demo_fields: dict[str, Any]) -> None:
    config = json.loads((demo / "tokenizer_config.json").read_text())
    template = config.pop("chat_template")
    assert template == demo_fields["tokenizer.chat_template"]
    assert config == {
        "add_bos_token": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_format": "chatml",
        "default_system": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    }


def test_demo_golden_ids(demo: Path) -> None:
    golden = json.loads((GOLDEN / "smollm2.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(demo / "tokenizer.json"))
    texts = [(case["prompt"], case["prompt_tokens"]) for case in golden["completions"]]
    texts += [(case["rendered"], case["prompt_tokens"]) for case in golden["chats"]]
    assert len(texts) > 3
    for text, ids in texts:
        assert tokenizer.encode(text).ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_demo_tokenizer_against_reference(demo: Path, demo_fields: dict[str, Any]) -> None:
    tokens = demo_fields["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in demo_fields["tokenizer.ggml.merges"])]
    reference = ReferenceTokenizer(tokens, merges)
    tokenizer = tokenizers.Tokenizer.from_file(str(demo / "tokenizer.json"))
    for text in [*random_texts(300, tokens), "x =   12 + 3.14\n\n  7", "It's 1999's\t\tbest; 10000  ²½ Ⅷ 一二三 ١٢"]:
        ids = tokenizer.encode(text).ids
        assert ids == reference.encode(text), repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_demo_tokenizer_against_transformers(demo: Path) -> None:
    """transformers reads the same GGUF file by its own code; it does not know smollm's digits, so texts have none."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(DEMO_GGUF.parent, gguf_file=DEMO_GGUF.name)
    ours = tokenizers.Tokenizer.from_file(str(demo / "tokenizer.json"))
    regex = pytest.importorskip("regex")
    tokens = [ours.id_to_token(i) for i in range(ours.get_vocab_size())]
    texts = [regex.sub(r"\p{N}", "", text) for text in random_texts(300, tokens)]
    for text in [*texts, "<|im_start|>user\nWho's there?<|im_end|>\n<|endoftext|>"]:
        assert ours.encode(text).ids == theirs.encode(text, add_special_tokens=False), repr(text)
