"""Requests per second of the adapter for lm-evaluation-harness, and of the harness's `hf` backend on the same weights.

    python benchmarks/scoring.py --ckpt_dir checkpoints/smollm2-135m-instruct

Both score the same requests with the same batch size, dtype and threads, alternately, after a warm-up round. Prints
the medians of the rounds and their ratio. Needs '.[eval,convert]', transformers and accelerate, and an otherwise idle
machine: other programs slow down threads that wait for each other.
"""

import argparse
import os
import platform
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # nothing is downloaded; only one backend has progress bars

import lm_eval
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from llama.convert import convert
from llama.evaluate.lm_eval_adapter import MetaLlama

# fmt: off
SUBJECTS = ("The old miller", "A young doctor", "My neighbour", "The captain of the ferry", "Nobody in the village",
            "The teacher", "A tall stranger", "Her brother", "The keeper of the lighthouse", "Our cook")
VERBS = ("carried", "had forgotten", "was looking for", "wrote about", "sold", "could not find", "repaired", "painted")
OBJECTS = ("a wooden box", "the letter from the north", "three grey horses", "the broken clock", "a map of the river",
           "the last loaf of bread", "a pair of new boots", "the key of the church", "his father's violin")
PLACES = ("before the rain came", "on the road to the harbour", "in the middle of the night", "when the bells rang",
          "behind the station", "without telling anyone", "as he had done every winter", "under the bridge")
# fmt: on


def sentence(stream: random.Random) -> str:
    return " ".join(stream.choice(words) for words in (SUBJECTS, VERBS, OBJECTS, PLACES)) + "."


def multiple_choice(questions: int) -> list[Instance]:
    """Questions about a passage of about 130 tokens, with four answers of 3 to 12 tokens each."""
    stream, found = random.Random(1), []
    for _ in range(questions):
        passage = " ".join(sentence(stream) for _ in range(stream.randint(6, 9)))
        context = f"{passage}\n\nQuestion: What happened {stream.choice(PLACES)}?\nAnswer:"
        for i in range(4):
            answer = " ".join(stream.choice(words) for words in (SUBJECTS, VERBS, OBJECTS)[stream.randint(0, 2) :])
            found.append(Instance("loglikelihood", {}, (context, f" {answer}"), i))
    return found


def rolling(lengths: list[int]) -> list[Instance]:
    """Texts of about `lengths` tokens."""
    stream = random.Random(2)
    written = [" ".join(sentence(stream) for _ in range(max(1, length // 14))) for length in lengths]
    return [Instance("loglikelihood_rolling", {}, (text,), 0) for text in written]


def documents(tokens: int, longest: int) -> list[int]:
    """Lengths of documents that have `tokens` tokens in total: many short ones, few long ones."""
    stream, found = random.Random(3), list[int]()
    while sum(found) < tokens:
        found.append(round(30 * (longest / 30) ** stream.random()))
    return found


def compare(name: str, method: str, requests: list[Instance], ours: MetaLlama, theirs: HFLM, rounds: int) -> str:
    """A line of the table; the first round only warms up."""
    times: tuple[list[float], list[float]] = ([], [])
    answers: list[list[Any]] = [[], []]
    for n in range(rounds + 1):
        for which, lm in enumerate((ours, theirs)):
            started = time.perf_counter()
            answers[which] = getattr(lm, method)(requests, disable_tqdm=True)
            if n:
                times[which].append(time.perf_counter() - started)
    sums = [[answer[0] if isinstance(answer, tuple) else answer for answer in each] for each in answers]
    worst = max(abs(a - b) for a, b in zip(*sums, strict=True))
    mine, reference, count = median(times[0]), median(times[1]), len(requests)
    each = " ".join(f"{b / a:.2f}" for a, b in zip(*times, strict=True))
    return f"| {name} | {count / mine:.2f} | {count / reference:.2f} | {reference / mine:.2f} | {each} | {worst:.1g} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_dir", required=True)
    parser.add_argument("--dtype", default="float32", help="in which both compute")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_seq_len", type=int, default=1024)
    parser.add_argument("--questions", type=int, default=40, help="with four answers each")
    parser.add_argument("--tokens", type=int, default=8192, help="in the long texts, and in the documents")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    size, length = args.batch_size, args.max_seq_len
    common: dict[str, Any] = {"device": args.device, "dtype": args.dtype, "batch_size": size}
    choices = multiple_choice(args.questions)
    long = rolling([args.tokens // 2] * 2)
    pages = rolling(documents(args.tokens, 3 * length // 2))
    cases = {
        "multiple choice": ("loglikelihood", choices),
        "rolling, long texts": ("loglikelihood_rolling", long),
        "rolling, documents": ("loglikelihood_rolling", pages),
    }
    with tempfile.TemporaryDirectory() as folder:
        convert(args.ckpt_dir, Path(folder) / "hf", to="hf")
        theirs = HFLM(str(Path(folder) / "hf"), max_length=length, **common)
        ours = MetaLlama(ckpt_dir=args.ckpt_dir, max_seq_len=length, **common)
        lines = [compare(name, *case, ours, theirs, args.rounds) for name, case in cases.items()]

    def tokens(requests: list[Instance]) -> str:
        counts = [len(ours.tok_encode(request.args[0])) for request in requests]
        return f"{min(counts)} to {max(counts)} tokens, {sum(counts)} in total"

    print(
        f"\n{Path(args.ckpt_dir).name}, {args.dtype} on {args.device}, batch size {size}, max_seq_len {length}, "
        f"{args.rounds} rounds\n{args.questions} questions with 4 answers, contexts of {tokens(choices[::4])}\n"
        f"{len(long)} long texts: {tokens(long)}; {len(pages)} documents: {tokens(pages)}\n"
        f"{processor()}, {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, lm-eval {lm_eval.__version__}\n\n"
        "| task | meta_llama, requests/s | hf, requests/s | ratio of medians | ratio, each round | worst difference |\n"
        "|---|---|---|---|---|---|"
    )
    print("\n".join(lines))


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
