"""The engine: prompts of ids in, continuations and their log-probabilities out."""

import contextlib
import math
import threading
import zlib
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from typing import Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import Self, Unpack

from llama.accelerate.executor import Executor, score
from llama.engine.requests import (
    Alternatives,
    Each,
    Generation,
    Ids,
    Prompts,
    Row,
    Settings,
    StopIds,
    Token,
    alternatives,
    bucket_by_length,
    check_alternatives,
    check_int,
    read_rows,
    shared_prefix,
)
from llama.engine.sampling import Sampler, wide_dtype
from llama.errors import OOM_EXPLAINERS, explain_oom
from llama.model import Transformer
from llama.parallel.groups import all_gather_object, broadcast, current_world, is_main_rank, model_parallel, shutdown
from llama.tokenizer import Tokenizer


class Engine:
    """A model that continues lists of ids. Text stays outside; the tokenizer only names its stop ids."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, executor: Executor | None = None):
        self._executor = executor or Executor(_checked(model))
        self._is_closed = False
        self._has_joined = executor is not None  # `build` has joined the ranks for it, which `close` leaves
        self.tokenizer = tokenizer
        # The ids whose keys and values each row of the cache holds, as long as the model's count of passes is this.
        self._held: list[list[int]] = []
        self._held_at = -1
        # Any thread may call: what touches the model or its cache holds this, a step of a stream at a time.
        self.lock = threading.RLock()
        self._turn: object = None  # the call that computed last
        self._open: dict[object, int] = {}  # calls that have begun -> the thread that began them
        self._ended = threading.Condition(self.lock)

    @property
    def executor(self) -> Executor:
        """What computes `model`, in the fastest way that gives the same."""
        if self._is_closed:
            raise ValueError("this model is closed: build it again")
        return self._executor

    @property
    def model(self) -> Transformer:
        """The model: its modules and weights may be read, hooked, written and replaced, also the whole of it by another
        module with `params` that is called as model(tokens, start_pos) -> logits [bsz, seqlen, vocab]."""
        return cast(Transformer, self.executor.model)

    @model.setter
    def model(self, model: Transformer) -> None:
        old = self.executor
        with self.lock:
            if model is old.model:
                return
            if isinstance(model, torch.nn.Module) and (explain := OOM_EXPLAINERS.get(old.model)):
                OOM_EXPLAINERS[model] = explain
            self._executor = Executor(_checked(model), fused=old.fused, native=old.native, graph=old.graph)
            self._held_at = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory and, with the last open model, the process group. Closing twice is harmless."""
        if self._is_closed:
            return
        with self.lock:
            on_gpu = self._executor.device.type == "cuda"
            self._is_closed = True
            del self._executor
        if on_gpu:
            torch.cuda.empty_cache()
        if self._has_joined:
            shutdown()

    def generate(
        self,
        prompt_tokens: Prompts,
        max_gen_len: Each[int | None],
        temperature: Each[float] = 0.6,
        top_p: Each[float] = 0.9,
        logprobs: bool | int = False,
        echo: bool = False,
        stop_token: int | None = None,
        *,
        top_k: Each[int | None] = None,
        repetition_penalty: Each[float] = 1.0,
        stop_token_ids: StopIds = None,
        seed: Each[int | None] = None,
        n: int = 1,
    ) -> Generation:
        """Continue each prompt, all rows in one batch. `request.Settings` has the meanings of the settings.

        prompt_tokens: lists of ids, or an integer tensor [bsz, seqlen], each row a prompt.
        A row ends before its first stop id, after `max_gen_len` ids, or where prompt and answer fill max_seq_len.
        logprobs: also return the natural log-probability of every returned id under the raw logits; a number K asks
            for the K best alternatives at each position, too.
        echo: return the prompt too; its first id, which nothing predicts, has log-probability 0.0.
        stop_token: the one id that ends rows in place of the tokenizer's own stop ids; `stop_token_ids` come on top.

        Returns (ids, log-probabilities or None), a list a row, with the alternatives as its attribute `top`: lists of
        (id, log-probability), best first. Raises ValueError or TypeError for settings out of range, for more rows than
        max_batch_size, and for prompts that are empty, longer than max_seq_len or hold ids outside the vocabulary;
        FloatingPointError when the model answers with logits that are not finite.
        """
        rows = self._rows(
            prompt_tokens,
            stop_token=stop_token,
            max_gen_len=max_gen_len,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            stop_token_ids=stop_token_ids,
            seed=seed,
            n=n,
        )
        k = self._alternatives(logprobs)
        for _ in self._run(self._one_batch(rows), k, echo):
            pass
        scores = None if k is None else [row.prompt_logprobs + row.logprobs for row in rows]
        result = Generation(([row.prompt * echo + row.tokens for row in rows], scores))
        result.top = [row.prompt_top + row.top for row in rows]
        return result

    def stream(
        self, prompt_tokens: Prompts, *, logprobs: bool | int = True, **settings: Unpack[Settings]
    ) -> Generator[list[Token], None, None]:
        """`generate` step by step: each gives a `Token` for every row that was still running.

        Other calls may come in between, and it may be closed early: neither changes what any of them returns.
        Arguments and errors (at the call, not at the first step) as in `generate`.
        """
        rows = self._one_batch(self._rows(prompt_tokens, **settings))
        return self._run(rows, self._alternatives(logprobs), is_read=True)

    def _rows(self, prompts: Prompts, **settings: Any) -> list[Row]:
        """Rows that end at the tokenizer's stop ids, or in their place at the one that `stop_token` names."""
        stop_token, stop = settings.pop("stop_token", None), self.tokenizer.stop_tokens
        if stop_token is not None:
            check_int("stop_token", stop_token, 0)
            stop = {int(stop_token)}
        return read_rows(self.model.params, draw_seed, stop, prompts, **settings)

    def _one_batch(self, rows: list[Row]) -> list[Row]:
        limit = self.model.params.max_batch_size
        if len(rows) > limit:
            raise ValueError(f"{len(rows)} rows, but max_batch_size is {limit}: build with more, or send fewer at once")
        return rows

    def _alternatives(self, logprobs: bool | int) -> int | None:
        """How many alternatives `logprobs` asks for; None where it asks for nothing."""
        if isinstance(logprobs, bool):
            return 0 if logprobs else None
        check_alternatives("logprobs", logprobs, 0, self.model.params)
        return int(logprobs)

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Around all steps of a call. With several ranks, where steps of two threads' calls could come in another order
        on each rank, it waits until other threads' calls have ended, streams among them."""
        key, me = object(), threading.get_ident()
        with self.lock:
            if model_parallel()[1] > 1:
                self._ended.wait_for(lambda: all(owner == me for owner in self._open.values()))
            self._open[key] = me
        try:
            yield
        finally:
            with self.lock:
                del self._open[key]
                self._ended.notify_all()

    def take_turn(self, call: object, ids: object) -> None:
        """Before a call computes, where another one did last: all ranks must be about to compute the same.

        ids: what it computes from. Raises RuntimeError on every rank where threads reached the ranks in several orders.
        """
        if call is not self._turn:
            self._turn = None
            if len(set(all_gather_object(zlib.crc32(repr(ids).encode())))) > 1:
                raise RuntimeError(
                    "calls of several threads reached the ranks in different orders: make all calls "
                    "from one thread where there are several ranks"
                )
            self._turn = call

    def _run(
        self, rows: list[Row], k: int | None, echo: bool = False, reuse: bool = False, is_read: bool = False
    ) -> Generator[list[Token], None, None]:
        """`_steps`, of which each holds the lock: other threads' calls come in between."""
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
        """The one loop: prefill all rows, then an id a step for each until all are finished.

        k: alternatives a position; None for no log-probabilities. echo: give the prompts theirs too. reuse: for rows of
        one prompt, keep what the cache holds of its beginning; the last bits then depend on what ran before.
        is_read: somebody reads the steps as they come, and may change the model in between.
        Whoever reads may finish a row between two steps (`Row.cut`).
        """
        self.executor.follow()
        if len({len(row.prompt) for row in rows}) > 1 and self.executor.is_aligned:
            for _, group in groupby(sorted(rows, key=lambda row: len(row.prompt)), key=lambda row: len(row.prompt)):
                yield from self._steps(list(group), k, echo, is_read=is_read)
            return
        prompts = [row.prompt for row in rows]
        self.take_turn(rows, prompts)  # also waits: between two calls a rank may take its time
        full = [row for row in rows if row.length >= row.limit]
        for row in full:
            row.finish_reason = "length"
        h: torch.Tensor | None = None
        at: tuple[Executor, int] | None = None  # what computed last, and after how many passes
        if rows and echo and k is not None:
            h, at = self._prefill(rows, k=k), (self.executor, self.executor.passes)
        if full:
            yield [Token(row.index, finish_reason="length") for row in full]
        sampler = Sampler(rows, self.model.params.vocab_size, self.executor.device) if is_main_rank() else None
        step = 0
        while not all(row.finish_reason for row in rows):
            self.take_turn(rows, (prompts, step))
            if h is None:
                if at == (self.executor, self.executor.passes):
                    h = self._decode(rows, step, is_read)
                else:
                    # The first step, or another call has taken the cache: filled in the same steps as before, it is
                    # the same to the last bit.
                    h = self._prefill(rows, reuse)
                    for n in range(1, step + 1):
                        h = self._decode(rows, n)
                at = (self.executor, self.executor.passes)
            yield self._choose(rows, h, sampler, k, step)
            h, step = None, step + 1

    @explain_oom
    @torch.inference_mode()
    def _prefill(self, rows: list[Row], reuse: bool = False, k: int | None = None) -> torch.Tensor:
        """Fill the cache with the prompts -> hidden states [bsz, dim] of their last ids.

        k: also score the prompts, with so many alternatives. Equal prompts are computed once.
        """
        executor = self.executor
        executor.follow()
        texts = [tuple(row.prompt) for row in rows]
        start = 0
        if reuse and len(set(texts)) == 1 and self._held_at == executor.passes and not executor.is_aligned:
            start = shared_prefix(
                self._held[0], texts[0][:-1]
            )  # the last id is computed in any case: we need its state
        pad_id = max(self.tokenizer.pad_id, 0)  # -1 is no row of the embedding
        slots, last = dict[Ids, int](), []  # each text's row of the cache, and the states of the last ids
        scored: dict[Ids, list[tuple[float, Alternatives]]] = {}
        # A model that takes all rows at one position may have a cache of its own, whose rows nobody else can copy.
        for group in [texts] if executor.is_aligned else bucket_by_length(texts):
            # Left-aligned and padded on the right: causality hides the padding from every position before it, and each
            # padded cache slot is overwritten by the row's own id before a query of that row can see it.
            tokens = pad_sequence([torch.tensor(text[start:]) for text in group], True, pad_id).to(executor.device)
            h = executor.hidden(tokens, start, len(group[0]), len(slots))  # [group, seqlen, dim]
            if k is not None:
                # h:       h0  h1  h2        predicts
                # tokens:  t0  t1  t2  t3    one place to the left
                places = [i * tokens.shape[1] + j for i, text in enumerate(group) for j in range(len(text) - 1)]
                at = torch.tensor(places, dtype=torch.int64)  # no padding
                values = read_back(
                    executor.measured(h.flatten(0, 1)[at], tokens.flatten()[at + 1], partial(score, k=k))
                )
                found = map(partial(alternatives, k=k), values)
                scored |= {text: list(islice(found, len(text) - 1)) for text in group}
            last.append(h[range(len(group)), [len(text) - start - 1 for text in group]])
            slots |= {text: len(slots) + i for i, text in enumerate(group)}
        if k is not None:
            for row, text in zip(rows, texts, strict=True):
                row.prompt_logprobs = [0.0, *(logprob for logprob, _ in scored[text])]
                row.prompt_top = [[], *(top for _, top in scored[text])]
            self._check_finite(rows, [all(map(math.isfinite, row.prompt_logprobs)) for row in rows], "in the prompt")
        for row in rows:
            row.reused = start
        order, h = [slots[text] for text in texts], torch.cat(last)
        if order != list(range(len(rows))) and not executor.is_aligned:
            h = h[order]
            for cache in executor.caches:
                cache.expand(order, max(map(len, texts)))
        self._held, self._held_at = [list(text) for text in texts], executor.passes
        return h

    @explain_oom
    @torch.inference_mode()
    def _decode(self, rows: list[Row], n: int, follow: bool = False) -> torch.Tensor:
        """Add the n-th generated id of each row to the cache -> hidden states [bsz, dim].

        A row that has fewer computes its last position once more, which changes nothing.
        """
        executor = self.executor
        if follow:
            executor.follow()
        newest = [(row.tokens[:n] or row.prompt)[-1] for row in rows]
        positions = [len(row.prompt) + len(row.tokens[:n]) - 1 for row in rows]
        if executor.is_aligned:
            positions = [max(positions)] * len(rows)
        ids, start_pos = torch.tensor([newest, positions]).to(executor.device)
        same = len(set(positions)) == 1
        at = positions[0] if same else start_pos
        h = executor.hidden(ids[:, None], at, max(positions) + 1, follow=False)
        for held, token, position in zip(self._held, newest, positions, strict=True):
            held[position:] = [token]
        self._held_at = executor.passes
        return h[:, 0]

    @explain_oom
    @torch.inference_mode()
    def _choose(
        self, rows: list[Row], h: torch.Tensor, sampler: Sampler | None, k: int | None, step: int
    ) -> list[Token]:
        """Sample an id for each row from the hidden states [bsz, dim], and note which rows end with it."""
        logits = self.executor.logits(h)  # [bsz, vocab]
        ids = torch.zeros(len(rows), dtype=torch.int64, device=h.device)
        if sampler is not None:
            uniform = torch.tensor([row.stream.random() for row in rows], dtype=wide_dtype(h.device))
            ids = sampler.sample(logits, uniform.to(h.device))
        broadcast(ids)
        # The difference is finite where all logits are; to ask each of them takes as long as a small output layer.
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
        """The error for logits that are not finite; nothing of them stays in the cache."""
        self._held_at = -1
        for cache in self.executor.caches:
            cache.clear()
        return FloatingPointError(
            f"logits that are not finite {where}, rank {current_world().rank}: "
            "the weights are damaged, or their dtype overflows (try --dtype float32)"
        )


def _checked(model: Transformer) -> Transformer:
    """Raise TypeError for what the engine cannot run: it asks a model for its `params` and calls it."""
    if not callable(model) or not hasattr(model, "params"):
        raise TypeError(
            f"the model is a {type(model).__name__}, expected a Transformer, or a module with its `params` "
            "that is called as model(tokens, start_pos)"
        )
    return model


def draw_seed() -> int:
    """The next seed from torch's default CPU generator, which `torch.manual_seed` sets: one draw of torch.randint.

    Every rank draws, so that the generators of ranks that were seeded alike stay alike; only rank 0 samples with it.
    """
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))


def read_back(values: torch.Tensor) -> list[list[Any]]:
    """Bring numbers from the device to Python: the one place where the engine waits for the device."""
    return values.tolist()
