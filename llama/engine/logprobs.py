"""Log-probabilities from logits."""

import torch


def log_norm(logits: torch.Tensor) -> torch.Tensor:
    """logits - log_norm(logits) are log-probabilities, [.., 1]. On a CPU `log_softmax` is off by up to 1e-5 in fp32."""
    return logits.logsumexp(dim=-1, keepdim=True)


def score(logits: torch.Tensor, targets: torch.Tensor, k: int) -> torch.Tensor:
    """Log-probabilities of the targets and of the k best ids: logits [.., vocab], ids [..] -> [.., 1 + 2k].

    Columns: the target's log-probability, those of the k best, and these k ids. fp32 holds every id below 2^24
    exactly, so that one transfer from the device is enough.
    """
    best, ids = logits.topk(k, dim=-1)
    logprobs = torch.cat((logits.gather(-1, targets[..., None]), best), dim=-1) - log_norm(logits)
    return torch.cat((logprobs, ids.float()), dim=-1)
