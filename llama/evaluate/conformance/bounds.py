"""Bounds for the difference of two correct implementations. docs/conformance.md explains the numbers."""

import math

# dtype -> the largest rounding error of a number of magnitude 1.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
GROWING_LAYERS = 16  # the first 16 layers add the same error each; measured: later ones add none
ANGLE_ERROR = 2.0**-21  # radians per position: RoPE's frequencies are float32


def error_bound(quantity: str, layer: int, dtype: str, hidden_dim: int) -> float:
    """The largest error of a tensor, as a fraction of its largest magnitude.

    quantity: a key of `layout.QUANTITIES` other than RoPE's.
    layer: the number of layers computed before it.
    dtype: the coarser dtype of the two implementations.

    A sum of n products in float32 has an error of about sqrt(n) roundings. Products of 16-bit numbers are accumulated
    in float32, so their sum is rounded once.
    """
    if quantity == "embedding":
        return 2 * ROUNDING[dtype]
    roundings = 2 * math.sqrt(hidden_dim) if dtype == "float32" else 8
    return roundings * min(1 + layer, GROWING_LAYERS) * ROUNDING[dtype]


def rope_bound(position: int, dtype: str) -> float:
    """The largest error of the cosines and sines at a position."""
    return 2 * ROUNDING[dtype] + ANGLE_ERROR * position
