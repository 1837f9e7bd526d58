"""What a file is, told by its content: names and endings say little."""

import errno
import re
import stat
from pathlib import Path
from typing import Any

import torch

FOLDER = "a folder"
EMPTY = "an empty file"
LFS_POINTER = "a Git LFS pointer"
WEB_PAGE = "an HTML or XML page"
GGUF = "a GGUF file"
SAFETENSORS = "a safetensors file"
ZIP = "a zip file"  # torch.save's, since torch 1.6
PICKLE = "a bare pickle"  # torch.save's before that
JSON = "a JSON text"

TEXT_LIMIT = 2**20  # bytes of a params.json or a checklist: a few hundred are usual
SHARD = re.compile(r"consolidated\.([0-9]{2,4})\.pth")


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


def number_shards(folder: Path) -> tuple[dict[int, Path], list[Path]]:
    """(number -> consolidated.NN.pth, those whose number another has). Numbers have two to four digits: a name does
    not decide how much is counted."""
    shards: dict[int, Path] = {}
    twice = []
    for path in sorted(folder.glob("consolidated.*.pth")):
        if (match := SHARD.fullmatch(path.name)) and shards.setdefault(int(match[1]), path) != path:
            twice.append(path)
    return shards, twice


def what_is(path: Path) -> str | None:
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


def what_instead(ckpt_dir: Path) -> str:
    """What there is where consolidated.NN.pth should be, and the way out, as the end of a sentence."""
    try:
        return _what_instead(ckpt_dir)
    except OSError as error:
        return f"cannot be read ({error.strerror}): mend its permissions"


def _what_instead(ckpt_dir: Path) -> str:
    if not ckpt_dir.exists():
        return "does not exist: give the folder with the consolidated.NN.pth files"
    convert = "convert it with: python -m llama convert"
    if ckpt_dir.is_file():
        kind = what_is(ckpt_dir)
        return f"is {kind}: {convert} {ckpt_dir} DST" if kind == GGUF else "is a file: give the folder it lies in"
    if (ckpt_dir / "config.json").exists() or any(ckpt_dir.glob("*.safetensors")):
        original = ckpt_dir / "original"
        way = f"its folder {original} has that layout" if original.is_dir() else f"{convert} {ckpt_dir} DST"
        return f"is a Hugging Face folder, not one in Meta's layout: {way}"
    if models := sorted((*ckpt_dir.glob("*.gguf"), *ckpt_dir.glob("*.bin"))):
        return f"holds {models[0].name}, no consolidated.NN.pth: {convert} {models[0]} DST"
    if others := sorted(ckpt_dir.glob("consolidated.*.pth")):
        return f"holds {others[0].name}, expected names with two to four digits, consolidated.00.pth first: rename it"
    return "holds no consolidated.NN.pth: give the folder of one model"
