"""Copy tensors of checkpoint files to the device of the model.

On a CPU this is `copy_` from the mapped file. To a GPU, `copy_` from mapped pages would use one thread, and the driver
would copy the pages to pinned memory of its own first. `StagedTransfer` reads files with several threads into pinned
buffers, and the GPU fetches one block while threads read the next ones.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch

from llama.checkpoint.errors import CheckpointError

BLOCK_BYTES = 2**23  # larger blocks leave the processor's cache before the GPU fetches them
MAX_THREADS = 8  # these read from the page cache about as fast as a PCIe link transfers
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # itemsize -> a dtype that numpy has, too


class Transfer:
    """Copies tensors one after another. A context manager, as `StagedTransfer` holds threads, buffers and files."""

    def __enter__(self) -> "Transfer":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy a CPU tensor into `target`, which may have another dtype. The copy is complete after `wait`."""
        target.copy_(source)

    def wait(self) -> None:
        """Wait for all copies. Raises the error of the first one that failed."""


def open_transfer(device: torch.device) -> Transfer:
    """The fastest transfer to `device`. Its threads are at most this rank's share of the cores."""
    if device.type != "cuda":
        return Transfer()
    try:
        return StagedTransfer(device, min(MAX_THREADS, torch.get_num_threads()), BLOCK_BYTES)
    except RuntimeError:  # some systems, such as containers and WSL, limit pinned memory
        return Transfer()


class StagedTransfer(Transfer):
    """Threads read blocks into a few reused buffers, from which the device fetches them.

    For a GPU, buffers are pinned and copies run on a stream of their own. Other devices are for tests.

    block_bytes: the size of a buffer, a multiple of 8. Each thread has two.
    """

    def __init__(self, device: torch.device, threads: int, block_bytes: int):
        is_cuda = device.type == "cuda"
        self._device, self._block_bytes = device, block_bytes
        self._stream = torch.cuda.Stream(device) if is_cuda else None
        # "cpu" is named because the program may have set another default device.
        memory = torch.empty(2 * threads, block_bytes, dtype=torch.uint8, device="cpu", pin_memory=is_cuda)
        self._free: SimpleQueue[Buffer] = SimpleQueue()
        for row in memory:
            self._free.put(Buffer(row, torch.cuda.Event(blocking=True) if is_cuda else None))
        self._files = MappedFiles()
        self._copies: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(threads, "load", self._start_thread)

    def _start_thread(self) -> None:
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)  # of this thread; also makes the stream's device the current one

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if self._stream is not None:  # kernels that are still running may use memory that the target now has
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        file = self._files.find(source)
        for part, out in split(source, target, self._block_bytes):
            self._copies.append(self._pool.submit(self._copy_block, file, part, out))

    # If the caller is in inference mode, the targets are inference tensors, which can be written only in that mode.
    # A mode is set for one thread.
    @torch.inference_mode()
    def _copy_block(self, file: "MappedFile | None", source: torch.Tensor, target: torch.Tensor) -> None:
        buffer = self._free.get()
        try:
            if buffer.fetched is not None:
                buffer.fetched.synchronize()
            block = buffer.memory[: source.nbytes].view(source.dtype).view(source.shape)
            if file is None:
                # Not copy_, which would start torch's thread pool in each of these threads.
                np.copyto(_as_numpy(block), _as_numpy(source))
            else:
                file.read(source, buffer.memory[: source.nbytes].numpy().data)
            target.copy_(block, non_blocking=True)  # a GPU also converts it to the target's dtype
            if buffer.fetched is not None:
                buffer.fetched.record()
        finally:
            self._free.put(buffer)

    def wait(self) -> None:
        copies, self._copies = self._copies, []
        for copy in copies:
            copy.result()
        if self._stream is not None:  # what the caller computes next reads the targets
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)  # also waits for the blocks that are being read
        self._files.close()
        if self._stream is not None:
            self._stream.synchronize()  # before the buffers are freed
        del self._copies, self._free
        # torch caches freed pinned memory. This gives it back to the system; older versions of torch cannot do that.
        if self._stream is not None and (empty_host_cache := getattr(torch._C, "_host_emptyCache", None)):
            empty_host_cache()


@dataclass
class Buffer:
    """Pinned memory for one block. fetched: recorded when the GPU has copied the last block out; None on a CPU."""

    memory: torch.Tensor
    fetched: torch.cuda.Event | None


def split(source: torch.Tensor, target: torch.Tensor, limit: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Divide two tensors of one shape into pairs of views. The source's views have at most `limit` bytes."""
    if source.nbytes <= limit:
        yield source, target
    elif source[0].nbytes > limit:
        for row, out in zip(source, target, strict=True):
            yield from split(row, out, limit)
    else:
        rows = limit // source[0].nbytes
        yield from zip(source.split(rows), target.split(rows), strict=True)


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(INTEGERS[tensor.itemsize]).numpy()  # the same bits: numpy has no bfloat16


# Where a tensor's bytes are in its file -----------------------------------------------------------


@dataclass
class MappedFile:
    """A file that this process has mapped at the addresses [start, stop), from `offset` of the file on."""

    path: Path
    start: int
    stop: int
    offset: int
    descriptor: int

    def holds(self, tensor: torch.Tensor) -> bool:
        return self.start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= self.stop

    def read(self, tensor: torch.Tensor, out: memoryview) -> None:
        """Read the bytes of a contiguous tensor from the file, not through its mapping. Raises CheckpointError."""
        position = self.offset + tensor.data_ptr() - self.start
        while out:
            try:
                count = os.preadv(self.descriptor, [out], position)
            except OSError as error:
                reason = f"{self.path} cannot be read ({error.strerror})"
                raise CheckpointError(f"{reason}: fix that or fetch it again") from error
            if not count:
                raise CheckpointError(f"{self.path} is cut off or damaged: fetch it again")
            out, position = out[count:], position + count


class MappedFiles:
    """Finds the file that holds the bytes of a tensor of a mapped checkpoint. The tensors must live as long as this
    object, because it remembers addresses.

    It reads the kernel's list of mappings, because torch.load does not say where a tensor's bytes are. Only Linux has
    that list.
    """

    def __init__(self) -> None:
        self._found: list[MappedFile] = []
        self._descriptors = ExitStack()

    def find(self, tensor: torch.Tensor) -> MappedFile | None:
        """The file that holds a tensor's bytes. None if it is not contiguous or not mapped, or there is no list."""
        if not tensor.is_contiguous():
            return None
        if found := next((file for file in self._found if file.holds(tensor)), None):
            return found
        try:
            lines = Path("/proc/self/maps").read_bytes().split(b"\n")
        except OSError:
            return None
        for line in filter(None, lines):
            # start-stop permissions offset device inode path, all numbers but the inode in hexadecimal
            addresses, _, offset, _, inode, *path = os.fsdecode(line).split(maxsplit=5)
            start, stop = (int(address, 16) for address in addresses.split("-"))
            if path and start <= tensor.data_ptr() < stop:
                file = MappedFile(Path(path[0]), start, stop, int(offset, 16), -1)
                return self._open(file, int(inode)) if file.holds(tensor) else None
        return None

    def _open(self, file: MappedFile, inode: int) -> MappedFile | None:
        try:
            file.descriptor = os.open(file.path, os.O_RDONLY)
        except OSError:  # deleted since, or [heap] and the like, which are not files
            return None
        self._descriptors.callback(os.close, file.descriptor)
        if os.fstat(file.descriptor).st_ino != inode:
            return None  # the path is another file by now
        self._found.append(file)
        return file

    def close(self) -> None:
        self._descriptors.close()
