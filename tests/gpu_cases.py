"""The cases of tests/gpu.py that compare results. Each runs in its own process, some of them on several ranks.

python tests/gpu_cases.py FOLDER DTYPE LENGTH ROWS DEVICE    (started by `memory`: prints planned and measured bytes)
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama import Llama
from llama.accelerate.gpu import has_fp8
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.layout import OUTPUT
from llama.cli import bench
from llama.memory.sizes import sizes
from llama.parallel.device import DTYPES, pick_device
from llama.parallel.groups import current_world, process_group

HERE = Path(__file__).parent
# For processes that are started here: the package and this folder.
PYTHONPATH = os.pathsep.join(filter(None, [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")]))
MARK = "gpu.py's answer: "  # begins the line with the result of a process
MODELS = ("mha", "gqa", "code", "llama31")
TEXTS = ("single", "single_echo", "ragged", "ragged_echo", "eos")
BFLOAT16 = 2.0**-8  # unit roundoff: the largest relative error of one rounding


@dataclass
class Asked:
    """Arguments of a case.

    folders: name -> seeded checkpoint. demo: the demo model's folder, None if it is missing. random: name -> random
    checkpoint of `gpu_speed`, which another process writes; its folder appears when it is complete.
    """

    device: str
    folders: dict[str, Path]
    golden: dict[str, Any]
    demo: Path | None
    random: dict[str, Path] = field(default_factory=dict)


Answer = tuple[dict[str, Any], list[str]]  # figures by name; failures, one line each


# Results ------------------------------------------------------------------------------------------


def golden(asked: Asked, **options: Any) -> Answer:
    """float32: greedy ids equal to Meta's code, log-probabilities within 1e-3, logits within 1e-3 of the largest."""
    failures, worst, worst_logit = list[str](), 0.0, 0.0
    for name, folder in asked.folders.items():
        llama = Llama.build(folder, max_seq_len=256, max_batch_size=3, device=asked.device, dtype="float32", **options)
        for text in TEXTS:
            expected = asked.golden[name][text]
            stop = [expected["eos_id"]] if "eos_id" in expected else None
            ids, logprobs = llama.generate(
                expected["prompt_tokens"],
                expected["max_gen_len"],
                temperature=0,
                logprobs=True,
                echo=expected.get("echo", False),
                stop_token_ids=stop,
            )
            if found := difference(ids, expected["tokens"]):
                failures.append(f"{name}/{text}: other ids than expected: {found}")
                continue
            pairs = zip(logprobs or [], expected["logprobs"], strict=True)
            off = max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
            worst = max(worst, off)
            if not off < 1e-3:
                failures.append(f"{name}/{text}: a log-probability is off by {off:.2g}")
        off = logits_off(llama, asked.golden[name]["logits"])
        worst_logit = max(worst_logit, off)
        if not off < 1e-3:
            failures.append(f"{name}: a logit is off by {off:.2g} of the largest")
        llama.close()
    return {"worst log-probability": worst, "worst logit / largest": worst_logit}, failures


def eager(asked: Asked) -> Answer:
    """The same without CUDA graphs: kernels are launched one by one."""
    return golden(asked, compile=False)


def compile(asked: Asked) -> Answer:
    """The same, with torch.compile's decode step."""
    started = time.perf_counter()
    figures, failures = golden(replace(asked, folders={"gqa": asked.folders["gqa"]}), compile=True)
    return figures | {"seconds": time.perf_counter() - started}, failures


def bfloat16(asked: Asked) -> Answer:
    """The highest logits within 5 % of the largest, as in test_forward, on any number of ranks. On several ranks also
    the sum of random bfloat16 vectors within its bound."""
    figures, failures = dict[str, Any](), list[str]()
    for name, folder in asked.folders.items():
        llama = Llama.build(folder, max_seq_len=256, max_batch_size=3, device=asked.device, dtype="bfloat16")
        figures[name] = off = logits_off(llama, asked.golden[name]["logits"])
        if not 1e-4 < off < 5e-2:  # below, it would not have run in bfloat16
            failures.append(f"{name}: a logit is off by {off:.2g} of the largest, expected 1e-4 to 5e-2")
        if name == "mha" and current_world().size > 1:
            figures["all_reduce error / bound"] = off = all_reduce_off(llama.executor.device)
            if not off <= 1:
                failures.append(f"all_reduce in bfloat16 is off by {off:.2g} times its bound")
        llama.close()
    return figures, failures


def quantize(asked: Asked) -> Answer:
    """The share of positions of a golden text at which the most probable next id equals bfloat16's (demo model)."""
    if asked.demo is None:
        return {"left out": "the demo model is missing: `make demo` fetches it"}, []
    best: dict[str, torch.Tensor] = {}
    fp8 = ["fp8"] * has_fp8(pick_device(asked.device, current_world()))
    for scheme in (None, "int8", "int4", *fp8):
        llama = Llama.build(asked.demo, None, 1024, 1, device=asked.device, dtype="bfloat16", quantize=scheme)
        text = (HERE / "golden" / "text.txt").read_text()
        ids = llama.tokenizer.encode(text, bos=False, eos=False)[:1024]
        on_device = torch.tensor([ids]).to(llama.executor.device)
        best[scheme or "bfloat16"] = llama.model.forward(on_device, 0)[0].argmax(dim=-1).cpu()
        llama.close()
    exact = best.pop("bfloat16")
    figures = {scheme: (ids == exact).float().mean().item() for scheme, ids in best.items()}
    least = {"int8": 0.9, "int4": 0.6, "fp8": 0.8}
    return figures, [
        f"{scheme}: {share:.1%} of the ids are bfloat16's, expected {least[scheme]:.0%}"
        for scheme, share in figures.items()
        if share < least[scheme]
    ]


def dropin(asked: Asked) -> Answer:
    """Changed modules and weights, compared to transformers with the same changes: tests/dropin/test_model.py here."""
    if find_spec("pytest") is None or find_spec("transformers") is None:
        return {"left out": "pytest and transformers are needed"}, []
    args = ["-q", "--no-header", "-p", "no:cacheprovider", "-k", "not rank", str(HERE / "dropin" / "test_model.py")]
    done = subprocess.run([sys.executable, "-m", "pytest", *args], capture_output=True, text=True, cwd=HERE.parent)
    lines = done.stdout.splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode and not failures:
        failures = [f"pytest ended with status {done.returncode}: {lines[-1] if lines else done.stderr[-200:]}"]
    return {"pytest": lines[-1] if lines else ""}, failures


def difference(ids: list[list[int]], expected: list[list[int]]) -> str:
    """The first difference between two lists of rows; empty if they are equal."""
    for row, (ours, theirs) in enumerate(zip(ids, expected, strict=True)):
        for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            if a != b:
                return f"row {row}, place {place}: {a}, not {b}"
        if len(ours) != len(theirs):
            return f"row {row}: {len(ours)} ids, not {len(theirs)}"
    return ""


def logits_off(llama: Llama, cases: list[dict[str, Any]]) -> float:
    """Largest error of the logits that are highest in Meta's code, divided by the largest of them."""
    off = 0.0
    for case in cases:
        last = llama.model.forward(torch.tensor([case["prompt_tokens"]]).to(llama.executor.device), 0)[0, -1].cpu()
        expected = torch.tensor(case["last_top8_logits"])
        off = max(off, ((last[case["last_top8_ids"]] - expected).abs().max() / expected.abs().max()).item())
    return off


def all_reduce_off(device: torch.device) -> float:
    """Largest error of an all_reduce of bfloat16 vectors, compared with the sum in float64, in units of its bound.

    The sum of n ranks has n - 1 additions, in any order, and each has a relative error of at most BFLOAT16. So the
    bound is gamma(n - 1) times the sum of the magnitudes (Higham 2002, section 4.2).
    """
    world = current_world()
    vectors = torch.randn(world.size, 4096, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    total = vectors[world.rank].to(device, copy=True)
    dist.all_reduce(total, group=process_group())
    roundings = (world.size - 1) * BFLOAT16
    bound = roundings / (1 - roundings) * vectors.double().abs().sum(dim=0)
    return ((total.cpu().double() - vectors.double().sum(dim=0)).abs() / bound).max().item()


# Memory -------------------------------------------------------------------------------------------


def memory(asked: Asked) -> Answer:
    """The memory that `plan` predicts is 0.9 to 1.25 times the peak from `build` to the second decode step.

    Each model and dtype has its own process: cuBLAS allocates its workspace once, so a second model would seem smaller.
    On a CPU the figures are only reported, because the allocator of the C library keeps memory that was freed.
    """
    device = asked.device
    half = "float16" if device.startswith("cuda") else "bfloat16"
    runs = [(asked.folders["mha"], dtype, 1500, 2) for dtype in ("float32", half)]
    if "small" in asked.random:
        runs += [(asked.random["small"], dtype, 2048, 2) for dtype in ("float32", half)]
    if "large" in asked.random:
        runs.append((asked.random["large"], "bfloat16", 4096 if device.startswith("cuda") else 256, 1))
    figures, failures = dict[str, Any](), list[str]()
    for folder, dtype, length, rows in runs:
        name = f"{folder.name} {dtype}"
        while not folder.exists():  # until the limit of this case
            time.sleep(0.1)
        command = [sys.executable, __file__, str(folder), dtype, str(length), str(rows), device]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": PYTHONPATH}, capture_output=True, text=True)
        answers = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
        if not answers:
            failures.append(f"{name}: ended with status {done.returncode}: {first_error(done.stderr)}")
            continue
        figures[name] = found = json.loads(answers[-1])
        ratio = found["planned"] / max(1, found["measured"])
        if device.startswith("cuda") and not 0.9 <= ratio <= 1.25:
            failures.append(
                f"{name}: planned {found['planned']:,} bytes, measured {found['measured']:,}: {ratio:.2f} times as "
                "much, expected 0.9 to 1.25"
            )
    return figures, failures


def measure_memory(folder: Path, dtype: str, length: int, rows: int, device_name: str) -> dict[str, int]:
    """Bytes planned for `rows` rows of `length` positions, those of the prefill among them, and the measured peak."""
    files, device = Checkpoint(folder), pick_device(device_name, current_world())
    files.params.max_seq_len, files.params.max_batch_size = length, rows
    tied, axis = OUTPUT not in files.shapes, files.embedding_axis
    planned = sizes(files.params, 1, DTYPES[dtype], tied=tied, embedding_axis=axis, device=device.type)
    with bench.peak_memory(device) as before:
        pass
    with bench.peak_memory(device) as seen:
        llama = Llama.build(folder, None, length, rows, device=device_name, dtype=dtype)
        # The longest prompts that leave positions for two decode steps: the first one records a CUDA graph.
        llama.generate([[5 + row] * (length - 3) for row in range(rows)], 3, temperature=0)
    llama.close()
    return {
        "planned": planned.total,
        "prefill": planned.prefill,
        "measured": max(seen, default=0) - max(before, default=0),
    }


def first_error(text: str) -> str:
    """The line of a program's stderr that most likely says why it ended."""
    lines = [line.strip() for line in text.splitlines() if "error" in line.lower()]
    return lines[0] if lines else (text.strip().splitlines() or ["no reason given"])[-1]


CASES: dict[str, Callable[[Asked], Answer]] = {
    "golden": golden,
    "eager": eager,
    "bfloat16": bfloat16,
    "memory": memory,
    "compile": compile,
    "quantize": quantize,
    "dropin": dropin,
}

if __name__ == "__main__":
    path, dtype_name, positions, row_count, where = sys.argv[1:]
    print(MARK + json.dumps(measure_memory(Path(path), dtype_name, int(positions), int(row_count), where)))
