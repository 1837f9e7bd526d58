"""The tensors of a Meta checkpoint: names, shapes, and how they are divided over files and ranks.

Each tensor has one axis along which it is divided (`shard_axis`). File i of M holds the i-th of M equal parts of that
axis, and rank r of N loads the r-th of N (`rank_slice`), from whichever files hold it. So N need not equal M.
"""

import re

import torch

from llama.checkpoint.errors import CheckpointError, some_names
from llama.params import ModelArgs

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]  # of tensors, by name
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
# 0: divided along the output features. 1: along the input features. None: repeated in every file.
# tok_embeddings is not listed, because Llama 2's files divide it along axis 1 and Llama 3's along axis 0.
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
# Weights that are allocated as row blocks of one matrix, so that one matrix product computes all of them: name of the
# matrix -> the linear layers whose rows it holds. A block's matrices are allocated and quantized in this order.
FUSED = {
    "attention.wqkv.weight": ("attention.wq", "attention.wk", "attention.wv"),
    "attention.wo.weight": ("attention.wo",),
    "feed_forward.w13.weight": ("feed_forward.w1", "feed_forward.w3"),
    "feed_forward.w2.weight": ("feed_forward.w2",),
}


def without_layer(key: str) -> str:
    """`layers.7.attention.wq.weight` -> `attention.wq.weight`."""
    return re.sub(r"^layers\.\d+\.", "", key)


def shard_axis(key: str, embedding_axis: int) -> int | None:
    """The axis along which files divide a tensor, or None if every file repeats it."""
    return embedding_axis if key == EMBEDDING else SHARD_AXIS[without_layer(key)]


def tensor_shapes(args: ModelArgs) -> Shapes:
    """Name -> full (undivided) shape of every tensor of a model."""
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


def rank_slice(key: str, size: int, args: ModelArgs, rank: int, world_size: int) -> tuple[int, int]:
    """[start, stop) of this rank on the shard axis of `key`, which has `size` entries."""
    if without_layer(key) in ("attention.wk.weight", "attention.wv.weight"):
        # A KV head is never divided. If there are more ranks than KV heads, neighbouring ranks load the same head.
        head = rank * args.kv_heads // world_size
        return head * args.head_dim, (head + max(1, args.kv_heads // world_size)) * args.head_dim
    return rank * size // world_size, (rank + 1) * size // world_size


def legal_world_sizes(args: ModelArgs) -> list[int]:
    """The numbers of ranks over which a model can be divided."""
    return [
        n
        for n in range(1, args.n_heads + 1)
        if args.n_heads % n == 0
        and args.dim % n == 0
        and args.hidden_dim % n == 0
        and args.vocab_size % n == 0
        and (args.kv_heads % n == 0 or n % args.kv_heads == 0)
    ]


def check_world_size(args: ModelArgs, world_size: int) -> None:
    """Raise CheckpointError, with the legal numbers of ranks, if the model cannot be divided over `world_size`."""
    legal = legal_world_sizes(args)
    if world_size not in legal:
        raise CheckpointError(
            f"{world_size} ranks cannot share this model ({args.n_heads} heads, {args.kv_heads} KV heads, feed-forward "
            f"width {args.hidden_dim}, vocabulary {args.vocab_size}): start {', '.join(map(str, legal))}"
        )


def tensor_problems(tensors: Tensors, shapes: Shapes, embedding_axis: int, count: int) -> list[str]:
    """Find the missing and unexpected tensors of one of `count` files, and those with a wrong shape or dtype.

    shapes: full shapes by name. Returns a line for each kind of problem.
    """
    expected = {}
    for key, shape in shapes.items():
        local = list(shape)
        if (axis := shard_axis(key, embedding_axis)) is not None:
            local[axis] = local[axis] // count if local[axis] % count == 0 else -1  # -1: matches no tensor
        expected[key] = tuple(local)
    wrong = [key for key in expected.keys() & tensors.keys() if tuple(tensors[key].shape) != expected[key]]
    problems = {
        "missing": expected.keys() - tensors.keys(),
        "unexpected": tensors.keys() - expected.keys(),
        "wrong shape": {f"{key} {tuple(tensors[key].shape)}, expected {expected[key]}" for key in wrong},
        "wrong type": {f"{key} {t.dtype}" for key, t in tensors.items() if t.dtype not in FLOAT_TYPES},
    }
    return [f"{problem}: {some_names(sorted(names))}" for problem, names in problems.items() if names]
