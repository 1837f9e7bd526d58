"""What one step computes. Rank 0 plans every step and sends the plan to the other ranks in one message."""

import pickle
from dataclasses import dataclass, field

from llama.parallel.groups import broadcast_bytes, is_main_rank, model_parallel


@dataclass(frozen=True)
class Chunk:
    """The part of a row that a step computes.

    number: the row's number, the same on all ranks. slot: its row of the cache. start: position of the first of `ids`.
    samples: whether the id after the chunk is sampled. k: number of alternatives, None for no log-probabilities.
    scores: whether the ids of the prompt are scored. next_id: the id after the chunk, if it belongs to the prompt.
    """

    number: int
    slot: int
    start: int
    ids: list[int]
    samples: bool
    k: int | None = None
    scores: bool = False
    next_id: int | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.ids)


@dataclass
class Plan:
    """One step: prepare the cache, then run the passes.

    refresh: check whether the model was changed. cleared: slots that hold values that are not finite.
    copies: (source slot, target slot, number of positions), in order. passes: each is one forward pass.
    """

    refresh: bool = False
    cleared: list[int] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    passes: list[list[Chunk]] = field(default_factory=list)

    @property
    def chunks(self) -> list[Chunk]:
        return [chunk for chunks in self.passes for chunk in chunks]


def share(plan: Plan | None) -> Plan | None:
    """Rank 0's plan, on every rank. None: there is nothing to compute for now."""
    if model_parallel()[1] == 1:
        return plan
    plan_of_rank_0: Plan | None = pickle.loads(broadcast_bytes(pickle.dumps(plan) if is_main_rank() else b""))
    return plan_of_rank_0
