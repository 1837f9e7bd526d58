"""Log lines and tables, as people see them."""

import logging
from collections.abc import Iterator

import pytest

from llama.console import configure_logging, print_table

LOGGER = logging.getLogger("llama")
log = logging.getLogger("llama.somewhere")


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    level = LOGGER.level
    yield
    LOGGER.setLevel(level)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (None, "a note\nwarning: a warning\n"),
        ("debug", "a detail\na note\nwarning: a warning\n"),
        ("info", "a note\nwarning: a warning\n"),
        ("WARNING", "warning: a warning\n"),
    ],
)
def test_llama_log_is_the_level(
    level: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LLAMA_LOG", raising=False)
    if level is not None:
        monkeypatch.setenv("LLAMA_LOG", level)
    configure_logging()
    log.debug("a detail")
    log.info("a note")
    log.warning("a warning")
    assert capsys.readouterr() == ("", expected)
    ours = [handler for handler in LOGGER.handlers if type(handler).__module__ == "llama.console"]
    assert len(ours) == 1  # however often it is configured; pytest adds handlers of its own


def test_an_unknown_level_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLAMA_LOG", "loud")
    configure_logging()
    assert capsys.readouterr().err == "warning: LLAMA_LOG is 'loud', expected debug, info, warning: info is used\n"


def test_only_rank_0_logs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        log.info(f"rank {rank}")
    assert capsys.readouterr().err == "rank 0\n"


def test_a_file_name_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("wrote \x1b[2Jx")
    assert capsys.readouterr().err == "wrote ␛[2Jx\n"


def test_a_process_without_stderr_logs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    log.warning("nobody reads this")


def test_a_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([["name", "n"], ["[b]", "1"], ["漢字 long", "1,000"]])  # text is no markup
    assert capsys.readouterr().out == "name           n\n[b]            1\n漢字 long  1,000\n"


def test_a_long_row_is_one_line_where_no_terminal_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([["head"] * 40, ["x" * 20] * 40])
    assert [len(line) for line in capsys.readouterr().out.splitlines()] == [40 * 22 - 2] * 2
