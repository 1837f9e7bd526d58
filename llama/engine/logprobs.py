"""Log-probabilities from logits."""

import torch


def log_norm(logits: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(logits))), [.., 1]: logits minus this are log-probabilities.

    Used instead of `log_softmax`, which on a CPU is off by up to 1e-5 in fp32.
    """
    return logits.logsumexp(dim=-1, keepdim=True)


def score(logits: torch.Tensor, targets: torch.Tensor, k: int) -> torch.Tensor:
    """Log-probabilities of the targets and of the k best ids: logits [.., vocab], targets [..] -> [.., 1 + 2k].

    Columns: the target's log-probability, those of the k best ids, and these k ids. Ids below 2^24 are exact in fp32,
    so one tensor holds everything and is transferred from the device at once.
    """
    best, ids = logits.topk(k, dim=-1)
    logprobs = torch.cat((logits.gather(-1, targets[..., None]), best), dim=-1) - log_norm(logits)
    return torch.cat((logprobs, ids.float()), dim=-1)
