"""`verify` names the file of every fault in one line, and accepts intact folders."""

import hashlib
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from helpers.commands import call
from helpers.faults import (
    DENIED,
    FAULTS,
    FIRST,
    PAGE,
    POINTER,
    SECOND,
    THIRD,
    WQ,
    data_of,
    edit_params,
    edit_shard,
    flip,
    write_checklist,
)
from llama import files
from llama.checkpoint.errors import CheckpointError
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.report import Report
from llama.checkpoint.tensor_checks import check_count, is_finite
from llama.checkpoint.verify import check_folder
from llama.checkpoint.zip_integrity import BLOCK
from llama.cli.verify import verify
from llama.convert import ConvertError, convert


@pytest.fixture
def copy(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """copy(name, shards): a folder to be damaged."""

    def make(name: str = "mha", shards: int = 2, place: str = "model") -> Path:
        return Path(shutil.copytree(checkpoint(name, shards), tmp_path / place))

    return make


# Intact folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mha", "llama31"])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_an_intact_folder_passes(
    name: str, shards: int, checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    call(verify, str(checkpoint(name, shards)))
    *notes, last = capsys.readouterr().out.splitlines()
    assert last.startswith("OK: ") and "tokenizer.model with 512 ids" in last and f"{shards} shard" in last
    assert len(notes) == 1 and "no checklist.chk in" in notes[0]


@pytest.mark.parametrize("kind", ["md5", "sha256"])
@pytest.mark.parametrize("form", ["{}  {}\n", "{} *{}\r\n", "{}  ./{}\n\n", "# a comment\n{}\t{}\n"])
def test_listed_files_pass(kind: str, form: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    write_checklist(folder, kind, form)
    report = check_folder(folder)
    assert (report.problems, report.notes) == ([], [])
    assert "4 files against their listed hashes" in report.checked


def test_uppercase_digits_and_two_kinds_of_hashes_in_one_list(copy: Callable[..., Path]) -> None:
    folder = copy()
    write_checklist(folder, "sha256")
    lines = (folder / "checklist.chk").read_text().splitlines()
    lines[0] = f"{hashlib.md5((folder / FIRST).read_bytes()).hexdigest().upper()}  {FIRST}"
    (folder / "checklist.chk").write_text("\n".join(lines))
    assert not check_folder(folder).problems


def test_metas_layout_with_the_tokenizer_in_the_parent_folder(copy: Callable[..., Path]) -> None:
    folder = copy()
    tokenizer = (folder / "tokenizer.model").rename(folder.parent / "tokenizer.model")
    write_checklist(folder)
    write_checklist(folder.parent, name="tokenizer_checklist.chk")
    report = check_folder(folder)
    assert (report.problems, report.notes) == ([], [])
    flip(tokenizer, random.Random(1), 1)
    (line,) = (line for line in check_folder(folder).problems if "does not match tokenizer_checklist.chk" in line)
    assert line.startswith(str(tokenizer))


def test_tied_embeddings_are_a_note(copy: Callable[..., Path]) -> None:
    folder = copy()
    for path in folder.glob("*.pth"):
        edit_shard(path, lambda t: t.pop("output.weight"))
    report = check_folder(folder)
    assert not report.problems and "no file has output.weight" in report.notes[-1]


def test_files_in_no_list_are_notes(copy: Callable[..., Path]) -> None:
    folder = copy()
    write_checklist(folder)
    lines = (folder / "checklist.chk").read_text().splitlines()
    (folder / "checklist.chk").write_text(lines[0] + "\n")
    report = check_folder(folder)
    assert not report.problems and [note.split("/")[-1] for note in report.notes] == [
        f"{name} is in no checklist" for name in (SECOND, "params.json", "tokenizer.model")
    ]


def test_shards_that_do_not_record_their_number_are_noted(copy: Callable[..., Path]) -> None:
    folder = copy()
    for path in folder.glob("*.pth"):
        tensors = torch.load(path)
        with path.open("wb") as file:
            torch.save(tensors, file)  # a stream has no name
    report = check_folder(folder)
    assert not report.problems and "the shards do not record their numbers" in report.notes[-1]


def test_files_written_without_crcs_are_noted(copy: Callable[..., Path]) -> None:
    folder = copy()
    torch.serialization.set_crc32_options(False)
    try:
        edit_shard(folder / FIRST, lambda t: None)
    finally:
        torch.serialization.set_crc32_options(True)
    report = check_folder(folder)
    assert not report.problems and f"{folder / FIRST} was written without CRCs" in report.notes[0]


def test_a_shard_of_another_number_of_bytes_than_blocks(tmp_path: Path) -> None:
    """Tensors begin and end at any place in a block, and one is longer than several blocks."""
    sizes = [3, BLOCK // 4, 3 * BLOCK // 4 + 5, 1, 0, 17]
    path = tmp_path / FIRST
    torch.save({str(i): torch.randn(n) for i, n in enumerate(sizes)}, path)
    assert not any("damaged" in line for line in check_folder(tmp_path).problems)
    for start, stop in data_of(path):
        if start < stop:
            content = path.read_bytes()
            flip(path, random.Random(start), start, stop)
            assert sum("is damaged in" in line for line in check_folder(tmp_path).problems) == 1
            path.write_bytes(content)


# Faults -------------------------------------------------------------------------------------------


def damage(folder: Path, fault: str) -> list[str]:
    """Damage a folder; return what `verify` reports."""
    FAULTS[fault].damage(folder, random.Random(fault))
    return check_folder(folder).problems


@pytest.mark.parametrize("kind", ["md5", "sha256"])
@pytest.mark.parametrize(
    "fault", ["a bit of a weight", "another model's", "swapped", "repeated", "no last shard", "a hole"]
)
def test_a_checklist_detects_faults_too(fault: str, kind: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    write_checklist(folder, kind)
    faults = damage(folder, fault)
    assert all(SECOND in line or fault == "swapped" for line in faults) and faults
    text = {
        "swapped": "holds what checklist.chk lists as",
        "repeated": "holds what checklist.chk lists as consolidated.00.pth",
    }
    text |= {
        "another model's": f"does not match checklist.chk: its {kind} is",
        "no last shard": "is missing, but checklist.chk",
    }
    assert text.get(fault, "damaged") in faults[-1]


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_is_found_wherever_it_matters(seed: int, copy: Callable[..., Path]) -> None:
    """Flip bits among weights, headers and directory. A flip that is not detected changes no tensor."""
    folder = copy("mha", 2)
    original, rng = torch.load(folder / SECOND), random.Random(seed)
    for kind in ("weights", "rest"):
        content = (folder / SECOND).read_bytes()
        spans = data_of(folder / SECOND)
        edges = [0, *(edge for span in spans for edge in span), len(content)]
        if kind == "rest":
            spans = list(zip(edges[::2], edges[1::2], strict=True))
        flip(folder / SECOND, rng, *rng.choice(spans))
        faults = check_folder(folder).problems
        if kind == "weights" or faults:
            assert len(faults) == 1 and faults[0].startswith(str(folder / SECOND))
        else:
            read = torch.load(folder / SECOND, mmap=True, weights_only=True)
            assert read.keys() == original.keys() and all(torch.equal(read[key], original[key]) for key in original)
        (folder / SECOND).write_bytes(content)


def test_headers_that_contradict_the_directory(copy: Callable[..., Path]) -> None:
    """Readers use one of the two: the directory's length of a record, for instance, which no CRC covers."""
    path = copy() / SECOND
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
        (offset,) = (info.header_offset for info in archive.infolist() if info.filename.endswith("/data/7"))
    content = path.read_bytes()
    path.write_bytes(
        content[: offset + 8] + b"\x08" + content[offset + 9 :]
    )  # the header says that the record is compressed
    (line,) = check_folder(path.parent).problems
    assert line.startswith(f"{path} is damaged in consolidated.01/data/7 (header)")
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, record)
        start = archive.fp.tell()  # type: ignore[union-attr]
    assert not check_folder(path.parent).problems
    content = path.read_bytes()
    offset = content.index(b"data/7", start) - len("consolidated.01/") - 46 + 20  # both lengths in the directory
    path.write_bytes(content[:offset] + (10**9).to_bytes(4, "little") * 2 + content[offset + 8 :])
    (line,) = check_folder(path.parent).problems
    assert line.startswith(f"{path} is damaged in consolidated.01/data/7 (length): fetch")


def test_two_directories(copy: Callable[..., Path]) -> None:
    """zipfile uses the directory right before the end record, torch the one that the end record points to.

    If they differ, `verify` would check other bytes than `build` loads.
    """
    path = copy() / SECOND
    content = path.read_bytes()
    assert content[-42:-38] == b"PK\6\7", "torch writes a zip64 end record"
    end = len(content) - 98
    directory = content[content.index(b"PK\1\2") : end]
    for damaged in (
        b"\0" * 64 + content,
        content + b"PK",
        content[:-34] + (64).to_bytes(8, "little") + content[-26:],  # the locator points elsewhere
        content[:-2] + len(directory).to_bytes(2, "little") + directory,  # and a second directory in the comment
        content[:end] + bytes(8) + content[end:],
        content[: end + 48] + (64).to_bytes(8, "little") + content[end + 56 :],
    ):
        path.write_bytes(damaged)
        (line,) = check_folder(path.parent).problems
        assert line.startswith(str(path)) and "fetch it again" in line
    path.write_bytes(content)
    assert not check_folder(path.parent).problems


def test_two_files_joined_are_not_converted(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy()
    FAULTS["two files joined"].damage(folder, random.Random(0))
    with pytest.raises(ConvertError, match=f"{SECOND} cannot be read .damaged: two files joined"):
        convert(str(folder), str(tmp_path / "converted"))


def test_a_number_that_a_name_or_params_json_makes_up_costs_nothing(copy: Callable[..., Path]) -> None:
    folder, report = copy(), Report()
    check_count({0: folder / FIRST, 1: folder / SECOND}, 2**40, report)
    assert report.problems == [
        f"{folder} lacks {THIRD}, consolidated.03.pth, consolidated.04.pth, consolidated.05.pth and "
        "1,099,511,627,770 more of the model's 1,099,511,627,776 shards: fetch them"
    ]
    names = ["consolidated.9999999.pth", "consolidated.-2.pth", "consolidated.\u0660\u0662.pth"]
    for name in names:
        shutil.copy(folder / FIRST, folder / name)
    report = check_folder(folder)
    assert not report.problems
    assert f"{folder}: {names[1]}, {names[0]}, {names[2]} ignored: numbers of shards have up" in report.notes[0]
    assert len(Checkpoint(folder).paths) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_number_is_found_in_any_order_and_nothing_is_copied(bad: float) -> None:
    views: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t,
        lambda t: t.t(),
        lambda t: t[:, 3:-5],
        lambda t: t[:, 3:-5].t(),
        lambda t: t.view(8, 256, 2048).permute(2, 0, 1),
        lambda t: t[5],
        lambda t: t[:, 7],
        lambda t: t[5, 7],
    ]
    tensor = torch.ones(2048, 2048)
    for view in views:
        tensor[5, 7] = 1
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
            assert is_finite(view(tensor))
        allocated = max((event.cpu_memory_usage for event in measured.events()), default=0)
        assert allocated <= 4 * BLOCK + 2**16, "a chunk of a non-contiguous view may be copied; all of it is 16 MiB"
        tensor[5, 7] = bad
        assert not is_finite(view(tensor))
    assert is_finite(torch.ones(0, 4))


@pytest.mark.parametrize("seed", range(6))
def test_faults_of_several_files_are_all_reported(seed: int, copy: Callable[..., Path]) -> None:
    """A damaged first shard does not hide what is wrong with the others."""
    folder, rng = copy("mha", 4), random.Random(seed)
    names = [f"consolidated.{i:02d}.pth" for i in range(4)]
    rng.shuffle(names)
    flip(folder / names[0], rng, *rng.choice(data_of(folder / names[0])))
    edit_shard(folder / names[1], lambda t: t.pop(WQ))
    (folder / names[2]).unlink()
    edit_params(folder, vocab_size=512)
    (folder / "tokenizer.model").write_bytes(b"")
    lines = check_folder(folder).problems
    for name, message in zip(names, ["is damaged in", f"missing: {WQ}", "is missing, one of 4 shards"], strict=False):
        assert len([line for line in lines if name in line and message in line]) == 1, lines
    assert len(lines) == 4 and not any(names[3] in line for line in lines)


def test_extra_and_missing_files_by_the_shapes(copy: Callable[..., Path]) -> None:
    """The number of shards is detected from the shapes of the tensors."""
    four, two = copy("mha", 4, "four"), copy("mha", 2, "two")
    shutil.copy(four / THIRD, two / THIRD)
    (line,) = check_folder(two).problems
    assert line.startswith(f"{two / THIRD} is an extra file, expected 2 shards")
    (four / "consolidated.03.pth").unlink()
    (four / SECOND).unlink()
    assert [line.split(" ")[0] for line in check_folder(four).problems] == [
        str(four / SECOND),
        str(four / "consolidated.03.pth"),
    ]


def test_the_shard_that_differs_from_the_others_is_reported(copy: Callable[..., Path]) -> None:
    folder = copy("llama31", 4)
    for key in ("norm.weight", "layers.0.ffn_norm.weight"):
        edit_shard(folder / FIRST, lambda t, key=key: t.update({key: t[key].flip(0) * 1.5}))  # type: ignore[misc]
    (line,) = check_folder(folder).problems
    assert line.startswith(f"{folder / FIRST} has different norms from {SECOND}")


def test_norms_that_were_rounded_differently_pass(copy: Callable[..., Path]) -> None:
    """In some published checkpoints norms differ in their last bit from shard to shard."""
    folder = copy()
    for sign, path in zip((1, -1), sorted(folder.glob("*.pth")), strict=True):
        tensors = torch.load(path)
        rounded = {key: tensor * (1 + sign * 0.002 if "norm" in key else 1) for key, tensor in tensors.items()}
        torch.save({key: tensor.bfloat16() for key, tensor in rounded.items()}, path)
    assert not check_folder(folder).problems


def test_a_tokenizer_of_another_size(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy()
    for path in folder.glob("*.pth"):
        rows = {"tok_embeddings.weight": 500, "output.weight": 250}
        edit_shard(path, lambda t: t.update({key: t[key][:n].clone() for key, n in rows.items()}))  # noqa: B023  # called now
    (line,) = check_folder(folder).problems
    assert line.startswith(f"{folder / 'tokenizer.model'} has 512 ids, expected the model's 500")


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist: give the folder with"):
        call(verify, str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    assert any("is a Hugging Face folder" in line for line in check_folder(tmp_path).problems)


def test_the_demo_passes(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(verify, str(demo))
    note, line = capsys.readouterr().out.splitlines()
    assert note == "note: no file has output.weight: the embedding is used as the output too"
    assert "4 files against their listed hashes" in line and "1 shard of 272 tensors" in line


# Formats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", files.EMPTY),
        (POINTER, files.LFS_POINTER),
        (PAGE, files.WEB_PAGE),
        (DENIED, files.WEB_PAGE),
        (b"\xef\xbb\xbf<Error>", files.WEB_PAGE),
        (b"GGUF\3\0\0\0", files.GGUF),
        (b"\x08\0\0\0\0\0\0\0{}      ", files.SAFETENSORS),
        (b"PK\3\4", files.ZIP),
        (pickle.dumps([1], protocol=2), files.PICKLE),
        (b' {"a": 1}', files.JSON),
        (b"[1]", files.JSON),
        (b"\n\x0e\n\x05<unk>\x15", None),  # a SentencePiece model
        (b"IQ== 0\nIg== 1\n", None),  # Llama 3's ranks
        (b"d41d8cd98f00b204e9800998ecf8427e  params.json\n", None),
    ],
)
def test_detect_format(content: bytes, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    assert files.detect_format(tmp_path / "file") == expected


def test_detect_format_of_real_files(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("mha")
    assert files.detect_format(folder / FIRST) == files.ZIP
    assert files.detect_format(folder / "params.json") == files.JSON
    assert files.detect_format(folder / "tokenizer.model") is None
    torch.save({}, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert files.detect_format(tmp_path / "old") == files.OLD_TORCH
