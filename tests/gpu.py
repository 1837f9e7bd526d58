"""`make test-gpu`: tests of this runner on CUDA and NCCL, and its speed, on one GPU, in five minutes.

    python tests/gpu.py [--device cuda] [--out gpu-report.json] [--cases golden,kill@2] [--compile] [--demo DIR]

Prints tables in markdown and writes one JSON file with versions, GPUs, every figure and every failure; exit status 1 if
there is any failure. Each case runs in its own process, so a crash is one line of the report. NAME@N is a case on N
ranks, which share a GPU if there are not enough (see gpu_ranks.py). `--cases speed` selects all cases whose name begins
with speed-.

With `--device cpu` everything runs over gloo, and speed is measured on tiny models.
"""

import argparse
import json
import platform
import shlex
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import gpu_speed  # noqa: E402  (the path above makes it importable)
from golden.make_checkpoint import write  # noqa: E402
from gpu_cases import CASES, MARK, MODELS, Answer, Asked, first_error  # noqa: E402
from gpu_ranks import PROGRAMS, Ranks  # noqa: E402

# Several of these run at the same time, because none of them measures time; the random checkpoints are written
# meanwhile. Ranks that share a GPU take turns on it, so cases of several ranks alternate with cases of one.
CHECKS = ["compile", "golden@2", "memory", "eager@2", "dropin", "bfloat16@2", "golden@4", "golden", "eager@4", "eager"]
CHECKS += ["bfloat16@4", "bfloat16", "kill@2", "quantize", "stop@2", "serve@2", "chat@2", "kill@4", "stop@4"]
# These run alone, one after the other. The last one runs only if there is time for it.
SPEEDS = ["bench", "speed-card", "speed-bfloat16", "speed-prefill", "speed-int8", "speed-int4", "speed-fp8"]
SPEEDS += ["speed-ready", "speed-transformers", "speed-context"]
LIMIT = 100  # seconds for a case
LIMITS = {"speed-bfloat16": 60, "speed-prefill": 40, "speed-int8": 40, "speed-int4": 40, "speed-fp8": 40}
LIMITS |= {"speed-card": 30, "speed-ready": 40, "speed-transformers": 60, "speed-context": 60, "bench": 60}
TOTAL_LIMITS = {True: 285, False: 1800}  # seconds for all cases, on CUDA and elsewhere
CPU_LIMIT = 600  # seconds for a case there


class Run:
    """One run of the selected cases. `folder` gets the checkpoints."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        self.on_gpu = options.device.startswith("cuda")
        self.until = time.monotonic() + (options.limit or TOTAL_LIMITS[self.on_gpu])
        self.reports: list[dict[str, Any]] = []
        for name in MODELS:
            write(name, folder / name, 2)
        self.left_out = gpu_speed.left_out(folder, options.device)
        self.names = expanded(options.cases, options.compile)
        needed = {*map(model_of, self.names), *(("small", "large") if "memory" in self.names else ())}
        models = [m for m in gpu_speed.plan_of(options.device).models if m in needed and m not in self.left_out]
        self.asked = asked_of(options, folder, models)
        self.flags = ["--device", options.device, "--golden", str(options.golden.absolute()), "--folders", str(folder)]
        self.flags += ["--demo", str(options.demo.absolute()), "--random", ",".join(models)]

    def all(self) -> None:
        """Run the selected cases: first the checks, then what measures time."""
        speeds = [name for name in self.names if name.partition("@")[0] in (*SPEEDS, "speed-compile")]
        checks = [name for name in self.names if name not in speeds]
        if self.asked.random:
            checks.insert(0, "write")
        with ThreadPoolExecutor(self.options.jobs or (4 if self.on_gpu else 1)) as pool:
            try:
                self.reports += pool.map(self.case, checks)
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                for ranks in list(Ranks.running):
                    ranks.kill()
                raise
        for model, reason in self.left_out.items():
            if any(model_of(name) == model for name in speeds):
                speeds = [name for name in speeds if model_of(name) != model]
                figures = {"left out": reason}
                self.reports.append(
                    {"name": f"speed-{model}", "ranks": 1, "seconds": 0.0, "figures": figures, "failures": []}
                )
                print(f"speed-{model}: {verdict(self.reports[-1])}", flush=True)
        for name in speeds:
            self.reports.append(self.case(name))

    def case(self, case: str) -> dict[str, Any]:
        """Run a case and return its part of the report."""
        name, _, count = case.partition("@")
        ranks, started, figures, failures = int(count or 1), time.monotonic(), dict[str, Any](), list[str]()
        limit = min(LIMITS.get(name, LIMIT) if self.on_gpu else CPU_LIMIT, self.until - started)
        try:
            if reason := self.reason_to_leave_out(name, limit):
                figures = {"left out": reason}
            elif limit < 5:
                failures = [f"{case} was not run: the time for all cases was over"]
            elif model_of(name) and not self.asked.random[model_of(name)].exists():
                failures = [f"{case} was not run: its checkpoint was not written"]
            elif name in PROGRAMS:
                figures, failures = PROGRAMS[name](self.asked, ranks, limit)
            elif name in gpu_speed.BENCHES:
                plan = gpu_speed.plan_of(self.options.device)
                figures, failures = gpu_speed.bench_rows(self.asked, limit, *gpu_speed.BENCHES[name](plan))
            else:
                figures, failures = self.process(name, ranks, limit)
        except (OSError, ValueError) as error:
            failures = [f"{case}: {error}"]
        seconds = round(time.monotonic() - started, 1)
        report = {"name": name, "ranks": ranks, "seconds": seconds, "figures": figures, "failures": failures}
        print(f"{case}, {seconds} s: {verdict(report)}", flush=True)
        return report

    def reason_to_leave_out(self, name: str, limit: float) -> str:
        if name == "speed-context" and self.on_gpu and limit < LIMITS[name]:
            return f"only {limit:.0f} s were left"
        if name == "bench" and self.asked.demo is None:
            return "the demo model is missing: `make demo` fetches it"
        return ""

    def process(self, name: str, ranks: int, limit: float) -> Answer:
        """Run a case of CASES or `llama bench` in its own processes."""
        if name == "bench":
            command = [sys.executable, "-m", "llama", "bench", "--ckpt_dir", str(self.asked.demo), "--json"]
            command += ["--device", self.options.device, "--batch", "1,16" if self.on_gpu else "1"]
            command += ["--prompt", "128", "--gen", "64"]
        else:
            command = [sys.executable, str(Path(__file__).absolute()), "--only", name, *self.flags]
        with Ranks(command, ranks, self.options.device) as running:
            statuses = running.wait(limit)
            found = [running.answer(rank) for rank in range(ranks)]
            if name == "bench" and statuses[0] == 0:
                found[0] = json.loads(running.text(0, "out")), []
            figures, failures = found[0] or ({}, [])
            for rank, status in statuses.items():
                failures = failures + [f"rank {rank}: {line}" for line in (found[rank] or ({}, []))[1] if rank > 0]
                if status:
                    failures.append(f"{name} ended with status {status}: {first_error(running.text(rank, 'err'))}")
        if not figures and not failures:
            failures = [f"{name} gave no answer"]
        return figures, failures


def model_of(name: str) -> str:
    """The random checkpoint that a case of SPEEDS needs, "" if it needs none."""
    if not name.startswith("speed-") or name in ("speed-card", "speed-transformers"):
        return ""
    return "long" if name == "speed-context" else "large"


def expanded(cases: str | None, compile: bool) -> list[str]:
    """The names of the selected cases."""
    if cases is None:
        # With several GPUs, ranks that have one each.
        names = [*CHECKS, *SPEEDS, *(["bench@2"] if torch.cuda.device_count() > 1 else [])]
    else:
        speeds = [name for name in SPEEDS if name.startswith("speed-")]
        names = [name for given in cases.split(",") for name in (speeds if given == "speed" else [given])]
    names += ["speed-compile"] if compile else []
    known = {*CASES, *PROGRAMS, *SPEEDS, "speed-compile"}
    for name in names:
        base, _, count = name.partition("@")
        if base not in known or not (count or "1").isdigit():
            raise ValueError(f"there is no case {name!r}: the names are {', '.join(sorted(known))}, with @N on N ranks")
    return names


def asked_of(options: argparse.Namespace, folder: Path, models: list[str]) -> Asked:
    return Asked(
        options.device,
        {name: folder / name for name in MODELS},
        json.loads(options.golden.read_text()),
        options.demo if (options.demo / "params.json").exists() else None,
        {name: folder / name for name in models},
    )


def verdict(report: dict[str, Any]) -> str:
    """The failures of a case, else its figures, in one line."""
    figures = report["figures"]
    if report["failures"]:
        return "FAILED: " + "; ".join(report["failures"])
    if "left out" in figures:
        return f"left out: {figures['left out']}"
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in figures.items()}
    parts = [f"{name} {value}" for name, value in shown.items() if not isinstance(value, list | dict)]
    parts += [f"{name} {value['planned'] / value['measured']:.2f}" for name, value in figures.items()
              if isinstance(value, dict) and value.get("measured")]  # fmt: skip
    return ", ".join(["passed", *parts])


def tables(run: Run, command: str) -> str:
    """The results as markdown."""
    checks = [report for report in run.reports if not report["name"].startswith("speed-")]
    body = [
        [report["name"], str(report["ranks"]), str(report["seconds"]), verdict(report).replace("|", "/")]
        for report in checks
    ]
    lines = [gpu_speed.heading(run.options.device, command), ""]
    lines += gpu_speed.markdown(["case", "ranks", "s", "result"], body) if body else []
    speeds = [report for report in run.reports if report["name"].startswith("speed-")]
    if speeds:
        lines += ["", *gpu_speed.speed_tables({r["name"]: r["figures"] for r in speeds}, run.options.device), ""]
    for report in speeds:
        if report["failures"] or "left out" in report["figures"]:
            lines.append(f"- {report['name']}: {verdict(report)}")
    return "\n".join(lines)


def run_here(options: argparse.Namespace) -> None:
    """Run a case in this process, and print its result."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    asked = asked_of(options, options.folders, [name for name in options.random.split(",") if name])
    print(MARK + json.dumps((CASES | gpu_speed.CASES)[options.only](asked)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-report.json"))
    parser.add_argument("--cases", help="names with commas between them; default: all")
    parser.add_argument("--compile", action="store_true", help="also the speed of --compile, which takes a minute")
    parser.add_argument("--limit", type=float, help="seconds for all cases; default: 285 on cuda, 1,800 on cpu")
    parser.add_argument("--jobs", type=int, help="checks that run at the same time; default: 4 on cuda, 1 on cpu")
    parser.add_argument("--demo", type=Path, default=HERE.parent / "checkpoints" / "smollm2-135m-instruct")
    parser.add_argument("--golden", type=Path, default=HERE / "golden" / "expected.json")
    for name, kind in {"--only": str, "--folders": Path, "--random": str}.items():  # of a case's process
        parser.add_argument(name, type=kind, default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        sys.exit("error: this torch sees no GPU: install a CUDA build of torch, make test-gpu BIN=ITS/bin")
    if options.only:
        run_here(options)
        return 0
    try:
        expanded(options.cases, options.compile)
    except ValueError as error:
        sys.exit(f"error: {error}")
    has_nccl = on_gpu and torch.distributed.is_nccl_available()
    report = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if on_gpu else [],
        "python": platform.python_version(),
        "device": options.device,
    }
    with tempfile.TemporaryDirectory() as folder:
        run = Run(options, Path(folder))
        run.all()
    failures = [failure for case in run.reports for failure in case["failures"]]
    options.out.write_text(json.dumps(report | {"cases": run.reports, "failures": failures}, indent=1))
    print("", tables(run, shlex.join(["python", "tests/gpu.py", *sys.argv[1:]])), "", sep="\n")
    print(f"{len(failures)} failures. {options.out} holds every figure; you can post it in an issue.")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
