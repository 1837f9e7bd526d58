"""When one rank is lost, the others exit soon and name the cause; two hosts; ranks whose arguments or files differ."""

import contextlib
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers.commands import call
from helpers.faults import data_of, edit_params, edit_shard, flip
from helpers.paths import HELPERS, PYTHONPATH, ROOT
from helpers.ranks import free_port, run_ranks
from llama import Llama, loading
from llama.accelerate.executor import Executor
from llama.cli import chat
from llama.parallel import groups, heartbeat
from llama.parallel.groups import current_world

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
SILENT = r"rank \d has not heard from rank \d for \d+ s: it was killed or is suspended, or the network is down"
SLOW = r"rank \d has waited \d+(\.\d+)? s for another rank: it hangs or is suspended, or the network is down"
CLOSED = r"rank \d lost a rank on 127\.0\.0\.1: it was killed, or ended with an error"
STORE = r"rank 1 lost the host of rank 0: it was killed, or has exited"
# (phase, rank that is lost, how) -> what the other rank reports.
REPORTS = {
    ("load", 0, "kill"): STORE,  # rank 0 hosts the store where there is no torchrun
    ("load", 1, "kill"): SILENT,
    ("prefill", 0, "kill"): CLOSED,
    ("prefill", 1, "kill"): CLOSED,
    ("decode", 0, "kill"): CLOSED,
    ("decode", 1, "kill"): CLOSED,
    ("wait", 0, "kill"): STORE,
    ("wait", 1, "kill"): SILENT,
    ("load", 0, "stop"): SILENT,
    ("load", 1, "stop"): SILENT,
    ("decode", 0, "stop"): SLOW,
    ("decode", 1, "stop"): SLOW,
    ("wait", 0, "stop"): SILENT,
    ("wait", 1, "stop"): SILENT,
    ("decode", 1, "hang"): SLOW,
    ("decode", 0, "raise"): CLOSED,
}


def lose(timeout: int, folder: Path, scenarios: list[str]) -> Iterator[dict]:
    """Run helpers/lost_ranks.py. Check that every surviving rank exited in time. Yields the result of each scenario."""
    env = os.environ | {"LLAMA_TIMEOUT": str(timeout), "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, str(HELPERS / "lost_ranks.py"), str(folder), *scenarios]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=env)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["scenario"] for result in results] == scenarios
    for result in results:
        assert result["status"] not in (0, None) and 0 < result["seconds"] < timeout and result["port_free"], result
        assert not any("Traceback" in line for line in result["lines"]), result
        yield result


def test_the_other_rank_exits_and_names_the_cause(checkpoint: Callable[..., Path]) -> None:
    scenarios = [":".join(map(str, scenario)) for scenario in REPORTS]
    for result, report in zip(lose(30, checkpoint("mha", 2), scenarios), REPORTS.values(), strict=True):
        assert re.fullmatch(f"error: {report}.*", result["lines"][-1]), result


@pytest.mark.slow
def test_20_kills_at_random_moments(checkpoint: Callable[..., Path], measured: Callable[[str, object], None]) -> None:
    rng = random.Random(7)
    scenarios = [f"{rng.uniform(0, 4):.3f}:{rng.randrange(2)}:kill" for _ in range(20)]
    results = list(lose(30, checkpoint("mha", 2), scenarios))
    for result in results:
        assert re.fullmatch(f"error: ({SILENT}|{CLOSED}|{STORE})", result["lines"][-1]), result
    measured("kills at random moments after which the other rank exited by itself", f"20 of {len(results)}")
    measured("the slowest of them, in seconds", max(result["seconds"] for result in results))


@contextlib.contextmanager
def chatting(folder: Path, port: int) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Start torchrun with two ranks of `llama chat` that wait for input. Yields torchrun and the pids of the ranks."""
    command = [TORCHRUN, "--nproc_per_node", "2", "--master_port", str(port), "-m", "llama", "chat"]
    ranks = subprocess.Popen(
        [*command, "--ckpt_dir", str(folder), "--chat_format", "llama2"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"LLAMA_TIMEOUT": "20"},
    )  # fmt: skip
    assert ranks.stderr and ranks.stdin
    assert any("/help" in line for line in ranks.stderr)
    children = subprocess.run(["pgrep", "-P", str(ranks.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    yield ranks, [int(child) for child in children]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    ranks.stdin.close()


@pytest.mark.slow
def test_torchrun_names_the_rank_that_was_killed(checkpoint: Callable[..., Path]) -> None:
    with chatting(checkpoint("mha"), free_port()) as (ranks, children):
        os.kill(children[1], signal.SIGKILL)
        started = time.monotonic()
        _, rest = ranks.communicate(timeout=60)
        assert time.monotonic() - started < 20 and ranks.returncode != 0
        *_, cause, end = rest.splitlines()
        assert cause.strip() == f"traceback : Signal 9 (SIGKILL) received by PID {children[1]}" and set(end) == {"="}
        assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_ranks_exit_when_torchrun_is_killed(checkpoint: Callable[..., Path]) -> None:
    with chatting(checkpoint("mha"), free_port()) as (ranks, children):
        ranks.kill()
        until = time.monotonic() + 20
        while any(is_running(child) for child in children):
            assert time.monotonic() < until
            time.sleep(0.1)
        assert ranks.stderr
        lines = {line.strip() for line in ranks.stderr if line.startswith("error: ")}
    assert lines == {
        "error: rank 0 lost torchrun, which connects the ranks: it was killed",
        "error: rank 1 lost torchrun, which started it: it was killed",
    }


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def generate_after_rank_1_closed(folder: Path) -> str:
    llama = Llama.build(folder)
    if current_world().rank == 1:
        llama.close()
        return "closed"
    try:
        llama.generate([[5, 6]], 2)
    except RuntimeError as error:
        return str(error)
    return "generated"


def test_a_rank_that_closed_its_model_is_named(checkpoint: Callable[..., Path]) -> None:
    first, _ = run_ranks(2, generate_after_rank_1_closed, checkpoint("mha"))
    assert first == "rank 0 waits for rank 1, which has exited"


# Ranks with other arguments or files ----------------------------------------------------------------


def build_differently(pairs: list[list[dict]]) -> list[str]:
    """Build with each pair of arguments, one for each rank. Returns "built" or this rank's error for each pair."""
    answers = []
    for arguments in pairs:
        try:
            Llama.build(**{"max_seq_len": 64} | arguments[current_world().rank]).close()
            answers.append("built")
        except Exception as error:
            assert "\n" not in str(error)
            answers.append(f"{type(error).__name__}: {error}")
    return answers


def test_other_arguments_are_named(checkpoint: Callable[..., Path]) -> None:
    values: dict[str, tuple] = {
        "max_seq_len": (64, 128),
        "max_batch_size": (8, 4),
        "seed": (1, 2),
        "dtype": ("auto", "bfloat16"),
        "quantize": (None, "int8"),
        "compile": ("auto", False),
        "plain": (False, True),
        "chat_format": (None, "chatml"),
    }
    pairs = [[{"ckpt_dir": checkpoint("mha"), name: value} for value in pair] for name, pair in values.items()]
    expected = [
        f"ValueError: rank 1 has --{name} {second}, rank 0 has {first}: start all ranks with the same arguments"
        for name, (first, second) in values.items()
    ]
    same = [{"ckpt_dir": checkpoint("mha")}] * 2
    for answers in run_ranks(2, build_differently, [*pairs, same]):
        assert answers == [*expected, "built"]


def test_other_checkpoints_are_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    mine = checkpoint("mha", 2)
    others = {name: Path(shutil.copytree(mine, tmp_path / name)) for name in ("weights", "params", "tokenizer")}
    edit_shard(others["weights"] / "consolidated.01.pth", lambda t: t["output.weight"].neg_())
    edit_params(others["params"], norm_eps=1e-4)
    with (others["tokenizer"] / "tokenizer.model").open("ab") as file:
        file.write(b"\x7a\x00")  # an empty protobuf field, which parsers ignore
    others["files"] = checkpoint("mha", 4)
    sums = r"[0-9a-f]{8}, rank 0 has [0-9a-f]{8}: these are checksums: give all hosts the same files"
    expected = [
        rf"ValueError: rank 1 has consolidated\.01\.pth {sums}",
        r"ValueError: rank 1 has norm_eps 0\.0001, rank 0 has 1e-05: give all hosts the same params\.json",
        rf"ValueError: rank 1 has tokenizer\.model {sums}",
        rf"ValueError: rank 1 has consolidated\.00\.pth {sums}",
    ]
    for answers in run_ranks(2, build_differently, [[{"ckpt_dir": mine}, {"ckpt_dir": o}] for o in others.values()]):
        for answer, pattern in zip(answers, expected, strict=True):
            assert re.fullmatch(pattern, answer), answer


def test_a_file_that_is_damaged_on_one_host(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    mine, other = checkpoint("mha", 2), Path(shutil.copytree(checkpoint("mha", 2), tmp_path / "other"))
    path = other / "consolidated.01.pth"
    flip(path, random.Random(3), *data_of(path)[5])
    pair = [{"ckpt_dir": mine}, {"ckpt_dir": other}]
    (first,), (second,) = run_ranks(2, build_on_two_hosts, [pair])
    assert first == f"PeerError: rank 1 failed: {second.partition(': ')[2]}"
    assert second.startswith(f"CheckpointError: {path} is damaged in consolidated.01/data/")


def build_on_two_hosts(pairs: list[list[dict]]) -> list[str]:
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return build_differently(pairs)


def build_in_other_dtypes(folder: Path) -> list[str]:
    kinds = [torch.float32, torch.bfloat16]
    loading.pick_dtype = lambda *_: kinds[current_world().rank]
    return build_differently([[{"ckpt_dir": folder}] * 2])


def test_hosts_that_compute_in_other_dtypes_are_named(checkpoint: Callable[..., Path]) -> None:
    for (answer,) in run_ranks(2, build_in_other_dtypes, checkpoint("mha")):
        assert answer == (
            "ValueError: rank 1 has --dtype bfloat16, rank 0 has float32: name one that all hosts support"
        )


def run_out_of_memory(folder: Path) -> tuple[str, str]:
    """Run a chat in which only rank 1 runs out of memory. Returns the type and message of this rank's error."""
    hidden, calls = Executor.hidden, 0

    def failing(self: Executor, *args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5 and current_world().rank == 1:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return hidden(self, *args, **named)

    Executor.hidden = failing  # type: ignore[method-assign]
    sys.stdin = io.StringIO("go on\nand on\n")
    try:
        call(chat.chat, folder, chat_format="llama2", device="cpu", max_seq_len=256)
    except Exception as error:
        return type(error).__name__, heartbeat.lost_rank_message(error) or str(error)
    return "", "no error"


def test_a_chat_ends_if_one_rank_runs_out_of_memory(checkpoint: Callable[..., Path]) -> None:
    (_, first), (kind, second) = run_ranks(2, run_out_of_memory, checkpoint("mha"))
    assert kind == "InsufficientMemoryError" and second.startswith("out of memory on cpu, 0.00 GiB more were requested")
    assert re.fullmatch(CLOSED, first)


def load_slowly(folder: Path) -> float:
    """Seconds for `build` and two calls. Rank 1 loads slowly and rank 0 is busy between the calls, each for longer than
    a collective's timeout.
    """
    os.environ["LLAMA_TIMEOUT"] = "6"
    if current_world().rank == 1:
        load = loading.load_weights

        def slowly(*args: Any) -> None:
            time.sleep(8)
            load(*args)

        loading.load_weights = slowly  # type: ignore[assignment]
    started = time.monotonic()
    llama = Llama.build(folder)
    llama.generate([[5, 6]], 2)
    if groups.is_main_rank():
        time.sleep(4)
    llama.generate([[5, 6]], 2)
    llama.close()
    return time.monotonic() - started


def test_a_slow_rank_is_waited_for(checkpoint: Callable[..., Path]) -> None:
    assert min(run_ranks(2, load_slowly, checkpoint("mha"))) >= 12


def be_suspended(folder: Path) -> list[Any]:
    """Both ranks are suspended for longer than LLAMA_TIMEOUT and continue, as on a laptop or in a container."""
    os.environ["LLAMA_TIMEOUT"] = "6"
    llama = Llama.build(folder)
    pids = " ".join(map(str, groups.all_gather_object(os.getpid())))
    if groups.is_main_rank():
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -STOP {pids}; sleep 10; kill -CONT {pids}"])
        time.sleep(2)
        until = time.monotonic() + 3
        while time.monotonic() < until:
            time.sleep(0.1)
    received = groups.broadcast_object("well" if groups.is_main_rank() else None)
    ids = llama.generate([[5, 6]], 3, temperature=0)[0]
    llama.close()
    return [received, ids]


def test_ranks_that_were_suspended_together_continue(checkpoint: Callable[..., Path]) -> None:
    first, second = run_ranks(2, be_suspended, checkpoint("mha"))
    assert first == second and first[0] == "well"


def test_a_silent_rank_is_lost_at_the_second_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first check, this rank itself may have been suspended. Then it hears from the others once it continues."""
    monkeypatch.setenv("LLAMA_TIMEOUT", "10")
    stores = heartbeat.Stores.of(dist.HashStore())
    first, second = (heartbeat.Heartbeat(stores, 1, rank, 2) for rank in range(2))
    checks = iter(["rank 1 is silent", None])
    # `all_gather` passes this limit. The heartbeat's thread, which would end this process, passes a larger one.
    monkeypatch.setattr(
        first, "_find_silent_rank", lambda limit: next(checks, None) if limit == first.timeout else None
    )
    with ThreadPoolExecutor() as pool:
        values = pool.submit(first.all_gather, "a")
        time.sleep(3 * first.timeout / 10)
        assert second.all_gather("b") == values.result(timeout=30) == ["a", "b"]
    assert next(checks, "checked twice") == "checked twice"
    checks = itertools.repeat("rank 1 is silent")
    with pytest.raises(heartbeat.LostRankError, match="rank 1 is silent"):
        first.all_gather("c")
    first.stop()
    second.stop()


def exchange_objects(folder: Path) -> list[Any]:
    llama = Llama.build(folder)
    try:
        groups.all_gather_object(lambda: 0)
        refused = ""
    except Exception as error:
        refused = type(error).__name__
    stores = groups._stores
    assert stores
    before = stores.process_group.num_keys()
    same = all(groups.all_gather_object(n) == [n, n] for n in range(300))
    grown = stores.process_group.num_keys() - before
    llama.close()
    return [refused != "", same, grown < 10]


def test_a_process_that_cannot_handle_sigterm_ends() -> None:
    """The main thread of a rank may be waiting for its GPU, so that a handler of the program does not run."""
    code = """
import signal, threading
from llama.parallel import heartbeat
heartbeat.HANDLER_SECONDS = 0.2
signal.signal(signal.SIGTERM, signal.SIG_IGN)
threading.Thread(target=heartbeat._terminate, args=("rank 1 is lost",), daemon=True).start()
threading.Event().wait(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (1, "error: rank 1 is lost\n")


def test_exchanges_of_objects(checkpoint: Callable[..., Path]) -> None:
    """A value that cannot be pickled raises before it is sent; values that were read are deleted from the store."""
    assert run_ranks(2, exchange_objects, checkpoint("mha")) == [[True, True, True]] * 2


def build_alone(folder: Path) -> str:
    if current_world().rank == 1:
        return "absent"
    os.environ["LLAMA_TIMEOUT"] = "1"
    try:
        Llama.build(folder)
    except RuntimeError as error:
        return str(error).partition(" (")[0]
    return "built"


def test_a_rank_that_never_starts(checkpoint: Callable[..., Path]) -> None:
    first, _ = run_ranks(2, build_alone, checkpoint("mha"))
    assert re.fullmatch(
        r"rank 0 waited 5 s for 2 ranks to connect to 127\.0\.0\.1:\d+: start all of them, or give them more time with "
        "LLAMA_TIMEOUT", first
    )  # fmt: skip


def start_alone(folder: Path, port: int) -> subprocess.Popen[str]:
    world = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    args = ["-m", "llama", "complete", "--ckpt_dir", str(folder), "a"]
    return subprocess.Popen(
        [sys.executable, *args], env=os.environ | world, cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_port_that_is_taken(checkpoint: Callable[..., Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start_alone(checkpoint("mha"), port)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.match(
        rf"error: rank 0 cannot connect to the other ranks at 127\.0\.0\.1:{port}: .*in use", errors.splitlines()[-1]
    )


def test_ctrl_c_during_rendezvous(checkpoint: Callable[..., Path]) -> None:
    port = free_port()
    process = start_alone(checkpoint("mha"), port)
    until = time.monotonic() + 60
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < until:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "") and "Traceback" not in errors, errors


def test_ranks_on_gpus_have_a_longer_timeout() -> None:
    assert [heartbeat.exit_timeout(kind) for kind in ("cpu", "mps", "cuda")] == [60, 60, 600]


@pytest.mark.parametrize("value", ["soon", "-1", "0", "1e3", " 5"])
def test_a_timeout_that_is_no_integer(value: str, checkpoint: Callable[..., Path]) -> None:
    for (answer,) in run_ranks(2, build_with_timeout, checkpoint("mha"), value):
        assert answer == f"ValueError: LLAMA_TIMEOUT is {value!r}, expected an integer of seconds, such as 120"


def build_with_timeout(folder: Path, value: str) -> list[str]:
    os.environ["LLAMA_TIMEOUT"] = value
    return build_differently([[{"ckpt_dir": folder}] * 2])


# Two hosts ----------------------------------------------------------------------------------------


class Hosts:
    """Two network namespaces that are connected: 10.77.0.1 and 10.77.0.2."""

    def __init__(self, name: str):
        self.names, self.devices = [f"{name}a", f"{name}b"], [f"{name}x", f"{name}y"]

    def ip(self, *args: str) -> None:
        subprocess.run(["ip", *args], check=True, capture_output=True, text=True)

    def __enter__(self) -> "Hosts":
        for host in self.names:
            self.ip("netns", "add", host)
        self.ip("link", "add", self.devices[0], "type", "veth", "peer", "name", self.devices[1])
        for number, (host, device) in enumerate(zip(self.names, self.devices, strict=True), 1):
            self.ip("link", "set", device, "netns", host)
            self.ip("-n", host, "addr", "add", f"10.77.0.{number}/24", "dev", device)
            self.ip("-n", host, "link", "set", device, "up")
            self.ip("-n", host, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                self.ip("netns", "del", host)

    def cut(self) -> None:
        self.ip("-n", self.names[0], "link", "set", self.devices[0], "down")

    def start(self, number: int, ranks: int, *command: str, **env: str) -> subprocess.Popen[str]:
        """torchrun on one of the hosts, with the flags that docs/how-to/ranks.md names."""
        rendezvous = ["--master_addr", "10.77.0.1", "--master_port", "29500"]
        program = [TORCHRUN, "--nnodes", "2", "--node_rank", str(number), "--nproc_per_node", str(ranks), *rendezvous]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[number], *program, *command],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | {"GLOO_SOCKET_IFNAME": self.devices[number]} | env,
        )  # fmt: skip


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need Linux, root and the command ip")
    made = Hosts(f"ll{os.getpid() % 100_000}")
    try:
        made.__enter__()
    except subprocess.CalledProcessError as error:
        made.__exit__()
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    yield made
    made.__exit__()


@pytest.mark.slow
def test_two_hosts_generate_the_same_as_one_rank(hosts: Hosts, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Two ranks on each, with a copy of the checkpoint on each."""
    folders = [str(shutil.copytree(checkpoint("mha", 2), tmp_path / host)) for host in "ab"]
    args = ["inspect", "The licence", "--generate", "40", "--json", "--ckpt_dir"]
    alone = subprocess.run(
        [sys.executable, "-m", "llama", *args, folders[0]], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert alone.returncode == 0, alone.stderr
    running = [hosts.start(number, 2, "-m", "llama", *args, folders[number]) for number in range(2)]
    results = [host.communicate(timeout=100) for host in running]
    assert [host.returncode for host in running] == [0, 0], results
    ids, expected = ([token["id"] for token in json.loads(out)["tokens"]] for out in (results[0][0], alone.stdout))
    assert ids == expected and len(ids) > 20 and results[1][0] == ""
    assert "2 shards -> 4 ranks over gloo" in results[0][1]


@pytest.mark.slow
def test_both_hosts_exit_when_the_network_is_cut(
    hosts: Hosts, checkpoint: Callable[..., Path], tmp_path: Path, measured: Callable[[str, object], None]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a b c"}\n' * 10_000)
    args = ["-m", "llama", "complete", "--ckpt_dir", str(checkpoint("mha", 2)), "--file",
             str(tmp_path / "prompts.jsonl"), "--max_gen_len", "20", "--out"]  # fmt: skip
    running = [hosts.start(n, 1, *args, str(tmp_path / f"out{n}.jsonl"), LLAMA_TIMEOUT="24") for n in range(2)]
    until = time.monotonic() + 60
    while not (tmp_path / "out0.jsonl").exists() or not (tmp_path / "out0.jsonl").read_text():
        assert time.monotonic() < until and running[0].poll() is None, running[0].communicate()
        time.sleep(0.1)
    hosts.cut()
    started = time.monotonic()
    for host in running:
        _, stderr = host.communicate(timeout=60)
        assert time.monotonic() - started < 24 and host.returncode != 0
        assert re.search(f"traceback : error: {SLOW}", stderr.splitlines()[-2]), stderr
    measured("seconds from the network cut to the exit on both hosts", time.monotonic() - started)
