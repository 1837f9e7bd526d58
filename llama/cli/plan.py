"""`llama plan`: the memory that a model needs, without loading it."""

import re
from decimal import Decimal
from json import dumps
from typing import Any

import click

from llama.checkpoint.layout import check_world_size, legal_world_sizes
from llama.cli.command import Command, flag, options
from llama.console import print_table
from llama.files import as_path
from llama.memory.sizes import count_parameters, read_model, sizes_per_rank
from llama.options import DTYPES, PREFILL_CHUNK, SCHEMES, BuildOptions, ModelOptions, check_int, declared
from llama.params import ModelArgs

UNITS = (
    {"B": 1}
    | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
    | {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}
)
DEVICES = {"cpu": "CPU", "cuda": "GPU, with cuBLAS's workspaces and CUDA graphs"}
LEFT_OUT = (
    "Prefill is the peak of computing full prompts on a {device}. Not included: the interpreter and torch themselves, "
    "logits of positions other than the last (scoring), and freed memory that the allocator keeps."
)


@click.command(cls=Command)
@click.argument("path")
@options(
    ModelOptions,
    without=("ckpt_dir", "tokenizer_path", "model_parallel_size", "seed"),
    max_seq_len=2048,
    max_batch_size=1,
)
@flag("prefill_chunk", declared(BuildOptions)["prefill_chunk"], PREFILL_CHUNK)
@click.option("--ranks", type=int, help="only this number of ranks")
@click.option("--dtype", type=click.Choice(DTYPES), help="only this dtype")
@click.option(
    "--quantize",
    type=click.Choice(SCHEMES),
    help="only this scheme, with --dtype (default: bfloat16) for the cache and the weights that are not quantized",
)
@click.option(
    "--memory",
    help='memory of each rank, "12GB" or "12GiB": also show what fits, the largest context for one row, and the '
    "largest batch with max_seq_len positions",
)
@click.option("--vocab_size", type=int, help="needed if params.json does not have it (-1)")
@click.option("--json/--no_json", help="print one object instead of tables, with sizes in bytes")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="device that computes the prompts",
)
def plan(
    path: str,
    max_seq_len: int,
    max_batch_size: int,
    prefill_chunk: int,
    ranks: int | None,
    dtype: str | None,
    quantize: str | None,
    memory: str | None,
    vocab_size: int | None,
    json: bool,
    device: str,
) -> None:
    """Print the memory that the model in PATH needs, for each number of ranks that it can be split over.

    PATH is a checkpoint folder, or a params.json alone. No weights are read. The KV cache has --max_batch_size rows of
    --max_seq_len positions, and the sizes are for prompts that fill it.
    """
    sizes = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size, "prefill_chunk": prefill_chunk}
    for name, value in sizes.items():
        check_int(name, value, 1)
    for name, number in (("ranks", ranks), ("vocab_size", vocab_size)):
        if number is not None:
            check_int(name, number, 1)
    available = None if memory is None else read_bytes(memory)
    args, tied, axis, notes = read_model(as_path(path), vocab_size)
    args.max_seq_len, args.max_batch_size = max_seq_len, max_batch_size
    if args.sliding_window is not None and max_seq_len > args.sliding_window:
        notes.append(f"max_seq_len {max_seq_len} goes beyond the sliding window: {args.sliding_window} at most can run")
    if ranks is not None:
        check_world_size(args, ranks)
    kinds = [(dtype or "bfloat16", quantize)]
    if dtype is None and quantize is None:
        kinds = [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("bfloat16", "int4")]
    given: dict[str, Any] = {"device": device, "prefill_chunk": prefill_chunk}
    rows = [
        sizes_per_rank(args, world_size, kind, scheme, available, tied=tied, embedding_axis=axis, **given)
        for kind, scheme in kinds
        for world_size in ([ranks] if ranks else legal_world_sizes(args))
    ]
    notes.append(LEFT_OUT.format(device=DEVICES[device]))
    if json:
        answer = {"path": str(path), "parameters": count_parameters(args, tied), "tied": tied}
        answer |= {name: getattr(args, name) for name in ("vocab_size", "max_seq_len", "max_batch_size")}
        print(dumps(answer | {"memory": available, "per_rank": rows, "notes": notes}))
        return
    _print_tables(args, count_parameters(args, tied), rows, memory, dtype)
    print("\n".join(["", *(f"note: {note}" for note in notes[:-1]), notes[-1]]))


def read_bytes(text: str) -> int:
    """A size such as 12GB (12 * 1000^3 bytes) or 12GiB (12 * 1024^3). Raises ValueError for other texts."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]+)", str(text).strip(), re.IGNORECASE | re.ASCII)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    size = int(Decimal(match[1]) * units[match[2].lower()]) if match and match[2].lower() in units else 0
    if size <= 0:
        raise ValueError(
            f"memory {text!r}: expected a number and its unit, 12GB or 11.5GiB (units: {', '.join(UNITS)})"
        )
    return size


# Tables -------------------------------------------------------------------------------------------


def _print_tables(
    args: ModelArgs, counts: dict[str, int], rows: list[dict[str, Any]], memory: str | None, dtype: str | None
) -> None:
    print(
        f"{args.n_layers} layers, dim {args.dim}, {args.n_heads} heads of {args.head_dim}, {args.kv_heads} KV heads, "
        f"feed-forward {args.hidden_dim}, vocabulary {args.vocab_size}"
    )
    print()
    print_table([["component", "parameters"], *([name, f"{count:,}"] for name, count in counts.items())])
    print()
    filled = f"{args.max_batch_size} row{'s' * (args.max_batch_size > 1)} of {args.max_seq_len:,} positions"
    print(f"Memory of each rank in MiB, with a KV cache for {filled}, filled by prompts:")
    print()
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
    print_table([head, *cells])
