"""The command `llama serve` as a program: signals, exit statuses, keys, ranks."""

import contextlib
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.commands import Ended
from helpers.servers import ServerProcess

FOREVER: dict[str, Any] = {"prompt": "x", "temperature": 0, "logit_bias": {"9": 100}}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc")


class Stream(threading.Thread):
    """A client that reads a stream to its end. text: what it has received."""

    def __init__(self, url: str, headers: dict[str, str] | None = None, **body: Any):
        super().__init__(daemon=True)
        self.url, self.headers, self.body = url, headers, FOREVER | body | {"stream": True}
        self.text = ""
        self.start()

    def run(self) -> None:
        with (
            contextlib.suppress(httpx.RemoteProtocolError),  # the server has ended
            httpx.stream(
                "POST", f"{self.url}/v1/completions", json=self.body, headers=self.headers, timeout=60
            ) as response,
        ):
            for text in response.iter_text():
                self.text += text

    def wait_for_text(self) -> None:
        while "data: " not in self.text:
            assert self.is_alive()
            time.sleep(0.01)

    def events(self) -> list[str]:
        self.join(30)
        return [event.removeprefix("data: ") for event in self.text.strip().split("\n\n")]


def test_sigterm_in_the_middle_of_a_stream(checkpoint: Callable[..., Path]) -> None:
    """The stream gets all of its text, new requests get 503, and the status is 0. The key is from the environment, and
    a server that others can reach warns only without one."""
    flags = ("--host", "0.0.0.0", "--max_seq_len", "4000", "--grace", "50")
    with ServerProcess(checkpoint("mha"), *flags, LLAMA_API_KEY="s3cret") as server:
        url, headers = server.url(), {"Authorization": "Bearer s3cret"}
        assert httpx.get(f"{url}/v1/models").status_code == 401
        stream = Stream(url, headers, max_tokens=3000)
        stream.wait_for_text()
        server.signal(signal.SIGTERM)
        server.wait_for("finishing 1 requests, for up to 50 s")
        response = httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, headers=headers)
        assert response.status_code == 503 and response.json()["error"]["code"] == "shutting_down"
        assert httpx.get(f"{url}/health").status_code == 503
        *events, last = stream.events()
        assert last == "[DONE]" and json.loads(events[-1])["choices"][0]["finish_reason"] == "length"
        assert len("".join(json.loads(event)["choices"][0]["text"] for event in events)) == 3000
        assert server.wait() == 0
    assert "s3cret" not in server.err and "warning" not in server.err and len(server.err.splitlines()) == 4, server.err


def test_the_grace_ends_and_a_second_signal_ends_at_once(checkpoint: Callable[..., Path]) -> None:
    flags = ("--max_seq_len", "4000", "--compile", "False")
    short = ServerProcess(checkpoint("mha"), *flags, "--grace", "0.3", "--host", "0.0.0.0")
    long = ServerProcess(checkpoint("mha"), *flags, "--grace", "50")
    with short, long:
        streams = [Stream(server.url(), max_tokens=3900) for server in (short, long)]
        for stream in streams:
            stream.wait_for_text()
        short.signal(signal.SIGTERM)
        *_, last = streams[0].events()
        assert json.loads(last)["error"]["code"] == "shutting_down"
        assert short.wait() == 0
        warning = "warning: 0.0.0.0 is reachable from other machines, and anybody may use it: give --api_key\n"
        assert warning in short.err
        long.signal(signal.SIGINT)
        long.wait_for("finishing 1 requests")
        long.signal(signal.SIGINT)
        assert long.wait(timeout=10) == 128 + signal.SIGINT
    assert "Traceback" not in short.err + long.err


def test_a_signal_while_the_model_is_loaded(checkpoint: Callable[..., Path]) -> None:
    with ServerProcess(checkpoint("mha")) as server:
        url = server.wait_for(r"listening on (http://\S+), loading")[1]
        server.signal(signal.SIGTERM)
        assert server.wait(timeout=20) == 0
    assert "Traceback" not in server.err and url.startswith("http://127.0.0.1:")


def test_more_connections_than_open_files(checkpoint: Callable[..., Path]) -> None:
    """A process may open 1,024 files on many systems. Connections beyond the server's own limit are closed."""
    import resource  # Windows has no such module

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 4096:
        pytest.skip("this system allows too few open files")
    program = ("sh", "-c", 'ulimit -Sn 1024; exec "$0" "$@"', sys.executable)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
        with ServerProcess(checkpoint("mha"), program=program) as server, contextlib.ExitStack() as held:
            url = server.url()
            for _ in range(1300):
                held.enter_context(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10))
            held.close()
            until = time.monotonic() + 10
            while True:
                with contextlib.suppress(httpx.TransportError):
                    assert httpx.get(f"{url}/health").status_code == 200
                    break
                assert time.monotonic() < until
            server.signal(signal.SIGTERM)
            assert server.wait() == 0
        assert len(server.err.splitlines()) == 3, server.err
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "65536"], "port is 65536, expected an integer from 0, below 65536"),
        (["--max_queue", "-1"], "max_queue is -1, expected an integer from 0"),
        (["--grace", "nan"], "grace is nan, expected seconds from 0"),
        (["--api_key", ""], "the API key is empty"),
        (["--api_key", "schlüssel"], "characters other than ASCII's"),
        (["--host", "256.0.0.1"], "cannot listen on 256.0.0.1, port 8000: "),
    ],
)
def test_wrong_flags(flags: list[str], message: str, command: Callable[..., Ended]) -> None:
    ended = command("serve", *flags)
    assert ended.status == 1 and message in ended.err and ended.err.count("\n") == 1, ended


def test_a_port_in_use(command: Callable[..., Ended]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = command("serve", "--port", str(port))
    reason = f"cannot listen on 127.0.0.1, port {port}: Address already in use; choose another --host or --port"
    assert (ended.status, ended.err) == (1, f"error: {reason}\n")


def test_a_model_that_cannot_be_loaded(command: Callable[..., Ended]) -> None:
    ended = command("serve", "--port", "0", "--quantize", "int8", "--plain")
    assert ended.status == 1
    assert ended.err.splitlines()[1:] == ["error: plain excludes quantize and compile: leave one of them out"]


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra(package: str, command: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("llama.serve", f"{package}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delattr("llama.serve", raising=False)
    ended = command("serve")
    expected = f"error: serve needs the Python package {package}: pip install 'llama-runner[serve]'\n"
    assert (ended.status, ended.err) == (1, expected)


def test_the_name_of_a_model() -> None:
    from llama.serve.runner import model_name

    assert model_name("/models/llama-2-7b/") == "llama-2-7b"
    assert model_name("/models/Llama-3.2-1B/original") == "Llama-3.2-1B"
    assert model_name(".") == Path.cwd().name
