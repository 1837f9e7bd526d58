"""`llama serve` in a thread of this process, on a free port."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

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
