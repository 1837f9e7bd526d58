"""The CUDA path without a GPU: `Llama.build` and `generate` run unchanged on fake tensors, which have a shape, a dtype
and a device but no numbers. Tensors of two devices in one operator are an error there, as on a GPU.

Only these are replaced: what torch reports about GPUs, the NCCL group, the copy of values from the device, and the
capture of CUDA graphs.
"""

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from helpers.captures import replace_captures
from llama import Llama, loading
from llama.accelerate import executor, fused
from llama.accelerate.cuda_graph import CudaGraphDecoder
from llama.checkpoint import folder as checkpoint_folder
from llama.checkpoint.transfer import Transfer
from llama.engine import engine, sampling, scheduler, worker
from llama.evaluate import scoring
from llama.parallel import groups
from llama.parallel.device import pick_device
from llama.parallel.groups import World, connect_ranks, current_world, init_process_groups, shutdown
from llama.parallel.heartbeat import Stores

pytestmark = [
    pytest.mark.filterwarnings("ignore:Set timeout is now only supported"),  # from the fake process group
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, and the walk pretends one"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="noop_cuda_guard.cpp needs g++"),
]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def pretend_gpus(patch: pytest.MonkeyPatch, count: int, capability: tuple[int, int] = (8, 0)) -> list[int]:
    """Make torch report these GPUs. Returns a list that later holds the GPUs chosen with set_device."""
    chosen: list[int] = []
    patch.setattr(torch.cuda, "is_available", lambda: count > 0)
    patch.setattr(torch.cuda, "device_count", lambda: count)
    patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    patch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize(
    ("count", "name", "world", "message"),
    [
        (1, "auto", World(5, 8, 1, 4), "local rank 1 needs GPU 1, but torch sees 1 here"),
        (4, "cuda:4", World(), "needs GPU 4, but torch sees 4 here"),
        (4, "cuda:0", World(5, 8, 1, 4), "would put all ranks on one GPU"),
        (0, "cuda", World(), "this torch sees no GPU"),
    ],
)
def test_missing_gpus(count: int, name: str, world: World, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, count)
    with pytest.raises(ValueError, match=message):
        pick_device(name, world)


def test_gloo_on_gpus_is_announced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    connect_ranks(World())
    init_process_groups(World(), torch.device("cuda", 0))
    backend = dist.get_backend()
    shutdown()
    assert backend == "gloo"
    assert capsys.readouterr().err == "warning: this torch has no NCCL: ranks use gloo, which is slower\n"


@pytest.fixture(scope="module")
def device_guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    source, library = Path(__file__).with_name("noop_cuda_guard.cpp"), tmp_path_factory.mktemp("guard") / "guard.so"
    include, lib = (Path(torch.__file__).parent / name for name in ("include", "lib"))
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{include}", f"-L{lib}", "-lc10", f"-Wl,-rpath,{lib}"]
    subprocess.run(["g++", str(source), *flags, "-o", str(library)], check=True)
    ctypes.CDLL(str(library))


class Alone:
    """Replaces `Heartbeat`. The other ranks do not exist, so each of them seems to send what this rank sends."""

    def __init__(self, stores: Stores, generation: int, rank: int, size: int):
        self.size = size

    def all_gather(self, value: Any) -> list[Any]:
        return [value] * self.size

    def stop(self) -> None:
        pass


@contextlib.contextmanager
def walk(patch: pytest.MonkeyPatch, rank: int, size: int, capability: tuple[int, int]) -> Iterator[list[int]]:
    """Inside, the process is a rank under torchrun and NCCL, on hosts of up to two GPUs, and new tensors are fake."""
    init, hosts_gpus = dist.init_process_group, min(size, 2)

    def init_fake(backend: str, **arguments: Any) -> None:
        assert backend == "nccl"
        init("fake", **(arguments | {"store": FakeStore()}))  # torch's own: collectives move nothing

    assert not dist.is_initialized(), "another test left a model open"
    world = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % hosts_gpus, "LOCAL_WORLD_SIZE": hosts_gpus}
    for name, value in world.items():
        patch.setenv(name, str(value))
    patch.setenv(
        "OMP_NUM_THREADS", "2"
    )  # as if the user had set it, so that `build` does not change the number of threads
    patch.setattr(groups, "_stores", Stores.of(dist.HashStore()))  # in place of torchrun's port
    patch.setattr(groups, "Heartbeat", Alone)
    patch.setattr(dist, "is_nccl_available", lambda: True)
    patch.setattr(dist, "init_process_group", init_fake)
    patch.setattr(dist, "get_backend", lambda *group: "nccl")
    patch.setattr(loading, "check_before_loading", lambda *arguments: ([], {}))  # it would search the files for NaN
    # Collectives move nothing here, so every rank plans and samples as rank 0 does.
    patch.setattr(scheduler, "is_main_rank", lambda: True)
    patch.setattr(scheduler, "share", lambda plan: plan)
    for module in (worker, scoring):
        patch.setattr(module, "read_back", lambda values: np.ones(values.shape).tolist())
    patch.setattr(checkpoint_folder, "open_transfer", lambda device: Transfer())  # staging needs real memory
    patch.setattr(engine, "draw_seed", lambda: 1)  # it would read a number from a tensor on the CPU
    here = torch.device("cuda", rank % hosts_gpus)  # torch.device cannot be called in the mode
    patch.setattr(fused, "causal_mask", lambda n, m, on: torch.ones(n, m, device=here).tril(m - n) > 0)
    replace_captures(patch)
    patch.setattr(torch.cuda, "device", contextlib.nullcontext)
    patch.setattr(FakeTensorMode, "avoid_device_init", True)  # otherwise it initializes the pretended GPU
    chosen = pretend_gpus(patch, hosts_gpus, capability)
    connect_ranks(current_world())
    init_process_groups(current_world(), torch.device("cuda"))  # outside the mode, where fairscale can read its ranks
    try:
        with FakeTensorMode():
            yield chosen
    finally:
        while dist.is_initialized():  # a test that failed did not close its model
            shutdown()


def spy(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """Return a list to which each call appends its arguments and, last, its result."""
    calls: list[tuple[Any, ...]] = []
    original = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        calls.append((*arguments, original(*arguments, **named)))
        return calls[-1][-1]

    patch.setattr(owner, name, call)
    return calls


@pytest.mark.usefixtures("device_guard")
@pytest.mark.parametrize(
    ("name", "rank", "size", "stored", "capability", "dtype"),
    [
        ("mha", 0, 1, F32, (7, 5), F32),
        ("llama31", 0, 2, BF16, (8, 0), BF16),
        ("gqa", 3, 4, BF16, (7, 5), F16),  # two ranks for each KV head
    ],
)
def test_build_and_generate(
    name: str,
    rank: int,
    size: int,
    stored: torch.dtype,
    capability: tuple[int, int],
    dtype: torch.dtype,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(checkpoint(name, 2), tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("*.pth"):
        torch.save({key: tensor.to(stored) for key, tensor in torch.load(path).items()}, path)
    device = torch.device("cuda", rank % 2)
    with walk(monkeypatch, rank, size, capability) as chosen:
        hidden, logits, scores = (spy(monkeypatch, executor.Executor, n) for n in ("hidden", "logits", "measured"))
        read, drawn = (spy(monkeypatch, worker, n) for n in ("read_back", "broadcast"))
        sampled = spy(monkeypatch, sampling.Sampler, "sample")
        llama = Llama.build(tmp_path, max_seq_len=32)
        model = llama.model
        ragged, _ = llama.generate([[5, 6, 7], [8]], 3, temperature=0, logprobs=True, echo=True)
        uniform, _ = llama.generate([[5, 6], [7, 8]], 3, temperature=0.6, top_p=0.9)
        decoder = llama.executor._decoder
        assert isinstance(decoder, CudaGraphDecoder) and set(decoder.replays) == {(2, 32, True)}
        model.forward(torch.zeros(2, 3, dtype=torch.int64).to(device), 4)  # a later chunk: with a mask
        # Two shared contexts of two lengths, so that the second pass has a mask for each row; and a text alone.
        requests = [(context, [token, 9]) for context in ([5] * 9, [6] * 8) for token in (7, 8)]
        total, *_ = scoring.loglikelihood(llama, [*requests, ([5, 6], [7])])
        llama.close()

    assert chosen == [rank % 2]
    caches = [buffer for cache in model.caches for buffer in (cache.k, cache.v)]
    assert {(t.device, t.dtype) for t in (*model.parameters(), *caches)} == {(device, dtype)}
    floats = [model.freqs_cis.real, *(call[-1] for call in logits + scores), *(call[0] for call in read)]
    assert {(t.device, t.dtype) for t in floats} == {(device, F32)}
    assert {(ids.device, ids.dtype) for *_, ids in drawn} == {(device, torch.int64)}
    # Two generations of a prefill and two decode steps, each row at its own position or all at one; the later chunk;
    # the two passes of scoring.
    starts = [start if isinstance(start, int) else start.device for _, _, start, *_ in hidden]
    assert starts == [0, device, device, 0, 2, 3, 0, device]
    assert (len(scores), len(drawn), len(sampled)) == (2, 6, 6)
    assert total == (2.0, True)
    assert (ragged, uniform) == ([[5, 6, 7, 1, 1, 1], [8, 1, 1, 1]], [[1, 1, 1], [1, 1, 1]])


@pytest.mark.usefixtures("device_guard")
@pytest.mark.parametrize("stray", ["tok_embeddings.weight", "norm.weight"])
def test_a_tensor_left_on_the_cpu_is_caught(
    stray: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("gqa")
    with walk(monkeypatch, 1, 2, (8, 0)):
        model = Llama.build(folder, max_seq_len=32).model
        tokens = torch.zeros(2, 3, dtype=torch.int64).to("cuda:1")
        model.forward(tokens, 0)
        owner, _, leaf = stray.rpartition(".")
        module = model.get_submodule(owner)
        tensor = getattr(module, leaf).cpu()
        delattr(module, leaf)  # a parameter's name takes parameters only
        setattr(module, leaf, tensor)
        with pytest.raises(RuntimeError, match="same device"):
            model.forward(tokens, 0)
