"""Processes of tests/gpu.py: a command on one or several ranks, and the cases that need more than its result.

    python tests/gpu_ranks.py FOLDER DEVICE    (a rank of `kill` and `stop`: generates until it is ended)

Each rank has its own GPU if there are enough. Otherwise all ranks use GPU 0. NCCL refuses two ranks of one host on one
GPU, so each rank then claims to be a host of its own, and NCCL connects them over the loopback interface.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch

from gpu_cases import MARK, PYTHONPATH, Answer, Asked, first_error
from helpers.ranks import free_port
from llama import Llama, Tokenizer
from llama.cli.command import one_line_errors

# LLAMA_TIMEOUT of all ranks. The default on CUDA, 600 s, is longer than all cases together.
RANK_TIMEOUT = 120
LOST_TIMEOUT = 30  # the same for `kill` and `stop`, as in tests/parallel/test_heartbeat.py
DECODING = "decoding"


class Ranks:
    """A command on several ranks. As a context manager, it ends the processes that are left.

    stdin: of rank 0; the others have none. env: added to the environment.
    """

    running: ClassVar[set["Ranks"]] = set()

    def __init__(self, command: list[str], ranks: int, device: str, stdin: str = "", **env: str):
        self.folder = tempfile.TemporaryDirectory()
        self.started = time.time()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.path(0, "in").write_text(stdin)
        port = free_port()
        for rank in range(ranks):
            with (
                open(self.path(0, "in") if rank == 0 else os.devnull, "rb") as given,
                self.path(rank, "out").open("wb") as out,
                self.path(rank, "err").open("wb") as err,
            ):
                full = environment(rank, ranks, port, device) | {"GPU_TEST_STARTED": str(self.started)} | env
                # A process group of its own, because some cases start processes, too.
                self.processes.append(
                    subprocess.Popen(command, stdin=given, stdout=out, stderr=err, env=full, start_new_session=True)
                )
        Ranks.running.add(self)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        Ranks.running.discard(self)
        self.kill()
        for process in self.processes:
            process.wait()
        self.folder.cleanup()

    def kill(self) -> None:
        """Kill the processes, and those that they have started."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def path(self, rank: int, stream: str) -> Path:
        return Path(self.folder.name, f"{rank}.{stream}")

    def text(self, rank: int, stream: str) -> str:
        """What a rank has written to "out" or "err" so far."""
        return self.path(rank, stream).read_text(errors="replace")

    def answer(self, rank: int) -> Answer | None:
        """The result that a rank has printed."""
        lines = [line for line in self.text(rank, "out").splitlines() if line.startswith(MARK)]
        return json.loads(lines[-1].removeprefix(MARK)) if lines else None

    def wait(self, seconds: float, ranks: Iterable[int] | None = None) -> dict[int, int]:
        """Rank -> exit status, of all ranks or of these. Raises TimeoutError if one of them still runs."""
        until, statuses = time.monotonic() + seconds, dict[int, int]()
        for rank in range(len(self.processes)) if ranks is None else ranks:
            try:
                statuses[rank] = self.processes[rank].wait(max(0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"rank {rank} still runs after {seconds:.0f} s{self._failed()}") from None
        return statuses

    def _failed(self) -> str:
        """Which other rank has failed, as the reason of a rank that hangs."""
        for rank, process in enumerate(self.processes):
            if (status := process.poll()) is not None and status != 0:
                return f"; rank {rank} ended with status {status}: {first_error(self.text(rank, 'err'))}"
        return ""

    def wait_for(self, pattern: str, seconds: float, rank: int = 0, stream: str = "err") -> re.Match[str]:
        """Wait until a rank has written this. Raises TimeoutError, or ChildProcessError if it has ended."""
        until = time.monotonic() + seconds
        while True:
            status = self.processes[rank].poll()
            if found := re.search(pattern, self.text(rank, stream)):
                return found
            if status is not None:
                reason = first_error(self.text(rank, "err"))
                raise ChildProcessError(f"rank {rank} ended with status {status}: {reason}")
            if time.monotonic() > until:
                raise TimeoutError(f"rank {rank} has not printed {pattern!r} in {seconds:.0f} s{self._failed()}")
            time.sleep(0.02)


def environment(rank: int, ranks: int, port: int, device: str) -> dict[str, str]:
    """The environment variables of a rank. A single rank has none of torchrun's."""
    env = os.environ | {"PYTHONPATH": PYTHONPATH}
    env.setdefault("LLAMA_TIMEOUT", str(RANK_TIMEOUT))
    if ranks == 1:
        return env
    env |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if device.startswith("cuda") and torch.cuda.device_count() < ranks:
        posing = {"NCCL_HOSTID": f"host-{rank}", "NCCL_SOCKET_IFNAME": "lo"}
        return env | posing | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return env | {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}


# A lost rank --------------------------------------------------------------------------------------


def decode_forever(folder: str, device: str) -> None:
    """Generate until this process is ended. Each answer prints DECODING at its 20th step."""
    llama = Llama.build(folder, max_seq_len=2048, max_batch_size=1, device=device, dtype="float32")
    llama.tokenizer.stop_tokens = set()
    while True:
        for step, _ in enumerate(llama.stream([[1, 450, 319]], max_gen_len=2000, temperature=0)):
            if step == 20:
                print(DECODING, file=sys.__stdout__, flush=True)  # print() is muted on all but the first rank of a host


def lose_rank(number: signal.Signals, asked: Asked, ranks: int, limit: float) -> Answer:
    """The last rank gets a signal while all decode: SIGKILL ends it, SIGSTOP suspends it. Within LOST_TIMEOUT all other
    ranks exit with an error, and each prints exactly one line about it, which names a rank."""
    lost, others, failures = ranks - 1, range(ranks - 1), list[str]()
    command = [sys.executable, __file__, str(asked.folders["mha"]), asked.device]
    with Ranks(command, ranks, asked.device, LLAMA_TIMEOUT=str(LOST_TIMEOUT)) as running:
        for rank in range(ranks):
            running.wait_for(DECODING, max(1, limit - LOST_TIMEOUT), rank, "out")
        running.processes[lost].send_signal(number)
        sent = time.monotonic()
        statuses = running.wait(LOST_TIMEOUT, others)
        seconds = time.monotonic() - sent
        texts = {rank: running.text(rank, "err") for rank in others}
    reports = list[str]()
    for rank, text in texts.items():
        lines = re.findall(r"^error: .*\brank \d.*$", text, re.MULTILINE)
        reports += lines
        if statuses[rank] == 0:
            failures.append(f"rank {rank} ended with status 0")
        if len(lines) != 1 or "Traceback" in text:
            failures.append(f"rank {rank} printed {len(lines)} lines about rank {lost}, expected 1: {text[-300:]!r}")
    silent = {int(found) for line in reports for found in re.findall(r"not heard from rank (\d)", line)}
    if silent - {lost}:
        failures.append(f"reports name ranks {sorted(silent)}, expected {lost}: {reports}")
    # Other lines are those of NCCL's and gloo's C++ code.
    others_printed = max(len(text.splitlines()) for text in texts.values())
    return {"seconds until all have ended": seconds, "lines": reports, "stderr lines": others_printed}, failures


# Programs -----------------------------------------------------------------------------------------


def serve(asked: Asked, ranks: int, limit: float) -> Answer:
    """`llama serve`: a greedy answer is Meta's. After SIGTERM, which torchrun sends to all ranks, each has status 0."""
    if find_spec("uvicorn") is None or find_spec("fastapi") is None:
        return {"left out": "serve needs fastapi and uvicorn"}, []
    expected, folder = asked.golden["mha"]["single"], asked.folders["mha"]
    command = [sys.executable, "-m", "llama", "serve", "--ckpt_dir", str(folder), "--port", "0"]
    command += ["--device", asked.device, "--dtype", "float32", "--max_seq_len", "256", "--max_batch_size", "4"]
    with Ranks(command, ranks, asked.device) as running:
        url = running.wait_for(r"serving .* on (http://\S+)/v1", limit / 2)[1]
        body = {"prompt": expected["prompt_tokens"][0], "max_tokens": expected["max_gen_len"], "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=limit / 4) as response:
            text = json.load(response)["choices"][0]["text"]
        for process in running.processes:
            process.send_signal(signal.SIGTERM)
        statuses = running.wait(limit / 4)
        failures = [
            f"rank {rank} ended with status {status} after SIGTERM: {first_error(running.text(rank, 'err'))}"
            for rank, status in statuses.items()
            if status != 0
        ]
    tokenizer = Tokenizer(str(folder / "tokenizer.model"))
    if text.strip() != tokenizer.decode(expected["tokens"][0]).strip():
        failures.append(f"the answer is {text!r}, expected {tokenizer.decode(expected['tokens'][0])!r}")
    return {"characters": len(text)}, failures


def chat(asked: Asked, ranks: int, limit: float) -> Answer:
    """`llama chat`: a line of stdin gets an answer on stdout, and at the end of stdin all ranks exit with status 0."""
    command = [sys.executable, "-m", "llama", "chat", str(asked.folders["mha"]), "--chat_format", "llama2"]
    command += ["--device", asked.device, "--dtype", "float32", "--max_seq_len", "256", "--max_gen_len", "16"]
    with Ranks([*command, "--temperature", "0"], ranks, asked.device, stdin="The licence\n") as running:
        statuses = running.wait(limit)
        answer, text = running.text(0, "out").strip(), running.text(0, "err")
        failures = [
            f"rank {rank} ended with status {status}: {first_error(running.text(rank, 'err'))}"
            for rank, status in statuses.items()
            if status != 0
        ]
    if not answer or "error" in text:
        failures.append(f"the answer is {answer!r}, and stderr ends with {text[-200:]!r}")
    return {"characters": len(answer)}, failures


# Cases that start processes themselves: (asked, ranks, seconds) -> answer.
PROGRAMS: dict[str, Callable[[Asked, int, float], Answer]] = {
    "kill": partial(lose_rank, signal.SIGKILL),
    "stop": partial(lose_rank, signal.SIGSTOP),
    "serve": serve,
    "chat": chat,
}

if __name__ == "__main__":
    with one_line_errors():
        decode_forever(*sys.argv[1:])
