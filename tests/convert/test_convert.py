"""What all conversions have in common: one model out of every format, destinations, disk, memory, and bad sources."""

import json
import os
import random
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
from safetensors.torch import load_file, save_file

from golden.make_checkpoint import MODELS as SEEDED
from golden.make_checkpoint import TOKENIZER
from helpers.faults import FOREIGN, LFS
from helpers.formats import meta_weights, write_gguf, write_llama2c
from helpers.paths import GOLDEN, LLAMA3
from helpers.rss import anonymous_bytes
from llama import Llama, Tokenizer
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.layout import tensor_shapes
from llama.convert import ConvertError, convert, meta
from llama.params import ModelArgs

FORMATS = ("meta", "meta-4-shards", "hf", "hf-3-files", "hf-bin", "gguf", "llama2c")


@pytest.fixture(scope="module")
def in_format(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """in_format(name, format): a seeded model in one of FORMATS, written once."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, kind: str) -> Path:
        if (name, kind) not in made:
            path = tmp_path_factory.mktemp(f"{name}-{kind}") / "model"
            whole = checkpoint(name)
            if kind.startswith("meta"):
                path = whole if kind == "meta" else checkpoint(name, 4 if name != "gqa" else 2)
            elif kind.startswith("hf"):
                convert(whole, path, to="hf", shards=3 if kind == "hf-3-files" else 1)
                if kind == "hf-bin":
                    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
                    (path / "model.safetensors").unlink()
            elif kind == "gguf":
                write_gguf(whole, path)
            else:
                write_llama2c(whole, path)
                shutil.copy(GOLDEN / "llama2c" / "tok512.bin", path.with_name("tok512.bin"))
            made[name, kind] = path
        return made[name, kind]

    return make


@pytest.mark.parametrize(
    ("name", "kind"),
    # llama2.c's files hold neither norm_eps nor rope_theta: only mha has the values that all of them have.
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
    """Bit for bit the weights it was written from, and the ids and log-probabilities that Meta's code answered."""
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
def test_shards_and_dtype_change_alone(checkpoint: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    """1 -> 4 -> 2 -> 1 shards, in each layout of the embedding: the numbers rounded once, each in its place."""
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
    """Readable with and without mmap, weights only, aligned, with right sums, each tensor with its own bytes alone."""
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


def test_sums_count_for_weights_only(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A params.json that was edited since, as many are, converts; a shard that is not the listed one does not."""
    convert(checkpoint("mha"), tmp_path / "in", shards=2)
    params = json.loads((tmp_path / "in" / "params.json").read_text())
    (tmp_path / "in" / "params.json").write_text(json.dumps(params | {"norm_eps": 2e-5}))
    (tmp_path / "in" / "tokenizer.model").unlink()  # listed too
    convert(tmp_path / "in", tmp_path / "out")
    shutil.copy(tmp_path / "in" / "consolidated.00.pth", tmp_path / "in" / "consolidated.01.pth")
    with pytest.raises(ConvertError, match=r"consolidated.01.pth holds what .* lists as consolidated.00.pth"):
        convert(tmp_path / "in", tmp_path / "again")


# Destinations -------------------------------------------------------------------------------------


@pytest.fixture
def source(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("code")


def test_force_replaces_a_model(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", shards=2)
    with pytest.raises(ConvertError, match="exists and is left as it is: name another folder, or give --force"):
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
        with pytest.raises(ConvertError, match="which is no part of a converted model, so --force does not replace it"):
            convert(source, tmp_path / name, force=True)
        assert all((tmp_path / name / file).exists() for file in files)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConvertError, match="is no folder, so --force does not replace it"):
        convert(source, tmp_path / "file", force=True)


def test_force_does_not_replace_the_source(source: Path, tmp_path: Path) -> None:
    """The source itself, a folder it lies in, or one that its links lead to."""
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
    """Whatever is called like a temporary folder stays; the source may be one."""
    shutil.copytree(source, tmp_path / "out.partial")
    (tmp_path / "out.partial-x").mkdir()
    convert(tmp_path / "out.partial", tmp_path / "out")
    convert(tmp_path / "out.partial", tmp_path / "out", force=True)
    assert sorted(os.listdir(tmp_path)) == ["out", "out.partial", "out.partial-x"]
    assert "out.partial-x is of a conversion that was killed, or still runs" in capsys.readouterr().err


def test_two_conversions_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that comes second to its end finds the folder there, and leaves it."""
    write = meta.write

    def meanwhile(*arguments: Any) -> None:
        monkeypatch.setattr(meta, "write", write)
        convert(source, tmp_path / "out", shards=2)
        write(*arguments)

    monkeypatch.setattr(meta, "write", meanwhile)
    with pytest.raises(ConvertError, match="exists and is left as it is"):
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
    with pytest.raises(ConvertError, match=r"needs 0.0 GB, .* has 0.0 GB free: make room"):
        convert(source, tmp_path / "new" / "out")
    assert not os.listdir(tmp_path)
    # Half the bytes, and what the tokenizer takes.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed // 2 + 10_000))
    convert(source, tmp_path / "new" / "out", dtype="bfloat16")


def test_numbers_that_do_not_fit_are_refused(source: Path, tmp_path: Path) -> None:
    weights = meta_weights(source)
    shutil.copytree(source, tmp_path / "in")
    for value, dtype, part in (
        (70000.0, "float16", "beyond float16's range: take --dtype bfloat16"),
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
    """kill -9 in the middle: only the unfinished .partial is there, and the next run does without it."""
    stop = "import llama.convert.meta as m, os; m.md5 = lambda path: os.kill(os.getpid(), 9)\n"
    call = f"from llama.convert import convert; convert({str(checkpoint('mha'))!r}, {str(tmp_path / 'out')!r})"
    done = subprocess.run([sys.executable, "-c", stop + call], capture_output=True)
    assert done.returncode == -9 and [name.partition("-")[0] for name in os.listdir(tmp_path)] == ["out.partial"]
    convert(checkpoint("mha"), tmp_path / "out")
    assert (tmp_path / "out" / "params.json").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("to", ["meta", "hf"])
def test_memory_is_a_few_tensors(tmp_path: Path, to: str, measured: Callable[[str, object], None]) -> None:
    """A model of 240 MB in 60 layers whose tensors have 1 MB each, read and written: the most it holds at once."""
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
    most, running = anonymous_bytes(), True
    start = most

    def watch() -> None:
        nonlocal most
        while running:
            most = max(most, anonymous_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    convert(tmp_path / "warm", tmp_path / "out", "bfloat16", 2 if to == "meta" else 3, to=to)
    running = False
    thread.join()
    measured(f"memory of a conversion to {to}, in largest tensors", (most - start) / largest)
    assert total > 200 * largest
    assert most - start < 4 * largest


# Sources that will not do --------------------------------------------------------------------------


def error_of(src: Path, dst: Path) -> str:
    with pytest.raises(ValueError) as error:
        convert(src, dst)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    assert type(error.value).__name__ in ("ConvertError", "CheckpointError", "TokenizerError")
    assert not dst.exists() and not dst.with_name(dst.name + ".partial").exists()
    return message


@pytest.mark.parametrize("fault", FOREIGN)
def test_what_is_no_model_says_what_it_is(tmp_path: Path, fault: str) -> None:
    files, part = FOREIGN[fault]
    (tmp_path / "in").mkdir()
    for name, text in files.items():
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    source = tmp_path / "in"
    if fault.startswith("file:"):
        source /= next(iter(files))
    assert part in error_of(source, tmp_path / "out")


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist: supported are" in error_of(tmp_path / "none", tmp_path / "out")


# Damage: what is done to the files of a sound model, for each format -------------------------------


def weight_files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    return sorted(p for p in folder.iterdir() if p.suffix in (".pth", ".safetensors") or p.name == "pytorch_model.bin")


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(1, path.stat().st_size))


def replace(text: str) -> Callable[[Path, random.Random], None]:
    def damage(path: Path, rng: random.Random) -> None:
        path.unlink()
        path.write_text(text)

    return damage


def make_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": truncate,
    "a pointer": replace(LFS),
    "a page": replace("<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"),
    "empty": replace(""),
    "a folder": make_folder,
    "unreadable text": replace("0" * 5000),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_weights_are_named(
    in_format: Callable[[str, str], Path], tmp_path: Path, kind: str, damage: str
) -> None:
    """Each weight file in turn, at a random place: one line that names it, and no folder."""
    whole = in_format("mha", kind)
    rng = random.Random(f"{kind}/{damage}")
    for path in weight_files(whole):
        copy = tmp_path / f"in-{path.name}"
        if whole.is_file():
            shutil.copy(whole, copy)
            victim = copy
        else:
            shutil.copytree(whole, copy)
            victim = copy / path.name
        DAMAGE[damage](victim, rng)
        assert victim.name in error_of(copy, tmp_path / "out")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_flipped_bit_never_moves_a_weight_unseen(
    checkpoint: Callable[..., Path], in_format: Callable[[str, str], Path], tmp_path: Path, kind: str
) -> None:
    """20 flips anywhere in each file: an error, or the same numbers; in formats without sums also one number changed,
    in its place, where the bit was one of its own."""
    original, rng = meta_weights(checkpoint("mha")), random.Random(kind)
    whole = in_format("mha", kind)
    refused = 0
    for i in range(20):
        copy = tmp_path / f"in-{i}"
        if whole.is_file():
            shutil.copy(whole, copy)
        else:
            shutil.copytree(whole, copy)
        path = rng.choice(weight_files(copy))
        content = bytearray(path.read_bytes())
        # Half of them at the ends, where headers and directories are.
        place = rng.randrange(len(content)) if i % 2 else rng.choice((rng.randrange(300), -rng.randrange(1, 3000)))
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            convert(copy, tmp_path / f"out-{i}")
        except ValueError as error:
            assert "\n" not in str(error) and not (tmp_path / f"out-{i}").exists()
            refused += 1
            continue
        found = meta_weights(tmp_path / f"out-{i}")
        assert found.keys() == original.keys()
        changed = sum(int((found[key].view(torch.int32) != original[key].view(torch.int32)).sum()) for key in original)
        assert changed <= (0 if kind.startswith("meta") or kind == "hf-bin" else 1)
    assert refused > 0


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=True)


def store(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    else:
        torch.save(tensors, path)


def _pick(tensors: dict[str, torch.Tensor], rng: random.Random) -> str:
    """A matrix of a layer: those are in every model."""
    return rng.choice([name for name, tensor in tensors.items() if tensor.dim() == 2 and "layers." in name])


def lose(tensors: dict[str, torch.Tensor], rng: random.Random) -> str:
    name = _pick(tensors, rng)
    del tensors[name]
    return name


def rename(tensors: dict[str, torch.Tensor], rng: random.Random) -> str:
    name = _pick(tensors, rng)
    tensors[name + "s"] = tensors.pop(name)
    return name


def add(tensors: dict[str, torch.Tensor], rng: random.Random) -> str:
    name = _pick(tensors, rng)
    tensors[name.replace("weight", "bias")] = torch.zeros(64)
    return name.replace("weight", "bias")


def reshape(tensors: dict[str, torch.Tensor], rng: random.Random) -> str:
    name = _pick(tensors, rng)
    tensors[name] = tensors[name][:-2].clone()
    return name


def retype(tensors: dict[str, torch.Tensor], rng: random.Random) -> str:
    name = _pick(tensors, rng)
    tensors[name] = tensors[name].to(torch.int8)
    return name


def poison(tensors: dict[str, torch.Tensor], rng: random.Random) -> str:
    name = _pick(tensors, rng)
    tensors[name][0, rng.randrange(8)] = float("nan")
    return name if "consolidated" in name else ""  # named by Meta's name


@pytest.mark.parametrize("fault", [lose, rename, add, reshape, retype, poison])
@pytest.mark.parametrize("kind", ["meta", "meta-4-shards", "hf", "hf-3-files", "hf-bin"])
def test_tensors_that_do_not_fit_are_named(
    in_format: Callable[[str, str], Path],
    tmp_path: Path,
    kind: str,
    fault: Callable[[dict[str, torch.Tensor], random.Random], str],
) -> None:
    rng = random.Random(f"{kind}/{fault.__name__}")
    shutil.copytree(in_format("mha", kind), tmp_path / "in")
    path = rng.choice(weight_files(tmp_path / "in"))
    tensors = tensors_of(path)
    name = fault(tensors, rng)
    store(tensors, path)
    message = error_of(tmp_path / "in", tmp_path / "out")
    assert name in message or (fault is poison and "NaN" in message)


@pytest.mark.parametrize("kind", ["meta-4-shards", "hf-3-files"])
def test_files_of_two_models_are_told_apart(in_format: Callable[[str, str], Path], tmp_path: Path, kind: str) -> None:
    """A file of another shape of model, a file too few, a file twice."""
    for case in ("mixed", "missing", "repeated"):
        shutil.copytree(in_format("mha", kind), tmp_path / case)
        files = weight_files(tmp_path / case)
        if case == "mixed":
            shutil.copy(weight_files(in_format("code", kind))[1], files[1])
        elif case == "missing":
            files[1].unlink()
        elif kind.startswith("hf"):  # Meta's shards look all alike: `verify` tells repeated ones by their sums
            shutil.copy(files[0], files[1])
        else:
            continue
        assert files[1].name in error_of(tmp_path / case, tmp_path / "out")


def test_shards_of_two_models_of_one_shape(in_format: Callable[[str, str], Path], tmp_path: Path) -> None:
    """Shapes fit, sums fit, but the norms, which stand in every file, are another model's."""
    shutil.copytree(in_format("mha", "meta-4-shards"), tmp_path / "in")
    path = tmp_path / "in" / "consolidated.02.pth"
    tensors = torch.load(path, weights_only=True)
    store({name: torch.randn_like(tensor) for name, tensor in tensors.items()}, path)
    assert "consolidated.02.pth has other norms than" in error_of(tmp_path / "in", tmp_path / "out")


def test_the_tokenizer_of_a_meta_folder_is_checked(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "in")
    tokenizer = tmp_path / "in" / "tokenizer.model"
    for content, part in (
        (LFS.encode(), "tokenizer.model is a Git LFS pointer, expected"),
        (Path(LLAMA3).read_bytes(), "has 128256 ids, the model 512: put the model's own there"),
    ):
        tokenizer.write_bytes(content)
        assert part in error_of(tmp_path / "in", tmp_path / "out")
    tokenizer.unlink()
    convert(tmp_path / "in", tmp_path / "out")  # beside it, or none at all
    assert not (tmp_path / "out" / "tokenizer.model").exists()


def test_a_dialect_that_was_recorded_stays(source: Path, tmp_path: Path) -> None:
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
    """So that every rank's rows of the output are what it holds of the embedding."""
    weights = meta_weights(source)
    del weights["output.weight"]
    shutil.copytree(source, tmp_path / "in")
    torch.save(weights, tmp_path / "in" / "consolidated.00.pth")
    convert(tmp_path / "in", tmp_path / "out", shards=2)
    assert Checkpoint(tmp_path / "out").embedding_axis == 0


def test_a_full_disk_leaves_one_line(source: Path, tmp_path: Path) -> None:
    """Beyond the first MB nothing can be written: no traceback of a file that tries to end itself."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    call = "import sys; from llama.cli.main import main; main()"
    command = [sys.executable, "-c", limit + call, "convert", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not os.listdir(tmp_path)
    assert done.stderr.startswith("error: ") and "cannot be written (File too large)" in done.stderr
    assert len(done.stderr.splitlines()) == 1
