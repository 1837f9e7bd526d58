"""Sampling: choose one id per row from its logits, in pure batched functions on the device of the logits.

Order: repetition penalty, frequency and presence penalty, logit bias, top-k, temperature, top-p, then the draw. The
repetition penalty comes first because it multiplies: it scales the model's own logits, not the numbers that the others
add. A setting is one number for all rows, or a tensor
[bsz, 1] with a value for each row. The random numbers are an argument, one uniform number per row. So a row's ids
depend only on its own random stream, and are the same on every device.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from llama.engine.requests import Row

Setting = float | torch.Tensor


class Sampler:
    """Samples the rows of one batch, each with its own settings, and tracks which ids each row contains."""

    def __init__(self, rows: Sequence[Row], vocab_size: int, device: torch.device):
        # A setting that no row uses is None. If some rows use it, the others get a value that has no effect.
        sampled = [row for row in rows if row.temperature > 0]
        self.temperature = self.top_k = self.top_p = self.penalty = None
        self.max_top_k = max((row.top_k for row in rows), default=0)
        self.is_all_sampled = len(sampled) == len(rows)
        if sampled:
            self.temperature = _column([row.temperature for row in rows], device)
        if self.max_top_k:
            self.top_k = _column([row.top_k for row in rows], device).long()
        if any(row.top_p < 1 for row in sampled):
            # At 1, rounding could push a cumulative sum above top_p and drop an id.
            self.top_p = _column([row.top_p if row.top_p < 1 else math.inf for row in rows], device)
        if any(row.repetition_penalty != 1 for row in rows):
            self.penalty = _column([row.repetition_penalty for row in rows], device)
            seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool)
            for i, row in enumerate(rows):
                seen[i, row.prompt + row.tokens] = True
            self.seen = seen.to(device)
        self.counts = self.bias = None
        if any(row.frequency_penalty or row.presence_penalty for row in rows):
            self.frequency = _column([row.frequency_penalty for row in rows], device)
            self.presence = _column([row.presence_penalty for row in rows], device)
            generated = [torch.tensor(row.tokens, dtype=torch.int64) for row in rows]
            self.counts = torch.stack([ids.bincount(minlength=vocab_size) for ids in generated]).to(device)
        if any(row.logit_bias for row in rows):
            bias = torch.zeros(len(rows), vocab_size)
            for i, row in enumerate(rows):
                bias[i, list(row.logit_bias)] = torch.tensor(list(row.logit_bias.values()))
            self.bias = bias.to(device)

    def sample(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """The next id of each row: logits [bsz, vocab], uniform [bsz] in [0, 1) -> int64 [bsz]."""
        if self.penalty is not None:
            logits = penalize(logits, self.seen, self.penalty)
        if self.counts is not None:
            logits = penalize_counts(logits, self.counts, self.frequency, self.presence)
        if self.bias is not None:
            logits = logits + self.bias
        ids = logits.argmax(dim=-1) if self.temperature is None else self._draw(logits, self.temperature, uniform)
        if self.penalty is not None:
            self.seen.scatter_(1, ids[:, None], True)
        if self.counts is not None:
            self.counts.scatter_add_(1, ids[:, None], torch.ones_like(ids[:, None]))
        return ids

    def _draw(self, logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k, self.max_top_k)
        probs = probabilities(logits, temperature.masked_fill(temperature == 0, 1))
        ids = draw(probs, uniform) if self.top_p is None else draw_top_p(probs, self.top_p, uniform)
        # argmax is the first of equal ones
        return ids if self.is_all_sampled else ids.where(temperature[:, 0] > 0, logits.argmax(dim=-1))


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=wide_dtype(device))[:, None].to(device)


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which probabilities are summed: float64, or float32 on mps, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: Setting) -> torch.Tensor:
    """Repetition penalty of CTRL (arXiv:1909.05858): make ids in `seen`, bool [bsz, vocab], less likely."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalize_counts(logits: torch.Tensor, counts: torch.Tensor, frequency: Setting, presence: Setting) -> torch.Tensor:
    """OpenAI's penalties. counts: how often each id was generated, [bsz, vocab].

    logits[j] - counts[j] * frequency - (counts[j] > 0) * presence
    """
    return logits - counts * frequency - (counts > 0) * presence


def keep_top_k(logits: torch.Tensor, top_k: torch.Tensor, max_top_k: int) -> torch.Tensor:
    """Set logits below the row's top_k-th highest to -inf; logits equal to it are kept.

    top_k: int64 [bsz, 1], 0 keeps all. max_top_k: the largest of them.
    """
    max_top_k = min(max_top_k, logits.shape[-1])
    best = logits.topk(max_top_k).values  # [bsz, max_top_k]
    threshold = best.gather(-1, (top_k - 1).clamp(0, max_top_k - 1))  # [bsz, 1]
    return logits.masked_fill((logits < threshold) & (top_k > 0), -torch.inf)


def probabilities(logits: torch.Tensor, temperature: Setting) -> torch.Tensor:
    """softmax(logits / temperature) for any temperature > 0, [bsz, vocab] in `wide_dtype`."""
    logits = logits.to(wide_dtype(logits.device), copy=True)
    # The maximum is subtracted before dividing: a small temperature then gives exp(-inf) = 0 and never inf - inf.
    logits -= logits.amax(dim=-1, keepdim=True)
    logits /= temperature
    return torch.softmax(logits, dim=-1)


def keep_top_p(probs: torch.Tensor, top_p: Setting) -> torch.Tensor:
    """Zero each id if the ids more probable than it sum to over top_p (nucleus sampling, arXiv:1904.09751).

    Not renormalized. Equal probabilities rank by id. The most probable id always stays. inf keeps every id.
    """
    ranked, ids = probs.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(dim=-1).roll(1, dims=-1)  # sum of the more probable ids
    before[:, 0] = 0
    return torch.zeros_like(probs).scatter(-1, ids, ranked.where(before <= top_p, 0))


def draw_top_p(probs: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """draw(keep_top_p(probs, top_p), uniform), bit by bit. On a CPU that would take milliseconds a row, for sorting."""
    if not probs.is_cpu:
        return draw(keep_top_p(probs, top_p), uniform)
    limits = top_p.flatten().tolist()
    kept = [torch.from_numpy(nucleus(row, limit)) for row, limit in zip(probs.numpy(), limits, strict=True)]
    # Weights of 0, those of ids that are dropped and those of the padding, do not change a sum.
    weights = pad_sequence([row[ids] for row, ids in zip(probs, kept, strict=True)], batch_first=True)
    return pad_sequence(kept, batch_first=True).gather(1, draw(weights, uniform)[:, None]).squeeze(1)


def nucleus(probs: np.ndarray, top_p: float) -> np.ndarray:
    """The ids, ascending, that `keep_top_p` keeps of a row, float64 [vocab]; all ids if the row is NaN."""
    if top_p == math.inf:
        return np.arange(len(probs))
    # Ids below (1 - top_p) / vocab sum to less than 1 - top_p, so they are dropped. Eight times that nearly always
    # leaves enough ids, and few to sort.
    ids = np.flatnonzero(probs >= 8 * (1 - top_p) / len(probs))
    is_kept = _keep_first(probs[ids], top_p)
    if is_kept is None:
        ids = np.arange(len(probs))
        is_kept = _keep_first(probs, top_p)
    return ids if is_kept is None else ids[is_kept]


def _keep_first(weights: np.ndarray, top_p: float) -> np.ndarray | None:
    """Which of the weights [n] `keep_top_p` keeps, bool [n]; None if they sum to top_p or less, or to NaN."""
    ranked = np.sort(weights)[::-1]
    total = ranked.cumsum()
    if not len(total) or not total[-1] > top_p:
        return None
    last = np.searchsorted(total, top_p, side="right")  # of those that are kept
    is_kept = weights > ranked[last]
    equal = np.flatnonzero(weights == ranked[last])
    is_kept[equal[: last + 1 - np.count_nonzero(is_kept)]] = True
    return is_kept


def sample_top_p(probs: torch.Tensor, p: float) -> torch.Tensor:
    """Nucleus sampling as in Meta's modules: probs [bsz, vocab] -> next ids, int64 [bsz, 1].

    Draws from torch's global generator, which `torch.manual_seed` sets. The engine itself uses `draw_top_p` and `draw`.
    """
    ranked, ids = probs.sort(dim=-1, descending=True)  # [bsz, vocab]
    ranked = ranked.masked_fill(ranked.cumsum(dim=-1) - ranked > p, 0)
    return ids.gather(-1, torch.multinomial(ranked / ranked.sum(dim=-1, keepdim=True), 1))


def draw(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse transform sampling: weights [bsz, vocab] of any positive sum, uniform [bsz] -> ids, int64 [bsz]."""
    cumulative = probs.cumsum(dim=-1)  # [bsz, vocab]
    total = cumulative[:, -1:].contiguous()
    point = uniform[:, None] * total
    # The result is the first id whose cumulative weight exceeds the point. Rounding may make the point equal to the
    # total, which no cumulative weight exceeds: the result is then `last`, the last id of nonzero weight. The clamp is
    # for NaN weights, for which the search ends past the last id.
    last = torch.searchsorted(cumulative, total).clamp(max=probs.shape[-1] - 1)
    return torch.searchsorted(cumulative, point, right=True).minimum(last).squeeze(-1)
