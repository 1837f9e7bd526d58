"""A rank that is lost ends the others, soon and with a word; two hosts; ranks that do not belong together."""

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

from helpers.faults import data_of, edit_params, edit_shard, flip
from helpers.paths import HELPERS, PYTHONPATH, ROOT
from helpers.ranks import free_port, run_ranks
from llama import Llama, loading
from llama.accelerate.executor import Executor
from llama.cli import chat
from llama.parallel import groups as distributed
from llama.parallel import heartbeat as pulse
from llama.parallel.groups import current_world

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
SILENT = r"rank \d has not heard of rank \d for \d+ s: it was killed or is stopped, or the network is down"
SLOW = r"rank \d has waited \d+(\.\d+)? s for another rank: it hangs or is stopped, or the network is down"
CLOSED = r"rank \d lost a rank on 127\.0\.0\.1: it was killed, or ended with an error"
STORE = r"rank 1 lost the host of rank 0: it was killed, or has ended"
# What the surviving rank says, by the phase in which the other one goes, and how.
LAST_WORDS = {
    ("load", 0, "kill"): STORE,  # which rank 0 holds where no torchrun does
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
    env = os.environ | {"LLAMA_TIMEOUT": str(timeout), "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, str(HELPERS / "lost_ranks.py"), str(folder), *scenarios]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=env)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["scenario"] for one in found] == scenarios
    for one in found:
        assert one["status"] not in (0, None) and 0 < one["seconds"] < timeout and one["free"], one
        assert not any("Traceback" in line for line in one["lines"]), one
        yield one


def test_a_rank_that_is_lost_ends_the_other(checkpoint: Callable[..., Path]) -> None:
    scenarios = [":".join(map(str, scenario)) for scenario in LAST_WORDS]
    for one, words in zip(lose(30, checkpoint("mha", 2), scenarios), LAST_WORDS.values(), strict=True):
        assert re.fullmatch(f"error: {words}.*", one["lines"][-1]), one


def test_20_kills_at_random_moments(checkpoint: Callable[..., Path], measured: Callable[[str, object], None]) -> None:
    rng = random.Random(7)
    scenarios = [f"{rng.uniform(0, 4):.3f}:{rng.randrange(2)}:kill" for _ in range(20)]
    found = list(lose(30, checkpoint("mha", 2), scenarios))
    for one in found:
        assert re.fullmatch(f"error: ({SILENT}|{CLOSED}|{STORE})", one["lines"][-1]), one
    measured("kills at random moments, of which the other rank ended by itself", f"20 of {len(found)}")
    measured("the slowest of them, in seconds", max(one["seconds"] for one in found))


@contextlib.contextmanager
def chatting(folder: Path, port: int) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """torchrun and its two ranks, which wait for their user."""
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


def test_torchrun_names_the_rank_that_was_killed(checkpoint: Callable[..., Path]) -> None:
    with chatting(checkpoint("mha"), free_port()) as (ranks, children):
        os.kill(children[1], signal.SIGKILL)
        started = time.monotonic()
        _, rest = ranks.communicate(timeout=60)
        assert time.monotonic() - started < 20 and ranks.returncode != 0
        *_, cause, end = rest.splitlines()
        assert cause.strip() == f"traceback : Signal 9 (SIGKILL) received by PID {children[1]}" and set(end) == {"="}
        assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_torchrun_itself_is_killed(checkpoint: Callable[..., Path]) -> None:
    with chatting(checkpoint("mha"), free_port()) as (ranks, children):
        ranks.kill()
        until = time.monotonic() + 20
        while any(is_running(child) for child in children):
            assert time.monotonic() < until
            time.sleep(0.1)
        assert ranks.stderr
        lines = {line.strip() for line in ranks.stderr if line.startswith("error: ")}
    assert lines == {
        "error: rank 0 lost torchrun, through which it talks to the others: it was killed",
        "error: rank 1 lost torchrun, which started it: it was killed",
    }


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def stay_behind(folder: Path) -> str:
    llama = Llama.build(folder)
    if current_world().rank == 1:
        llama.close()
        return "left"
    try:
        llama.generate([[5, 6]], 2)
    except RuntimeError as error:
        return str(error)
    return "generated"


def test_a_rank_that_left_in_order_is_named(checkpoint: Callable[..., Path]) -> None:
    first, _ = run_ranks(2, stay_behind, checkpoint("mha"))
    assert first == "rank 0 waits for rank 1, which has ended"


# Ranks that do not belong together ----------------------------------------------------------------


def build_differently(pairs: list[list[dict]]) -> list[str]:
    """What `build` answers to each pair of arguments, of which every rank takes its own."""
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
        file.write(b"\x7a\x00")  # an empty field that no reader knows
    others["files"] = checkpoint("mha", 4)
    sums = r"[0-9a-f]{8}, rank 0 has [0-9a-f]{8}: these are their sums, give all hosts the same files"
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
    (first,), (second,) = run_ranks(2, build_on_hosts_of_their_own, [pair])
    assert first == f"PeerError: rank 1 failed: {second.partition(': ')[2]}"
    assert second.startswith(f"CheckpointError: {path} is damaged in consolidated.01/data/")


def build_on_hosts_of_their_own(pairs: list[list[dict]]) -> list[str]:
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return build_differently(pairs)


def compute_otherwise(folder: Path) -> list[str]:
    kinds = [torch.float32, torch.bfloat16]
    loading.pick_dtype = lambda *_: kinds[current_world().rank]
    return build_differently([[{"ckpt_dir": folder}] * 2])


def test_hosts_that_compute_in_other_types_are_named(checkpoint: Callable[..., Path]) -> None:
    for (answer,) in run_ranks(2, compute_otherwise, checkpoint("mha")):
        assert answer == (
            "ValueError: rank 1 has --dtype bfloat16, rank 0 has float32: name one that all hosts can compute in"
        )


def run_short(folder: Path) -> tuple[str, str]:
    """A chat in which rank 1 alone runs out of memory: what each rank ends with."""
    hidden, calls = Executor.hidden, 0

    def short(self: Executor, *args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5 and current_world().rank == 1:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return hidden(self, *args, **named)

    Executor.hidden = short  # type: ignore[method-assign]
    sys.stdin = io.StringIO("go on\nand on\n")
    try:
        chat.chat(str(folder), chat_format="llama2", device="cpu", max_seq_len=256)
    except Exception as error:
        return type(error).__name__, pulse.lost_rank_message(error) or str(error)
    return "", "went on"


def test_memory_of_one_rank_that_runs_out_ends_a_chat(checkpoint: Callable[..., Path]) -> None:
    (_, first), (kind, second) = run_ranks(2, run_short, checkpoint("mha"))
    assert kind == "InsufficientMemoryError" and second.startswith("out of memory on cpu, 0.00 GiB more were asked for")
    assert re.fullmatch(CLOSED, first)


def load_slowly(folder: Path) -> float:
    """Seconds of build and two calls. Rank 1 reads from a slow disk, and rank 0 is busy between the calls, for longer
    than ranks wait for another in the middle of a step."""
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
    if distributed.is_main_rank():
        time.sleep(4)
    llama.generate([[5, 6]], 2)
    llama.close()
    return time.monotonic() - started


def test_a_slow_rank_is_waited_for(checkpoint: Callable[..., Path]) -> None:
    assert min(run_ranks(2, load_slowly, checkpoint("mha"))) >= 12


def be_stopped(folder: Path) -> list[Any]:
    """Both ranks are stopped for longer than a lost one is waited for, and go on: as a laptop or a container does."""
    os.environ["LLAMA_TIMEOUT"] = "6"
    llama = Llama.build(folder)
    pids = " ".join(map(str, distributed.all_gather_object(os.getpid())))
    if distributed.is_main_rank():
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -STOP {pids}; sleep 10; kill -CONT {pids}"])
        time.sleep(2)
        until = time.monotonic() + 3
        while time.monotonic() < until:
            time.sleep(0.1)
    told = distributed.broadcast_object("well" if distributed.is_main_rank() else None)
    ids = llama.generate([[5, 6]], 3, temperature=0)[0]
    llama.close()
    return [told, ids]


def test_ranks_that_were_stopped_together_go_on(checkpoint: Callable[..., Path]) -> None:
    first, second = run_ranks(2, be_stopped, checkpoint("mha"))
    assert first == second and first[0] == "well"


def test_silence_is_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """This rank may have been stopped itself: then the others are heard as soon as it goes on."""
    monkeypatch.setenv("LLAMA_TIMEOUT", "10")
    stores = pulse.Stores.of(dist.HashStore())
    first, second = (pulse.Heartbeat(stores, 1, rank, 2) for rank in range(2))
    heard = iter(["nobody is heard", None])
    # For those who wait in `all_gather`: the thread of the pulse, which would end this process, has another limit.
    monkeypatch.setattr(first, "_silence", lambda limit: next(heard, None) if limit == first.patience else None)
    with ThreadPoolExecutor() as pool:
        ours = pool.submit(first.all_gather, "a")
        time.sleep(3 * first.patience / 10)
        assert second.all_gather("b") == ours.result(timeout=30) == ["a", "b"]
    assert next(heard, "looked twice") == "looked twice"
    heard = itertools.repeat("nobody is heard")
    with pytest.raises(pulse.LostRankError, match="nobody is heard"):
        first.all_gather("c")
    first.stop()
    second.stop()


def exchange_often(folder: Path) -> list[Any]:
    llama = Llama.build(folder)
    try:
        distributed.all_gather_object(lambda: 0)
        refused = ""
    except Exception as error:
        refused = type(error).__name__
    stores = distributed._stores
    assert stores
    before = stores.common.num_keys()
    same = all(distributed.all_gather_object(n) == [n, n] for n in range(300))
    grown = stores.common.num_keys() - before
    llama.close()
    return [refused != "", same, grown < 10]


def test_what_ranks_exchange(checkpoint: Callable[..., Path]) -> None:
    """A value that cannot be sent is an error, not a rank that waits; what was read does not stay in the store."""
    assert run_ranks(2, exchange_often, checkpoint("mha")) == [[True, True, True]] * 2


def meet_alone(folder: Path) -> str:
    if current_world().rank == 1:
        return "stayed away"
    os.environ["LLAMA_TIMEOUT"] = "1"
    try:
        Llama.build(folder)
    except RuntimeError as error:
        return str(error).partition(" (")[0]
    return "built"


def test_ranks_that_never_come(checkpoint: Callable[..., Path]) -> None:
    first, _ = run_ranks(2, meet_alone, checkpoint("mha"))
    assert re.fullmatch(
        r"rank 0 found no 2 ranks at 127\.0\.0\.1:\d+ in 5 s: start all of them, or give them more time with "
        "LLAMA_TIMEOUT", first
    )  # fmt: skip


def start_alone(folder: Path, port: int) -> subprocess.Popen[str]:
    world = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = ["-m", "llama", "complete", "--ckpt_dir", str(folder), "a"]
    return subprocess.Popen(
        [sys.executable, *words], env=os.environ | world, cwd=ROOT, text=True, stdout=subprocess.PIPE,
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
    assert re.match(rf"error: rank 0 cannot meet the others at 127\.0\.0\.1:{port}: .*in use", errors.splitlines()[-1])


def test_ctrl_c_while_the_others_are_awaited(checkpoint: Callable[..., Path]) -> None:
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


def test_only_a_gpus_ranks_have_longer() -> None:
    assert [pulse.timeout(kind) for kind in ("cpu", "mps", "cuda")] == [60, 60, 600]


@pytest.mark.parametrize("value", ["soon", "-1", "0", "1e3", " 5"])
def test_a_timeout_that_is_no_number(value: str, checkpoint: Callable[..., Path]) -> None:
    for (answer,) in run_ranks(2, build_in_time, checkpoint("mha"), value):
        assert answer == f"ValueError: LLAMA_TIMEOUT is {value!r}, expected whole seconds, such as 120"


def build_in_time(folder: Path, value: str) -> list[str]:
    os.environ["LLAMA_TIMEOUT"] = value
    return build_differently([[{"ckpt_dir": folder}] * 2])


# Two hosts ----------------------------------------------------------------------------------------


class Hosts:
    """Two network namespaces on one wire: 10.77.0.1 and .2."""

    def __init__(self, name: str):
        self.names, self.devices = [f"{name}a", f"{name}b"], [f"{name}x", f"{name}y"]

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

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
        """torchrun on one of the hosts, with the flags that the README gives for real ones."""
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


def test_two_hosts_answer_as_one_rank(hosts: Hosts, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Two ranks on each, with a copy of the checkpoint on each."""
    folders = [str(shutil.copytree(checkpoint("mha", 2), tmp_path / host)) for host in "ab"]
    words = ["inspect", "The licence", "--generate", "40", "--json", "--ckpt_dir"]
    alone = subprocess.run(
        [sys.executable, "-m", "llama", *words, folders[0]], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert alone.returncode == 0, alone.stderr
    running = [hosts.start(number, 2, "-m", "llama", *words, folders[number]) for number in range(2)]
    results = [host.communicate(timeout=100) for host in running]
    assert [host.returncode for host in running] == [0, 0], results
    ids, expected = ([token["id"] for token in json.loads(out)["tokens"]] for out in (results[0][0], alone.stdout))
    assert ids == expected and len(ids) > 20 and results[1][0] == ""
    assert "2 shards -> 4 ranks over gloo" in results[0][1]


def test_a_network_that_is_cut_ends_both_hosts(
    hosts: Hosts, checkpoint: Callable[..., Path], tmp_path: Path, measured: Callable[[str, object], None]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a b c"}\n' * 10_000)
    words = ["-m", "llama", "complete", "--ckpt_dir", str(checkpoint("mha", 2)), "--file",
             str(tmp_path / "prompts.jsonl"), "--max_gen_len", "400", "--out"]  # fmt: skip
    running = [hosts.start(n, 1, *words, str(tmp_path / f"out{n}.jsonl"), LLAMA_TIMEOUT="24") for n in range(2)]
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
    measured("seconds from the cut of the network to the end on both hosts", time.monotonic() - started)
