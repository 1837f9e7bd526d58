"""`convert`: detect the format of the source, check that the result can be written, and write it atomically."""

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from llama.checkpoint.layout import tensor_shapes
from llama.checkpoint.paths import hub_command, list_shards, misnamed_shards
from llama.convert import gguf, hf, llama2c, meta
from llama.convert.source import ConvertError, Source
from llama.files import GGUF, LFS_POINTER, OLD_TORCH, PICKLE, SAFETENSORS, ZIP, as_path, detect_format
from llama.parallel.device import DTYPES

log = logging.getLogger(__name__)

SUPPORTED = (
    "supported are Meta's folders (consolidated.NN.pth), Hugging Face's of Llama, Mistral and Phi-3 (config.json), "
    "GGUF files of architecture llama, and llama2.c's .bin files"
)
# The files of a converted folder. --force refuses to replace a folder that holds any other file.
WRITTEN = (
    *("consolidated.*.pth", "params.json", "checklist.chk", "tokenizer.model", "tokenizer.json"),
    *("tokenizer_config.json", "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
)


def convert(
    src: str | Path,
    dst: str | Path,
    dtype: str = "auto",
    shards: int = 1,
    to: str = "meta",
    force: bool = False,
) -> None:
    """Convert a model into a new folder in Meta's layout or Hugging Face's.

    src: a folder in Meta's layout or Hugging Face's, a GGUF file, or a .bin file of llama2.c. The format is detected
        from the content.
    dst: the new folder. It appears only when it is complete. Until then the files are in `dst`.partial-XXXX next to it.
    dtype: auto (the stored dtype of each tensor, or bfloat16 for quantized tensors), float32 (exact for quantized
        tensors too), bfloat16 or float16.
    shards: the number of files that hold the weights.
    to: meta (consolidated.NN.pth, params.json) or hf (safetensors, config.json).
    force: replace `dst` if it holds a converted model and nothing else.

    Raises ConvertError, CheckpointError or TokenizerError if `src` cannot be converted or `dst` cannot be written.
    """
    src, dst = as_path(src), as_path(dst)
    if dst.name in ("", ".."):
        dst = dst.resolve()  # so that "." has a name and a parent too
    if dtype not in ("auto", *DTYPES):
        raise ConvertError(f"dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    if to not in ("meta", "hf"):
        raise ConvertError(f"to {to!r}: expected meta or hf")
    _check_destination(src, dst, force)
    source = _find_reader(src)(src)
    dtypes = source.dtypes if dtype == "auto" else dict.fromkeys(source.dtypes, DTYPES[dtype])
    writer = meta if to == "meta" else hf
    writer.check_shards(source.args, shards)
    try:
        _check_disk(source, dtypes, dst)
        dst.parent.mkdir(parents=True, exist_ok=True)
        # The name is unique, so that no existing file is overwritten or removed.
        partial = Path(tempfile.mkdtemp(prefix=f"{dst.name}.partial-", dir=dst.parent))
        try:
            writer.write(source, partial, dtypes, shards)
            files = sorted(path.name for path in partial.iterdir() if path.suffix not in (".pth", ".safetensors"))
            partial.chmod(0o777 & ~_umask())  # mkdtemp makes it private
            _move_into_place(partial, dst, force)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise ConvertError(
            f"{dst} cannot be written ({error.strerror or error}): free some space or choose another place for it"
        ) from error
    for path in dst.parent.iterdir():
        if path.name.startswith(f"{dst.name}.partial-"):
            source.notes.append(
                f"{path} is from a conversion that was killed or still runs: remove it if none is running"
            )
    for note in source.notes:
        log.info(f"note: {note}")
    dtype_names = " and ".join(sorted({str(stored)[6:] for stored in dtypes.values()}))
    count = "1 file" if shards == 1 else f"{shards} files"
    log.info(f"wrote {dst}: {len(source.tensors)} tensors as {dtype_names} in {count}, {', '.join(files)}")


def _find_reader(src: Path) -> Callable[[Path], Source]:
    """The reader for the format of `src`, detected from its content: names are unreliable. Raises ConvertError."""
    if not src.exists():
        raise ConvertError(f"{src} does not exist: {SUPPORTED}{hub_command(src)}")
    if src.is_dir():
        has_config = (src / "config.json").is_file()
        # Mistral's repositories hold both layouts.
        if _has_shards(src) and ((src / "params.json").exists() or not has_config):
            return meta.read
        if has_config:
            return hf.read
        raise ConvertError(_explain_folder(src))
    try:
        kind = detect_format(src)
        if kind == GGUF:
            return gguf.read
        if kind in (None, PICKLE) and llama2c.is_model(src):  # a header with dim 640 begins like a pickle
            return llama2c.read
    except OSError as error:
        raise ConvertError(f"{src} cannot be read ({error.strerror})") from error
    if kind in (SAFETENSORS, ZIP, OLD_TORCH):
        raise ConvertError(f"{src} is {kind}, a part of a model: give its folder, {src.parent}")
    fix = "fetch the file that it points to (git lfs pull)" if kind == LFS_POINTER else SUPPORTED
    raise ConvertError(f"{src} is {kind or 'of unknown format'}: {fix}")


def _explain_folder(src: Path) -> str:
    """The message for a folder that cannot be converted."""
    if (src / "adapter_config.json").is_file():
        base = _base_model(src / "adapter_config.json")
        return f"{src} holds an adapter for {base}, not a model: merge it into that model first"
    if _has_shards(src / "original"):
        return f"{src} holds Meta's files in its folder original: give {src / 'original'}"
    models = sorted(path for path in src.iterdir() if path.suffix in (".gguf", ".bin") and path.is_file())
    if models:
        return f"{src} is a folder: give a file in it, for example {models[0]}"
    return f"{src} holds neither consolidated.NN.pth nor config.json: {SUPPORTED}"


def _has_shards(folder: Path) -> bool:
    return bool(list_shards(folder)[0] or misnamed_shards(folder))


def _base_model(config: Path) -> str:
    try:
        return repr(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, LookupError, TypeError):
        return "another model"


def _check_destination(src: Path, dst: Path, force: bool) -> None:
    """Raise ConvertError if `dst` exists, or with `force`, if replacing it would lose more than a converted model."""
    if not os.path.lexists(dst):
        return
    if not force:
        raise ConvertError(f"{dst} exists and is left unchanged: name another folder, or give --force to replace it")
    if dst.is_symlink() or not dst.is_dir():
        raise ConvertError(f"{dst} is not a folder, so --force does not replace it: name another one")
    for path in (src, *(src.iterdir() if src.is_dir() else ())):  # links in `src` may point into `dst`
        if dst.resolve() in (path.resolve(), *path.resolve().parents):
            raise ConvertError(f"{dst} holds {path}, which would be lost: name another folder")
    for path in sorted(dst.iterdir()):
        if not any(path.match(name) for name in WRITTEN) or path.is_dir():
            raise ConvertError(
                f"{dst} holds {path.name}, which is not part of a converted model, so --force does not replace it: "
                "name another folder"
            )


def _move_into_place(partial: Path, dst: Path, force: bool) -> None:
    """Rename the finished folder to `dst`. An old `dst` is deleted afterwards, or restored if the rename fails."""
    if not os.path.lexists(dst):
        partial.rename(dst)
        return
    _check_destination(partial, dst, force)  # another program may have changed it since the first check
    old = Path(tempfile.mkdtemp(prefix=f"{dst.name}.replaced-", dir=dst.parent))
    dst.rename(old / dst.name)
    try:
        partial.rename(dst)
    except OSError:
        (old / dst.name).rename(dst)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
    if old.exists():
        log.info(f"note: {old}, the folder that was replaced, could not be removed")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check_disk(source: Source, dtypes: dict[str, torch.dtype], dst: Path) -> None:
    """Raise ConvertError if the disk has no room for the result.

    The space of an old `dst` does not count as free, because `dst` is deleted only when the new folder is complete.
    """
    shapes = tensor_shapes(source.args)
    needed = sum(math.prod(shapes[name]) * dtype.itemsize for name, dtype in dtypes.items())
    needed += sum(map(len, source.files.values()))
    place = next(parent for parent in dst.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ConvertError(
            f"{dst} needs {needed / 1e9:,.1f} GB, {place} has {free / 1e9:,.1f} GB free: free some space or choose "
            "another place"
        )
