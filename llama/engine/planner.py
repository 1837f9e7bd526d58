"""Plans steps, on rank 0: which rows get a slot, which prefixes are shared, which part of which prompt is computed."""

from collections.abc import Sequence
from typing import NamedTuple

from llama.accelerate.executor import Executor
from llama.engine.calls import Call, Slot, Task
from llama.engine.plan import Chunk, Plan
from llama.engine.slots import MIN_SHARED, choose_slot, find_prefix

# One more pass reads all weights again. It takes about as long as this number of additional ids in an existing pass.
PASS_COST = 64


class Usage(NamedTuple):
    """Rows that have a slot, and rows that wait for one; cached: positions of the cache that hold keys and values."""

    slots: int
    running: int
    waiting: int
    cached: int


class Planner:
    """The slots of a model's cache and the rows in them.

    In most models each row is at a position of its own, and may enter and leave at any step. A custom model (see
    `Executor.is_aligned`) computes a group of rows of one call and one length, in slots 0, 1, ..., until all have
    ended.
    """

    def __init__(self, executor: Executor):
        self.executor = executor
        self.slots = [Slot(i) for i in range(executor.model.params.max_batch_size)]
        self._group: list[Task] = []  # of a custom model
        self._was_aligned = executor.is_aligned
        self._passes = executor.passes  # the slots are right while executor.passes stays the same
        self._rebuilds = executor.rebuilds
        self._cleared: list[int] = []  # slots to clear in the next plan
        self._must_refresh = True
        self._step = 0

    # Changes of the slots

    def forget(self) -> None:
        """The cache no longer holds what the slots say. Rows in slots are computed again."""
        for slot in self.slots:
            slot.truncate(0)
        for task in reversed(self._group):
            self._evict(task)
        self._group, self._must_refresh = [], True

    def computed(self, chunk: Chunk, scores: int) -> None:
        """A step has computed a chunk. scores: number of ids of its slot that are scored."""
        slot = self.slots[chunk.slot]
        slot.ids[chunk.start :] = chunk.ids
        slot.used = self._step
        if chunk.scores:
            slot.scores, slot.k = scores, chunk.k or 0

    def ran(self) -> None:
        """A step has run to its end."""
        self._passes = self.executor.passes

    def release(self, task: Task) -> None:
        """The row has ended. Its slot keeps the ids, for rows with the same prefix."""
        for slot in self.slots:
            if slot.task is task:
                slot.task = None

    def clear(self, index: int) -> None:
        """A row in this slot got values that are not finite, which would spread even from positions that are masked.
        Slots that no row uses may hold such values too, from other forwards of the model."""
        for slot in self.slots:
            if slot.index == index or slot.task is None:
                slot.truncate(0)
                self._cleared.append(slot.index)

    def evict_all(self) -> None:
        """Take the slots from all rows. They wait again, and are computed again."""
        for slot in reversed(self.slots):
            if slot.task is not None:
                self._evict(slot.task)
        self._group = []

    def _evict(self, task: Task) -> None:
        self.release(task)
        if task.row.index in task.call.tasks:  # else the row has ended or was dropped
            task.source = None
            task.call.waiting.appendleft(task)

    def usage(self, waiting: int) -> Usage:
        running = sum(slot.task is not None for slot in self.slots)
        return Usage(len(self.slots), running, waiting, sum(len(slot.ids) for slot in self.slots))

    # Plans

    def plan(self, calls: Sequence[Call]) -> tuple[Plan, list[Task]]:
        """The next step of these calls, and the rows whose next id it samples, in the order of their chunks."""
        self._step += 1
        plan = Plan(refresh=self._must_refresh or any(call.is_read or call.is_new for call in calls))
        for call in calls:
            call.is_new = False
        self._must_refresh = False
        if plan.refresh:
            self.executor.refresh()
        if self.executor.passes != self._passes:  # the program has called the model, which overwrote the cache
            self.forget()
        elif self.executor.rebuilds != self._rebuilds:  # the model was changed; rows continue with what they have
            for slot in self.slots:
                slot.truncate(len(slot.ids) if slot.task else 0)
        self._rebuilds = self.executor.rebuilds
        if self.executor.is_aligned != self._was_aligned:
            self._was_aligned = self.executor.is_aligned
            self.evict_all()
            self.forget()
        plan.cleared, self._cleared = self._cleared, []
        if self.executor.is_aligned:
            tasks = self._plan_group(plan, calls[0])
        else:
            for slot in self.slots:  # before new rows get the slots that hold the prefixes
                if slot.task is not None and slot.task.call in calls:
                    self._waits_for_prefix(plan, slot, slot.task, calls)
            self._admit(plan, calls)
            tasks = self._plan_passes(plan, calls)
        sampling = {chunk.number for chunk in plan.chunks if chunk.samples}
        return plan, [task for task in tasks if task.number in sampling]

    def _admit(self, plan: Plan, calls: Sequence[Call]) -> None:
        """Give slots to waiting rows. If none is free, take that of a row whose call is paused."""
        for call in calls:
            while call.waiting:
                free = [slot for slot in self.slots if slot.task is None]
                if not free:
                    paused = [slot for slot in self.slots if slot.task and slot.task.call not in calls]
                    if not paused:
                        return
                    free = [min(paused, key=lambda slot: slot.used)]
                    task = free[0].task
                    assert task is not None
                    self._evict(task)
                self._place(plan, call.waiting.popleft(), free)

    def _place(self, plan: Plan, task: Task, free: Sequence[Slot]) -> None:
        # User code in the model, such as hooks, sees whole prompts.
        prefix = None if self.executor.runs_user_code else find_prefix(self.slots, task)
        slot = choose_slot(free, prefix, task.call.reuses)
        for other in self.slots:
            if other.task is not None and other.task.source is slot:
                other.task.source = None  # or this row might wait for that one, which waits for this slot
        slot.task, task.source = task, None
        task.served = self._step - 2  # its first part comes before the next parts of rows that were served last
        if prefix is not None and prefix.slot is slot:
            slot.truncate(prefix.length, prefix.scores)
            self._count_reused(task, prefix.length)
        else:
            slot.truncate(0)
            if prefix is not None and prefix.length >= MIN_SHARED:
                task.source, task.shared = prefix.slot, prefix.length
        slot.key = task.call.key

    def _plan_passes(self, plan: Plan, calls: Sequence[Call]) -> list[Task]:
        """Fill `plan.passes`: one pass for all rows of which one id is missing, others for parts of prompts."""
        decoding, prompts = list[Slot](), list[Slot]()
        for slot in self.slots:
            task = slot.task
            if task is None or task.call not in calls or self._waits_for_prefix(plan, slot, task, calls):
                continue
            is_next = task.needed - len(slot.ids) == 1 and slot.ids
            (decoding if is_next else prompts).append(slot)
        if decoding:
            plan.passes.append([self._chunk(slot, 1) for slot in decoding])
        parts = self._divide(prompts)
        for group in group_by_length(parts, self.executor.model.params.max_seq_len):
            plan.passes.append([self._chunk(slot, n) for slot, n in group])
        return [self._task(chunk.slot) for chunk in plan.chunks]

    def _task(self, index: int) -> Task:
        task = self.slots[index].task
        assert task is not None  # only slots in use are planned
        return task

    def _waits_for_prefix(self, plan: Plan, slot: Slot, task: Task, calls: Sequence[Call]) -> bool:
        """Copy the prefix from the slot that computes it, once it is complete. Returns whether it is not yet."""
        source = task.source
        if source is None:
            return False
        prefix = task.ids(0, task.shared)
        if source.ids[: task.shared] == prefix and (not task.scores_prompt or source.scores > task.shared):
            plan.copies.append((source.index, slot.index, task.shared))
            slot.ids = prefix
            self._count_reused(task, task.shared)
            slot.scores, slot.k = min(source.scores, task.shared + task.scores_prompt), source.k
        elif source.task is not None and source.task.call in calls and source.task.ids(0, task.shared) == prefix:
            return True
        task.source = None
        return False

    def _count_reused(self, task: Task, length: int) -> None:
        if not task.row.tokens:
            task.row.reused = length

    def _divide(self, slots: Sequence[Slot]) -> list[tuple[Slot, int]]:
        """Which slots compute how many ids: together `prefill_chunk`, of those first that were served longest ago."""
        whole = self.executor.runs_user_code
        chunk = left = self.executor.prefill_chunk
        parts: list[tuple[Slot, int]] = []
        oldest = min((self._task(slot.index).served for slot in slots), default=0)
        for slot in sorted(slots, key=lambda slot: (self._task(slot.index).served, self._task(slot.index).number)):
            task = self._task(slot.index)
            n = task.needed - len(slot.ids)
            # A small part of a prompt would take a pass of its own. A part of a long one that was served later would
            # delay the first tokens of prompts that this step completes.
            if not whole and n > left and (left < chunk // 2 or task.served > oldest):
                continue
            if not whole:
                n = min(n, left)
            parts.append((slot, n))
            left, task.served = left - n, self._step
            if left <= 0 and not whole:
                break
        return parts

    def _chunk(self, slot: Slot, n: int) -> Chunk:
        task = self._task(slot.index)
        row, start, end = task.row, len(slot.ids), len(slot.ids) + n
        scores = task.scores_prompt and start + 1 < len(row.prompt)
        return Chunk(
            task.number,
            slot.index,
            start,
            task.ids(start, end),
            samples=end == row.length and row.length < row.limit,
            k=row.k,
            scores=scores,
            next_id=row.prompt[end] if scores and end < len(row.prompt) else None,
        )

    def _plan_group(self, plan: Plan, call: Call) -> list[Task]:
        """Plan the next step of a custom model: one pass, in which all rows are at the same position."""
        unfinished = [task for task in self._group if task.row.finish_reason is None and task.call is call]
        if unfinished:
            position = unfinished[0].row.length - 1
            # Rows that have ended stay in the pass, because the model's own cache may know rows by their index only.
            plan.passes.append(
                [
                    Chunk(
                        task.number,
                        i,
                        position,
                        [(task.row.tokens or task.row.prompt)[-1]],
                        samples=task in unfinished,
                        k=task.row.k,
                    )
                    for i, task in enumerate(self._group)
                ]
            )
            return unfinished
        self.evict_all()
        length = call.waiting[0].row.length
        self._group = [task for task in call.waiting if task.row.length == length][: len(self.slots)]
        for slot, task in zip(self.slots, self._group, strict=False):
            call.waiting.remove(task)
            slot.task, slot.key = task, call.key
        plan.passes.append(
            [
                Chunk(
                    task.number,
                    i,
                    0,
                    task.ids(0, length),
                    samples=length < task.row.limit,
                    k=task.row.k,
                    scores=task.scores_prompt,
                )
                for i, task in enumerate(self._group)
            ]
        )
        return self._group


def group_by_length(parts: Sequence[tuple[Slot, int]], max_seq_len: int) -> list[list[tuple[Slot, int]]]:
    """Group slots by the number of ids to compute, longest first. Each group is one pass.

    A row is padded by up to PASS_COST ids, which takes less time than another pass, but not beyond the cache.
    """
    groups: list[list[tuple[Slot, int]]] = []
    for slot, n in sorted(parts, key=lambda part: -part[1]):
        width = groups[-1][0][1] if groups else 0
        if not groups or width - n > PASS_COST or len(slot.ids) + width > max_seq_len:
            groups.append([])
        groups[-1].append((slot, n))
    return groups
