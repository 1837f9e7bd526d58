"""Load for servers with OpenAI's endpoints: tokens per second, time to the first token, time between tokens.

    python benchmarks/serve.py run --base_url http://127.0.0.1:8000/v1 --users 1,4,16
    python benchmarks/serve.py compare --llama_cpp .../llama-server --transformers .../transformers --out serve.json
    python benchmarks/serve.py compare --users 1,16 --temperatures 0,1

`run` measures a server that is running. `compare` starts servers on this machine, one after the other in each round:
`llama serve` with the compiled step and without, llama.cpp's `llama-server`, and `transformers serve`.

Each user sends the next request when the answer to the last one is complete. Every answer has `--new` tokens: ids that
end answers get a bias of -100, and `transformers serve`, which has no biases, a checkpoint without them. Tokens are
those of the server's `usage`; an answer with fewer is an error. No two prompts are the same. The servers and this
client share the processors; the client's part of one is `client` in the JSON. Run it on an otherwise idle machine.
"""

import argparse
import asyncio
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from compare import processor
from servers import ROOT, THREADS, RequestFailed, servers, started

TOP_P = 0.9  # where the temperature is not 0
SENTENCES = (
    "The harbour master wrote down the names of all ships that had arrived before noon.",
    "Two engineers measured the bridge again, because their results of last week did not agree.",
    "A good loaf of bread needs flour, water, salt and a whole night of patience.",
    "Nobody in the village remembered who had planted the walnut tree behind the school.",
    "The telescope is pointed at the same part of the sky every evening for a month.",
    "Children under six travel free of charge when an adult has a valid ticket.",
    "Most of the old quarter was rebuilt with bricks after the fire of that summer.",
    "An experiment that cannot fail does not teach anything to the people who run it.",
    "Copper conducts electricity better than iron, and it is easier to bend into shape.",
    "The orchestra rehearsed the slow movement until the rain on the roof had stopped.",
    "She keeps a list of birds that visit the garden, with the date and the weather.",
    "Every winter the council asks how the road over the pass should be kept open.",
)


# Requests -------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """started, times: seconds of a clock; times are those of the events with text."""

    started: float
    times: list[float]
    usage: dict[str, Any]

    @property
    def first(self) -> float:
        return self.times[0] - self.started


def prompts(n: int, seed: int, sentences: int) -> list[str]:
    """Different texts of about 20 tokens a sentence. They begin differently, so a cache of prefixes does not help."""
    drawn = random.Random(seed)
    starts = drawn.sample(range(10**6, 10**7), n)
    return [" ".join([f"{start} notes.", *drawn.sample(SENTENCES, sentences)]) for start in starts]


def completion(prompt: str | list[int], new: int, seed: int = 1, **fields: Any) -> dict[str, Any]:
    """The body of a request."""
    settings = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    return {"prompt": prompt, "max_tokens": new, "seed": seed, **settings, **fields}


def as_chat(body: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": body["prompt"]}]
    return {name: value for name, value in body.items() if name != "prompt"} | {"messages": messages}


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    path = "chat/completions" if "messages" in body else "completions"
    answer = Answer(time.perf_counter(), [], {})
    async with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            raise RequestFailed(f"status {response.status_code}: {(await response.aread())[:500].decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RequestFailed(str(event["error"]))
            for choice in event["choices"]:
                text = choice.get("text") or choice.get("delta", {}).get("content")
                # An answer whose only token has no text, such as a part of a character, has at least an end.
                if text or (choice.get("finish_reason") and not answer.times):
                    answer.times.append(time.perf_counter())
            answer.usage = event.get("usage") or answer.usage
    if answer.usage.get("completion_tokens", 0) < body["max_tokens"]:
        raise RequestFailed(f"expected {body['max_tokens']} new tokens, got {answer.usage}: see --ignore")
    return answer


def connect(base_url: str) -> httpx.AsyncClient:
    # A connection each: llama-server closes kept ones at a moment when the client may be sending its next request.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=base_url, timeout=None, limits=limits)


# Load -----------------------------------------------------------------------------------------------


@dataclass
class Load:
    """What a number of users got. first: seconds to the first token of each answer. between: seconds between the events
    of a stream. client: the share of one processor that this process used."""

    server: str
    users: int
    temperature: float
    tokens: int = 0
    seconds: float = 0
    client: float = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


async def put_load(client: httpx.AsyncClient, load: Load, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    """Send the requests, at most `load.users` at a time, and record what came."""
    waiting = iter(bodies)

    async def user() -> list[Answer]:
        return [await ask(client, body) for body in waiting]

    started, used = time.perf_counter(), time.process_time()
    answers = [answer for part in await asyncio.gather(*[user() for _ in range(load.users)]) for answer in part]
    load.seconds = time.perf_counter() - started
    load.client = (time.process_time() - used) / load.seconds
    for answer in answers:
        load.tokens += answer.usage["completion_tokens"]
        load.first.append(answer.first)
        load.between += [after - before for before, after in zip(answer.times, answer.times[1:], strict=False)]
    return answers


async def measure(base_url: str, name: str, options: argparse.Namespace, seed: int = 0, **fields: Any) -> list[Load]:
    """One round at a server: every number of users at every temperature, after a warm-up."""
    found = list[Load]()
    async with connect(base_url) as client:
        warm = [completion(text, 4, **fields) for text in prompts(max(options.users), 1000 + seed, options.sentences)]
        await put_load(client, Load(name, max(options.users), 0), list(map(as_chat, warm)) if options.chat else warm)
        for users in options.users:
            for temperature in options.temperatures:
                texts = prompts(max(options.requests, 2 * users), 10 * seed + len(found), options.sentences)
                sampling = {"temperature": temperature, "top_p": TOP_P if temperature else 1}
                bodies = [completion(text, options.new, i, **sampling, **fields) for i, text in enumerate(texts)]
                found.append(Load(name, users, temperature))
                await put_load(client, found[-1], list(map(as_chat, bodies)) if options.chat else bodies)
                print(f"{name}, {users} users: {found[-1].rate:.1f} tokens/s", file=sys.stderr, flush=True)
    return found


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[math.ceil(share * len(values)) - 1]


def report(loads: Sequence[Load]) -> str:
    """Markdown. Rates are medians of the rounds, with the lowest and highest. Times are those of all rounds."""
    lines = [
        "| server | temperature | users | tokens/s | first token: median, p90, s | between tokens: median, p99, ms |",
        "|---|---|---|---|---|---|",
    ]
    cells: dict[tuple[str, float, int], list[Load]] = {}
    for load in loads:
        cells.setdefault((load.server, load.temperature, load.users), []).append(load)
    for (name, temperature, users), rounds in sorted(cells.items(), key=lambda cell: (cell[0][1], cell[0][2])):
        rates = [load.rate for load in rounds]
        first = [seconds for load in rounds for seconds in load.first]
        gaps = [1000 * seconds for load in rounds for seconds in load.between]
        between = f"{median(gaps):.0f}, {quantile(gaps, 0.99):.0f}" if gaps else "-"  # answers of one event have none
        lines.append(
            f"| {name} | {temperature:g} | {users} | {median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f}) "
            f"| {median(first):.2f}, {quantile(first, 0.9):.2f} | {between} |"
        )
    lines.append("")
    for (name, temperature, users), rounds in cells.items():
        least = cells[name, temperature, min(load.users for load in loads)]
        if rounds is not least and len(rounds) == len(least):
            ratios = [many.rate / few.rate for many, few in zip(rounds, least, strict=True)]
            what = f"{name}, temperature {temperature:g}, {users} users compared to {least[0].users}, tokens/s"
            lines.append(f"- {what}: {median(ratios):.2f}x, {min(ratios):.2f} to {max(ratios):.2f}")
    lines.append(f"- this client: at most {max(load.client for load in loads):.0%} of a processor")
    return "\n".join(lines)


def plot(loads: Sequence[Load], path: Path, title: str) -> None:
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "llama-runner"  # the same file from the same figures
    figure, axes = pyplot.subplots(figsize=(7, 3.6))
    users, temperature = sorted({load.users for load in loads}), min(load.temperature for load in loads)
    for name in dict.fromkeys(load.server for load in loads):
        shown = [load for load in loads if load.server == name and load.temperature == temperature]
        rates = [median(load.rate for load in shown if load.users == n) for n in users]
        axes.plot(users, rates, "-" if name.startswith("llama serve") else "--", marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(users, list(map(str, users)))
    axes.set(xlabel="concurrent users", ylabel="tokens per second, all users", ylim=(0, None))
    axes.set_title(title, fontsize=8, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


# Commands -------------------------------------------------------------------------------------------


def finish(loads: Sequence[Load], options: argparse.Namespace, failed: dict[str, str]) -> None:
    lengths = f"{options.new} new tokens after about {20 * options.sentences}"
    title = f"{processor()}, {THREADS} threads; {date.today()}; {lengths}"
    if options.out:
        asked = {name: str(value) for name, value in vars(options).items() if name != "run"}
        found = {"machine": processor(), "threads": THREADS, "date": str(date.today()), "options": asked}
        options.out.write_text(json.dumps(found | {"failed": failed, "loads": list(map(asdict, loads))}) + "\n")
    print(f"{title}\n\n{report(loads)}")
    for name, reason in failed.items():
        print(f"- {name}: {reason}")
    if options.plot:
        plot(loads, options.plot, title)


def run(options: argparse.Namespace) -> None:
    fields: dict[str, Any] = {"model": options.model} if options.model else {}
    if options.ignore:
        fields["logit_bias"] = {str(id): -100 for id in options.ignore}
    finish(asyncio.run(measure(options.base_url, options.base_url, options, **fields)), options, {})


def compare(options: argparse.Namespace) -> None:
    loads, failed = list[Load](), dict[str, str]()
    with tempfile.TemporaryDirectory() as folder:
        found = servers(options, Path(folder))
        for n in range(options.rounds):
            for name, (command, fields) in found.items():
                if name in failed:
                    continue
                try:
                    with started(command) as base_url:
                        loads += asyncio.run(measure(base_url, name, options, n, **fields))
                except (RequestFailed, httpx.HTTPError, OSError) as error:
                    failed[name] = f"{type(error).__name__}: {error}"
                    print(f"{name} failed: {failed[name]}", file=sys.stderr, flush=True)
    loads = [load for load in loads if load.server not in failed]
    if not loads:
        raise RequestFailed(f"no server was measured: {failed}")
    finish(loads, options, failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    load = argparse.ArgumentParser(add_help=False)
    load.add_argument("--users", type=numbers(int), default=[1, 4, 16], help="concurrent users; default: 1,4,16")
    load.add_argument("--requests", type=int, default=6, help="of all users, at least; at least 2 for each user")
    counts = range(1, len(SENTENCES) + 1)
    load.add_argument(
        "--sentences", type=int, choices=counts, default=5, help="of each prompt, about 20 tokens each; default: 5"
    )
    load.add_argument("--new", type=int, default=64, help="new tokens of each answer; default: 64")
    load.add_argument("--temperatures", type=numbers(float), default=[0.0], help=f"where not 0, top_p is {TOP_P}")
    load.add_argument("--chat", action="store_true", help="/chat/completions instead of /completions")
    load.add_argument("--out", type=Path, help="JSON with every round")
    load.add_argument("--plot", type=Path, help="tokens/s at the lowest temperature for each number of users")
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--ckpt_dir", type=Path, default=ROOT / "checkpoints/smollm2-135m-instruct")

    command = commands.add_parser("run", parents=[load])
    command.set_defaults(run=run)
    command.add_argument("--base_url", required=True, help="with /v1")
    command.add_argument("--model", help="its name in requests")
    command.add_argument(
        "--ignore", type=numbers(int), default=[], help="ids that end answers, which get a bias of -100"
    )
    command = commands.add_parser("compare", parents=[load, model])
    command.set_defaults(run=compare)
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--dtype", default="bfloat16", help="of the weights; default: bfloat16")
    command.add_argument("--llama_cpp", type=Path, help="llama-server, with llama-quantize beside it")
    command.add_argument("--gguf", type=Path, default=ROOT / "checkpoints/smollm2-135m-instruct.gguf")
    command.add_argument("--gguf_type", default="BF16", help="as --dtype, for llama.cpp; default: BF16")
    command.add_argument("--transformers", type=Path, help="the program transformers, installed with its extra serving")
    return parser.parse_args()


def numbers(kind: type[int] | type[float]) -> Any:
    def read(text: str) -> list[float]:
        return [kind(part) for part in text.split(",")]

    return read


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers are stopped
    try:
        options.run(options)
    except (RequestFailed, httpx.HTTPError, OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"serve.py: {type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
