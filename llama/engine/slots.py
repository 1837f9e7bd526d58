"""Where a new row finds its prefix in the cache, and which slot it gets."""

from collections.abc import Sequence
from dataclasses import dataclass

from llama.engine.calls import Slot, Task
from llama.engine.requests import shared_prefix

# A shorter prefix is computed again: to copy it, or to wait for the row that computes it, would not save time.
MIN_SHARED = 16


@dataclass(frozen=True)
class Prefix:
    """The first `length` ids of a prompt, in a slot. `scores` of them are scored."""

    slot: Slot
    length: int
    scores: int = 0


def find_prefix(slots: Sequence[Slot], task: Task) -> Prefix | None:
    """The longest prefix of the task's prompt that a slot holds, or will hold when its row's prompt is computed.

    Only slots of calls that the task's call `may_reuse` count: between calls the user may have written to the weights.
    """
    found: Prefix | None = None
    prompt = task.ids(0, task.row.length)
    for slot in slots:
        if not task.call.may_reuse(slot.call):
            continue
        ids, scores, k = slot.ids, slot.scores, slot.k
        if slot.task is not None and len(slot.task.row.prompt) > len(ids):
            ids = slot.task.row.prompt
            if slot.task.scores_prompt:
                scores, k = len(ids), slot.task.row.k or 0
        # The last id is computed in any case: its hidden state is needed.
        length = min(shared_prefix(ids, prompt), len(prompt) - 1)
        if task.scores_prompt:
            # The score of the first id after the prefix is needed too: it is computed with the prefix's last id.
            length = min(length, shared_prefix(ids, prompt) - 1, scores - 1) if k >= (task.row.k or 0) else 0
        if length > (found.length if found else 0):
            found = Prefix(slot, length, length + 1 if task.scores_prompt else 0)
    return found


def choose_slot(free: Sequence[Slot], prefix: Prefix | None, reuses: bool) -> Slot:
    """The free slot for a new row: the one that holds its prefix, else the one that was used longest ago. Without
    `reuses` the first one, so that equal calls compute the same bits."""
    if prefix is not None and prefix.slot in free:
        is_most = 2 * prefix.length >= len(prefix.slot.ids)  # what else it holds is no loss
        if prefix.length >= MIN_SHARED or is_most or len(free) == 1:
            return prefix.slot
    others = [slot for slot in free if prefix is None or slot is not prefix.slot]
    if not reuses:
        return others[0] if others else free[0]
    return min(others or free, key=lambda slot: (bool(slot.ids), slot.used, slot.index))
