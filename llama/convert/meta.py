"""Meta's layout, read and written tensor by tensor: consolidated.NN.pth, params.json, checklist.chk."""

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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2

from llama.chat.formats import base_model_note
from llama.checkpoint.checksums import check_files, read_checklists
from llama.checkpoint.folder import Checkpoint, compute_dtype
from llama.checkpoint.layout import OUTPUT, legal_world_sizes, shard_axis
from llama.checkpoint.params_json import load_params
from llama.checkpoint.report import Report
from llama.checkpoint.tensor_checks import check_same_model, is_finite
from llama.console import progress
from llama.params import ModelArgs
from llama.tokenizer import Tokenizer, TokenizerError, find_tokenizer

LLAMA3_VOCAB = 128_000  # a vocabulary so large is Llama 3's
STORAGE_TYPES = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
}


class ConvertError(ValueError):
    """The conversion cannot be done; the message says why and what would do."""


@dataclass
class Source:
    """A model of any format, described in Meta's terms, with its weights still in their files.

    params: the keys of params.json, vocab_size included.
    tensors: Meta's name -> a call that reads this logical tensor. No output.weight where the embedding serves.
    files: content of the tokenizer's files by name.
    dtypes: what each tensor is stored in ("auto" keeps it); bfloat16 for quantized ones.
    embedding_axis: how Meta's files divide the embedding, 0 by rows (Llama 3) or 1 by columns (Llama 2); -1 where the
    source does not say.
    max_positions: the longest context that the model was made for, 0 where the source does not say.
    notes: what the user should know about the result, a line each.
    """

    params: dict[str, Any]
    tensors: dict[str, Callable[[], torch.Tensor]]
    files: dict[str, bytes]
    dtypes: dict[str, torch.dtype]
    embedding_axis: int = -1
    max_positions: int = 0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.embedding_axis == -1:  # as Meta's code for this family expects it
            llama3 = self.params["vocab_size"] >= LLAMA3_VOCAB or self.args.use_scaled_rope
            self.embedding_axis = 0 if llama3 or OUTPUT not in self.tensors else 1

    @property
    def args(self) -> ModelArgs:
        return ModelArgs(**self.params)

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor in `dtype`. Raises ConvertError where a number is none, or does not fit the type."""
        tensor = self.tensors[name]()
        if not is_finite(tensor):
            raise ConvertError(f"{name} holds NaN or infinite numbers: fetch the file again")
        if tensor.dtype != dtype:
            tensor = tensor.to(dtype)
            if not is_finite(tensor):
                raise ConvertError(
                    f"{name} holds numbers beyond {str(dtype)[6:]}'s range: take --dtype bfloat16 or float32"
                )
        return tensor


# Reading ------------------------------------------------------------------------------------------


def read(folder: Path) -> Source:
    """A folder in Meta's layout, whatever its number of shards. Raises CheckpointError or ConvertError.

    Its bytes are compared with the sums in its files and in its checklist first: a flipped bit would go on unseen.
    """
    checkpoint = Checkpoint(folder)
    shards = range(len(checkpoint.paths))
    findings = Report()
    listed = read_checklists(folder, findings)
    check_files([*checkpoint.paths, folder / "params.json"], listed, folder, findings)
    check_same_model(dict(enumerate(checkpoint.paths)), {i: checkpoint[i] for i in shards}, checkpoint.shapes, findings)
    notes = list(checkpoint.notes)
    for fault in findings.problems:
        if fault.startswith(tuple(map(str, checkpoint.paths))):
            raise ConvertError(fault)
        notes.append(fault)  # of a params.json that was edited since its sum was made, or a file that is not needed
    params = load_params(folder)[0] | {"vocab_size": checkpoint.params.vocab_size}
    files = {}
    try:
        path = find_tokenizer(folder)
    except TokenizerError:
        notes.append(f"no tokenizer was found in {folder} or beside it: the new folder has none either")
    else:
        n_words = Tokenizer(path, use_scaled_rope=checkpoint.params.use_scaled_rope).n_words
        if n_words != params["vocab_size"]:
            raise ConvertError(f"{path} has {n_words} ids, the model {params['vocab_size']}: put the model's own there")
        config = path.with_name("tokenizer_config.json")
        files = {file.name: file.read_bytes() for file in (path, config) if file.is_file()}
        if not config.is_file() and base_model_note(folder):
            # Its name says that it was not taught to chat, and the new folder may have another.
            files[config.name] = b'{"chat_format": null}\n'
    tensors: dict[str, Callable[[], torch.Tensor]] = {
        name: partial(_whole, checkpoint, name) for name in checkpoint.shapes
    }
    dtypes = {name: compute_dtype(checkpoint[0][name].dtype) for name in checkpoint.shapes}
    axis = -1 if len(checkpoint.paths) == 1 else checkpoint.embedding_axis  # one file divides nothing
    return Source(params, tensors, files, dtypes, axis, notes=notes)


def _whole(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    if len(checkpoint.paths) == 1 or (axis := shard_axis(name, checkpoint.embedding_axis)) is None:
        return checkpoint[0][name]
    out = torch.empty(checkpoint.shapes[name], dtype=checkpoint[0][name].dtype)
    checkpoint.copy(name, 0, out.shape[axis], out)
    return out


# Writing ------------------------------------------------------------------------------------------


def check_shards(args: ModelArgs, shards: int) -> None:
    """Files hold whole heads, none of them twice: the runner's world sizes without those that repeat KV heads."""
    legal = [n for n in legal_world_sizes(args) if args.kv_heads % n == 0]
    if type(shards) is not int or shards not in legal:
        raise ConvertError(
            f"this model cannot be divided over {shards!r} files ({args.n_heads} heads, {args.kv_heads} KV heads, "
            f"feed-forward width {args.hidden_dim}, vocabulary {args.vocab_size}): --shards takes "
            f"{', '.join(map(str, legal))}"
        )


def write(source: Source, folder: Path, dtypes: dict[str, torch.dtype], shards: int) -> None:
    """Fill an empty folder, one tensor in memory at a time."""
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


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, copied only where it is no contiguous piece of memory."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


class TorchFile:
    """A file of tensors by name as torch.save writes it, but written one by one: torch.save wants all in memory.

    It is a zip file without compression: STEM/data/N holds the bytes of tensor N, STEM/data.pkl the pickled
    dictionary, in which persistent ids ("storage", type, N, "cpu", numel) stand for those bytes.
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
            self.zip.fp = None  # or it would try once more to end the file, on a full disk perhaps

    def add(self, name: str, tensor: torch.Tensor) -> None:
        key = str(len(self.tensors))
        self.tensors[name] = _Entry(_Storage(key, tensor.dtype, tensor.numel()), tuple(tensor.shape))
        self._record(f"data/{key}", raw(tensor))

    def close(self) -> None:
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=2).dump(self.tensors)
        self._record("data.pkl", pickled.getbuffer())
        self._record("byteorder", sys.byteorder.encode())
        self._record("version", b"3\n")
        self.zip.close()

    def _record(self, name: str, content: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(f"{self.stem}/{name}")
        # Bytes begin at a multiple of 64, as torch has them, so that mapped tensors are aligned: the local header is
        # 30 bytes, the name, a field of 20 for the sizes, and a field of ours for padding.
        begin = self.zip.fp.tell() + 30 + len(info.filename) + 20 + 4  # type: ignore[union-attr]  # open until close
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
    """Hexadecimal MD5 of a file, as Meta's checklists hold it."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
