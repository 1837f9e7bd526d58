"""How ranks detect that another rank is lost, and report it in one line.

Detection: inside a forward pass all ranks run the same collectives, so a collective that times out, or whose connection
closes, means that a rank is lost. Between forward passes a rank may be slow for a good reason: it loads from a slow
disk, or waits for its user's next question. There the ranks wait in `Heartbeat.all_gather`, which has no timeout.
Instead a thread of each rank increments a counter in the ranks' key-value store (the heartbeat) and reads the counters
of the others. A rank whose counter does not change for a third of LLAMA_TIMEOUT is lost. `Heartbeat.stop` makes the
counter negative, so a rank that exits normally does not look silent.

Reports: `all_gather` raises LostRankError, a collective raises RuntimeError; `lost_rank_message` turns either into one
line for the user. If the main thread does something else, such as waiting for input, the heartbeat's thread prints
the line and ends the process. Before it exits, a rank waits for EXIT_DELAY seconds, because torchrun reports the rank
that exits first. That should be the rank that failed, not one that detected it.
"""

import contextlib
import json
import os
import pickle
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

RESTART_COUNT = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # keys of an earlier run may still be in the store
PARENT_PID = os.getppid()
Store = Any  # dist.Store, whose stubs lack half of it
# The part of LLAMA_TIMEOUT after which a rank counts as lost. The rest is for the exit: torchrun waits 30 s before it
# kills a suspended rank.
LOST_FACTOR = 0.35
RENDEZVOUS_FACTOR = 5  # times LLAMA_TIMEOUT for all ranks to connect: they may import packages from a slow disk
DEPARTED = -(2**40)  # added to a heartbeat counter to make it negative
EXIT_DELAY = 2  # seconds; if another rank of this host failed first, torchrun ends this one within this time
HANDLER_SECONDS = 10  # for a program's own SIGTERM handler, after a rank is lost
# Set when this process is about to exit because another rank is lost. The heartbeat then stops using the store, whose
# host may be gone: torch logs a page for each operation that fails.
_exiting = threading.Event()
_terminated = threading.Event()  # set by `_terminate`


class PeerError(RuntimeError):
    """Another rank failed; the message is that rank's."""


class LostRankError(RuntimeError):
    """Another rank has exited, was killed, or does not answer."""


def exit_timeout(device_type: str = "cpu") -> float:
    """Seconds within which all ranks exit once one is lost: LLAMA_TIMEOUT, else 600 on cuda and 60 elsewhere.

    Raises ValueError if LLAMA_TIMEOUT is not a positive integer below 10,000,000.
    """
    value = os.environ.get("LLAMA_TIMEOUT", "")
    if value and not re.fullmatch(r"[1-9]\d{0,6}", value):
        raise ValueError(f"LLAMA_TIMEOUT is {value!r}, expected an integer of seconds, such as 120")
    return float(value or (600 if device_type == "cuda" else 60))


class Stores(NamedTuple):
    """This process's connections to the ranks' store, one for each use, as operations on one connection wait for each
    other.

    The connections are kept for later models: for each new connection torch looks up the store's host name, which takes
    seconds if no name server answers.
    """

    process_group: Store
    exchange: Store
    heartbeat: Store

    @classmethod
    def of(cls, store: Store) -> "Stores":
        return cls(store, store.clone(), store.clone())

    def for_process_group(self, generation: int) -> Store:
        """The store of the process group of this `generation` (see `groups.connect_ranks`), with keys of its own."""
        return dist.PrefixStore(f"llama/{RESTART_COUNT}/group/{generation}", self.process_group)


def rendezvous(rank: int, size: int) -> Stores:
    """Connect to the store that torchrun's variables name, and wait until all ranks have connected.

    Waits for up to RENDEZVOUS_FACTOR * LLAMA_TIMEOUT seconds. Raises LostRankError if the store cannot be reached or
    ranks are missing by then.
    """
    limit, started = timedelta(seconds=RENDEZVOUS_FACTOR * exit_timeout()), time.monotonic()
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    results: queue.SimpleQueue[Stores | Exception] = queue.SimpleQueue()

    def connect() -> None:
        try:
            results.put(Stores.of(next(dist.rendezvous("env://", rank, size, timeout=limit))[0]))
        except Exception as error:
            results.put(error)

    _start_thread(connect)  # in a thread, as Ctrl-C interrupts the wait for a queue, but not torch's C++ code
    result = results.get()
    if isinstance(result, Stores):
        return result
    if not isinstance(result, dist.DistNetworkError | dist.DistStoreError):
        raise result
    reason = str(result).split("\n")[0]
    if time.monotonic() - started < limit.total_seconds():
        raise LostRankError(f"rank {rank} cannot connect to the other ranks at {address}: {reason}") from result
    raise LostRankError(
        f"rank {rank} waited {limit.total_seconds():.0f} s for {size} ranks to connect to {address}: start all of "
        f"them, or give them more time with LLAMA_TIMEOUT ({reason})"
    ) from result


class Heartbeat:
    """This rank's heartbeat, those of the other ranks, and an exchange of values that fails when one of them stops.

    `generation` distinguishes the keys of this heartbeat from those of earlier ones in the same store; all ranks must
    pass the same. While the store's host does not answer, an operation on the store blocks, even beyond its timeout. So
    `all_gather` runs these operations in a thread and waits for the result, which Ctrl-C and the checks below can
    interrupt.
    """

    def __init__(self, stores: Stores, generation: int, rank: int, size: int):
        prefix = f"llama/{RESTART_COUNT}/{generation}"
        self.rank, self.size = rank, size
        self.timeout = LOST_FACTOR * exit_timeout()  # seconds without a heartbeat after which a rank is lost
        self._round = self._completed_round = 0  # of all_gather
        self._store = dist.PrefixStore(prefix, stores.exchange)
        self._started = time.monotonic()
        self._counters = dict.fromkeys(set(range(size)) - {rank}, 0)  # the other ranks' counters, as last read
        self._last_heard: dict[int, float] = {}  # rank -> when its counter last changed
        self._stopped = threading.Event()
        self._threads = [_start_thread(self._run, dist.PrefixStore(prefix, stores.heartbeat))]

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank. Values are pickled; a store holds 8 MB at most.

        Waits without limit while the heartbeats of all ranks continue. Raises LostRankError once a rank is silent or
        has exited, and what pickle raises for `value`.
        """
        content = pickle.dumps(value)
        self._round += 1
        keys, old_key = [f"{self._round}/{rank}" for rank in range(self.size)], f"{self._round - 2}/{self.rank}"
        results: queue.SimpleQueue[list[bytes] | Exception] = queue.SimpleQueue()

        def exchange(store: Store) -> None:
            try:
                store.set(keys[self.rank], content)
                pause = 0.0005
                while not store.check(keys):  # store.wait cannot be interrupted
                    pause = min(1.2 * pause, 0.02)
                    if self._stopped.wait(pause):
                        return
                results.put(store.multi_get(keys))
                store.add("read", 1)
                store.delete_key(old_key)  # all ranks are in this round, so they have read it
            except Exception as error:
                results.put(error)

        self._threads[1:] = [_start_thread(exchange, self._store)]
        problem: str | None = None
        while True:
            try:
                result = results.get(timeout=self.timeout / 10)
            except queue.Empty:
                previous, problem = problem, self._find_silent_rank(self.timeout) or self._find_departed_rank()
                # Raise only at the second problem in a row. At the first one, the value of a rank that has exited may
                # still be on its way, or this process was suspended, so that all ranks seem silent.
                if previous and problem:
                    raise LostRankError(problem) from None
                continue
            if isinstance(result, RuntimeError):
                host = "torchrun, which connects the ranks" if self.rank == 0 else "the host of rank 0"
                raise LostRankError(f"rank {self.rank} lost {host}: it was killed, or has exited") from result
            if isinstance(result, Exception):
                raise result
            self._completed_round = self._round
            return [pickle.loads(content) for content in result]

    def stop(self) -> None:
        """Stop the heartbeat, and announce to the other ranks that this one exits normally.

        Without torchrun rank 0 hosts the store, which ends with its process. So rank 0 first waits,
        for up to EXIT_DELAY seconds, until all ranks have read the values of the last round.
        """
        until = time.monotonic() + EXIT_DELAY if self.rank == 0 and not _exiting.is_set() else 0
        with contextlib.suppress(RuntimeError):
            while self._completed_round == self._round and time.monotonic() < until:
                if self._store.add("read", 0) >= self.size * self._round:
                    break
                time.sleep(0.01)
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=1)

    def _run(self, store: Store) -> None:
        """The heartbeat's thread: increment this rank's counter, read those of the others."""
        try:
            while not self._stopped.is_set() and not _exiting.is_set():
                began = time.monotonic()
                store.add(f"heartbeat/{self.rank}", 1)
                for rank, last in self._counters.items():
                    if (counter := store.add(f"heartbeat/{rank}", 0)) != last:
                        self._counters[rank], self._last_heard[rank] = counter, time.monotonic()
                # If the main thread is in all_gather or a collective, these raise first. The longer limit here is for a
                # main thread that waits for something else.
                if problem := self._find_silent_rank(self.timeout + 3 * EXIT_DELAY):
                    return _terminate(problem)
                pause = min(self.timeout / 5, 5) if len(self._last_heard) == len(self._counters) else 0.1
                self._stopped.wait(pause)
                # Much later than planned: this process was suspended. That time does not count as others' silence.
                if (late := time.monotonic() - began - pause) > self.timeout / 4:
                    self._last_heard = {rank: heard + late for rank, heard in self._last_heard.items()}
                    self._started += late
            if not _exiting.is_set():
                store.add(f"heartbeat/{self.rank}", DEPARTED)
        except RuntimeError:  # the store's host is gone
            has_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # in torchrun's own process
            if self.rank == 0 and has_agent_store and not self._stopped.is_set():
                _terminate("rank 0 lost torchrun, which connects the ranks: it was killed")

    def _find_silent_rank(self, limit: float) -> str | None:
        """A message about a rank whose heartbeat was last heard more than `limit` seconds ago; None without one."""
        now = time.monotonic()
        for rank, counter in self._counters.items():
            silent = now - self._last_heard.get(rank, self._started)
            if counter >= 0 and silent > (limit if rank in self._last_heard else RENDEZVOUS_FACTOR * exit_timeout()):
                return (
                    f"rank {self.rank} has not heard from rank {rank} for {silent:.0f} s: it was killed or is "
                    "suspended, or the network is down"
                )
        return None

    def _find_departed_rank(self) -> str | None:
        departed = [rank for rank, counter in self._counters.items() if counter < 0]
        return f"rank {self.rank} waits for rank {departed[0]}, which has exited" if departed else None


def _start_thread(function: Callable[..., None], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, daemon=True)  # a blocked daemon does not delay the exit
    thread.start()
    return thread


def is_rank_lost() -> bool:
    """Whether a SIGTERM comes from this process's own heartbeat. Then a rank is lost, and the reason is printed."""
    return _terminated.is_set()


def _terminate(message: str) -> None:
    """Print `message` and end this process, whatever its main thread is doing."""
    _terminated.set()
    write_torchrun_error(message)
    print(f"error: {message}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    # Python runs handlers in the main thread, which may wait for the GPU: for a collective that never ends.
    time.sleep(HANDLER_SECONDS)
    os._exit(1)


def lost_rank_message(error: BaseException) -> str | None:
    """One line for the user if `error` means that another rank is lost, else None."""
    if isinstance(error, LostRankError):
        return str(error)
    rank, text = os.environ.get("RANK", "0"), str(error)
    if not isinstance(error, RuntimeError) or not re.search("gloo/transport|pair closure|Connection closed", text):
        return None
    if match := re.search(r"Timed out waiting (\d+)ms", text):
        return (
            f"rank {rank} has waited {int(match[1]) / 1000:g} s for another rank: it hangs or is suspended, or the "
            "network is down (LLAMA_TIMEOUT=SECONDS gives it more time)"
        )
    peer = re.search(r"\[([0-9a-fA-F.:]+)\]:\d+", text)
    return f"rank {rank} lost a rank on {peer[1] if peer else 'another host'}: it was killed, or ended with an error"


def prepare_lost_rank_exit(error: BaseException) -> str | None:
    """`lost_rank_message(error)`, for a process that prints it and exits.

    If there is a message, this stops the heartbeat and waits EXIT_DELAY seconds, so that torchrun reports the lost rank
    as the first to exit, not this one.
    """
    message = lost_rank_message(error)
    if message:
        _exiting.set()
        sys.stderr.flush()
        time.sleep(EXIT_DELAY)
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT_PID:
            message = f"rank {os.environ.get('RANK')} lost torchrun, which started it: it was killed"
    return message


def lost_rank_excepthook(previous: Callable[..., Any]) -> Callable[..., Any]:
    """A `sys.excepthook` that prints one line if another rank is lost, and calls `previous` for other errors."""

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if message := prepare_lost_rank_exit(error):
            write_torchrun_error(message)
            print(f"error: {message}", file=sys.stderr, flush=True)
        else:
            previous(kind, error, trace)

    return excepthook


def write_torchrun_error(message: str) -> None:
    """Write `message` to this rank's error file, from which torchrun reads the cause that it prints last."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": f"error: {message}", "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):  # a full disk may be the very error
            Path(file).write_text(json.dumps({"message": content}))
