"""Other formats into Meta folders: the function behind `python -m llama convert`."""

import os
import shutil
from pathlib import Path

from llama.convert import gguf
from llama.convert.meta import ConvertError, check_shards, write_folder
from llama.device import DTYPES
from llama.distributed import say
from llama.params import ModelArgs

__all__ = ["ConvertError", "convert"]

SUPPORTED = "supported are GGUF files of architecture llama"


def convert(src: str | Path, dst: str | Path, dtype: str = "bfloat16", shards: int = 1) -> None:
    """Convert the model in `src` into a new Meta folder `dst` with consolidated.00.pth ... of `shards` files.

    dtype: float32 or bfloat16, what the weights are stored in. float32 keeps quantized weights exactly.
    `dst` appears when everything is written; until then the work lies beside it in `dst`.partial.
    Raises ConvertError, in one line, where `src`, `dst` or the settings will not do.
    """
    src, dst = Path(str(src)), Path(str(dst))  # on a command line, 7 is a name too
    if dtype not in ("float32", "bfloat16"):
        raise ConvertError(f"dtype {dtype!r}: expected float32 or bfloat16")
    if os.path.lexists(dst):
        raise ConvertError(f"{dst} exists and is left as it is: name another folder, or remove it first")
    _check_format(src)
    source = gguf.read(src)
    check_shards(ModelArgs(**source.params), shards)
    partial = dst.with_name(dst.name + ".partial")
    try:
        _remove(partial)  # of a conversion that was killed
        partial.mkdir(parents=True)
        write_folder(source, partial, DTYPES[dtype], shards)
        partial.rename(dst)
    except BaseException as error:
        _remove(partial)
        # torch.save reports a full disk as a RuntimeError.
        if isinstance(error, (OSError, RuntimeError)):
            reason = str(error).strip().split("\n")[0]
            raise ConvertError(
                f"{dst} cannot be written ({reason}): make room or choose another place for it"
            ) from error
        raise
    files = "1 file" if shards == 1 else f"{shards} files"
    say(f"wrote {dst}: {len(source.tensors)} tensors as {dtype} in {files}, {', '.join(source.files)}")


def _check_format(src: Path) -> None:
    """Tell formats by content: names and endings say little."""
    if not src.exists():
        raise ConvertError(f"{src} does not exist: {SUPPORTED}")
    if src.is_dir():
        raise ConvertError(f"{src} is a folder, which is not supported yet: {SUPPORTED}")
    try:
        with src.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ConvertError(f"{src} cannot be read ({error.strerror})") from error
    if magic != b"GGUF":
        raise ConvertError(f"{src} is not a GGUF file (it starts with {magic!r}): {SUPPORTED}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
