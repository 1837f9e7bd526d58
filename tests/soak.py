"""soak.py CKPT_DIR [--tokens N] [--no-compile]: whether a process that generates for a long time needs more and more
memory.

Generates from prompts of random length in batches: with stop texts and log-probabilities, plain, and as streams. After
each tenth prints tokens, tokens per second and anonymous memory: as held by the process, and as in use after glibc's
malloc_trim has returned freed memory to the system. The last line is JSON. Exit status 1 if the memory in use after the
last tenth is more than 1 % above that after the second (the first fills caches).
"""

import argparse
import ctypes
import json
import random
import sys
import time
from pathlib import Path

from helpers.rss import anonymous_bytes
from llama import Llama

ROWS = 16


def memory() -> dict[str, int]:
    held = anonymous_bytes()
    ctypes.CDLL(None).malloc_trim(0)
    return {"held": held, "in_use": anonymous_bytes()}


def soak(folder: str, tokens: int, compile: bool | str = "auto") -> dict:
    llama = Llama.build(folder, max_seq_len=512, max_batch_size=ROWS, compile=compile)
    rng, done, tenths = random.Random(1), 0, []
    words = Path(__file__).read_text().split()

    def prompts() -> list[str]:
        return [" ".join(rng.choices(words, k=rng.randint(1, 30))) for _ in range(ROWS)]

    for tenth in range(10):
        started, before = time.perf_counter(), done
        while done < (tenth + 1) * tokens // 10:
            length, how = rng.randint(100, 400), rng.randrange(3)
            if how == 0:
                answers = llama.text_completion(prompts(), 1.0, max_gen_len=length, logprobs=True, stop=["zzz"])
                done += sum(len(answer["tokens"]) for answer in answers)
            elif how == 1:
                ids = [[rng.randrange(3, 500) for _ in range(rng.randint(1, 60))] for _ in range(ROWS)]
                done += sum(map(len, llama.generate(ids, length, 0.8, 0.95)[0]))
            else:
                ids = [[rng.randrange(3, 500) for _ in range(rng.randint(1, 60))] for _ in range(ROWS)]
                done += sum(token.id is not None for step in llama.stream(ids, max_gen_len=length) for token in step)
        seconds = time.perf_counter() - started
        tenths.append({"tokens": done, "tokens_per_s": round((done - before) / seconds), **memory()})
        line = "{tokens:,} tokens, {tokens_per_s:,} a second, {held:,} bytes held, {in_use:,} in use"
        print(line.format(**tenths[-1]), file=sys.stderr)
    llama.close()
    growth = {f"{kind}_growth": tenths[-1][kind] / tenths[1][kind] - 1 for kind in ("held", "in_use")}
    return {"tokens": done, **growth, "tenths": tenths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ckpt_dir")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--no-compile", dest="compile", action="store_const", const=False, default="auto")
    options = parser.parse_args()
    found = soak(options.ckpt_dir, options.tokens, options.compile)
    print(json.dumps(found))
    sys.exit(found["in_use_growth"] > 0.01)


if __name__ == "__main__":
    main()
