"""Clients that others wrote: OpenAI's Python package, and lm-evaluation-harness."""

import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import openai
import pytest

# These packages read the variables when they are imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import datasets.config
import httpx
from lm_eval import evaluator, simple_evaluate
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from docs.test_docs import blocks_of
from helpers.paths import ROOT
from helpers.servers import Server, ServerProcess
from helpers.tolerance import logprob_sum
from llama import Llama
from llama.convert import convert
from llama.evaluate.lm_eval_adapter import MetaLlama
from llama.serve.metrics import Metrics
from llama.serve.protocol import MAX_ALTERNATIVES, MAX_N, MAX_STOPS, ChatRequest, CompletionRequest

FACTS, PROSE, COMPLETIONS = "meta_llama_facts", "meta_llama_prose", "meta_llama_completions"
PROMPT = "The capital of France is"
MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(demo_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0)


# OpenAI's package -----------------------------------------------------------------------------------


def test_openai_completions(client: openai.OpenAI, demo_server: Server) -> None:
    (model,) = client.models.list()
    assert client.models.retrieve(model.id).id == model.id == demo_server.service.name
    fields: dict[str, Any] = {"model": model.id, "prompt": PROMPT, "temperature": 0, "max_tokens": 4}
    answer = client.completions.create(**fields, logprobs=2, echo=True)
    (choice,) = answer.choices
    (expected,) = demo_server.llama.text_completion([PROMPT], 0, max_gen_len=4, logprobs=True, echo=True)
    assert choice.text == expected["generation"] and choice.text.startswith(f"{PROMPT} Paris")
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert choice.logprobs.tokens == expected["tokens"]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected["logprobs"][1:], abs=1e-4)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == choice.text.removeprefix(PROMPT)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4
    extra = client.completions.create(**fields, extra_body={"top_k": 3, "n_alternatives": 40})
    assert extra.choices[0].logprobs is not None and extra.choices[0].logprobs.top_logprobs is not None
    assert [len(top) for top in extra.choices[0].logprobs.top_logprobs] == [40] * 4


def test_openai_chats(client: openai.OpenAI, demo_server: Server) -> None:
    fields: dict[str, Any] = {"model": demo_server.service.name, "messages": MESSAGES, "temperature": 0}
    (expected,) = demo_server.llama.chat_completion([MESSAGES], 0, logprobs=True)
    answer = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    assert choice.message.content == expected["generation"]["content"] == "The capital of France is Paris."
    assert choice.finish_reason == "stop" and choice.logprobs is not None and choice.logprobs.content is not None
    assert [entry.token for entry in choice.logprobs.content] == expected["tokens"]
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(expected["logprobs"], abs=1e-4)
    text = ""
    for chunk in client.chat.completions.create(**fields, stream=True):
        text += chunk.choices[0].delta.content or ""
    assert text == choice.message.content
    # The answer is sent back as the package's own object.
    more = client.chat.completions.create(
        **fields | {"messages": [*MESSAGES, choice.message, {"role": "user", "content": "And of Spain?"}]}, max_tokens=5
    )
    assert more.choices[0].message.content


def test_openai_errors(client: openai.OpenAI, demo_server: Server) -> None:
    name = demo_server.service.name
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model=name, prompt="x", max_tokens=-1)
    assert raised.value.param == "max_tokens" and "max_tokens is -1, expected an integer from 0" in str(raised.value)
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(model=name, messages=MESSAGES, tools=tools)


# The documentation ----------------------------------------------------------------------------------

PAGE = ROOT / "docs" / "how-to" / "serve.md"


def test_the_examples_of_the_documentation(demo_server: Server) -> None:
    """The blocks that "need a server" run against this one, and print what the page says."""
    blocks = blocks_of(PAGE)
    ran = 0
    for block, following in itertools.pairwise(blocks):
        if "test_clients.py" not in (block.reason or ""):
            continue
        text = block.text.replace("http://127.0.0.1:8000", demo_server.url)
        if block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(text, str(PAGE), "exec"), {})
            assert out.getvalue().strip() == following.text
            ran += 1
        elif shutil.which("curl"):
            for command in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=60)
                assert done.returncode == 0 and "Paris" in done.stdout, done
                ran += 1
    assert ran >= 1


def test_the_documentation_has_every_field() -> None:
    """In a table, and its values that ask for nothing. Other fields of OpenAI's are named in no table."""
    text = PAGE.read_text(encoding="utf-8")
    tables = "".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))
    for name in {*CompletionRequest.model_fields, *ChatRequest.model_fields}:
        assert f"`{name}`" in tables, name
    assert f"up to {MAX_STOPS} texts" in text and f"0 to {MAX_ALTERNATIVES}" in text and f"1 to {MAX_N}" in text
    metrics = Metrics()
    for family in metrics.registry.collect():
        assert f"`{family.name}" in tables, family.name


# lm-evaluation-harness ------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run in the project's root, because the tasks' paths are relative to it, with a temporary cache for `datasets`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        # Reading the harness's own thousands of tasks takes seconds.
        patch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
        patch.setattr(evaluator, "add_env_info", lambda _: None)  # it runs pip, for example
        yield


def responses(lm: Any, *tasks: str, **arguments: Any) -> list[Any]:
    """The model's response to each request of these tasks."""
    manager = TaskManager(include_path=str(ROOT / "tests" / "tasks"))
    found: Any = simple_evaluate(lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **arguments)
    return [response for task in tasks for sample in found["samples"][task] for (response,) in sample["resps"]]


def in_process(llama: Llama, folder: Path) -> MetaLlama:
    """`meta_llama` with a model that is built already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Llama, "build", lambda *_, **__: llama)
        return MetaLlama(ckpt_dir=str(folder))


def compare(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs)
    for mine, reference in zip(ours, theirs, strict=True):
        if isinstance(mine, tuple):
            assert mine[0] == pytest.approx(reference[0], abs=logprob_sum(8)) and mine[1] == reference[1]
        elif isinstance(mine, float):
            assert mine == pytest.approx(reference, abs=logprob_sum(300))
        else:
            assert mine == reference


@pytest.mark.parametrize("fields", [{"batch_size": 6}, {"num_concurrent": 3}], ids=["batches", "concurrent"])
def test_the_harness_gets_the_answers_of_the_process(
    fields: dict[str, Any], demo_server: Server, demo: Path, tmp_path: Path
) -> None:
    """Log-likelihoods, greedy or not, those of whole texts, and generated texts."""
    convert(demo, tmp_path / "hf", to="hf")
    lm = LocalCompletionsAPI(
        base_url=f"{demo_server.url}/v1/completions",
        model=demo_server.service.name,
        tokenizer=str(tmp_path / "hf"),
        tokenizer_backend="huggingface",
        max_length=512,
        max_retries=1,
        **fields,
    )
    tasks, limit = ((FACTS, PROSE, COMPLETIONS), 6) if "batch_size" in fields else ((FACTS,), 3)
    expected = responses(in_process(demo_server.llama, demo), *tasks, limit=limit)
    assert len(expected) == 3 * limit + (9 if "batch_size" in fields else 0)
    assert "num_concurrent" in fields or {greedy for _, greedy in expected[: 3 * limit]} == {True, False}
    compare(responses(lm, *tasks, limit=limit), expected)


def test_the_harness_gets_the_chats_of_the_process(demo_server: Server, demo: Path) -> None:
    lm = LocalChatCompletion(
        base_url=f"{demo_server.url}/v1/chat/completions", model=demo_server.service.name, max_retries=1
    )
    expected = responses(in_process(demo_server.llama, demo), COMPLETIONS, apply_chat_template=True)
    assert len(expected) == 6 and len(set(expected)) > 3
    compare(responses(lm, COMPLETIONS, apply_chat_template=True), expected)


# Two ranks ------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_ranks(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The harness gets the answers of the process. A rank that is killed ends the server, with status 1."""
    folder = checkpoint("gqa")
    convert(folder, tmp_path / "hf", to="hf")
    torchrun = (str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2", "--master_port", "0")
    program = (*torchrun, "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0")
    flags = ("--max_seq_len", "256", "--max_batch_size", "4")
    with (
        ServerProcess(folder, *flags, program=program, OMP_NUM_THREADS="1", LLAMA_TIMEOUT="20") as server,
        Llama.build(folder, max_seq_len=256) as llama,
    ):
        url = f"{server.url()}/v1/completions"
        lm = LocalCompletionsAPI(
            base_url=url, model=folder.name, tokenizer=str(tmp_path / "hf"), tokenizer_backend="huggingface",
            add_bos_token=True, batch_size=10, max_length=256, max_retries=1,
        )  # fmt: skip
        compare(responses(lm, FACTS, limit=4), responses(in_process(llama, folder), FACTS, limit=4))
        body = {"prompt": [[1, 9, 30], [1, 7]], "max_tokens": 12, "seed": 3, "n": 2, "n_alternatives": 0, "top_p": 0.9}
        tokens, _ = llama.generate([[1, 9, 30], [1, 7]], 12, 1.0, seed=3, n=2)
        choices = httpx.post(url, json=body, timeout=60).json()["choices"]
        names = [[llama.tokenizer.decode_token(token) for token in row] for row in tokens]
        for choice, row in zip(choices, names, strict=True):
            found = choice["logprobs"]["tokens"][: len(row)]
            assert [name for name in found if "bytes" not in name] == [name for name in row if "<0x" not in name]
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        ranks = {rank_of(pid): int(pid) for pid in children}
        os.kill(ranks["1"], signal.SIGKILL)
        assert server.wait(timeout=60) == 1
        # The second if rank 1 was killed before it waited for the next request: then only heartbeats are missed.
        closed = r"lost a rank on 127\.0\.0\.1: it was killed, or ended with an error"
        unheard = r"has not heard from rank 1 for \d+ s: it was killed or is suspended, or the network is down"
        assert len(re.findall(f"^error: rank 0 (?:{closed}|{unheard})$", server.err, re.M)) == 1, server.err


def rank_of(pid: str) -> str:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((one.partition(b"=")[2].decode() for one in variables if one.startswith(b"RANK=")), "")
