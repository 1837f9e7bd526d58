"""Other formats into Meta's layout and back: the function behind `python -m llama convert`."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from llama.checkpoint import tensor_shapes
from llama.convert import gguf, hf, llama2c, meta
from llama.convert.meta import ConvertError, Source
from llama.device import DTYPES
from llama.distributed import say
from llama.sniff import GGUF, SAFETENSORS, ZIP, what_is

__all__ = ["ConvertError", "convert"]

SUPPORTED = (
    "supported are Meta's folders (consolidated.NN.pth), Hugging Face's of Llama, Mistral and Phi-3 (config.json), "
    "GGUF files of architecture llama, and llama2.c's .bin files"
)


def convert(
    src: str | Path,
    dst: str | Path,
    dtype: str = "auto",
    shards: int = 1,
    to: str = "meta",
    force: bool = False,
) -> None:
    """Convert a model into a new folder in Meta's layout, or Hugging Face's.

    src: a folder in Meta's layout or Hugging Face's, a GGUF file, or a .bin file of llama2.c; told by content.
    dst: the new folder. It appears when all is written; until then the work lies beside it in `dst`.partial.
    dtype: auto (what `src` stores; bfloat16 for quantized weights), float32 (exact for those too), bfloat16, float16.
    shards: the number of files that hold the weights.
    to: meta (consolidated.NN.pth, params.json) or hf (safetensors, config.json).
    force: replace `dst` where it is a model's folder.

    Raises ConvertError, CheckpointError or TokenizerError, in one line, where `src`, `dst` or the settings will not do.
    """
    src, dst = Path(str(src)), Path(str(dst))  # on a command line, 7 is a name too
    if dtype not in ("auto", *DTYPES):
        raise ConvertError(f"dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    if to not in ("meta", "hf"):
        raise ConvertError(f"to {to!r}: expected meta or hf")
    _check_destination(src, dst, force)
    source = _reader(src)(src)
    kind = source.dtype if dtype == "auto" else DTYPES[dtype]
    writer = meta if to == "meta" else hf
    writer.check_shards(source.args, shards)
    _check_disk(source, dst, kind.itemsize)
    partial, replaced = dst.with_name(dst.name + ".partial"), dst.with_name(dst.name + ".replaced")
    try:
        _remove(partial)  # of a conversion that was killed
        partial.mkdir(parents=True)
        writer.write(source, partial, kind, shards)
        others = sorted(path.name for path in partial.iterdir() if path.suffix not in (".pth", ".safetensors"))
        if os.path.lexists(dst):
            _remove(replaced)
            dst.rename(replaced)
        partial.rename(dst)
        _remove(replaced)
    except BaseException as error:
        _remove(partial)
        if isinstance(error, OSError):
            raise ConvertError(
                f"{dst} cannot be written ({error.strerror or error}): make room or choose another place for it"
            ) from error
        raise
    for note in source.notes:
        say(f"note: {note}")
    files = "1 file" if shards == 1 else f"{shards} files"
    say(f"wrote {dst}: {len(source.tensors)} tensors as {str(kind)[6:]} in {files}, {', '.join(others)}")


def _reader(src: Path) -> Callable[[Path], Source]:
    """Tell formats by content: names and endings say little. Raises ConvertError with what was found instead."""
    if not src.exists():
        raise ConvertError(f"{src} does not exist: {SUPPORTED}")
    if src.is_dir():
        if any(src.glob("consolidated.*.pth")):
            return meta.read
        if (src / "config.json").is_file():
            return hf.read
        if (src / "adapter_config.json").is_file():
            base = _base_model(src / "adapter_config.json")
            raise ConvertError(f"{src} holds an adapter for {base}, no model: merge it into that one first")
        models = sorted(path for path in src.iterdir() if path.suffix in (".gguf", ".bin") and path.is_file())
        if models:
            raise ConvertError(f"{src} is a folder: name the file in it, {models[0]} for instance")
        raise ConvertError(f"{src} holds neither consolidated.NN.pth nor config.json: {SUPPORTED}")
    try:
        kind = what_is(src)
        if kind == GGUF:
            return gguf.read
        if kind is None and llama2c.is_model(src):
            return llama2c.read
    except OSError as error:
        raise ConvertError(f"{src} cannot be read ({error.strerror})") from error
    if kind in (SAFETENSORS, ZIP):
        raise ConvertError(f"{src} is {kind}, a part of a model: name the folder it lies in, {src.parent}")
    raise ConvertError(f"{src} is {kind or 'of no known format'}: {SUPPORTED}")


def _base_model(config: Path) -> str:
    try:
        return repr(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, LookupError, TypeError):
        return "another model"


def _check_destination(src: Path, dst: Path, force: bool) -> None:
    if not os.path.lexists(dst):
        return
    if not force:
        raise ConvertError(f"{dst} exists and is left as it is: name another folder, or give --force to replace it")
    if dst.resolve() == src.resolve() or dst.resolve() in src.resolve().parents:
        raise ConvertError(f"{dst} holds {src}, which would be lost: name another folder")
    models = ("params.json", "config.json")
    if not dst.is_dir() or (any(dst.iterdir()) and not any((dst / name).is_file() for name in models)):
        raise ConvertError(f"{dst} is not a model's folder, so --force does not replace it: name another folder")


def _check_disk(source: Source, dst: Path, itemsize: int) -> None:
    """What will be written must fit beside what is there: an old `dst` goes when the new one is whole."""
    shapes = tensor_shapes(source.args)
    needed = sum(math.prod(shapes[name]) for name in source.tensors) * itemsize
    needed += sum(map(len, source.files.values()))
    place = next(parent for parent in dst.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ConvertError(
            f"{dst} needs {needed / 1e9:,.1f} GB, {place} has {free / 1e9:,.1f} GB free: make room or choose another "
            "place"
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
