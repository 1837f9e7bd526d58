"""Texts from files and pipes, which one host has and every rank needs."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from llama.parallel.groups import broadcast_object, is_main_rank, raise_on_all_ranks

T = TypeVar("T")
LIMIT = 16 * 2**20  # bytes of a text that is taken whole; to cut it into ids may take 200 times as many


def on_rank_0(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank, however long it takes; what it raises there is raised on all."""
    value: Any = None
    failed: Exception | None = None
    if is_main_rank():
        try:
            value = work()
        except Exception as error:
            failed = error
    value = broadcast_object(value)
    with raise_on_all_ranks():
        if failed is not None:
            raise failed
    return value


def read_on_rank_0(path: Path) -> str:
    """The text of a file that rank 0's host has, on every rank; bytes that are no UTF-8 become half surrogates.

    Raises on all ranks if the file cannot be read.
    """
    return on_rank_0(lambda: _read(path).decode("utf-8-sig", errors="surrogateescape"))


def read_pipe() -> str:
    """What comes through rank 0's stdin, less one line break at its end, on every rank."""

    def read() -> str:
        text = sys.stdin.read(LIMIT + 1)
        if len(text) > LIMIT:
            raise ValueError(f"more than {LIMIT:,} characters came through the pipe: give less")
        return text.removesuffix("\n")

    return on_rank_0(read)


def read_text(path: Path) -> str:
    """A text file as it is, line ends included; a byte order mark is left out. Raises ValueError where it is not a
    text, OSError where it cannot be read."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a text file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: name a text file")
    content = _read(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text: byte {error.start:,} is 0x{content[error.start]:02x}") from None
    if "\0" in text:
        raise ValueError(f"{path} is not a text: byte {content.index(0):,} is NUL")
    if not text:
        raise ValueError(f"{path} is empty: there is nothing to score")
    return text


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(LIMIT + 1)  # no more of a file whose size nobody knows, as /dev/zero
    if len(content) > LIMIT:
        raise ValueError(f"{path} has more than {LIMIT:,} bytes: divide it")
    return content
