"""Sources that cannot be converted, in every format: an error of one line that names the file, and no new folder."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.faults import FOREIGN, LFS
from helpers.formats import FORMATS, meta_weights
from helpers.paths import LLAMA3
from llama.convert import convert


def error_of(src: Path, dst: Path) -> str:
    with pytest.raises(ValueError) as error:
        convert(src, dst)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    assert type(error.value).__name__ in ("ConvertError", "CheckpointError", "TokenizerError")
    assert not dst.exists() and not dst.with_name(dst.name + ".partial").exists()
    return message


@pytest.mark.parametrize("fault", FOREIGN)
def test_sources_that_are_not_models_are_described(tmp_path: Path, fault: str) -> None:
    files, part = FOREIGN[fault]
    (tmp_path / "in").mkdir()
    for name, text in files.items():
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    source = tmp_path / "in"
    if fault.startswith("file:"):
        source /= next(iter(files))
    assert part in error_of(source, tmp_path / "out")


def test_a_missing_source(tmp_path: Path) -> None:
    assert "does not exist: supported are" in error_of(tmp_path / "none", tmp_path / "out")


# Damaged files of an intact model, in each format -------------------------------------------------


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
    """Each weight file is damaged at a random place: an error of one line names it, and no folder is created."""
    original = in_format("mha", kind)
    rng = random.Random(f"{kind}/{damage}")
    for path in weight_files(original):
        copy = tmp_path / f"in-{path.name}"
        if original.is_file():
            shutil.copy(original, copy)
            victim = copy
        else:
            shutil.copytree(original, copy)
            victim = copy / path.name
        DAMAGE[damage](victim, rng)
        assert victim.name in error_of(copy, tmp_path / "out")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_flipped_bit_never_corrupts_silently(
    checkpoint: Callable[..., Path], in_format: Callable[[str, str], Path], tmp_path: Path, kind: str
) -> None:
    """20 flips anywhere in each file give an error or the same weights.

    In formats without checksums, the weight that has the flipped bit may change instead.
    """
    original, rng = meta_weights(checkpoint("mha")), random.Random(kind)
    source = in_format("mha", kind)
    refused = 0
    for i in range(20):
        copy = tmp_path / f"in-{i}"
        if source.is_file():
            shutil.copy(source, copy)
        else:
            shutil.copytree(source, copy)
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
    """The name of a matrix in a layer, which every model has."""
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
    return name if "consolidated" in name else ""  # the error has Meta's name


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
def test_files_of_two_models_are_detected(in_format: Callable[[str, str], Path], tmp_path: Path, kind: str) -> None:
    """A file of a model with other shapes, a missing file, the same file twice."""
    for case in ("mixed", "missing", "repeated"):
        shutil.copytree(in_format("mha", kind), tmp_path / case)
        files = weight_files(tmp_path / case)
        if case == "mixed":
            shutil.copy(weight_files(in_format("code", kind))[1], files[1])
        elif case == "missing":
            files[1].unlink()
        elif kind.startswith("hf"):  # Meta's shards all have the same shapes; `verify` compares their CRCs
            shutil.copy(files[0], files[1])
        else:
            continue
        assert files[1].name in error_of(tmp_path / case, tmp_path / "out")


def test_shards_of_two_models_of_one_shape(in_format: Callable[[str, str], Path], tmp_path: Path) -> None:
    """Shapes and CRCs match, but the norms, which every shard repeats, are another model's."""
    shutil.copytree(in_format("mha", "meta-4-shards"), tmp_path / "in")
    path = tmp_path / "in" / "consolidated.02.pth"
    tensors = torch.load(path, weights_only=True)
    store({name: torch.randn_like(tensor) for name, tensor in tensors.items()}, path)
    assert "consolidated.02.pth has different norms from" in error_of(tmp_path / "in", tmp_path / "out")


def test_the_tokenizer_of_a_meta_folder_is_checked(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "in")
    tokenizer = tmp_path / "in" / "tokenizer.model"
    for content, part in (
        (LFS.encode(), "tokenizer.model is a Git LFS pointer, expected"),
        (Path(LLAMA3).read_bytes(), "has 128256 ids, the model 512: put the model's own tokenizer there"),
    ):
        tokenizer.write_bytes(content)
        assert part in error_of(tmp_path / "in", tmp_path / "out")
    tokenizer.unlink()
    convert(tmp_path / "in", tmp_path / "out")  # a tokenizer in the parent folder, or none at all
    assert not (tmp_path / "out" / "tokenizer.model").exists()
