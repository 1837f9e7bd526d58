"""Files of llama2.c: the weights that they were written from, and the text that its programs print."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from golden.make_checkpoint import TOKENIZER
from helpers import paths
from helpers.formats import meta_weights
from llama import Llama, Tokenizer
from llama.convert import ConvertError, convert

GOLDEN = paths.GOLDEN / "llama2c"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
VERSIONS = ["mha_v0.bin", "mha_v1.bin", "mha_v2.bin"]


def converted(name: str, folder: Path) -> Path:
    convert(GOLDEN / name, folder / name)
    return folder / name


def test_weights_are_those_that_llama2c_exported(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    original = meta_weights(checkpoint("mha"))
    for name in VERSIONS:
        found = meta_weights(converted(name, tmp_path))
        assert found.keys() == original.keys()
        for key, weight in original.items():
            if name == "mha_v2.bin" and weight.dim() == 2:
                # 64 weights share a scale, their maximum / 127: rounding changes each by at most half a scale.
                groups = weight.reshape(-1, 64)
                step = groups.abs().amax(1, keepdim=True) / 127
                assert ((found[key].reshape(-1, 64) - groups).abs() <= 0.5001 * step).all()
                assert not torch.equal(found[key], weight)
            else:
                assert torch.equal(found[key], weight), f"{name}: {key}"


@pytest.mark.parametrize("name", VERSIONS)
def test_the_text_is_what_its_programs_print(tmp_path: Path, name: str) -> None:
    llama = Llama.build(converted(name, tmp_path), max_seq_len=64, max_batch_size=1, dtype="float32", device="cpu")
    tokenizer = llama.tokenizer
    ids = tokenizer.encode(EXPECTED["prompt"], bos=True, eos=False)
    # 40 tokens after BOS, prompt included; llama2.c's programs stop at id 1, not at EOS.
    tokens, _ = llama.generate([ids], EXPECTED["steps"] - (len(ids) - 1), temperature=0, stop_token_ids=[1])
    text = tokenizer.decode(ids + tokens[0])
    llama.close()
    # Its printer skips control bytes and invalid UTF-8.
    assert re.sub(r"[\x00-\x08\x0e-\x1f\x7f\ufffd]", "", text) == EXPECTED[name]


def test_params_and_tokenizer(tmp_path: Path) -> None:
    folder = converted("mha_v1.bin", tmp_path)
    assert json.loads((folder / "params.json").read_text()) == {
        "dim": 64,
        "n_layers": 3,
        "n_heads": 8,
        "n_kv_heads": 8,
        "vocab_size": 512,
        "multiple_of": 64,
        "norm_eps": 1e-05,
        "rope_theta": 10000.0,
    }
    ours, theirs = Tokenizer(folder / "tokenizer.model"), Tokenizer(TOKENIZER)
    for text in ("The licence", "a\nb\tc  d", "é\u2603\U0001f600", "", " ", "copyright notice and this permission"):
        assert ours.encode(text, bos=True, eos=True) == theirs.encode(text, bos=True, eos=True)
    assert ours.chat_format is None  # it is no chat model


def test_without_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(GOLDEN / "mha_v0.bin", tmp_path / "stories.bin")
    convert(tmp_path / "stories.bin", tmp_path / "out")
    assert "note: no tokenizer.bin or tok512.bin is next to" in capsys.readouterr().err
    shutil.copy(GOLDEN / "tok512.bin", tmp_path / "tokenizer.bin")
    convert(tmp_path / "stories.bin", tmp_path / "with")
    assert (tmp_path / "with" / "tokenizer.model").exists()


@pytest.mark.parametrize("version", [0, 1, 2])
def test_tied_weights(tmp_path: Path, version: int) -> None:
    """Marked by a positive vocabulary in version 0, by a flag in the others."""
    content = (GOLDEN / f"mha_v{version}.bin").read_bytes()
    if version == 0:
        header = list(struct.unpack_from("<7i", content))
        header[5] = abs(header[5])
        content = struct.pack("<7i", *header) + content[28 : -512 * 64 * 4]
    else:
        size = 512 * 64 * 4 if version == 1 else 512 * 64 + 512 * 64 // 64 * 4
        content = content[:36] + b"\1" + content[37:-size]
    (tmp_path / "tied.bin").write_bytes(content)
    convert(tmp_path / "tied.bin", tmp_path / "out")
    tied, untied = meta_weights(tmp_path / "out"), meta_weights(converted(f"mha_v{version}.bin", tmp_path))
    assert untied.keys() - tied.keys() == {"output.weight"}
    assert all(torch.equal(tied[key], untied[key]) for key in tied)


def header(**changes: int) -> bytes:
    fields = {"dim": 64, "hidden": 192, "layers": 3, "heads": 8, "kv_heads": 8, "vocab": 512, "context": 128} | changes
    return struct.pack("<4si7iB", b"24ka", fields.pop("version", 1), *fields.values(), 0).ljust(256, b"\0")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (header(), "256 bytes long, not"),
        (header(version=3), "version 3 of llama2.c's format is not supported"),
        (header(version=-1), "version -1 of"),
        (header(heads=5), "in its header are invalid"),
        (header(kv_heads=3), "in its header are invalid"),
        (header(layers=2**30), "in its header are invalid"),
        (header(dim=-64), "in its header are invalid"),
        (header()[:40], "cut off within the header"),
        (header(version=2), "in its header are invalid"),  # no group size
    ],
)
def test_invalid_headers(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "m.bin").write_bytes(content)
    with pytest.raises(ConvertError, match=re.escape(part)):
        convert(tmp_path / "m.bin", tmp_path / "out")


def test_groups_need_not_divide_rows(tmp_path: Path) -> None:
    """stories42M's feed-forward has 1376 columns and groups of 64: a group may cross the end of a row."""
    sizes = {"dim": 8, "hidden": 12, "layers": 1, "heads": 2, "kv_heads": 1, "vocab": 4, "context": 16}
    rng = np.random.default_rng(2)
    content = struct.pack("<4si7iBi", b"24ka", 2, *sizes.values(), 1, 32).ljust(256, b"\0")
    content += rng.standard_normal(24).astype(np.float32).tobytes()
    w1 = np.zeros(0)
    for name, numel in (
        ("tok", 32),
        ("wq", 64),
        ("wk", 32),
        ("wv", 32),
        ("wo", 64),
        ("w1", 96),
        ("w2", 96),
        ("w3", 96),
    ):
        numbers = rng.integers(-127, 128, numel).astype(np.int8)
        scales = rng.random(numel // 32).astype(np.float32)
        content += numbers.tobytes() + scales.tobytes()
        if name == "w1":
            w1 = np.concatenate([group * scale for group, scale in zip(numbers.reshape(-1, 32), scales, strict=True)])
    (tmp_path / "m.bin").write_bytes(content)
    convert(tmp_path / "m.bin", tmp_path / "out")
    found = meta_weights(tmp_path / "out")["layers.0.feed_forward.w1.weight"]
    assert torch.equal(found, torch.from_numpy(w1.astype(np.float32)).view(12, 8))


def test_sizes_that_look_like_a_pickle(tmp_path: Path) -> None:
    """A version 0 file begins with its dim: 640 is 80 02 00 00, and pickles begin with 80 02."""
    shapes = 2 * 640 + 640 + 4 * 640 + 4 * 640 * 640 + 3 * 640 * 2  # norms, embedding, attention, feed-forward
    sizes = struct.pack("<7i", 640, 2, 1, 1, 1, 4, 2)
    (tmp_path / "m.bin").write_bytes(sizes + np.ones(shapes + 2 * 2 * 320, np.float32).tobytes())
    convert(tmp_path / "m.bin", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "params.json").read_text())["dim"] == 640


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("size", [-1, -4, -4096, +4])
def test_sizes_that_do_not_fit_the_header(tmp_path: Path, name: str, size: int) -> None:
    content = (GOLDEN / name).read_bytes()
    (tmp_path / "m.bin").write_bytes(content[:size] if size < 0 else content + b"\0" * size)
    with pytest.raises(ConvertError, match=r"bytes long, not|is of unknown format"):
        convert(tmp_path / "m.bin", tmp_path / "out")
