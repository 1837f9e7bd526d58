"""How much a rank holds in memory and reads from disk, measured in real processes on a 570 MB checkpoint."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import pytest
import torch

import llama
from golden.make_checkpoint import TOKENIZER, layout
from helpers.paths import HELPERS
from helpers.rss import anonymous_bytes
from llama.accelerate.quantize import stored_bytes
from llama.checkpoint.layout import without_layer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/status and smaps, which Linux has")

PARAMS = {"dim": 2048, "n_layers": 6, "n_heads": 16, "n_kv_heads": 8, "multiple_of": 256, "norm_eps": 1e-5}
LAYOUT = layout(PARAMS, 1)  # name -> (logical shape, axis or None), the Llama 2 way
STORED = 2  # bytes of a bfloat16 number
CACHE = 2 * 6 * 1 * 8 * 16 * 128  # elements: keys and values, layers, rows, KV heads, positions, head_dim
# The kernel maps file pages in folios of up to a huge page, so up to this many bytes next to a slice may be mapped.
HUGE_PAGE = 2**21
MB = 1e6


@pytest.fixture(scope="module", params=[1, 4], ids=["1-shard", "4-shards"])
def shards(request: pytest.FixtureRequest) -> int:
    return request.param


def write_shards(folder: Path, shards: int) -> None:
    noise = torch.randn(max(prod(shape) for shape, _ in LAYOUT.values()) + shards).mul_(0.02).bfloat16()
    for index in range(shards):
        part = {}
        for key, (shape, axis) in LAYOUT.items():
            local = [n // shards if dim == axis else n for dim, n in enumerate(shape)]
            start = 0 if axis is None else index  # shards with the same data would be rejected
            part[key] = noise[start : start + prod(local)].clone().view(local)
        torch.save(part, folder / f"consolidated.{index:02d}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS))


@pytest.fixture(scope="module")
def folder(shards: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of 570 MB in bfloat16, divided over `shards` files; deleted after its tests."""
    folder = tmp_path_factory.mktemp("memory")
    write_shards(folder, shards)
    assert sum(path.stat().st_size for path in folder.iterdir()) > 500 * MB
    yield folder
    shutil.rmtree(folder)


def watch(ranks: int, *arguments: str) -> list[tuple[int, str]]:
    """Run memory_rank.py on `ranks` ranks; the peak of RssAnon, sampled every 3 ms, and the output of each."""
    # As in torchrun, the parent hosts the store, so no port has to be guessed.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    package = str(Path(llama.__file__).parents[1])
    processes = []
    for rank in range(ranks):
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
            **{"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        }
        command = [sys.executable, str(HELPERS / "memory_rank.py"), *arguments]
        processes.append(subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    peaks, deadline = [0] * ranks, time.monotonic() + 300
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            peaks = [max(peak, anonymous_bytes(p.pid)) for peak, p in zip(peaks, processes, strict=True)]
            time.sleep(0.003)
    finally:
        for process in processes:
            process.kill()
    answers = [process.communicate() for process in processes]
    for rank, (process, (_, errors)) in enumerate(zip(processes, answers, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {ranks} ended with {process.returncode}:\n{errors}"
    return [(peak, output) for peak, (output, _) in zip(peaks, answers, strict=True)]


@pytest.fixture(scope="module")
def imports() -> Callable[[int], int]:
    """imports(ranks): peak of a rank that imports the packages and joins the process group, but loads nothing."""
    measured: dict[int, int] = {}

    def measure(ranks: int) -> int:
        if ranks not in measured:
            measured[ranks] = max(peak for peak, _ in watch(ranks))
        return measured[ranks]

    return measure


def expected_pages(shards: int, ranks: int, rank: int) -> dict[str, tuple[int, int]]:
    """File name -> (bytes of the pages with the rank's slices, upper bound of the bytes that are mapped).

    Only files that the rank needs. A slice of rows is contiguous, a slice of columns touches every page of its tensor,
    and repeated tensors are read from file 0.
    """
    pages = {}
    for index in range(shards):
        # In units of 1 / (shards * ranks) of the tensor.
        overlap = min((rank + 1) * shards, (index + 1) * ranks) - max(rank * shards, index * ranks)
        if overlap <= 0 and index > 0:
            continue
        used_bytes, limit_bytes = 0, 2**20  # the zip directory, headers and half-used pages are far below 1 MB
        for shape, axis in LAYOUT.values():
            size = prod(shape) * STORED // (1 if axis is None else shards)
            if axis == 0:
                used = size * max(overlap, 0) // ranks
            else:
                used = size if (index == 0 if axis is None else overlap > 0) else 0
            used_bytes += used
            limit_bytes += used + min(size - used, 2 * HUGE_PAGE)
        pages[f"consolidated.{index:02d}.pth"] = used_bytes, limit_bytes
    return pages


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_holds_its_own_weights_and_reads_its_own_slices(
    shards: int,
    ranks: int,
    folder: Path,
    imports: Callable[[int], int],
    measured: Callable[[str, object], None],
) -> None:
    dtype, itemsize = ("bfloat16", STORED) if shards == 1 else ("float32", 4)
    weights = sum(prod(shape) // (1 if axis is None else ranks) for shape, axis in LAYOUT.values()) * itemsize
    cache = CACHE // ranks * itemsize
    limit = 1.15 * weights + cache + imports(ranks)
    for rank, (peak, output) in enumerate(watch(ranks, str(folder), str(TOKENIZER), dtype)):
        touched = json.loads(output)
        figures = (
            f"peak {peak / MB:.1f} MB, limit {limit / MB:.1f}: weights {weights / MB:.1f} ({itemsize} bytes each), "
            f"cache {cache / MB:.1f}, imports {imports(ranks) / MB:.1f}; beyond the imports "
            f"{(peak - imports(ranks) - cache) / weights:.3f} x weights; touched {touched}"
        )
        measured(f"memory of rank {rank} of {ranks}, {shards} shards", figures)
        assert weights < peak <= limit, figures

        pages = expected_pages(shards, ranks, rank)
        assert sorted(touched) == list(pages)
        for name, (used_bytes, limit_bytes) in pages.items():
            # The kernel may evict pages when memory is short. Half of them are enough to show that the file was read.
            assert used_bytes / 2 <= touched[name] <= limit_bytes, f"{name}: {used_bytes} to {limit_bytes}; {figures}"


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1], indirect=True, ids=["1-shard"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_rank_that_quantizes_never_holds_the_whole_model(
    scheme: str, shards: int, folder: Path, imports: Callable[[int], int], measured: Callable[[str, object], None]
) -> None:
    stored = 0
    for key, (shape, _) in LAYOUT.items():
        rows, columns = shape if len(shape) == 2 else (1, *shape)
        stored += stored_bytes(without_layer(key), rows, columns, scheme, STORED)
    layer = sum(prod(shape) for key, (shape, _) in LAYOUT.items() if key.startswith("layers.0.")) * STORED
    ((peak, _),) = watch(1, str(folder), str(TOKENIZER), "bfloat16", scheme)
    beyond = peak - imports(1) - CACHE * STORED
    figures = f"{beyond / MB:.1f} MB: {stored / MB:.1f} stored and {(beyond - stored) / layer:.2f} layers in full"
    measured(f"memory of a rank that loads in {scheme}", figures)
    assert stored < beyond <= stored + 2 * layer, figures
