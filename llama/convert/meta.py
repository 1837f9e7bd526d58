"""Read and write Meta's layout tensor by tensor: consolidated.NN.pth, params.json, checklist.chk."""

import contextlib
import hashlib
import io
import json
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2

from llama.chat.formats import base_model_note
from llama.checkpoint.checksums import check_files, read_checklists
from llama.checkpoint.folder import Checkpoint, compute_dtype
from llama.checkpoint.layout import legal_world_sizes, shard_axis
from llama.checkpoint.params_json import load_params
from llama.checkpoint.report import Report
from llama.checkpoint.tensor_checks import check_same_model
from llama.console import progress
from llama.convert.source import ConvertError, Source, tensor_bytes
from llama.params import ModelArgs
from llama.tokenizer import Tokenizer, TokenizerError, find_tokenizer

STORAGE_TYPES = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
}


# Reading ------------------------------------------------------------------------------------------


def read(folder: Path) -> Source:
    """Read a folder in Meta's layout with any number of shards. Raises CheckpointError or ConvertError.

    The shards are first checked against their CRCs and the checklists: otherwise a flipped bit would go unnoticed.
    """
    checkpoint = Checkpoint(folder)
    shards = range(len(checkpoint.paths))
    report = Report()
    listed = read_checklists(folder, report)
    check_files([*checkpoint.paths, folder / "params.json"], listed, folder, report)
    check_same_model(dict(enumerate(checkpoint.paths)), {i: checkpoint[i] for i in shards}, checkpoint.shapes, report)
    notes = list(checkpoint.notes)
    for problem in report.problems:
        if problem.startswith(tuple(map(str, checkpoint.paths))):
            raise ConvertError(problem)
        notes.append(problem)  # an edited params.json, or a file that is not needed
    params = load_params(folder)[0] | {"vocab_size": checkpoint.params.vocab_size}
    files, tokenizer_notes = _tokenizer_files(folder, checkpoint.params)
    tensors: dict[str, Callable[[], torch.Tensor]] = {
        name: partial(_full_tensor, checkpoint, name) for name in checkpoint.shapes
    }
    dtypes = {name: compute_dtype(checkpoint[0][name].dtype) for name in checkpoint.shapes}
    axis = -1 if len(checkpoint.paths) == 1 else checkpoint.embedding_axis  # a single shard does not show the axis
    return Source(params, tensors, files, dtypes, axis, notes=notes + tokenizer_notes)


def _tokenizer_files(folder: Path, args: ModelArgs) -> tuple[dict[str, bytes], list[str]]:
    """Return (name -> content, notes)."""
    try:
        path = find_tokenizer(folder)
    except TokenizerError:
        return {}, [f"no tokenizer was found in {folder} or its parent: the new folder has none either"]
    n_words = Tokenizer(path, use_scaled_rope=args.use_scaled_rope).n_words
    if n_words != args.vocab_size:
        raise ConvertError(
            f"{path} has {n_words} ids, the model {args.vocab_size}: put the model's own tokenizer there"
        )
    config = path.with_name("tokenizer_config.json")
    files = {file.name: file.read_bytes() for file in (path, config) if file.is_file()}
    if not config.is_file() and base_model_note(folder):
        # A base model is recognized by the folder's name, and the new folder may have another.
        files[config.name] = b'{"chat_format": null}\n'
    return files, []


def _full_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    if len(checkpoint.paths) == 1 or (axis := shard_axis(name, checkpoint.embedding_axis)) is None:
        return checkpoint[0][name]
    out = torch.empty(checkpoint.shapes[name], dtype=checkpoint[0][name].dtype)
    checkpoint.copy(name, 0, out.shape[axis], out)
    return out


# Writing ------------------------------------------------------------------------------------------


def check_shards(args: ModelArgs, shards: int) -> None:
    """Raise ConvertError if the model cannot be divided into this number of shards.

    A KV head is neither divided nor repeated, so the number must be a legal world size that divides the KV heads.
    """
    legal = [n for n in legal_world_sizes(args) if args.kv_heads % n == 0]
    if type(shards) is not int or shards not in legal:
        raise ConvertError(
            f"this model cannot be divided over {shards!r} files ({args.n_heads} heads, {args.kv_heads} KV heads, "
            f"feed-forward width {args.hidden_dim}, vocabulary {args.vocab_size}): --shards can be "
            f"{', '.join(map(str, legal))}"
        )


def write(source: Source, folder: Path, dtypes: dict[str, torch.dtype], shards: int) -> None:
    """Write all files into an empty folder, with one tensor in memory at a time."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(TorchFile(folder / f"consolidated.{i:02d}.pth")) for i in range(shards)]
        for name in progress(list(source.tensors), "converting"):
            tensor = source.read(name, dtypes[name])
            axis = shard_axis(name, source.embedding_axis)
            parts = [tensor] * shards if axis is None else tensor.chunk(shards, dim=axis)
            for file, part in zip(files, parts, strict=True):
                file.add(name, part)
    (folder / "params.json").write_text(json.dumps(source.params) + "\n", encoding="utf-8")
    for filename, content in source.files.items():
        (folder / filename).write_bytes(content)
    lines = [f"{md5(path)}  {path.name}\n" for path in progress(sorted(folder.iterdir()), "checksums")]
    (folder / "checklist.chk").write_text("".join(lines), encoding="utf-8")


class TorchFile:
    """Write a file of tensors by name in torch.save's format, one tensor at a time.

    torch.save itself needs all tensors in memory at once. The format is an uncompressed zip archive. STEM/data/N holds
    the bytes of tensor N. STEM/data.pkl holds the pickled dictionary, in which persistent ids ("storage", type, N,
    "cpu", numel) refer to those bytes.
    """

    def __init__(self, path: Path):
        self.stem = path.stem
        self.zip = zipfile.ZipFile(path, "w")
        self.tensors: dict[str, _Entry] = {}

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        elif self.zip.fp is not None:
            self.zip.fp.close()
            self.zip.fp = None  # else its destructor would write the directory, which fails on a full disk

    def add(self, name: str, tensor: torch.Tensor) -> None:
        key = str(len(self.tensors))
        self.tensors[name] = _Entry(_Storage(key, tensor.dtype, tensor.numel()), tuple(tensor.shape))
        self._add_record(f"data/{key}", tensor_bytes(tensor))

    def close(self) -> None:
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=2).dump(self.tensors)
        self._add_record("data.pkl", pickled.getbuffer())
        self._add_record("byteorder", sys.byteorder.encode())
        self._add_record("version", b"3\n")
        self.zip.close()

    def _add_record(self, name: str, content: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(f"{self.stem}/{name}")
        # Align the data to 64 bytes, as torch does, so that mapped tensors are aligned. It follows the local header (30
        # bytes), the name, a zip64 field (20) and the header of the padding field (4).
        begin = self.zip.fp.tell() + 30 + len(info.filename) + 20 + 4  # type: ignore[union-attr]  # not None before close
        info.extra = struct.pack("<HH", 0x4246, -begin % 64) + b"Z" * (-begin % 64)
        with self.zip.open(info, "w", force_zip64=True) as record:
            record.write(content)


@dataclass
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass
class _Entry:
    storage: _Storage
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        stride = torch.empty(self.shape, device="meta").stride()
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return "storage", STORAGE_TYPES[obj.dtype], obj.key, "cpu", obj.numel
        return None


def md5(path: Path) -> str:
    """Hexadecimal MD5 of a file, as in Meta's checklists."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
