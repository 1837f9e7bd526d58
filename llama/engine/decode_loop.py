"""The decode loop: prefill all rows of a batch, then generate one id per row and step until all rows are finished."""

import contextlib
import math
import threading
import zlib
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llama.accelerate.executor import Executor
from llama.engine.logprobs import score
from llama.engine.requests import Alternatives, Ids, Row, Token, alternatives, bucket_by_length, shared_prefix
from llama.engine.sampling import Sampler, wide_dtype
from llama.errors import explain_oom
from llama.parallel.groups import all_gather_object, broadcast, current_world, is_main_rank, model_parallel
from llama.tokenizer import Tokenizer


class DecodeLoop:
    """Runs batches of `Row`s on a model. Base class of `Engine`, which creates the rows."""

    def __init__(self, executor: Executor, tokenizer: Tokenizer):
        self._executor = executor
        self._is_closed = False
        self.tokenizer = tokenizer
        # For each row of the cache: the ids whose keys and values it holds. Valid only while executor.passes equals
        # _cached_at, as any later forward may overwrite the cache.
        self._cached_ids: list[list[int]] = []
        self._cached_at = -1
        # Calls may come from any thread. The lock is held while the model or its cache is used: a stream takes it for
        # each step.
        self.lock = threading.RLock()
        self._last_call: object = None  # `call` of the last `take_turn`
        self._open_calls: dict[object, int] = {}  # each running call -> the thread that started it
        self._call_ended = threading.Condition(self.lock)

    @property
    def executor(self) -> Executor:
        """The executor that runs `model`. Raises ValueError after `close`."""
        if self._is_closed:
            raise ValueError("this model is closed: build it again")
        return self._executor

    # Threads and ranks

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Context manager around all steps of a call.

        With several ranks it waits until the calls of other threads have ended, streams included. Otherwise their steps
        could run in a different order on each rank.
        """
        key, me = object(), threading.get_ident()
        with self.lock:
            if model_parallel()[1] > 1:
                self._call_ended.wait_for(lambda: all(owner == me for owner in self._open_calls.values()))
            self._open_calls[key] = me
        try:
            yield
        finally:
            with self.lock:
                del self._open_calls[key]
                self._call_ended.notify_all()

    def take_turn(self, call: object, ids: object) -> None:
        """Check that all ranks are about to run the same step. Skipped if `call` also ran the previous step.

        call: any object that identifies the call. ids: the input of the step, which must be equal on all ranks.
        Raises RuntimeError on every rank if threads reached the ranks in different orders.
        """
        if call is not self._last_call:
            self._last_call = None
            if len(set(all_gather_object(zlib.crc32(repr(ids).encode())))) > 1:
                raise RuntimeError(
                    "calls of several threads reached the ranks in different orders: make all calls "
                    "from one thread where there are several ranks"
                )
            self._last_call = call

    # The loop

    def _run(
        self, rows: list[Row], k: int | None, echo: bool = False, reuse: bool = False, is_read: bool = False
    ) -> Generator[list[Token], None, None]:
        """Run `_steps`, holding the lock during each step only, so that other threads can call between steps."""
        with self.call():
            steps = self._steps(rows, k, echo, reuse, is_read)
            while True:
                with self.lock:
                    step = next(steps, None)
                if step is None:
                    return
                yield step

    def _steps(
        self, rows: list[Row], k: int | None, echo: bool = False, reuse: bool = False, is_read: bool = False
    ) -> Generator[list[Token], None, None]:
        """Prefill all rows, then yield at each step a `Token` for every unfinished row, until all rows are finished.

        k: number of alternatives at each position; None: no log-probabilities. echo: also score the prompts.
        reuse: if all rows have the same prompt, do not compute the part of it that the cache already holds. Rounding
        errors of the result then depend on earlier calls.
        is_read: user code runs between the steps and may change the model. It may also finish a row (`Row.cut`).
        """
        self.executor.refresh()
        if len({len(row.prompt) for row in rows}) > 1 and self.executor.is_aligned:
            for _, group in groupby(sorted(rows, key=lambda row: len(row.prompt)), key=lambda row: len(row.prompt)):
                yield from self._steps(list(group), k, echo, is_read=is_read)
            return
        prompts = [row.prompt for row in rows]
        self.take_turn(rows, prompts)  # also waits for ranks whose user code takes longer between two calls
        full = [row for row in rows if row.length >= row.limit]
        for row in full:
            row.finish_reason = "length"
        h: torch.Tensor | None = None
        cache_state: tuple[Executor, int] | None = None  # the executor that computed last, and its passes after that
        if rows and echo and k is not None:
            h = self._prefill(rows, k=k)
            cache_state = (self.executor, self.executor.passes)
        if full:
            yield [Token(row.index, finish_reason="length") for row in full]
        sampler = Sampler(rows, self.executor.model.params.vocab_size, self.executor.device) if is_main_rank() else None
        step = 0
        while not all(row.finish_reason for row in rows):
            self.take_turn(rows, (prompts, step))
            if h is None:
                if cache_state == (self.executor, self.executor.passes):
                    h = self._decode(rows, step, is_read)
                else:
                    # This is the first step, or another call has used the cache. Refilling the cache by the same steps
                    # as before gives bit-identical results.
                    h = self._prefill(rows, reuse)
                    for n in range(1, step + 1):
                        h = self._decode(rows, n)
                cache_state = (self.executor, self.executor.passes)
            yield self._choose(rows, h, sampler, k, step)
            h, step = None, step + 1

    @explain_oom
    @torch.inference_mode()
    def _prefill(self, rows: list[Row], reuse: bool = False, k: int | None = None) -> torch.Tensor:
        """Fill the cache with the prompts -> hidden states [bsz, dim] of their last ids.

        k: also score the prompts, with this number of alternatives. Equal prompts are computed once.
        """
        executor = self.executor
        executor.refresh()
        prompts = [tuple(row.prompt) for row in rows]
        start = 0
        if reuse and len(set(prompts)) == 1 and self._cached_at == executor.passes and not executor.is_aligned:
            # The last id is computed in any case, because its hidden state is needed.
            start = shared_prefix(self._cached_ids[0], prompts[0][:-1])
        pad_id = max(self.tokenizer.pad_id, 0)  # -1 (no pad id) is not a row of the embedding
        slots = dict[Ids, int]()  # each distinct prompt's row of the cache
        last_states = []
        scored: dict[Ids, list[tuple[float, Alternatives]]] = {}
        # A custom model may have its own cache, whose rows cannot be copied, so all of its rows run in one pass.
        for group in [prompts] if executor.is_aligned else bucket_by_length(prompts):
            # Prompts are padded on the right. The causal mask hides the padding from the ids before it. Later, each
            # padded cache position is overwritten by a generated id of its row before a query can attend to it.
            tokens = pad_sequence([torch.tensor(ids[start:]) for ids in group], True, pad_id).to(executor.device)
            rows_of_group = range(len(slots), len(slots) + len(group))
            h = executor.hidden(tokens, start, len(group[0]), rows_of_group)  # [group, seqlen, dim]
            if k is not None:
                # The hidden state of each id predicts the next id.
                flat = [i * tokens.shape[1] + j for i, ids in enumerate(group) for j in range(len(ids) - 1)]
                at = torch.tensor(flat, dtype=torch.int64)  # padding and last ids are left out
                values = read_back(
                    executor.measured(h.flatten(0, 1)[at], tokens.flatten()[at + 1], partial(score, k=k))
                )
                scores = map(partial(alternatives, k=k), values)
                scored |= {ids: list(islice(scores, len(ids) - 1)) for ids in group}
            last_states.append(h[range(len(group)), [len(ids) - start - 1 for ids in group]])
            slots |= {ids: len(slots) + i for i, ids in enumerate(group)}
        if k is not None:
            for row, ids in zip(rows, prompts, strict=True):
                row.prompt_logprobs = [0.0, *(logprob for logprob, _ in scored[ids])]
                row.prompt_top = [[], *(top for _, top in scored[ids])]
            self._check_finite(rows, [all(map(math.isfinite, row.prompt_logprobs)) for row in rows], "in the prompt")
        for row in rows:
            row.reused = start
        order, h = [slots[ids] for ids in prompts], torch.cat(last_states)
        if order != list(range(len(rows))) and not executor.is_aligned:
            h = h[order]
            for cache in executor.caches:
                cache.expand(order, max(map(len, prompts)))
        self._cached_ids, self._cached_at = [list(ids) for ids in prompts], executor.passes
        return h

    @explain_oom
    @torch.inference_mode()
    def _decode(self, rows: list[Row], n: int, refresh: bool = False) -> torch.Tensor:
        """Add the n-th generated id of each row to the cache -> hidden states [bsz, dim].

        A finished row with fewer ids recomputes its last position, which changes nothing.
        """
        executor = self.executor
        if refresh:
            executor.refresh()
        newest = [(row.tokens[:n] or row.prompt)[-1] for row in rows]
        positions = [len(row.prompt) + len(row.tokens[:n]) - 1 for row in rows]
        if executor.is_aligned:
            positions = [max(positions)] * len(rows)
        ids, start_pos = torch.tensor([newest, positions]).to(executor.device)
        at = positions[0] if len(set(positions)) == 1 else start_pos
        h = executor.hidden(ids[:, None], at, max(positions) + 1, refresh=False)
        for cached, token, position in zip(self._cached_ids, newest, positions, strict=True):
            cached[position:] = [token]
        self._cached_at = executor.passes
        return h[:, 0]

    @explain_oom
    @torch.inference_mode()
    def _choose(
        self, rows: list[Row], h: torch.Tensor, sampler: Sampler | None, k: int | None, step: int
    ) -> list[Token]:
        """Sample an id for each row from the hidden states [bsz, dim], and finish rows that end with it."""
        logits = self.executor.logits(h)  # [bsz, vocab]
        ids = torch.zeros(len(rows), dtype=torch.int64, device=h.device)
        if sampler is not None:
            uniform = torch.tensor([row.stream.random() for row in rows], dtype=wide_dtype(h.device))
            ids = sampler.sample(logits, uniform.to(h.device))
        broadcast(ids)
        # max - min of a row is finite only if all its logits are. isfinite on every logit would take as long as a small
        # output layer.
        columns = [(logits.amax(-1, True) - logits.amin(-1, True)).isfinite().float(), ids[:, None].float()]
        if k is not None:
            columns.append(score(logits, ids, k))
        finite, chosen, *scores = zip(*read_back(torch.cat(columns, dim=-1)), strict=True)
        self._check_finite(rows, finite, f"at step {step}")
        tokens = []
        for i, row in enumerate(rows):
            if row.finish_reason:
                continue
            token = int(chosen[i])
            if token in row.stop:
                row.finish_reason = "stop"
                tokens.append(Token(row.index, finish_reason="stop"))
                continue
            row.tokens.append(token)
            if row.length >= row.limit:
                row.finish_reason = "length"
            logprob: float | None = None
            top: Alternatives = []
            if k is not None:
                logprob, top = alternatives([column[i] for column in scores], k)
                row.logprobs.append(logprob)
                row.top.append(top)
            tokens.append(Token(row.index, token, logprob, top, row.finish_reason))
        return tokens

    def _check_finite(self, rows: list[Row], finite: Sequence[float], where: str) -> None:
        for row, is_finite in zip(rows, finite, strict=True):
            if not is_finite:
                raise self.damaged(f"{where}, row {row.index}")

    def damaged(self, where: str) -> FloatingPointError:
        """The error for logits that are not finite. Clears the cache, which may hold such values, too."""
        self._cached_at = -1
        for cache in self.executor.caches:
            cache.clear()
        return FloatingPointError(
            f"logits that are not finite {where}, rank {current_world().rank}: "
            "the weights are damaged, or their dtype overflows (try --dtype float32)"
        )


def read_back(values: torch.Tensor) -> list[list[Any]]:
    """Copy a tensor from the device into Python lists. The engine waits for the device only here."""
    return values.tolist()
