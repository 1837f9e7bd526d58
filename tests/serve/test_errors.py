"""Errors in OpenAI's form: the status, the field in `param`, one line with the value."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.servers import Server, serving
from llama.serve import connections
from llama.serve.app import create_app
from llama.serve.service import Service

MESSAGES = [{"role": "user", "content": "x"}]
LONG = "a" * 3000  # characters: more tokens than the cache has positions


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    (name, error) = response.json().popitem()
    assert name == "error" and error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": None}, "prompt", "prompt is missing"),
        ({"prompt": 7}, "prompt", "prompt is 7, expected a text, a list of texts, a list of ids or"),
        ({"prompt": []}, "prompt", "prompt is [], expected a text"),
        ({"prompt": ["a", 1]}, "prompt", 'prompt is ["a", 1], expected'),
        ({"prompt": [[1], "a"]}, "prompt", 'prompt is [[1], "a"], expected'),
        ({"prompt": [1, True]}, "prompt", "prompt is [1, true], expected"),
        ({"prompt": [1, 2.5]}, "prompt", "prompt is [1, 2.5], expected"),
        ({"prompt": {"a": 1}}, "prompt", 'prompt is {"a": 1}, expected'),
        ({"prompt": [[]]}, "prompt", "prompt 0 is empty"),
        ({"prompt": [1, 512]}, "prompt", "prompt 0 holds id 512, outside the vocabulary of 512"),
        ({"prompt": [-1]}, "prompt", "prompt 0 holds id -1"),
        ({"prompt": "\ud800"}, "prompt", "a lone surrogate"),
        ({"prompt": LONG}, "prompt", "prompt has 3,001 tokens, but max_seq_len is 160: shorten it"),
        ({"prompt": LONG * 10}, "prompt", "prompt has 30,000 characters, but max_seq_len is 160"),
        ({"prompt": [1] * 161}, "prompt", "prompt has 161 tokens, but max_seq_len is 160"),
        ({"prompt": [1] * 150, "max_tokens": 11}, "max_tokens", "prompt has 150 tokens and max_tokens is 11, but"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens is -1, expected an integer from 0"),
        ({"max_tokens": "16"}, "max_tokens", 'max_tokens is "16", expected an integer from 0'),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens is 1.5, expected an integer"),
        ({"max_tokens": True}, "max_tokens", "max_tokens is true, expected an integer"),
        ({"max_tokens": 10**30}, "max_tokens", "expected an integer from 0"),
        ({"temperature": -0.1}, "temperature", "temperature is -0.1, expected a number from 0 to 2"),
        ({"temperature": 2.1}, "temperature", "temperature is 2.1, expected a number from 0 to 2"),
        ({"temperature": "hot"}, "temperature", 'temperature is "hot", expected a number'),
        ({"temperature": True}, "temperature", "temperature is true, expected a number"),
        ({"top_p": 1.5}, "top_p", "top_p is 1.5, expected a number from 0 to 1"),
        ({"top_p": 10**400}, "top_p", f"top_p is {10**400}, expected a number from 0"),
        ({"top_p": []}, "top_p", "top_p is [], expected a number"),
        ({"top_k": 0}, "top_k", "top_k is 0, expected an integer from 1"),
        ({"top_k": 1.0}, "top_k", "top_k is 1.0, expected an integer"),
        ({"repetition_penalty": 10**400}, "repetition_penalty", "expected a number from 0"),
        ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty is 0, expected a number above 0"),
        ({"frequency_penalty": -(10**400)}, "frequency_penalty", "expected a number from -2 to 2"),
        ({"frequency_penalty": 3}, "frequency_penalty", "frequency_penalty is 3, expected a number from -2 to 2"),
        ({"presence_penalty": "x"}, "presence_penalty", "presence_penalty is 'x', expected a number"),
        ({"presence_penalty": False}, "presence_penalty", "presence_penalty is false, expected a number"),
        ({"logit_bias": [1]}, "logit_bias", "logit_bias is '[1]', expected a mapping"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "logit_bias has the key 'a', expected an id"),
        ({"logit_bias": {"3": 101}}, "logit_bias", "logit_bias of id 3 is 101, expected a number from -100 to 100"),
        ({"logit_bias": {"3": 10**400}}, "logit_bias", "expected a number from -100 to 100"),
        ({"logit_bias": {"3": True}}, "logit_bias", "logit_bias of id 3 is True, expected a number"),
        ({"logit_bias": {"512": 1}}, "logit_bias", "logit_bias holds id 512, outside the vocabulary of 512"),
        ({"stop_token_ids": [512]}, "stop_token_ids", "stop_token_ids holds id 512, outside the vocabulary of 512"),
        ({"n": 0}, "n", "n is 0, expected an integer from 1 to 128"),
        ({"n": 129}, "n", "n is 129, expected an integer from 1 to 128"),
        ({"prompt": ["a"] * 100, "n": 30}, "prompt", "100 prompts times n = 30: expected up to 2048 answers"),
        ({"seed": "x"}, "seed", 'seed is "x", expected an integer'),
        ({"seed": 2**70}, "seed", f"seed is {2**70}, expected an integer"),
        ({"stop": 1}, "stop", "stop is 1, expected a text or a list of texts"),
        ({"stop": ["a", 1]}, "stop", 'stop is ["a", 1], expected a text or a list of texts'),
        ({"stop": ""}, "stop", 'stop is "", expected up to 32 texts of 1 to 256 characters'),
        ({"stop": ["a"] * 33}, "stop", "expected up to 32 texts"),
        ({"stop": "a" * 257}, "stop", "expected up to 32 texts of 1 to 256 characters"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]", 'stop_token_ids[0] is "a", expected a valid integer'),
        ({"stop_token_ids": 5}, "stop_token_ids", "stop_token_ids is 5, expected a valid list"),
        ({"stream": "yes"}, "stream", 'stream is "yes", expected a valid boolean'),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options needs stream: true"),
        ({"stream": True, "stream_options": {"a": 1}}, "stream_options.a", "stream_options.a is not supported"),
        ({"stream": True, "stream_options": 1}, "stream_options", "stream_options is 1, expected"),
        ({"echo": 1}, "echo", "echo is 1, expected a valid boolean"),
        ({"logprobs": 21}, "logprobs", "logprobs is 21, expected an integer from 0 to 20"),
        ({"logprobs": True}, "logprobs", "logprobs is true, expected an integer from 0 to 20"),
        ({"n_alternatives": 513}, "n_alternatives", "n_alternatives is 513, but the vocabulary has 512 ids"),
        ({"n_alternatives": -1}, "n_alternatives", "n_alternatives is -1, expected an integer from 0"),
        ({"n_alternatives": 2, "logprobs": 2}, "n_alternatives", "n_alternatives replaces logprobs"),
        ({"prompt": ["a"] * 100, "n_alternatives": 512, "max_tokens": 16}, "n_alternatives", "expected up to 500,000"),
        ({"suffix": 1}, "suffix", "suffix is 1, expected a valid string"),
        ({"suffix": "a", "echo": True}, "echo", "echo and suffix exclude each other"),
        ({"suffix": "a", "prompt": [1]}, "prompt", "a suffix needs prompts that are texts"),
        ({"best_of": 4}, "best_of", "best_of is 4: it is not supported"),
        ({"model": 3}, "model", "model is 3, expected a valid string"),
        ({"max_tokenz": 3}, "max_tokenz", "unknown field 'max_tokenz': did you mean max_tokens?"),
        ({"zzzzz": None}, "zzzzz", "unknown field 'zzzzz'; there are model, n, stop"),
        ({"\ud800": 1}, "<U+D800>", "unknown field '\\ud800'"),
        ({"messages": MESSAGES}, "messages", "unknown field 'messages'"),
        ({"tools": []}, "tools", "unknown field 'tools'"),
    ],
)  # fmt: skip
def test_mistakes_in_completions(fields: dict[str, Any], param: str, message: str, server: Server) -> None:
    body = json.dumps({"prompt": "x", **fields})
    response = server.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    error = error_of(response, 400)
    assert error["param"] == param and message in error["message"], error
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "messages is empty"),
        ({"messages": "hi"}, "messages", 'messages is "hi", expected a valid list'),
        ({"messages": ["hi"]}, "messages[0]", 'messages[0] is "hi", expected'),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "messages[0].role is missing"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "messages[0].content is null"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", 'messages[0].role is "tool", expected'),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "messages[0].content is 5, expected"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content", "expected parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
            "got a part of type 'image_url'",
        ),
        ({"messages": [{**MESSAGES[0], "name": "bob"}]}, "messages[0].name", "messages[0].name is not supported"),
        ({"messages": MESSAGES * 2}, "messages", "roles of a dialog: an optional system message"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "got assistant"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "lone surrogate"),
        ({"messages": [{"role": "user", "content": LONG}]}, "messages", "tokens, but max_seq_len is 160"),
        ({"messages": [{"role": "user", "content": LONG * 10}]}, "messages", "30,000 characters"),
        ({"max_tokens": 160}, "max_tokens", "and max_tokens is 160, but max_seq_len is 160"),
        ({"max_completion_tokens": 160}, "max_completion_tokens", "max_completion_tokens is 160"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "give one"),
        ({"logprobs": 3}, "logprobs", "logprobs is 3, expected a valid boolean"),
        ({"top_logprobs": 3}, "top_logprobs", "top_logprobs needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "expected an integer from 0 to 20"),
        ({"logprobs": True, "top_logprobs": 2, "n_alternatives": 2}, "n_alternatives", "replaces top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools", "tools is not supported, leave it out"),
        ({"tools": []}, "tools", "tools is []: tools is not supported"),
        ({"tool_choice": "auto"}, "tool_choice", 'tool_choice is "auto": tool_choice is not supported'),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format is not supported"),
        ({"store": True}, "store", "store is true: store is not supported"),
        ({"metadata": {"a": "b"}}, "metadata", "metadata is not supported"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "reasoning_effort is not supported"),
        ({"prompt": "x"}, "prompt", "unknown field 'prompt'"),
        ({"echo": True}, "echo", "unknown field 'echo'"),
    ],
)
def test_mistakes_in_chats(fields: dict[str, Any], param: str, message: str, server: Server) -> None:
    body = json.dumps({"messages": MESSAGES, **fields})
    response = server.client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    error = error_of(response, 400)
    assert error["param"] == param and message in error["message"], error


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty, expected a JSON object"),
        (b"  \n", "the body is empty"),
        (b"{", "the body is not JSON: Expecting property name"),
        (b'{"prompt": "x"', "the body is not JSON: Expecting ','"),
        (b'{"prompt": "x', "Unterminated string"),
        (b"{'prompt': 'x'}", "Expecting property name enclosed in double quotes"),
        (b'{"prompt": "x",}', "the body is not JSON"),
        (b'{"prompt": "x"} {}', "Extra data"),
        (b'{"prompt": x}', "Expecting value"),
        (b'{prompt: "x"}', "Expecting property name"),
        (b'// x\n{"prompt": "x"}', "Expecting value"),
        (b"[]", "the body is [], expected a JSON object"),
        (b'"prompt"', 'the body is "prompt", expected a JSON object'),
        (b"null", "the body is null, expected a JSON object"),
        (b"17", "the body is 17, expected a JSON object"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN is not a JSON number"),
        (b'{"prompt": "x", "temperature": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature is Infinity, expected a number"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "the body is not JSON"),
        (b'{"prompt": "x", "n": 1, "n": 2}', "the key 'n' is there twice"),
        (b'{"prompt": "x\xff"}', "the body is not UTF-8: byte 13 is 0xFF"),
        ('{"prompt": "x"}'.encode("utf-16"), "the body is not UTF-8"),
        (b'\xef\xbb\xbf{"prompt": "x"}', "the body is not JSON: Unexpected UTF-8 BOM"),
        (b'{"prompt": "a\nb"}', "Invalid control character"),
        (b'{"prompt": "\\x41"}', "Invalid \\escape"),
        (b"[" * 100_000, "the body is nested too deeply"),
        (b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", "prompt is [["),
    ],
)
def test_wrong_json(body: bytes, message: str, server: Server) -> None:
    response = server.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert message in error_of(response, 400)["message"]


def test_quoted_values_are_short_and_harmless(server: Server) -> None:
    body = {"prompt": "x", "stop": ["\x1b[31m" + "y" * 10_000]}
    message = error_of(server.client.post("/v1/completions", json=body), 400)["message"]
    assert len(message) < 250 and "\x1b" not in message


def test_long_names_and_many_keys_take_no_time(server: Server) -> None:
    headers = {"Content-Type": "application/json"}
    keys = ",".join(f'"{i:x}":0' for i in range(100_000))
    for body, message in (
        (f'{{"{"a" * 3_000_000}":0}}', "unknown field 'aaa"),
        (f'{{{keys},"x":0,"x":0}}', "the key 'x' is there twice"),
    ):
        start = time.monotonic()
        error = error_of(server.client.post("/v1/completions", content=body, headers=headers), 400)
        assert time.monotonic() - start < 5, "comparing each key with each other one takes minutes"
        assert error["message"].startswith(("the body is not JSON", "unknown field")) and message in error["message"]
        assert len(error["message"]) < 5000 and len(error["param"] or "") < 5000


def test_a_huge_top_k_is_no_limit(server: Server) -> None:
    expected = server.complete("x", seed=1)["choices"]
    assert server.complete("x", seed=1, top_k=10**400)["choices"] == expected


def test_bodies_that_are_not_declared_as_json(server: Server) -> None:
    """A page in a browser may send these types without asking the server."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = server.client.post("/v1/completions", content=b'{"prompt":"x"}', headers={"Content-Type": kind})
        assert f"Content-Type is {kind or 'missing'}" in error_of(response, 415)["message"]
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert error_of(server.client.post("/v1/completions", content=b"{}", headers=headers), 415)
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert server.client.post("/v1/completions", content=b'{"prompt":"x"}', headers=headers).status_code == 200


def test_bodies_over_the_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_BODY", 100_000)
    headers = {"Content-Type": "application/json"}
    for content in (b" " * 100_001, iter([b" " * 60_000] * 2)):  # with Content-Length, and without
        error = error_of(server.client.post("/v1/completions", content=content, headers=headers), 413)
        assert error["message"].startswith("the body has more than 100,000 bytes")
    fits = json.dumps({"prompt": "x"}).encode().ljust(100_000)
    assert server.client.post("/v1/completions", content=fits, headers=headers).status_code == 200


def test_other_models_paths_and_methods(server: Server) -> None:
    name = server.service.name
    for path, body in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": MESSAGES})):
        error = error_of(server.client.post(f"/v1/{path}", json=body | {"model": "gpt-4"}), 404)
        assert error["param"] == "model" and error["code"] == "model_not_found"
        assert error["message"] == f"there is no model 'gpt-4', expected {name!r}"
    error_of(server.client.get("/v1/models/gpt-4"), 404)
    assert error_of(server.client.get("/v1/embeddings"), 404)["message"] == "there is no endpoint: GET /v1/embeddings"
    response = server.client.get("/v1/completions")
    assert "Method Not Allowed: GET" in error_of(response, 405)["message"] and response.headers["allow"] == "POST"


def test_a_base_model_does_not_chat(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.llama, "chat_format", None)
    error = error_of(server.client.post("/v1/chat/completions", json={"messages": MESSAGES}), 400)
    assert error["param"] == "model" and "no chat format is recorded" in error["message"]


def test_errors_of_the_tokenize_endpoints(server: Server) -> None:
    for path, body, param in (
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": 3}, "content"),
        ("/tokenize", {"content": "x", "add_spezial": True}, "add_spezial"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [1, "x"]}, "tokens[1]"),
        ("/detokenize", {"tokens": [512]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ):
        assert error_of(server.client.post(path, json=body), 400)["param"] == param


def test_a_bug_is_reported_without_its_details(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server.llama, "_rows", lambda *_, **__: 1 / 0)
    error = error_of(server.client.post("/v1/completions", json={"prompt": "x"}), 500)
    assert error["message"] == "internal error, which the server has logged" and error["type"] == "server_error"
    until = time.monotonic() + 10
    while "ZeroDivisionError" not in caplog.text and time.monotonic() < until:
        time.sleep(0.01)  # it is logged after the response
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    server.wait_until_idle()
    assert server.complete("x")


def test_a_failed_computation(checkpoint: Callable[..., Path]) -> None:
    """Logits that are not finite: status 500 and the reason, in a stream an event. The server goes on."""
    with serving(checkpoint("mha"), max_seq_len=32, max_batch_size=2) as server:
        weight = server.llama.model.norm.weight.data
        before = weight.clone()
        weight.fill_(float("nan"))
        body = {"prompt": "x", "temperature": 0}
        error = error_of(server.client.post("/v1/completions", json=body), 500)
        assert "logits that are not finite" in error["message"] and error["code"] == "computation_failed"
        response = server.client.post("/v1/completions", json=body | {"stream": True})
        assert response.status_code == 200
        (event,) = response.text.strip().split("\n\n")
        assert "logits that are not finite" in json.loads(event.removeprefix("data: "))["error"]["message"]
        weight.copy_(before)
        assert server.complete("x")
        server.wait_until_idle()


# Keys and hosts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(checkpoint: Callable[..., Path]) -> Iterator[Server]:
    with serving(checkpoint("mha"), service={"api_key": "secret-key"}, max_seq_len=32, max_batch_size=2) as server:
        yield server


def test_the_key(guarded: Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    get = guarded.client.get
    wrong = ("", "Bearer", "Bearer secret", "Bearer secret-key2", "secret-key", "Basic secret-key", "\xe9")
    for key in wrong:
        for path in ("/v1/models", "/metrics", "/nothing"):
            response = get(path, headers={b"Authorization": key.encode("latin-1")} if key else {})
            error = error_of(response, 401)
            assert error["code"] == "invalid_api_key" and response.headers["www-authenticate"] == "Bearer"
            assert "secret" not in error["message"]
    for key in ("Bearer secret-key", "bearer  secret-key"):
        assert get("/v1/models", headers={"Authorization": key}).status_code == 200
    assert guarded.client.post("/v1/completions", json={"prompt": "x"}).status_code == 401
    assert get("/health").status_code == 200
    out, err = capfd.readouterr()
    assert "secret" not in caplog.text + out + err


def test_a_web_page_cannot_use_a_name_of_its_own(server: Server, guarded: Server) -> None:
    """DNS rebinding: only servers with a key answer to any Host."""
    ours = ("localhost", "LOCALHOST:80", "127.0.0.1:9", "[::1]:8000", "10.1.2.3")
    others = ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example")
    for host in (*ours, *others):
        status = 200 if host in ours else 403
        assert server.client.get("/v1/models", headers={"Host": host}).status_code == status, host
    headers = {"Host": "model.example", "Authorization": "Bearer secret-key"}
    assert guarded.client.get("/v1/models", headers=headers).status_code == 200


def test_loading_and_stopping() -> None:
    service = Service("name", is_loopback=False)

    async def statuses() -> list[tuple[int, str | None, str | None]]:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            responses = [
                await client.get("/health"),
                await client.post("/v1/completions", json={"prompt": "x"}),
                await client.post("/v1/chat/completions", json={"messages": MESSAGES}),
                await client.post("/tokenize", json={"content": "x"}),
            ]
            return [(r.status_code, r.headers.get("retry-after"), r.json()["error"]["code"]) for r in responses]

    assert asyncio.run(statuses()) == [(503, "1", "loading")] * 4
    service.is_stopping = True
    assert asyncio.run(statuses())[:3] == [(503, "1", "shutting_down")] * 3


def test_large_headers(server: Server) -> None:
    error = error_of(server.client.get("/health", headers={"X": "x" * 20_000}), 431)
    assert error["message"] == "the headers have more than 16,384 bytes"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(30):  # in pieces, without an end
                raw.sendall(b"X: " + b"x" * 1000 + b"\r\n")
                time.sleep(0.01)
        assert raw.recv(1000).startswith(b"HTTP/1.1 400")


def test_what_is_no_http_at_all(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 400")
    assert server.complete("x")
