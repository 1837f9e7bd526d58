"""Paths and small files: `~` in a path, a file's format by its content, and texts read with a size limit."""

import errno
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from llama.parallel.groups import broadcast_object, is_main_rank, raise_on_all_ranks

T = TypeVar("T")
MAX_TEXT_BYTES = 16 * 2**20  # of a text that is read as a whole; its token ids may need 200 times as much memory
MAX_SMALL_BYTES = 2**20  # of a params.json or a checklist, which usually have a few hundred
# Formats, as in error messages: "{path} is {format}".
FOLDER = "a folder"
EMPTY = "an empty file"
LFS_POINTER = "a Git LFS pointer"
WEB_PAGE = "an HTML or XML page"
GGUF = "a GGUF file"
SAFETENSORS = "a safetensors file"
ZIP = "a zip file"  # torch.save's, since torch 1.6
OLD_TORCH = "a file of torch.save before 1.6"
PICKLE = "a plain pickle"
JSON = "a JSON text"
OLD_TORCH_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled


def as_path(value: str | Path) -> Path:
    """The path that a user named, with `~` expanded. Shells do not expand the one in `--ckpt_dir=~/x`.

    Other types are converted to text: fire, which reads the examples' arguments, parses a folder named 7 as a number.
    """
    return Path(os.path.expanduser(str(value)))


def expect_file(path: Path) -> None:
    """Raise OSError for a pipe or a device before it is opened, because reading it might block or never end.

    Folders are not checked here: opening one raises a clear error.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))


def read_small_file(path: Path) -> bytes:
    """The content of a params.json or a checklist. Raises OSError, also if it is not a file or too large."""
    expect_file(path)
    with path.open("rb") as file:
        content = file.read(MAX_SMALL_BYTES + 1)
    if len(content) > MAX_SMALL_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MAX_SMALL_BYTES:,} bytes", str(path))
    return content


def detect_format(path: Path) -> str | None:
    """One of the formats above, detected from the file's first bytes; None for any other. Raises OSError."""
    expect_file(path)
    if path.is_dir():
        return FOLDER
    with path.open("rb") as file:
        start = file.read(512)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        return EMPTY
    if start.startswith(b"version https://git-lfs"):
        return LFS_POINTER
    if re.match(rb"<[!?a-z]", text, re.IGNORECASE):
        return WEB_PAGE  # sent by a server if a download needs a login or its link has expired
    if start.startswith(b"GGUF"):
        return GGUF
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:  # the header's length, then the header
        return SAFETENSORS
    if start.startswith(b"PK\x03\x04"):
        return ZIP
    if start.startswith(OLD_TORCH_START):
        return OLD_TORCH
    if re.match(rb"\x80[\x02-\x05]", start):
        return PICKLE
    return JSON if re.match(rb"[{\[]", text) else None


# Texts that rank 0's host has and every rank needs ------------------------------------------------------


def run_on_rank_0(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 and return its result on every rank. An exception in it is raised on all ranks.

    The other ranks wait without a timeout.
    """
    value: Any = None
    failure: Exception | None = None
    if is_main_rank():
        try:
            value = work()
        except Exception as error:
            failure = error
    value = broadcast_object(value)
    with raise_on_all_ranks():
        if failure is not None:
            raise failure
    return value


def read_on_rank_0(path: Path) -> str:
    """The text of a file on rank 0's host, on every rank. Bytes that are not UTF-8 become surrogate escapes.

    Raises on all ranks if the file cannot be read.
    """
    return run_on_rank_0(lambda: _read(path).decode("utf-8-sig", errors="surrogateescape"))


def read_pipe() -> str:
    """The text from rank 0's stdin without a final line break, on every rank. Raises ValueError if it is too long."""

    def read() -> str:
        text = sys.stdin.read(MAX_TEXT_BYTES + 1)
        if len(text) > MAX_TEXT_BYTES:
            raise ValueError(f"more than {MAX_TEXT_BYTES:,} characters came through the pipe: give less")
        return text.removesuffix("\n")

    return run_on_rank_0(read)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with its line ends unchanged, without a byte-order mark.

    Raises ValueError if it is no text or empty, OSError if it cannot be read.
    """
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
        content = file.read(MAX_TEXT_BYTES + 1)  # /dev/zero and the like do not report their size
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"{path} has more than {MAX_TEXT_BYTES:,} bytes: divide it")
    return content
