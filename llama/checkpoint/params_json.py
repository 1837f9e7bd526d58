"""Read and check params.json."""

import codecs
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from llama.checkpoint.errors import CheckpointError
from llama.files import EMPTY, FOLDER, LFS_POINTER, WEB_PAGE, as_path, detect_format, read_small_file
from llama.params import ModelArgs

# Key -> [minimum, limit). A value outside means that the file is damaged. Numbers of other keys must be positive and
# below 2**24 (integers) or 1e12. Published models have a rope_theta of 1e4 to 1e7 and a norm_eps of 1e-6 or 1e-5.
LIMITS: dict[str, tuple[float, float]] = {
    "n_layers": (1, 10_000),
    "ffn_dim_multiplier": (0, 1000),
    "norm_eps": (0, 1),
    "rope_theta": (1, 1e12),
    "rope_scaling_factor": (1, 1e12),
    "rope_original_context_length": (1, 2**31),
    "rope_linear_factor": (1, 1e12),
}
# Keys that describe a run instead of a model. Trainers and other runners write them, and they are ignored. Keys about
# tied embeddings are ignored too, because the shards show whether the model is tied.
RUN_KEYS = {
    *("max_batch_size", "max_seq_len", "max_seq_length", "max_position_embeddings", "model_parallel_size", "seed"),
    *("dropout", "attention_dropout", "attn_dropout", "residual_dropout", "embedding_dropout", "resid_pdrop"),
    *("use_kv_cache", "use_cache", "kv_cache", "flash", "use_flash", "flash_attn", "gradient_checkpointing"),
    *("weight_tying", "tie_word_embeddings", "tied_embeddings", "depth_init", "device", "dtype", "torch_dtype"),
}
# Keys of other architectures, with the value that describes a Llama. A key is ignored if it has this value, and refused
# as unknown if it has another.
WITHOUT_EFFECT = {"use_biases": False, "attention_bias": False, "qkv_bias": False, "bias": False, "causal": True}
NUMBER = re.compile(r"-?\d{1,30}(\.\d*)?(e[+-]?\d{1,3})?", re.IGNORECASE | re.ASCII)


def read_params(ckpt_dir: str | Path) -> ModelArgs:
    """Read the `ModelArgs` that params.json describes. Raises as `load_params` does."""
    return ModelArgs(**load_params(ckpt_dir)[0])


def load_params(ckpt_dir: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Return (arguments of `ModelArgs`, notes: a line for each thing that was converted or ignored).

    Numbers may be strings ("4096"). Keys that describe a run are ignored. null means the default. Raises
    CheckpointError for unknown keys, wrong types, and inconsistent sizes.
    """
    path = as_path(ckpt_dir) / "params.json"
    content, notes = _read_object(path), list[str]()
    if path.read_bytes().startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        notes.append("params.json: its byte-order mark was skipped")
    without_effect = {key for key, value in WITHOUT_EFFECT.items() if content.get(key) is value}
    if ignored := sorted(content.keys() & (RUN_KEYS | without_effect)):
        notes.append(f"params.json: {', '.join(ignored)} ignored, the model does not depend on them")
    content = {key: value for key, value in content.items() if key not in ignored and value is not None}
    known = {f.name: f for f in fields(ModelArgs) if f.name not in RUN_KEYS}
    if unknown := [key for key in content if key not in known]:
        raise CheckpointError(f"{path}: unknown key {unknown[0]!r}; this runner knows {', '.join(known)}")
    params = {key: _parse_number(value) for key, value in content.items()}
    if parsed := sorted(key for key in params if params[key] is not content[key]):
        notes.append(f"params.json: {', '.join(parsed)} written as text, read as numbers")
    for key, value in params.items():
        _check_value(path, key, value, str(known[key].type))
    for key in ("dim", "n_layers", "n_heads"):
        if key not in params:
            raise CheckpointError(f"{path}: {key} is missing")
    _check_consistency(path, ModelArgs(**params), "head_dim" in params)
    return params, notes


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_small_file(path))  # loads detects UTF-16 in bytes and skips a byte-order mark
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: it comes with the consolidated.NN.pth files") from None
    except OSError as error:
        problem = f"is {FOLDER}" if path.is_dir() else f"cannot be read ({error.strerror})"
        raise CheckpointError(f"{path} {problem}: put the model's params.json there") from error
    except (ValueError, RecursionError) as error:
        if (kind := detect_format(path)) in (LFS_POINTER, WEB_PAGE, EMPTY):
            raise CheckpointError(f"{path} is {kind}: fetch it again") from error
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}): correct it, or put the model's own there"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object: put the model's own there")
    return content


def _parse_number(value: Any) -> Any:
    """The number in a string. Other values are returned unchanged."""
    if not isinstance(value, str) or not NUMBER.fullmatch(value.strip()):
        return value
    return float(value) if set(value) & set(".eE") else int(value)


def _check_value(path: Path, key: str, value: Any, annotation: str) -> None:
    """annotation: the field's type in `ModelArgs`, as text."""
    is_flag, is_int = annotation == str(bool), "int" in annotation
    minimum, limit = LIMITS.get(key, (0, 2**24 if is_int else 1e12))
    if (
        isinstance(value, bool) != is_flag
        or not isinstance(value, int if is_int else (int, float))
        or (not is_flag and not (value > 0 and minimum <= value < limit) and (key, value) != ("vocab_size", -1))
    ):
        expected = "true or false" if is_flag else "a positive integer" if is_int else "a positive number"
        expected += f" from {minimum:g} to {limit:g}" if key in LIMITS else ""
        raise CheckpointError(f"{path}: {key} is {value!r}, expected {expected}")


def _check_consistency(path: Path, args: ModelArgs, has_head_dim: bool) -> None:
    divides = has_head_dim or args.dim % args.n_heads == 0
    if not divides or args.head_dim % 2 or args.n_heads % args.kv_heads:
        raise CheckpointError(
            f"{path}: dim {args.dim}, n_heads {args.n_heads}, n_kv_heads {args.kv_heads} and head_dim {args.head_dim} "
            "are inconsistent (n_heads must divide dim into heads of even size, and n_kv_heads must divide n_heads)"
        )
    if args.use_scaled_rope and args.rope_linear_factor is not None:
        raise CheckpointError(f"{path}: use_scaled_rope and rope_linear_factor cannot both be set: remove one")
    if args.rope_high_freq_factor < args.rope_low_freq_factor:
        raise CheckpointError(
            f"{path}: rope_high_freq_factor is {args.rope_high_freq_factor:g}, expected at least "
            f"rope_low_freq_factor ({args.rope_low_freq_factor:g}): swap them"
        )
