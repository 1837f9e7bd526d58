"""What a model takes in memory, before anything is loaded: the function behind `python -m llama plan`."""

import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from decimal import Decimal
from json import dumps
from math import prod
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint import (
    EMBEDDING,
    OUTPUT,
    Checkpoint,
    check_world_size,
    legal_world_sizes,
    rank_slice,
    shard_axis,
    tensor_shapes,
    without_layer,
)
from llama.device import DTYPES
from llama.params import CheckpointError, ModelArgs, read_params
from llama.request import check_whole
from llama.sniff import what_instead

LLAMA_2_VOCAB = 32000
KEYS_AND_VALUES = ("attention.wk.weight", "attention.wv.weight")
UNITS = (
    {"B": 1}
    | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
    | {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}
)
LEFT_OUT = (
    "Not in it: the activations and logits of a forward, and what torch itself takes (leave room for them, "
    "the more the longer the prompts)."
)


@dataclass(frozen=True)
class Sizes:
    """Bytes that each rank holds: its weights, its KV cache, the rotary tables."""

    weights: int
    cache: int
    rope: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.rope


def sizes(
    args: ModelArgs, world_size: int, dtype: torch.dtype, *, tied: bool = False, embedding_axis: int = 0
) -> Sizes:
    """What each of `world_size` ranks holds for args.max_batch_size rows of args.max_seq_len positions.

    tied: the embedding serves as the output. embedding_axis: how the files divide it, which matters where it does: a
    rank that has the same rows of both holds them once.
    """
    local: dict[str, tuple[int, ...]] = {}
    for key, shape in tensor_shapes(args).items():
        parts = list(shape)
        if (axis := shard_axis(key, embedding_axis)) is not None:
            start, stop = rank_slice(key, shape[axis], args, 0, world_size)
            parts[axis] = stop - start
        local[key] = tuple(parts)
    if tied and local[OUTPUT] == local[EMBEDDING]:
        del local[OUTPUT]
    # A position of the cache holds what wk and wv make of it, in every layer.
    position = sum(shape[0] for key, shape in local.items() if without_layer(key) in KEYS_AND_VALUES)
    return Sizes(
        weights=sum(prod(shape) for shape in local.values()) * dtype.itemsize,
        cache=args.max_batch_size * args.max_seq_len * position * dtype.itemsize,
        rope=args.max_seq_len * args.head_dim * torch.float32.itemsize,  # cos and sin for every second of head_dim
    )


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
) -> None:
    """Print what the model in `path` takes in memory, at each number of ranks that it can be divided over.

    path: a checkpoint folder, or a params.json alone. No weights are read.
    max_seq_len, max_batch_size: positions and rows that the KV cache has room for.
    ranks: this number of ranks only. dtype: float32, bfloat16 or float16 only.
    memory: what each rank has, "12GB" or "12GiB": tells what fits, and the largest context (for one row) and batch
    (of max_seq_len positions) that do.
    vocab_size: where params.json does not say it (-1).
    json: one object with bytes in place of tables.
    """
    for name, value in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
        check_whole(name, value, 1)
    for name, whole in (("ranks", ranks), ("vocab_size", vocab_size)):
        if whole is not None:
            check_whole(name, whole, 1)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected {', '.join(DTYPES)}")
    available = None if memory is None else read_bytes(memory)
    args, tied, axis, notes = _read(Path(str(path)), vocab_size)
    args.max_seq_len, args.max_batch_size = max_seq_len, max_batch_size
    if args.sliding_window is not None and max_seq_len > args.sliding_window:
        notes.append(f"max_seq_len {max_seq_len} goes beyond the sliding window: {args.sliding_window} at most can run")
    if ranks is not None:
        check_world_size(args, ranks)
    rows = [
        _row(args, world_size, kind, available, sizes(args, world_size, DTYPES[kind], tied=tied, embedding_axis=axis))
        for kind in ([dtype] if dtype else ["float32", "bfloat16"])
        for world_size in ([ranks] if ranks else legal_world_sizes(args))
    ]
    if json:
        answer = {"path": str(path), "parameters": count_parameters(args, tied), "tied": tied}
        answer |= {name: getattr(args, name) for name in ("vocab_size", "max_seq_len", "max_batch_size")}
        print(dumps(answer | {"memory": available, "per_rank": rows, "notes": [*notes, LEFT_OUT]}))
        return
    print("\n".join(_tables(args, count_parameters(args, tied), rows, memory, dtype)))
    print("\n".join(["", *(f"note: {note}" for note in notes), LEFT_OUT]))


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
        raise CheckpointError(f"{path} {what_instead(path)}, or a file named params.json")
    if folder == path and any(folder.glob("consolidated.*.pth")):
        checkpoint = Checkpoint(folder)
        args, tied, axis = checkpoint.params, OUTPUT not in checkpoint.shapes, checkpoint.embedding_axis
    else:
        args = read_params(folder)
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


def _row(args: ModelArgs, world_size: int, dtype: str, memory: int | None, size: Sizes) -> dict[str, Any]:
    row = {"ranks": world_size, "dtype": dtype, **asdict(size), "total": size.total}
    if memory is None:
        return row
    rope, cache = size.rope // args.max_seq_len, size.cache // args.max_seq_len // args.max_batch_size  # a position's
    context = min((memory - size.weights) // (rope + cache), args.sliding_window or sys.maxsize)
    batch = (memory - size.weights - size.rope) // (cache * args.max_seq_len)
    slides = args.max_seq_len > (args.sliding_window or sys.maxsize)  # no memory makes that run
    return row | {
        "fits": size.total <= memory and not slides,
        "max_context": max(0, context),
        "max_batch": 0 if slides else max(0, batch),
    }


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
    yield f"Each rank holds, in MiB, with a KV cache for {rowed}:"
    yield ""
    head = ["dtype", "ranks", "weights", "cache", "RoPE", "total"]
    if memory is not None:
        head += [f"fits {memory}", "context at batch 1", f"batch at {args.max_seq_len:,}"]
    cells = []
    for row in rows:
        name = "bf16/fp16" if row["dtype"] == "bfloat16" and dtype is None else row["dtype"]
        cell = [name, str(row["ranks"]), *(f"{row[key] / 2**20:,.1f}" for key in ("weights", "cache", "rope", "total"))]
        if memory is not None:
            cell += ["yes" if row["fits"] else "no", f"{row['max_context']:,}", f"{row['max_batch']:,}"]
        cells.append(cell)
    yield from _aligned([head, *cells])


def _aligned(cells: list[list[str]]) -> Iterable[str]:
    """Columns two spaces apart: the first one to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        yield "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))])
