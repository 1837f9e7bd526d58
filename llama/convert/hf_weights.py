"""Read Hugging Face's weights from safetensors or pytorch_model*.bin, and write them as safetensors.

Besides the names, two things differ from Meta's layout:
- Rotary pairs: element i of a head is rotated with element i + head_dim / 2, in Meta's layout with its neighbour.
  Therefore the rows of wq and wk are in another order.
- Phi-3 stores wq, wk and wv as one matrix, and w1 and w3 as another.
"""

import contextlib
import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from llama.checkpoint.layout import EMBEDDING, OUTPUT, Shapes, tensor_shapes, without_layer
from llama.checkpoint.shards import open_tensors
from llama.checkpoint.zip_integrity import damaged_records, read_zip
from llama.console import progress
from llama.convert.hf_config import read_json, write_json
from llama.convert.params import check_shapes
from llama.convert.source import ConvertError, Source, tensor_bytes
from llama.files import SAFETENSORS, ZIP, detect_format
from llama.params import ModelArgs

NAMES = {EMBEDDING: "model.embed_tokens.weight", "norm.weight": "model.norm.weight", OUTPUT: "lm_head.weight"}
LAYER_NAMES = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
# Phi-3's fused matrices -> Meta's matrices that are their row blocks, in this order.
FUSED = {
    "self_attn.qkv_proj.weight": ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"),
    "mlp.gate_up_proj.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
}
SKIPPED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # in old folders; the model computes it
SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def hf_name(name: str) -> str:
    """Meta's tensor name -> Hugging Face's."""
    if name in NAMES:
        return NAMES[name]
    return f"model.layers.{name.split('.')[1]}.{LAYER_NAMES[without_layer(name)]}"


def interleave(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Reorder the rows of wq or wk [n_heads * head_dim, dim] as Meta does.

    In each head, rows i and i + head_dim / 2 become rows 2i and 2i + 1.
    """
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def deinterleave(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """The inverse of `interleave`."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def n_rotary_heads(name: str, args: ModelArgs) -> int | None:
    """The number of heads of wq and wk, whose rows `interleave` reorders; None for other tensors."""
    return {"attention.wq.weight": args.n_heads, "attention.wk.weight": args.kv_heads}.get(without_layer(name))


# Reading ------------------------------------------------------------------------------------------


@dataclass
class Stored:
    """A tensor in a file, not read yet. read_rows(start, stop) reads its rows [start, stop)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read_rows: Callable[[int, int], torch.Tensor]


def open_weights(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder by Hugging Face's names, not read yet. Raises ConvertError."""
    for name, opener in (("model.safetensors", _open_safetensors), ("pytorch_model.bin", _open_torch)):
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            stored = opener(folder / name)
        elif index.exists():
            stored = _open_indexed(index, opener)
        else:
            continue
        return {name: tensor for name, tensor in stored.items() if not SKIPPED.fullmatch(name)}
    if (folder / "adapter_config.json").exists():
        raise ConvertError("the folder has only an adapter, no model: merge it into its base model first")
    raise ConvertError("the folder has neither model.safetensors nor pytorch_model.bin nor an index: fetch them")


def _open_indexed(index: Path, opener: Callable[[Path], dict[str, Stored]]) -> dict[str, Stored]:
    """The tensors of all files that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ConvertError(f"{index.name} has no weight_map of names to files: fetch it again")
    stored: dict[str, Stored] = {}
    for file in progress(sorted(set(weight_map.values())), "opening"):
        if Path(file).name != file:
            raise ConvertError(f"{index.name} names {file!r}, a file outside the folder: do not trust it")
        if not index.with_name(file).exists():
            raise ConvertError(f"{file} is missing, which {index.name} names: fetch it")
        tensors = opener(index.with_name(file))
        if duplicates := sorted(tensors.keys() & stored.keys()):
            raise ConvertError(f"{file} holds {duplicates[0]}, which another file holds too: fetch the folder again")
        stored |= tensors
    if missing := sorted(weight_map.keys() - stored.keys()):
        file = weight_map[missing[0]]
        raise ConvertError(f"{file} lacks {missing[0]}, which {index.name} names: fetch it again")
    return stored


def _open_safetensors(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    dtypes = {name: dtype for dtype, name in SAFETENSORS_TYPES.items()}
    _check_format(path, SAFETENSORS)
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise ConvertError(f"{path.name} is damaged or cut off ({error}): fetch it again") from error

    def stored(part: Any) -> Stored:
        dtype = part.get_dtype()
        return Stored(tuple(part.get_shape()), dtypes.get(dtype, dtype), lambda start, stop: part[start:stop])

    return {name: stored(part) for name, part in slices.items()}


def _open_torch(path: Path) -> dict[str, Stored]:
    _check_format(path, ZIP)

    def stored(tensor: torch.Tensor) -> Stored:
        return Stored(tuple(tensor.shape), tensor.dtype, lambda start, stop: tensor[start:stop])

    tensors = open_tensors(path)
    if damaged := damaged_records(path, read_zip(path)):
        raise ConvertError(f"{path.name} is damaged in {damaged[0]}: fetch it again")
    return {name: stored(tensor) for name, tensor in tensors.items()}


def _check_format(path: Path, expected: str) -> None:
    kind = detect_format(path)
    if kind not in (None, expected):
        raise ConvertError(f"{path.name} is {kind}, not {expected}: fetch it again")


def split_fused(stored: dict[str, Stored], shapes: Shapes) -> dict[str, Stored]:
    """Replace Phi-3's fused matrices by their parts. shapes: Meta's name -> full shape."""

    def part(fused: Stored, offset: int, shape: tuple[int, ...]) -> Stored:
        return Stored(shape, fused.dtype, lambda start, stop: fused.read_rows(offset + start, offset + stop))

    split = dict(stored)
    for name, fused in stored.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None or match[2] not in FUSED:
            continue
        members = {
            key: shapes.get(key, (0, 0)) for key in (f"layers.{match[1]}.{member}" for member in FUSED[match[2]])
        }
        expected = (sum(shape[0] for shape in members.values()), next(iter(members.values()))[1])
        check_shapes({name: fused.shape}, {name: expected})
        del split[name]
        offset = 0
        for key, shape in members.items():
            split[hf_name(key)] = part(fused, offset, shape)
            offset += shape[0]
    return split


# Writing ------------------------------------------------------------------------------------------


def write_weights(source: Source, folder: Path, dtypes: dict[str, torch.dtype], shards: int) -> None:
    """Write safetensors files of about equal size, and an index if there are several. Raises ConvertError."""
    args = source.args
    shapes = {name: tensor_shapes(args)[name] for name in source.tensors}
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    total, offset = sum(sizes.values()), 0
    groups: list[list[str]] = [[] for _ in range(shards)]
    # Each tensor goes to the file that would hold its middle byte if the total were divided equally over the files.
    for name, size in sizes.items():
        groups[(2 * offset + size) * shards // (2 * total)].append(name)
        offset += size
    if not all(groups):
        raise ConvertError(f"--shards {shards} would leave a file empty, as tensors are not divided: use fewer")
    files = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    if shards == 1:
        files = ["model.safetensors"]
    with contextlib.ExitStack() as stack:
        file_of: dict[str, BinaryIO] = {}
        for file, group in zip(files, groups, strict=True):
            out = stack.enter_context((folder / file).open("wb"))
            out.write(_header({hf_name(name): (shapes[name], dtypes[name]) for name in group}))
            file_of |= dict.fromkeys(group, out)
        for name in progress(list(shapes), "converting"):
            tensor, heads = source.read(name, dtypes[name]), n_rotary_heads(name, args)
            file_of[name].write(tensor_bytes(tensor if heads is None else deinterleave(tensor, heads)))
    if shards > 1:
        weight_map = {hf_name(name): file for file, group in zip(files, groups, strict=True) for name in group}
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _header(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> bytes:
    """The header of a safetensors file: the length of a JSON text in 8 bytes, and the text."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (shape, dtype) in tensors.items():
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_TYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    return struct.pack("<Q", len(text)) + text
