"""Whatever else runs, a call gets the answer that its rows get alone: random arrivals, settings, ends and failures.

In the first test the test itself is the engine's thread. Events happen at ticks, of which there are two a step: one
between the steps, and one while a step is computed, in another thread as in a server. So a failing example can be
repeated and made smaller. In the others threads submit calls whenever they like, on one rank and on several.
"""

import dataclasses
import functools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.ranks import run_ranks
from helpers.tolerance import LOGPROB
from llama import Llama
from llama.engine.calls import Call
from llama.engine.requests import Alternatives, Row, Token
from llama.parallel.groups import is_main_rank, model_parallel

LENGTH = 64  # of a slot
POISON = 511  # the embedding of this id is not a number
PREFIXES = [[1, *range(start, start + 47)] for start in (20, 100)]
MANY = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclasses.dataclass(frozen=True)
class Job:
    """A call, and what happens to it.

    at: the tick at which it is submitted. is_stream: the test reads it with `steps`; otherwise it has a listener.
    cancel: the tick at which it is cancelled. cut: (tick, row, number of ids) at which a row is cut.
    """

    prompts: tuple[tuple[int, ...], ...]
    settings: tuple[tuple[str, Any], ...] = ()
    logprobs: bool | int = True
    echo: bool = False
    at: int = 0
    reuse: str | None = "a"
    priority: int = 0
    is_stream: bool = False
    cancel: int | None = None
    cut: tuple[int, int, int] | None = None

    def rows(self, llama: Llama) -> list[Row]:
        return llama._rows(self.prompts, logprobs=self.logprobs, echo=self.echo, **dict(self.settings))


def make_job(choose: Callable[[Sequence[Any]], Any]) -> Job:
    """choose: returns one of the values. Many prompts begin alike, and many calls come and go within a few steps."""
    prompts = []
    for _ in range(choose([1, 1, 2])):
        prefix = choose([0, 0, 0, 1])
        shared = choose([0, 15, 16, 17, 33, 47, 48, 48])
        own = [choose([*range(3, 9)] * 4 + [POISON]) for _ in range(choose(range(1, 5)))]
        prompts.append(tuple(PREFIXES[prefix][:shared] + own))
    chosen = {
        "max_gen_len": choose([0, 0, 1, 2, 5, 12]),
        "temperature": choose([0.0, 0.0, 0.8, 1.5]),
        "top_p": choose([1.0, 0.9, 0.0]),
        "top_k": choose([None, 1, 7]),
        "repetition_penalty": choose([1.0, 1.0, 1.4]),
        "frequency_penalty": choose([0.0, 0.0, 1.5]),
        "presence_penalty": choose([0.0, 0.0, -0.9]),
        "seed": choose(range(10)),
        "n": choose([1, 1, 2]),
        "stop_token_ids": choose([(), (), tuple(range(0, 512, 7))]),
    }
    at = choose(range(8))
    return Job(
        tuple(prompts),
        tuple(chosen.items()),
        logprobs=choose([False, True, 3, 5]),
        echo=choose([False, True]),
        at=at,
        reuse=choose(["a", "a", "a", "b", None]),
        priority=choose([0, 0, 1]),
        is_stream=choose([False, False, True]),
        cancel=choose([None, None, at + choose(range(1, 8))]),
        cut=choose([None, None, (at + choose(range(1, 12)), choose(range(4)), choose(range(4)))]),
    )


@st.composite
def a_job(draw: st.DrawFn) -> Job:
    return make_job(lambda values: draw(st.sampled_from(values)))


# What is expected -----------------------------------------------------------------------------------


class Alone:
    """The rows of jobs, each computed alone, by a model that computes nothing else. None for one that fails."""

    def __init__(self, llama: Llama):
        self._llama = llama
        self._of = functools.lru_cache(maxsize=None)(self._compute)

    def of(self, job: Job) -> list[Row | None]:
        return self._of(dataclasses.replace(job, at=0, reuse=None, priority=0, is_stream=False, cancel=None, cut=None))

    def _compute(self, job: Job) -> list[Row | None]:
        rows: list[Row | None] = []
        for row in job.rows(self._llama):
            row.index = 0
            try:
                for _ in self._llama._run([row]):
                    pass
                rows.append(row)
            except FloatingPointError:
                rows.append(None)
        return rows


def check(job: Job, call: Call, tokens: list[Token], alone: list[Row | None], is_cut: bool) -> None:
    """The rows of an ended call are those that are computed alone, and were announced token by token."""
    if call.error is not None:
        assert isinstance(call.error, FloatingPointError) and None in alone, call.error
        return
    for row, expected in zip(call.rows, alone, strict=True):
        was_cut = is_cut and job.cut is not None and row.index == job.cut[1] % len(call.rows)
        if expected is None:
            assert was_cut
            continue
        n = len(row.tokens)
        assert row.tokens == expected.tokens[:n] and row.reused < len(row.prompt)
        same(row.logprobs, row.top, expected.logprobs[:n], expected.top[:n])
        if not was_cut or row.prompt_logprobs:  # it may be cut before its prompt is computed
            same(row.prompt_logprobs, row.prompt_top, expected.prompt_logprobs, expected.prompt_top)
        if was_cut:
            continue
        assert n == len(expected.tokens) and row.finish_reason == expected.finish_reason
        mine = [token for token in tokens if token.row == row.index]
        assert [token.id for token in mine if token.id is not None] == row.tokens
        assert [token.finish_reason for token in mine if token.finish_reason] == [row.finish_reason]
        assert mine[-1].finish_reason == row.finish_reason


def same(ours: list[float], our_top: list[Alternatives], theirs: list[float], their_top: list[Alternatives]) -> None:
    """The same log-probabilities and alternatives, up to rounding."""
    assert len(ours) == len(theirs)
    for mine, alternatives, other, other_alternatives in zip(ours, our_top, theirs, their_top, strict=True):
        found, expected = [mine], [other]
        found += [logprob for _, logprob in alternatives]
        expected += [logprob for _, logprob in other_alternatives]
        assert len(found) == len(expected)
        assert all(abs(a - b) < LOGPROB for a, b in zip(found, expected, strict=True)), (found, expected)


def check_nothing_is_left(llama: Llama) -> None:
    scheduler = llama.scheduler
    slots, running, waiting, _ = scheduler.usage()
    assert (slots, running, waiting) == (llama.model.params.max_batch_size, 0, 0)
    assert not scheduler._calls and not scheduler._tasks and not scheduler._open and scheduler._runner is None


# Running --------------------------------------------------------------------------------------------


class Run:
    """Runs jobs on the engine, tick by tick."""

    def __init__(self, llama: Llama, jobs: Sequence[Job], changes: dict[int, str]):
        self.llama, self.jobs, self.changes = llama, jobs, changes
        self.calls: dict[int, Call] = {}
        self.tokens: list[list[Token]] = [[] for _ in jobs]
        self.readers: dict[int, Iterator[list[Token]]] = {}
        self.cancelled, self.cut = set[int](), set[int]()
        self.clock = 0

    def tick(self) -> None:
        for i, job in enumerate(self.jobs):
            if job.at == self.clock:
                self._submit(i)
            if i in self.calls and job.cancel == self.clock:
                self.cancelled.add(i)
                self.llama.scheduler.cancel(self.calls[i])
            if i in self.calls and job.cut is not None and job.cut[0] == self.clock:
                row = self.calls[i].rows[job.cut[1] % len(self.calls[i].rows)]
                self.cut.add(i)
                self.llama.scheduler.cut(self.calls[i], row, min(job.cut[2], len(row.tokens)))
        self.clock += 1

    def _submit(self, i: int) -> None:
        job = self.jobs[i]
        listener = None if job.is_stream else lambda: None
        self.calls[i] = self.llama.scheduler.submit(
            job.rows(self.llama), reuse=job.reuse, priority=job.priority, is_read=job.is_stream, listener=listener
        )
        if job.is_stream:
            self.readers[i] = self.llama.scheduler.steps(self.calls[i])

    def change(self) -> None:
        """What programs do between steps: overwrite the cache, or replace weights, here by equal ones."""
        for clock in [clock for clock in self.changes if clock <= self.clock]:
            if self.changes.pop(clock) == "cache":
                with self.llama.scheduler.exclusive(None):
                    self.llama.executor.hidden(torch.full((1, 20), 7), 0, 20)
            else:
                norm = self.llama.model.norm
                norm.weight = torch.nn.Parameter(norm.weight.clone())

    def step(self) -> None:
        """A step of the engine, in which streams of this thread take no part."""
        scheduler = self.llama.scheduler
        if scheduler._claim_for_calls(timeout=0):
            try:
                scheduler._step(None)
            finally:
                scheduler._release_model()

    def read(self, i: int) -> None:
        """The next step of a stream."""
        try:
            self.tokens[i] += next(self.readers[i])
        except (StopIteration, FloatingPointError):
            self.llama.scheduler.cancel(self.calls[i])
            del self.readers[i]

    def run(self, turns: Sequence[int]) -> None:
        """turns: which stream is read next; 0 for the engine."""
        worker, order = self.llama.scheduler._worker, iter(turns)
        compute = worker.run

        def with_events(*args: Any) -> Any:
            during = threading.Thread(target=self.tick)
            during.start()
            during.join()
            return compute(*args)

        worker.run = with_events  # type: ignore
        try:
            while self.clock < 20 or self.llama.scheduler._participants(None) or self.readers:
                self.tick()
                self.change()
                turn = next(order, self.clock)
                streams = sorted(self.readers)
                if turn and streams:
                    self.read(streams[turn % len(streams)])
                else:
                    self.step()
                assert self.clock < 600, "rows wait forever"
        finally:
            worker.run = compute  # type: ignore

    def check(self, alone: Alone) -> None:
        for i, call in self.calls.items():
            if not self.jobs[i].is_stream:
                self.tokens[i] += call.take()
            assert call.is_done and not call.tasks and not call.waiting
            if i not in self.cancelled:
                check(self.jobs[i], call, self.tokens[i], alone.of(self.jobs[i]), i in self.cut)
        check_nothing_is_left(self.llama)


def hooked(llama: Llama) -> None:
    """User code sees whole prompts."""
    llama.model.layers[0].register_forward_hook(lambda *_: None)


def custom(llama: Llama) -> None:
    """Rows of one call and one length run together."""
    llama.model.register_forward_hook(lambda *_: None)


FORMS: dict[str, tuple[dict[str, Any], Callable[[Llama], None] | None]] = {
    "fused": ({"compile": False}, None),
    "compiled": ({"compile": True}, None),
    "plain": ({"plain": True}, None),
    "int8": ({"quantize": "int8"}, None),
    "hooked": ({"compile": False}, hooked),
    "custom": ({"compile": False}, custom),
}


def poison(llama: Llama) -> None:
    rank, size = model_parallel()
    if rank == size - 1:  # which has the last ids
        llama.model.tok_embeddings.weight.data[-1] = float("nan")


@pytest.fixture(scope="module")
def models(checkpoint: Callable[..., Path]) -> Iterator[Callable[[str], tuple[Llama, Alone]]]:
    """models(form): two models, of which the second one computes rows alone."""
    built: dict[str, list[Llama]] = {}

    def make(form: str) -> tuple[Llama, Alone]:
        options, change = FORMS[form]
        if form not in built:
            built[form] = [
                Llama.build(checkpoint("gqa"), max_seq_len=LENGTH, max_batch_size=bsz, **options) for bsz in (2, 1)
            ]
            for llama in built[form]:
                poison(llama)
                if change is not None:
                    change(llama)
        llama, reference = built[form]
        return llama, Alone(reference)

    yield make
    for pair in built.values():
        for llama in pair:
            llama.close()


@pytest.mark.parametrize("form", FORMS)
@MANY
@given(
    jobs=st.lists(a_job(), min_size=4, max_size=8),
    turns=st.lists(st.sampled_from([0, 0, 0, 1, 2, 3]), max_size=10),
    changes=st.dictionaries(st.integers(0, 20), st.sampled_from(["cache", "weights"]), max_size=2),
    prefill_chunk=st.sampled_from([8, 8, 24, 1024]),
)
def test_calls_equal_those_alone(
    form: str,
    jobs: list[Job],
    turns: list[int],
    changes: dict[int, str],
    prefill_chunk: int,
    models: Callable[[str], tuple[Llama, Alone]],
) -> None:
    llama, alone = models(form)
    llama.executor.prefill_chunk = prefill_chunk
    run = Run(llama, jobs, changes)
    run.run(turns)
    run.check(alone)


# Threads and ranks ----------------------------------------------------------------------------------


def ask(llama: Llama, job: Job, tokens: list[Token]) -> Call:
    """What a server does with a request: take what is new, and perhaps cut a row or cancel the call in the middle."""
    news = threading.Semaphore(0)
    call = llama.scheduler.submit(job.rows(llama), reuse=job.reuse, priority=job.priority, listener=news.release)
    row = call.rows[job.cut[1] % len(call.rows)] if job.cut else None
    until = time.monotonic() + 60
    while not call.is_done:
        assert time.monotonic() < until
        news.acquire(timeout=0.1)
        tokens += call.take()
        if job.cancel is not None and len(tokens) >= job.cancel % 4:
            llama.scheduler.cancel(call)
            return call
        if row is not None and job.cut and len(row.tokens) > job.cut[2]:
            llama.scheduler.cut(call, row, job.cut[2])
            row = None
    tokens += call.take()
    return call


def ask_in_threads(llama: Llama, jobs: list[Job], alone: Alone) -> None:
    """Six threads ask, while this one runs the engine. With several ranks, this is rank 0."""

    def work(start: int) -> None:
        for job in jobs[start::6]:
            time.sleep(job.at / 10_000)
            tokens: list[Token] = []
            call = ask(llama, job, tokens)
            if job.cancel is None:
                check(job, call, tokens, alone.of(job), is_cut=job.cut is not None)

    def stop() -> None:
        wait(working)
        llama.scheduler.stop()

    with ThreadPoolExecutor(7) as pool:
        working = [pool.submit(work, start) for start in range(6)]
        pool.submit(stop)
        llama.scheduler.run()
    for one in working:
        one.result()
    check_nothing_is_left(llama)


def answer(folder: Path, count: int, options: dict[str, Any]) -> None:
    """On every rank: compute the rows of all jobs alone, then together."""
    stream = random.Random(count)
    jobs = [make_job(stream.choice) for _ in range(count)]
    llama = Llama.build(folder, max_seq_len=LENGTH, max_batch_size=2, **options)
    poison(llama)
    alone = Alone(llama)
    for job in jobs:
        alone.of(job)
    llama.executor.prefill_chunk = 24
    if is_main_rank():
        ask_in_threads(llama, jobs, alone)
    else:
        llama.scheduler.run()
    llama.close()


@pytest.mark.parametrize("options", [{"compile": False}, {"compile": True}], ids=["fused", "compiled"])
def test_calls_of_threads_equal_those_alone(options: dict[str, Any], checkpoint: Callable[..., Path]) -> None:
    answer(checkpoint("gqa"), 150, options)


@pytest.mark.parametrize(
    ("world_size", "count"), [(2, 30), (4, 10), *(pytest.param(n, 70, marks=pytest.mark.slow) for n in (2, 4))]
)
def test_calls_on_several_ranks_equal_those_alone(world_size: int, count: int, checkpoint: Callable[..., Path]) -> None:
    run_ranks(world_size, answer, checkpoint("gqa"), count, {})
