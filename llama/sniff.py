"""What a file is, told by its content: names and endings say little."""

import re
from pathlib import Path

FOLDER = "a folder"
EMPTY = "an empty file"
LFS_POINTER = "a Git LFS pointer"
WEB_PAGE = "an HTML or XML page"
GGUF = "a GGUF file"
SAFETENSORS = "a safetensors file"
ZIP = "a zip file"  # torch.save's, since torch 1.6
PICKLE = "a bare pickle"  # torch.save's before that
JSON = "a JSON text"


def what_is(path: Path) -> str | None:
    """One of the names above by the file's first bytes, or None where they say nothing. Raises OSError."""
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
    return "holds no consolidated.NN.pth: give the folder of one model"
