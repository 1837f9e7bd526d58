"""Sides of benchmarks/compare.py for tests/test_compare.py: this runner plays a peer that fails in a chosen call."""

import os
import resource
import signal
from pathlib import Path

from sides import Ours, Side


class Faulty(Ours):
    """Fails in call number `call` of `method`, counted from 1. Each call of any method writes a line to `log`."""

    def __init__(self, name: str, folder: Path, log: Path, method: str, call: int, fault: str):
        super().__init__(name, folder, "float32", 4)
        self.log, self.method, self.call, self.fault = log, method, call, fault

    def first(self, prompt: list[int], n: int) -> list[int]:
        self._count("first")
        return super().first(prompt, n)

    def time_decode(self, prompt: list[int], steps: int) -> float:
        self._count("time_decode")
        return super().time_decode(prompt, steps)

    def time_prefill(self, prompt: list[int]) -> float:
        self._count("time_prefill")
        return super().time_prefill(prompt)

    def _count(self, method: str) -> None:
        with self.log.open("a") as log:
            log.write(f"{self.name} {method}\n")
        self.call -= method == self.method
        if method == self.method and self.call == 0:
            fail(self.fault)


def fail(fault: str) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core file
    if fault == "SIGILL":
        os.kill(os.getpid(), signal.SIGILL)
    if fault == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "exit":
        os._exit(3)
    if fault == "MemoryError":
        raise MemoryError
    if fault == "ImportError":
        raise ImportError("No module named 'fake'")
    raise RuntimeError(f"{fault}\nwith a second line")


def fails_to_start(fault: str) -> Side:
    fail(fault)
    raise AssertionError("it did not fail")
