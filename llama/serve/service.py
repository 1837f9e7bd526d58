"""`Service`: the model, once it is loaded, and which requests are admitted. `Job`: the rows of one request in the
scheduler."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from llama.engine.requests import Row, Token
from llama.generation import Llama
from llama.parallel.heartbeat import lost_rank_message
from llama.serve.errors import RequestError, disconnected
from llama.serve.metrics import Metrics

if TYPE_CHECKING:
    from llama.engine.scheduler import Call

RETRY_AFTER = 1  # seconds
MAX_TOKENS = 16  # that are sent at once to a client which reads slowly


class Service:
    """What the endpoints share. Its methods are called in the event loop's thread.

    name: of the model, in requests and answers. max_queue: how many requests may wait, besides one for each slot.
    is_loopback: whether the server listens on this machine only.
    """

    def __init__(self, name: str, *, api_key: str | None = None, max_queue: int = 64, is_loopback: bool = True):
        self.name, self.api_key, self.max_queue, self.is_loopback = name, api_key, max_queue, is_loopback
        self.created = int(time.time())
        self.metrics = Metrics()
        self.jobs = set[Job]()
        self.is_stopping = False
        self._llama: Llama | None = None
        self.responding = 0  # requests that have no complete response yet

    @property
    def is_loaded(self) -> bool:
        return self._llama is not None

    @property
    def llama(self) -> Llama:
        """The model. Raises RequestError while it is being loaded."""
        if self._llama is None:
            raise RequestError(f"{self.name} is being loaded", 503, code="loading", retry_after=RETRY_AFTER)
        return self._llama

    def load(self, llama: Llama) -> None:
        """Begin to answer requests with this model."""
        self._llama = llama
        usage, gauge = llama.scheduler.usage, self.metrics.gauge
        gauge("llama_slots", "Slots of the KV cache: sequences that are computed together.", lambda: usage().slots)
        gauge("llama_slots_in_use", "Slots that are in use.", lambda: usage().running)
        gauge("llama_queue_length", "Sequences that wait for a slot.", lambda: usage().waiting)
        gauge("llama_requests_open", "Requests that are queued or computed.", lambda: len(self.jobs))
        gauge("llama_cached_tokens", "Positions of the KV cache that are filled.", lambda: usage().cached)
        size = usage().slots * llama.model.params.max_seq_len
        gauge("llama_cache_size_tokens", "Positions of the KV cache.", lambda: size)

    def accepting_llama(self) -> Llama:
        """The model, for a new request. Raises RequestError while it is being loaded, and once the server stops."""
        if self.is_stopping:
            raise RequestError("the server is shutting down", 503, code="shutting_down", retry_after=RETRY_AFTER)
        return self.llama

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise RequestError(
                f"there is no model {name!r}, expected {self.name!r}", 404, param="model", code="model_not_found"
            )

    def admit(self) -> "Job":
        """A job without rows. Raises RequestError if the queue is full."""
        limit = self.llama.model.params.max_batch_size + self.max_queue
        if len(self.jobs) >= limit:
            raise RequestError(
                f"{limit} requests are running or waiting, and the server admits no more: try again later",
                429,
                code="queue_full",
                retry_after=RETRY_AFTER,
            )
        return Job(self)

    def cancel_all(self, message: str) -> None:
        """End all jobs. Their requests get an error with this message, and status 503."""
        for job in list(self.jobs):
            job.cancel(RequestError(message, 503, code="shutting_down"))


class Job:
    """The rows of one request. It counts as open from its creation until it is computed, cancelled or closed."""

    def __init__(self, service: Service):
        self.rows: list[Row] = []
        self._service, self._scheduler = service, service.llama.scheduler
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._call: Call | None = None
        self._unfinished: set[int] = set()  # the indexes of rows
        self._problem: RequestError | None = None
        # Used in the engine's thread, to measure times.
        self._last_step, self._length, self._has_token = time.perf_counter(), 0, False
        service.jobs.add(self)

    def submit(self, rows: list[Row], priority: int = 0) -> None:
        """Queue the rows. Those that have ended already are not run. priority: as in `Scheduler.submit`."""
        self.rows = [row for row in rows if row.finish_reason is None]
        self._unfinished = {row.index for row in self.rows}
        self._length = sum(row.length for row in self.rows)
        if self.rows:
            self._call = self._scheduler.submit(self.rows, reuse=True, priority=priority, listener=self._listen)
        else:
            self.close()

    def cut(self, row: Row, n: int) -> None:
        """End a row after its first n generated ids."""
        self._unfinished.discard(row.index)
        if self._call is not None:
            self._scheduler.cut(self._call, row, n)

    async def steps(self) -> AsyncIterator[list[Token]]:
        """The tokens of the rows, as they are generated. Raises RequestError for a job that fails or is cancelled."""
        while self._call is not None and self._unfinished:
            self._news.clear()
            if self._problem is not None:
                raise self._problem
            error, tokens = self._call.error, self._call.take()
            if tokens:
                self._service.metrics.generated_tokens.inc(sum(token.id is not None for token in tokens))
                for start in range(0, len(tokens), MAX_TOKENS):
                    part = tokens[start : start + MAX_TOKENS]
                    self._unfinished -= {token.row for token in part if token.finish_reason}
                    yield part
            elif error is not None:
                raise RequestError(lost_rank_message(error) or error, 500, code="computation_failed")
            else:
                await self._news.wait()
        self.close()

    def cancel(self, problem: RequestError) -> None:
        """Free the slots at the next step. `steps` raises `problem`."""
        if self._problem is None:
            self._problem = problem
            self._news.set()
        self.close()

    def cancel_for_disconnect(self) -> None:
        if self in self._service.jobs:
            self._service.metrics.cancelled.inc()
        self.cancel(disconnected())

    def close(self) -> None:
        """Count as open no longer. What is still to be computed is not."""
        if self in self._service.jobs:
            self._service.jobs.remove(self)
            self._service.metrics.reused_tokens.inc(sum(row.reused for row in self.rows))
        if self._call is not None:
            self._scheduler.cancel(self._call)

    def _listen(self) -> None:
        """Called in the engine's thread, between two steps."""
        now, length = time.perf_counter(), sum(row.length for row in self.rows)
        if length != self._length:
            metrics = self._service.metrics
            (metrics.next_token if self._has_token else metrics.first_token).observe(now - self._last_step)
            self._has_token, self._last_step, self._length = True, now, length
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is about to exit
            self._loop.call_soon_threadsafe(self._news.set)
