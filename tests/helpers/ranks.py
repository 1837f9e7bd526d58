"""Run a test's function on several ranks, in processes that already have torch and transformers imported."""

import contextlib
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from helpers.paths import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
# What test modules import. Importing transformers' model takes 4 s, and each rank imports its function's module.
CONTEXT.set_forkserver_preload(["llama", "pytest", "hypothesis", "transformers.models.llama.modeling_llama"])


def free_port() -> int:
    """A free port below the ephemeral range, from which gloo takes ports in tests that run at the same time."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """Call function(*args) on every rank, with torchrun's environment variables. Return the results in rank order.

    `function` is pickled, so it must be defined at a module's top level. Raises if a rank raises, dies, or
    takes longer than `timeout` seconds.
    """
    port = free_port()
    ranks = []
    for rank in range(world_size):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_rank, args=(rank, world_size, port, sender, function, args), daemon=True)
        process.start()
        sender.close()
        ranks.append((process, receiver))
    results: list[Any] = []
    try:
        for rank, (_, receiver) in enumerate(ranks):
            if not receiver.poll(timeout):
                raise TimeoutError(f"rank {rank} of {world_size} gave no answer in {timeout} s")
            try:
                ok, result = receiver.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} of {world_size} died") from None
            if not ok:
                raise RuntimeError(f"rank {rank} of {world_size} raised:\n{result}")
            results.append(result)
    finally:
        for process, _ in ranks:
            process.join(timeout=0 if len(results) < world_size else 30)
            process.kill()
    return results


def _rank(
    rank: int, world_size: int, port: int, sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        sender.send((True, function(*args)))
    except Exception:
        sender.send((False, traceback.format_exc()))


def torchrun(world_size: int, *command: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script under torchrun as a user would: without OMP_NUM_THREADS, and with `env` added to the environment."""
    clean = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    program = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", str(world_size)]
    if world_size > 1:
        program += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    return subprocess.run(
        [*program, *command], capture_output=True, text=True, timeout=timeout, env=clean | env, cwd=ROOT
    )
