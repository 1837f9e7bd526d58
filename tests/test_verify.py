"""`verify` names the file of every fault, in one line, and passes what is whole."""

import hashlib
import pickle
import random
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import Bomb, edit_params, edit_shard

from llama import cli, sniff
from llama.params import CheckpointError
from llama.verify import BLOCK, check, verify

FIRST, SECOND, THIRD = (f"consolidated.{i:02d}.pth" for i in range(3))
WQ = "layers.1.attention.wq.weight"


def write_list(folder: Path, kind: str = "md5", form: str = "{}  {}\n", name: str = "checklist.chk") -> None:
    """A checklist of all files that lie there."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix != ".chk" and path.is_file()]
    lines = [form.format(hashlib.new(kind, path.read_bytes()).hexdigest(), path.name) for path in files]
    (folder / name).write_text("".join(lines))


@pytest.fixture
def copy(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """copy(name, shards): a folder to be damaged."""

    def make(name: str = "mha", shards: int = 2, place: str = "model") -> Path:
        return Path(shutil.copytree(checkpoint(name, shards), tmp_path / place))

    return make


def flip(path: Path, rng: random.Random, start: int = 0, stop: int | None = None) -> None:
    """Turn one bit of a file somewhere in [start, stop)."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(start, stop or len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def data_of(path: Path) -> list[tuple[int, int]]:
    """[start, stop) of the tensors in a shard."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        found = []
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            lengths = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
            start = info.header_offset + 30 + lengths
            if "/data/" in info.filename:
                found.append((start, start + info.file_size))
    return found


# Whole folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mha", "llama31"])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_whole_folder_passes(
    name: str, shards: int, checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    verify(str(checkpoint(name, shards)))
    *notes, last = capsys.readouterr().out.splitlines()
    assert last.startswith("OK: ") and "tokenizer.model with 512 ids" in last and f"{shards} shard" in last
    assert len(notes) == 1 and "no checklist.chk in" in notes[0]


@pytest.mark.parametrize("kind", ["md5", "sha256"])
@pytest.mark.parametrize("form", ["{}  {}\n", "{} *{}\r\n", "{}  ./{}\n\n", "# a comment\n{}\t{}\n"])
def test_listed_files_pass(kind: str, form: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    write_list(folder, kind, form)
    found = check(folder)
    assert (found.faults, found.notes) == ([], [])
    assert "4 files against their listed sums" in found.checked


def test_capital_digits_and_a_list_in_two_kinds(copy: Callable[..., Path]) -> None:
    folder = copy()
    write_list(folder, "sha256")
    lines = (folder / "checklist.chk").read_text().splitlines()
    lines[0] = f"{hashlib.md5((folder / FIRST).read_bytes()).hexdigest().upper()}  {FIRST}"
    (folder / "checklist.chk").write_text("\n".join(lines))
    assert not check(folder).faults


def test_metas_layout_with_the_tokenizer_beside(copy: Callable[..., Path]) -> None:
    folder = copy()
    tokenizer = (folder / "tokenizer.model").rename(folder.parent / "tokenizer.model")
    write_list(folder)
    write_list(folder.parent, name="tokenizer_checklist.chk")
    found = check(folder)
    assert (found.faults, found.notes) == ([], [])
    flip(tokenizer, random.Random(1), 1)
    (line,) = (line for line in check(folder).faults if "is not the listed file" in line)
    assert line.startswith(str(tokenizer))


def test_tied_embeddings_are_a_note(copy: Callable[..., Path]) -> None:
    folder = copy()
    for path in folder.glob("*.pth"):
        edit_shard(path, lambda t: t.pop("output.weight"))
    found = check(folder)
    assert not found.faults and "no file has output.weight" in found.notes[-1]


def test_files_in_no_list_are_notes(copy: Callable[..., Path]) -> None:
    folder = copy()
    write_list(folder)
    lines = (folder / "checklist.chk").read_text().splitlines()
    (folder / "checklist.chk").write_text(lines[0] + "\n")
    found = check(folder)
    assert not found.faults and [note.split("/")[-1] for note in found.notes] == [
        f"{name} is in no checklist" for name in (SECOND, "params.json", "tokenizer.model")
    ]


def test_files_saved_under_no_number_are_noted(copy: Callable[..., Path]) -> None:
    folder = copy()
    for path in folder.glob("*.pth"):
        tensors = torch.load(path)
        with path.open("wb") as file:
            torch.save(tensors, file)  # a stream has no name
    found = check(folder)
    assert not found.faults and "nothing in the shards says which part" in found.notes[-1]


def test_files_written_without_crcs_are_noted(copy: Callable[..., Path]) -> None:
    folder = copy()
    torch.serialization.set_crc32_options(False)
    try:
        edit_shard(folder / FIRST, lambda t: None)
    finally:
        torch.serialization.set_crc32_options(True)
    found = check(folder)
    assert not found.faults and f"{folder / FIRST} was written without CRCs" in found.notes[0]


def test_a_shard_of_another_number_of_bytes_than_blocks(tmp_path: Path) -> None:
    """Tensors that begin and end anywhere within blocks, one of them longer than several."""
    sizes = [3, BLOCK // 4, 3 * BLOCK // 4 + 5, 1, 0, 17]
    path = tmp_path / FIRST
    torch.save({str(i): torch.randn(n) for i, n in enumerate(sizes)}, path)
    assert not any("damaged" in line for line in check(tmp_path).faults)
    for start, stop in data_of(path):
        if start < stop:
            content = path.read_bytes()
            flip(path, random.Random(start), start, stop)
            assert sum("is damaged in" in line for line in check(tmp_path).faults) == 1
            path.write_bytes(content)


# Faults -------------------------------------------------------------------------------------------


@contextmanager
def tensors_of(path: Path) -> Iterator[dict[str, torch.Tensor]]:
    tensors = torch.load(path, weights_only=True)
    yield tensors
    torch.save(tensors, path)


def swap(folder: Path, rng: random.Random) -> None:
    (folder / FIRST).rename(folder / "x")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "x").rename(folder / SECOND)


def write(name: str, content: bytes) -> Callable[[Path, random.Random], Any]:
    return lambda folder, rng: (folder / name).write_bytes(content)


def remove(name: str) -> Callable[[Path, random.Random], Any]:
    return lambda folder, rng: (folder / name).unlink()


def truncate(folder: Path, rng: random.Random) -> None:
    content = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(content[: rng.randrange(1, len(content))])


def grow(folder: Path, rng: random.Random) -> None:
    """A gap of zeros, as a download that was resumed at the wrong place leaves."""
    content, at = (folder / SECOND).read_bytes(), rng.randrange(1000, 100_000)
    (folder / SECOND).write_bytes(content[:at] + bytes(rng.randrange(1, 5000)) + content[at:])


def zero(folder: Path, rng: random.Random) -> None:
    """A hole: pages that were never written."""
    content, at = bytearray((folder / SECOND).read_bytes()), rng.randrange(1000, 100_000)
    content[at : at + 4096] = bytes(4096)
    (folder / SECOND).write_bytes(content)


def flip_weight(folder: Path, rng: random.Random) -> None:
    flip(folder / SECOND, rng, *rng.choice(data_of(folder / SECOND)))


def foreign(folder: Path, rng: random.Random) -> None:
    """A part of another model of the same shapes."""
    with tensors_of(folder / SECOND) as tensors:
        for tensor in tensors.values():
            tensor.normal_(generator=torch.Generator().manual_seed(rng.randrange(2**32)))


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, random.Random], Any]:
    return lambda folder, rng: edit_shard(folder / SECOND, change)


def deflate(folder: Path, rng: random.Random) -> None:
    with zipfile.ZipFile(folder / SECOND) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / SECOND, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def add_line(line: str) -> Callable[[Path, random.Random], Any]:
    def add(folder: Path, rng: random.Random) -> None:
        write_list(folder)
        with (folder / "checklist.chk").open("a") as file:
            file.write(line + "\n")

    return add


def bomb(folder: Path, rng: random.Random) -> None:
    torch.save(torch.load(folder / SECOND) | {"bomb": Bomb(folder / "marker")}, folder / SECOND)


def folder_instead(folder: Path, rng: random.Random) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).mkdir()


def broken_link(folder: Path, rng: random.Random) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to(folder / "nowhere")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476939516\n"
PAGE = b"\n<!DOCTYPE html><html><body>403 Forbidden</body></html>"
DENIED = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code></Error>'
HALF = {WQ: torch.ones(1)}
FAULTS: dict[str, tuple[Callable[[Path, random.Random], Any], str, str]] = {
    "a bit of a weight": (flip_weight, SECOND, "is damaged in consolidated.01/data/"),
    "a hole": (zero, SECOND, "damaged"),
    "a gap": (grow, SECOND, "damaged"),
    "cut short": (truncate, SECOND, "cut short at"),
    "empty": (write(SECOND, b""), SECOND, "is an empty file, expected a file of torch.save: fetch it again"),
    "LFS pointer": (write(SECOND, POINTER), SECOND, "is a Git LFS pointer, expected a file of torch.save"),
    "web page": (write(SECOND, PAGE), SECOND, "is an HTML or XML page"),
    "XML page": (write(SECOND, DENIED), SECOND, "is an HTML or XML page"),
    "JSON answer": (write(SECOND, b'{"error": "gated"}'), SECOND, "is a JSON text"),
    "GGUF": (write(SECOND, b"GGUF\3\0\0\0"), SECOND, "is a GGUF file, expected a file of torch.save"),
    "safetensors": (write(SECOND, b"\x20\0\0\0\0\0\0\0{}"), SECOND, "is a safetensors file"),
    "pickle": (write(SECOND, pickle.dumps({"a": 1})), SECOND, "is a bare pickle, expected a file of torch.save"),
    "noise": (write(SECOND, random.Random(5).randbytes(5000)), SECOND, "is of no known kind"),
    "code": (bomb, SECOND, "holds more than tensors, which could run code"),
    "compressed": (deflate, SECOND, "compression, which torch.save does not use"),
    "folder": (folder_instead, SECOND, "is a folder, expected a file"),
    "broken link": (broken_link, SECOND, "is missing: fetch it"),
    "no first shard": (remove(FIRST), FIRST, "is missing, one of 2 parts of the model: fetch it"),
    "no last shard": (remove(SECOND), SECOND, "is missing, one of 2 parts of the model: fetch it"),
    "a shard too many": (
        lambda folder, rng: shutil.copy(folder / FIRST, folder / "consolidated.02.pth"),
        THIRD,
        "holds the same tensors as consolidated.00.pth",
    ),
    "a number twice": (
        lambda folder, rng: shutil.copy(folder / FIRST, folder / "consolidated.000.pth"),
        "consolidated.000.pth",
        "has the same number as consolidated.00.pth",
    ),
    "repeated": (lambda folder, rng: shutil.copy(folder / FIRST, folder / SECOND), SECOND, "holds the same tensors"),
    "swapped": (swap, SECOND, "was saved as consolidated.00.pth, expected consolidated.01.pth"),
    "another model's": (foreign, SECOND, "has other norms than consolidated.00.pth"),
    "another type": (edit(lambda t: t.update({WQ: t[WQ].bfloat16()})), SECOND, "has other types than"),
    "no float": (edit(lambda t: t.update({WQ: t[WQ].to(torch.int8)})), SECOND, f"wrong type: {WQ} torch.int8"),
    "a shape": (edit(lambda t: t.update(HALF)), SECOND, f"wrong shape: {WQ} (1,), expected (32, 64)"),
    "a name too few": (edit(lambda t: t.pop(WQ)), SECOND, f"missing: {WQ}"),
    "a name too many": (edit(lambda t: t.update({"extra": torch.ones(1)})), SECOND, "unexpected: extra"),
    "no names": (lambda folder, rng: torch.save([1], folder / SECOND), SECOND, "does not hold tensors by name"),
    "no params.json": (remove("params.json"), "params.json", "is missing: fetch it"),
    "params.json of a pointer": (write("params.json", POINTER), "params.json", "is a Git LFS pointer"),
    "params.json cut": (write("params.json", b'{"dim": 64, '), "params.json", "cannot be read as JSON"),
    "params.json with a strange key": (lambda f, rng: edit_params(f, alpha=1), "params.json", "unknown key 'alpha'"),
    "params.json of another model": (lambda f, rng: edit_params(f, dim=128), FIRST, "is not one of 2 parts of the"),
    "no tokenizer": (remove("tokenizer.model"), "tokenizer.model", "no tokenizer.model or tokenizer.json in"),
    "an empty tokenizer": (write("tokenizer.model", b""), "tokenizer.model", "is an empty file"),
    "a tokenizer's page": (write("tokenizer.model", PAGE), "tokenizer.model", "is an HTML or XML page"),
    "a broken tokenizer": (write("tokenizer.model", b"\n nothing"), "tokenizer.model", "is not a SentencePiece model"),
    "a vocabulary": (lambda f, rng: edit_params(f, vocab_size=500), FIRST, "wrong shape: output.weight (256, 64)"),
    "a listed file is gone": (
        add_line(f"{'0' * 32}  LICENSE"),
        "LICENSE",
        "is missing, but checklist.chk lists it: fetch it",
    ),
    "a line of nonsense": (add_line("nonsense"), "checklist.chk", "line 5 is 'nonsense', expected an md5 or sha256"),
    "a sum too short": (add_line(f"{'0' * 31}  LICENSE"), "checklist.chk", "line 5 is '000"),
    "a path": (add_line(f"{'0' * 32}  ../model/{FIRST}"), "checklist.chk", "names '../model/consolidated.00.pth'"),
    "an absolute path": (add_line(f"{'0' * 64}  /etc/passwd"), "checklist.chk", "names '/etc/passwd' in line 5"),
    "the folder above": (add_line(f"{'0' * 64}  .."), "checklist.chk", "names '..' in line 5"),
    "an empty list": (write("checklist.chk", b""), "checklist.chk", "is an empty file"),
    "a list that is a page": (write("checklist.chk", PAGE), "checklist.chk", "is an HTML or XML page"),
}


def spoil(folder: Path, fault: str, seed: int = 0) -> list[str]:
    FAULTS[fault][0](folder, random.Random(f"{fault}/{seed}"))
    return check(folder).faults


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(
    fault: str, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line with the path of its file, and no other file is blamed."""
    _, name, message = FAULTS[fault]
    folder = copy()
    faults = spoil(folder, fault)
    monkeypatch.setattr(sys, "argv", ["llama", "verify", str(folder)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert ended.value.code == 1 and shown.err == ""
    assert [line for line in shown.out.splitlines() if not line.startswith("note: ")] == faults
    assert [line for line in faults if name in line and message in line and str(folder) in line], faults
    lines = {"swapped": 2, "params.json of another model": 2, "a vocabulary": 3}  # each of the files, and the tokenizer
    assert len(faults) == lines.get(fault, 1), faults
    assert not (folder / "marker").exists()


@pytest.mark.parametrize("kind", ["md5", "sha256"])
@pytest.mark.parametrize(
    "fault", ["a bit of a weight", "another model's", "swapped", "repeated", "no last shard", "a hole"]
)
def test_a_checklist_tells_too(fault: str, kind: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    write_list(folder, kind)
    faults = spoil(folder, fault)
    assert all(SECOND in line or fault == "swapped" for line in faults) and faults
    text = {
        "swapped": "holds what checklist.chk calls",
        "repeated": "holds what checklist.chk calls consolidated.00.pth",
    }
    text |= {
        "another model's": f"is not the listed file: its {kind} is",
        "no last shard": "is missing, but checklist.chk",
    }
    assert text.get(fault, "damaged") in faults[-1]


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_is_found_wherever_a_reader_looks(seed: int, copy: Callable[..., Path]) -> None:
    """Among weights, headers and directory: what is not found changes nothing."""
    folder = copy("mha", 2)
    whole, rng = torch.load(folder / SECOND), random.Random(seed)
    for kind in ("weights", "rest"):
        content = (folder / SECOND).read_bytes()
        spans = data_of(folder / SECOND)
        edges = [0, *(edge for span in spans for edge in span), len(content)]
        if kind == "rest":
            spans = list(zip(edges[::2], edges[1::2], strict=True))
        flip(folder / SECOND, rng, *rng.choice(spans))
        faults = check(folder).faults
        if kind == "weights" or faults:
            assert len(faults) == 1 and faults[0].startswith(str(folder / SECOND))
        else:
            read = torch.load(folder / SECOND, mmap=True, weights_only=True)
            assert read.keys() == whole.keys() and all(torch.equal(read[key], whole[key]) for key in whole)
        (folder / SECOND).write_bytes(content)


def test_headers_that_contradict_the_directory(copy: Callable[..., Path]) -> None:
    """A reader believes one of the two, the directory's length of a record for instance, which no sum may cover."""
    path = copy() / SECOND
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
        (offset,) = (info.header_offset for info in archive.infolist() if info.filename.endswith("/data/7"))
    content = path.read_bytes()
    path.write_bytes(content[: offset + 8] + b"\x08" + content[offset + 9 :])  # compressed, says its header
    (line,) = check(path.parent).faults
    assert line.startswith(f"{path} is damaged in consolidated.01/data/7 (header)")
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, record)
        start = archive.fp.tell()  # type: ignore[union-attr]
    assert not check(path.parent).faults
    content = path.read_bytes()
    at = content.index(b"data/7", start) - len("consolidated.01/") - 46 + 20  # both lengths in the directory
    path.write_bytes(content[:at] + (10**9).to_bytes(4, "little") * 2 + content[at + 8 :])
    (line,) = check(path.parent).faults
    assert line.startswith(f"{path} is damaged in consolidated.01/data/7 (length): fetch")


@pytest.mark.parametrize("seed", range(6))
def test_faults_of_several_files_are_all_told(seed: int, copy: Callable[..., Path]) -> None:
    """A damaged first shard does not hide what is wrong with the others."""
    folder, rng = copy("mha", 4), random.Random(seed)
    names = [f"consolidated.{i:02d}.pth" for i in range(4)]
    rng.shuffle(names)
    flip(folder / names[0], rng, *rng.choice(data_of(folder / names[0])))
    edit_shard(folder / names[1], lambda t: t.pop(WQ))
    (folder / names[2]).unlink()
    edit_params(folder, vocab_size=512)
    (folder / "tokenizer.model").write_bytes(b"")
    lines = check(folder).faults
    for name, message in zip(names, ["is damaged in", f"missing: {WQ}", "is missing, one of 4 parts"], strict=False):
        assert len([line for line in lines if name in line and message in line]) == 1, lines
    assert len(lines) == 4 and not any(names[3] in line for line in lines)


def test_extra_and_missing_files_by_the_shapes(copy: Callable[..., Path]) -> None:
    """How many files there should be, the tensors say."""
    four, two = copy("mha", 4, "four"), copy("mha", 2, "two")
    shutil.copy(four / THIRD, two / THIRD)
    (line,) = check(two).faults
    assert line.startswith(f"{two / THIRD} is one file too many, expected 2 of them")
    (four / "consolidated.03.pth").unlink()
    (four / SECOND).unlink()
    assert [line.split(" ")[0] for line in check(four).faults] == [
        str(four / SECOND),
        str(four / "consolidated.03.pth"),
    ]


def test_the_odd_one_is_blamed(copy: Callable[..., Path]) -> None:
    folder = copy("llama31", 4)
    for key in ("norm.weight", "layers.0.ffn_norm.weight"):
        edit_shard(folder / FIRST, lambda t, key=key: t.update({key: t[key].flip(0) * 1.5}))  # type: ignore[misc]
    (line,) = check(folder).faults
    assert line.startswith(f"{folder / FIRST} has other norms than {SECOND}")


def test_norms_that_were_rounded_differently_pass(copy: Callable[..., Path]) -> None:
    """Some published checkpoints differ by their last bit from file to file."""
    folder = copy()
    for sign, path in zip((1, -1), sorted(folder.glob("*.pth")), strict=True):
        with tensors_of(path) as tensors:
            for key, tensor in tensors.items():
                shift = 1 + sign * 0.002 if "norm" in key else 1
                tensors[key] = (tensor * shift).bfloat16()
    assert not check(folder).faults


def test_a_tokenizer_of_another_size(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy()
    for path in folder.glob("*.pth"):
        with tensors_of(path) as tensors:
            tensors["tok_embeddings.weight"] = tensors["tok_embeddings.weight"][:500].clone()
            tensors["output.weight"] = tensors["output.weight"][:250].clone()
    (line,) = check(folder).faults
    assert line.startswith(f"{folder / 'tokenizer.model'} has 512 ids, expected the model's 500")


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is no folder: give the one with"):
        verify(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    assert any("is a Hugging Face folder" in line for line in check(tmp_path).faults)


def test_the_demo_passes(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(str(demo))
    note, line = capsys.readouterr().out.splitlines()
    assert note == "note: no file has output.weight: the embedding serves as the output too"
    assert "4 files against their listed sums" in line and "1 shard of 272 tensors" in line


# What a file is -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", sniff.EMPTY),
        (POINTER, sniff.LFS_POINTER),
        (PAGE, sniff.WEB_PAGE),
        (DENIED, sniff.WEB_PAGE),
        (b"\xef\xbb\xbf<Error>", sniff.WEB_PAGE),
        (b"GGUF\3\0\0\0", sniff.GGUF),
        (b"\x08\0\0\0\0\0\0\0{}      ", sniff.SAFETENSORS),
        (b"PK\3\4", sniff.ZIP),
        (pickle.dumps([1], protocol=2), sniff.PICKLE),
        (b' {"a": 1}', sniff.JSON),
        (b"[1]", sniff.JSON),
        (b"\n\x0e\n\x05<unk>\x15", None),  # a SentencePiece model
        (b"IQ== 0\nIg== 1\n", None),  # Llama 3's ranks
        (b"d41d8cd98f00b204e9800998ecf8427e  params.json\n", None),
    ],
)
def test_what_a_file_is(content: bytes, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    assert sniff.what_is(tmp_path / "file") == expected


def test_real_files_are_what_they_are(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("mha")
    assert sniff.what_is(folder / FIRST) == sniff.ZIP
    assert sniff.what_is(folder / "params.json") == sniff.JSON
    assert sniff.what_is(folder / "tokenizer.model") is None
    torch.save({}, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert sniff.what_is(tmp_path / "old") == sniff.PICKLE
