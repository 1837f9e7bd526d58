"""Command lines: every mistake is one line, and nothing runs before it is told."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama import cli


def command(source: str, count: int = 1, verbose: bool = False) -> None:
    raise AssertionError("ran")


def fails(reason: BaseException) -> Callable[[], None]:
    def raising() -> None:
        raise reason

    return raising


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "x", "--cuont", "3"], "unknown flag --cuont; there are --source, --count, --verbose"),
        (["--source=x", "--cuont=3"], "unknown flag --cuont"),
        (["x", "--cuont=3"], "unknown flag --cuont"),
        ([], "--source is missing; --help tells more"),
        (["--count", "3"], "--source is missing"),
        (["-cuont", "3", "x"], "unknown flag --cuont"),
        (["a", "1", "True", "b"], "4 words without a flag, but 3 have a place"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_misspelt_and_missing_flags_run_nothing(
    words: list[str],
    message: str,
    nested: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *(["go"] if nested else []), *words])
    target: Any = {"go": command} if nested else command
    with pytest.raises(SystemExit) as ended:
        cli.run(target)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("words", [["--count", "2", "x"], ["-source", "x"], ["x", "--count=-5"], ["x", "7"]])
def test_words_without_flags_fill_what_is_left(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with pytest.raises(AssertionError, match="ran"):
        cli.run(command)


@pytest.mark.parametrize("error", [ValueError("no such shard"), TypeError("no number"), FileNotFoundError("nothing")])
def test_a_users_mistake_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as ended:
        cli.run(fails(error))
    assert ended.value.code == f"error: {error}"


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(AttributeError):
        cli.run(fails(AttributeError("a bug")))


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as ended:
        cli.run(fails(KeyboardInterrupt()))
    assert ended.value.code == 130


def test_convert_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["llama", "convert", str(tmp_path / "none.gguf"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert str(ended.value.code).startswith(f"error: {tmp_path / 'none.gguf'} does not exist")
