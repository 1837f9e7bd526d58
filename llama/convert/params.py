"""Read checked values from another format's configuration, and compute the keys of params.json from them."""

from collections.abc import Mapping
from sys import float_info
from typing import Any

from llama.convert.source import ConvertError
from llama.params import ModelArgs

MAX_LAYERS = 10_000  # a larger number means a damaged file, and listing its missing tensors would take minutes


def read_int(config: Mapping[str, Any], key: str, default: int | None = None, limit: int = 2**24) -> int:
    """Read a positive integer below `limit` from a configuration. Raises ConvertError for any other value."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < limit:
        raise ConvertError(f"{key} is {format_value(value)}, expected an integer from 1 to {limit - 1}")
    return value


def read_float(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Read a positive number from a configuration. Raises ConvertError for any other value."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= float_info.max:
        raise ConvertError(f"{key} is {format_value(value)}, expected a positive number")
    return float(value)


def format_value(value: Any) -> str:
    """Format a value of a configuration for an error message."""
    return "missing" if value is None else repr(value)[:60]


def check_shapes(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ConvertError for the first tensor that is missing, is unexpected or has another shape."""
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            actual = f"has shape {shapes[name]}" if name in shapes else "is missing"
            wanted = f"expected {expected[name]}" if name in expected else "but the model has no such tensor"
            raise ConvertError(f"tensor {name} {actual}, {wanted}: fetch the model again, or use an unmodified one")


def head_params(dim: int, n_heads: int, n_kv_heads: int, head_dim: int) -> dict[str, int]:
    """n_heads, n_kv_heads, and head_dim if it is not dim / n_heads. Raises ConvertError if they are inconsistent."""
    if head_dim % 2 or n_heads % n_kv_heads:
        raise ConvertError(
            f"{n_heads} heads of size {head_dim} and {n_kv_heads} KV heads are inconsistent (the size must "
            "be even, and KV heads must divide heads): fetch the model again"
        )
    explicit = {} if n_heads * head_dim == dim else {"head_dim": head_dim}
    return {"n_heads": n_heads, "n_kv_heads": n_kv_heads, **explicit}


def feed_forward_params(dim: int, width: int) -> dict[str, int | float]:
    """The keys with which ModelArgs.hidden_dim == width.

    They are multiple_of and ffn_dim_multiplier if possible, else hidden_dim, which Meta's own code does not read.
    """

    def fits(**params: Any) -> bool:
        return ModelArgs(dim=dim, **params).hidden_dim == width

    powers = [256, *(2**n for n in range(9, 16)), *(2**n for n in range(7, -1, -1))]
    for multiple_of in powers:
        if fits(multiple_of=multiple_of):
            return {"multiple_of": multiple_of}
    # Try one decimal first, as in Meta's models.
    for digits in (1, 2):
        for multiple_of in (n for n in powers if n >= 32 and width % n == 0):
            middle = (width + 1 - multiple_of / 2) / int(8 * dim / 3)  # of the multipliers that give this width
            if fits(multiple_of=multiple_of, ffn_dim_multiplier=round(middle, digits)):
                return {"multiple_of": multiple_of, "ffn_dim_multiplier": round(middle, digits)}
    return {"hidden_dim": width}


def scaling_params(
    factor: float, low_freq_factor: float, high_freq_factor: float, original_context_length: int
) -> dict[str, Any]:
    """The keys of Llama 3's rope scaling. Values that equal Llama 3.1's are left out, except for the factor.

    Raises ConvertError for inconsistent numbers.
    """
    if factor < 1:
        raise ConvertError(f"factor is {factor:g}: rope scaling 'llama3' needs at least 1")
    if high_freq_factor < low_freq_factor:
        raise ConvertError(
            f"high_freq_factor {high_freq_factor:g} is below low_freq_factor {low_freq_factor:g}: correct them"
        )
    numbers = {
        "rope_low_freq_factor": low_freq_factor,
        "rope_high_freq_factor": high_freq_factor,
        "rope_original_context_length": original_context_length,
    }
    explicit = {key: value for key, value in numbers.items() if value != getattr(ModelArgs, key)}
    return {"use_scaled_rope": True, "rope_scaling_factor": factor, **explicit}
