"""Clients that go away, do not read or never finish their request; a full queue; memory. Nothing hangs, no slot stays
in use, and no other client's answer changes."""

import contextlib
import json
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers.rss import anonymous_bytes
from helpers.servers import Server, serving
from llama.serve import connections

LONG: dict[str, Any] = {"prompt": "The licence", "temperature": 0, "max_tokens": 150, "logit_bias": {"9": 100}}


@pytest.fixture
def slow(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Each step takes 20 ms, so an answer of 150 ids takes 3 s."""
    worker = server.llama.scheduler._worker
    run = worker.run

    def slowly(*args: Any) -> Any:
        time.sleep(0.02)
        return run(*args)

    server.wait_until_idle()
    monkeypatch.setattr(worker, "run", slowly)
    yield server
    server.wait_until_idle()


def raw_request(server: Server, body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return f"{head}\r\n\r\n".encode() + data


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def closed_by_server(sock: socket.socket, within: float) -> bool:
    sock.settimeout(within)
    with contextlib.suppress(TimeoutError):
        try:
            while sock.recv(65536):
                pass
        except ConnectionError:
            pass
        return True
    return False


def generated(server: Server) -> float:
    return server.metric("llama_generated_tokens_total")


# Clients that go away -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(stream: bool, slow: Server) -> None:
    steps, cancelled = 0, slow.metric("llama_requests_cancelled_total")
    sock = connect(slow)
    sock.sendall(raw_request(slow, LONG | {"stream": stream}))
    while not slow.metric("llama_slots_in_use"):
        time.sleep(0.005)
    (job,) = slow.service.jobs
    sock.close()
    while slow.metric("llama_slots_in_use"):
        time.sleep(0.005)
        steps += 1
        assert steps < 100, "half a second"
    assert sum(len(row.tokens) for row in job.rows) < 60
    slow.wait_until_idle()
    assert slow.metric("llama_requests_cancelled_total") == cancelled + 1


def test_a_client_that_goes_away_while_it_waits(slow: Server) -> None:
    sockets = [connect(slow) for _ in range(6)]
    for sock in sockets:
        sock.sendall(raw_request(slow, LONG))
    while slow.metric("llama_queue_length") < 2:  # four slots
        time.sleep(0.005)
    for sock in reversed(sockets):
        sock.close()
    slow.wait_until_idle(timeout=2)


def test_random_disconnects_change_no_other_answer(server: Server) -> None:
    """200 clients go away at random moments, while others get the answers that they get alone."""
    rng = random.Random(6)
    prompts = [f"The licence {i}" for i in range(40)]
    fields: dict[str, Any] = {"max_tokens": 12, "seed": 8, "logprobs": 1}
    expected = {prompt: server.complete(prompt, **fields)["choices"][0] for prompt in prompts}

    def leave(_: int) -> None:
        body = LONG | {"stream": rng.random() < 0.7, "n": rng.choice([1, 1, 3]), "prompt": "x" * rng.randrange(1, 90)}
        body["max_tokens"] = rng.randrange(60)
        with connect(server) as sock:
            data = raw_request(server, body)
            is_whole = rng.random() < 0.8
            sock.sendall(data if is_whole else data[: rng.randrange(len(data))])
            time.sleep(rng.random() * 0.03)
            if is_whole and rng.random() < 0.3:
                sock.recv(500)

    def stay(prompt: str) -> bool:
        found = server.complete(prompt, **fields)["choices"][0]
        theirs = expected[prompt]
        assert found["text"] == theirs["text"] and found["logprobs"]["tokens"] == theirs["logprobs"]["tokens"]
        values = zip(found["logprobs"]["token_logprobs"], theirs["logprobs"]["token_logprobs"], strict=True)
        return max(abs(a - b) for a, b in values) < 1e-4

    with ThreadPoolExecutor(8) as pool:
        leaving = [pool.submit(leave, i) for i in range(200)]
        staying = [pool.submit(stay, rng.choice(prompts)) for _ in range(100)]
        assert all(one.result(timeout=60) for one in staying)
        for one in leaving:
            one.result(timeout=60)
    server.wait_until_idle()
    assert server.metric("llama_queue_length") == 0


# Clients that do not read, or do not send -----------------------------------------------------------


def test_a_slow_reader_stops_nobody(server: Server) -> None:
    """Its answer of some MB is computed, its slot is freed, and little of the answer is in buffers. The reader then
    gets all of it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", server.port))
    sock.sendall(raw_request(server, LONG | {"stream": True, "n_alternatives": 512, "n": 4}))  # 8 MB
    while not server.service.jobs:
        time.sleep(0.005)
    (job,) = server.service.jobs
    while server.metric("llama_slots_in_use") or not all(row.finish_reason for row in job.rows):
        time.sleep(0.01)
    assert server.complete("x", max_tokens=3)["choices"]
    while not (paused := [one for one in server.connections() if one._reading is not None]):
        assert server.service.responding == 1  # it is still being sent
        time.sleep(0.01)
    assert paused[0].transport.get_write_buffer_size() < 300_000
    received = b""
    sock.settimeout(30)
    while not received.endswith(b"0\r\n\r\n"):
        received += sock.recv(2**20)
    sock.close()
    chunks = [json.loads(data) for data in re.findall(rb"data: (\{.*\})\n", received)]
    scored = [len(choice["logprobs"]["tokens"]) for chunk in chunks for choice in chunk["choices"]]
    assert sum(scored) == 4 * 150 and len(received) > 4_000_000
    server.wait_until_idle()


def test_a_client_that_never_reads_is_disconnected(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READ_TIME", 0.2)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", server.port))
    sock.sendall(raw_request(server, LONG | {"n_alternatives": 512, "n": 4, "stream": True}))
    while not server.service.responding:
        time.sleep(0.005)
    server.wait_until_idle(timeout=10)
    sock.close()


def test_a_slow_but_steady_reader_is_served(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READ_TIME", 0.2)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", server.port))
    sock.sendall(raw_request(server, LONG | {"n_alternatives": 512, "max_tokens": 80}))
    received, started = 0, time.monotonic()
    while time.monotonic() - started < 1.2:
        received += len(sock.recv(20_000))
        time.sleep(0.02)
    assert received > 0
    while data := sock.recv(2**20):
        received += len(data)
        if data.endswith(b"}"):
            break
    assert received > 500_000
    sock.close()


def test_an_answer_is_sent_completely_before_the_server_ends(checkpoint: Callable[..., Path]) -> None:
    with serving(checkpoint("mha"), max_seq_len=160, max_batch_size=4) as server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(30)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(raw_request(server, LONG | {"n_alternatives": 512, "n": 4}))  # 7 MB
        head = sock.recv(200)
        while server.service.responding:  # until it is in the buffers
            time.sleep(0.01)
        server.runner.stop()
        time.sleep(0.3)
        received = head + b"".join(iter(lambda: sock.recv(2**20), b""))
        sock.close()
    length = re.search(rb"content-length: (\d+)", received)
    assert length is not None and len(received.partition(b"\r\n\r\n")[2]) == int(length[1]) > 7_000_000


def test_headers_and_bodies_that_never_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_TIME", 0.3)
    monkeypatch.setattr(connections, "BODY_TIME", 0.3)
    whole = raw_request(server, LONG)
    for part in (b"", b"POST /v1", whole[:60], whole[:-10]):
        with connect(server) as sock:
            sock.sendall(part)
            assert closed_by_server(sock, 5), part
    server.wait_until_idle()


def test_a_request_sent_in_pieces_is_answered(server: Server) -> None:
    data = raw_request(server, LONG | {"max_tokens": 2})
    with connect(server) as sock:
        for start in range(0, len(data), 40):
            sock.sendall(data[start : start + 40])
            time.sleep(0.005)
        assert sock.recv(100).startswith(b"HTTP/1.1 200")


def test_bodies_cut_in_the_middle(server: Server) -> None:
    data = raw_request(server, LONG)
    for end in range(100, len(data), 20):
        with connect(server) as sock:
            sock.sendall(data[:end])
    server.wait_until_idle()
    assert server.complete("x")


def test_the_number_of_connections_is_limited(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.client.get("/health")
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3 + len(server.connections()))
    with contextlib.ExitStack() as held:
        for _ in range(3):
            held.enter_context(connect(server))
        time.sleep(0.1)
        with connect(server) as one_more:
            assert closed_by_server(one_more, 5)
        assert server.client.get("/health").status_code == 200


# The queue ------------------------------------------------------------------------------------------


def test_a_full_queue(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot and a queue of one: the third request is refused, and a later one is not."""
    with serving(checkpoint("mha"), max_seq_len=160, max_batch_size=1, service={"max_queue": 1}) as server:
        worker = server.llama.scheduler._worker
        run, gate = worker.run, threading.Event()
        monkeypatch.setattr(worker, "run", lambda *args: (gate.wait(30), run(*args))[1])
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(server.complete, f"text {i}", max_tokens=3) for i in range(2)]
            while len(server.service.jobs) < 2:
                time.sleep(0.005)
            for path, body in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": [user("x")]})):
                response = server.client.post(f"/v1/{path}", json=body)
                assert response.status_code == 429 and int(response.headers["retry-after"]) > 0
                error = response.json()["error"]
                assert error["type"] == "rate_limit_error" and error["message"].startswith("2 requests are running")
            gate.set()
            assert all(answer.result(timeout=30)["choices"] for answer in answers)
        server.wait_until_idle()
        assert server.metric("llama_requests_total", endpoint="/v1/completions", status="429") == 1
        assert server.complete("x")


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


@pytest.fixture
def order_of_ends(slow: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], list[int]]:
    """order_of_ends(priorities): ask for answers of the same length, one after the other -> in which order they are
    done. The first four have the four slots when the others come."""
    worker, calls = slow.llama.scheduler._worker, slow.llama.scheduler._calls
    run, gate, done = worker.run, threading.Event(), list[int]()
    # While requests come, a step waits, so that they come in this order and none is done.
    monkeypatch.setattr(worker, "run", lambda *args: (gate.wait(30), run(*args))[1])

    def ask(i: int, priority: int) -> None:
        slow.complete(f"text {i}", max_tokens=40, logit_bias={"9": 100}, priority=priority)
        done.append(i)

    def wait_for(condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.002)

    def order(priorities: list[int]) -> list[int]:
        with ThreadPoolExecutor(len(priorities)) as pool:
            for i, priority in enumerate(priorities):
                pool.submit(ask, i, priority)
                wait_for(lambda i=i: len(calls) == i + 1)  # type: ignore[misc]
                if i == 3:
                    gate.set()
                    wait_for(lambda: slow.metric("llama_slots_in_use") == 4)
                    gate.clear()
            gate.set()
        return done

    return order


def test_first_come_first_served(order_of_ends: Callable[[list[int]], list[int]]) -> None:
    done = order_of_ends([0] * 8)
    assert sorted(done[:4]) == [0, 1, 2, 3] and sorted(done[4:]) == [4, 5, 6, 7]


def test_a_lower_priority_number_comes_first(order_of_ends: Callable[[list[int]], list[int]]) -> None:
    """It takes no slot from the four that have one."""
    done = order_of_ends([0] * 4 + [5] * 4 + [-5] * 4)
    assert [sorted(done[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3], [8, 9, 10, 11], [4, 5, 6, 7]]


# Memory and metrics ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_stays_flat(server: Server, measured: Callable[[str, object], None]) -> None:
    """500 requests of all kinds, after 200 to warm up."""

    def ask(i: int) -> None:
        kind = i % 5
        if kind == 0:
            server.chat(f"Hello {i}", max_tokens=3)
        elif kind == 1:
            server.client.post("/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 3})
        elif kind == 2:
            server.complete([f"a {i}", "b"], n=2, max_tokens=2, logprobs=3, echo=True)
        elif kind == 3:
            server.client.post("/v1/completions", json={f"wrong{i}": 1})
        else:
            server.client.get(f"/nothing/{i}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(200)))
        before = anonymous_bytes()
        list(pool.map(ask, range(200, 700)))
    server.wait_until_idle()
    grown = anonymous_bytes() - before
    measured("server: memory grown over 500 requests, MB", grown / 1e6)
    assert grown < 4e6


def test_metrics(server: Server) -> None:
    server.wait_until_idle()
    names = {
        "prompt": "llama_prompt_tokens_total",
        "generated": "llama_generated_tokens_total",
        "first": "llama_time_to_first_token_seconds_count",
        "next": "llama_time_between_tokens_seconds_count",
    }
    before = {key: server.metric(name) for key, name in names.items()}
    requests = server.metric("llama_requests_total", endpoint="/v1/completions", status="200")
    answer = server.complete("The licence", max_tokens=9, temperature=0, logit_bias={"9": 100})
    server.wait_until_idle()  # a request is counted after its response
    grown = {key: server.metric(name) - before[key] for key, name in names.items()}
    assert grown == {"prompt": answer["usage"]["prompt_tokens"], "generated": 9, "first": 1, "next": 8}
    assert server.metric("llama_requests_total", endpoint="/v1/completions", status="200") == requests + 1
    assert server.metric("llama_slots") == 4 and server.metric("llama_cache_size_tokens") == 640
    assert 0 < server.metric("llama_cached_tokens") <= 640
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'llama_requests_total{endpoint="/v1/completions",status="200"}' in response.text
    for name in ("llama_slots_in_use 0.0", "llama_queue_length 0.0", "llama_requests_open 0.0"):
        assert f"\n{name}\n" in response.text
    server.client.get("/a/b/c")
    server.wait_until_idle()
    assert server.metric("llama_requests_total", endpoint="other", status="404") >= 1
    assert "/a/b/c" not in server.client.get("/metrics").text


def test_the_turns_of_a_conversation_are_computed_once(server: Server) -> None:
    first = "word " * 12
    answer = server.chat(first, max_tokens=4)["choices"][0]["message"]["content"]
    usage = server.chat(first, answer, "and more", max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 30
    assert server.metric("llama_prompt_tokens_reused_total") >= 30


# Other endpoints ------------------------------------------------------------------------------------


def test_models_and_health(server: Server) -> None:
    name = server.service.name
    (model,) = server.client.get("/v1/models").json()["data"]
    assert model == {"id": name, "object": "model", "created": server.service.created, "owned_by": "llama-runner"}
    assert server.client.get(f"/v1/models/{name}").json() == model
    assert server.client.get("/health").json() == {"status": "ok"}


def test_tokenize_and_detokenize(server: Server) -> None:
    tokenizer = server.llama.tokenizer
    text = "The licence 😀"
    ids = server.post("/tokenize", content=text)["tokens"]
    assert ids == tokenizer.encode(text, bos=False, eos=False)
    assert server.post("/tokenize", content=text, add_special=True)["tokens"] == [tokenizer.bos_id, *ids]
    assert server.post("/detokenize", tokens=ids) == {"content": text}
    assert server.post("/tokenize", content="</s>")["tokens"] != [tokenizer.eos_id]  # text stays text
