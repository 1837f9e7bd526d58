"""Damaged checkpoints are not loaded: every fault of the table raises an error of one line that names its file."""

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.faults import FAULTS, FOREIGN, Fault, data_of, flip, table
from helpers.paths import ROOT
from helpers.ranks import run_ranks
from llama import Llama, generation
from llama.checkpoint.verify import check_folder
from llama.cli import main as cli
from llama.model import Transformer
from llama.parallel.groups import current_world

# Faults for which `verify` does not print exactly one line: how many it prints.
SEVERAL = {
    "swapped": 2,
    "a number too large": 2,  # and what it was saved as
    "no embedding": 1,
    "a large width": 2,
    "another model's params.json": 2,
    "a layer too many": 2,
    "a layer too few": 2,
    "another vocabulary": 3,  # and the tokenizer
}


@pytest.fixture
def damaged(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """damaged(fault): a folder of two shards with that fault."""

    def make(name: str) -> Path:
        folder = tmp_path / name.replace(" ", "-").replace("'", "")
        shutil.copytree(checkpoint("mha", 2), folder)
        FAULTS[name].damage(folder, random.Random(name))
        return folder

    return make


@pytest.mark.parametrize("name", FAULTS)
def test_verify_names_a_fault(
    name: str, damaged: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line has the path of the damaged file and the reason. No other file is reported."""
    fault, folder = FAULTS[name], damaged(name)
    faults = check_folder(folder).problems
    monkeypatch.setattr(sys, "argv", ["llama", "verify", str(folder)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert ended.value.code == 1 and shown.err == ""
    assert [line for line in shown.out.splitlines() if not line.startswith("note: ")] == faults
    assert [line for line in faults if str(folder / fault.file) in line and fault.verify in line], faults
    assert len(faults) == SEVERAL.get(name, 1), faults
    assert not (folder / "marker").exists()


def builds(folders: list[Path]) -> list[str]:
    """The error of `build` for each folder on this rank, or "built". Damage is found before the model is created."""

    def create_model(*args: Any, **options: Any) -> Transformer:
        assert good, "memory was taken for a damaged checkpoint"
        return Transformer(*args, **options)

    original, generation.Transformer = generation.Transformer, create_model  # type: ignore[assignment, misc]
    answers = []
    for folder in folders:
        good = folder.name in GOOD
        try:
            Llama.build(folder, max_seq_len=16).close()
            answers.append("built")
        except Exception as error:
            answers.append(f"{type(error).__name__}: {error}")
    generation.Transformer = original  # type: ignore[misc]
    return answers


GOOD = {name.replace(" ", "-") for name, fault in FAULTS.items() if fault.build == ""}


def check_answer(answer: str, fault: Fault, folder: Path, name: str) -> None:
    expected = fault.verify if fault.build is None else fault.build
    if not expected:
        assert answer == "built", name
        return
    assert answer.startswith(("CheckpointError: ", "TokenizerError: ", "PeerError: rank ")), (name, answer)
    blamed = folder / fault.file if fault.build is None else folder
    assert str(blamed) in answer and expected in answer and "\n" not in answer, (name, answer)
    assert not (folder / "marker").exists()


def test_build_names_every_fault_on_every_rank(
    damaged: Callable[[str], Path], measured: Callable[[str, object], None]
) -> None:
    folders = {name: damaged(name) for name in FAULTS}
    caught = 0
    ranks = run_ranks(2, builds, list(folders.values()))
    for (name, folder), *answers in zip(folders.items(), *ranks, strict=True):
        for answer in answers:
            check_answer(answer, FAULTS[name], folder, name)
        caught += FAULTS[name].build != ""
    measured("faults of Meta folders: tried, caught by verify, by build", f"{len(FAULTS)}, {len(FAULTS)}, {caught}")


def one_damaged(intact: Path, folders: list[Path]) -> list[str]:
    """The errors of `build`. Rank 1, on its own host, has the damaged folders, rank 0 an intact one."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return builds([folder if current_world().rank == 1 else intact for folder in folders])


def test_a_fault_on_one_host_is_reported_on_the_others(
    damaged: Callable[[str], Path], checkpoint: Callable[..., Path]
) -> None:
    names = [name for name, fault in FAULTS.items() if fault.build != ""]
    folders = [damaged(name) for name in names]
    first, second = run_ranks(2, one_damaged, checkpoint("mha", 2), folders)
    for name, folder, other, own in zip(names, folders, first, second, strict=True):
        check_answer(own, FAULTS[name], folder, name)
        assert not own.startswith("PeerError") and other == f"PeerError: rank 1 failed: {own.partition(': ')[2]}", other


def without_permission(folder: Path, names: list[str]) -> list[str]:
    answers = []
    for name in names:
        mode = (folder / name).stat().st_mode
        (folder / name).chmod(0)
        if os.getuid() == 0:
            os.seteuid(65534)  # root may read everything
        answers += builds([folder])
        if os.getuid() == 0:
            os.seteuid(0)
        (folder / name).chmod(mode)
    return answers


def test_the_only_shard_is_damaged(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """That no intact shard is left is not reported as another problem."""
    folder = Path(shutil.copytree(checkpoint("mha"), tmp_path / "model"))
    shard = folder / "consolidated.00.pth"
    flip(shard, random.Random(1), *data_of(shard)[0])
    (fault,) = check_folder(folder).problems
    assert fault.startswith(f"{shard} is damaged in consolidated.00/data/")
    assert builds([folder]) == [f"CheckpointError: {fault}"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_files_without_permission(checkpoint: Callable[..., Path]) -> None:
    names = ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model", ""]
    with tempfile.TemporaryDirectory() as place:  # other users cannot enter pytest's own folders
        folder = Path(shutil.copytree(checkpoint("mha", 2), f"{place}/model"))
        for path in (Path(place), folder):
            path.chmod(0o755)
        (answers,) = run_ranks(1, without_permission, folder, names)
    for answer, name in zip(answers, names, strict=True):
        assert answer.startswith(("CheckpointError: ", "TokenizerError: ")) and "\n" not in answer
        assert f"{folder / name} cannot be read" in answer and "Permission denied" in answer, answer


def test_no_flipped_bit_of_a_weight_is_loaded(
    checkpoint: Callable[..., Path], tmp_path: Path, measured: Callable[[str, object], None]
) -> None:
    folder, rng, accepted = Path(shutil.copytree(checkpoint("mha", 2), tmp_path / "in")), random.Random(0), 0
    for _ in range(100):
        path = folder / rng.choice(["consolidated.00.pth", "consolidated.01.pth"])
        content = path.read_bytes()
        flip(path, rng, *rng.choice(data_of(path)))
        (answer,) = builds([folder])
        accepted += answer == "built"
        assert answer == "built" or "is damaged in consolidated.0" in answer, answer
        path.write_bytes(content)
    measured("flipped bits of weights, of which build accepted", f"{accepted} of 100")
    assert accepted == 0
    Llama.build(folder, max_seq_len=16).close()


def test_the_table_in_the_docs() -> None:
    assert (ROOT / "docs" / "faults.md").read_text() == table()
    assert len(FAULTS) + len(FOREIGN) >= 60
