"""Convert between Hugging Face's config.json and params.json."""

import json
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.layout import OUTPUT
from llama.convert.params import (
    MAX_LAYERS,
    feed_forward_params,
    format_value,
    head_params,
    read_float,
    read_int,
    scaling_params,
)
from llama.convert.source import ConvertError, Source
from llama.files import JSON, detect_format
from llama.vocabulary.backend import check_size

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "phi3": "Phi3ForCausalLM"}
# transformers' defaults for keys that a configuration leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6},
    "mistral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    "phi3": {"rms_norm_eps": 1e-5},
}


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Raises ConvertError if it holds anything else."""
    check_size(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        kind = detect_format(path)
        kind = f"not valid JSON ({error})" if kind in (None, JSON) else kind
        raise ConvertError(f"{path.name} is {kind}: fetch it again") from error
    if not isinstance(content, dict):
        raise ConvertError(f"{path.name} holds a {type(content).__name__}, expected an object: fetch it again")
    return content


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# Reading ------------------------------------------------------------------------------------------


def family_of(config: dict[str, Any]) -> str:
    """Return "llama", "mistral" or "phi3". Raises ConvertError for any other architecture."""
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    model_type = config.get("model_type")
    for family, name in FAMILIES.items():
        if architecture == name or (architecture is None and model_type == family):
            return family
    if architecture is None and model_type is None:
        raise ConvertError("config.json names no architecture, so it is not of a supported model")
    expected = ", ".join(FAMILIES.values())
    raise ConvertError(f"architecture {format_value(architecture or model_type)} is not supported, expected {expected}")


def read_params(config: dict[str, Any], family: str) -> dict[str, Any]:
    """The keys of params.json. Raises ConvertError for models that `llama.model` cannot compute."""
    config = DEFAULTS[family] | config
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ConvertError(f"{key} is {format_value(config[key])}: models with biases are not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ConvertError(f"hidden_act is {format_value(config['hidden_act'])}: only silu is supported")
    if isinstance(quantization := config.get("quantization_config"), dict):
        raise ConvertError(
            f"weights are quantized ({quantization.get('quant_method', 'unknown method')}), which is not supported: "
            "use the unquantized folder"
        )
    dim, n_heads = read_int(config, "hidden_size"), read_int(config, "num_attention_heads")
    n_kv_heads = read_int(config, "num_key_value_heads", n_heads)
    if config.get("head_dim") is None and dim % n_heads:
        raise ConvertError(f"hidden_size {dim} is not a multiple of {n_heads} heads: fetch config.json again")
    params = {
        "dim": dim,
        "n_layers": read_int(config, "num_hidden_layers", limit=MAX_LAYERS),
        **head_params(dim, n_heads, n_kv_heads, read_int(config, "head_dim", dim // n_heads)),
        "vocab_size": read_int(config, "vocab_size"),
        **feed_forward_params(dim, read_int(config, "intermediate_size")),
        "norm_eps": read_float(config, "rms_norm_eps"),
        **_read_rope(config),
    }
    if family != "llama" and config.get("sliding_window") is not None:
        params["sliding_window"] = read_int(config, "sliding_window")
    return params


def read_tied(config: dict[str, Any]) -> bool:
    """Whether the embedding is also the output matrix."""
    is_tied = config.get("tie_word_embeddings")
    if not isinstance(is_tied, bool | None):
        raise ConvertError(f"tie_word_embeddings is {format_value(is_tied)}, expected true or false")
    return bool(is_tied)


def read_max_positions(config: dict[str, Any]) -> int:
    """max_position_embeddings, or 0 if the configuration has none."""
    return 0 if config.get("max_position_embeddings") is None else read_int(config, "max_position_embeddings")


def _read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and the scaling. transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    for rope in (new, old):
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise ConvertError(
                f"the rotary settings {format_value(rope)} are not supported, expected one object for all layers"
            )
    types = [rope.get("rope_type", rope.get("type")) or "default" for rope in (new, old) if rope]
    thetas = {read_float(source, "rope_theta") for source in (config, new, old) if source.get("rope_theta") is not None}
    if len(thetas) > 1 or types[1:] not in ([], types[:1]) or new | old != old | new:
        raise ConvertError("rope_theta, rope_parameters and rope_scaling contradict each other: fetch the folder again")
    rope = new | old
    params: dict[str, Any] = {"rope_theta": next(iter(thetas), 10000.0)}
    partial_factor = config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    if partial_factor not in (None, 1.0):
        raise ConvertError(f"partial_rotary_factor is {format_value(partial_factor)}: only 1.0 is supported")
    rope_type = types[0] if types else "default"
    if rope_type == "llama3":
        return params | scaling_params(
            factor=read_float(rope, "factor"),
            low_freq_factor=read_float(rope, "low_freq_factor"),
            high_freq_factor=read_float(rope, "high_freq_factor"),
            original_context_length=read_int(rope, "original_max_position_embeddings"),
        )
    if rope_type == "linear":
        return params | {"rope_linear_factor": read_float(rope, "factor")}
    if rope_type != "default":
        raise ConvertError(
            f"rope scaling {format_value(rope_type)} is not supported, expected rope_type default, linear or llama3"
        )
    return params


# Writing ------------------------------------------------------------------------------------------


def write_config(
    source: Source, folder: Path, dtype: torch.dtype, ids: dict[str, int | None], stop_ids: set[int]
) -> None:
    """Write config.json and generation_config.json.

    ids: bos_token_id, eos_token_id and pad_token_id. stop_ids: all ids that end a generation.
    """
    write_json(folder / "config.json", _config(source, dtype) | ids)
    write_json(folder / "generation_config.json", ids | {"eos_token_id": sorted(stop_ids) or None})


def _config(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    args = source.args
    family = "llama" if args.sliding_window is None else "mistral"
    rope: dict[str, Any] | None = None
    # params.json does not record the longest context. If the source does not either, use the one of the model family
    # that has this rope_theta.
    positions = {500000.0: 8192, 1000000.0: 16384}.get(args.rope_theta, 4096)
    if args.use_scaled_rope:
        positions = 131072
        rope = {
            "rope_type": "llama3",
            "factor": args.rope_factor,
            "low_freq_factor": args.rope_low_freq_factor,
            "high_freq_factor": args.rope_high_freq_factor,
            "original_max_position_embeddings": args.rope_original_context_length,
        }
    elif args.rope_linear_factor is not None:
        rope = {"rope_type": "linear", "factor": args.rope_linear_factor}
    config = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "intermediate_size": args.hidden_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": source.max_positions or positions,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": rope,
        "hidden_act": "silu",
        "tie_word_embeddings": OUTPUT not in source.tensors,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if family == "llama":
        return config | {"attention_bias": False, "mlp_bias": False}
    return config | {"sliding_window": args.sliding_window}
