"""The shape of a model: `ModelArgs`, and params.json, which it is read from."""

import codecs
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llama.files import EMPTY, FOLDER, LFS_POINTER, WEB_PAGE, as_path, detect_format, read_small

# Llama 3.2 1B and 3B, as (dim, n_layers): their frequencies are divided by 32, and their params.json does not say so.
LLAMA_3_2_SHAPES = {(2048, 16), (3072, 28)}

# The least number and the first that is too large: what lies beyond is damage. Others are positive, and end at 2^24
# where they are whole, at 1e12 where they are not. Published models have thetas of 1e4 to 1e7, norm_eps 1e-6 or 1e-5.
LIMITS: dict[str, tuple[float, float]] = {
    "n_layers": (1, 10_000),
    "ffn_dim_multiplier": (0, 1000),
    "norm_eps": (0, 1),
    "rope_theta": (1, 1e12),
    "rope_scaling_factor": (1, 1e12),
    "rope_original_context_length": (1, 2**31),
    "rope_linear_factor": (1, 1e12),
}
# Keys that describe a run, not a model, as trainers and other runners write them: nothing here depends on them. Whether
# the embedding serves as output is seen from the files.
RUN_KEYS = {
    *("max_batch_size", "max_seq_len", "max_seq_length", "max_position_embeddings", "model_parallel_size", "seed"),
    *("dropout", "attention_dropout", "attn_dropout", "residual_dropout", "embedding_dropout", "resid_pdrop"),
    *("use_kv_cache", "use_cache", "kv_cache", "flash", "use_flash", "flash_attn", "gradient_checkpointing"),
    *("weight_tying", "tie_word_embeddings", "tied_embeddings", "depth_init", "device", "dtype", "torch_dtype"),
}
NUMBER = re.compile(r"-?\d{1,30}(\.\d*)?(e[+-]?\d{1,3})?", re.IGNORECASE | re.ASCII)
# Keys of other models, with the value that changes nothing in this one.
WITHOUT_EFFECT = {"use_biases": False, "attention_bias": False, "qkv_bias": False, "bias": False, "causal": True}


class CheckpointError(ValueError):
    """The checkpoint folder is not what it should be; the message names the file and the way out."""


@dataclass
class ModelArgs:
    """A checkpoint's params.json, plus the two sizes of the runner (max_batch_size, max_seq_len).

    n_kv_heads: None means n_heads (no grouping). vocab_size: -1 means the rows of the embedding.
    head_dim: 0 means dim / n_heads. hidden_dim, the width of the feed-forward: 0 means 2/3 of 4 * dim, times
    ffn_dim_multiplier, rounded up to a multiple of multiple_of. Both hold the true size once the object is made.
    use_scaled_rope: the frequency scaling of Llama 3.1. Its four numbers: rope_scaling_factor, None means 32 for the
    two shapes of Llama 3.2 and 8 otherwise; rope_low_freq_factor and rope_high_freq_factor, how many turns within
    rope_original_context_length positions divide frequencies that are scaled from those that are blended, and these
    from those that are kept. rope_linear_factor: what all positions are divided by instead.
    sliding_window: how many positions a query looks back on in models that have a limit. None of it is implemented
    but the check that max_seq_len stays inside, where it changes nothing.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    head_dim: int = 0
    hidden_dim: int = 0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    use_scaled_rope: bool = False
    rope_scaling_factor: float | None = None
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_context_length: int = 8192
    rope_linear_factor: float | None = None
    sliding_window: int | None = None
    max_batch_size: int = 32
    max_seq_len: int = 2048

    def __post_init__(self) -> None:
        self.head_dim = self.head_dim or self.dim // self.n_heads
        self.hidden_dim = self.hidden_dim or ffn_width(4 * self.dim, self.multiple_of, self.ffn_dim_multiplier)

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def rope_factor(self) -> float:
        """What low frequencies are divided by; 1 without scaling."""
        if not self.use_scaled_rope:
            return 1.0
        if self.rope_scaling_factor is not None:
            return self.rope_scaling_factor
        return 32.0 if (self.dim, self.n_layers) in LLAMA_3_2_SHAPES else 8.0


def ffn_width(hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """The width of a feed-forward: 2/3 of hidden_dim, times the multiplier, rounded up to a multiple of multiple_of."""
    width = int(2 * hidden_dim / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return -(-width // multiple_of) * multiple_of


def read_params(ckpt_dir: str | Path) -> ModelArgs:
    """The model that params.json describes. Errors as in `load_params`."""
    return ModelArgs(**load_params(ckpt_dir)[0])


def load_params(ckpt_dir: str | Path) -> tuple[dict[str, Any], list[str]]:
    """(the keys of params.json that `ModelArgs` takes, what was done about the others, a line each).

    Numbers may be texts ("4096"), keys that describe a run are left out, null is the default. Raises CheckpointError
    for unknown keys, wrong types, and sizes that contradict each other.
    """
    path = as_path(ckpt_dir) / "params.json"
    found, notes = _read_object(path), list[str]()
    if path.read_bytes().startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        notes.append("params.json: its byte-order mark was skipped")
    harmless = {key for key, value in WITHOUT_EFFECT.items() if found.get(key) is value}
    if ignored := sorted(found.keys() & (RUN_KEYS | harmless)):
        notes.append(f"params.json: {', '.join(ignored)} ignored, which change nothing in what the model computes")
    found = {key: value for key, value in found.items() if key not in ignored and value is not None}
    known = {f.name: f for f in fields(ModelArgs) if f.name not in RUN_KEYS}
    if unknown := [key for key in found if key not in known]:
        raise CheckpointError(f"{path}: unknown key {unknown[0]!r}; this runner knows {', '.join(known)}")
    params = {key: _number(value) for key, value in found.items()}
    if texts := sorted(key for key in params if params[key] is not found[key]):
        notes.append(f"params.json: {', '.join(texts)} written as text, read as numbers")
    for key, value in params.items():
        _check_value(path, key, value, str(known[key].type))
    for key in ("dim", "n_layers", "n_heads"):
        if key not in params:
            raise CheckpointError(f"{path}: {key} is missing")
    _check_together(path, ModelArgs(**params), "head_dim" in params)
    return params, notes


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_small(path))  # which sees a byte order mark, and UTF-16
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
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, expected an object: put the model's own there")
    return found


def _number(value: Any) -> Any:
    """The number that a text is; anything else unchanged."""
    if not isinstance(value, str) or not NUMBER.fullmatch(value.strip()):
        return value
    return float(value) if set(value) & set(".eE") else int(value)


def _check_value(path: Path, key: str, value: Any, kind: str) -> None:
    is_flag, whole = kind == str(bool), "int" in kind
    least, limit = LIMITS.get(key, (0, 2**24 if whole else 1e12))
    if (
        isinstance(value, bool) != is_flag
        or not isinstance(value, int if whole else (int, float))
        or (not is_flag and not (value > 0 and least <= value < limit) and (key, value) != ("vocab_size", -1))
    ):
        expected = "true or false" if is_flag else "a positive whole number" if whole else "a positive number"
        expected += f" of {least:g} to {limit:g}" if key in LIMITS else ""
        raise CheckpointError(f"{path}: {key} is {value!r}, expected {expected}")


def _check_together(path: Path, args: ModelArgs, has_head_dim: bool) -> None:
    divided = has_head_dim or args.dim % args.n_heads == 0
    if not divided or args.head_dim % 2 or args.n_heads % args.kv_heads:
        raise CheckpointError(
            f"{path}: dim {args.dim}, n_heads {args.n_heads}, n_kv_heads {args.kv_heads} and head_dim {args.head_dim} "
            "do not go together (heads divide dim into even parts, KV heads divide heads)"
        )
    if args.use_scaled_rope and args.rope_linear_factor is not None:
        raise CheckpointError(f"{path}: use_scaled_rope and rope_linear_factor exclude each other: remove one")
    if args.rope_high_freq_factor < args.rope_low_freq_factor:
        raise CheckpointError(
            f"{path}: rope_high_freq_factor is {args.rope_high_freq_factor:g}, expected rope_low_freq_factor "
            f"({args.rope_low_freq_factor:g}) or more: exchange them"
        )


def legal_world_sizes(args: ModelArgs) -> list[int]:
    """The numbers of ranks that a model can be divided over."""
    return [
        n
        for n in range(1, args.n_heads + 1)
        if args.n_heads % n == 0
        and args.dim % n == 0
        and args.hidden_dim % n == 0
        and args.vocab_size % n == 0
        and (args.kv_heads % n == 0 or n % args.kv_heads == 0)
    ]


def check_world_size(args: ModelArgs, world_size: int) -> None:
    legal = legal_world_sizes(args)
    if world_size not in legal:
        raise CheckpointError(
            f"{world_size} ranks cannot share this model ({args.n_heads} heads, {args.kv_heads} KV heads, feed-forward "
            f"width {args.hidden_dim}, vocabulary {args.vocab_size}): start {', '.join(map(str, legal))}"
        )
