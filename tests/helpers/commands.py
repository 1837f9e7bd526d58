"""`python -m llama` in this process."""

import io
import sys
from typing import NamedTuple

import click
import pytest

from llama.cli import main as cli


class Keyboard(io.StringIO):
    """A stdin that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def run_command(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stdin: io.StringIO
) -> Ended:
    """Run `llama *args`. Return its exit status and what was printed since capsys was last read."""
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(sys, "argv", ["llama", *args])
    status, message = 0, ""
    try:
        cli.main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
        message = "" if isinstance(ended.code, int) else f"{ended.code}\n"
    out, err = capsys.readouterr()
    return Ended(status, out, err + message)


def call(command: click.Command, *args: object, **flags: object) -> None:
    """Run a command in this process. Its exceptions are raised unchanged, not printed."""
    arguments = [*map(str, args), *(f"--{name}={value}" for name, value in flags.items())]
    command.main(arguments, standalone_mode=False)
