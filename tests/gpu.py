"""`make test-gpu`: tests of this runner on CUDA and NCCL.

    python tests/gpu.py [--device cuda] [--out gpu-report.json] [--cases golden,memory] [--demo DIR] [--golden FILE]

Writes one JSON file with versions, GPUs, every figure and every failure; exit status 1 if there is any failure. Each
case runs in its own process, so a crash is one line of the report. With two GPUs, the cases in ON_TWO also run on two
ranks over NCCL.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from golden.make_checkpoint import write  # noqa: E402  (the path above makes it importable)
from llama import Llama  # noqa: E402
from llama.checkpoint.folder import Checkpoint  # noqa: E402
from llama.checkpoint.layout import OUTPUT  # noqa: E402
from llama.cli import bench  # noqa: E402
from llama.memory.sizes import sizes  # noqa: E402
from llama.parallel.device import DTYPES, pick_device  # noqa: E402
from llama.parallel.groups import current_world, is_main_rank  # noqa: E402

MODELS = ("mha", "gqa", "code", "llama31")
TEXTS = ("single", "single_echo", "ragged", "ragged_echo", "eos")
ON_TWO = ("golden", "bfloat16", "memory", "bench")  # also run on two ranks
MARK = "gpu.py's answer: "  # the line of a case's process that has its result
TIMEOUT = 1800  # seconds for a case: torch.compile takes minutes


@dataclass
class Asked:
    """Arguments of a case. folders: name -> seeded checkpoint. demo: the demo model's folder, None if it is missing."""

    device: str
    folders: dict[str, Path]
    golden: dict[str, Any]
    demo: Path | None


Answer = tuple[dict[str, Any], list[str]]  # figures by name; failures, one line each


# Cases --------------------------------------------------------------------------------------------


def golden(asked: Asked, **options: Any) -> Answer:
    """float32: greedy ids equal to those of Meta's code, log-probabilities within 1e-3, logits too."""
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


def bfloat16(asked: Asked) -> Answer:
    """The best logits within 5 % of the largest, as in test_forward."""
    figures, failures = dict[str, Any](), list[str]()
    for name, folder in asked.folders.items():
        llama = Llama.build(folder, max_seq_len=256, max_batch_size=3, device=asked.device, dtype="bfloat16")
        figures[name] = off = logits_off(llama, asked.golden[name]["logits"])
        if not 1e-4 < off < 5e-2:  # below, it would not have run in bfloat16
            failures.append(f"{name}: a logit is off by {off:.2g} of the largest, expected 1e-4 to 5e-2")
        llama.close()
    return figures, failures


def memory(asked: Asked) -> Answer:
    """The memory that `plan` predicts, and the peak from `build` to the end of the prefill."""
    figures, failures = dict[str, Any](), list[str]()
    folder, length, rows = asked.demo or asked.folders["mha"], 4096 if asked.demo else 1500, 2
    files, device = Checkpoint(folder), pick_device(asked.device, current_world())
    files.params.max_seq_len, files.params.max_batch_size = length, rows
    tied = OUTPUT not in files.shapes
    for dtype in ("float32", "float16" if device.type == "cuda" else "bfloat16"):
        ranks, axis = current_world().size, files.embedding_axis
        planned = sizes(files.params, ranks, DTYPES[dtype], tied=tied, embedding_axis=axis, device=device.type)
        with bench.peak_memory(device) as before:
            pass
        with bench.peak_memory(device) as seen:
            llama = Llama.build(folder, None, length, rows, device=asked.device, dtype=dtype)
            # The longest prompts, which leave one position for the new id.
            llama.generate([[5 + row] * (length - 1) for row in range(rows)], 1, temperature=0)
        llama.close()
        peak = max(seen, default=0) - max(before, default=0)
        figures[dtype] = {"planned": planned.total, "prefill": planned.prefill, "measured": peak}
        if device.type == "cuda" and not 0.9 * peak <= planned.total <= 1.25 * peak:
            failures.append(f"{dtype}: planned {planned.total:,} bytes, measured {peak:,}")
    return figures, failures


def compile(asked: Asked) -> Answer:
    """The same ids from a compiled decode step."""
    started = time.perf_counter()
    figures, failures = golden(Asked(asked.device, {"gqa": asked.folders["gqa"]}, asked.golden, None), compile=True)
    return figures | {"seconds": time.perf_counter() - started}, failures


def quantize(asked: Asked) -> Answer:
    """The share of positions of a golden text at which the most probable next id is that of bfloat16 (demo model)."""
    if asked.demo is None:
        return {"left out": "the demo model is missing: `make demo` fetches it"}, []
    best: dict[str, torch.Tensor] = {}
    for scheme in (None, "int8", "int4"):
        llama = Llama.build(asked.demo, None, 1024, 1, device=asked.device, dtype="bfloat16", quantize=scheme)
        text = (HERE / "golden" / "text.txt").read_text()
        ids = llama.tokenizer.encode(text, bos=False, eos=False)[:1024]
        on_device = torch.tensor([ids]).to(llama.executor.device)
        best[scheme or "bfloat16"] = llama.model.forward(on_device, 0)[0].argmax(dim=-1).cpu()
        llama.close()
    exact = best.pop("bfloat16")
    figures = {scheme: (ids == exact).float().mean().item() for scheme, ids in best.items()}
    least = {"int8": 0.9, "int4": 0.6}
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


CASES: dict[str, Callable[[Asked], Answer]] = {
    "golden": golden,
    "bfloat16": bfloat16,
    "memory": memory,
    "compile": compile,
    "quantize": quantize,
    "dropin": dropin,
}


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


# Processes ----------------------------------------------------------------------------------------


def run_case(name: str, ranks: int, flags: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Run a case in its own processes, and return its part of the report."""
    program = [sys.executable]
    if ranks > 1:
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    if name == "bench":
        command = [*program, "-m", "llama", "bench", "--ckpt_dir", str(options.demo), "--device", options.device]
        command += ["--batch", "1,16", "--prompt", "128", "--gen", "64", "--json"]
    else:
        command = [*program, str(Path(__file__)), "--only", name, *flags]
    paths = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    started, failures, figures = time.perf_counter(), list[str](), dict[str, Any]()
    try:
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=TIMEOUT
        )
        lines = done.stdout.splitlines()
        if name == "bench" and done.returncode == 0:
            figures = json.loads(lines[-1])
        elif answers := [line.partition(MARK)[2] for line in lines if MARK in line]:
            figures, failures = json.loads(answers[-1])
        if done.returncode:
            last = [line.strip() for line in done.stderr.splitlines() if "Error" in line or "error" in line]
            failures.append(f"{name} ended with status {done.returncode}: {last[0] if last else 'no reason given'}")
        elif not figures:
            failures.append(f"{name} gave no answer")
    except (subprocess.TimeoutExpired, ValueError) as error:
        failures.append(f"{name}: {error}")
    seconds = round(time.perf_counter() - started, 1)
    return {"name": name, "ranks": ranks, "seconds": seconds, "figures": figures, "failures": failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-report.json"))
    parser.add_argument("--cases", default=",".join([*CASES, "bench"]))
    parser.add_argument("--demo", type=Path, default=HERE.parent / "checkpoints" / "smollm2-135m-instruct")
    parser.add_argument("--golden", type=Path, default=HERE / "golden" / "expected.json")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # a case, run in this process
    parser.add_argument("--folders", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        sys.exit("error: this torch sees no GPU: install a CUDA build of torch, make test-gpu BIN=ITS/bin")
    demo = options.demo if (options.demo / "params.json").exists() else None
    if options.only:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        folders = {name: options.folders / name for name in MODELS}
        asked = Asked(options.device, folders, json.loads(options.golden.read_text()), demo)
        answer = CASES[options.only](asked)
        if is_main_rank():
            print(MARK + json.dumps(answer))
        return 0

    has_nccl = on_gpu and torch.distributed.is_nccl_available()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if on_gpu else []
    report = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None,
        "gpus": gpus,
        "python": platform.python_version(),
        "device": options.device,
    }
    cases = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            write(name, Path(folder) / name, 2)
        flags = ["--device", options.device, "--golden", str(options.golden.absolute()), "--folders", folder]
        flags += ["--demo", str(options.demo.absolute())]
        for name in options.cases.split(","):
            if name == "bench" and demo is None:
                continue
            for ranks in (1, 2) if name in ON_TWO and len(gpus) > 1 else (1,):
                cases.append(run_case(name, ranks, flags, options))
                verdict = "; ".join(cases[-1]["failures"]) or "passed"
                print(f"{name} on {ranks} rank{'s' * (ranks > 1)}, {cases[-1]['seconds']} s: {verdict}", flush=True)
    failures = [failure for case in cases for failure in case["failures"]]
    options.out.write_text(json.dumps(report | {"cases": cases, "failures": failures}, indent=1))
    print(f"{len(failures)} failures. {options.out} holds every figure; you can post it in an issue.")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
