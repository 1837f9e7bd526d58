"""The accuracy of quantized weights: perplexity of a text and errors of logits, for int8 and int4 of this runner and
llama.cpp's Q8_0 and Q4_0 of the same weights.

    python benchmarks/accuracy.py --ckpt_dir checkpoints/smollm2-135m-instruct

Perplexity is that of the complete text, in windows of 512 ids, as `python -m llama perplexity` computes it. Errors are
those of the logits at 256 positions of a model of the same shape with random weights (normal, deviation 0.02), compared
to float32, in units of the logits' standard deviation. Random weights are used because a published model's weights may
have been quantized before (the demo model's matrices were, to 4 bits), which makes its perplexity look better. Needs
'.[test]'; without llama-cpp-python its rows are missing. Takes ten minutes on two cores.
"""

import argparse
import gc
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llama.convert import convert
from llama.evaluate.scoring import windows
from llama.tokenizer import find_tokenizer
from sides import FILE_TYPES, THREADS, LlamaCpp, Ours, meta_folder, write_random

WINDOW, POSITIONS = 512, 256
TEXT = Path(__file__).parent.parent / "tests/golden/text.txt"

Logits = Callable[[list[int]], torch.Tensor]  # ids [n] -> [n, vocab]


def with_ours(folder: Path, kind: str, use: Callable[[Logits], float]) -> float:
    dtype = "float32" if kind == "float32" else "bfloat16"
    quantized: dict[str, Any] = {"quantize": kind} if kind.startswith("int") else {}
    llama = Ours("ours", folder, dtype, 1, **quantized).llama
    try:
        return use(lambda ids: llama.model(torch.tensor([ids]), 0)[0])
    finally:
        llama.close()


def with_llama_cpp(folder: Path, kind: str, use: Callable[[Logits], float]) -> float:
    side = LlamaCpp(folder, kind, None, all_logits=True)
    try:
        return use(side.logits)
    finally:
        side.model.close()


def perplexity(logits: Logits, ids: list[int]) -> float:
    """exp of the mean negative log-likelihood of all ids except the first."""
    nll = 0.0
    for text in windows(ids, WINDOW, WINDOW):
        found = logits(list(text.ids[:-1]))[text.start - 1 :].double().log_softmax(dim=-1)
        nll -= float(found.gather(-1, torch.tensor(text.ids[text.start :])[:, None]).sum())
    return math.exp(nll / (len(ids) - 1))


def error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square error, in units of the exact logits' standard deviation."""
    return float((logits.double() - exact).square().mean().sqrt() / exact.std())


def measure(folder: Path, use: Callable[[Logits], float]) -> dict[str, dict[str, float]]:
    """{"ours": {kind: figure}, "llama.cpp": {kind: figure}}; an implementation that is not installed is missing."""
    found: dict[str, dict[str, float]] = {}
    for name, run in {"ours": with_ours, "llama.cpp": with_llama_cpp}.items():
        for kind in FILE_TYPES:
            try:
                found.setdefault(name, {})[kind] = run(folder, kind, use)
            except ImportError as missing:
                print(f"{name} is left out ({missing})", file=sys.stderr)
                break
            gc.collect()
            print(f"{folder.name}, {name}, {kind}: {found[name][kind]:.6g}", file=sys.stderr, flush=True)
    return found


def report(perplexities: dict[str, dict[str, float]], errors: dict[str, dict[str, float]]) -> str:
    lines = ["| weights | perplexity | relative to bfloat16 | error of random weights' logits |", "|---|---|---|---|"]
    for name, values in perplexities.items():
        for kind, value in values.items():
            label = f"{name}, {kind}" if name == "ours" else f"{name}, {FILE_TYPES[kind][0]}"
            change = f"{value / values['bfloat16'] - 1:+.2%}"
            lines.append(f"| {label} | {value:.4f} | {change} | {errors[name][kind]:.2g} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_dir", type=Path, default=Path("checkpoints/smollm2-135m-instruct"))
    parser.add_argument("--file", type=Path, default=TEXT)
    parser.add_argument("--out", help="JSON with every figure")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as temporary:
        model, random = Path(temporary) / "model", Path(temporary) / "random"
        convert(args.ckpt_dir, model, dtype="float32")
        params = meta_folder(model)[0]
        write_random(random, find_tokenizer(model), params, "float32")

        llama = Ours("ours", model, "float32", 1, plain=True).llama
        ids = llama.tokenizer.encode(args.file.read_text("utf-8"), bos=llama.tokenizer.adds_bos, eos=False)
        llama.close()
        perplexities = measure(model, lambda logits: perplexity(logits, ids))

        drawn = torch.randint(params["vocab_size"], (POSITIONS,), generator=torch.Generator().manual_seed(0)).tolist()
        llama = Ours("ours", random, "float32", 1, plain=True).llama
        exact = llama.model(torch.tensor([drawn]), 0)[0].double()
        llama.close()
        errors = measure(random, lambda logits: error(logits(drawn), exact))
    print(f"{len(ids):,} ids of {args.file.name}\n\n{report(perplexities, errors)}")
    if args.out:
        found = {"ids": len(ids), "window": WINDOW, "perplexity": perplexities, "error": errors}
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
