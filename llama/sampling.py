"""From logits to one id a row: pure, batched, on whatever device the logits are.

Order: temperature, then top-p, then the draw. Randomness comes in as one uniform number a row, so that a row's draws
depend on its own stream alone and every device draws the same.
"""

import torch


def sample(logits: torch.Tensor, temperature: float, top_p: float, uniform: torch.Tensor) -> torch.Tensor:
    """Draw an id for each row: logits [bsz, vocab], uniform [bsz] in [0, 1) -> int64 [bsz].

    temperature 0 takes the most probable id (the first of several) and uses nothing else.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = probabilities(logits, temperature)
    if top_p < 1:  # at 1 rounding could push a cumulative sum over it and drop a token
        probs = keep_top_p(probs, top_p)
    return draw(probs, uniform)


def wide_dtype(device: torch.device) -> torch.dtype:
    """What probabilities are summed in: float64, or float32 on mps, which has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """softmax(logits / temperature) for any temperature > 0, [bsz, vocab] in `wide_dtype`."""
    wide = logits.to(wide_dtype(logits.device))
    # Shifted before it is divided: a small temperature then gives exp(-inf) = 0 and never inf - inf.
    return torch.softmax((wide - wide.amax(dim=-1, keepdim=True)) / temperature, dim=-1)


def keep_top_p(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero every token whose more probable tokens sum to more than top_p (nucleus sampling, arXiv:1904.09751).

    Not renormalized. Equal probabilities rank by id. The most probable token always stays: nothing comes before it.
    """
    ranked, ids = probs.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(dim=-1).roll(1, dims=-1)  # what the more probable tokens sum to
    before[:, 0] = 0
    return torch.zeros_like(probs).scatter(-1, ids, ranked.where(before <= top_p, 0))


def draw(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Invert the cumulative distribution: weights [bsz, vocab] (any positive sum), uniform [bsz] -> int64 [bsz]."""
    cumulative = probs.cumsum(dim=-1)  # [bsz, vocab]
    total = cumulative[:, -1:].contiguous()
    point = uniform[:, None] * total
    # The first id whose cumulative weight exceeds the point, so an id of weight 0 is never drawn, not even when
    # rounding puts the point on the total.
    last = torch.searchsorted(cumulative, total).clamp(max=probs.shape[-1] - 1)  # past the end where a weight is NaN
    return torch.searchsorted(cumulative, point, right=True).minimum(last).squeeze(-1)
