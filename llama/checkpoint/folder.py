"""Load a folder of consolidated.NN.pth files on any number of ranks."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from llama.checkpoint.errors import CheckpointError, some_names
from llama.checkpoint.layout import (
    EMBEDDING,
    FUSED,
    OUTPUT,
    Tensors,
    rank_slice,
    shard_axis,
    tensor_problems,
    tensor_shapes,
)
from llama.checkpoint.params_json import load_params
from llama.checkpoint.paths import find_shards, renamed_note
from llama.checkpoint.shards import needs_full_read, open_shard
from llama.checkpoint.transfer import open_transfer
from llama.console import progress
from llama.files import as_path
from llama.model import Transformer, TransformerBlock
from llama.parallel.groups import model_parallel
from llama.params import ModelArgs

Finish = Callable[[nn.Module], None] | None  # called with each block once its weights are loaded


class Checkpoint:
    """A folder of shards (consolidated.NN.pth, or other tools' names for them) and their params.json.

    Shards are memory-mapped and checked when first used, so a rank opens only those it needs. Shards that cannot be
    mapped are read immediately, so that the later check of free memory counts them. Files are loaded with
    weights_only=True, so they cannot run code.

    params: params.json. If its vocab_size is -1, the size is taken from the embedding.
    embedding_axis: 0 if the shards divide the vocabulary (Llama 3), 1 if they divide dim (Llama 2).
    dtype: the dtype of the stored embedding, or float32 if that is float64.
    shapes: name -> full shape of each tensor in the shards. Tied models use the embedding as output and have no
    output.weight.
    notes: a line for each difference from Meta's layout, and how it was handled.
    """

    def __init__(self, ckpt_dir: str | Path):
        folder = as_path(ckpt_dir)
        self.paths = find_shards(folder)
        params, self.notes = load_params(folder)
        self.notes += renamed_note(dict(enumerate(self.paths)))
        self.params = ModelArgs(**params)
        self._opened: dict[int, Tensors] = {}
        self._open(0)
        if EMBEDDING not in self._opened[0] or self._opened[0][EMBEDDING].dim() != 2:
            raise CheckpointError(f"{self.paths[0]} has no {EMBEDDING}: {_explain_names(self._opened[0])}")
        rows, columns = self._opened[0][EMBEDDING].shape
        self.dtype = compute_dtype(self._opened[0][EMBEDDING].dtype)
        self.embedding_axis = 0 if columns == self.params.dim else 1
        if self.params.vocab_size == -1:
            self.params.vocab_size = rows * len(self.paths) if self.embedding_axis == 0 else rows
        self.shapes = tensor_shapes(self.params)
        if OUTPUT not in self._opened[0]:
            del self.shapes[OUTPUT]
        self._check(0)
        for index in range(len(self.paths)):
            if self.needs_full_read(index):
                self[index]

    def __getitem__(self, index: int) -> Tensors:
        """The tensors of one shard. A mapped shard is read from disk only when its tensors are copied."""
        if index not in self._opened:
            self._open(index)
            self._check(index)
        return self._opened[index]

    def needs_full_read(self, index: int) -> bool:
        """Whether the shard cannot be memory-mapped and is kept in memory."""
        return needs_full_read(self.paths[index])

    def _open(self, index: int) -> None:
        shard = open_shard(self.paths[index])
        self._opened[index] = shard.tensors
        self.add_notes(shard.notes)

    def add_notes(self, notes: list[str]) -> list[str]:
        """Add the notes that are new, and return them."""
        new = [note for note in notes if note not in self.notes]
        self.notes += new
        return new

    def copy(self, key: str, start: int, stop: int, out: torch.Tensor) -> None:
        """Copy [start, stop) of a tensor's shard axis into `out`, from the shards that hold it."""
        for source, target in self.pieces(key, start, stop, out):
            target.copy_(source)

    def pieces(self, key: str, start: int, stop: int, out: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What `copy` copies: (view of a shard's tensor, view of `out`), for each shard that holds a part."""
        axis = shard_axis(key, self.embedding_axis)
        if axis is None:
            # Repeated tensors may differ in their last bits from shard to shard; all ranks use the first shard's.
            yield self[0][key], out
            return
        if key not in self.shapes:  # the output of a tied model, which is the embedding
            key = EMBEDDING
            if self.embedding_axis == 1:  # ranks need rows, and each shard has some columns of all rows
                for columns, index in zip(out.chunk(len(self.paths), dim=1), range(len(self.paths)), strict=True):
                    yield self[index][key][start:stop], columns
                return
        width = self[0][key].shape[axis]
        for index in range(start // width, (stop - 1) // width + 1):
            low, high = max(start, index * width), min(stop, (index + 1) * width)
            source = self[index][key].narrow(axis, low - index * width, high - low)
            yield source, out.narrow(axis, low - start, high - low)

    def _check(self, index: int) -> None:
        count = len(self.paths)
        if problems := tensor_problems(self._opened[index], self.shapes, self.embedding_axis, count):
            expected = "the only shard" if count == 1 else f"one of {count} shards"
            mismatch = f"{self.paths[index]} does not match params.json as {expected}"
            raise CheckpointError("; ".join([f"{mismatch} (files missing, or another model's?)", *problems]))


def compute_dtype(stored: torch.dtype) -> torch.dtype:
    """The default dtype for weights stored as `stored`: the same, but float32 for float64."""
    return torch.float32 if stored == torch.float64 else stored


def _explain_names(tensors: Tensors) -> str:
    """The probable reason why a file has no embedding under Meta's name, as the end of a message."""
    if prefixes := [key.removesuffix(EMBEDDING) for key in tensors if key.endswith(f".{EMBEDDING}")]:
        return (
            f"its names begin with {some_names(sorted(prefixes))!r}, an unknown prefix: save the model's own state_dict"
        )
    return "not a Llama checkpoint in Meta's layout"


def load_weights(model: Transformer, checkpoint: Checkpoint, dtype: torch.dtype, finish: Finish = None) -> None:
    """Copy this rank's slice of every tensor into `model`, in `dtype`, on the device of the model's caches.

    finish: called with each layer except the output, as soon as its weights are loaded and before the next layer's
    weights are read.
    """
    args, (rank, world_size) = model.params, model_parallel()
    shapes, device = tensor_shapes(args), model.caches[0].k.device
    blocks = [(f"layers.{i}", block) for i, block in enumerate(model.layers)]
    layers = [("tok_embeddings", model.tok_embeddings), *blocks, ("norm", model.norm), ("output", model.output)]
    with open_transfer(device) as transfer:
        for name, layer in progress(layers, "loading"):
            embedding = model.tok_embeddings.weight
            if layer is model.output and OUTPUT not in checkpoint.shapes and layer.weight.shape == embedding.shape:
                model.output.weight = embedding  # tied, and this rank needs the same rows of both: share the memory
                continue
            _allocate(layer, dtype, device)
            for key, parameter in layer.named_parameters(name):
                axis = shard_axis(key, checkpoint.embedding_axis)
                start, stop = (0, 0) if axis is None else rank_slice(key, shapes[key][axis], args, rank, world_size)
                for source, target in checkpoint.pieces(key, start, stop, parameter.data):
                    transfer.copy(source, target)
            transfer.wait()
            if finish is not None and layer is not model.output:
                finish(layer)


def _allocate(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replace parameters that are on the meta device with uninitialized ones on `device` that need no gradient."""
    for names in FUSED.values() if isinstance(layer, TransformerBlock) else ():
        members = [layer.get_submodule(name) for name in names]
        rows = [len(member.get_parameter("weight")) for member in members]
        fused = torch.empty(sum(rows), members[0].get_parameter("weight").shape[1], dtype=dtype, device=device)
        for member, weight in zip(members, fused.split(rows), strict=True):
            member.weight = nn.Parameter(weight, requires_grad=False)
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                weight = torch.empty(parameter.shape, dtype=dtype, device=device)
                setattr(module, name, nn.Parameter(weight, requires_grad=False))
