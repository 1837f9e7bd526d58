"""The memory that a model needs, computed from its shape alone."""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from llama.accelerate.quantize import MAX_GEMV_ROWS, MAX_TRITON_ROWS, scheme_of, stored_bytes
from llama.checkpoint.errors import CheckpointError
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.layout import EMBEDDING, OUTPUT, rank_slice, shard_axis, tensor_shapes, without_layer
from llama.checkpoint.params_json import load_params
from llama.checkpoint.paths import describe_path, list_shards
from llama.options import PREFILL_CHUNK
from llama.parallel.device import DTYPES
from llama.params import ModelArgs

LLAMA_2_VOCAB = 32000
QUERIES, KEYS, GATES = "layers.0.attention.wq.weight", "layers.0.attention.wk.weight", "layers.0.feed_forward.w1.weight"
# Bytes that sampling needs for each logit: 4 for the logit, the rest for sorted float64 probabilities and ids.
SAMPLING_BYTES = 60
# Buffers of torch's kernels, measured on a CPU with two threads.
CPU_KERNEL_BYTES = 8_000_000
# The workspace that torch allocates for cuBLAS on each stream: on GPUs of compute capability 9.0 or higher, and on
# older ones.
CUBLAS_BYTES, OLD_CUBLAS_BYTES = 32 * 2**20, (2 * 4096 + 8 * 16) * 2**10


@dataclass(frozen=True)
class Sizes:
    """Bytes on each rank: its weights, its KV cache, the rotary tables, and what computing full prompts adds to these
    at its peak (prefill; on CUDA with cuBLAS's workspaces and the memory of CUDA graphs)."""

    weights: int
    cache: int
    rope: int
    prefill: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.rope + self.prefill


def sizes(
    args: ModelArgs,
    world_size: int,
    dtype: torch.dtype,
    *,
    tied: bool = False,
    embedding_axis: int = 0,
    quantize: str | None = None,
    device: str = "cpu",
    prefill_chunk: int = PREFILL_CHUNK,
) -> Sizes:
    """Bytes on each of `world_size` ranks for args.max_batch_size rows of args.max_seq_len positions.

    tied: the embedding is also the output layer. A rank stores one copy if it needs the same part for both and the
    output layer is not quantized. embedding_axis: the axis on which the files split the embedding. It decides whether
    the two parts are the same.
    device: "cpu", "cuda" or "mps". prefill_chunk: as in `Executor`.
    """
    local: dict[str, tuple[int, ...]] = {}  # shapes on this rank; layer 0 stands for all layers
    for key, shape in tensor_shapes(replace(args, n_layers=1)).items():
        parts = list(shape)
        if (axis := shard_axis(key, embedding_axis)) is not None:
            start, stop = rank_slice(key, shape[axis], args, 0, world_size)
            parts[axis] = stop - start
        local[key] = tuple(parts)
    is_shared = tied and local[OUTPUT] == local[EMBEDDING] and scheme_of(OUTPUT, args.dim, quantize) is None
    weights = 0
    for key, shape in local.items():
        times = args.n_layers if key.startswith("layers.") else 0 if is_shared and key == OUTPUT else 1
        rows, columns = shape if len(shape) == 2 else (1, *shape)
        weights += times * stored_bytes(without_layer(key), rows, columns, quantize, dtype.itemsize)
    position = 2 * args.n_layers * local[KEYS][0] * dtype.itemsize  # a key and a value in every layer
    return Sizes(
        weights=weights,
        cache=args.max_batch_size * args.max_seq_len * position,
        # Complex numbers [2 * max_seq_len, head_dim / 2], as many positions as in Meta's table.
        rope=2 * args.max_seq_len * args.head_dim * torch.float32.itemsize,
        prefill=_prefill_bytes(args, local, dtype, quantize, device, prefill_chunk),
    )


def _prefill_bytes(
    args: ModelArgs,
    local: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    quantize: str | None,
    device: str,
    prefill_chunk: int,
) -> int:
    """Peak bytes of computing prompts that fill all rows, in addition to weights, cache and tables. On CUDA the
    memory that CUDA graphs and cuBLAS keep is included.

    Freed memory is not counted. glibc keeps part of it, so a process can grow by twice as much.
    local: the shapes of this rank's weights. Names in the comments are those of `model` and `accelerate.fused`.
    """
    size, dim = dtype.itemsize, args.dim
    q, kv, width = local[QUERIES][0], local[KEYS][0], local[GATES][0]
    part = min(args.max_seq_len, prefill_chunk)
    n = args.max_batch_size * part  # positions computed at a time
    prompts = args.max_batch_size * args.max_seq_len * dim * size  # hidden states of all positions

    def matmul_bytes(key: str, columns: int, rows: int) -> int:
        """Bytes that a matmul of many rows with a quantized weight needs in addition; 0 if it is not quantized: the
        dequantized weight, and q before it is scaled, except for int8. fp8 in bfloat16: the quantized activations and
        float32 copies of them."""
        kind = scheme_of(key, columns, quantize)
        if kind == "fp8" and dtype == torch.bfloat16:
            return 9 * n * columns
        if device == "cuda" and kind is not None:
            return rows * columns * (size + 4 * (kind == "fp8"))
        packed = device == "cpu" and dtype == torch.bfloat16  # torch's packed layout needs one more copy to reorder
        return 0 if kind is None else rows * columns * (size if kind == "int8" else 1 + size + packed * size)

    # In a layer, during RoPE: its input, the norm's output, wqkv(x), and the copies that RoPE makes.
    heads = q + 2 * kv
    copied = q + kv if device == "cuda" else q
    rotary = n * (size * (2 * dim + heads) + copied * (8 if dtype == torch.float32 else 12))
    # During attention: the rotated queries and keys and the result. From the second chunk on all devices but CUDA also
    # need a mask of bools, and a float mask made from it.
    masked = part * args.max_seq_len * (1 + size) if args.max_seq_len > part and device != "cuda" else 0
    attention = n * size * (2 * dim + heads + 2 * q + kv) + masked
    # During the feed-forward: the layer's input, h, the norm's output; w13(x), silu(gate), and the result.
    gates = matmul_bytes("feed_forward.w1.weight", dim, 2 * width)
    result = n * size * (width + dim) + matmul_bytes("feed_forward.w2.weight", width, dim)
    feed_forward = n * size * (3 * dim + 2 * width) + max(gates - n * size * 2 * width, n * size * width, result)
    angles = part * args.head_dim * torch.float32.itemsize
    layer = max(rotary, attention, feed_forward) + angles + prompts * (args.max_seq_len - part) // args.max_seq_len
    joined = 2 * prompts * (args.max_seq_len > part)  # the chunks' hidden states, and their concatenation
    draw = args.max_batch_size * args.vocab_size * SAMPLING_BYTES
    if device != "cpu" or dtype != torch.bfloat16 or args.max_batch_size > MAX_GEMV_ROWS:
        draw += matmul_bytes(OUTPUT, dim, local[OUTPUT][0])
    if device != "cuda":
        return max(layer, joined, draw) + CPU_KERNEL_BYTES
    # CUDA graphs are captured on a stream of their own, which has its own workspace, and have their own memory pool.
    rows = args.max_batch_size
    graph = rows * size * (4 * dim + heads + q + 3 * width) + (gates if rows > MAX_TRITON_ROWS else 0)
    return max(layer, joined, draw) + graph + 2 * _cublas_bytes()


def _cublas_bytes() -> int:
    """Bytes of a workspace on this machine's GPU; without a GPU, on one of compute capability 9.0."""
    is_old = torch.cuda.is_available() and torch.cuda.get_device_capability(None) < (9, 0)
    return OLD_CUBLAS_BYTES if is_old else CUBLAS_BYTES


def count_parameters(args: ModelArgs, tied: bool = False) -> dict[str, int]:
    """Parameters of the undivided model, by component. tied: as in `sizes`."""
    counts = dict.fromkeys(("embedding", "attention", "feed-forward", "norms", "output"), 0)
    for key, shape in tensor_shapes(args).items():
        name = without_layer(key)
        component = {EMBEDDING: "embedding", OUTPUT: "output"}.get(name) or (
            "norms" if len(shape) == 1 else name.partition(".")[0].replace("_", "-")
        )
        counts[component] += prod(shape)
    if tied:
        counts["output"] = 0
    return counts | {"total": sum(counts.values())}


def read_model(path: Path, vocab_size: int | None) -> tuple[ModelArgs, bool, int, list[str]]:
    """Read the model's shape from a checkpoint folder, or from a params.json alone. No weights are read.

    vocab_size: used if params.json does not have it (-1); None: that of Llama 2.
    Returns the shape, whether the embedding is also the output layer, the axis on which the files split the embedding,
    and notes. Raises CheckpointError or ValueError.
    """
    tied, axis, notes = False, 0, list[str]()
    folder = path.parent if path.name == "params.json" and path.is_file() else path
    if not (folder / "params.json").exists():
        raise CheckpointError(f"{path} {describe_path(path)}, or a file named params.json")
    if folder == path and list_shards(folder)[0]:
        checkpoint = Checkpoint(folder)
        args, tied, axis = checkpoint.params, OUTPUT not in checkpoint.shapes, checkpoint.embedding_axis
        notes += checkpoint.notes
    else:
        params, params_notes = load_params(folder)
        args = ModelArgs(**params)
        notes += params_notes
    if args.vocab_size == -1:
        args.vocab_size = vocab_size or LLAMA_2_VOCAB
        if vocab_size is None:
            notes.append(
                f"params.json does not have the vocabulary size (-1): using {LLAMA_2_VOCAB}, that of Llama 1 and 2; "
                "set another with --vocab_size"
            )
    elif vocab_size not in (None, args.vocab_size):
        raise ValueError(f"vocab_size is {vocab_size}, but the model's is {args.vocab_size}: leave it out")
    return args, tied, axis, notes


def sizes_per_rank(
    args: ModelArgs, world_size: int, dtype: str, quantize: str | None, memory: int | None, **options: Any
) -> dict[str, Any]:
    """A row of the plan: `Sizes` in bytes, and with `memory` (bytes of a rank) what fits.

    options: further arguments of `sizes`. max_context: the largest context for one row; max_batch: the largest batch of
    args.max_seq_len positions.
    """

    def size_of(max_seq_len: int, max_batch_size: int) -> Sizes:
        resized = replace(args, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        return sizes(resized, world_size, DTYPES[dtype], quantize=quantize, **options)

    size = size_of(args.max_seq_len, args.max_batch_size)
    row = {"ranks": world_size, "dtype": dtype, "quantize": quantize, **asdict(size), "total": size.total}
    if memory is None:
        return row
    # Contexts beyond a sliding window cannot run with any memory: they are not implemented.
    exceeds_window = args.max_seq_len > (args.sliding_window or sys.maxsize)
    return row | {
        "fits": size.total <= memory and not exceeds_window,
        "max_context": largest(lambda n: size_of(n, 1).total <= memory, args.sliding_window or sys.maxsize),
        "max_batch": 0 if exceeds_window else largest(lambda n: size_of(args.max_seq_len, n).total <= memory),
    }


def largest(fits: Callable[[int], bool], limit: int = sys.maxsize) -> int:
    """The largest integer up to `limit` that fits, 0 if 1 does not. Assumes that all integers below one that fits also
    fit."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
