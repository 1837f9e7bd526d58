"""Decode steps on CUDA as CUDA graphs: the kernels of a step are captured once and then launched together.

A graph has fixed shapes. So the number of rows and the context length are rounded up to a few sizes, and a graph is
captured when a combination of them first occurs. Weights and caches are read where the model stores them, so a replay
sees what was written to them in place.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from llama.accelerate.fused import FusedLayer, Positions, rms_norm
from llama.cache import row_tensor
from llama.model import Transformer
from llama.parallel.groups import all_gather_object, release_before_shutdown

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """The input of a decode step.

    h: embeddings of the ids, [rows, 1, dim]. angles: cos and sin of all positions, fp32 [n, head_dim / 2, 2].
    positions, slots: position and cache row of each row, int64 [rows]. ctx_len: positions that the longest row may
    attend to, rounded up. is_in_order: whether the cache rows are 0, 1, 2, ...
    """

    h: torch.Tensor
    angles: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    ctx_len: int
    is_in_order: bool


# Returns hidden states [rows, 1, dim]. It only launches kernels, and neither waits for the device nor reads from it, so
# that it can be captured.
Step = Callable[[Batch], torch.Tensor]
Replay = Callable[[], torch.Tensor]
Key = tuple[int, int, bool]  # rows, context, whether the rows of the cache are 0, 1, 2, ...

MIN_CONTEXT = 256
WARM_UPS = 2  # eager runs before a capture: what a first call compiles, loads or allocates must not be captured


def round_rows(bsz: int, max_rows: int) -> int:
    """bsz rounded up to a power of two, at most max_rows, the number of rows of the cache."""
    return min(1 << (bsz - 1).bit_length(), max_rows)


def round_context(ctx_len: int, max_seq_len: int) -> int:
    """ctx_len rounded up to 256, 512, 768 or 1,024, above that to four sizes per doubling; at most max_seq_len."""
    step = max(MIN_CONTEXT, 1 << max(0, (ctx_len - 1).bit_length() - 3))
    return min(-(-ctx_len // step) * step, max_seq_len)


class Capturer:
    """Captures the CUDA graphs of a model. They share a memory pool, because only one of them runs at a time, and a
    stream, because cuBLAS allocates a workspace for each stream."""

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def capture(self, step: Replay) -> Replay:
        """Capture `step` as a CUDA graph. The function that is returned replays it, and returns the same tensor each
        time."""
        current = torch.cuda.current_stream()
        with torch.cuda.stream(current):  # a capture that fails would leave its own stream as the current one
            self.stream.wait_stream(current)
            try:
                with torch.cuda.stream(self.stream):
                    for _ in range(WARM_UPS):
                        step()
            finally:
                current.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: NCCL's watchdog calls CUDA from its own thread, which would invalidate a capture in global
            # mode.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                out = step()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


def torch_step(model: Transformer, layers: Sequence[FusedLayer]) -> Step:
    """A decode step through the fused layers, by torch's kernels."""

    def step(batch: Batch) -> torch.Tensor:
        h, angles, positions, slots, ctx_len, is_in_order = batch
        mask = (torch.arange(ctx_len, device=h.device) <= positions[:, None])[:, None, None]  # [rows, 1, 1, ctx_len]
        freqs_cis = torch.view_as_complex(angles[positions][:, None])  # [rows, 1, head_dim / 2]
        # A slice of the cache needs no copy. But padding row i then attends to cache row i, not to its own slot, so its
        # output is wrong, and the next layer would store it. After each layer it gets the output of the row it copies.
        numbers = torch.arange(len(h), device=h.device)
        sources = numbers.where(slots[:, None] == slots, len(h)).amin(dim=1)  # the first row with the same slot
        rows = slice(0, len(h)) if is_in_order else slots
        where = Positions(positions, ctx_len, freqs_cis, mask, rows, stored=slots)
        for layer in layers:
            h = layer(h, where)[sources]
        return rms_norm(model.norm, h)

    return step


class CudaGraphDecoder:
    """Runs decode steps as CUDA graphs: ids [bsz, 1] -> hidden states [bsz, 1, dim].

    triton_step: reads each row's keys only up to its position. One graph serves all contexts and all rows of the cache.
    compiled_step: `torch_step` compiled by torch.compile. It always gets the largest context, because each one would be
        compiled anew.

    If neither is given, or if capturing it fails, `torch_step` is captured. If that fails too, its kernels are launched
    one by one. The reason of a failure is logged.

    Batches are padded with copies of their last row, which store the same keys and values as that row. The embedding is
    outside the graph, because it may be the user's module.
    """

    def __init__(
        self,
        model: Transformer,
        layers: Sequence[FusedLayer],
        triton_step: Step | None = None,
        compiled_step: Step | None = None,
    ):
        self.model, self.cache = model, layers[0].cache
        k = self.cache.k
        self.max_rows, _, self.max_seq_len, self.head_dim = k.shape
        self.freqs_cis: torch.Tensor | None = None  # the model's, of which `angles` are a view, or a copy
        self.is_copy = False
        self.h = k.new_zeros(self.max_rows, 1, len(model.norm.weight))
        self.positions = torch.zeros(self.max_rows, dtype=torch.int64, device=k.device)
        self.slots = torch.zeros_like(self.positions)
        self.last_slots: list[int] | None = None  # the cache rows that `slots` was last filled with
        self.torch_step = torch_step(model, layers)
        self.step = triton_step or compiled_step or self.torch_step
        # Triton's attention stops at each row's position; torch.compile would compile each context anew.
        self.reads_used, self.whole_context = triton_step is not None, compiled_step is not None
        self.replays: dict[Key, Replay] = {}
        self.capturer: Capturer | None = None
        self.can_capture = True
        release_before_shutdown(self)

    def release(self) -> None:
        """Destroy the graphs. NCCL waits for that before it destroys a communicator that they use."""
        self.replays.clear()

    def __call__(
        self, tokens: torch.Tensor, start_pos: int | torch.Tensor, ctx_len: int, slots: Sequence[int] | None
    ) -> torch.Tensor:
        bsz = len(tokens)
        rows = round_rows(bsz, self.max_rows)
        self._check_sizes(ctx_len)
        wanted = list(range(bsz) if slots is None else slots)
        if wanted != self.last_slots:
            self.last_slots = None  # until all of them are written
            self.slots[:bsz] = row_tensor(self.cache.rows(slots, bsz), self.slots.device)
            self.slots[bsz:rows] = self.slots[bsz - 1]
            self.last_slots = wanted
        self.h[:bsz] = self.model.tok_embeddings(tokens)
        self.positions[:bsz] = start_pos
        if bsz < rows:
            self.h[bsz:rows] = self.h[bsz - 1]
            self.positions[bsz:rows] = self.positions[bsz - 1]
        while True:
            key = self._key(rows, ctx_len, slots is None)
            replay = self.replays.get(key) or self._capture(key)
            if replay is not None:
                return replay()[:bsz].clone()  # the next replay overwrites the graph's own output

    def _check_sizes(self, ctx_len: int) -> None:
        """Raise ValueError for positions or angles that a graph would read or write out of bounds. The user may have
        replaced these tensors."""
        if ctx_len > self.max_seq_len:
            raise ValueError(f"position {ctx_len - 1}, but the cache has {self.max_seq_len}: raise max_seq_len")
        freqs_cis, device, pairs = self.model.freqs_cis, self.h.device, self.head_dim // 2
        if freqs_cis.dim() != 2 or len(freqs_cis) < ctx_len or freqs_cis.shape[1] != pairs:
            raise ValueError(f"freqs_cis has shape {tuple(freqs_cis.shape)}, expected [{ctx_len} or more, {pairs}]")
        if freqs_cis is not self.freqs_cis:
            self.freqs_cis = freqs_cis
            self.is_copy = (
                freqs_cis.device != device or freqs_cis.dtype != torch.complex64 or not freqs_cis.is_contiguous()
            )
            self.angles = torch.view_as_real(freqs_cis.to(device, torch.complex64).contiguous())
            self.replays.clear()
        elif self.is_copy:  # of angles that may have been written in place
            self.angles.copy_(torch.view_as_real(freqs_cis.to(torch.complex64)))

    def _key(self, rows: int, ctx_len: int, is_in_order: bool) -> Key:
        if self.reads_used or self.whole_context:
            return rows, self.max_seq_len, is_in_order or self.reads_used
        return rows, round_context(ctx_len, self.max_seq_len), is_in_order

    def _capture(self, key: Key) -> Replay | None:
        """The function that computes this step. None if capturing failed and `torch_step` is to be tried next."""
        rows, context, is_in_order = key
        step = self.step

        def run() -> torch.Tensor:
            inputs = self.h[:rows], self.angles, self.positions[:rows], self.slots[:rows]
            return step(Batch(*inputs, context, is_in_order))

        if not self.can_capture:
            return run
        problem = ""
        try:
            self.capturer = self.capturer or Capturer()
            replay = self.capturer.capture(run)
        except Exception as error:  # of CUDA (also out of memory), Triton or torch.compile, with classes of their own
            problem = str(error).strip().partition("\n")[0] or type(error).__name__
        # All ranks or none: each captured step runs its collectives several times.
        if reason := next(filter(None, all_gather_object(problem)), ""):
            self.capturer = None  # a failed capture spoils its memory pool
            if step is not self.torch_step:
                kernels = "Triton" if self.reads_used else "torch.compile"
                log.info(f"llama: the {kernels} step failed ({reason}): decoding with torch's kernels, which is slower")
                self.step, self.reads_used, self.whole_context = self.torch_step, False, False
                self.replays.clear()
                return None
            self.can_capture = False
            log.info(f"llama: no CUDA graph of the decode step ({reason}): its kernels run one by one, which is slower")
            return run
        self.replays[key] = replay
        return replay
