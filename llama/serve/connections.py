"""One connection: how long its client may take to send a request and to read the answer, and the size of a body."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import h11
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama.serve.errors import RequestError, disconnected
from llama.serve.service import Job

MAX_CONNECTIONS = 1000
MAX_BODY = 4 * 2**20  # bytes
# Seconds
HEADER_TIME = 10  # from the connection, or the end of the last answer, to the end of the headers
BODY_TIME = 60  # to the end of the body
READ_TIME = 60  # without reading anything of an answer, while the buffers are full


class Connection(H11Protocol):
    """uvicorn's HTTP protocol with the limits above. A client that exceeds one of them is disconnected."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._sending: tuple[float, asyncio.TimerHandle] | None = None  # limit in force, while a request is incomplete
        self._reading: asyncio.TimerHandle | None = None  # while the client does not read

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._check_reader(None)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._reading, self._sending and self._sending[1]):
            if timer:
                timer.cancel()

    def _check_reader(self, before: int | None) -> None:
        """before: bytes that were left to send when this was last called."""
        left = self.transport.get_write_buffer_size()
        if before is not None and left >= before:
            self.transport.abort()
        else:
            self._reading = self.loop.call_later(READ_TIME, self._check_reader, left)

    def _watch(self) -> None:
        """Start or stop the timer for what the client has to send next."""
        limit = {h11.IDLE: HEADER_TIME, h11.SEND_BODY: BODY_TIME}.get(self.conn.their_state)
        if self._sending is not None and self._sending[0] == limit:
            return
        if self._sending is not None:
            self._sending[1].cancel()
        self._sending = None if limit is None else (limit, self.loop.call_later(limit, self.transport.abort))


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises RequestError for one that is too large or not declared as JSON.

    A web page in the user's browser can send other types to any address, but JSON only with the server's consent.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise RequestError(f"Content-Type is {kind or 'missing'}, expected application/json", 415)
    if "content-encoding" in request.headers:
        raise RequestError("Content-Encoding is not supported: send the body uncompressed", 415)
    declared = request.headers.get("content-length", "0")
    size, parts = int(declared) if declared.isdecimal() else 0, []
    if size <= MAX_BODY:
        size = 0
        try:
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > MAX_BODY:
                    break
        except ClientDisconnect:
            raise disconnected() from None
    if size > MAX_BODY:
        raise RequestError(
            f"the body has more than {MAX_BODY:,} bytes: send fewer prompts at once", 413, code="body_too_large"
        )
    return b"".join(parts)


@contextlib.asynccontextmanager
async def cancelled_by_disconnect(receive: Receive, job: Job) -> AsyncIterator[None]:
    """Cancel the job if the client goes away during the block. Close it at the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        job.cancel_for_disconnect()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        job.close()


class EventStream(StreamingResponse):
    """Server-sent events. uvicorn's `send` waits while the client does not read, so events are made as fast as they are
    read. The tokens of a job whose client is slow stay in its call."""

    def __init__(self, events: AsyncIterator[bytes], job: Job):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter is nginx's
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with cancelled_by_disconnect(receive, self._job):
            await self.stream_response(send)
