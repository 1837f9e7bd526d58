"""Ranks: build and close with and without torchrun, process groups, devices, exchanges, output, exit."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize, layers

from helpers.paths import PYTHONPATH, ROOT
from helpers.ranks import run_ranks, torchrun
from helpers.rss import anonymous_bytes
from llama import Llama
from llama.parallel import groups
from llama.parallel.device import pick_device, pick_dtype, share_cores
from llama.parallel.groups import World, current_world

# Plain Python -------------------------------------------------------------------------------------


def test_plain_python_needs_no_environment(checkpoint: Callable[..., Path]) -> None:
    code = f"""
from llama import Llama
llama = Llama.build({str(checkpoint("mha"))!r})
print(llama.text_completion(["The licence"], temperature=0, max_gen_len=4)[0]["finish_reason"])
"""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "length\n"  # without the three lines that fairscale prints
    assert re.fullmatch(
        r"llama: 0\.2M parameters, 1 shard -> 1 rank, float32 on cpu; 0\.9 MB weights and 6\.3 MB cache a rank; .* s\n",
        done.stderr,
    )


def test_models_are_built_and_closed_in_one_process(build: Callable[..., Llama]) -> None:
    prompt, hook = [[1, 450, 319, 352]], sys.excepthook
    a = build("mha")
    first, _ = a.generate(prompt, 8, temperature=0)
    b = build("gqa", dtype="bfloat16")  # while a is open
    assert torch.get_default_dtype() == torch.float32
    b.generate(prompt, 8, temperature=0)
    assert a.generate(prompt, 8, temperature=0)[0] == first
    a.close()
    b.generate(prompt, 8, temperature=0)
    b.close()
    b.close()
    assert not dist.is_initialized() and not initialize.model_parallel_is_initialized()
    assert sys.excepthook is hook  # init_process_group replaces it
    with pytest.raises(ValueError, match="this model is closed: build it again"):
        a.generate(prompt, 8)
    again = build("mha")
    assert again.generate(prompt, 8, temperature=0)[0] == first


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path, build: Callable[..., Llama]) -> None:
    with pytest.raises(ValueError, match="holds no consolidated"):
        Llama.build(tmp_path)
    assert not dist.is_initialized() and not initialize.model_parallel_is_initialized()
    build("mha")


def memory_of_a_model(folder: Path) -> tuple[int, int, int]:
    """(bytes of the caches, growth of memory while the model is open, growth after close).

    compile=False, because glibc keeps some MB of the native step's buffers after they are freed.
    """
    Llama.build(folder, max_seq_len=64, compile=False).close()
    before = anonymous_bytes()
    llama = Llama.build(folder, max_seq_len=8192, max_batch_size=64, compile=False)
    caches = [buffer for cache in llama.model.caches for buffer in (cache.k, cache.v)]
    size = sum(cache.fill_(1).nbytes for cache in caches)
    del caches
    growth = anonymous_bytes() - before
    llama.close()
    return size, growth, anonymous_bytes() - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status, which Linux has")
def test_close_frees_the_memory(checkpoint: Callable[..., Path]) -> None:
    ((size, growth, left),) = run_ranks(1, memory_of_a_model, checkpoint("mha"))
    assert size > 700e6 and growth > 0.99 * size and left < 0.02 * size


def test_another_model_parallel_size_is_an_error(build: Callable[..., Llama]) -> None:
    with pytest.raises(ValueError, match="model_parallel_size is 2, but 1 ranks are running: leave it out"):
        build("mha", model_parallel_size=2)


# fairscale ----------------------------------------------------------------------------------------


def fairscale_calls(folder: Path) -> dict[str, int]:
    """fairscale's layer class -> calls in one forward pass."""
    counts: dict[str, int] = {}
    for kind in (
        layers.ColumnParallelLinear,
        layers.RowParallelLinear,
        layers.ParallelEmbedding,
        layers.VocabParallelEmbedding,
    ):

        def counting(self: Any, x: torch.Tensor, name: str = kind.__name__, forward: Any = kind.forward) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return forward(self, x)

        kind.forward = counting
    llama = Llama.build(folder, max_seq_len=16, plain=True)
    llama.model.forward(torch.tensor([[1, 2, 3]]), 0)
    llama.close()
    return counts


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("name", "embedding", "n_layers"), [("mha", "ParallelEmbedding", 3), ("llama31", "VocabParallelEmbedding", 2)]
)
def test_every_plain_projection_runs_through_fairscale(
    name: str, embedding: str, n_layers: int, world_size: int, checkpoint: Callable[..., Path]
) -> None:
    for counts in run_ranks(world_size, fairscale_calls, checkpoint(name, 2)):
        # wq, wk, wv, w1, w3 of each layer and the output layer; wo and w2 of each layer
        assert counts == {"ColumnParallelLinear": 5 * n_layers + 1, "RowParallelLinear": 2 * n_layers, embedding: 1}


# Device, dtype, threads ---------------------------------------------------------------------------


def test_device_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu", World()) == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'gpu': expected auto, cpu, cuda, cuda:N or mps"):
        pick_device("gpu", World())
    with pytest.raises(ValueError, match="'mps' supports one rank, not 2"):
        pick_device("mps", World(0, 2, 0, 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto", World()).type == "mps"
    assert pick_device("auto", World(1, 2, 1, 2)).type == "cpu"
    with pytest.raises(ValueError, match="sees no GPU; use --device cpu"):
        pick_device("cuda", World())
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'mps' is not available to this torch: use --device cpu"):
        pick_device("mps", World())


@pytest.mark.parametrize(
    ("name", "stored", "native", "expected"),
    [
        ("auto", torch.float32, False, torch.float32),
        ("auto", torch.bfloat16, False, torch.float32),
        ("auto", torch.bfloat16, True, torch.bfloat16),
        ("auto", torch.float16, False, torch.float32),
        ("auto", torch.float16, True, torch.float16),
        ("float16", torch.float32, False, torch.float16),
        ("bfloat16", torch.bfloat16, False, torch.bfloat16),
        ("float32", torch.bfloat16, True, torch.float32),
    ],
)
def test_dtype_on_the_cpu(
    name: str, stored: torch.dtype, native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for probe in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, probe, lambda: native)
    assert pick_dtype(name, stored, torch.device("cpu")) == expected


def test_an_unknown_dtype_is_an_error() -> None:
    with pytest.raises(ValueError, match="dtype 'fp8': expected auto, float32, bfloat16, float16"):
        pick_dtype("fp8", torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(("variable", "expected"), [(None, 2), ("1", 2), ("3", None)])
def test_ranks_share_the_cores_unless_the_user_chose(
    variable: str | None, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    share_cores(World(0, 4, 0, 4))
    assert chosen == ([expected] if expected else [])
    share_cores(World())
    assert len(chosen) <= 1


def threads(folder: Path) -> int:
    os.sched_getaffinity = lambda _: set(range(8))  # a larger machine
    Llama.build(folder, max_seq_len=8).close()
    return torch.get_num_threads()


def test_build_shares_the_cores(checkpoint: Callable[..., Path]) -> None:
    assert run_ranks(2, threads, checkpoint("mha")) == [4, 4]


def users_own_group(folder: Path) -> list[list[int]]:
    """Two models, one after the other, each use a process group that the program creates and destroys itself."""
    answers = []
    for _ in range(2):
        # On the old port, a fast rank may still find the store of the first group and wait forever.
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        dist.init_process_group("gloo")
        llama = Llama.build(folder)
        answers += llama.generate([[1, 450]], 4, temperature=0)[0]
        llama.close()
        assert dist.is_initialized()
        dist.destroy_process_group()
    return answers


def test_a_users_own_process_group_is_left_to_the_user(checkpoint: Callable[..., Path]) -> None:
    for first, second in run_ranks(2, users_own_group, checkpoint("mha")):
        assert first == second


# Under torchrun -----------------------------------------------------------------------------------


def build_twice(folder: Path, other: Path) -> Any:
    answers = []
    for path in (folder, other, folder):
        llama = Llama.build(path)
        answers.append(llama.generate([[1, 450, 319]], 6, temperature=0)[0])
        llama.close()
    return answers, current_world().rank


def test_models_are_built_and_closed_on_two_ranks(checkpoint: Callable[..., Path]) -> None:
    results = run_ranks(2, build_twice, checkpoint("mha"), checkpoint("gqa", 2))
    assert [rank for _, rank in results] == [0, 1]
    for (first, second, third), _ in results:
        assert first == third != second


def broadcast_from_rank_0(folder: Path) -> list[Any]:
    llama = Llama.build(folder)
    assert groups._stores is not None
    for store in groups._stores:
        store.set_timeout(timedelta(seconds=0.2))
    if groups.is_main_rank():
        time.sleep(1)  # longer than the store's timeout
    values = ["é" * 5_000_000, None, {"line": "half \udc80"}] if groups.is_main_rank() else [0] * 3
    received = [groups.broadcast_object(value) for value in values]
    llama.close()
    return [len(received[0]), *received[1:]]


def test_broadcast_of_large_and_late_objects(checkpoint: Callable[..., Path]) -> None:
    expected = [5_000_000, None, {"line": "half \udc80"}]
    assert run_ranks(2, broadcast_from_rank_0, checkpoint("mha")) == [expected, expected]


def test_an_example_under_torchrun_prints_once(checkpoint: Callable[..., Path]) -> None:
    done = torchrun(2, "example_text_completion.py", "--ckpt_dir", str(checkpoint("mha", 4)), "--max_gen_len", "4",
                    "--max_seq_len", "256")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The capital of France is Paris.") == 1
    assert done.stderr.count("llama: ") == 1 and "4 shards -> 2 ranks over gloo" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_users_mistake_is_one_line_on_one_rank(checkpoint: Callable[..., Path]) -> None:
    done = torchrun(3, "example_chat_completion.py", "--ckpt_dir", str(checkpoint("mha")))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: 3 ranks cannot share this model (8 heads, 8 KV heads, feed-forward width 192, vocabulary 512): "
        "start 1, 2, 4, 8"
    ]


SLOW_TO_PRINT = """
import os, sys, time
from llama import Llama
from llama.cli.command import one_line_errors

with one_line_errors():
    try:
        Llama.build(sys.argv[1])
    finally:
        time.sleep(1 if os.environ["RANK"] == "0" else 0)
"""


@pytest.mark.slow
def test_the_rank_that_prints_is_not_ended_before_it_has_printed(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SLOW_TO_PRINT)
    done = torchrun(3, str(script), str(checkpoint("mha")), PYTHONPATH=str(ROOT))
    assert done.returncode != 0 and "\nerror: 3 ranks cannot share this model" in "\n" + done.stderr


FAILING = """
import os, sys, time
from llama import Llama
llama = Llama.build(sys.argv[1])
if os.environ["RANK"] == "1":
    raise RuntimeError("rank one fails")
while True:  # the other rank continues and waits for the lost one
    llama.generate([[1, 2, 3]], 50)
"""


def test_a_rank_that_fails_ends_the_run_with_its_error(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    done = torchrun(2, str(script), str(checkpoint("mha")), timeout=30, PYTHONPATH=str(ROOT))
    assert done.returncode != 0
    assert "RuntimeError: rank one fails" in done.stderr


def fails_on_one_rank(folder: Path, other: Path) -> str:
    try:
        Llama.build(other if current_world().rank == 1 else folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "built"


def test_a_build_that_fails_on_one_rank_fails_on_all(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    first, second = run_ranks(2, fails_on_one_rank, checkpoint("mha"), tmp_path)
    assert first.startswith("PeerError: rank 1 failed:") and "holds no consolidated" in first
    assert second.startswith("CheckpointError:")


ENDING = """
import atexit, gc, os, sys
import torch
from helpers.ranks import free_port

# An abort is rare, so this looks for its cause. Registered before the package's own handler, it runs after that.
atexit.register(lambda: torch.distributed.is_initialized() and os._exit(3))
from llama import Llama

attempt, is_rank = 0, False
gc.freeze()  # at its exit each rank would collect what the imports made, for most of its processor time
while attempt < 20 and not is_rank:  # ranks are forks, so packages are imported once, and they exit as programs do
    attempt += 1
    ranks = []
    port = free_port()
    for rank in range(2):
        if not is_rank:
            pid = os.fork()
            if pid == 0:
                is_rank = True
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
                os.environ["MASTER_PORT"] = str(port)
            ranks.append(pid)
    if not is_rank:
        print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks], flush=True)
if is_rank:
    llama = Llama.build(sys.argv[1])
    llama.generate([[1, 2, 3]], 4)
    if attempt % 2:  # the others leave it to the atexit handler
        llama.close()
"""


@pytest.mark.slow
def test_ranks_exit_cleanly_20_times_of_20(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A gloo rank that exits without destroying its process group sometimes aborts."""
    script = tmp_path / "ending.py"
    script.write_text(ENDING)
    command = [sys.executable, str(script), str(checkpoint("mha"))]
    env = os.environ | {"PYTHONPATH": PYTHONPATH}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.stdout.splitlines() == ["[0, 0]"] * 20, done.stderr
    assert done.returncode == 0
