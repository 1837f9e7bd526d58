"""A staged transfer loads the bits that copies from the mapped files do. Here its device is the CPU."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.checkpoint import folder as folder_module
from llama.checkpoint.errors import CheckpointError
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.layout import Tensors, rank_slice, shard_axis, tensor_shapes
from llama.checkpoint.transfer import MappedFile, StagedTransfer, Transfer, split

CPU = torch.device("cpu")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def staged(block_bytes: int = 1000, threads: int = 3) -> StagedTransfer:
    return StagedTransfer(CPU, threads, block_bytes)


def load(folder: Path, transfer: Transfer, rank: int, ranks: int, dtype: torch.dtype) -> Tensors:
    """All tensors of a rank, as `load_weights` loads them, but each in its own memory."""
    checkpoint = Checkpoint(folder)
    args, loaded = checkpoint.params, {}
    with transfer:
        for key, shape in tensor_shapes(args).items():
            axis, local = shard_axis(key, checkpoint.embedding_axis), list(shape)
            start, stop = (0, 0) if axis is None else rank_slice(key, shape[axis], args, rank, ranks)
            if axis is not None:
                local[axis] = stop - start
            loaded[key] = torch.full(local, torch.nan, dtype=dtype)  # missing numbers would stay NaN
            for source, target in checkpoint.pieces(key, start, stop, loaded[key]):
                transfer.copy(source, target)
        transfer.wait()
    return loaded


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


def convert(folder: Path, out: Path, dtype: torch.dtype, old: bool = False) -> Path:
    """Write the checkpoint again with tensors of another dtype, or in the format before torch 1.6."""
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    for path in out.glob("*.pth"):
        tensors = {key: tensor.to(dtype) for key, tensor in torch.load(path).items()}
        torch.save(tensors, path, _use_new_zipfile_serialization=not old)
    return out


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of bytes of each block that is read from a file, not from its mapping."""
    counts: list[int] = []
    read = MappedFile.read

    def counting(file: MappedFile, tensor: torch.Tensor, out: memoryview) -> None:
        counts.append(len(out))
        read(file, tensor, out)

    monkeypatch.setattr(MappedFile, "read", counting)
    return counts


@pytest.mark.parametrize(("name", "shards"), [("mha", 1), ("mha", 4), ("gqa", 2), ("llama31", 1), ("llama31", 2)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_loads_the_same_bits(
    name: str, shards: int, ranks: int, checkpoint: Callable[..., Path], reads: list[int]
) -> None:
    folder = checkpoint(name, shards)
    for rank in range(ranks):
        expected = load(folder, Transfer(), rank, ranks, F32)
        assert not reads
        assert_equal(load(folder, staged(), rank, ranks, F32), expected)
        # Slices of rows are read from the file, and whole matrices where ranks need whole files' columns.
        total = sum(tensor.nbytes for tensor in expected.values())
        assert max(reads) <= 1000
        assert sum(reads) == total if shards % ranks == 0 else total / 4 < sum(reads) < total
        reads.clear()


@pytest.mark.parametrize(
    ("stored", "dtype"), [(BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32), (BF16, F16), (F64, F32)]
)
def test_dtypes(stored: torch.dtype, dtype: torch.dtype, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = convert(checkpoint("gqa", 2), tmp_path, stored)
    for ranks in (1, 4):
        assert_equal(load(folder, staged(), ranks - 1, ranks, dtype), load(folder, Transfer(), ranks - 1, ranks, dtype))


@pytest.mark.parametrize("block_bytes", [48, 104, 256, 1000, 2**14, 2**23])
def test_any_size_of_blocks(block_bytes: int, checkpoint: Callable[..., Path], reads: list[int]) -> None:
    """A row of the matrices has 256 bytes or more; the largest tensor has 131 kB."""
    folder = checkpoint("mha", 1)
    assert_equal(load(folder, staged(block_bytes), 0, 1, F32), load(folder, Transfer(), 0, 1, F32))
    assert max(reads) <= block_bytes


def test_old_files_are_copied_from_memory(checkpoint: Callable[..., Path], tmp_path: Path, reads: list[int]) -> None:
    folder = convert(checkpoint("mha", 2), tmp_path, F32, old=True)
    assert_equal(load(folder, staged(), 1, 2, F32), load(folder, Transfer(), 1, 2, F32))
    assert not reads


@pytest.mark.parametrize("view", [lambda t: t.t(), lambda t: t[:, 3:9], lambda t: t[::2, ::3], lambda t: t[:, 5]])
def test_tensors_that_are_not_contiguous(view: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    torch.save({"x": torch.randn(40, 30).bfloat16()}, tmp_path / "x.pth")
    source = view(torch.load(tmp_path / "x.pth", mmap=True)["x"])
    target = torch.empty(source.shape)
    with staged(24) as transfer:
        transfer.copy(source, target)
        transfer.wait()
    assert torch.equal(target, source.float())


def test_split_divides_into_pairs_without_gaps() -> None:
    for shape in ((7,), (5, 3), (4, 3, 5), ()):
        whole = torch.arange(torch.Size(shape).numel(), dtype=F64).view(shape)
        for limit in (8, 16, 40, 1000):
            parts = list(split(whole, whole.clone(), limit))
            assert all(a.nbytes <= limit and torch.equal(a, b) for a, b in parts)
            assert torch.equal(torch.cat([a.flatten() for a, _ in parts]), whole.flatten())


# Through Llama.build ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantize": "int8"}])
@pytest.mark.parametrize("inference", [False, True])
def test_build_loads_the_same_model(
    options: dict[str, Any],
    inference: bool,
    build: Callable[..., Llama],
    reads: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when the caller is in inference mode, which threads are not."""

    def state() -> list[torch.Tensor]:
        with torch.inference_mode(inference):
            return [parameter.detach() for parameter in build("gqa", 2, max_seq_len=32, **options).model.parameters()]

    expected = state()
    transfer = staged()
    monkeypatch.setattr(folder_module, "open_transfer", lambda device: transfer)
    found = state()
    assert reads
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.tolist() == b.tolist()


# Errors -------------------------------------------------------------------------------------------


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("load")]


def fail(*_: object) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_file_that_was_cut_off_since_it_was_opened(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    opened = Checkpoint(convert(checkpoint("mha", 1), tmp_path, F32))
    source = max(opened[0].values(), key=torch.Tensor.data_ptr)  # the last one in the file
    os.truncate(opened.paths[0], opened.paths[0].stat().st_size // 2)  # to read its mapping would now be a SIGBUS
    error = pytest.raises(CheckpointError, match=r"consolidated\.00\.pth is cut off or damaged: fetch it again")
    with error, staged() as transfer:
        transfer.copy(source, torch.empty(source.shape))
        transfer.wait()
    assert not alive()


def test_a_file_that_cannot_be_read(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth cannot be read \(Input/output error\): fix that"):
        load(checkpoint("mha", 1), staged(), 0, 1, F32)
    assert not alive()


def test_an_interrupt_ends_the_threads(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: StagedTransfer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StagedTransfer, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(checkpoint("mha", 1), staged(), 0, 1, F32)
    assert not alive()


def test_short_reads_are_continued(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected, preadv = load(checkpoint("mha", 1), Transfer(), 0, 1, F32), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, position: preadv(fd, [buffers[0][:37]], position))
    assert_equal(load(checkpoint("mha", 1), staged(), 0, 1, F32), expected)


def test_a_file_that_was_replaced_is_not_read(
    checkpoint: Callable[..., Path], tmp_path: Path, reads: list[int]
) -> None:
    folder = convert(checkpoint("mha", 1), tmp_path, F32)
    opened = Checkpoint(folder)
    source, path = opened[0]["output.weight"], opened.paths[0]
    (tmp_path / "other").write_bytes(bytes(path.stat().st_size))
    for replace in (lambda: (tmp_path / "other").replace(path), path.unlink):
        replace()
        target = torch.empty(source.shape)
        with staged() as transfer:
            transfer.copy(source, target)
            transfer.wait()
        assert torch.equal(target, source) and not reads


# A device that fetches late -----------------------------------------------------------------------


class LateDevice:
    """Makes copies to its tensors as late as a stream may: when an event after them is waited for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.done = 0

    def run(self, count: int) -> None:
        with self.lock:
            for target, block in self.copies[self.done : count]:
                torch.Tensor.copy_(target, block)
            self.done = max(self.done, count)


DEVICE = LateDevice()


class LateTensor(torch.Tensor):
    def copy_(self, block: torch.Tensor, non_blocking: bool = False) -> "LateTensor":
        assert non_blocking
        with DEVICE.lock:
            DEVICE.copies.append((self, block))
        return self


class LateEvent:
    count = 0

    def record(self) -> None:
        self.count = len(DEVICE.copies)

    def synchronize(self) -> None:
        DEVICE.run(self.count)


def test_a_buffer_is_not_reused_before_the_device_has_fetched_it() -> None:
    source = torch.randn(1000, 10)
    target = torch.full(source.shape, torch.nan).as_subclass(LateTensor)
    transfer = staged(400)
    for _ in range(6):  # two buffers for each of three threads
        buffer = transfer._free.get()
        buffer.fetched = LateEvent()  # type: ignore[assignment]
        transfer._free.put(buffer)
    with transfer:
        transfer.copy(source, target)
        transfer.wait()
        assert len(DEVICE.copies) == 100 and 0 < DEVICE.done < 100  # the last ones are still on their way
        DEVICE.run(100)
    assert torch.equal(target.as_subclass(torch.Tensor), source)
