"""Speed in tests/gpu.py: random checkpoints, the cases that measure, and their tables.

`llama bench` measures what it can, in a process for each dtype. The other cases run in their own processes, too.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from golden.make_checkpoint import TOKENIZER
from gpu_cases import Answer, Asked, first_error
from gpu_ranks import Ranks
from llama import Llama, ModelArgs
from llama.accelerate.gpu import has_fp8
from llama.checkpoint.layout import tensor_shapes
from llama.cli import bench
from llama.convert.vocab import NORMAL, read_pieces, sentencepiece_model
from llama.parallel.device import pick_device
from llama.parallel.groups import current_world

GB = 10**9
LLAMA_2_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5, "vocab_size": 32000}
LLAMA_3_8B = {"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "n_heads": 32, "n_kv_heads": 8}
LLAMA_3_8B |= {"n_layers": 32, "norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128256}
SMALL = LLAMA_2_7B | {"dim": 768, "n_heads": 12, "n_layers": 12}  # 134M parameters
TINY = LLAMA_2_7B | {"dim": 256, "n_heads": 8, "n_layers": 4, "vocab_size": 2000}
TINY_GQA = TINY | {"n_kv_heads": 2, "vocab_size": 3000}


@dataclass(frozen=True)
class Plan:
    """What is measured. models: "small" and "large", and "long" for the long context, in the order of writing."""

    models: dict[str, dict[str, Any]]
    batches: tuple[int, ...]
    prompt: int
    gen: int
    long_prompt: int
    context: int
    square: int  # rows and columns of the matrices whose product measures the rate of matmuls


ON_GPU = Plan({"small": SMALL, "large": LLAMA_2_7B, "long": LLAMA_3_8B}, (1, 16, 128), 128, 64, 8192, 32768, 8192)
# The same code on a model for which a CPU needs seconds. Its figures say nothing.
ON_CPU = Plan({"small": TINY, "large": TINY, "long": TINY_GQA}, (1, 2), 32, 8, 128, 256, 256)


def plan_of(device: str) -> Plan:
    return ON_GPU if device.startswith("cuda") else ON_CPU


# Random checkpoints -------------------------------------------------------------------------------


def write_random(folder: Path, params: dict[str, Any], device: str) -> None:
    """Write a checkpoint in Meta's layout: one file, bfloat16, normal weights of standard deviation 0.02.

    The vocabulary is tok512 with meaningless pieces added. The folder gets its name when it is complete.
    """
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir()
    draw = torch.Generator(device).manual_seed(0)
    tensors = dict[str, torch.Tensor]()
    for name, shape in tensor_shapes(ModelArgs(**params)).items():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            # Drawn in bfloat16: float32 values would double the time, and nothing depends on the last bits.
            values = torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(0, 0.02, generator=draw)
            tensors[name] = values.cpu()
    torch.save(tensors, part / "consolidated.00.pth")
    (part / "params.json").write_text(json.dumps(params))
    pieces = read_pieces(TOKENIZER.read_bytes())
    pieces += [(f"<new{i}>", -1e6, NORMAL) for i in range(params["vocab_size"] - len(pieces))]
    (part / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    part.rename(folder)


def write(asked: Asked) -> Answer:
    """All random checkpoints of `asked.random`, one after the other."""
    figures = dict[str, Any]()
    for name, folder in asked.random.items():
        started = time.perf_counter()
        write_random(folder, plan_of(asked.device).models[name], asked.device)
        figures[f"seconds for {name}"] = time.perf_counter() - started
    return figures, []


def left_out(folder: Path, device: str) -> dict[str, str]:
    """Name of a model -> why it is left out: the disk or the GPU has not enough free."""
    if not device.startswith("cuda"):
        return {}
    disk, memory = os.statvfs(folder), torch.cuda.mem_get_info()[0]
    free = disk.f_bavail * disk.f_frsize
    reasons = {}
    for name, needed in (("large", 30 * GB), ("long", 46 * GB)):  # long: large and long together, and some to spare
        if free < needed:
            reasons[name] = (
                f"{free / GB:.0f} GB of disk are free in {folder.parent}, {needed // GB} GB are needed (TMPDIR names "
                "another folder)"
            )
        elif memory < 20 * GB:
            reasons[name] = f"{memory / GB:.0f} GB of the GPU's memory are free, 20 GB are needed"
    return reasons


# Measuring ----------------------------------------------------------------------------------------


def bench_rows(asked: Asked, limit: float, weights: str, *flags: str) -> Answer:
    """Rows of the table by `llama bench`, on the large model. weights: their first column.

    A card without fp8 leaves the row out, with the reason that `build` gives.
    """
    plan = plan_of(asked.device)
    command = [sys.executable, "-m", "llama", "bench", "--ckpt_dir", str(asked.random["large"]), "--json"]
    command += ["--device", asked.device, "--dtype", "bfloat16", *flags]
    for flag, value in (("--batch", 1), ("--prompt", plan.prompt), ("--gen", plan.gen)):
        if flag not in flags:
            command += [flag, str(value)]
    with Ranks(command, 1, asked.device) as running:
        (status,) = running.wait(limit).values()
        out, err = running.text(0, "out"), running.text(0, "err")
    if status != 0:
        reason = first_error(err)
        may_refuse = weights == "fp8" and not has_fp8(pick_device(asked.device, current_world()))
        return ({"left out": reason}, []) if may_refuse else ({}, [f"{weights}: bench ended with {status}: {reason}"])
    rows = [
        {key: row[key] for key in ("batch", "prompt", "first_token_s", "tokens_per_s", "step_s", "peak_memory")}
        | {"weights": weights, "step_bytes": row["bytes_per_token"] * row["batch"]}
        for row in json.loads(out)["rows"]
    ]
    return {"rows": rows}, []


def card(asked: Asked) -> Answer:
    """The rates that the table compares with: bytes per second of a copy, and FLOP/s of a bfloat16 product."""
    device, size = pick_device(asked.device, current_world()), plan_of(asked.device).square
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times, products = list[float](), 10
    for _ in range(4):
        started = time.perf_counter()
        for _ in range(products):
            c = a @ b
        c[0, 0].item()  # waits for the device
        times.append((time.perf_counter() - started) / products)
    return {"bandwidth": bench.bandwidth(device), "flops": 2 * size**3 / min(times)}, []


def ready(asked: Asked) -> Answer:
    """Seconds from the start of a process to its first token, and those of `Llama.build` in them."""
    plan, before = plan_of(asked.device), time.time()
    llama = Llama.build(asked.random["large"], None, 512, 1, device=asked.device, dtype="bfloat16")
    built = time.time()
    llama.generate([[5] * plan.prompt], 1, temperature=0)
    first = time.time() - float(os.environ["GPU_TEST_STARTED"])
    llama.close()
    return {"load_s": built - before, "first_token_s": first}, []


def context(asked: Asked) -> Answer:
    """Steps of one row after contexts up to the longest, on the model with grouped queries."""
    length = plan_of(asked.device).context
    llama = Llama.build(asked.random["long"], None, length, 1, device=asked.device, dtype="bfloat16")
    points = bench.measure_contexts(llama.executor, length, 1.0)
    weights = bench.weight_bytes(llama.model)
    llama.close()
    kept = ("context", "step_s", "peak_memory")
    return {"contexts": [{k: p[k] for k in kept} | {"step_bytes": weights + p["kv_bytes"]} for p in points]}, []


def transformers(asked: Asked) -> Answer:
    """The same shape in transformers, not compiled: the first token, and steps of 1 and 16 rows."""
    if find_spec("transformers") is None:
        return {"left out": "transformers is not installed"}, []
    from transformers import LlamaConfig, LlamaForCausalLM

    plan = plan_of(asked.device)
    args = ModelArgs(**plan.models["large"])
    device = pick_device(asked.device, current_world())
    config = LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads, num_key_value_heads=args.kv_heads,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0

    def seconds(rows: int, new: int) -> float:
        ids = torch.tensor([[5 + i + row for i in range(plan.prompt)] for row in range(rows)], device=device)
        started = time.perf_counter()
        out = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        out[0, -1].item()  # waits for the device
        return time.perf_counter() - started

    rows = list[dict[str, Any]]()
    for batch in plan.batches[:2]:
        seconds(batch, 4)  # warm-up
        first, full = (min(seconds(batch, new) for _ in range(2)) for new in (1, plan.gen))
        step = (full - first) / (plan.gen - 1)
        rows.append({"weights": "transformers, bfloat16", "batch": batch, "prompt": plan.prompt})
        rows[-1] |= {"first_token_s": first, "tokens_per_s": batch / step, "step_s": step}
    return {"rows": rows}, []


# Cases that run in a process of their own, as those of gpu_cases do.
CASES: dict[str, Callable[[Asked], Answer]] = {
    "write": write,
    "speed-card": card,
    "speed-ready": ready,
    "speed-context": context,
    "speed-transformers": transformers,
}
# Case -> what `bench_rows` gets.
BENCHES: dict[str, Callable[[Plan], tuple[str, ...]]] = {
    "speed-bfloat16": lambda plan: ("bfloat16", "--batch", ",".join(map(str, plan.batches))),
    "speed-prefill": lambda plan: ("bfloat16", "--prompt", str(plan.long_prompt), "--gen", "8"),
    "speed-int8": lambda plan: ("int8", "--quantize", "int8"),
    "speed-int4": lambda plan: ("int4", "--quantize", "int4"),
    "speed-fp8": lambda plan: ("fp8", "--quantize", "fp8"),
    "speed-compile": lambda plan: ("bfloat16, --compile", "--compile"),
}


# Tables -------------------------------------------------------------------------------------------


def prefill_flops(params: dict[str, Any], rows: int, length: int) -> float:
    """Of the matmuls and of causal attention. Logits are computed for the last position only."""
    args = ModelArgs(**params)
    shapes = tensor_shapes(args)
    layers = sum(s[0] * s[1] for name, s in shapes.items() if name.startswith("layers.") and len(s) == 2)
    attention = args.n_layers * 2 * length**2 * args.n_heads * args.head_dim  # half of two products of 2 * length**2
    return rows * (2 * layers * length + attention + 2 * args.vocab_size * args.dim)


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def speed_tables(figures: dict[str, dict[str, Any]], device: str) -> list[str]:
    """Lines of markdown from the figures of the cases, by name. Cases without figures are missing.

    A decode step only reads. The bytes that it reads in a second are compared with those that a copy reads and writes.
    """
    lines, rates = list[str](), figures.get("speed-card", {})
    if rates:
        copied = "copies {:,.0f} GB/s, read and written," if device.startswith("cuda") else "reads {:,.0f} GB/s"
        lines.append(f"The device {copied.format(rates['bandwidth'] / 1e9)} and computes "
                     f"{rates['flops'] / 1e12:,.1f} TFLOP/s in a bfloat16 product.")  # fmt: skip
    rows = [row for found in figures.values() for row in found.get("rows", ())]
    # transformers reads what this package reads in bfloat16.
    read = {(row["batch"], row["prompt"]): row["step_bytes"] for row in rows if row["weights"] == "bfloat16"}
    body = []
    for row in rows:
        flops = prefill_flops(plan_of(device).models["large"], row["batch"], row["prompt"])
        step_bytes = row.get("step_bytes", read.get((row["batch"], row["prompt"])))
        cells = [row["weights"], f"{row['batch']:,}", f"{row['prompt']:,}", f"{row['first_token_s'] * 1e3:,.1f}"]
        cells += [share(flops / row["first_token_s"], rates.get("flops"))]
        cells += [f"{row['tokens_per_s']:,.1f}", *step_cells(row["step_s"], step_bytes, rates)]
        peak = row.get("peak_memory")
        body.append([*cells, f"{peak / GB:,.1f}" if peak else ""])
    if body:
        head = ["weights", "rows", "prompt", "first token, ms", "of the product's rate", "tokens/s"]
        shape = f"Llama 2 7B's shape, random weights, {plan_of(device).gen} new ids:"
        lines += ["", shape, "", *markdown([*head, *STEP_HEAD, "peak, GB"], body)]
    if points := figures.get("speed-context", {}).get("contexts"):
        shape = "context, one row of Llama 3 8B's shape, bfloat16"
        body = [[f"{p['context']:,}", *step_cells(p["step_s"], p["step_bytes"], rates)] for p in points]
        lines += ["", *markdown([shape, *STEP_HEAD], body)]
    if found := figures.get("speed-ready"):
        load, first = found.get("load_s", 0.0), found.get("first_token_s", 0.0)
        lines += [
            "",
            f"Loading takes {load:.1f} s. The first token comes {first:.1f} s after the start of the process.",
        ]
    return lines


STEP_HEAD = ["step, ms", "read, GB/s", "of the copy's rate"]


def step_cells(seconds: float, step_bytes: float | None, rates: dict[str, float]) -> list[str]:
    """Cells below STEP_HEAD. step_bytes: what a step reads, None if that is not known."""
    if step_bytes is None:
        return [f"{seconds * 1e3:,.2f}", "", ""]
    rate = step_bytes / seconds
    return [f"{seconds * 1e3:,.2f}", f"{rate / GB:,.0f}", share(rate, rates.get("bandwidth"))]


def share(rate: float, most: float | None) -> str:
    return "" if most is None else f"{rate / most:.0%}"


def heading(device: str, command: str) -> str:
    """The date, the card, the versions and the command."""
    on_gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name() if on_gpu else f"{device} (tiny models, whose speed says nothing)"
    cuda = f" (CUDA {torch.version.cuda})" if on_gpu else ""
    return f"{date.today().isoformat()}, {name}, torch {torch.__version__}{cuda}, `{command}`:"
