"""Find the files of a folder that hold weights, and explain to a user why a path holds none."""

import re
from pathlib import Path

from llama.checkpoint.errors import CheckpointError, some_names
from llama.files import GGUF, detect_format

# Meta writes consolidated.00.pth, other tools consolidated.0.pth or consolidated.pth, Mistral consolidated.safetensors.
SHARD = re.compile(r"consolidated(?:\.([0-9]{1,4}))?\.(?:pth|safetensors)")
# org/name, as repositories on the Hugging Face hub are called.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def shard_number(path: Path) -> int | None:
    """7 for consolidated.07.pth, 0 for consolidated.pth, None for other names.

    Numbers have at most four digits, because missing shards are searched up to the largest number.
    """
    match = SHARD.fullmatch(path.name)
    return int(match[1] or 0) if match else None


def list_shards(folder: Path) -> tuple[dict[int, Path], list[Path]]:
    """Return (shard number -> file, files whose number another file already has)."""
    shards: dict[int, Path] = {}
    duplicates = []
    for path in sorted(folder.glob("consolidated*")):
        if (number := shard_number(path)) is not None and shards.setdefault(number, path) != path:
            duplicates.append(path)
    return shards, duplicates


def misnamed_shards(folder: Path) -> list[Path]:
    """Files named like a shard, but without a valid number."""
    return [path for path in sorted(folder.glob("consolidated.*.pth")) if shard_number(path) is None]


def find_shards(ckpt_dir: Path) -> list[Path]:
    """The shard files in order. Raises CheckpointError if there are none, or if a number is missing."""
    shards, _ = list_shards(ckpt_dir)
    if not shards:
        raise CheckpointError(f"{ckpt_dir} {describe_path(ckpt_dir)}")
    if missing := [f"consolidated.{i:02d}.pth" for i in range(max(shards)) if i not in shards]:
        raise CheckpointError(f"{ckpt_dir} lacks {some_names(sorted(missing))}: fetch what is missing")
    return [shards[i] for i in range(len(shards))]


def renamed_note(shards: dict[int, Path]) -> list[str]:
    """A line if shards are not named as Meta names them, else nothing. shards: number -> file."""
    others = [path.name for number, path in shards.items() if path.name != f"consolidated.{number:02d}.pth"]
    return [f"the weights were read from {some_names(sorted(others))}"] if others else []


def describe_path(ckpt_dir: Path) -> str:
    """Say what is wrong with a path that holds no shards, and how to fix it, as the end of a message."""
    try:
        return _describe(ckpt_dir)
    except OSError as error:
        return f"cannot be read ({error.strerror}): fix its permissions"


def _describe(ckpt_dir: Path) -> str:
    if not ckpt_dir.exists():
        return f"does not exist: give the folder with the consolidated.NN.pth files{hub_command(ckpt_dir)}"
    convert = "convert it with: python -m llama convert"
    if ckpt_dir.is_file():
        kind = detect_format(ckpt_dir)
        return f"is {kind}: {convert} {ckpt_dir} DST" if kind == GGUF else "is a file: give the folder it is in"
    if (ckpt_dir / "config.json").exists() or any(ckpt_dir.glob("*.safetensors")):
        original = ckpt_dir / "original"
        fix = f"its folder {original} has that layout" if original.is_dir() else f"{convert} {ckpt_dir} DST"
        return f"is a Hugging Face folder, not one in Meta's layout: {fix}"
    if models := sorted((*ckpt_dir.glob("*.gguf"), *ckpt_dir.glob("*.bin"))):
        return f"holds {models[0].name}, no consolidated.NN.pth: {convert} {models[0]} DST"
    if others := misnamed_shards(ckpt_dir):
        return f"holds {others[0].name}, expected a number of up to four digits, consolidated.00.pth first: rename it"
    return "holds no consolidated.NN.pth: give the folder of one model"


def hub_command(path: Path) -> str:
    """How to download `path` if it may be a repository org/name on the Hugging Face hub, as the end of a message.

    Empty if the path has another form, or if a folder org exists: then the path is probably mistyped.
    """
    name = path.as_posix()
    if not HUB_NAME.fullmatch(name) or path.parent.exists():
        return ""
    command = f"hf download {name} --local-dir checkpoints/{path.name}"
    return f"; a repository on the Hugging Face hub is fetched with: {command}"
