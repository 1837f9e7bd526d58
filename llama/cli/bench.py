"""`llama bench`: measure prefill, decode, memory and bandwidth on this machine."""

import contextlib
import logging
import math
import platform
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from itertools import pairwise
from json import dumps
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.distributed as dist

from llama.accelerate.executor import Executor
from llama.accelerate.quantized_weight import held_bytes
from llama.checkpoint.folder import Checkpoint
from llama.cli.command import Command, build_arguments, model_options
from llama.cli.plot import SHORTEST_CONTEXT, check_plot, draw
from llama.console import print_table, progress
from llama.engine.worker import read_back
from llama.files import as_path
from llama.generation import Llama
from llama.memory.check import free_bytes
from llama.model import Transformer
from llama.options import check_int
from llama.parallel.groups import current_world, is_main_rank, process_group

log = logging.getLogger(__name__)

ROUNDS = 3  # timed runs, after one warm-up run
PREFIX_STEPS = 8  # maximum number of steps without the cache
CONTEXT_STEPS = 20  # timed steps at each context of the plot
READ_BYTES = 256_000_000  # size of the buffer that is read to measure the bandwidth of a CPU
COPY_BYTES = 1_000_000_000  # the same for the buffer that is copied on CUDA
COPIES = 8  # in one timed run, so that launching them takes no part of its time
SAMPLE_SECONDS = 0.005  # interval between samples of the memory in use
STATUS = Path("/proc/self/status")
# Functions of torch.distributed that fairscale's layers and llama.parallel call in a forward pass.
COLLECTIVES = ("all_reduce", "all_gather", "broadcast")

# Keys of a row of the JSON (in seconds and bytes, None if not measured) -> column of the table: head, format, factor.
COLUMNS: dict[str, tuple[str, str, float]] = {
    "batch": ("batch", ",", 1),
    "prompt": ("prompt", ",", 1),  # ids in each row
    "cache": ("cache", "", 1),  # False: each step recomputes the whole prefix
    "prefill_tokens_per_s": ("prefill tok/s", ",.0f", 1),  # of all rows together, without sampling
    "first_token_s": ("first ms", ",.1f", 1e3),  # prefill and first ids
    "tokens_per_s": ("decode tok/s", ",.1f", 1),  # batch / step_s
    "step_s": ("step ms", ",.2f", 1e3),  # median of the `steps` after the first
    "step_p95_s": ("p95 ms", ",.2f", 1e3),
    "peak_memory": ("peak MB", ",.0f", 1e-6),  # CPU: anonymous memory of the process; CUDA: what torch allocated
    "bytes_per_token": ("MB/token", ",.2f", 1e-6),  # weights, keys and values that the median step reads / batch
    "bandwidth_share": ("bandwidth", ".0%", 1),  # bytes per second of such a step / the result of `bandwidth`
    # Part of the steps' time; None if the steps are CUDA graphs, whose collectives cannot be timed.
    "collectives_share": ("collectives", ".0%", 1),
}


@click.command(cls=Command)
@click.option("--batch", default="1,4,16", show_default=True, help="batch sizes, separated by commas")
@click.option("--prompt", default="128,512", show_default=True, help="prompt lengths in ids, separated by commas")
@click.option(
    "--gen",
    type=int,
    default=64,
    show_default=True,
    help="ids to generate in each row; the first comes from the prefill, each other one is a timed decode step",
)
@click.option("--no_cache", is_flag=True, help="also time steps without a KV cache, which recompute the whole prefix")
@click.option(
    "--json/--no_json",
    help="print one object instead: machine, bandwidth (bytes/s), bandwidth_of (sum: bytes read; copy: bytes read and "
    "written), rows (seconds, bytes)",
)
@click.option(
    "--plot", help="PNG file to draw: step time and memory of one row at contexts of 128, 256, ... up to --prompt"
)
@model_options("max_seq_len", "max_batch_size", "seed", "chat_format")
def bench(batch: str, prompt: str, gen: int, no_cache: bool, json: bool, plot: str | None, **options: Any) -> None:
    """Measure prefill, decode, memory and bandwidth, for every combination of batch size and prompt length.

    Prompts are random ids.
    """
    batches, prompts = read_list("batch", batch), read_list("prompt", prompt)
    longest = max(prompts)
    check_int("gen", gen, 2)  # one step at least
    if is_main_rank():
        if plot is not None:
            check_plot(as_path(plot), longest)
        window = Checkpoint(options["ckpt_dir"]).params.sliding_window
        if window is not None and longest + gen > window:
            raise ValueError(
                f"--prompt {longest} and --gen {gen} are more than the {window} positions of this model's sliding "
                "window: give less"
            )
    ckpt_dir = options["ckpt_dir"]
    points: list[dict[str, Any]] = []
    try:
        llama = Llama.build(**build_arguments(options), max_seq_len=longest + gen, max_batch_size=max(batches))
        rate = bandwidth(llama.executor.device)
        if plot is not None:
            points = measure_contexts(llama.executor, longest, rate)
        pairs = [(rows, length) for rows in batches for length in prompts]
        found = [r for pair in progress(pairs, "measuring") for r in measure(llama, *pair, gen, rate, no_cache)]
    except RuntimeError as error:
        if "allocate" not in str(error):  # torch's message if memory runs out, on every device
            raise
        raise ValueError(
            f"--batch {max(batches)} with --prompt {longest} needs more memory than is free: give smaller ones"
        ) from error
    form = {name: options[name] for name in ("quantize", "plain")}
    is_compiled = llama.executor.is_compiled and llama.executor.decoder in ("native", "compiled")
    machine = _machine(llama) | form | {"compile": is_compiled}
    if is_main_rank():
        if json:
            measured = {"bandwidth": rate, "bandwidth_of": bandwidth_of(llama.executor.device)}
            print(dumps({"machine": machine, **measured, "rows": found, "contexts": points}))
        else:
            facts = [str(value) if name == "cpu" else f"{name} {value}" for name, value in machine.items() if value]
            moves = {"copy": "copies {:.1f} GB/s (read and written)", "sum": "reads {:.1f} GB/s"}
            print(f"{', '.join(facts)}, {moves[bandwidth_of(llama.executor.device)].format(rate / 1e9)}")
            print_table(table(found), left=0)
        if plot is not None:
            draw(points, as_path(plot), f"{as_path(ckpt_dir).resolve().name}, {machine['dtype']}, one row")
            log.info(f"{plot}: steps at contexts of {points[0]['context']:,} to {points[-1]['context']:,}")
    llama.close()


def read_list(name: str, value: Any) -> list[int]:
    """Integers from 1: a single one, a sequence, or a text with commas. Raises ValueError."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    if not items or not all(re.fullmatch(r"\s*0*[1-9]\d*\s*", str(item)) for item in items):
        shown = ",".join(map(str, items))
        raise ValueError(f"--{name} is {shown!r}, expected integers from 1 with commas between them, like 1,4,16")
    return [int(item) for item in items]


# Measuring ----------------------------------------------------------------------------------------


def measure(
    llama: Llama, rows: int, length: int, gen: int, rate: float, no_cache: bool
) -> Iterator[dict[str, int | float | None]]:
    """Time generating `gen` ids after `rows` random prompts of `length` ids; with `no_cache` also without the cache.

    rate: the measured bandwidth in bytes per second. Yields dicts with the keys of COLUMNS, and `steps`.
    """
    model, executor, device = llama.model, llama.executor, llama.executor.device
    llama.tokenizer.stop_tokens = set()  # no row ends early
    draw = random.Random(1)
    ids = [draw.choices(range(model.params.vocab_size), k=length + gen) for _ in range(rows)]
    prompts, on_device = [row[:length] for row in ids], torch.tensor(ids).to(device)

    def stream() -> Iterator[Any]:
        return llama.stream(prompts, max_gen_len=gen, temperature=0, logprobs=False)

    def steps(seconds: list[float], memory: list[int], kv_bytes: float) -> dict[str, int | float | None]:
        step, read = median(seconds), weight_bytes(model) + rows * kv_bytes
        return {
            "steps": len(seconds),
            "tokens_per_s": rows / step,
            "step_s": step,
            "step_p95_s": sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1],
            "peak_memory": max(memory, default=None),
            "bytes_per_token": read / rows,
            "bandwidth_share": read / step / rate,
        }

    is_graph = device.type == "cuda" and executor.is_compiled
    common = dict.fromkeys(COLUMNS) | {"batch": rows, "prompt": length}
    _step_seconds(stream())
    with peak_memory(device) as memory:
        runs = [_step_seconds(stream()) for _ in range(ROUNDS)]
        prefill = median(
            _seconds(lambda: executor.hidden(on_device[:, :length], 0, length)[:, -1]) for _ in range(ROUNDS)
        )
    yield {
        **common,
        **steps([s for run in runs for s in run[1:]], memory, (length + gen / 2) * position_bytes(model)),
        "cache": True,
        "prefill_tokens_per_s": rows * length / prefill,
        "first_token_s": median(run[0] for run in runs),
        "collectives_share": None if current_world().size == 1 or is_graph else _collectives_share(stream(), device),
    }
    if no_cache:
        # At most PREFIX_STEPS of the contexts that the steps with the cache had.
        lengths = range(length + 1, length + gen)[:: math.ceil((gen - 1) / PREFIX_STEPS)]
        newest(executor, on_device[:, : lengths[0]], 0)
        with peak_memory(device) as memory:
            seconds = [_seconds(partial(newest, executor, on_device[:, :n], 0)) for n in lengths]
        yield {**common, **steps(seconds, memory, 0), "cache": False}


def measure_contexts(executor: Executor, longest: int, rate: float) -> list[dict[str, Any]]:
    """Time steps of one row at contexts of 128, 256, ... up to `longest`.

    Returns a dict for each context: the seconds, the expected seconds (those at the shortest context, plus the time to
    read the keys and values added since), the bytes of keys and values, and the peak memory so far.

    The prompt is computed once, piece by piece. A step computes the last id of its context again. Each round has one
    step at every context, so that a temporary slowdown of the machine affects all of them.
    """
    ids = torch.tensor([random.Random(1).choices(range(executor.model.params.vocab_size), k=longest)]).to(
        executor.device
    )
    contexts = [2**i for i in range(longest.bit_length()) if 2**i >= SHORTEST_CONTEXT]
    peaks: list[int | None] = []
    for before, n in pairwise(progress([0, *contexts], "filling")):
        with peak_memory(executor.device) as memory:
            read_back(newest(executor, ids[:, before:n], before))
        peaks.append(max(memory, default=None))
    steps = [partial(newest, executor, ids[:, n - 1 : n], n - 1) for n in contexts]
    rounds = [list(map(_seconds, steps)) for _ in progress(range(ROUNDS + CONTEXT_STEPS), "stepping")][ROUNDS:]
    medians = [median(seconds) for seconds in zip(*rounds, strict=True)]
    each, shortest = position_bytes(executor.model), contexts[0]
    return [
        {
            "context": n,
            "step_s": seconds,
            "expected_step_s": medians[0] + (n - shortest) * each / rate,
            "kv_bytes": n * each,
            "peak_memory": peak,
        }
        for n, seconds, peak in zip(contexts, medians, peaks, strict=True)
    ]


def newest(executor: Executor, ids: torch.Tensor, start_pos: int) -> torch.Tensor:
    """The most probable next ids [bsz], after ids [bsz, seqlen] whose first position is start_pos."""
    return executor.logits(executor.hidden(ids, start_pos, start_pos + ids.shape[1])[:, -1]).argmax(dim=-1)


def _step_seconds(stream: Iterator[Any]) -> list[float]:
    """How long each step took; the first includes the prefill."""
    times = [time.perf_counter(), *(time.perf_counter() for _ in stream)]
    return [after - before for before, after in pairwise(times)]


def _seconds(call: Callable[[], torch.Tensor]) -> float:
    """Seconds until the result of `call` can be read. Reading waits for the device."""
    started = time.perf_counter()
    read_back(call())
    return time.perf_counter() - started


def bandwidth_of(device: torch.device) -> str:
    """What `bandwidth` times: on CUDA a "copy", elsewhere a "sum"."""
    return "copy" if device.type == "cuda" else "sum"


def bandwidth(device: torch.device) -> float:
    """Bytes per second of the device's memory, on all ranks at the same time; the best of five runs.

    Elsewhere than on CUDA: bytes read by a sum of float32. On CUDA torch's sum reaches two thirds of what the memory
    can do, so there a buffer is copied to another one, and the bytes that are read and those that are written count.
    """
    is_copy, best = bandwidth_of(device) == "copy", math.inf
    size = min(COPY_BYTES, (free_bytes(device) or 4 * COPY_BYTES) // 4) if is_copy else READ_BYTES
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source) if is_copy else source

    def copy() -> torch.Tensor:
        for _ in range(COPIES):
            target.copy_(source)
        return target[-1]

    for _ in range(5):
        if current_world().size > 1:
            dist.barrier(group=process_group())
        best = min(best, _seconds(copy if is_copy else source.sum))
    return (2 * COPIES if is_copy else 1) * source.nbytes / best


def weight_bytes(model: Transformer) -> int:
    """Bytes of weights that a step reads on this rank: all, except an embedding that is not also the output layer,
    because a step reads only single rows of it."""
    return held_bytes(p for p in model.parameters() if p is not model.tok_embeddings.weight or p is model.output.weight)


def position_bytes(model: Transformer) -> int:
    """Bytes of keys and values per position of a row on this rank."""
    held = sum(buffer.nbytes for cache in model.caches for buffer in (cache.k, cache.v))
    return held // (model.params.max_batch_size * model.params.max_seq_len)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Yields a list. After the block it has samples of the bytes in use, whose maximum is the peak; it is empty if the
    system does not report them."""
    seen: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while STATUS.exists() and (found := re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())):
            seen.append(int(found[1]) * 1024)
            if ended.wait(SAMPLE_SECONDS):
                return

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield seen
        seen.append(torch.cuda.max_memory_allocated(device))
        return
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def _collectives_share(stream: Iterator[Any], device: torch.device) -> float:
    """The part of the steps' time that this rank spends in collectives, including waits for slower ranks.

    During this run the collectives are replaced by timed ones, which on CUDA synchronize before and after.
    """
    inside = 0.0
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None

    def timed(collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        wait()
        started = time.perf_counter()
        result = collective(*args, **kwargs)
        wait()
        inside += time.perf_counter() - started
        return result

    next(stream)  # the prefill
    originals = {name: getattr(dist, name) for name in COLLECTIVES}
    try:
        for name, collective in originals.items():
            setattr(dist, name, partial(timed, collective))
        took = sum(_step_seconds(stream))
        return inside / took
    finally:
        for name, collective in originals.items():
            setattr(dist, name, collective)


# Output -------------------------------------------------------------------------------------------


def _machine(llama: Llama) -> dict[str, Any]:
    """The machine and the settings of the measurement."""
    info, device = Path("/proc/cpuinfo"), llama.executor.device
    named = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return {
        "cpu": named[1] if named else platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "ranks": current_world().size,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "dtype": str(llama.model.norm.weight.dtype).removeprefix("torch."),
    }


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table's header and rows. Columns without values are left out, and `cache` if it is True in all rows."""
    columns = []
    for key, (head, form, factor) in COLUMNS.items():
        values = [row[key] for row in rows]
        cells = [head, *("-" if value is None else f"{value * factor:{form}}" for value in values)]
        if key == "cache":
            cells[1:] = ["yes" if value else "no" for value in values]
        if set(cells[1:]) != {"-"} and not (key == "cache" and all(values)):
            columns.append(cells)
    return [list(row) for row in zip(*columns, strict=True)]
