"""Calls, their rows, and the slots of the cache: the state that the scheduler and the planner share."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from llama.engine.requests import Row, Token


class Call:
    """Rows that were submitted together, by one thread.

    rows: with their results so far. error: why the call failed, None if it has not. is_done: nothing more will be added
    to what `take` returns. Other attributes belong to the scheduler.
    """

    def __init__(
        self, rows: list[Row], reuse: object, priority: int, is_read: bool, listener: Callable[[], None] | None
    ):
        self.rows, self.priority, self.is_read, self.listener = rows, priority, is_read, listener
        self.reuses = reuse is not None
        # Rows may use the keys and values that rows of calls with the same key have computed.
        self.key = object() if reuse is None else reuse
        self.error: BaseException | None = None
        self.is_done = False
        self.thread = threading.get_ident()  # the one that reads the results
        self.steps: deque[list[Token]] = deque()  # what is not read yet
        self.tasks: dict[int, Task] = {}  # unfinished rows by their index
        self.waiting: deque[Task] = deque()  # those of them that have no slot
        self.is_new, self.is_numbered = True, False

    def take(self) -> list[Token]:
        """What the steps since the last `take` have added to the rows, in order. From any thread."""
        tokens: list[Token] = []
        while self.steps:
            tokens += self.steps.popleft()
        return tokens


@dataclass(eq=False)
class Task:
    """A row that is waiting for a slot or has one.

    number: the row's number, the same on all ranks. served: the last step that computed a part of its prompt; for a
        new row, the step before the last.
    source, shared: another slot, which will hold the first `shared` ids of this row; they are copied then.
    uniform: the random number for its next id.
    """

    row: Row
    call: "Call"
    number: int = -1
    served: int = 0
    source: "Slot | None" = None
    shared: int = 0
    uniform: float | None = None

    @property
    def scores_prompt(self) -> bool:
        """Whether its prompt is still to be scored."""
        return self.row.echo and self.row.k is not None and not self.row.prompt_logprobs

    @property
    def needed(self) -> int:
        """Number of ids whose keys and values the next step needs. A row that generates nothing needs no last id."""
        return self.row.length if self.row.length < self.row.limit else len(self.row.prompt) - 1

    def draw(self) -> float:
        """The random number for its next id. It stays the same until the id is sampled, also if a step fails."""
        if self.uniform is None:
            self.uniform = self.row.stream.random()
        return self.uniform

    def ids(self, start: int, end: int) -> list[int]:
        """The ids at these positions, of the prompt and the answer."""
        row, n = self.row, len(self.row.prompt)
        return row.prompt[start:end] + (row.tokens[max(0, start - n) : end - n] if end > n else [])


@dataclass(eq=False)
class Slot:
    """A row of the cache.

    ids: the ids whose keys and values it holds. task: the row that uses it. key: that of the call that computed the
    ids; the call itself is not kept, as its results may be large. used: the last step in which it was used. scores, k:
    how many of the ids have been scored, with k alternatives.
    """

    index: int
    ids: list[int] = field(default_factory=list)
    task: Task | None = None
    key: object = None
    used: int = 0
    scores: int = 0
    k: int = 0

    def truncate(self, length: int, scores: int = 0) -> None:
        """Keep the first ids and their scores."""
        del self.ids[length:]
        self.scores = min(self.scores, scores)
