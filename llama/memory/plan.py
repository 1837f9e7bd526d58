"""What a model takes in memory, before anything is loaded: the function behind `python -m llama plan`."""

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from json import dumps
from math import prod
from pathlib import Path
from typing import Any

import torch

from llama.accelerate.executor import PREFILL_CHUNK
from llama.accelerate.quantize import FEW_ROWS, SCHEMES, scheme_of, stored_bytes
from llama.checkpoint.errors import CheckpointError
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.layout import (
    EMBEDDING,
    OUTPUT,
    check_world_size,
    legal_world_sizes,
    rank_slice,
    shard_axis,
    tensor_shapes,
    without_layer,
)
from llama.checkpoint.params_json import load_params
from llama.checkpoint.paths import describe_path, list_shards
from llama.engine.requests import check_int
from llama.files import as_path
from llama.parallel.device import DTYPES
from llama.params import ModelArgs

LLAMA_2_VOCAB = 32000
QUERIES, KEYS, GATES = "layers.0.attention.wq.weight", "layers.0.attention.wk.weight", "layers.0.feed_forward.w1.weight"
UNITS = (
    {"B": 1}
    | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
    | {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}
)
LEFT_OUT = (
    "Prefill is the peak of computing full prompts on a {device}. Not in it: the interpreter and torch themselves, "
    "logits of other positions than the last (scoring), and freed memory that the allocator keeps."
)
# What a full draw of ids takes for each logit: 4 bytes for itself, and float64 numbers and ids sorted by probability.
SAMPLED = 60
# Buffers of torch's kernels and the like, measured on a CPU with two threads.
KERNELS = 8_000_000


@dataclass(frozen=True)
class Sizes:
    """Bytes that each rank holds: its weights, its KV cache, the rotary tables; and what computing full prompts takes
    besides, at its peak."""

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
) -> Sizes:
    """What each of `world_size` ranks holds for args.max_batch_size rows of args.max_seq_len positions.

    tied: the embedding serves as the output. embedding_axis: how the files divide it, which matters where it does: a
    rank that has the same rows of both holds them once, unless the output is quantized. device: "cpu", "cuda" or "mps".
    """
    local: dict[str, tuple[int, ...]] = {}  # of one layer: all are alike
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
        # A complex number for every second of head_dim, at twice as many positions: as long as Meta's table.
        rope=2 * args.max_seq_len * args.head_dim * torch.float32.itemsize,
        prefill=_prefill(args, local, dtype, quantize, device),
    )


def _prefill(
    args: ModelArgs, local: dict[str, tuple[int, ...]], dtype: torch.dtype, quantize: str | None, device: str
) -> int:
    """The most bytes that stand in memory while all rows are filled with prompts, beyond what stands there anyway.

    What is freed is not counted. glibc keeps part of it for later, so that a process can grow by twice as much.
    local: the shapes of this rank's weights. The names below are those of `model` and `executor`.
    """
    size, dim = dtype.itemsize, args.dim
    q, kv, width = local[QUERIES][0], local[KEYS][0], local[GATES][0]
    part = min(args.max_seq_len, PREFILL_CHUNK)
    n = args.max_batch_size * part  # positions computed at a time
    prompts = args.max_batch_size * args.max_seq_len * dim * size  # the hidden states of all

    def widened(key: str, columns: int, rows: int) -> int:
        """A quantized weight in full, and its numbers before they are scaled."""
        kind = scheme_of(key, columns, quantize)
        packed = device == "cpu" and dtype == torch.bfloat16  # in the order of torch's kernel: once more, reordered
        return 0 if kind is None else rows * columns * (size if kind == "int8" else 1 + size + packed * size)

    # Of a layer: its input, the sum behind attention or the norm's output, wqkv(x) and what comes of it.
    heads = q + 2 * kv
    rotary = n * (size * (2 * dim + heads) + q * (8 if dtype == torch.float32 else 12))
    # The result, and queries and keys, turned. Where a part looks back on others, a CPU makes a mask of truths, and
    # one of numbers from it.
    masked = part * args.max_seq_len * (1 + size) if args.max_seq_len > part and device != "cuda" else 0
    attention = n * size * (2 * dim + heads + 2 * q + kv) + masked
    # The layer's input, the sum, the norm's output; gates and values, the gates once more, and the result.
    gates = widened("feed_forward.w1.weight", dim, 2 * width)
    result = n * size * (width + dim) + widened("feed_forward.w2.weight", width, dim)
    feed_forward = n * size * (3 * dim + 2 * width) + max(gates - n * size * 2 * width, n * size * width, result)
    angles = part * args.head_dim * torch.float32.itemsize
    layer = max(rotary, attention, feed_forward) + angles + prompts * (args.max_seq_len - part) // args.max_seq_len
    joined = 2 * prompts * (args.max_seq_len > part)  # the parts, and all of them in one
    draw = args.max_batch_size * args.vocab_size * SAMPLED
    if device != "cpu" or dtype != torch.bfloat16 or args.max_batch_size > FEW_ROWS:
        draw += widened(OUTPUT, dim, local[OUTPUT][0])
    return max(layer, joined, draw) + KERNELS


def count_parameters(args: ModelArgs, tied: bool = False) -> dict[str, int]:
    """Numbers in the undivided model, by component."""
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


def plan(
    path: str,
    max_seq_len: int = 2048,
    max_batch_size: int = 1,
    ranks: int | None = None,
    dtype: str | None = None,
    memory: str | None = None,
    vocab_size: int | None = None,
    json: bool = False,
    quantize: str | None = None,
    device: str = "cpu",
) -> None:
    """Print what the model in `path` takes in memory, at each number of ranks that it can be divided over.

    path: a checkpoint folder, or a params.json alone. No weights are read.
    max_seq_len, max_batch_size: positions and rows that the KV cache has room for, and that prompts fill.
    ranks: this number of ranks only. dtype: float32, bfloat16 or float16 only. quantize: int8 or int4 only, beside
    `dtype` (bfloat16 unless it is given) in the cache and where weights are not quantized.
    memory: what each rank has, "12GB" or "12GiB": tells what fits, and the largest context (for one row) and batch
    (of max_seq_len positions) that do.
    vocab_size: where params.json does not say it (-1).
    json: one object with bytes in place of tables.
    device: cpu or cuda, what prompts are computed on.
    """
    for name, value in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
        check_int(name, value, 1)
    for name, whole in (("ranks", ranks), ("vocab_size", vocab_size)):
        if whole is not None:
            check_int(name, whole, 1)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected {', '.join(DTYPES)}")
    if quantize not in (None, *SCHEMES):
        raise ValueError(f"quantize {quantize!r}: expected {' or '.join(SCHEMES)}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r}: expected cpu or cuda")
    available = None if memory is None else read_bytes(memory)
    args, tied, axis, notes = _read(as_path(path), vocab_size)
    args.max_seq_len, args.max_batch_size = max_seq_len, max_batch_size
    if args.sliding_window is not None and max_seq_len > args.sliding_window:
        notes.append(f"max_seq_len {max_seq_len} goes beyond the sliding window: {args.sliding_window} at most can run")
    if ranks is not None:
        check_world_size(args, ranks)
    kinds = [(dtype or "bfloat16", quantize)]
    if dtype is None and quantize is None:
        kinds = [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("bfloat16", "int4")]
    rows = [
        _row(args, world_size, kind, scheme, available, tied=tied, embedding_axis=axis, device=device)
        for kind, scheme in kinds
        for world_size in ([ranks] if ranks else legal_world_sizes(args))
    ]
    notes.append(LEFT_OUT.format(device={"cpu": "CPU", "cuda": "GPU"}[device]))
    if json:
        answer = {"path": str(path), "parameters": count_parameters(args, tied), "tied": tied}
        answer |= {name: getattr(args, name) for name in ("vocab_size", "max_seq_len", "max_batch_size")}
        print(dumps(answer | {"memory": available, "per_rank": rows, "notes": notes}))
        return
    print("\n".join(_tables(args, count_parameters(args, tied), rows, memory, dtype)))
    print("\n".join(["", *(f"note: {note}" for note in notes[:-1]), notes[-1]]))


def read_bytes(text: str) -> int:
    """12GB is 12 * 1000^3 bytes, 12GiB 12 * 1024^3. Raises ValueError for what is no such size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]+)", str(text).strip(), re.IGNORECASE | re.ASCII)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    size = int(Decimal(match[1]) * units[match[2].lower()]) if match and match[2].lower() in units else 0
    if size <= 0:
        raise ValueError(
            f"memory {text!r}: expected a number and its unit, 12GB or 11.5GiB (units: {', '.join(UNITS)})"
        )
    return size


def _read(path: Path, vocab_size: int | None) -> tuple[ModelArgs, bool, int, list[str]]:
    """The model's shape, whether it is tied, the axis on which its files divide the embedding, and notes."""
    tied, axis, notes = False, 0, list[str]()
    folder = path.parent if path.name == "params.json" and path.is_file() else path
    if not (folder / "params.json").exists():
        raise CheckpointError(f"{path} {describe_path(path)}, or a file named params.json")
    if folder == path and list_shards(folder)[0]:
        checkpoint = Checkpoint(folder)
        args, tied, axis = checkpoint.params, OUTPUT not in checkpoint.shapes, checkpoint.embedding_axis
        notes += checkpoint.notes
    else:
        params, found = load_params(folder)
        args = ModelArgs(**params)
        notes += found
    if args.vocab_size == -1:
        args.vocab_size = vocab_size or LLAMA_2_VOCAB
        if vocab_size is None:
            notes.append(
                f"params.json leaves the vocabulary open (-1): {LLAMA_2_VOCAB} taken, that of Llama 1 and 2; "
                "--vocab_size names another"
            )
    elif vocab_size not in (None, args.vocab_size):
        raise ValueError(f"vocab_size is {vocab_size}, but the model's is {args.vocab_size}: leave it out")
    return args, tied, axis, notes


def _row(
    args: ModelArgs, world_size: int, dtype: str, quantize: str | None, memory: int | None, **options: Any
) -> dict[str, Any]:
    def size_of(max_seq_len: int, max_batch_size: int) -> Sizes:
        asked = replace(args, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        return sizes(asked, world_size, DTYPES[dtype], quantize=quantize, **options)

    size = size_of(args.max_seq_len, args.max_batch_size)
    row = {"ranks": world_size, "dtype": dtype, "quantize": quantize, **asdict(size), "total": size.total}
    if memory is None:
        return row
    slides = args.max_seq_len > (args.sliding_window or sys.maxsize)  # no memory makes that run
    return row | {
        "fits": size.total <= memory and not slides,
        "max_context": largest(lambda n: size_of(n, 1).total <= memory, args.sliding_window or sys.maxsize),
        "max_batch": 0 if slides else largest(lambda n: size_of(args.max_seq_len, n).total <= memory),
    }


def largest(fits: Callable[[int], bool], limit: int = sys.maxsize) -> int:
    """The largest number up to `limit` that fits, 0 where 1 does not; of two numbers the smaller needs less."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# Tables -------------------------------------------------------------------------------------------


def _tables(
    args: ModelArgs, counts: dict[str, int], rows: list[dict[str, Any]], memory: str | None, dtype: str | None
) -> Iterable[str]:
    yield (
        f"{args.n_layers} layers, dim {args.dim}, {args.n_heads} heads of {args.head_dim}, {args.kv_heads} KV heads, "
        f"feed-forward {args.hidden_dim}, vocabulary {args.vocab_size}"
    )
    yield ""
    yield from _aligned([["component", "parameters"], *([name, f"{count:,}"] for name, count in counts.items())])
    yield ""
    rowed = f"{args.max_batch_size} row{'s' * (args.max_batch_size > 1)} of {args.max_seq_len:,} positions"
    yield f"Each rank takes, in MiB, with a KV cache for {rowed}, filled by prompts:"
    yield ""
    columns = {"weights": "weights", "cache": "cache", "rope": "RoPE", "prefill": "prefill", "total": "total"}
    head = ["dtype", "ranks", *columns.values()]
    if memory is not None:
        head += [f"fits {memory}", "context at batch 1", f"batch at {args.max_seq_len:,}"]
    cells = []
    for row in rows:
        name = row["quantize"] or ("bf16/fp16" if row["dtype"] == "bfloat16" and dtype is None else row["dtype"])
        cell = [name, str(row["ranks"]), *(f"{row[key] / 2**20:,.1f}" for key in columns)]
        if memory is not None:
            cell += ["yes" if row["fits"] else "no", f"{row['max_context']:,}", f"{row['max_batch']:,}"]
        cells.append(cell)
    yield from _aligned([head, *cells])


def _aligned(cells: list[list[str]]) -> Iterable[str]:
    """Columns two spaces apart: the first one to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        yield "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))])
