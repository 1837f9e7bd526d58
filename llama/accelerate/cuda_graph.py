"""Decode steps on CUDA as CUDA graphs: the kernels of a step are recorded once, and then launched together.

A graph has fixed shapes. So the number of rows and the context are rounded up to a few sizes, and each combination is
recorded when it is first needed. Weights and caches are read where the model stores them, so a graph sees what is
written to them in place.
"""

import logging
from collections.abc import Callable, Sequence

import torch

from llama.accelerate.fused import FusedLayer, Positions, rms_norm
from llama.cache import row_tensor
from llama.model import Transformer

log = logging.getLogger(__name__)

# A decode step on the device alone: hidden states [rows, 1, dim], cos and sin of all positions (fp32
# [n, head_dim / 2, 2]), positions and cache rows (int64 [rows] each), ctx_len, and whether the rows of the cache are
# 0, 1, 2, ... Returns hidden states [rows, 1, dim].
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, bool], torch.Tensor]
Replay = Callable[[], torch.Tensor]
Key = tuple[int, int, bool]  # rows, context, whether the rows of the cache are 0, 1, 2, ...

MIN_CONTEXT = 256
WARM_UPS = 2  # runs before a step is recorded: compiling, loading and allocating at first use must not be recorded


def round_rows(bsz: int, max_rows: int) -> int:
    """The next power of two, but at most the number of rows of the cache."""
    return min(1 << (bsz - 1).bit_length(), max_rows)


def round_context(ctx_len: int, max_seq_len: int) -> int:
    """256, 512, 768, 1,024, and above that four sizes up to each power of two; at most max_seq_len."""
    step = max(MIN_CONTEXT, 1 << max(0, (ctx_len - 1).bit_length() - 3))
    return min(-(-ctx_len // step) * step, max_seq_len)


class Recorder:
    """What all recordings of a model share: a pool of memory, as one graph runs at a time, and a stream, as cuBLAS
    allocates a workspace for each."""

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def record(self, step: Replay) -> Replay:
        """Record the kernels that `step` launches. The result launches them again and returns the same tensor each
        time."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog calls CUDA from another thread, which would end a recording in the global mode.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            out = step()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


def torch_step(model: Transformer, layers: Sequence[FusedLayer]) -> Step:
    """The fused layers by torch's kernels."""

    def step(
        h: torch.Tensor,
        angles: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        ctx_len: int,
        is_in_order: bool,
    ) -> torch.Tensor:
        mask = (torch.arange(ctx_len, device=h.device) <= positions[:, None])[:, None, None]  # [rows, 1, 1, ctx_len]
        freqs_cis = torch.view_as_complex(angles[positions][:, None])  # [rows, 1, head_dim / 2]
        if not is_in_order:
            where = Positions(positions, ctx_len, freqs_cis, mask, slots)
            for layer in layers:
                h = layer(h, where)
            return rms_norm(model.norm, h)
        # Views of the first rows of the cache need no copy. But padding rows then attend to rows that are not theirs,
        # and would store something else than the row that they copy: after each layer they are copied again.
        numbers = torch.arange(len(h), device=h.device)
        sources = numbers.where(slots[:, None] == slots, len(h)).amin(dim=1)  # the first row with the same slot
        where = Positions(positions, ctx_len, freqs_cis, mask, slice(0, len(h)), stored=slots)
        for layer in layers:
            h = layer(h, where)[sources]
        return rms_norm(model.norm, h)

    return step


class CudaGraphDecoder:
    """Replays a decode step for one id per row: ids [bsz, 1] -> hidden states [bsz, 1, dim].

    triton_step: reads only the positions that each row uses, so one graph serves all contexts and cache rows.
    compiled_step: `torch_step`, compiled by torch.compile for each context, so it always gets the largest one.

    Without both, or if recording them fails, `torch_step` is recorded. If that fails, too, it runs without a graph,
    kernel by kernel. The reason is logged.

    Batches are padded with copies of their last row, which store the same keys and values as that row. The embedding
    is not recorded, as it may be the user's module.
    """

    def __init__(
        self,
        model: Transformer,
        layers: Sequence[FusedLayer],
        triton_step: Step | None = None,
        compiled_step: Step | None = None,
    ):
        self.model, self.cache, self.freqs_cis = model, layers[0].cache, model.freqs_cis
        k = self.cache.k
        self.max_rows, _, self.max_seq_len, _ = k.shape
        self.h = k.new_zeros(self.max_rows, 1, len(model.norm.weight))
        self.positions = torch.zeros(self.max_rows, dtype=torch.int64, device=k.device)
        self.slots = torch.zeros_like(self.positions)
        self.last_slots: list[int] | None = None  # what `slots` holds
        self.torch_step = torch_step(model, layers)
        self.step = triton_step or compiled_step or self.torch_step
        self.reads_used, self.whole_context = triton_step is not None, compiled_step is not None
        self.replays: dict[Key, Replay] = {}
        self.recorder: Recorder | None = None
        self.can_record = True

    def __call__(
        self, tokens: torch.Tensor, start_pos: int | torch.Tensor, ctx_len: int, slots: Sequence[int] | None
    ) -> torch.Tensor:
        bsz = len(tokens)
        rows = round_rows(bsz, self.max_rows)
        if self.freqs_cis is not self.model.freqs_cis:
            self.freqs_cis = self.model.freqs_cis
            self.replays.clear()
        self.h[:bsz] = self.model.tok_embeddings(tokens)
        self.positions[:bsz] = start_pos
        wanted = list(range(bsz) if slots is None else slots)
        if wanted != self.last_slots:
            self.slots[:bsz] = row_tensor(self.cache.rows(slots, bsz), self.slots.device)
            self.slots[bsz:rows] = self.slots[bsz - 1]
            self.last_slots = wanted
        if bsz < rows:
            self.h[bsz:rows] = self.h[bsz - 1]
            self.positions[bsz:rows] = self.positions[bsz - 1]
        while True:
            key = self._key(rows, ctx_len, slots is None)
            replay = self.replays.get(key) or self._record(key)
            if replay is not None:
                return replay()[:bsz].clone()  # the next replay overwrites the graph's own output

    def _key(self, rows: int, ctx_len: int, is_in_order: bool) -> Key:
        if self.reads_used or self.whole_context:
            return rows, self.max_seq_len, is_in_order or self.reads_used
        return rows, round_context(ctx_len, self.max_seq_len), is_in_order

    def _record(self, key: Key) -> Replay | None:
        """What computes the step; None if recording it failed, but `torch_step` can be tried."""
        rows, context, is_in_order = key
        step = self.step

        def run() -> torch.Tensor:
            angles = torch.view_as_real(self.freqs_cis)
            return step(self.h[:rows], angles, self.positions[:rows], self.slots[:rows], context, is_in_order)

        if not self.can_record:
            return run
        try:
            self.recorder = self.recorder or Recorder()
            replay = self.replays[key] = self.recorder.record(run)
            return replay
        except Exception as error:  # of CUDA, Triton or torch.compile, each with classes of its own
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            if step is not self.torch_step:
                self.step, self.reads_used, self.whole_context = self.torch_step, False, False
                self.replays.clear()
                log.info(f"llama: no CUDA graph of the fastest kernels ({reason}): decoding with torch's kernels")
                return None
            self.can_record = False
            log.info(f"llama: no CUDA graph of the decode step ({reason}): it runs kernel by kernel, which is slower")
            return run
