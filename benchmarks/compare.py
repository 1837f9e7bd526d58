"""Speed of this runner, Meta's implementation, `transformers` and llama.cpp, on the same weights, prompts and dtype.

Each of the others runs in its own process. If one crashes, the table names the signal or the exception.

    python benchmarks/compare.py --ckpt_dir checkpoints/smollm2-135m-instruct --out compare.json --plot compare.png
    python benchmarks/compare.py --random_1b --tokenizer ../shared/tokenizers/llama2.model

First, all must produce the same greedy ids in float32. Then, for each case, the implementations run one after the other
in each round: one warm-up round, then `--rounds` measured ones. All choose ids by argmax, ours in the engine (`stream`,
`generate`). Each cell has the median, then the speed as a multiple of ours: median, lowest and highest of the rounds.

Needs '.[test]' and llama-cpp-python; implementations that are not installed are left out. Run it on an otherwise idle
machine.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from statistics import median

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # nothing is downloaded

import torch

from llama import Llama
from llama.convert import convert
from llama.params import ModelArgs
from sides import CONTEXT, FILE_TYPES, THREADS, Ours, PeerFailed, Side, clock, meta_folder, sides_of, write_random

COLUMNS = ("ours", "ours, eager", "ours, plain", "Meta", "transformers", "llama.cpp")
TEXTS = ("The capital of France is", "Once upon a time there was a miller who had", "Iron melts at")
MATMUL = 2048  # rows and columns of the matrix product to whose rate prefills are compared
RAGGED, NEW, ROWS = (8, 64, 256, 512), 32, 16  # prompt lengths, new ids for each; rows of the other batch
# The shape of TinyLlama-1.1B.
RANDOM_1B = {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "hidden_dim": 5632, "vocab_size": 32000}

Runs = dict[str, Callable[[], float]]  # name -> a run that returns its seconds


@dataclass
class Case:
    """A row of the table. seconds: of each round, by the name of an implementation or of another measurement.

    unit: "tokens/s" (for `amount` tokens a run), "ms" or "s". failed: name -> why an implementation has no figure.
    """

    name: str
    unit: str
    amount: int = 1
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def fail(self, name: str, reason: str) -> None:
        """Record the reason, and discard earlier rounds: a median of fewer rounds would not be comparable."""
        self.failed[name] = reason
        self.seconds.pop(name, None)
        print(f"{self.name}: {name} failed: {reason}", file=sys.stderr, flush=True)

    def value(self, name: str) -> float:
        seconds = median(self.seconds[name])
        return {"tokens/s": self.amount / seconds, "ms": 1000 * seconds, "s": seconds}[self.unit]

    def text(self, name: str) -> str:
        return f"{self.value(name):.3g}" if self.value(name) < 100 else f"{self.value(name):,.0f}"

    def multiple(self, name: str, base: str = "ours") -> str:
        """Speed as a multiple of the base's: median, lowest and highest of the rounds that both have."""
        found = [b / a for a, b in zip(self.seconds[name], self.seconds[base], strict=False)]
        return f"{median(found):.2f}x, {min(found):.2f} to {max(found):.2f}"

    def cell(self, name: str) -> str:
        if name in self.failed:
            return self.failed[name].replace("|", "\\|")
        if name not in self.seconds:
            return ""
        return self.text(name) + ("" if name == "ours" else f" ({self.multiple(name)})")


def timed(case: Case, runs: Runs, rounds: int, once: Iterable[str] = ()) -> Case:
    """Run all in each round, and record the seconds in `case`. The first round is a warm-up and is not recorded.

    once: names that run in the first recorded round only, without warm-up.

    An implementation that fails is not run again.
    """
    for n in range(rounds + 1):
        for name, run in runs.items():
            if name in case.failed or (name in once and n != 1):
                continue
            try:
                seconds = run()
            except PeerFailed as error:
                case.fail(name, str(error))
                continue
            if n:
                case.seconds.setdefault(name, []).append(seconds)
    print(f"{case.name}, s:", *(f"{k} {median(v):.3g};" for k, v in case.seconds.items()), file=sys.stderr, flush=True)
    return case


def matmul(dtype: torch.dtype) -> float:
    """Seconds for a product of two square matrices."""
    a, product = torch.randn(2, MATMUL, MATMUL, dtype=dtype)
    return median(clock(lambda: torch.mm(a, a, out=product)) for _ in range(5))


def random_ids(n: int, vocab: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(vocab), k=n)


def check(sides: list[Side], kind: str, vocab: int, failed: Callable[[str, str], None]) -> list[Side]:
    """Check that all hold the same model.

    In float32: the same 24 greedy ids after each text. In bfloat16, where rounding may change an id: the same first id
    after at least half of 16 random prompts. Quantized weights differ, so equal ids are only counted.

    Returns the sides that answered, and calls `failed` with name and reason for each of the others. Raises SystemExit
    if two models differ.
    """
    prompts, new = [random_ids(16, vocab, seed) for seed in range(16)], 1
    if kind == "float32" and isinstance(sides[0], Ours):
        tokenizer, new = sides[0].llama.tokenizer, 24
        prompts = [tokenizer.encode(text, bos=tokenizer.adds_bos, eos=False) for text in TEXTS]
    needed = len(prompts) * {"float32": 1, "bfloat16": 0.5}.get(kind, 0)
    expected = [sides[0].first(prompt, new) for prompt in prompts]
    answered = sides[:1]
    for side in sides[1:]:
        try:
            ids = [side.first(prompt, new) for prompt in prompts]
        except PeerFailed as error:
            failed(side.name, str(error))
            side.close()
            continue
        answered.append(side)
        equal = [a == b for a, b in zip(ids, expected, strict=True)]
        line = f"{kind}: {side.name} continues like ours after {sum(equal)} of {len(equal)} prompts"
        if sum(equal) < needed:
            n = equal.index(False)
            raise SystemExit(f"{line}: the models differ; prompt {n}: {ids[n]}, ours {expected[n]}")
        print(line, file=sys.stderr)
    return answered


def measure(kind: str, sides: list[Side], vocab: int, steps: int, rounds: int) -> list[Case]:
    """Decode and prefill of one row, and a matrix product in the same dtype next to the prefill of 512."""
    label = f"{kind} (llama.cpp {FILE_TYPES[kind][0]})" if kind.startswith("int") else kind
    ids = {n: random_ids(n, vocab) for n in (128, 512)}
    runs: Runs = {side.name: partial(side.time_decode, ids[128], steps) for side in sides}
    cases = [timed(Case(f"decode after 128, {label}", "tokens/s", steps), runs, rounds)]
    for n in (128, 512) if kind == "bfloat16" else (512,):
        runs = {side.name: partial(side.time_prefill, ids[n]) for side in sides}
        if n == 512:
            runs["matmul"] = partial(matmul, torch.float32 if kind == "float32" else torch.bfloat16)
        cases.append(timed(Case(f"prefill of {n}, {label}", "ms"), runs, rounds))
    return cases


def measure_batches(sides: list[Side], vocab: int, steps: int, rounds: int, with_meta: bool) -> list[Case]:
    """Many rows, bfloat16. Meta's loop takes about a minute for the ragged batch: it runs once, without warm-up."""
    prompts = [random_ids(n, vocab) for n in RAGGED]
    names = ["ours", "ours, eager", "transformers", *["Meta"] * with_meta]
    chosen = [side for side in sides if side.name in names]
    ragged: Runs = {side.name: partial(side.time_ragged, prompts, NEW) for side in chosen}
    batch: Runs = {}
    for side in chosen:
        if isinstance(side, Ours):
            batch[side.name] = partial(side.time_rows, random_ids(128, vocab), ROWS, steps)
            batch[f"{side.name}, 1 row"] = partial(side.time_rows, random_ids(128, vocab), 1, steps)
    label = f"prompts of {'/'.join(map(str, RAGGED))}, {NEW} new ids each, bfloat16"
    return [
        timed(Case(label, "s"), ragged, rounds if with_meta else 1, once=["Meta"]),
        timed(Case(f"decode after 128, {ROWS} rows, bfloat16", "tokens/s", ROWS * steps), batch, rounds),
    ]


def measure_loading(folder: Path, rounds: int) -> list[Case]:
    """`build` compared to one copy of the mapped bytes, and `import llama` compared to `import torch`."""

    def build() -> float:
        with contextlib.redirect_stderr(io.StringIO()):
            return clock(lambda: Llama.build(folder, device="cpu", dtype="bfloat16").close())

    def copy() -> float:
        return clock(lambda: [weight.clone() for weight in meta_folder(folder)[1].values()])

    imports: Runs = {
        name: partial(clock, partial(subprocess.run, [sys.executable, "-c", f"import {name}"], check=True))
        for name in ("llama", "torch")
    }
    return [
        timed(Case("load", "s"), {"build": build, "copy": copy}, rounds),
        timed(Case("import", "s"), imports, rounds),
    ]


def operations(args: ModelArgs, n: int) -> float:
    """Floating-point operations of a prefill of n ids: two for each id and weight of a matrix, and two for each element
    of the keys and values that a query attends to. The output layer is computed for the last position only."""
    width = args.n_heads * args.head_dim
    weights = args.dim * (2 * width + 2 * args.kv_heads * args.head_dim + 3 * args.hidden_dim)
    return 2 * args.n_layers * (weights * n + width * n * (n + 1)) + 2 * args.dim * args.vocab_size


def report(cases: list[Case], args: ModelArgs) -> str:
    """Markdown: the table, the prefills' rates as shares of the matrix product's, and a line for each other figure."""
    names = [name for name in COLUMNS if any(name in case.seconds or name in case.failed for case in cases)]
    lines = [f"| case | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    shares = [f"| prefill of 512, share of | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    notes = []
    for case in cases:
        if "ours" in case.seconds or case.failed:
            lines.append(f"| {case.name}, {case.unit} | {' | '.join(map(case.cell, names))} |")
        if products := case.seconds.get("matmul"):
            rates = [2 * MATMUL**3 / seconds for seconds in products]
            row = [f"{case.name.split(', ')[1]}, {median(rates) / 1e9:,.0f} GF/s"]
            for name in names:
                pairs = zip(case.seconds.get(name, []), rates, strict=False)
                share = [operations(args, 512) / seconds / rate for seconds, rate in pairs]
                row.append(f"{median(share):.0%}" if share else "")
            shares.append(f"| {' | '.join(row)} |")
        for name in (name for name in names if f"{name}, 1 row" in case.seconds):
            alone = [ROWS * seconds for seconds in case.seconds[f"{name}, 1 row"]]
            gain = Case("", "s", seconds={"batch": case.seconds[name], "alone": alone}).multiple("batch", "alone")
            notes.append(f"- {name}, {ROWS} rows compared to one, tokens/s: {gain}")
        if case.name in ("load", "import"):
            longer, shorter = case.seconds
            more = median(a - b for a, b in zip(case.seconds[longer], case.seconds[shorter], strict=True))
            values = f"{longer} {case.value(longer):.2f} s, {shorter} {case.value(shorter):.2f} s"
            notes.append(f"- {case.name}: {values} ({case.multiple(shorter, longer)}), difference {more:.2f} s")
    return "\n".join([*lines, "", *shares, "", *notes])


def plot(cases: list[Case], path: str, title: str) -> None:
    try:
        figures = import_module("matplotlib.figure")
    except ImportError:
        print(f"matplotlib is not installed, {path} is not drawn", file=sys.stderr)
        return
    shown = [case for case in cases if "ours" in case.seconds]
    figure = figures.Figure(figsize=(12, 1.8 * len(shown) / 2 + 2), layout="constrained")
    for n, case in enumerate(shown):
        axis = figure.add_subplot(-(-len(shown) // 2), 2, n + 1)
        names = [name for name in COLUMNS if name in case.seconds][::-1]
        colors = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in names]
        bars = axis.barh(names, [case.value(name) for name in names], color=colors)
        axis.bar_label(bars, [case.text(name) for name in names], padding=3)
        better = "more" if case.unit == "tokens/s" else "less"
        axis.set_title(f"{case.name}: {case.unit}, {better} is better", fontsize=9, loc="left")
        axis.margins(x=0.15)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(": ", 1)[1]
    return platform.processor()


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(THREADS)
    rounds, steps = (2, 16) if options.quick else (options.rounds, 64)
    if rounds < 1:
        raise ValueError(f"--rounds is {rounds}, expected 1 or more")
    if options.gguf and (options.random_1b or not options.gguf.is_file()):
        raise ValueError(f"--gguf {options.gguf} is not a file, or --random_1b is given")
    cases, left_out = list[Case](), list[str]()

    def skip(line: str) -> None:
        left_out.append(line)
        print(line, file=sys.stderr)

    with tempfile.TemporaryDirectory() as temporary:
        folder, wide = Path(temporary) / "bfloat16", Path(temporary) / "float32"
        if options.random_1b:
            if not options.tokenizer.is_file():
                raise ValueError(f"{options.tokenizer} is not a file: name Llama 2's tokenizer.model with --tokenizer")
            write_random(folder, options.tokenizer, RANDOM_1B)
        else:
            convert(options.ckpt_dir, folder, dtype="bfloat16")
            convert(options.gguf or options.ckpt_dir, wide, dtype="float32")
        args = ModelArgs(**meta_folder(folder)[0])
        for kind in list(FILE_TYPES)[options.random_1b :]:
            batches = kind == "bfloat16" and not options.random_1b
            place = wide if kind == "float32" else folder
            start = Case(f"start, {kind}", "s")  # becomes a row only if something fails before it is measured
            sides = sides_of(kind, place, options.gguf, ROWS if batches else 1, skip, start.fail)
            ours_too = [side.name for side in sides[:1]] == ["ours"]
            if ours_too:
                sides = check(sides, kind, args.vocab_size, start.fail)
            if start.failed:
                cases.append(start)
            if ours_too:
                cases += measure(kind, sides, args.vocab_size, steps, rounds)
                if batches:
                    cases += measure_batches(sides, args.vocab_size, steps, rounds, with_meta=not options.quick)
            while sides:
                sides.pop().close()
            gc.collect()  # only models of one kind are in memory at a time
        cases += measure_loading(folder, rounds)
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "llama-models", "llama-cpp-python"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    model = "random weights, 1.1B" if options.random_1b else options.ckpt_dir.resolve().name
    machine = {"cpu": processor(), "threads": THREADS, "versions": versions, "date": str(date.today())}
    title = f"{model}; {processor()}, {THREADS} threads; {date.today()}, {rounds} rounds"
    title += "\n" + ", ".join(map(" ".join, versions.items()))
    print(f"\n{title}\n\n{report(cases, args)}")
    if options.out:
        found = {"model": model, "machine": machine, "rounds": rounds, "steps": steps, "context": CONTEXT}
        found |= {"left_out": left_out, "cases": [asdict(case) for case in cases]}
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        plot(cases, options.plot, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_dir", type=Path, default=Path("checkpoints/smollm2-135m-instruct"))
    parser.add_argument("--gguf", type=Path, help="the same weights, for llama.cpp and float32; default: from ckpt_dir")
    parser.add_argument(
        "--random_1b", action="store_true", help="random weights of 1.1B parameters instead; without float32"
    )
    parser.add_argument(
        "--tokenizer", type=Path, default=Path("../shared/tokenizers/llama2.model"), help="for --random_1b"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="2 rounds, 16 steps, the ragged batch once, not Meta's way"
    )
    parser.add_argument("--out", help="JSON with every round")
    parser.add_argument("--plot", help="bar charts as PNG")
    try:
        run(parser.parse_args())
    except (ValueError, OSError) as error:
        raise SystemExit(f"compare.py: {error}") from None


if __name__ == "__main__":
    main()
