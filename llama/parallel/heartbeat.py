"""How a rank that is gone is noticed.

While ranks add up their parts of the model they keep pace, and a collective that takes too long has lost a rank. But
between these one rank may take its time: it loads from a slower disk, or its user thinks about the next question. There
the others wait in `Heartbeat.all_gather`, as long as it takes, if only the pulse of every rank is heard.
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

RESTART = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store may have the keys of ranks that went before
PARENT = os.getppid()
Store = Any  # dist.Store, whose stubs lack half of it
# Of these, the part that is waited for a rank. The rest is for the end: torchrun gives a rank that is stopped 30 s.
GROUP_TIMEOUT_FACTOR = 0.35
ARRIVAL = 5  # times LLAMA_TIMEOUT for all ranks to come: they may import from a slow disk
LEFT = -(2**40)  # what makes any number of beats negative
# Set when this process is about to end for want of another: torch prints a page where nobody answers at the store.
_ending = threading.Event()
GRACE = 2  # seconds in which torchrun ends this rank if another one of its host was the first to go


class PeerError(RuntimeError):
    """Another rank failed; the message is that rank's."""


class LostRankError(RuntimeError):
    """Another rank is gone, or does not answer."""


def timeout(device_type: str = "cpu") -> float:
    """Seconds in which all ranks have ended once one is lost. Raises ValueError where LLAMA_TIMEOUT is no number."""
    given = os.environ.get("LLAMA_TIMEOUT", "")
    if given and not re.fullmatch(r"[1-9]\d{0,6}", given):
        raise ValueError(f"LLAMA_TIMEOUT is {given!r}, expected whole seconds, such as 120")
    return float(given or (600 if device_type == "cuda" else 60))


class Stores(NamedTuple):
    """The connections of a process to the ranks' store: one for the process group, one for what ranks exchange, one for
    the pulse, as operations on one connection wait for each other. torch looks up the name of each connection's
    address, which takes seconds where no name server answers: they are kept."""

    common: Store
    talk: Store
    beat: Store

    @classmethod
    def of(cls, store: Store) -> "Stores":
        return cls(store, store.clone(), store.clone())

    def group(self, meeting: int) -> Store:
        """For the process group of this meeting of the ranks."""
        return dist.PrefixStore(f"llama/{RESTART}/group/{meeting}", self.common)


def find_stores(rank: int, size: int) -> Stores:
    """The store of the ranks that torchrun's variables name, once all of them have come."""
    limit, started = timedelta(seconds=ARRIVAL * timeout()), time.monotonic()
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    answers: queue.SimpleQueue[Stores | Exception] = queue.SimpleQueue()

    def find() -> None:  # where Ctrl-C is not heard
        try:
            answers.put(Stores.of(next(dist.rendezvous("env://", rank, size, timeout=limit))[0]))
        except Exception as error:
            answers.put(error)

    _start(find)
    answer = answers.get()
    if isinstance(answer, Stores):
        return answer
    if not isinstance(answer, dist.DistNetworkError | dist.DistStoreError):
        raise answer
    reason = str(answer).split("\n")[0]
    if time.monotonic() - started < limit.total_seconds():
        raise LostRankError(f"rank {rank} cannot meet the others at {place}: {reason}") from answer
    raise LostRankError(
        f"rank {rank} found no {size} ranks at {place} in {limit.total_seconds():.0f} s: start all of them, or give "
        f"them more time with LLAMA_TIMEOUT ({reason})"
    ) from answer


class Heartbeat:
    """The pulse of this rank and of the others, who all have one on the same store.

    Operations on a store block for as long as its host does not answer, whatever their timeouts. So none of them runs
    in the thread that waits for the result.
    """

    def __init__(self, stores: Stores, meeting: int, rank: int, size: int):
        prefix = f"llama/{RESTART}/{meeting}"
        self.rank, self.size, self.patience = rank, size, GROUP_TIMEOUT_FACTOR * timeout()
        self._round = self._answered = 0
        self._store = dist.PrefixStore(prefix, stores.talk)
        self._started = time.monotonic()
        self._beats = dict.fromkeys(set(range(size)) - {rank}, 0)  # of the others; negative once they have left
        self._heard: dict[int, float] = {}  # rank -> when its pulse was last heard
        self._stopped = threading.Event()
        self._threads = [_start(self._beat, dist.PrefixStore(prefix, stores.beat))]

    def all_gather(self, value: Any) -> list[Any]:
        """What every rank gives, in rank order; small values. Raises LostRankError once a rank is no longer heard."""
        content = pickle.dumps(value)
        self._round += 1
        keys, old = [f"{self._round}/{rank}" for rank in range(self.size)], f"{self._round - 2}/{self.rank}"
        answers: queue.SimpleQueue[list[bytes] | Exception] = queue.SimpleQueue()

        def talk(store: Store) -> None:
            try:
                store.set(keys[self.rank], content)
                pause = 0.0005
                while not store.check(keys):  # its own wait could not be ended
                    pause = min(1.2 * pause, 0.02)
                    if self._stopped.wait(pause):
                        return
                answers.put(store.multi_get(keys))
                store.add("read", 1)
                store.delete_key(old)  # whoever is in this round has read it
            except Exception as error:
                answers.put(error)

        self._threads[1:] = [_start(talk, self._store)]
        lost: str | None = None
        while True:
            try:
                answer = answers.get(timeout=self.patience / 10)
            except queue.Empty:
                before, lost = lost, self._silence(self.patience) or self._departure()
                if before and lost:  # its last words were not under way, and it was not this rank that was stopped
                    raise LostRankError(lost) from None
                continue
            if isinstance(answer, RuntimeError):
                host = "torchrun, through which it talks to the others" if self.rank == 0 else "the host of rank 0"
                raise LostRankError(f"rank {self.rank} lost {host}: it was killed, or has ended") from answer
            if isinstance(answer, Exception):
                raise answer
            self._answered = self._round
            return [pickle.loads(content) for content in answer]

    def stop(self) -> None:
        """Leave: from here on nobody wonders about this rank's silence."""
        until = time.monotonic() + GRACE if self.rank == 0 and not _ending.is_set() else 0
        with contextlib.suppress(RuntimeError):
            while self._answered == self._round and time.monotonic() < until:
                # Without torchrun the store ends with this process: the others read the last answers first.
                if self._store.add("read", 0) >= self.size * self._round:
                    break
                time.sleep(0.01)
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=1)

    def _beat(self, store: Store) -> None:
        try:
            while not self._stopped.is_set() and not _ending.is_set():
                began = time.monotonic()
                store.add(f"pulse/{self.rank}", 1)
                for rank, last in self._beats.items():
                    if (beat := store.add(f"pulse/{rank}", 0)) != last:
                        self._beats[rank], self._heard[rank] = beat, time.monotonic()
                # Whoever waits for a rank finds out first. Here are those who wait for something else, a user perhaps.
                if line := self._silence(self.patience + 3 * GRACE):
                    return _end(line)
                pause = min(self.patience / 5, 5) if len(self._heard) == len(self._beats) else 0.1
                self._stopped.wait(pause)
                if (late := time.monotonic() - began - pause) > self.patience / 4:  # it was this rank that was stopped
                    self._heard = {rank: when + late for rank, when in self._heard.items()}
                    self._started += late
            if not _ending.is_set():
                store.add(f"pulse/{self.rank}", LEFT)
        except RuntimeError:  # the store is gone with its host: from here on nobody is heard
            ours = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's, which outlives a rank 0
            if self.rank == 0 and ours and not self._stopped.is_set():
                _end("rank 0 lost torchrun, through which it talks to the others: it was killed")

    def _silence(self, limit: float) -> str | None:
        """The rank that has not been heard for so many seconds."""
        now = time.monotonic()
        for rank, beat in self._beats.items():
            silent = now - self._heard.get(rank, self._started)
            if beat >= 0 and silent > (limit if rank in self._heard else ARRIVAL * timeout()):
                return (
                    f"rank {self.rank} has not heard of rank {rank} for {silent:.0f} s: it was killed or is stopped, "
                    "or the network is down"
                )
        return None

    def _departure(self) -> str | None:
        left = [rank for rank, beat in self._beats.items() if beat < 0]
        return f"rank {self.rank} waits for rank {left[0]}, which has ended" if left else None


def _start(function: Callable[..., None], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, daemon=True)  # one that is stuck holds no exit up
    thread.start()
    return thread


def _end(line: str) -> None:
    """End this process, whatever its main thread does."""
    tell_torchrun(line)
    print(f"error: {line}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def lost_rank_message(error: BaseException) -> str | None:
    """The line to print where an error means that another rank is gone; None for other errors."""
    if isinstance(error, LostRankError):
        return str(error)
    rank, text = os.environ.get("RANK", "0"), str(error)
    if not isinstance(error, RuntimeError) or not re.search("gloo/transport|pair closure|Connection closed", text):
        return None
    if found := re.search(r"Timed out waiting (\d+)ms", text):
        return (
            f"rank {rank} has waited {int(found[1]) / 1000:g} s for another rank: it hangs or is stopped, or the "
            "network is down (LLAMA_TIMEOUT=SECONDS gives it more time)"
        )
    peer = re.search(r"\[([0-9a-fA-F.:]+)\]:\d+", text)
    return f"rank {rank} lost a rank on {peer[1] if peer else 'another host'}: it was killed, or ended with an error"


def final_message(error: BaseException) -> str | None:
    """`lost_rank_message`, after a wait: torchrun reports the first rank of a host that exits."""
    if line := lost_rank_message(error):
        _ending.set()
        sys.stderr.flush()
        time.sleep(GRACE)
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT:
            line = f"rank {os.environ.get('RANK')} lost torchrun, which started it: it was killed"
    return line


def hide_lost_rank_traceback(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A `sys.excepthook` with one line instead of a traceback where another rank is gone."""

    def short(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if line := final_message(error):
            tell_torchrun(line)
            print(f"error: {line}", file=sys.stderr, flush=True)
        else:
            hook(kind, error, trace)

    return short


def tell_torchrun(problem: str) -> None:
    """Leave it where torchrun looks for what it names last, as the cause."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": f"error: {problem}", "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):  # a full disk may be the cause that is told
            Path(file).write_text(json.dumps({"message": message}))
