"""How much two correct computations may differ, derived from the number of terms and the rounding of the dtype.

For kernels: `gamma`, a proven bound. For hidden states and logits of a model: `near`, derived in docs/conformance.md.
For log-probabilities in float32: LOGPROB, which docs/explanation/results.md promises, and `logprob_sum`.
"""

import math
from typing import Any

import torch

from llama import Llama
from llama.evaluate.conformance.bounds import error_bound

BFLOAT16 = 2.0**-8  # unit roundoff: the largest relative error of one rounding
FLOAT32 = 2.0**-24

LOGPROB = 1e-4  # of one token, float32


def gamma(roundings: int) -> float:
    """The largest error of a float32 sum of products in any order, relative to the sum of the products' magnitudes.

    roundings: an upper bound of the roundings that one term goes through. The number of terms is always enough. Higham,
    Accuracy and Stability of Numerical Algorithms, 2002, lemma 3.1 and section 3.5.
    """
    return roundings * FLOAT32 / (1 - roundings * FLOAT32)


def logprob_sum(tokens: int) -> float:
    """The tolerance of a sum of `tokens` log-probabilities. Their errors have random signs."""
    return LOGPROB * math.sqrt(tokens)


def near(llama: Llama, expected: torch.Tensor, dtype: str = "float32") -> float:
    """The tolerance of final hidden states or logits that `llama` computes in `dtype`."""
    layers: Any = llama.model.layers
    hidden_dim = layers[0].feed_forward.w2.weight.shape[1]
    return error_bound("logits", len(layers), dtype, hidden_dim) * float(expected.abs().max())
