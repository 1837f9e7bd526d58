"""Read model files of llama2.c (such as stories15M.bin), versions 0, 1 and 2.

The header has seven int32: dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, context. Version 0 begins with
them, and a negative vocab_size means that the output matrix is not tied. Later versions begin with magic and version,
have a flag for tied weights, and start their data at byte 256. Version 2 stores matrices as int8 with a float32 scale
for each group. The tensors of one kind are stored together, layer after layer; wq and wk are in Meta's order. norm_eps
and rope_theta are not stored: llama2.c always uses 1e-5 and 10000.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama.checkpoint.layout import EMBEDDING, OUTPUT, tensor_shapes
from llama.convert.params import feed_forward_params, head_params
from llama.convert.source import ConvertError, Source
from llama.convert.tokenizer import tokenizer_files
from llama.convert.vocab import read_llama2c, sentencepiece_model
from llama.params import ModelArgs
from llama.vocabulary.backend import check_size

MAGIC = b"24ka"  # "ak42" as a little-endian number
HEADER = 256  # bytes before the data in versions 1 and 2
ATTENTION = [f"attention.w{x}.weight" for x in "qkvo"]
FEED_FORWARD = [f"feed_forward.w{n}.weight" for n in (1, 2, 3)]
NORMS = ["attention_norm.weight", "ffn_norm.weight"]
ORDER = {
    0: [EMBEDDING, NORMS[0], *ATTENTION, NORMS[1], *FEED_FORWARD, "norm.weight", "rope", OUTPUT],
    1: [*NORMS, "norm.weight", EMBEDDING, *ATTENTION, *FEED_FORWARD, OUTPUT],
    2: [*NORMS, "norm.weight", EMBEDDING, *ATTENTION, *FEED_FORWARD, OUTPUT],
}


@dataclass
class Header:
    """The header of a file. `start` is the offset of the data."""

    version: int
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    context: int
    tied: bool
    group: int  # how many elements share a scale in version 2, else 0

    @property
    def start(self) -> int:
        return HEADER if self.version else 28


def is_model(path: Path) -> bool:
    """Whether a file is llama2.c's: it has the magic or, for version 0, the size that its header implies."""
    try:
        header = _header(path)
    except ConvertError:
        return True  # it has the magic
    return header is not None and (header.version > 0 or _size(header) == path.stat().st_size)


def read(path: Path) -> Source:
    """Read the header and check that the file has the implied size. Raises ConvertError."""
    try:
        return _read(path)
    except ConvertError as error:
        raise ConvertError(f"{path}: {error}") from error


def _read(path: Path) -> Source:
    header = _header(path)
    if header is None or _size(header) != path.stat().st_size:
        expected = "" if header is None else f", not {_size(header):,}"
        raise ConvertError(f"{path.stat().st_size:,} bytes long{expected}: damaged or cut off, fetch it again")
    params: dict[str, Any] = {
        "dim": header.dim,
        "n_layers": header.n_layers,
        **head_params(header.dim, header.n_heads, header.n_kv_heads, header.dim // header.n_heads),
        "vocab_size": header.vocab_size,
        **feed_forward_params(header.dim, header.hidden_dim),
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    shapes = tensor_shapes(ModelArgs(**params))
    if header.tied:
        del shapes[OUTPUT]
    data = np.memmap(path, dtype=np.uint8, mode="r")
    tensors: dict[str, Callable[[], torch.Tensor]] = {}
    offset = header.start
    for kind in ORDER[header.version]:
        if kind == "rope":
            offset += _rope_bytes(header)
        names = [kind] if kind in shapes else [f"layers.{i}.{kind}" for i in range(header.n_layers)]
        for name in names:
            if name in shapes:
                tensors[name] = _reader(data, offset, shapes[name], header.group)
                offset += _bytes(shapes[name], header.group)
    files, notes = _tokenizer(path, header.vocab_size)
    tensors = {name: tensors[name] for name in shapes}  # in Meta's order
    dtypes = dict.fromkeys(shapes, torch.float32)
    return Source(params, tensors, files, dtypes, max_positions=header.context, notes=notes)


def _header(path: Path) -> Header | None:
    """The header, or None if the file cannot be a model. Raises ConvertError if it has the magic but is damaged."""
    with path.open("rb") as file:
        start = file.read(HEADER)
    version, tied, group = 0, False, 0
    if has_magic := start.startswith(MAGIC):
        if len(start) < HEADER:
            raise ConvertError("damaged or cut off within the header: fetch it again")
        version = struct.unpack_from("<i", start, 4)[0]
        if version not in ORDER or version == 0:
            raise ConvertError(f"version {version} of llama2.c's format is not supported, expected 0, 1 or 2")
        tied = start[36] == 1
        group = struct.unpack_from("<i", start, 37)[0] if version == 2 else 0
    if len(start) < 28:
        return None
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, context = struct.unpack_from(
        "<7i", start, 8 * has_magic
    )
    if version == 0:
        tied, vocab_size = vocab_size > 0, abs(vocab_size)
    sizes = (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, context)
    is_valid = all(0 < size < 2**24 for size in sizes) and n_layers < 2**12
    is_valid = is_valid and dim % n_heads == 0 and n_heads % n_kv_heads == 0
    if is_valid and version == 2:
        matrices = (vocab_size * dim, dim * dim, dim * (dim // n_heads) * n_kv_heads, hidden_dim * dim)
        is_valid = group > 0 and all(numel % group == 0 for numel in matrices)
    if not is_valid:
        if has_magic:
            raise ConvertError(f"the sizes {tuple(sizes)} in its header are invalid: fetch it again")
        return None
    return Header(version, *sizes, tied, group)


def _size(header: Header) -> int:
    """The size in bytes of a file with this header."""
    args = ModelArgs(
        dim=header.dim,
        n_layers=1,
        n_heads=header.n_heads,
        n_kv_heads=header.n_kv_heads,
        vocab_size=header.vocab_size,
        hidden_dim=header.hidden_dim,
    )
    shapes = tensor_shapes(args)
    sizes = {name: _bytes(shape, header.group) for name, shape in shapes.items()}
    if header.tied:
        del sizes[OUTPUT]
    layer = sum(size for name, size in sizes.items() if name.startswith("layers."))
    rope = _rope_bytes(header) if header.version == 0 else 0
    return header.start + sum(sizes.values()) + (header.n_layers - 1) * layer + rope


def _rope_bytes(header: Header) -> int:
    """The size in bytes of version 0's tables of cosines and sines, which are skipped."""
    return 2 * 4 * header.context * (header.dim // header.n_heads // 2)


def _bytes(shape: tuple[int, ...], group: int) -> int:
    """The size in bytes of a stored tensor."""
    numel = math.prod(shape)
    return 4 * numel if group == 0 or len(shape) == 1 else numel + 4 * (numel // group)  # norms are never quantized


def _reader(data: np.ndarray, offset: int, shape: tuple[int, ...], group: int) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        numel, stored = math.prod(shape), np.array(data[offset : offset + _bytes(shape, group)])
        if group == 0 or len(shape) == 1:
            return torch.from_numpy(stored.view(np.float32)).view(shape)
        weights = stored[:numel].view(np.int8).reshape(-1, group).astype(np.float32)
        weights *= stored[numel:].copy().view(np.float32)[:, None]
        return torch.from_numpy(weights).view(shape)

    return read


def _tokenizer(path: Path, vocab_size: int) -> tuple[dict[str, bytes], list[str]]:
    """Return (tokenizer files, notes).

    Reads tokenizer.bin next to the model, or tok4096.bin (4096: the size), as llama2.c names a vocabulary it trained.
    """
    for name in ("tokenizer.bin", f"tok{vocab_size}.bin"):
        if (file := path.with_name(name)).is_file():
            check_size(file)
            pieces = read_llama2c(file.read_bytes(), vocab_size)
            return tokenizer_files({"tokenizer.model": sentencepiece_model(pieces)}, {}, vocab_size), []
    return {}, [f"no tokenizer.bin or tok{vocab_size}.bin is next to {path}: put a tokenizer.model into the new folder"]
