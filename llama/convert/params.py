"""What the readers of other formats have in common: params.json filled in, and every tensor accounted for."""

from collections.abc import Mapping
from sys import float_info
from typing import Any

from llama.convert.meta import ConvertError
from llama.params import ModelArgs

MOST_LAYERS = 10_000  # a number beyond is damage, and would take minutes to find missing


def read_int(config: Mapping[str, Any], key: str, default: int | None = None, limit: int = 2**24) -> int:
    """A positive whole number under `limit` out of a model's configuration. Raises ConvertError where it is none."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < limit:
        raise ConvertError(f"{key} is {shown(value)}, expected a whole number from 1 to {limit - 1}")
    return value


def decimal(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number out of a model's configuration. Raises ConvertError where it is none."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= float_info.max:
        raise ConvertError(f"{key} is {shown(value)}, expected a positive number")
    return float(value)


def shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:60]


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Account for every tensor by name and shape. Raises ConvertError for the first that does not fit."""
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            there = f"has shape {found[name]}" if name in found else "is missing"
            wanted = f"expected {expected[name]}" if name in expected else "which this model has no place for"
            raise ConvertError(f"tensor {name} {there}, {wanted}: fetch the model again, or take a plain one")


def head_params(dim: int, n_heads: int, n_kv_heads: int, head_dim: int) -> dict[str, int]:
    """n_heads and n_kv_heads, and head_dim where dim / n_heads is another. Raises ConvertError for odd combinations."""
    if head_dim % 2 or n_heads % n_kv_heads:
        raise ConvertError(
            f"{n_heads} heads of {head_dim} and {n_kv_heads} KV heads do not go together (a head has an even size, "
            "KV heads divide heads): fetch the model again"
        )
    explicit = {} if n_heads * head_dim == dim else {"head_dim": head_dim}
    return {"n_heads": n_heads, "n_kv_heads": n_kv_heads, **explicit}


def feed_forward_params(dim: int, width: int) -> dict[str, int | float]:
    """The keys that make ModelArgs.hidden_dim == width: multiple_of, ffn_dim_multiplier, and only where these cannot,
    hidden_dim, which Meta's own code does not read."""

    def fits(**params: Any) -> bool:
        return ModelArgs(dim=dim, **params).hidden_dim == width

    powers = [256, *(2**n for n in range(9, 16)), *(2**n for n in range(7, -1, -1))]
    for multiple_of in powers:
        if fits(multiple_of=multiple_of):
            return {"multiple_of": multiple_of}
    # The multiplier of Meta's models has one digit behind the point.
    for digits in (1, 2):
        for multiple_of in (n for n in powers if n >= 32 and width % n == 0):
            middle = (width + 1 - multiple_of / 2) / int(8 * dim / 3)  # of the multipliers that round to this width
            if fits(multiple_of=multiple_of, ffn_dim_multiplier=round(middle, digits)):
                return {"multiple_of": multiple_of, "ffn_dim_multiplier": round(middle, digits)}
    return {"hidden_dim": width}


def scaling_params(
    factor: float, low_freq_factor: float, high_freq_factor: float, original_context_length: int
) -> dict[str, Any]:
    """The keys of Llama 3's rope scaling; those that have the numbers of Llama 3.1 are left out, but the factor.

    Raises ConvertError for numbers that do not go together.
    """
    if factor < 1:
        raise ConvertError(f"factor is {factor:g}: rope scaling 'llama3' is supported from 1 on")
    if high_freq_factor < low_freq_factor:
        raise ConvertError(
            f"high_freq_factor {high_freq_factor:g} is below low_freq_factor {low_freq_factor:g}: correct them"
        )
    numbers = {
        "rope_low_freq_factor": low_freq_factor,
        "rope_high_freq_factor": high_freq_factor,
        "rope_original_context_length": original_context_length,
    }
    others = {key: value for key, value in numbers.items() if value != getattr(ModelArgs, key)}
    return {"use_scaled_rope": True, "rope_scaling_factor": factor, **others}
