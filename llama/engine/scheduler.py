"""The scheduler: rows enter and leave the slots of the cache between steps.

A step computes the next id of every running row, and up to `prefill_chunk` ids of prompts. Whoever waits for a result
runs steps: the first thread that waits runs one for all calls, the others wait for it. A call whose reader pauses (a
stream) takes no part in the steps that its own thread runs for other calls, so nothing is computed before it is read.

Several ranks make the same calls, one after the other. Rank 0 plans each step, the others follow. `run` is for programs
in which only rank 0 makes calls.
"""

import contextlib
import threading
import zlib
from collections.abc import Callable, Generator, Iterator

from llama.accelerate.executor import Executor
from llama.engine.calls import Call, Task
from llama.engine.plan import Chunk, Plan, share
from llama.engine.planner import Planner, Usage
from llama.engine.requests import Row, Token, alternatives
from llama.engine.worker import Outcome, Worker, not_finite
from llama.parallel.groups import all_gather_object, broadcast_object, is_main_rank, model_parallel
from llama.parallel.heartbeat import lost_rank_message

READ_AHEAD = 16  # steps that a stream may be ahead of a reader in another thread


class Scheduler:
    """Runs the rows of any number of calls, from any thread, on the max_batch_size slots of one model's cache."""

    def __init__(self, executor: Executor, pad_id: int):
        self._pad_id = pad_id
        self._condition = threading.Condition()
        self._runner: int | None = None  # the thread that runs a step, or has the model for itself
        self._calls: list[Call] = []  # unfinished ones, in order of submission
        self._open: dict[object, int] = {}  # calls whose results are not all read yet -> their thread
        self._tasks: dict[int, Task] = {}  # unfinished rows by number
        self._next_number = 0
        self._last_turn: object = None  # `turn` of the last `_take_turn`
        self._only_rank_0_calls = False  # set by `run`
        self._is_stopping = self._is_closed = False
        self._set_executor(executor)

    def _set_executor(self, executor: Executor) -> None:
        self._worker, self._planner = Worker(executor, self._pad_id), Planner(executor)

    @property
    def executor(self) -> Executor:
        """The executor that runs the model. Raises ValueError after `close`."""
        if self._is_closed:
            raise ValueError("this model is closed: build it again")
        return self._worker.executor

    @executor.setter
    def executor(self, executor: Executor) -> None:
        with self._model_for_this_thread():
            self._planner.evict_all()  # rows continue on the new model, which computes them from their beginning
            self._set_executor(executor)

    def close(self) -> None:
        """Free the model. Unfinished calls raise ValueError."""
        with self._model_for_this_thread():
            self._is_closed = True
            for call in list(self._calls):
                self._fail(call, ValueError("this model is closed: build it again"))
            del self._worker, self._planner

    # Calls

    def submit(
        self,
        rows: list[Row],
        *,
        reuse: object = None,
        priority: int = 0,
        is_read: bool = False,
        listener: Callable[[], None] | None = None,
    ) -> Call:
        """Queue rows, from any thread. Read the results with `steps`, or with a listener and `Call.take`.

        reuse: use keys and values that earlier calls with the same `reuse` left in the cache. They are right only if
            nobody has written to the model's weights since.
        priority: calls with a lower number get slots first, those with the same number in order of submission.
        is_read: user code runs between the steps, and may change the model.
        listener: called without arguments, by the thread that runs the steps, when there is something to `take` or the
            call is done. It must return quickly.
        """
        call = Call(rows, reuse, priority, is_read, listener)
        with self._condition:
            _ = self.executor  # raises if the model is closed
            self._check_reentry()
            self._wait_for_other_threads()
            if listener is None:
                self._open[call] = call.thread
            ended: list[Token] = []
            for row in rows:
                if row.echo and row.k is not None and not row.is_scored:  # a single id, which nothing predicts
                    row.prompt_logprobs, row.prompt_top = [0.0], [[]]
                if row.finish_reason is None and row.length >= row.limit and not row.is_scored:
                    row.finish_reason = "length"
                    ended.append(Token(row.index, finish_reason="length"))
                elif row.finish_reason is None:
                    call.tasks[row.index] = Task(row, call)
            call.waiting.extend(call.tasks.values())
            if ended:
                call.steps.append(ended)
            call.is_done = not call.tasks
            if call.tasks:
                self._calls.append(call)
            self._condition.notify_all()
        if listener is not None and call.steps:
            listener()
        return call

    def steps(self, call: Call) -> Generator[list[Token], None, None]:
        """Yield what each step has added to the call's rows. Runs steps, unless another thread does. Raises the call's
        error."""
        while True:
            step: list[Token] | None = None
            try:
                with self._condition:
                    call.thread = threading.get_ident()
                    self._condition.wait_for(lambda: call.steps or call.is_done or self._runner is None)
                    if call.steps:
                        step = call.steps.popleft()
                    elif call.error is not None:
                        raise call.error
                    elif call.is_done:
                        self._open.pop(call, None)
                        self._condition.notify_all()
                        return
                    else:
                        self._runner = call.thread
                if step is None:
                    self._step(call)
            finally:
                self._release_model()
            if step is not None:
                yield step

    def usage(self) -> Usage:
        """For metrics, from any thread."""
        return self._planner.usage(sum(len(call.waiting) for call in list(self._calls)))

    def cancel(self, call: Call) -> None:
        """Drop the unfinished rows of a call, from any thread. Their slots are free for the next step."""
        with self._condition:
            self._drop(call)
            self._open.pop(call, None)
            self._condition.notify_all()

    def cut(self, call: Call, row: Row, n: int) -> None:
        """Keep the first `n` generated ids of a row of this call, and end the row. From any thread."""
        with self._condition:
            row.cut(n)
            if row.index in call.tasks:
                self._end(call.tasks[row.index])
                call.is_done = not call.tasks

    def _end(self, task: Task) -> None:
        """The row has ended, or is dropped."""
        call = task.call
        if call.tasks.pop(task.row.index, None) is None:
            return
        self._tasks.pop(task.number, None)
        self._planner.release(task)
        if task in call.waiting:
            call.waiting.remove(task)
        if not call.tasks:
            self._calls.remove(call)

    def _drop(self, call: Call) -> None:
        call.waiting.clear()
        for task in list(call.tasks.values()):
            self._end(task)
        call.is_done = True

    def _fail(self, call: Call, error: BaseException) -> None:
        call.error = call.error or error
        self._drop(call)

    # Steps

    def _step(self, driver: Call | None) -> None:
        """Run one step. driver: the call whose thread runs it; None in `run`. An error becomes that of all calls in the
        step."""
        calls = [] if driver is None else [driver]
        try:
            if driver is not None and not self._only_rank_0_calls:
                rows = [task.row for task in driver.tasks.values()] if driver is not self._last_turn else []
                self._take_turn(driver, [(row.prompt, len(row.tokens)) for row in rows])
            plan, tasks = Plan(), list[Task]()
            with self._condition:
                calls = self._participants(driver)
                self._number(calls)
                if is_main_rank():
                    plan, tasks = self._planner.plan(calls)
            plan = share(plan) or plan
            outcomes = self._worker.run(plan, [task.row for task in tasks], [task.draw() for task in tasks])
            with self._condition:
                calls = self._store(plan, outcomes)
        except BaseException as error:
            with self._condition:
                self._planner.forget()
                self._worker.forget()
                for call in calls if isinstance(error, Exception) else ():
                    self._fail(call, error)
            leads = self._only_rank_0_calls and model_parallel()[1] > 1  # the other ranks cannot skip this step
            if not isinstance(error, Exception) or lost_rank_message(error) or leads:
                raise
        finally:
            for call in calls:
                if call.listener is not None:
                    call.listener()

    def _participants(self, driver: Call | None) -> list[Call]:
        """The calls of the next step: the driver's, and those of other threads, unless their readers are slow."""
        me = threading.get_ident()
        calls = [
            call
            for call in self._calls
            if call is driver
            or (
                (call.listener is not None or call.thread != me)
                and not (call.is_read and len(call.steps) >= READ_AHEAD)
                and (model_parallel()[1] == 1 or self._only_rank_0_calls)
            )
        ]
        return sorted(calls, key=lambda call: call.priority)

    def _number(self, calls: list[Call]) -> None:
        """Number the rows of new calls. The plan that other ranks receive names rows by number."""
        for call in calls:
            for task in () if call.is_numbered else call.tasks.values():
                task.number = self._next_number
                self._tasks[task.number] = task
                self._next_number += 1
            call.is_numbered = True

    def _store(self, plan: Plan, outcomes: list[Outcome]) -> list[Call]:
        """Add the results of a step to its rows. Returns the calls for which there is something new."""
        new: dict[Call, list[Token]] = {}
        self._planner.ran()
        for chunk in plan.chunks:
            self._planner.computed(chunk, len(self._worker.scores.get(chunk.slot, [])))
        for chunk, outcome in zip(plan.chunks, outcomes, strict=True):
            task = self._tasks.get(chunk.number)  # None for a row that was dropped during the step
            if outcome.problem:
                self._planner.clear(chunk.slot)
                if task is not None:
                    at = f" {len(task.row.tokens)}" if outcome.problem == "at step" else ""
                    self._fail(task.call, not_finite(f"{outcome.problem}{at}, row {task.row.index}"))
                    new.setdefault(task.call, [])
            elif task is not None and (token := self._advance(task, chunk, outcome)) is not None:
                new.setdefault(task.call, []).append(token)
        for call, tokens in new.items():
            if tokens:
                call.steps.append(sorted(tokens, key=lambda token: token.row))
            call.is_done = not call.tasks  # last: a reader in another thread then takes the last tokens
        return list(new)

    def _advance(self, task: Task, chunk: Chunk, outcome: Outcome) -> Token | None:
        """What a chunk adds to its row: an id, the row's end, both, or nothing yet."""
        row, scores = task.row, self._worker.scores.get(chunk.slot, [])
        if task.scores_prompt and chunk.end >= len(row.prompt) - 1 and len(scores) >= len(row.prompt):
            found = [alternatives(values, (len(values) - 1) // 2) for values in scores[: len(row.prompt)]]
            row.prompt_logprobs = [logprob for logprob, _ in found]
            row.prompt_top = [top[: row.k] for _, top in found]
        if outcome.id is None:
            if row.length < row.limit or not row.prompt_logprobs:
                return None
            row.finish_reason = "length"
            self._end(task)
            return Token(row.index, finish_reason="length")
        task.uniform = None
        if outcome.id in row.stop:
            row.finish_reason = "stop"
            self._end(task)
            return Token(row.index, finish_reason="stop")
        row.tokens.append(outcome.id)
        logprob, top = outcome.score
        if row.k is not None:
            row.logprobs.append(logprob)
            row.top.append(top)
        if row.length >= row.limit:
            row.finish_reason = "length"
            self._end(task)
        return Token(row.index, outcome.id, logprob if row.k is not None else None, top, row.finish_reason)

    # Threads and ranks

    @contextlib.contextmanager
    def exclusive(self, ids: object) -> Iterator[None]:
        """Context in which this thread has the model for itself. It may overwrite the cache.

        ids: what it is going to compute; ranks compare it. With several ranks, every rank enters.
        """
        with self._model_for_this_thread():
            self._take_turn(object(), ids)
            yield

    @contextlib.contextmanager
    def one_call(self) -> Iterator[None]:
        """Context around several `exclusive` ones. With several ranks it waits until the calls of other threads have
        ended, and they wait for its end."""
        key = object()
        with self._condition:
            self._wait_for_other_threads()
            self._open[key] = threading.get_ident()
        try:
            yield
        finally:
            with self._condition:
                del self._open[key]
                self._condition.notify_all()

    def _wait_for_other_threads(self) -> None:
        """With several ranks the calls of two threads could run in a different order on each rank."""
        if model_parallel()[1] > 1 and not self._only_rank_0_calls:
            me = threading.get_ident()
            self._condition.wait_for(lambda: all(thread == me for thread in self._open.values()))

    @contextlib.contextmanager
    def _model_for_this_thread(self) -> Iterator[None]:
        self._check_reentry()
        try:
            with self._condition:
                self._condition.wait_for(lambda: self._runner is None)
                _ = self.executor  # raises if the model is closed
                self._runner = threading.get_ident()
            yield
        finally:
            self._release_model()

    def _release_model(self) -> None:
        with self._condition:
            if self._runner == threading.get_ident():
                self._runner = None
                self._condition.notify_all()

    def _check_reentry(self) -> None:
        if self._runner == threading.get_ident():
            raise RuntimeError("this call was made within a forward pass, by a hook for instance: make it afterwards")

    def _take_turn(self, turn: object, ids: object) -> None:
        """Check that all ranks are about to run the same step, and wait for late ones. Skipped if the last step was of
        the same turn.

        turn: the call. ids: the input of the step. Raises RuntimeError on every rank if threads reached the ranks in
        different orders.
        """
        if turn is not self._last_turn and model_parallel()[1] > 1:
            self._last_turn = None
            gathered = all_gather_object((zlib.crc32(repr(ids).encode()), self._next_number))
            if len({checksum for checksum, _ in gathered}) > 1:
                raise RuntimeError(
                    "calls of several threads reached the ranks in different orders: make all calls "
                    "from one thread where there are several ranks"
                )
            self._last_turn, self._next_number = turn, gathered[0][1]

    def run(self) -> None:
        """Run the steps of all calls until `stop`. For programs in which only rank 0 makes calls: the other ranks call
        `run` too, and follow rank 0."""
        self._only_rank_0_calls = True
        if not is_main_rank():
            while broadcast_object():
                while (plan := share(None)) is not None:
                    self._worker.run(plan, (), ())
            return
        while self._claim_for_calls(timeout=None):
            broadcast_object(True)  # the other ranks wait for it without limit
            is_busy = True
            while is_busy:
                try:
                    self._step(None)
                finally:
                    self._release_model()
                is_busy = self._claim_for_calls(timeout=0)
            share(None)
        broadcast_object(False)

    def stop(self) -> None:
        """Let `run` return after its current step. From any thread."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify_all()

    def _claim_for_calls(self, timeout: float | None) -> bool:
        """Wait until there is something to compute, and take the model for it. Returns False after `stop`."""

        def can_start() -> bool:
            return self._runner is None and bool(self._participants(None))

        with self._condition:
            self._condition.wait_for(lambda: self._is_stopping or can_start(), timeout)
            if self._is_stopping or not can_start():
                return False
            self._runner = threading.get_ident()
            return True
