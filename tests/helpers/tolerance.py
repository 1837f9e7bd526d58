"""How much two correct computations may differ, derived from the number of terms and the rounding of the dtype.

Kernels: `gamma`, which is proven. What a model computes on the way: `near`, derived in docs/conformance.md.
Log-probabilities in float32: LOGPROB, which the README promises, and `logprob_sum`.
"""

import math
from typing import Any

import torch

from llama import Llama
from llama.evaluate.conformance.bounds import error_bound

BFLOAT16 = 2.0**-8  # the largest error that rounding makes of a number of size 1
FLOAT32 = 2.0**-24

LOGPROB = 1e-4  # of one token, float32


def gamma(roundings: int) -> float:
    """The largest error in float32 of a sum of products, added up in any order, as a part of the sum of their sizes.

    roundings: as many as one term goes through, at most; the number of terms is always enough. Higham, Accuracy and
    Stability of Numerical Algorithms, 2002, lemma 3.1 and section 3.5.
    """
    return roundings * FLOAT32 / (1 - roundings * FLOAT32)


def logprob_sum(tokens: int) -> float:
    """The tolerance of a sum of `tokens` log-probabilities, whose errors have either sign."""
    return LOGPROB * math.sqrt(tokens)


def near(llama: Llama, expected: torch.Tensor, dtype: str = "float32") -> float:
    """The tolerance of final hidden states or logits of a model that is computed in `dtype`."""
    layers: Any = llama.model.layers
    hidden_dim = layers[0].feed_forward.w2.weight.shape[1]
    return error_bound("logits", len(layers), dtype, hidden_dim) * float(expected.abs().max())
