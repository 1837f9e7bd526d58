"""Runs the steps that the scheduler plans: forward passes, log-probabilities, sampling. Each rank has a worker, and all
compute the same."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llama.accelerate.executor import Executor
from llama.engine.logprobs import score
from llama.engine.plan import Chunk, Plan
from llama.engine.requests import Alternatives, Row, alternatives
from llama.engine.sampling import Sampler, wide_dtype
from llama.errors import explain_oom
from llama.parallel.groups import broadcast, current_world, is_main_rank

Score = tuple[float, Alternatives]  # the log-probability of an id, and the alternatives to it
NO_SCORE: Score = (0.0, [])  # of a first id, which nothing predicts


@dataclass(frozen=True)
class Outcome:
    """What a step computed for a row.

    id: the sampled id, if the step sampled one. problem: "in the prompt" or "at step" if values were not finite there.
    """

    id: int | None = None
    score: Score = NO_SCORE
    problem: str | None = None


class Worker:
    """Runs plans on an executor.

    scores: for each slot, those of the prompt ids that it holds, as far as they were requested.
    """

    def __init__(self, executor: Executor, pad_id: int):
        self.executor = executor
        self.scores: dict[int, list[Score]] = {}
        self._pad_id = max(pad_id, 0)  # -1 (no pad id) is not a row of the embedding
        self._sampler: Sampler | None = None
        self._sampler_rows: list[Row] = []

    @property
    def model(self) -> Any:
        return self.executor.model

    @explain_oom
    @torch.inference_mode()
    def run(self, plan: Plan, rows: Sequence[Row], uniform: Sequence[float]) -> list[Outcome]:
        """Run a step -> an outcome for each of `plan.chunks`.

        rows, uniform: on rank 0, the rows whose next id is sampled, in the order of their chunks, and a random number
        from [0, 1) for each; empty on other ranks.
        """
        if plan.refresh and not is_main_rank():  # on rank 0 the planner has done it
            self.executor.refresh()
        self._prepare_cache(plan)
        states, problems = [], list[str | None]()
        for chunks in plan.passes:
            h = self._forward(chunks)  # [rows, seqlen, dim]
            problems += self._score_prompts(chunks, h)
            ends = [(i, len(chunk.ids) - 1) for i, chunk in enumerate(chunks) if chunk.samples]
            if ends:
                whole = len(ends) == len(h) and h.shape[1] == 1
                states.append(h[:, 0] if whole else h[[i for i, _ in ends], [j for _, j in ends]])
        chunks = plan.chunks
        sampling = [chunk for chunk in chunks if chunk.samples]
        sampled = iter(
            self._sample(sampling, states[0] if len(states) == 1 else torch.cat(states), rows, uniform)
            if states
            else ()
        )
        outcomes = [next(sampled) if chunk.samples else Outcome() for chunk in chunks]
        return [
            Outcome(problem=problem) if problem else outcome
            for outcome, problem in zip(outcomes, problems, strict=True)
        ]

    def _prepare_cache(self, plan: Plan) -> None:
        caches = self.executor.caches if plan.cleared or plan.copies else []
        for slot in plan.cleared:
            for cache in caches:
                cache.clear(slot)
        for source, target, length in plan.copies:
            for cache in caches:
                cache.copy(source, target, length)
            self.scores[target] = self.scores.get(source, [])[: length + 1]

    def _forward(self, chunks: list[Chunk]) -> torch.Tensor:
        """Hidden states of a pass, [rows, seqlen, dim]. Rows are padded on the right. The causal mask hides the padding
        from the ids before it, and each padded position of the cache is overwritten before a query attends to it."""
        executor = self.executor
        starts, width = [chunk.start for chunk in chunks], max(len(chunk.ids) for chunk in chunks)
        if width == 1:
            tokens = torch.tensor([chunk.ids for chunk in chunks])
        else:
            tokens = pad_sequence([torch.tensor(chunk.ids) for chunk in chunks], True, self._pad_id)
        start: int | torch.Tensor = starts[0]
        if starts.count(starts[0]) < len(starts):
            start = torch.tensor(starts).to(executor.device)
        slots = [chunk.slot for chunk in chunks]
        return executor.hidden(tokens.to(executor.device), start, max(starts) + width, slots, refresh=False)

    def _score_prompts(self, chunks: list[Chunk], h: torch.Tensor) -> list[str | None]:
        """Store the scores of the prompt ids that the hidden states [rows, seqlen, dim] predict. Returns for each chunk
        where values are not finite."""
        scoring = [i for i, chunk in enumerate(chunks) if chunk.scores]
        problems: list[str | None] = [None] * len(chunks)
        if not scoring:
            return problems
        flat, targets = list[int](), list[int]()
        for i in scoring:
            # The hidden state of each id predicts the next id.
            chunk = chunks[i]
            following = chunk.ids[1:] + ([] if chunk.next_id is None else [chunk.next_id])
            flat += range(i * h.shape[1], i * h.shape[1] + len(following))
            targets += following
        k = max(chunks[i].k or 0 for i in scoring)
        wanted = torch.tensor(targets, device=h.device)
        values = iter(read_back(self.executor.measured(h.flatten(0, 1)[flat], wanted, partial(score, k=k))))
        for i in scoring:
            chunk = chunks[i]
            found = self.scores.setdefault(chunk.slot, [])
            del found[chunk.start + 1 :]
            found[:1] = [NO_SCORE]
            for _ in range(len(chunk.ids) - (chunk.next_id is None)):
                logprob, top = alternatives(next(values), k)
                found.append((logprob, top[: chunk.k]))
                if not math.isfinite(logprob):
                    problems[i] = "in the prompt"
        return problems

    def _sample(
        self, chunks: list[Chunk], h: torch.Tensor, rows: Sequence[Row], uniform: Sequence[float]
    ) -> list[Outcome]:
        """Sample an id for each row from the hidden states [rows, dim]."""
        logits = self.executor.logits(h)  # [rows, vocab]
        if rows:
            ids = self._sampler_of(rows).sample(logits, torch.tensor(uniform, dtype=wide_dtype(h.device)).to(h.device))
        else:
            ids = torch.empty(len(chunks), dtype=torch.int64, device=h.device)
        broadcast(ids)
        # max - min of a row is finite only if all its logits are. isfinite on every logit would take as long as a small
        # output layer.
        columns = [(logits.amax(-1, True) - logits.amin(-1, True)).isfinite().float(), ids[:, None].float()]
        k = max((chunk.k for chunk in chunks if chunk.k is not None), default=None)
        if k is not None:
            columns.append(score(logits, ids, k))
        outcomes = []
        for chunk, (is_finite, token, *scores) in zip(chunks, read_back(torch.cat(columns, dim=-1)), strict=True):
            if not is_finite:
                outcomes.append(Outcome(problem="at step"))
            elif chunk.k is None or k is None:
                outcomes.append(Outcome(int(token)))
            else:
                logprob, top = alternatives(scores, k)
                outcomes.append(Outcome(int(token), (logprob, top[: chunk.k])))
        return outcomes

    def _sampler_of(self, rows: Sequence[Row]) -> Sampler:
        """The sampler of these rows. It is kept while the same rows sample, as it tracks the ids that they contain."""
        before = self._sampler_rows
        is_same = len(rows) == len(before) and all(a is b for a, b in zip(rows, before, strict=True))
        if self._sampler is None or not is_same:
            self._sampler = Sampler(rows, self.model.params.vocab_size, self.executor.device)
            self._sampler_rows = list(rows)
        return self._sampler


def read_back(values: torch.Tensor) -> list[list[Any]]:
    """Copy a tensor from the device into Python lists. The engine waits for the device only here."""
    return values.tolist()


def not_finite(where: str) -> FloatingPointError:
    """The error for logits that are not finite."""
    return FloatingPointError(
        f"logits that are not finite {where}, rank {current_world().rank}: "
        "the weights are damaged, or their dtype overflows (try --dtype float32)"
    )
