"""lost_ranks.py CKPT_DIR SCENARIO...: pairs of ranks, all at once, of which one is lost; a line of JSON for each pair.

A scenario is PHASE:RANK:HOW, in which PHASE may be a number of seconds after both ranks began to load. One import
serves all: a fork is a rank, and ends as a program of its own does.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from helpers.ranks import free_port
from llama import Llama, loading
from llama.accelerate.executor import Executor
from llama.cli.command import one_line_errors
from llama.parallel import groups as distributed

EVER = 3600


def meet(phase: str) -> None:
    """Both ranks are in this phase: the other one could still wait in the one before, and say so."""
    other = 1 - int(os.environ["RANK"])
    Path(os.environ["GONE"]).with_name(f"{phase}-{os.environ['RANK']}").touch()
    while not Path(os.environ["GONE"]).with_name(f"{phase}-{other}").exists():
        time.sleep(0.01)


def go(how: str) -> None:
    Path(os.environ["GONE"]).write_text(str(time.time()))
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "hang":
        time.sleep(EVER)
    raise ValueError("this rank has had enough")


def rank(folder: str, phase: str, how: str | None) -> None:
    """Build, then wait for rank 0 in the phase "wait", or generate for ever. `how` is set on the rank that goes."""
    load, hidden, calls = loading.load_weights, Executor.hidden, 0

    def slow_load(*args: object) -> None:
        meet("load")
        if how and phase == "load":
            go(how)
        time.sleep(1)
        load(*args)  # type: ignore[arg-type]

    def passing(self: Executor, *args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            meet("prefill")
        if how and phase == {1: "prefill", 20: "decode"}.get(calls):
            go(how)
        time.sleep(0.01)  # forty ranks share the cores
        return hidden(self, *args, **named)

    loading.load_weights, Executor.hidden = slow_load, passing  # type: ignore[assignment, method-assign]
    llama = Llama.build(folder, max_seq_len=512)
    if phase == "wait":
        if how:
            go(how)
        if distributed.is_main_rank():
            time.sleep(EVER)  # a user who thinks about the next question
        distributed.broadcast_object()
    while True:
        llama.generate([[1, 450, 319]], 400, temperature=1.0)


def start(folder: str, scenario: str) -> tuple[list[int], int, str, str]:
    """Pids of both ranks, their port, the file that has the time of the loss, and the folder of what they print."""
    phase, lost, how = scenario.split(":")
    out = tempfile.mkdtemp()
    port = free_port()
    pids = []
    for number in range(2):
        if pid := os.fork():
            pids.append(pid)
            continue
        os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["GONE"] = f"{out}/gone"
        with open(f"{out}/{number}", "w") as file:
            os.dup2(file.fileno(), 2)
        with one_line_errors():
            rank(folder, phase, how if number == int(lost) else None)
    return pids, port, f"{out}/gone", out


def main() -> None:
    folder, *scenarios = sys.argv[1:]
    started = [start(folder, scenario) for scenario in scenarios]
    begun = time.time()
    together: dict[str, float] = {}  # when both ranks began to load
    ended: dict[int, tuple[int, float]] = {}  # pid -> exit code and time
    everyone = {pid for pids, *_ in started for pid in pids}
    while set(ended) != everyone and time.time() - begun < 130:  # forty ranks may share two cores with other tests
        for scenario, (pids, _, gone, out) in zip(scenarios, started, strict=True):
            if out not in together and all(Path(out, f"load-{number}").exists() for number in range(2)):
                together[out] = time.time()
            phase, lost, how = scenario.split(":")
            victim, other = pids[int(lost)], pids[1 - int(lost)]
            if (
                phase[0].isdigit()
                and not Path(gone).exists()
                and time.time() - together.get(out, EVER + begun) > float(phase)
            ):
                Path(gone).write_text(str(time.time()))
                os.kill(victim, signal.SIGKILL)
            if how in ("stop", "hang") and other in ended and victim not in ended:
                os.kill(victim, signal.SIGKILL)  # as torchrun does
        while (found := os.waitpid(-1, os.WNOHANG) if set(ended) != everyone else (0, 0))[0]:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1]), time.time()
        time.sleep(0.02)
    for scenario, (pids, port, gone, out) in zip(scenarios, started, strict=True):
        other = pids[1 - int(scenario.split(":")[1])]
        for pid in set(pids) - set(ended):
            os.kill(pid, signal.SIGKILL)
        status, when = ended.get(other, (None, 0.0))
        with socket.socket() as probe:
            free = probe.connect_ex(("127.0.0.1", port)) != 0
        lines = Path(out, str(pids.index(other))).read_text().splitlines()
        seconds = when - float(Path(gone).read_text()) if Path(gone).exists() else None
        print(json.dumps({"scenario": scenario, "status": status, "seconds": seconds, "free": free, "lines": lines}))


main()
