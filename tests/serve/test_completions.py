"""POST /v1/completions: every field, and numbers equal to those of the model in the process."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.servers import Server, serving
from helpers.tolerance import LOGPROB
from helpers.vocabularies import write_infilling
from llama import Llama
from llama.evaluate.scoring import token_logprobs

TEXT = "The licence is granted"
EMOJI = "a €uro 😀 and é"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


def ids_of(llama: Llama, text: str) -> list[int]:
    return llama.tokenizer.encode(text, bos=True, eos=False)


def continuation(llama: Llama, prompt: list[int], ids: list[int]) -> str:
    """The text that ids add to a prompt."""
    decode = llama.tokenizer.decode
    return decode([*prompt, *ids])[len(decode(prompt)) :]


def close(ours: list[Any], theirs: list[float]) -> None:
    assert len(ours) == len(theirs)
    assert max((abs(a - b) for a, b in zip(ours, theirs, strict=True)), default=0) < LOGPROB


def events(server: Server, path: str, **body: Any) -> list[Any]:
    """The events of a stream. The last one is "[DONE]"."""
    found: list[Any] = []
    with server.client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line:
                data = line.removeprefix("data: ")
                assert data != line
                found.append(data if data == "[DONE]" else json.loads(data))
    assert found[-1] == "[DONE]"
    return found


def joined(chunks: list[Any]) -> list[dict[str, Any]]:
    """The choices of a stream, put together."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for new in chunk["choices"]:
            choice = choices.setdefault(new["index"], {"text": "", "logprobs": None, "finish_reason": None})
            assert choice["finish_reason"] is None, "a chunk after the last one"
            choice["text"] += new["text"]
            choice["finish_reason"] = new["finish_reason"]
            for name, values in (new["logprobs"] or {}).items():
                choice["logprobs"] = choice["logprobs"] or {}
                choice["logprobs"].setdefault(name, []).extend(values)
    return [{"index": i, **choices[i]} for i in sorted(choices)]


# Prompts --------------------------------------------------------------------------------------------


def test_the_whole_answer(server: Server) -> None:
    ids = ids_of(server.llama, TEXT)
    ((expected,), _) = server.llama.generate([ids], 12, 0)
    answer = server.complete(TEXT, **GREEDY)
    assert answer["id"].startswith("cmpl-") and abs(answer["created"] - server.service.created) < 1000
    assert {name: answer[name] for name in ("object", "model", "choices", "usage")} == {
        "object": "text_completion",
        "model": server.service.name,
        "choices": [
            {
                "index": 0,
                "text": continuation(server.llama, ids, expected),
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": len(ids),
            "completion_tokens": 12,
            "total_tokens": len(ids) + 12,
            "prompt_tokens_details": answer["usage"]["prompt_tokens_details"],
        },
    }
    assert 0 <= answer["usage"]["prompt_tokens_details"]["cached_tokens"] < len(ids)


def test_texts_and_ids_one_and_many(server: Server) -> None:
    texts = [TEXT, "or", EMOJI]
    ids = [ids_of(server.llama, text) for text in texts]
    many = [choice["text"] for choice in server.complete(texts, **GREEDY)["choices"]]
    assert len(set(many)) == 3
    assert [choice["text"] for choice in server.complete(ids, **GREEDY)["choices"]] == many
    assert [server.complete(text, **GREEDY)["choices"][0]["text"] for text in texts] == many
    assert [server.complete(one, **GREEDY)["choices"][0]["text"] for one in ids] == many
    assert server.complete(texts, **GREEDY)["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_the_text_continues_the_prompt(server: Server) -> None:
    """Prompt and text, joined, are a text: the first word keeps its space, and a character that the prompt has begun
    is completed."""
    llama = server.llama
    (space_word,) = (i for i in range(512) if llama.tokenizer.decode_token(i) == " the")
    ids = ids_of(llama, TEXT)
    bias = {"logit_bias": {space_word: 100}, "max_tokens": 1, "temperature": 0}
    assert server.complete(ids, **bias)["choices"][0]["text"] == " the"
    assert server.complete(TEXT, echo=True, **bias)["choices"][0]["text"] == f"{TEXT} the"
    first, *rest = (3 + byte for byte in "é".encode())
    answer = server.complete([*ids, first], logit_bias={rest[0]: 100}, max_tokens=1, temperature=0, logprobs=0)
    assert answer["choices"][0]["text"] == "é" and answer["choices"][0]["logprobs"]["text_offset"] == [0]


# Settings -------------------------------------------------------------------------------------------


def test_max_tokens(server: Server) -> None:
    assert server.complete(TEXT)["usage"]["completion_tokens"] == 16
    empty = server.complete(TEXT, max_tokens=0)
    assert empty["choices"][0]["text"] == "" and empty["choices"][0]["finish_reason"] == "length"
    # The default of 16 is no request for 16: the answer ends where the cache does.
    answer = server.complete([5] * 155, temperature=0, logit_bias={"9": 100})
    assert answer["usage"]["completion_tokens"] == 5 and answer["choices"][0]["finish_reason"] == "length"


SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0.7, "seed": 5}, {"temperature": 0.7, "seed": 5}),
    ({"seed": 5}, {"temperature": 1.0, "seed": 5}),  # OpenAI's defaults: temperature 1, top_p 1
    ({"seed": -1}, {"temperature": 1.0, "seed": 2**64 - 1}),
    ({"temperature": 1.5, "top_p": 0.5, "seed": 9}, {"temperature": 1.5, "top_p": 0.5, "seed": 9}),
    ({"top_k": 3, "seed": 4}, {"temperature": 1.0, "top_k": 3, "seed": 4}),
    ({"temperature": 0, "repetition_penalty": 5}, {"temperature": 0, "repetition_penalty": 5}),
    ({"temperature": 0, "frequency_penalty": 2}, {"temperature": 0, "frequency_penalty": 2}),
    ({"temperature": 0, "presence_penalty": -2}, {"temperature": 0, "presence_penalty": -2}),
    ({"temperature": 0, "logit_bias": {"7": 100}}, {"temperature": 0, "logit_bias": {7: 100}}),
]


@pytest.mark.parametrize(("fields", "settings"), SETTINGS, ids=lambda value: json.dumps(value))
def test_settings_are_those_of_the_engine(fields: dict[str, Any], settings: dict[str, Any], server: Server) -> None:
    ids = ids_of(server.llama, TEXT)
    ((expected,), _) = server.llama.generate([ids], 20, **{"top_p": 1.0} | settings)
    answer = server.complete(TEXT, max_tokens=20, **fields)
    assert answer["choices"][0]["text"] == continuation(server.llama, ids, expected)


def test_a_null_is_a_field_left_out(server: Server) -> None:
    names = ("stop", "seed", "logprobs", "suffix", "n", "echo", "stream", "best_of", "logit_bias", "user", "top_k")
    nulls: dict[str, Any] = dict.fromkeys(names)
    assert server.complete(TEXT, **GREEDY, **nulls)["choices"] == server.complete(TEXT, **GREEDY)["choices"]


def test_fields_without_an_effect(server: Server) -> None:
    plain = server.complete(TEXT, **GREEDY)["choices"]
    assert server.complete(TEXT, **GREEDY, user="somebody", model=server.service.name)["choices"] == plain
    assert server.complete(TEXT, **GREEDY, best_of=1)["choices"] == plain


def test_n_samples(server: Server) -> None:
    """Sample j draws with seed + j, as in the process."""
    ids = [ids_of(server.llama, text) for text in (TEXT, "or")]
    tokens, _ = server.llama.generate(ids, 9, 1.0, 1.0, n=2, seed=7)
    answer = server.complete([TEXT, "or"], n=2, seed=7, max_tokens=9)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for choice, row in zip(answer["choices"], tokens, strict=True):
        assert choice["text"] == continuation(server.llama, ids[choice["index"] // 2], row)
    assert answer["usage"]["completion_tokens"] == 36
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_more_rows_than_slots(server: Server) -> None:
    texts = [f"{TEXT} {i}" for i in range(11)]
    alone = [server.complete(text, **GREEDY)["choices"][0]["text"] for text in texts]
    assert [choice["text"] for choice in server.complete(texts, **GREEDY)["choices"]] == alone


def test_stop_texts(server: Server) -> None:
    whole = server.complete(TEXT, **GREEDY)["choices"][0]["text"]
    stop = whole[4:6]
    begin = whole.index(stop)
    for value in (stop, [stop], ["\0", stop]):
        choice = server.complete(TEXT, **GREEDY, stop=value)["choices"][0]
        assert choice["text"] == whole[:begin] and choice["finish_reason"] == "stop"
    answer = server.complete(TEXT, **GREEDY, stop=stop, logprobs=0)
    assert answer["usage"]["completion_tokens"] == len(answer["choices"][0]["logprobs"]["tokens"]) < 12
    assert server.complete(TEXT, **GREEDY, stop=[])["choices"][0]["text"] == whole


def test_stop_ids(server: Server) -> None:
    ids = ids_of(server.llama, TEXT)
    ((tokens,), _) = server.llama.generate([ids], 12, 0)
    at = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
    for scored in ({}, {"logprobs": 1}):
        answer = server.complete(TEXT, **GREEDY, stop_token_ids=[tokens[at]], **scored)
        choice = answer["choices"][0]
        assert choice["text"] == continuation(server.llama, ids, tokens[:at]) and choice["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == at


# Log-probabilities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [TEXT, EMOJI])
def test_echoed_log_probabilities_are_those_of_the_process(text: str, server: Server) -> None:
    llama = server.llama
    ids = ids_of(llama, text)
    result = llama.generate([ids], 12, 0, logprobs=3, echo=True)
    ((tokens,), scores) = result
    assert scores is not None
    answer = server.complete(text, **GREEDY, echo=True, logprobs=3)
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]
    assert len(tokens) == len(ids) + 12 == len(logprobs["tokens"])
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    close(logprobs["token_logprobs"][1:], scores[0][1:])
    close(logprobs["token_logprobs"][1 : len(ids)], token_logprobs(llama, [ids])[0][1:])
    for top, expected in zip(logprobs["top_logprobs"][1:], result.top[0][1:], strict=True):
        values = sorted(top.values(), reverse=True)
        assert len(values) in (3, 4)  # the id itself is added
        close(values[:3], [value for _, value in expected])
    assert choice["text"] == llama.tokenizer.decode(tokens) and choice["text"].startswith(text)


def test_offsets_are_characters_of_the_text(server: Server) -> None:
    for prompt in (TEXT, EMOJI, "😀😀", "é"):
        choice = server.complete(prompt, **GREEDY, echo=True, logprobs=0)["choices"][0]
        text, logprobs = choice["text"], choice["logprobs"]
        starts = logprobs["text_offset"]
        assert starts == sorted(starts) and starts[0] == 0
        for token, start, end in zip(logprobs["tokens"], starts, [*starts[1:], len(text)], strict=True):
            if token == "<s>":
                assert start == end == 0
            elif not token.startswith("bytes:"):
                assert text[start:end].rstrip("\ufffd") == (token if start else token.lstrip(" ")), (token, start)
        alone = server.complete(prompt, **GREEDY, logprobs=0)["choices"][0]
        assert alone["text"] == text[len(prompt) :]
        assert alone["logprobs"]["text_offset"] == [start - len(prompt) for start in starts[-12:]]
        assert alone["logprobs"]["tokens"] == logprobs["tokens"][-12:]


def test_scoring_a_prompt(server: Server) -> None:
    """max_tokens 0 and echo: log-probabilities of the prompt only, and those of two prompts do not mix."""
    texts = [TEXT, "or"]
    answer = server.complete(texts, max_tokens=0, echo=True, logprobs=1)
    expected = token_logprobs(server.llama, [ids_of(server.llama, text) for text in texts])
    for choice, text, values in zip(answer["choices"], texts, expected, strict=True):
        assert choice["text"] == text and choice["finish_reason"] == "length"
        close(choice["logprobs"]["token_logprobs"][1:], values[1:])
    assert answer["usage"]["completion_tokens"] == 0
    assert server.complete(TEXT, max_tokens=0, echo=True)["choices"][0] == {
        "index": 0, "text": TEXT, "logprobs": None, "finish_reason": "length",
    }  # fmt: skip


def test_a_prompt_of_one_id_has_no_log_probability(server: Server) -> None:
    (choice,) = server.complete([9], max_tokens=0, echo=True, logprobs=1)["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None] and choice["logprobs"]["top_logprobs"] == [None]


def test_the_id_that_ends_an_answer_is_reported(server: Server) -> None:
    """lm-evaluation-harness scores prompts with one new id, and drops the last entry."""
    llama = server.llama
    ids = ids_of(llama, TEXT)
    ((tokens,), scores) = llama.generate([ids], 3, 0, logprobs=True)
    assert scores is not None
    fields: dict[str, Any] = {"temperature": 0, "logprobs": 1, "stop_token_ids": [tokens[0]], "max_tokens": 1}
    answer = server.complete(TEXT, echo=True, **fields)
    (choice,) = answer["choices"]
    assert choice["text"] == TEXT and choice["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 0
    assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1
    close(choice["logprobs"]["token_logprobs"][-1:], [scores[0][0]])
    assert choice["logprobs"]["text_offset"][-1] == len(TEXT)
    later = server.complete(TEXT, **fields | {"stop_token_ids": [tokens[2]], "max_tokens": 9})["choices"][0]
    assert len(later["logprobs"]["tokens"]) == 3 and later["finish_reason"] == "stop"


def test_any_number_of_alternatives(server: Server) -> None:
    """`n_alternatives` goes up to the vocabulary. All of it sums to 1."""
    (choice,) = server.complete(ids_of(server.llama, TEXT), max_tokens=1, temperature=0, n_alternatives=512)["choices"]
    (top,) = choice["logprobs"]["top_logprobs"]
    names = len({server.llama.tokenizer.decode_token(i) for i in range(512)})
    assert len(top) > names - 130 and math.isclose(sum(map(math.exp, top.values())), 1, abs_tol=0.05)
    zero = server.complete(TEXT, max_tokens=1, temperature=0, n_alternatives=0)["choices"][0]["logprobs"]
    assert [len(one) for one in zero["top_logprobs"]] == [1]


# Streams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"echo": True, "temperature": 0},
        {"seed": 3, "n": 3},
        {"seed": 3, "n": 2, "logprobs": 2, "echo": True},
        {"seed": 5, "temperature": 2, "logprobs": 1, "stop": ["e", "\ufffd"], "n": 4},
        {"max_tokens": 0},
        {"max_tokens": 0, "echo": True, "logprobs": 0},
    ],
    ids=json.dumps,
)
def test_a_stream_joined_is_the_answer(fields: dict[str, Any], server: Server) -> None:
    body = {"prompt": [TEXT, EMOJI], "max_tokens": 20, **fields}
    answer = server.post("/v1/completions", **body)
    *chunks, _ = events(server, "/v1/completions", **body, stream_options={"include_usage": True})
    *chunks, last = chunks
    assert last["choices"] == [] and last["usage"] == answer["usage"] | {
        "prompt_tokens_details": last["usage"]["prompt_tokens_details"]
    }
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "text_completion" for chunk in chunks)
    found = joined(chunks)
    for ours, theirs in zip(found, answer["choices"], strict=True):
        for name in ("token_logprobs", "top_logprobs"):
            if theirs["logprobs"]:  # rounding may depend on what the cache held
                assert len(ours["logprobs"].pop(name)) == len(theirs["logprobs"].pop(name))
        assert ours == theirs


def test_a_stream_without_usage(server: Server) -> None:
    *chunks, _ = events(server, "/v1/completions", prompt=TEXT, **GREEDY)
    assert all("usage" not in chunk for chunk in chunks) and chunks[-1]["choices"]


# Infilling ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def infilling(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write_infilling(tmp_path_factory.mktemp("infilling") / "tokenizer.model")
    with serving(checkpoint("code"), tokenizer_path=path, max_seq_len=64, max_batch_size=2) as server:
        yield server


def test_a_suffix(infilling: Server) -> None:
    (expected,) = infilling.llama.text_infilling(["def f(x):"], ["return x"], temperature=0, max_gen_len=9)
    answer = infilling.complete("def f(x):", suffix="return x", temperature=0, max_tokens=9, logprobs=0)
    assert answer["choices"][0]["text"] == expected["generation"]
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 9
    many = infilling.complete(["def f(x):", "a"], suffix="return x", temperature=0, max_tokens=9)["choices"]
    assert many[0]["text"] == expected["generation"]


def test_a_suffix_needs_a_model_for_it(server: Server) -> None:
    response = server.client.post("/v1/completions", json={"prompt": "a", "suffix": "b"})
    assert response.status_code == 400 and response.json()["error"]["param"] == "suffix"
    assert "infilling needs a Code Llama" in response.json()["error"]["message"]
