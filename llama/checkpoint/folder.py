"""Meta-style checkpoint folders: consolidated.NN.pth, read at any number of ranks.

A shard file holds one slice of every tensor. What matters here is the logical tensor: each name has one axis along
which shards divide it (`shard_axis`), and rank r of N takes its part of that axis across whichever files hold it.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from llama.checkpoint.shards import FLOAT_TYPES, first, is_read_whole, names_note, open_shard
from llama.console import progress
from llama.files import as_path, describe_path, number_shards
from llama.model import Transformer, TransformerBlock
from llama.parallel.groups import model_parallel
from llama.params import CheckpointError, ModelArgs, load_params

Shapes = dict[str, tuple[int, ...]]  # of tensors, by name
Finish = Callable[[nn.Module], None] | None  # what is done to each layer once its weights are there
EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
# Divided along the output features (0), along the input features (1), or repeated in every file (None).
# tok_embeddings is missing here: Llama 2 files split it on dim 1, Llama 3 files on dim 0.
SHARD_AXIS = {
    "attention.wq.weight": 0,
    "attention.wk.weight": 0,
    "attention.wv.weight": 0,
    "attention.wo.weight": 1,
    "feed_forward.w1.weight": 0,
    "feed_forward.w2.weight": 1,
    "feed_forward.w3.weight": 0,
    "attention_norm.weight": None,
    "ffn_norm.weight": None,
    "norm.weight": None,
    OUTPUT: 0,
}
# What each rank holds below one another in one matrix, as one product uses them: the layers of a block by the name of
# what they make together. In their order here a block's weights are read.
JOINED = {
    "attention.wqkv.weight": ("attention.wq", "attention.wk", "attention.wv"),
    "attention.wo.weight": ("attention.wo",),
    "feed_forward.w13.weight": ("feed_forward.w1", "feed_forward.w3"),
    "feed_forward.w2.weight": ("feed_forward.w2",),
}


def without_layer(key: str) -> str:
    """`layers.7.attention.wq.weight` -> `attention.wq.weight`."""
    return re.sub(r"^layers\.\d+\.", "", key)


def shard_axis(key: str, embedding_axis: int) -> int | None:
    """The axis along which files divide a tensor; None when each repeats it."""
    return embedding_axis if key == EMBEDDING else SHARD_AXIS[without_layer(key)]


def tensor_shapes(args: ModelArgs) -> Shapes:
    """Name -> logical (undivided) shape of every tensor of a model."""
    q_dim, kv_dim = args.n_heads * args.head_dim, args.kv_heads * args.head_dim
    layer = {
        "attention.wq.weight": (q_dim, args.dim),
        "attention.wk.weight": (kv_dim, args.dim),
        "attention.wv.weight": (kv_dim, args.dim),
        "attention.wo.weight": (args.dim, q_dim),
        "feed_forward.w1.weight": (args.hidden_dim, args.dim),
        "feed_forward.w2.weight": (args.dim, args.hidden_dim),
        "feed_forward.w3.weight": (args.hidden_dim, args.dim),
        "attention_norm.weight": (args.dim,),
        "ffn_norm.weight": (args.dim,),
    }
    shapes: Shapes = {EMBEDDING: (args.vocab_size, args.dim)}
    for i in range(args.n_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"norm.weight": (args.dim,), OUTPUT: (args.vocab_size, args.dim)}


def rank_slice(key: str, rows: int, args: ModelArgs, rank: int, world_size: int) -> tuple[int, int]:
    """[start, stop) of this rank on the shard axis of `key`, which is `rows` long."""
    if without_layer(key) in ("attention.wk.weight", "attention.wv.weight"):
        # Whole KV heads; with more ranks than KV heads neighbouring ranks read the same one.
        first = rank * args.kv_heads // world_size
        return first * args.head_dim, (first + max(1, args.kv_heads // world_size)) * args.head_dim
    return rank * rows // world_size, (rank + 1) * rows // world_size


# Files --------------------------------------------------------------------------------------------


class Checkpoint:
    """A folder of consolidated.NN.pth files (or what other tools call them, see `shard`) and their params.json.

    Files are memory-mapped and checked when first asked for, so a rank opens only those it needs; those that cannot be
    mapped are read at once, so that a look at the free memory counts them. Only tensors are ever unpickled
    (weights_only): a file cannot run code.

    params: params.json, with the vocabulary filled in from the embedding where it says -1.
    embedding_axis: 0 where the files divide the vocabulary (Llama 3), 1 where they divide dim (Llama 2).
    dtype: what the embedding is stored in; float32 for float64.
    shapes: name -> logical shape of what the files hold: without output.weight in tied models, whose embedding serves.
    notes: what was done to read a folder that is not as Meta writes them, a line each.
    """

    def __init__(self, ckpt_dir: str | Path):
        folder = as_path(ckpt_dir)
        self.paths = find_shards(folder)
        params, self.notes = load_params(folder)
        self.notes += names_note(dict(enumerate(self.paths)))
        self.params = ModelArgs(**params)
        self._opened: dict[int, dict[str, torch.Tensor]] = {}
        self._open(0)
        if EMBEDDING not in self._opened[0] or self._opened[0][EMBEDDING].dim() != 2:
            raise CheckpointError(f"{self.paths[0]} has no {EMBEDDING}: {_names_instead(self._opened[0])}")
        rows, columns = self._opened[0][EMBEDDING].shape
        self.dtype = computed_dtype(self._opened[0][EMBEDDING].dtype)
        self.embedding_axis = 0 if columns == self.params.dim else 1
        if self.params.vocab_size == -1:
            self.params.vocab_size = rows * len(self.paths) if self.embedding_axis == 0 else rows
        self.shapes = tensor_shapes(self.params)
        if OUTPUT not in self._opened[0]:
            del self.shapes[OUTPUT]
        self._check(0)
        for index in range(len(self.paths)):
            if self.is_read_whole(index):
                self[index]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of one file; none is read before it is copied, unless the file cannot be mapped."""
        if index not in self._opened:
            self._open(index)
            self._check(index)
        return self._opened[index]

    def is_read_whole(self, index: int) -> bool:
        """Whether the file is in memory, as it cannot be mapped."""
        return is_read_whole(self.paths[index])

    def _open(self, index: int) -> None:
        shard = open_shard(self.paths[index])
        self._opened[index] = shard.tensors
        self.add_notes(shard.notes)

    def add_notes(self, notes: list[str]) -> list[str]:
        """Keep those that are new, and return them."""
        new = [note for note in notes if note not in self.notes]
        self.notes += new
        return new

    def copy(self, key: str, start: int, stop: int, out: torch.Tensor) -> None:
        """Fill `out` with [start, stop) of a logical tensor's shard axis, from the files that hold it."""
        axis = shard_axis(key, self.embedding_axis)
        if axis is None:
            # Repeated tensors may differ in their last bits from file to file; all ranks take the first file's.
            out.copy_(self[0][key])
            return
        if key not in self.shapes:  # the output of a tied model: rows of the embedding,
            key = EMBEDDING
            if self.embedding_axis == 1:  # which lie in every file
                for part, index in zip(out.chunk(len(self.paths), dim=1), range(len(self.paths)), strict=True):
                    part.copy_(self[index][key][start:stop])
                return
        width = self[0][key].shape[axis]
        for index in range(start // width, (stop - 1) // width + 1):
            low, high = max(start, index * width), min(stop, (index + 1) * width)
            source = self[index][key].narrow(axis, low - index * width, high - low)
            out.narrow(axis, low - start, high - low).copy_(source)

    def _check(self, index: int) -> None:
        count = len(self.paths)
        if found := shard_faults(self._opened[index], self.shapes, self.embedding_axis, count):
            part = "the whole of" if count == 1 else f"one of {count} parts of"
            what = f"{self.paths[index]} is not {part} the model in params.json (files missing, or another model's?)"
            raise CheckpointError("; ".join([what, *found]))


def shard_faults(tensors: dict[str, torch.Tensor], shapes: Shapes, embedding_axis: int, count: int) -> list[str]:
    """Account for every tensor of one of `count` files, by name: missing, unexpected, of wrong shape or type."""
    expected = {}
    for key, shape in shapes.items():
        parts = list(shape)
        if (axis := shard_axis(key, embedding_axis)) is not None:
            parts[axis] = parts[axis] // count if parts[axis] % count == 0 else -1  # -1: no shape fits
        expected[key] = tuple(parts)
    wrong = [key for key in expected.keys() & tensors.keys() if tuple(tensors[key].shape) != expected[key]]
    faults = {
        "missing": expected.keys() - tensors.keys(),
        "unexpected": tensors.keys() - expected.keys(),
        "wrong shape": {f"{key} {tuple(tensors[key].shape)}, expected {expected[key]}" for key in wrong},
        "wrong type": {f"{key} {t.dtype}" for key, t in tensors.items() if t.dtype not in FLOAT_TYPES},
    }
    return [f"{fault}: {first(names)}" for fault, names in faults.items() if names]


def computed_dtype(stored: torch.dtype) -> torch.dtype:
    """What weights become when nobody names a type: nothing computes in float64."""
    return torch.float32 if stored == torch.float64 else stored


def find_shards(ckpt_dir: Path) -> list[Path]:
    """The files of weights in order; a gap or an empty folder is a CheckpointError with the way out."""
    numbered, _ = number_shards(ckpt_dir)
    if not numbered:
        raise CheckpointError(f"{ckpt_dir} {describe_path(ckpt_dir)}")
    if missing := [f"consolidated.{i:02d}.pth" for i in range(max(numbered)) if i not in numbered]:
        raise CheckpointError(f"{ckpt_dir} lacks {first(missing)}: fetch what is missing")
    return [numbered[i] for i in range(len(numbered))]


def _names_instead(tensors: dict[str, torch.Tensor]) -> str:
    """What a file without an embedding under Meta's name holds, as the end of a sentence."""
    if prefixes := [key.removesuffix(EMBEDDING) for key in tensors if key.endswith(f".{EMBEDDING}")]:
        return f"its names begin with {first(prefixes)!r}, which is not known here: save the model's own state_dict"
    return "not a Llama checkpoint in Meta's layout"


# Loading ------------------------------------------------------------------------------------------


def load_weights(model: Transformer, checkpoint: Checkpoint, dtype: torch.dtype, finish: Finish = None) -> None:
    """Copy this rank's part of every tensor into `model`, in `dtype`, on the device of the model's caches.

    finish: called with each layer as soon as its weights are there, before those of the next are read.
    """
    args, (rank, world_size) = model.params, model_parallel()
    shapes, device = tensor_shapes(args), model.caches[0].k.device
    layers = [(f"layers.{i}", layer) for i, layer in enumerate(model.layers)]
    parts = [("tok_embeddings", model.tok_embeddings), *layers, ("norm", model.norm), ("output", model.output)]
    for name, part in progress(parts, "loading"):
        embedding = model.tok_embeddings.weight
        if part is model.output and OUTPUT not in checkpoint.shapes and part.weight.shape == embedding.shape:
            model.output.weight = embedding  # tied, and the same rows here: held once
            continue
        _allocate(part, dtype, device)
        for key, parameter in part.named_parameters(name):
            axis = shard_axis(key, checkpoint.embedding_axis)
            start, stop = (0, 0) if axis is None else rank_slice(key, shapes[key][axis], args, rank, world_size)
            checkpoint.copy(key, start, stop, parameter.data)
        if finish is not None and part is not model.output:
            finish(part)


def _allocate(part: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Memory for the weights of a part that is on the meta device; they take no gradients."""
    for names in JOINED.values() if isinstance(part, TransformerBlock) else ():
        joined = [part.get_submodule(name) for name in names]
        rows = [len(layer.get_parameter("weight")) for layer in joined]
        whole = torch.empty(sum(rows), joined[0].get_parameter("weight").shape[1], dtype=dtype, device=device)
        for layer, weight in zip(joined, whole.split(rows), strict=True):
            layer.weight = nn.Parameter(weight, requires_grad=False)
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                weight = torch.empty(parameter.shape, dtype=dtype, device=device)
                setattr(module, name, nn.Parameter(weight, requires_grad=False))
