"""Long prompts at `llama serve`: how long others wait for one, and what a common prefix saves.

    python benchmarks/serve_prompts.py chunks
    python benchmarks/serve_prompts.py prefix

`chunks`: the time to the first token of a short request while a prompt of 4,000 ids is computed, compared to the time
of one chunk, which is the time to the first token of a prompt of exactly that length on the idle server. `prefix`:
requests that share a system prompt of 1,000 ids, compared to as many of the same lengths that share nothing, 16 at a
time. Prompts are random ids. Run it on an otherwise idle machine.
"""

import argparse
import asyncio
import random
import signal
import sys
from pathlib import Path
from statistics import median
from typing import Any

from llama.accelerate.executor import PREFILL_CHUNK
from llama.tokenizer import Tokenizer, find_tokenizer
from serve import Load, ask, completion, connect, put_load
from servers import ROOT, SLOT, RequestFailed, no_ends, ours, started


def random_ids(n: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    """n prompts of random ids, with different first ids. Low ids are left out, as many of them are special."""
    drawn, lowest = random.Random(seed), vocab // 8
    return [[lowest + i, *drawn.choices(range(lowest, vocab), k=length - 1)] for i in range(n)]


async def measure_wait(
    base_url: str, vocab: int, chunk: int, length: int, rounds: int, **fields: Any
) -> dict[str, Any]:
    """Seconds to the first token: of a prompt of one chunk and of a short one on the idle server, and of short ones
    that come while a prompt of `length` ids is computed, at moments spread over the first third of that time."""
    ids = iter(random_ids(4 + 3 * rounds, length, vocab, seed=1))

    async with connect(base_url) as client:

        async def first(n: int) -> float:
            return (await ask(client, completion(next(ids)[:n], 1, **fields))).first

        await first(chunk)  # warm-up
        found: dict[str, Any] = {"chunk": [], "idle": await first(16), "long": await first(length), "wait": []}
        for n in range(rounds):
            found["chunk"].append(await first(chunk))
            long = asyncio.create_task(first(length))
            await asyncio.sleep(found["long"] * 0.3 * (n + 0.5) / rounds)
            found["wait"].append(await first(16))
            if long.done():
                raise RequestFailed("the long prompt was complete before the short one")
            await long
    return found


def chunks(options: argparse.Namespace) -> None:
    tokenizer = Tokenizer(find_tokenizer(options.ckpt_dir))
    vocab, fields = tokenizer.n_words, no_ends(tokenizer)
    with started(ours(options.ckpt_dir, "--dtype", "bfloat16", length=8192)) as base_url:
        found = asyncio.run(measure_wait(base_url, vocab, PREFILL_CHUNK, 4000, options.rounds, **fields))
    chunk, waits = median(found["chunk"]), sorted(found["wait"])
    print(
        f"first token on the idle server: {found['idle']:.2f} s after 16 ids, {chunk:.2f} s after one chunk "
        f"({PREFILL_CHUNK:,}), {found['long']:.2f} s after 4,000\n"
        f"while 4,000 are computed, after 16: median {median(waits):.2f} s, longest {waits[-1]:.2f} s, which is "
        f"{waits[-1] / chunk:.2f} times that of a chunk (expected: at most 2)"
    )


async def measure_prefix(
    base_url: str, vocab: int, requests: int, shared: int, new: int, users: int, **fields: Any
) -> list[Load]:
    """The same number of requests of the same lengths, first with a common prefix of `shared` ids, then without."""
    system, *others = random_ids(1 + 2 * requests, shared + 24, vocab, seed=1)
    sets = {"shared": [system[:shared] + other[:24] for other in others[:requests]], "not shared": others[requests:]}
    found = []
    async with connect(base_url) as client:
        await ask(client, completion(random_ids(1, shared, vocab, seed=2)[0], 4, **fields))  # warm-up
        for name, asked in sets.items():
            found.append(Load(name, users, 0))
            answers = await put_load(client, found[-1], [completion(ids, new, **fields) for ids in asked])
            reused = sum(answer.usage["prompt_tokens_details"]["cached_tokens"] for answer in answers)
            print(
                f"{name}: {found[-1].seconds:.1f} s for {requests} requests, {reused:,} prompt ids reused", flush=True
            )
    return found


def prefix(options: argparse.Namespace) -> None:
    tokenizer = Tokenizer(find_tokenizer(options.ckpt_dir))
    sizes = tokenizer.n_words, options.requests, 1000, options.new, 16
    with started(ours(options.ckpt_dir, "--dtype", "bfloat16", length=SLOT + 64)) as base_url:
        found = asyncio.run(measure_prefix(base_url, *sizes, **no_ends(tokenizer)))
    print(f"{found[1].seconds / found[0].seconds:.1f} times faster (expected: at least 4)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_dir", type=Path, default=ROOT / "checkpoints/smollm2-135m-instruct")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("chunks")
    command.set_defaults(run=chunks)
    command.add_argument("--rounds", type=int, default=6)
    command = commands.add_parser("prefix")
    command.set_defaults(run=prefix)
    command.add_argument("--requests", type=int, default=200, help="with the prefix, and without")
    command.add_argument("--new", type=int, default=32, help="new tokens of each answer; default: 32")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers are stopped
    options.run(options)


if __name__ == "__main__":
    main()
