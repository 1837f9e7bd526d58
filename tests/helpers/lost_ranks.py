"""lost_ranks.py CKPT_DIR SCENARIO...: starts pairs of ranks, all at once, and loses one rank of each pair.

Prints a line of JSON for each pair. A scenario is PHASE:RANK:HOW. PHASE may also be a number of seconds after both
ranks began to load. Ranks are forks of this process, so that packages are imported only once.
"""

import gc
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
from llama.parallel import groups

FOREVER = 3600


def synchronize(phase: str) -> None:
    """Wait until both ranks are in this phase: a rank that is still in the previous one would report another cause."""
    other = 1 - int(os.environ["RANK"])
    Path(os.environ["LOST_AT"]).with_name(f"{phase}-{os.environ['RANK']}").touch()
    while not Path(os.environ["LOST_AT"]).with_name(f"{phase}-{other}").exists():
        time.sleep(0.01)


def lose(how: str) -> None:
    """Write the time, then kill, stop, hang or fail this rank."""
    Path(os.environ["LOST_AT"]).write_text(str(time.time()))
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "hang":
        time.sleep(FOREVER)
    raise ValueError("this rank fails")


def rank(folder: str, phase: str, how: str | None) -> None:
    """Build, then wait for rank 0 (phase "wait"), or generate forever. `how` is None on the rank that survives."""
    load, hidden, calls = loading.load_weights, Executor.hidden, 0

    def slow_load(*args: object) -> None:
        synchronize("load")
        if how and phase == "load":
            lose(how)
        time.sleep(1)
        load(*args)  # type: ignore[arg-type]

    def counting(self: Executor, *args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            synchronize("prefill")
        if how and phase == {1: "prefill", 20: "decode"}.get(calls):
            lose(how)
        time.sleep(0.01)  # up to 40 ranks share the cores
        return hidden(self, *args, **named)

    loading.load_weights, Executor.hidden = slow_load, counting  # type: ignore[assignment, method-assign]
    llama = Llama.build(folder, max_seq_len=512)
    if phase == "wait":
        if how:
            lose(how)
        if groups.is_main_rank():
            time.sleep(FOREVER)  # as while a user types the next message
        groups.broadcast_object()
    while True:
        llama.generate([[1, 450, 319]], 400, temperature=1.0)


def start(folder: str, scenario: str) -> tuple[list[int], int, str, str]:
    """Fork both ranks. Return their pids, their port, the file with the time of the loss, and their output's folder."""
    phase, lost, how = scenario.split(":")
    out = tempfile.mkdtemp()
    port = free_port()
    pids = []
    for number in range(2):
        if pid := os.fork():
            pids.append(pid)
            continue
        os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["LOST_AT"] = f"{out}/lost_at"
        with open(f"{out}/{number}", "w") as file:
            os.dup2(file.fileno(), 2)
        with one_line_errors():
            rank(folder, phase, how if number == int(lost) else None)
    return pids, port, f"{out}/lost_at", out


def main() -> None:
    folder, *scenarios = sys.argv[1:]
    gc.freeze()  # otherwise each rank spends most of its CPU time at exit on collecting objects that imports created
    started = [start(folder, scenario) for scenario in scenarios]
    begun = time.time()
    deadline = begun + 130  # 40 ranks may share two cores with other tests; each kill moves it
    loading_since: dict[str, float] = {}  # output folder -> when both ranks had begun to load
    ended: dict[int, tuple[int, float]] = {}  # pid -> exit code and time
    everyone = {pid for pids, *_ in started for pid in pids}
    while set(ended) != everyone and time.time() < deadline:
        for scenario, (pids, _, lost_at, out) in zip(scenarios, started, strict=True):
            if out not in loading_since and all(Path(out, f"load-{number}").exists() for number in range(2)):
                loading_since[out] = time.time()
            phase, lost, how = scenario.split(":")
            victim, other = pids[int(lost)], pids[1 - int(lost)]
            if (
                phase[0].isdigit()
                and not Path(lost_at).exists()
                and time.time() - loading_since.get(out, FOREVER + begun) > float(phase)
            ):
                Path(lost_at).write_text(str(time.time()))
                os.kill(victim, signal.SIGKILL)
                deadline = time.time() + 130
            if how in ("stop", "hang") and other in ended and victim not in ended:
                os.kill(victim, signal.SIGKILL)  # as torchrun does
        while (found := os.waitpid(-1, os.WNOHANG) if set(ended) != everyone else (0, 0))[0]:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1]), time.time()
        time.sleep(0.02)
    for scenario, (pids, port, lost_at, out) in zip(scenarios, started, strict=True):
        other = pids[1 - int(scenario.split(":")[1])]
        for pid in set(pids) - set(ended):
            os.kill(pid, signal.SIGKILL)
        status, when = ended.get(other, (None, 0.0))
        with socket.socket() as probe:
            port_free = probe.connect_ex(("127.0.0.1", port)) != 0
        lines = Path(out, str(pids.index(other))).read_text().splitlines()
        seconds = when - float(Path(lost_at).read_text()) if Path(lost_at).exists() else None
        result = {"scenario": scenario, "status": status, "seconds": seconds, "port_free": port_free, "lines": lines}
        print(json.dumps(result))


main()
