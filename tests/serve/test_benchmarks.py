"""benchmarks/serve.py and benchmarks/serve_prompts.py at small servers: what they count is what the server computed."""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.paths import ROOT
from helpers.servers import Server, serving

sys.path.insert(0, str(ROOT / "benchmarks"))

import serve
import serve_prompts
from servers import RequestFailed

OPTIONS = argparse.Namespace(users=[1, 3], temperatures=[0, 1], requests=4, new=8, sentences=5, chat=False)


@pytest.fixture(scope="module")
def long_server(checkpoint: Callable[..., Path]) -> Iterator[Server]:
    with serving(checkpoint("mha"), max_seq_len=1024, max_batch_size=4) as running:
        yield running


def biased(server: Server, bias: int) -> dict[str, Any]:
    return {"logit_bias": {str(id): bias for id in server.llama.tokenizer.stop_tokens}}


@pytest.mark.parametrize("chat", [False, True])
def test_all_tokens_are_counted_and_no_prompt_is_in_the_cache(long_server: Server, chat: bool) -> None:
    names = "llama_generated_tokens_total", "llama_prompt_tokens_total", "llama_prompt_tokens_reused_total"
    before = list(map(long_server.metric, names))
    options = argparse.Namespace(**vars(OPTIONS) | {"chat": chat})
    url = f"{long_server.url}/v1"
    loads = asyncio.run(serve.measure(url, "small", options, seed=chat, **biased(long_server, -100)))
    long_server.wait_until_idle()
    generated, prompts, reused = (long_server.metric(name) - n for name, n in zip(names, before, strict=True))
    assert [(load.users, load.temperature, load.tokens) for load in loads] == [
        (1, 0, 4 * 8),
        (1, 1, 4 * 8),
        (3, 0, 6 * 8),
        (3, 1, 6 * 8),
    ]
    assert generated == sum(load.tokens for load in loads) + 3 * 4  # and the warm-up
    assert reused < 0.1 * prompts
    for load in loads:
        answers = load.tokens // 8
        assert len(load.first) == answers and all(0 < seconds <= load.seconds for seconds in load.first)
        assert answers <= len(load.between) <= 7 * answers  # an event may have several tokens
        assert sum(load.first) + sum(load.between) <= load.seconds * load.users

    table = serve.report([*loads, *loads])
    assert f"| small | 0 | 3 | {loads[2].rate:.1f} (" in table
    assert f"- small, temperature 1, 3 users compared to 1, tokens/s: {loads[3].rate / loads[1].rate:.2f}x" in table


def test_quantiles() -> None:
    assert [serve.quantile([4, 1, 3, 2], share) for share in (0.25, 0.5, 0.9, 1)] == [1, 2, 4, 4]


def test_answers_that_end_early_and_refused_requests_are_errors(long_server: Server) -> None:
    url = f"{long_server.url}/v1"
    with pytest.raises(RequestFailed, match=r"^expected 4 new tokens, got \{.*'completion_tokens': 0,"):
        asyncio.run(serve.measure(url, "small", OPTIONS, **biased(long_server, 100)))
    with pytest.raises(RequestFailed, match=r"^status 404: .*there is no model 'other'"):
        asyncio.run(serve.measure(url, "small", OPTIONS, model="other"))


@pytest.mark.slow
def test_servers_are_compared_without_one_that_does_not_start(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    flags = ["--users", "1,2", "--requests", "2", "--new", "4", "--rounds", "1", "--out", out, "--plot", picture]
    command = [sys.executable, "benchmarks/serve.py", "compare", "--ckpt_dir", checkpoint("mha"), *flags]
    ended = subprocess.run(
        [*map(str, command), "--transformers", "/bin/false"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    assert "- transformers serve: RequestFailed: /bin/false did not start" in ended.stdout
    found = json.loads(out.read_text())
    assert [(load["server"], load["users"], load["tokens"]) for load in found["loads"]] == [
        ("llama serve", 1, 8),
        ("llama serve", 2, 16),
        ("llama serve --no-compile", 1, 8),
        ("llama serve --no-compile", 2, 16),
    ]
    assert "</svg>" in picture.read_text()


def test_a_short_request_waits_for_a_part_of_a_long_prompt(
    long_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, step = long_server.llama.executor, 0.02
    hidden = executor.hidden

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(step)
        return hidden(*args, **kwargs)

    monkeypatch.setattr(executor, "hidden", slow)
    monkeypatch.setattr(executor, "prefill_chunk", 16)
    found = asyncio.run(serve_prompts.measure_wait(f"{long_server.url}/v1", 512, 16, 800, rounds=1))
    assert found["long"] > 800 / 16 * step
    (waited,) = found["wait"]
    assert step < waited < found["long"] / 4


def test_requests_that_share_a_prefix_reuse_it(long_server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    loads = asyncio.run(serve_prompts.measure_prefix(f"{long_server.url}/v1", 512, 6, 200, new=2, users=3))
    assert [load.tokens for load in loads] == [12, 12]
    shared, apart = (int(line.split()[-4].replace(",", "")) for line in capsys.readouterr().out.splitlines())
    assert shared >= 5 * 200 and apart <= 6
