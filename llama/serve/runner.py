"""A server's life: the port is opened, the model is loaded and runs in a thread of its own, signals end it."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from llama.files import as_path
from llama.generation import Llama
from llama.parallel.groups import is_main_rank
from llama.parallel.heartbeat import is_rank_lost, lost_rank_message
from llama.serve.app import create_app
from llama.serve.connections import MAX_CONNECTIONS, Connection
from llama.serve.service import Service

log = logging.getLogger(__name__)

BACKLOG = 1024  # connections that the system accepts for a server that is busy
SIGNALS = (signal.SIGINT, signal.SIGTERM)
CLOSE_TIME = 2  # seconds for the last bytes of responses, after their jobs have ended
ENGINE_TIME = 20  # seconds for the engine to finish its step and to close the model; torchrun kills after 30


def serve(
    build: dict[str, Any], *, host: str, port: int, api_key: str | None = None, max_queue: int = 64, grace: float = 20
) -> None:
    """Serve the model of `Llama.build(**build)` until a signal comes. Under torchrun every rank calls this.

    Raises what `Llama.build` and the engine raise, and ValueError for an address that cannot be listened on.
    """
    if not is_main_rank():
        return _follow(build)
    _allow_connections()
    with _listen(host, port) as sock:
        is_loopback = ipaddress.ip_address(sock.getsockname()[0]).is_loopback
        if not is_loopback and api_key is None:
            log.warning("%s is reachable from other machines, and anybody may use it: give --api_key", host)
        service = Service(model_name(build["ckpt_dir"]), api_key=api_key, max_queue=max_queue, is_loopback=is_loopback)
        asyncio.run(Runner(service, sock, grace).run(build))


def model_name(ckpt_dir: str | Path) -> str:
    """The name of the checkpoint's folder, or of its parent if it is called "original", as on the hub."""
    folder = Path(os.path.abspath(as_path(ckpt_dir)))
    return folder.parent.name if folder.name == "original" else folder.name


def _follow(build: dict[str, Any]) -> None:
    """The other ranks compute what rank 0 tells them. It gets the same signals, and decides when to stop."""
    llama = Llama.build(**build)
    with _handlers(_exit_if_rank_is_lost):
        llama.scheduler.run()
    llama.close()


def _exit_if_rank_is_lost(*_: object) -> None:
    """Ends the process if the signal is from its own heartbeat, which has printed the reason."""
    if is_rank_lost():
        os._exit(1)


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = min(found, key=lambda one: one[0] != socket.AF_INET)  # IPv4, if the name has both
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None) or 0  # those of getaddrinfo are negative
        reason = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen on {host}, port {port}: {reason}; choose another --host or --port") from None


def _allow_connections() -> None:
    """Each connection is an open file. Many systems allow a process 1,024 unless it asks for more."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * (MAX_CONNECTIONS + BACKLOG)  # those beyond the limit are accepted before they are closed
    if 0 <= soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))


@contextlib.contextmanager
def _handlers(handler: Callable[..., None]) -> Iterator[None]:
    """Handle the signals that end a server. Only the main thread can; in another one nothing is changed."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in SIGNALS} if is_main else {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: `Runner` has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Runner:
    """Runs the event loop in the main thread, and the model in another.

    The first signal ends the server after what runs, or after `grace` seconds. The second one ends the process at once.
    """

    def __init__(self, service: Service, sock: socket.socket, grace: float):
        self._service, self._socket, self._grace = service, sock, grace
        self._stop, self._engine_ended = asyncio.Event(), asyncio.Event()
        self._llama: Llama | None = None
        self._failure: BaseException | None = None
        self._signals = 0

    async def run(self, build: dict[str, Any]) -> None:
        host, port = self._socket.getsockname()[:2]
        self._url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        config = uvicorn.Config(
            create_app(self._service),
            http=Connection,
            backlog=BACKLOG,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
        for name in ("uvicorn.error", "asyncio"):
            logging.getLogger(name).setLevel(logging.ERROR)  # bugs, not what clients do wrong
        self.server = Server(config)
        self._loop = asyncio.get_running_loop()
        engine = threading.Thread(target=self._run_engine, args=(build,), name="engine", daemon=True)
        with _handlers(self._on_signal):
            serving = asyncio.create_task(self.server.serve(sockets=[self._socket]))
            engine.start()
            log.info("listening on %s, loading %s", self._url, self._service.name)
            await _first(self._stop.wait(), self._engine_ended.wait())
            await self._drain()
            for connection in list(self.server.server_state.connections):
                connection.transport.abort()  # uvicorn would wait for them
            self.server.should_exit = True
            await serving
            await self._end_engine(engine)
        if self._failure is not None:
            if lost_rank_message(self._failure) and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, until the reason is printed
            raise self._failure

    def _run_engine(self, build: dict[str, Any]) -> None:
        """The engine's thread: load the model, and compute until the scheduler is stopped."""
        try:
            self._llama = llama = Llama.build(**build)
            self._call_soon(self._on_loaded, llama)
            llama.scheduler.run()
            llama.close()
        except BaseException as error:
            self._failure = error
        finally:
            self._call_soon(self._engine_ended.set)

    def _call_soon(self, function: Callable[..., Any], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the process about to exit
            self._loop.call_soon_threadsafe(function, *args)

    def _on_loaded(self, llama: Llama) -> None:
        self._service.load(llama)
        slots, length = llama.model.params.max_batch_size, llama.model.params.max_seq_len
        log.info("serving %s on %s/v1: %d slots of %d positions", self._service.name, self._url, slots, length)

    def _on_signal(self, number: int, frame: object) -> None:
        _exit_if_rank_is_lost()
        if self._failure is not None:
            return  # if a rank was lost, torchrun ends the others; this one is about to print the reason
        self._signals += 1
        if self._signals > 1:
            print("ended at once, after a second signal", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self.stop()

    def stop(self) -> None:
        """Refuse new requests, finish those that run, and let `run` return. From any thread."""
        self._service.is_stopping = True
        self._call_soon(self._stop.set)

    async def _drain(self) -> None:
        """Wait until all requests have been answered, or until the time is over, and end the rest."""
        self._service.is_stopping = True
        if self._failure is None and (count := self._unfinished()):
            log.info("finishing %d requests, for up to %g s", count, self._grace)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_first(self._idle(), self._engine_ended.wait()), self._grace)
        self._service.cancel_all("the server is shutting down")
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle(), CLOSE_TIME)

    def _unfinished(self) -> int:
        """The number of requests whose answer is computed, or has not been sent completely."""
        unsent = [one for one in self.server.server_state.connections if one.transport.get_write_buffer_size()]
        return max(self._service.responding, len(unsent))

    async def _idle(self) -> None:
        while self._unfinished():
            await asyncio.sleep(0.05)

    async def _end_engine(self, engine: threading.Thread) -> None:
        if self._llama is not None:
            self._llama.scheduler.stop()
        elif not self._engine_ended.is_set():
            os._exit(0)  # the model is being loaded, which cannot be interrupted, and nothing has been answered yet
        try:
            await asyncio.wait_for(self._engine_ended.wait(), ENGINE_TIME)
        except asyncio.TimeoutError:
            reason = f"the engine has not ended within {ENGINE_TIME} s: its step takes long, or another rank was lost"
            print(f"error: {reason}", file=sys.stderr, flush=True)
            os._exit(1)
        engine.join()


async def _first(*waits: Any) -> None:
    """Wait for the first of these, and cancel the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
