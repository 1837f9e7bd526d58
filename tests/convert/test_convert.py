"""What all conversions have in common: one model in every format, destinations, disk, memory, and bad sources."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from golden.make_checkpoint import MODELS as SEEDED
from golden.make_checkpoint import TOKENIZER
from helpers.formats import FORMATS, meta_weights
from helpers.rss import anonymous_bytes
from llama import Llama, Tokenizer
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.layout import tensor_shapes
from llama.convert import ConvertError, convert, meta
from llama.params import ModelArgs


@pytest.mark.parametrize(
    ("name", "kind"),
    # llama2.c's files have no norm_eps and rope_theta. Of the seeded models, only mha has llama2.c's values.
    [(name, kind) for name in SEEDED for kind in FORMATS if kind != "llama2c" or name == "mha"],
)
def test_every_format_gives_the_same_model(
    checkpoint: Callable[..., Path],
    in_format: Callable[[str, str], Path],
    golden: dict[str, Any],
    tmp_path: Path,
    name: str,
    kind: str,
) -> None:
    """The weights bit for bit, and the ids and log-probabilities that Meta's code computed from the original."""
    convert(in_format(name, kind), tmp_path / "out")
    found, original = meta_weights(tmp_path / "out"), meta_weights(checkpoint(name))
    assert list(found) == list(Checkpoint(tmp_path / "out").shapes)
    assert found.keys() == original.keys() and all(torch.equal(found[key], original[key]) for key in original)
    llama = Llama.build(tmp_path / "out", max_seq_len=64, max_batch_size=3, device="cpu")
    asked = golden[name]["ragged"]
    tokens, logprobs = llama.generate(asked["prompt_tokens"], asked["max_gen_len"], temperature=0, logprobs=True)
    text = "Permission is hereby granted, free of charge  \n\té\U0001f600"
    assert llama.tokenizer.encode(text, bos=True, eos=False) == Tokenizer(TOKENIZER).encode(text, bos=True, eos=False)
    llama.close()
    assert tokens == asked["tokens"]
    for ours, theirs in zip(logprobs or [], asked["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shards_and_dtype_change_nothing_else(checkpoint: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    """1 -> 4 -> 2 -> 1 shards, with both axes of the embedding: every weight is rounded once and keeps its place."""
    for name in ("mha", "llama31"):
        original = meta_weights(checkpoint(name))
        convert(checkpoint(name), tmp_path / f"{name}4", dtype, 4)
        convert(tmp_path / f"{name}4", tmp_path / f"{name}2", shards=2)
        convert(tmp_path / f"{name}2", tmp_path / f"{name}1")
        four = Checkpoint(tmp_path / f"{name}4")
        assert len(four.paths) == 4 and four.embedding_axis == Checkpoint(checkpoint(name, 4)).embedding_axis
        for key, found in meta_weights(tmp_path / f"{name}1").items():
            assert torch.equal(found, original[key].to(getattr(torch, dtype))), key


def test_files_are_those_of_torch_save(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Readable with and without mmap, weights only, aligned, with correct CRCs, each tensor with its own storage."""
    convert(checkpoint("gqa"), tmp_path / "out", shards=2)
    for path in sorted((tmp_path / "out").glob("*.pth")):
        mapped, read = (torch.load(path, weights_only=True, mmap=mmap) for mmap in (True, False))
        for key, tensor in mapped.items():
            assert torch.equal(tensor, read[key]) and tensor.is_contiguous()
            assert tensor.data_ptr() % 64 == 0
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
        with zipfile.ZipFile(path) as file:
            assert file.testzip() is None
            assert {name.split("/")[0] for name in file.namelist()} == {path.stem}


def test_checklists_are_binding_for_weights_only(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A params.json that was edited after it was listed is converted; a shard that does not match its list is not."""
    convert(checkpoint("mha"), tmp_path / "in", shards=2)
    params = json.loads((tmp_path / "in" / "params.json").read_text())
    (tmp_path / "in" / "params.json").write_text(json.dumps(params | {"norm_eps": 2e-5}))
    (tmp_path / "in" / "tokenizer.model").unlink()  # listed too
    convert(tmp_path / "in", tmp_path / "out")
    shutil.copy(tmp_path / "in" / "consolidated.00.pth", tmp_path / "in" / "consolidated.01.pth")
    with pytest.raises(ConvertError, match=r"consolidated.01.pth holds what .* lists as consolidated.00.pth"):
        convert(tmp_path / "in", tmp_path / "again")


# Destinations -------------------------------------------------------------------------------------


def test_force_replaces_a_model(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", shards=2)
    with pytest.raises(ConvertError, match="exists and is left unchanged: name another folder, or give --force"):
        convert(source, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.pth"))) == 2
    convert(source, tmp_path / "out", force=True)
    assert len(list((tmp_path / "out").glob("*.pth"))) == 1
    convert(source, tmp_path / "out", to="hf", force=True)
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / "params.json").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_force_replaces_nothing_else(source: Path, tmp_path: Path) -> None:
    for name, files in (("home", ["letter"]), ("project", ["config.json", "main.c"]), ("nest", ["params.json", "x/y"])):
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("{}")
        with pytest.raises(
            ConvertError, match="which is not part of a converted model, so --force does not replace it"
        ):
            convert(source, tmp_path / name, force=True)
        assert all((tmp_path / name / file).exists() for file in files)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConvertError, match="is not a folder, so --force does not replace it"):
        convert(source, tmp_path / "file", force=True)


def test_force_does_not_replace_the_source(source: Path, tmp_path: Path) -> None:
    """The source itself, one of its parents, or a folder that its links point into."""
    shutil.copytree(source, tmp_path / "models" / "mine")
    (tmp_path / "links").mkdir()
    for path in (tmp_path / "models" / "mine").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    before = sorted(tmp_path.rglob("*"))
    for src, dst in (("models/mine", "models/mine"), ("models/mine", "models"), ("links", "models/mine")):
        with pytest.raises(ConvertError, match="which would be lost"):
            convert(tmp_path / src, tmp_path / dst, force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_current_folder_can_be_replaced(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(source, tmp_path / "out", shards=2)
    monkeypatch.chdir(tmp_path / "out")
    convert(source, ".", force=True)
    assert os.listdir(tmp_path) == ["out"] and len(list((tmp_path / "out").glob("*.pth"))) == 1


def test_neighbours_are_left_alone(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders with names like our temporary ones are kept; the source may be one."""
    shutil.copytree(source, tmp_path / "out.partial")
    (tmp_path / "out.partial-x").mkdir()
    convert(tmp_path / "out.partial", tmp_path / "out")
    convert(tmp_path / "out.partial", tmp_path / "out", force=True)
    assert sorted(os.listdir(tmp_path)) == ["out", "out.partial", "out.partial-x"]
    assert "out.partial-x is from a conversion that was killed or still runs" in capsys.readouterr().err


def test_two_conversions_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion that finishes second finds the folder and leaves it unchanged."""
    write = meta.write

    def convert_first(*arguments: Any) -> None:
        monkeypatch.setattr(meta, "write", write)
        convert(source, tmp_path / "out", shards=2)
        write(*arguments)

    monkeypatch.setattr(meta, "write", convert_first)
    with pytest.raises(ConvertError, match="exists and is left unchanged"):
        convert(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and len(list((tmp_path / "out").glob("*.pth"))) == 2


def test_a_failure_keeps_the_old_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llama.convert.meta.TorchFile.close", full)
    with pytest.raises(ConvertError, match=r"cannot be written \(No space left on device\)"):
        convert(source, tmp_path / "out", force=True)
    assert os.listdir(tmp_path) == ["out"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_free_disk_is_checked_first(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(weight.nbytes for weight in meta_weights(source).values())
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed // 2))
    with pytest.raises(ConvertError, match=r"needs 0.0 GB, .* has 0.0 GB free: free some space"):
        convert(source, tmp_path / "new" / "out")
    assert not os.listdir(tmp_path)
    # Half the bytes, and what the tokenizer takes.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed // 2 + 10_000))
    convert(source, tmp_path / "new" / "out", dtype="bfloat16")


def test_numbers_that_do_not_fit_are_refused(source: Path, tmp_path: Path) -> None:
    weights = meta_weights(source)
    shutil.copytree(source, tmp_path / "in")
    for value, dtype, part in (
        (70000.0, "float16", "beyond float16's range: use --dtype bfloat16"),
        (float("-inf"), "auto", "holds NaN"),
        (float("inf"), "auto", "holds NaN"),
        (float("nan"), "bfloat16", "holds NaN"),
    ):
        weights["layers.1.feed_forward.w2.weight"][3, 5] = value
        torch.save(weights, tmp_path / "in" / "consolidated.00.pth")
        with pytest.raises(ConvertError, match=f"layers.1.feed_forward.w2.weight .*{part}"):
            convert(tmp_path / "in", tmp_path / "out", dtype)
        assert not (tmp_path / "out").exists()


def test_a_killed_conversion_leaves_no_folder(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """kill -9 in the middle leaves only the unfinished .partial folder, which the next run does not need."""
    stop = "import llama.convert.meta as m, os; m.md5 = lambda path: os.kill(os.getpid(), 9)\n"
    call = f"from llama.convert import convert; convert({str(checkpoint('mha'))!r}, {str(tmp_path / 'out')!r})"
    done = subprocess.run([sys.executable, "-c", stop + call], capture_output=True)
    assert done.returncode == -9 and [name.partition("-")[0] for name in os.listdir(tmp_path)] == ["out.partial"]
    convert(checkpoint("mha"), tmp_path / "out")
    assert (tmp_path / "out" / "params.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("to", ["meta", "hf"])
def test_memory_is_a_few_tensors(tmp_path: Path, to: str, measured: Callable[[str, object], None]) -> None:
    """Peak memory of reading and writing a model of 240 MB in 60 layers whose tensors have 1 MB each."""
    torch.manual_seed(1)
    params: dict[str, Any] = {
        "dim": 512,
        "n_layers": 60,
        "n_heads": 8,
        "vocab_size": 512,
        "hidden_dim": 512,
        "norm_eps": 1e-5,
    }
    shapes = tensor_shapes(ModelArgs(**params))
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    total, largest = sum(w.nbytes for w in weights.values()), max(w.nbytes for w in weights.values())
    (tmp_path / "in").mkdir()
    torch.save(weights, tmp_path / "in" / "consolidated.00.pth")
    (tmp_path / "in" / "params.json").write_text(json.dumps(params))
    del weights
    convert(tmp_path / "in", tmp_path / "warm", to=to)  # imports what it needs
    peak, running = anonymous_bytes(), True
    start = peak

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, anonymous_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    convert(tmp_path / "warm", tmp_path / "out", "bfloat16", 2 if to == "meta" else 3, to=to)
    running = False
    thread.join()
    measured(f"memory of a conversion to {to}, in largest tensors", (peak - start) / largest)
    assert total > 200 * largest
    assert peak - start < 4 * largest


def test_a_recorded_chat_format_is_kept(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "in")
    recorded = {"chat_format": "zephyr", "default_system": "Be kind."}
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(recorded))
    convert(tmp_path / "in", tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "back")
    for name in ("meta", "back"):
        tokenizer = Tokenizer(tmp_path / name / "tokenizer.model")
        assert (tokenizer.chat_format, tokenizer.default_system) == ("zephyr", "Be kind.")


def test_a_tied_model_is_divided_by_rows(source: Path, tmp_path: Path) -> None:
    """Then every rank needs the same rows of the output and of the embedding, and holds them once."""
    weights = meta_weights(source)
    del weights["output.weight"]
    shutil.copytree(source, tmp_path / "in")
    torch.save(weights, tmp_path / "in" / "consolidated.00.pth")
    convert(tmp_path / "in", tmp_path / "out", shards=2)
    assert Checkpoint(tmp_path / "out").embedding_axis == 0


def test_a_full_disk_leaves_one_line(source: Path, tmp_path: Path) -> None:
    """Writes beyond 100 kB fail: one line, without a traceback from a zip file's destructor."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    call = "import sys; from llama.cli.main import main; main()"
    command = [sys.executable, "-c", limit + call, "convert", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not os.listdir(tmp_path)
    assert done.stderr.startswith("error: ") and "cannot be written (File too large)" in done.stderr
    assert len(done.stderr.splitlines()) == 1
