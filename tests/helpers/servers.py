"""`llama serve` on a free port, in a thread of this process, or as a program."""

import asyncio
import contextlib
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from helpers.paths import ROOT
from llama import Llama
from llama.serve import runner
from llama.serve.service import Service


class Server:
    """A running server. llama: its model, which the test may call, too."""

    def __init__(self, service: Service, url: str, running: runner.Runner):
        self.service, self.url, self.runner = service, url, running
        self.client = httpx.Client(base_url=url, timeout=60)
        self.port = int(url.rpartition(":")[2])

    @property
    def llama(self) -> Llama:
        return self.service.llama

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer to a request that succeeds."""
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        return self.post("/v1/completions", prompt=prompt, **fields)

    def chat(self, *contents: str, **fields: Any) -> dict[str, Any]:
        """The answer to a dialog of user and assistant, alternating."""
        messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]
        return self.post("/v1/chat/completions", messages=messages, **fields)

    def metric(self, name: str, **labels: str) -> float:
        value = self.service.metrics.registry.get_sample_value(name, labels)
        return 0.0 if value is None else value

    def connections(self) -> list[Any]:
        """uvicorn's protocol objects of the open connections."""
        return list(self.runner.server.server_state.connections)

    def wait_until_idle(self, timeout: float = 20) -> None:
        """Wait until no request is open and no slot in use."""
        until = time.monotonic() + timeout
        while self.service.jobs or self.service.responding or self.metric("llama_slots_in_use"):
            assert time.monotonic() < until, (self.service.jobs, self.service.responding)
            time.sleep(0.01)


@contextlib.contextmanager
def serving(
    folder: Path, *, grace: float = 10, service: dict[str, Any] | None = None, **build: Any
) -> Iterator[Server]:
    """A server of the model in this folder. service: arguments of `Service`. build: arguments of `Llama.build`."""
    sock = runner._listen("127.0.0.1", 0)
    shared = Service(runner.model_name(folder), **(service or {}))
    running = runner.Runner(shared, sock, grace)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(running.run({"ckpt_dir": folder, **build}))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not shared.is_loaded:
        assert thread.is_alive() and not failures, failures
        time.sleep(0.01)
    server = Server(shared, f"http://127.0.0.1:{sock.getsockname()[1]}", running)
    try:
        yield server
    finally:
        server.client.close()
        running.stop()
        thread.join(timeout=60)
        assert not thread.is_alive() and not failures, failures


class ServerProcess:
    """`python -m llama serve` on a free port. err: what it has printed to stderr so far, complete after `wait`."""

    def __init__(self, folder: Path, *flags: str, program: tuple[str, ...] = (sys.executable,), **env: str):
        command = [*program, "-m", "llama", "serve", "--ckpt_dir", str(folder), "--port", "0", *flags]
        clean = {name: value for name, value in os.environ.items() if name != "LLAMA_API_KEY"}
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean | env, cwd=ROOT
        )
        self.err, self._lines = "", queue.SimpleQueue[str]()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.err += line
            self._lines.put(line)

    def wait_for(self, pattern: str, timeout: float = 60) -> re.Match[str]:
        """Wait for a line of stderr."""
        until = time.monotonic() + timeout
        while True:
            with contextlib.suppress(queue.Empty):
                if found := re.search(pattern, self._lines.get(timeout=max(0.01, until - time.monotonic()))):
                    return found
            assert time.monotonic() < until, f"no line {pattern!r} in {self.err!r}"

    def url(self) -> str:
        """Wait until it is loaded."""
        return self.wait_for(r"serving .* on (http://\S+)/v1")[1].replace("0.0.0.0", "127.0.0.1")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 60) -> int:
        """The exit status."""
        status = self.process.wait(timeout)
        time.sleep(0.1)  # the rest of stderr
        return status
