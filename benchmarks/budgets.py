"""Error budgets: how far the results of each way of computing are from a float64 forward of the same weights, with
transformers and Meta's implementation for comparison. Writes docs/accuracy.md.

    python benchmarks/budgets.py --ckpt_dir checkpoints/smollm2-135m-instruct --out docs/accuracy.md

The reference is the numpy forward of tests/helpers/plain.py, which shares no code with the package, on the weights as
the files store them. A second route, transformers with its float32 parts replaced by float64 ones, must give the same
logits to 1e-9, or nothing is written. `benchmarks/accuracy.py` measures quantization only, but on all of the text, on
random weights, and for llama.cpp. Needs '.[test]'. Takes a quarter of an hour on two cores.
"""

import argparse
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

# Must be set before torch is imported: two threads, which do not spin while they wait.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ |= {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import numpy as np
import torch
import torch.nn.functional as F

from compare import processor
from helpers import plain
from llama import Llama
from llama.convert import convert
from llama.parallel.device import DTYPES
from llama.parallel.groups import current_world, is_main_rank
from llama.tokenizer import Tokenizer, find_tokenizer
from sides import Meta

TEXTS, PROMPT, STEPS = 2, 256, 32
TEXT = Path(__file__).parent.parent / "tests/golden/text.txt"
PEERS = ("transformers", "Meta")
SECOND_ROUTE, AGREEMENT = 32, 1e-9  # ids compared, and the largest difference of the two float64 routes

Forward = Callable[[list[int], int], torch.Tensor]  # ids [n] from a position on -> float32 logits [n, vocab]


@dataclass
class Case:
    """A way of computing. layers: compiled (the default), merged or plain of this package; transformers or Meta."""

    dtype: str
    quantize: str | None
    layers: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.dtype}, {self.quantize or 'not quantized'}, {self.layers}, {self.ranks} ranks"


@dataclass
class Figures:
    """Errors as [in prompts, in decode steps]. nll: summed over the prompts' ids. divergent: the first step of any text
    whose most probable id is not that of float64, or None."""

    worst_logit: list[float]
    median_logit: list[float]
    worst_logprob: list[float]
    median_logprob: list[float]
    nll: float
    divergent: int | None


class Reference:
    """PROMPT ids of a text and STEPS ids of its greedy continuation, with float64 logits of all of them."""

    def __init__(self, ids: list[int], logits: torch.Tensor):
        self.ids, self.logits = ids, logits
        # The id that follows each id; for the last one, float64's most probable id.
        self.following = torch.tensor([*ids[1:], int(logits[-1].argmax())])
        self.logprobs = logprobs(logits, self.following)


def logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of ids [n] under float64 logits [n, vocab]."""
    return logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)


# The reference ------------------------------------------------------------------------------------


def references(folder: Path, texts: list[list[int]], into: Path) -> list[Reference]:
    """References of the texts, also saved to `into`. The greedy continuation is computed in float32, which is faster,
    and corrected until float64 agrees with every id of it."""
    params, weights = plain.load(folder)
    found = []
    for number, prompt in enumerate(texts):
        ids = list(prompt)
        while True:
            with ours(folder, Case("float32", None, "merged", 1)) as forward:
                logits = forward(ids, 0)
                while len(ids) < PROMPT + STEPS:
                    ids.append(int(logits[-1].argmax()))
                    logits = forward(ids[-1:], len(ids) - 1)
            exact = plain.logits(params, weights, ids)
            wrong = [i for i in range(PROMPT, len(ids)) if ids[i] != exact[i - 1].argmax()]
            if not wrong:
                break
            ids = [*ids[: wrong[0]], int(exact[wrong[0] - 1].argmax())]
        np.save(into / f"{number}.npy", exact)
        (into / f"{number}.json").write_text(json.dumps(ids))
        found.append(Reference(ids, torch.from_numpy(exact)))
        log(f"text {number + 1} of {len(texts)} in float64")
    return found


def second_route(hf: Path, reference: Reference) -> float:
    """The largest difference from the logits of transformers, computed in float64."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    # sdpa attention computes in the dtype of its inputs; the eager one has a float32 softmax.
    model = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float64, attn_implementation="sdpa").eval()
    if model.config.rope_parameters["rope_type"] != "default":
        raise ValueError("the second float64 route does not implement scaled rotary positions")
    theta, size = model.config.rope_parameters["rope_theta"], model.config.head_dim
    frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)

    def rotary(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = (position_ids[..., None].double() * frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    def float64_norm(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)

    model.model.rotary_emb.forward = rotary
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = float64_norm(module)  # the original computes in float32
    with torch.inference_mode():
        logits = model(torch.tensor([reference.ids[:SECOND_ROUTE]])).logits[0]
    return float((logits - reference.logits[:SECOND_ROUTE]).abs().max())


# What is measured ---------------------------------------------------------------------------------


@contextmanager
def ours(folder: Path, case: Case) -> Iterator[Forward]:
    variant: dict[str, Any] = {"plain": case.layers == "plain", "compile": case.layers == "compiled"}
    sizes: dict[str, Any] = {"max_seq_len": PROMPT + STEPS, "max_batch_size": 1}
    llama = Llama.build(folder, **sizes, device="cpu", dtype=case.dtype, quantize=case.quantize, **variant)
    try:
        yield lambda ids, start: llama.model(torch.tensor([ids]), start)[0]
    finally:
        llama.close()


@contextmanager
def theirs(folder: Path, hf: Path, case: Case) -> Iterator[Forward]:
    if case.layers == "Meta":
        # A model of this package sets up fairscale's groups, which Meta's layers need.
        with ours(folder, Case("bfloat16", None, "plain", 1)):
            model: Any = Meta(folder, case.dtype).model
            yield lambda ids, start: model(torch.tensor([ids]), start)[0]
        return
    from transformers import DynamicCache, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(hf, dtype=DTYPES[case.dtype], attn_implementation="sdpa").eval()
    cache: Any = None

    @torch.inference_mode()
    def forward(ids: list[int], start: int) -> torch.Tensor:
        nonlocal cache
        cache = cache if start else DynamicCache(config=model.config)
        return model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0].float()

    yield forward


def measure(forward: Forward, texts: list[Reference]) -> Figures | None:
    """The figures on rank 0. The other ranks compute their part and return None."""
    off_logits: tuple[list[torch.Tensor], ...] = ([], [])  # differences of logits, in the prompts and in the steps
    off_scores: tuple[list[torch.Tensor], ...] = ([], [])
    nll, divergent = 0.0, list[int]()
    for text in texts:
        logits = [forward(text.ids[:PROMPT], 0)]
        logits += [forward(text.ids[i : i + 1], i) for i in range(PROMPT, len(text.ids))]
        if not is_main_rank():
            continue
        found = torch.cat(logits).double()
        # The prompt's last position predicts the first id; what the last step predicts is not compared.
        wrong = found[PROMPT - 1 : -1].argmax(-1) != torch.tensor(text.ids[PROMPT:])
        divergent += (wrong.nonzero()[:1, 0] + 1).tolist()
        scores = logprobs(found, text.following)
        nll -= float(scores[: PROMPT - 1].sum())
        for part, where in enumerate((slice(0, PROMPT), slice(PROMPT, None))):
            off_logits[part].append((found[where] - text.logits[where]).abs().flatten())
            off_scores[part].append((scores[where] - text.logprobs[where]).abs())
    if not is_main_rank():
        return None
    logit, score = ([torch.cat(parts) for parts in both] for both in (off_logits, off_scores))
    return Figures(
        worst_logit=[float(errors.max()) for errors in logit],
        median_logit=[float(errors.median()) for errors in logit],
        worst_logprob=[float(errors.max()) for errors in score],
        median_logprob=[float(errors.median()) for errors in score],
        nll=nll,
        divergent=min(divergent, default=None),
    )


def run(case: Case, folder: Path, hf: Path, texts: list[Reference]) -> Figures | None:
    started = time.perf_counter()
    peer = case.layers in PEERS
    with theirs(folder, hf, case) if peer else ours(folder, case) as forward:
        figures = measure(forward, texts)
    if figures:
        log(f"{case}: worst logit {max(figures.worst_logit):.2g}, {time.perf_counter() - started:.0f} s")
    gc.collect()
    return figures


def cases(ranks: int) -> list[Case]:
    return [
        Case(dtype, quantize, layers, ranks)
        for dtype in DTYPES
        for quantize in (None, "int8", "int4")
        for layers in ("plain", "merged", "compiled")
        # Plain layers cannot have quantized weights, and float16 is not compiled on CPUs.
        if not ((quantize and layers == "plain") or (dtype == "float16" and layers == "compiled"))
    ]


def on_ranks(ranks: int, folder: Path, references_dir: Path) -> list[Figures]:
    """Run all cases for this number of ranks under one torchrun."""
    out = references_dir / f"{ranks}-ranks.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    subprocess.run([*command, "--worker", str(folder), str(references_dir), str(out)], check=True, env=environment)
    return [Figures(**found) for found in json.loads(out.read_text())]


def work(folder: Path, references_dir: Path, out: Path) -> None:
    """What each rank of `on_ranks` does."""
    texts = [
        Reference(json.loads(path.with_suffix(".json").read_text()), torch.from_numpy(np.load(path)))
        for path in sorted(references_dir.glob("*.npy"))
    ]
    found = [run(case, folder, folder, texts) for case in cases(current_world().size)]
    if is_main_rank():
        out.write_text(json.dumps([asdict(figures) for figures in found if figures]))


def log(text: str) -> None:
    if is_main_rank():
        print(text, file=sys.stderr, flush=True)


# The page -----------------------------------------------------------------------------------------


def table(rows: list[tuple[Case, Figures]], exact_nll: float) -> str:
    lines = [
        "| weights | computed by | ranks | worst logit | median logit | worst log-probability | median log-probability "
        "| perplexity | first other id |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, figures in rows:
        errors = (figures.worst_logit, figures.median_logit, figures.worst_logprob, figures.median_logprob)
        change = math.expm1((figures.nll - exact_nll) / (TEXTS * (PROMPT - 1)))
        cells = [case.quantize or "all bits", case.layers, str(case.ranks)]
        cells += [" / ".join(f"{error:.1e}" for error in both) for both in errors]
        cells += [f"{change:+.2%}" if abs(change) > 1e-4 else f"{change:+.0e}", str(figures.divergent or "none")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(rows: list[tuple[Case, Figures]], texts: list[Reference], agreement: float, minutes: float, argv: str) -> str:
    exact_nll = -sum(float(text.logprobs[: PROMPT - 1].sum()) for text in texts)
    perplexity = math.exp(exact_nll / (TEXTS * (PROMPT - 1)))
    logits = torch.cat([text.logits for text in texts])
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "llama-models"))
    parts = [
        f"""# Accuracy

Written by `{argv}` on {date.today()}, in {minutes:.0f} minutes: {processor()}, {os.environ["OMP_NUM_THREADS"]} threads
(with several ranks one each), Python {platform.python_version()}, {versions}.
Change the script, not this page.

Errors are differences from a float64 forward pass with the weights as the files store them. `tests/helpers/plain.py`
computes it in numpy, without code of the package. transformers in float64, with its float32 parts replaced, agrees to
{agreement:.0e}.
Logits here have a standard deviation of {float(logits.std()):.2f}; the largest is {float(logits.abs().max()):.1f}.

{len(texts)} texts of {PROMPT} ids (`{TEXT.name}`) are computed in one pass each. Then the {STEPS} ids of float64's
greedy continuation are computed one at a time with the KV cache. A cell with two figures has that of the prompts, then
that of the steps. Logits are those of the whole vocabulary, log-probabilities those of the next ids. The perplexity is
that of the prompts, compared with {perplexity:.4f} in float64. "First other id" is the first step, in any text, at
which greedy decoding chooses another id than float64.

"plain" is `--plain`, "merged" is `--no-compile`. "compiled" is the default: it has a compiled decode step, except in
float16. int8 and int4 are those of `--quantize`; their errors come from fewer bits, not from the computation. This
model was quantized to 4 bits before, which makes int4 look better than it is. `benchmarks/accuracy.py` has random
weights, too.
"""
    ]
    for dtype in DTYPES:
        parts.append(f"## {dtype}\n\n{table([row for row in rows if row[0].dtype == dtype], exact_nll)}\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_dir", type=Path, default=Path("checkpoints/smollm2-135m-instruct"))
    parser.add_argument("--ranks", type=int, default=3, help="number of ranks to run after one")
    parser.add_argument("--out", type=Path, default=Path("docs/accuracy.md"))
    parser.add_argument("--worker", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*args.worker)
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder, hf, references_dir = (Path(temporary) / name for name in ("meta", "hf", "references"))
        references_dir.mkdir()
        convert(args.ckpt_dir, folder)  # as one shard
        convert(args.ckpt_dir, hf, to="hf")
        tokenizer = Tokenizer(find_tokenizer(folder))
        ids = tokenizer.encode(TEXT.read_text("utf-8"), bos=False, eos=False)
        starts = range(0, len(ids) - PROMPT, len(ids) // TEXTS)
        prompts = [([tokenizer.bos_id] * tokenizer.adds_bos + ids[start:])[:PROMPT] for start in starts][:TEXTS]
        texts = references(folder, prompts, references_dir)
        agreement = second_route(hf, texts[0])
        log(f"the float64 routes differ by {agreement:.1g}")
        if not agreement < AGREEMENT:
            raise SystemExit(f"budgets.py: the two float64 routes differ by {agreement:.2g}, so neither is exact")
        one = cases(1) + [Case(dtype, None, peer, 1) for peer in PEERS for dtype in DTYPES]
        rows = [(case, figures) for case in one if (figures := run(case, folder, hf, texts))]
        rows += zip(cases(args.ranks), on_ranks(args.ranks, folder, references_dir), strict=True)
    minutes = (time.perf_counter() - started) / 60
    args.out.write_text(page(rows, texts, agreement, minutes, " ".join(["python", *sys.argv])), encoding="utf-8")


if __name__ == "__main__":
    main()
