"""Writing a folder in Meta's layout: consolidated.NN.pth, params.json, checklist.chk."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint import EMBEDDING, SHARD_AXIS, legal_world_sizes, without_layer
from llama.distributed import progress
from llama.params import ModelArgs


class ConvertError(ValueError):
    """The conversion cannot be done; the message says why and what would do."""


@dataclass
class Source:
    """A model of another format: what will be in its folder, with the weights still in their file.

    params: the keys of params.json, vocab_size included.
    tensors: Meta's name -> a call that reads this logical tensor.
    files: text of the further files (tokenizer) by name.
    """

    params: dict[str, Any]
    tensors: dict[str, Callable[[], torch.Tensor]]
    files: dict[str, str]


def check_shards(args: ModelArgs, shards: int) -> None:
    """Files hold whole heads, none of them twice: the runner's world sizes without those that repeat KV heads."""
    legal = [n for n in legal_world_sizes(args) if args.kv_heads % n == 0]
    if isinstance(shards, bool) or shards not in legal:
        raise ConvertError(
            f"this model cannot be divided over {shards!r} files ({args.n_heads} heads, {args.kv_heads} KV heads, "
            f"feed-forward width {args.hidden_dim}, vocabulary {args.vocab_size}): --shards takes "
            f"{', '.join(map(str, legal))}"
        )


def write_folder(source: Source, folder: Path, dtype: torch.dtype, shards: int) -> None:
    """Fill an empty folder. Holds the model once in `dtype`, plus one tensor as its file stores it."""
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for name, read in progress(list(source.tensors.items()), "converting"):
        tensor = read()
        axis = 1 if name == EMBEDDING else SHARD_AXIS[without_layer(name)]  # the embedding as in Llama 2's files
        for i, file in enumerate(files):
            part = tensor
            if axis is not None:
                width = tensor.shape[axis] // shards
                part = tensor.narrow(axis, i * width, width)
            # A copy even where nothing changes: torch.save writes the whole storage that lies under a view.
            file[name] = part.to(dtype, copy=True, memory_format=torch.contiguous_format)
    for i, file in enumerate(files):
        torch.save(file, folder / f"consolidated.{i:02d}.pth")
        file.clear()
    (folder / "params.json").write_text(json.dumps(source.params) + "\n", encoding="utf-8")
    for filename, text in source.files.items():
        (folder / filename).write_text(text, encoding="utf-8")
    lines = [f"{md5(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / "checklist.chk").write_text("".join(lines), encoding="utf-8")


def md5(path: Path) -> str:
    """Hexadecimal MD5 of a file, as Meta's checklists hold it."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
