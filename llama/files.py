"""Paths and small files: `~` in a path, which files hold weights, a file's format by its content, texts."""

import errno
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from llama.parallel.groups import broadcast_object, is_main_rank, raise_on_all_ranks

T = TypeVar("T")
LIMIT = 16 * 2**20  # bytes of a text that is read whole; its ids may take 200 times as many
FOLDER = "a folder"
EMPTY = "an empty file"
LFS_POINTER = "a Git LFS pointer"
WEB_PAGE = "an HTML or XML page"
GGUF = "a GGUF file"
SAFETENSORS = "a safetensors file"
ZIP = "a zip file"  # torch.save's, since torch 1.6
OLD_TORCH = "a file of torch.save before 1.6"
PICKLE = "a bare pickle"
JSON = "a JSON text"

TEXT_LIMIT = 2**20  # bytes of a params.json or a checklist: a few hundred are usual
# Meta writes consolidated.00.pth, other tools consolidated.0.pth or consolidated.pth, Mistral consolidated.safetensors.
SHARD = re.compile(r"consolidated(?:\.([0-9]{1,4}))?\.(?:pth|safetensors)")
OLD_TORCH_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # its magic number, pickled
# org/name, as repositories on the Hugging Face hub are called.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def as_path(value: str | Path) -> Path:
    """The path that a user names, with `~` expanded as a shell does: `--ckpt_dir=~/x` reaches us as it is typed. On a
    command line, 7 is a name too."""
    return Path(os.path.expanduser(str(value)))


def expect_file(path: Path) -> None:
    """Before a file is opened: a pipe would be waited for without end, a device has no end. Raises OSError."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a folder is told when it is opened
        raise OSError(errno.EINVAL, "it is a pipe or a device, no file", str(path))


def read_small(path: Path) -> bytes:
    """All of a params.json or a checklist. Raises OSError, also where it is no file or too large for one."""
    expect_file(path)
    with path.open("rb") as file:
        content = file.read(TEXT_LIMIT + 1)
    if len(content) > TEXT_LIMIT:
        raise OSError(errno.EFBIG, f"it has more than {TEXT_LIMIT:,} bytes", str(path))
    return content


def shard_number(path: Path) -> int | None:
    """7 of consolidated.07.pth, 0 of consolidated.pth; None where the name is another. Numbers have up to four digits:
    a name does not decide how much is counted."""
    match = SHARD.fullmatch(path.name)
    return int(match[1] or 0) if match else None


def number_shards(folder: Path) -> tuple[dict[int, Path], list[Path]]:
    """(number -> file of weights, those whose number another has)."""
    shards: dict[int, Path] = {}
    twice = []
    for path in sorted(folder.glob("consolidated*")):
        if (number := shard_number(path)) is not None and shards.setdefault(number, path) != path:
            twice.append(path)
    return shards, twice


def other_shards(folder: Path) -> list[Path]:
    """Files that are named almost as those with weights are."""
    return [path for path in sorted(folder.glob("consolidated.*.pth")) if shard_number(path) is None]


def detect_format(path: Path) -> str | None:
    """One of the names above by the file's first bytes, or None where they say nothing. Raises OSError."""
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
        return WEB_PAGE  # what a download is answered with that needs a login, or has expired
    if start.startswith(b"GGUF"):
        return GGUF
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:  # length of its header, then the header
        return SAFETENSORS
    if start.startswith(b"PK\x03\x04"):
        return ZIP
    if start.startswith(OLD_TORCH_START):
        return OLD_TORCH
    if re.match(rb"\x80[\x02-\x05]", start):
        return PICKLE
    return JSON if re.match(rb"[{\[]", text) else None


def is_plain(tensor: Any) -> bool:
    """Is it a tensor whose numbers all lie in a file, each in a place of its own? Others can be of any size (one number
    repeated, or none at all), and are no weights. Transposed ones and slices are plain."""
    if not isinstance(tensor, torch.Tensor) or tensor.is_nested:
        return False
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_neg():
        return False
    reach = 0  # of the axes with smaller steps
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step <= reach:
            return False
        reach += step * max(0, size - 1)
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize


def describe_path(ckpt_dir: Path) -> str:
    """What there is where consolidated.NN.pth should be, and the way out, as the end of a sentence."""
    try:
        return _what_instead(ckpt_dir)
    except OSError as error:
        return f"cannot be read ({error.strerror}): mend its permissions"


def _what_instead(ckpt_dir: Path) -> str:
    if not ckpt_dir.exists():
        return f"does not exist: give the folder with the consolidated.NN.pth files{hub_command(ckpt_dir)}"
    convert = "convert it with: python -m llama convert"
    if ckpt_dir.is_file():
        kind = detect_format(ckpt_dir)
        return f"is {kind}: {convert} {ckpt_dir} DST" if kind == GGUF else "is a file: give the folder it lies in"
    if (ckpt_dir / "config.json").exists() or any(ckpt_dir.glob("*.safetensors")):
        original = ckpt_dir / "original"
        way = f"its folder {original} has that layout" if original.is_dir() else f"{convert} {ckpt_dir} DST"
        return f"is a Hugging Face folder, not one in Meta's layout: {way}"
    if models := sorted((*ckpt_dir.glob("*.gguf"), *ckpt_dir.glob("*.bin"))):
        return f"holds {models[0].name}, no consolidated.NN.pth: {convert} {models[0]} DST"
    if others := other_shards(ckpt_dir):
        return f"holds {others[0].name}, expected a number of up to four digits, consolidated.00.pth first: rename it"
    return "holds no consolidated.NN.pth: give the folder of one model"


def hub_command(path: Path) -> str:
    """How to fetch org/name, which may be a repository on the Hugging Face hub, as the end of a sentence; nothing where
    there is a folder org, or the path is another."""
    name = path.as_posix()
    if not HUB_NAME.fullmatch(name) or path.parent.exists():
        return ""
    command = f"hf download {name} --local-dir checkpoints/{path.name}"
    return f"; a repository on the Hugging Face hub is fetched with: {command}"


# Texts, which one host has and every rank needs ---------------------------------------------------------


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
