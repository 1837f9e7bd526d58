"""Read GGUF files of architecture `llama`.

Weights are dequantized. GGUF stores wq and wk of this architecture in Meta's order (neighbours form a rotary pair), so
tensors are renamed but not reordered. A byte-level BPE vocabulary becomes a tokenizer.json, a SentencePiece vocabulary
becomes a tokenizer.model. Special tokens and the chat template are written to a tokenizer_config.json.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama.checkpoint.layout import EMBEDDING, OUTPUT, tensor_shapes
from llama.convert.params import (
    MAX_LAYERS,
    check_shapes,
    feed_forward_params,
    format_value,
    head_params,
    read_float,
    read_int,
    scaling_params,
)
from llama.convert.source import ConvertError, Source
from llama.convert.tokenizer import tokenizer_files
from llama.convert.vocab import CONTROL, NORMAL, UNUSED, USER_DEFINED, sentencepiece_model
from llama.model import rotary_angles
from llama.params import ModelArgs
from llama.vocabulary.tiktoken_ranks import LLAMA3_SPLIT

NAMES = {"token_embd.weight": EMBEDDING, "output_norm.weight": "norm.weight", OUTPUT: OUTPUT}
LAYER_NAMES = {
    "attn_q.weight": "attention.wq.weight",
    "attn_k.weight": "attention.wk.weight",
    "attn_v.weight": "attention.wv.weight",
    "attn_output.weight": "attention.wo.weight",
    "ffn_gate.weight": "feed_forward.w1.weight",
    "ffn_down.weight": "feed_forward.w2.weight",
    "ffn_up.weight": "feed_forward.w3.weight",
    "attn_norm.weight": "attention_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
}
# The supported keys of the architecture. Any other may change what the model computes, so the file is refused.
KNOWN_KEYS = {
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.attention.value_length",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.expert_count",
    "llama.expert_used_count",
    "llama.feed_forward_length",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.rope.scale_linear",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.finetuned",
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.type",
    "llama.vocab_size",
}
# The tensor types that dtype "auto" keeps. All others are quantized.
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Values of tokenizer.ggml.pre, which decides how a text is split before BPE merges.
LLAMA3_PRE = ("llama-bpe", "llama3", "llama-v3")
PRE_TOKENIZERS = ("smollm", "gpt-2", *LLAMA3_PRE)


def read(path: Path) -> Source:
    """Read and check the metadata and the names and shapes of all tensors. Raises ConvertError."""
    try:
        return _read(path)
    except ModuleNotFoundError as error:
        raise ConvertError(
            f"reading GGUF needs the Python package {error.name}: pip install 'llama-runner[convert]'"
        ) from error
    except ConvertError as error:
        raise ConvertError(f"{path}: {error}") from error


def _read(path: Path) -> Source:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # GGUFReader raises a dozen types for damaged files
        reason = str(error).strip().split("\n")[0]
        raise ConvertError(f"damaged, cut off or of an unknown GGUF version ({reason}): fetch it again") from error
    if reader.byte_order != "I":
        raise ConvertError("written for the other byte order: fetch the little-endian file")
    if metadata.get("split.count", 0) > 1:
        raise ConvertError(f"one of {metadata['split.count']} parts: join them with llama-gguf-split --merge first")

    params = _params(metadata)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if (divisors := stored.pop("rope_freqs.weight", None)) is not None:
        params |= _llama3_scaling(np.array(divisors.data, np.float32), params, metadata)
    tensors = {_name(name): tensor for name, tensor in stored.items()}
    if EMBEDDING not in tensors or len(tensors[EMBEDDING].shape) != 2:
        raise ConvertError("token_embd.weight is missing: the file holds no complete model")
    params["vocab_size"] = int(tensors[EMBEDDING].shape[1])  # GGUF writes shapes innermost first
    shapes = tensor_shapes(ModelArgs(**params))
    if OUTPUT not in tensors:
        del shapes[OUTPUT]
    check_shapes({name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in tensors.items()}, shapes)
    files = _tokenizer(metadata, params["vocab_size"])
    for tensor in {tensor.tensor_type: tensor for tensor in tensors.values()}.values():
        _dequantize(tensor, tensor.data[:1])  # raises for unsupported types before anything is written
    dtypes = {name: TYPES.get(tensors[name].tensor_type.name, torch.bfloat16) for name in shapes}
    readers: dict[str, Callable[[], torch.Tensor]] = {name: partial(_weights, tensors[name]) for name in shapes}
    return Source(params, readers, files, dtypes, max_positions=metadata.get("llama.context_length", 0))


def _weights(tensor: Any) -> torch.Tensor:
    values = _dequantize(tensor, tensor.data)
    return torch.from_numpy(values if values.flags.writeable else values.copy()).float()


def _dequantize(tensor: Any, data: np.ndarray) -> np.ndarray:
    from gguf import dequantize

    try:
        return dequantize(data, tensor.tensor_type)
    except NotImplementedError:  # raised by the gguf package for unknown types
        raise ConvertError(
            f"{tensor.name} is stored as {tensor.tensor_type.name}, which the gguf package cannot dequantize: "
            "use a file of another type (F16, BF16, Q8_0 ...), or upgrade gguf"
        ) from None


def _name(name: str) -> str:
    """GGUF's tensor name -> Meta's."""
    if name in NAMES:
        return NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if match and match[2] in LAYER_NAMES:
        return f"layers.{match[1]}.{LAYER_NAMES[match[2]]}"
    raise ConvertError(f"tensor {name} has no counterpart in Meta's layout: only plain llama models can be converted")


# params.json --------------------------------------------------------------------------------------


def _params(metadata: dict[str, Any]) -> dict[str, Any]:
    """The keys of params.json without vocab_size, which is taken from the rows of the embedding."""
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise ConvertError(f"architecture {architecture!r} is not supported: only 'llama' is")
    for key, value in metadata.items():
        if key.startswith("llama.expert") and value:
            raise ConvertError(f"{key} = {value!r}: mixtures of experts are not supported, use a dense model")
        if key.startswith("llama.") and key not in KNOWN_KEYS:
            raise ConvertError(f"{key} = {value!r} is not supported and may change the results: use another model")
    dim, n_heads = read_int(metadata, "llama.embedding_length"), read_int(metadata, "llama.attention.head_count")
    if "llama.attention.key_length" not in metadata and dim % n_heads:
        raise ConvertError(f"llama.embedding_length {dim} is not a multiple of {n_heads} heads: fetch the file again")
    head_dim = read_int(metadata, "llama.attention.key_length", dim // n_heads)
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if read_int(metadata, key, head_dim) != head_dim:
            raise ConvertError(f"{key} is {metadata[key]}: only {head_dim}, the size of a head, is supported")
    return {
        "dim": dim,
        "n_layers": read_int(metadata, "llama.block_count", limit=MAX_LAYERS),
        **head_params(dim, n_heads, read_int(metadata, "llama.attention.head_count_kv", n_heads), head_dim),
        **feed_forward_params(dim, read_int(metadata, "llama.feed_forward_length")),
        "norm_eps": _read_float32(metadata, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _read_float32(metadata, "llama.rope.freq_base", 10000.0),
        **_linear_scaling(metadata),
    }


def _linear_scaling(metadata: dict[str, Any]) -> dict[str, float]:
    """rope_linear_factor, if any. As in llama.cpp, a factor without a type is linear, and a factor of 0 means none."""
    factor = "llama.rope.scaling.factor" if "llama.rope.scaling.factor" in metadata else "llama.rope.scale_linear"
    kind = metadata.get("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise ConvertError(f"rope scaling {kind!r} is not supported, expected none, linear or Llama 3's")
    return {"rope_linear_factor": _read_float32(metadata, factor)} if kind == "linear" and metadata.get(factor) else {}


def _llama3_scaling(divisors: np.ndarray, params: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's rope scaling from rope_freqs.weight [head_dim / 2], by which llama.cpp divides each frequency.

    The scaling has four numbers. GGUF stores at most one of them, the original context length. The factor is the
    largest divisor. For low_freq_factor and high_freq_factor, 1 and 4 are tried first. Then a line is fitted through
    the divisors between 1 and the factor, and its two ends are tried. Raises ConvertError if neither reproduces the
    divisors.
    """
    plain = ModelArgs(**params)
    if divisors.shape != (plain.head_dim // 2,):
        raise ConvertError(f"rope_freqs.weight has shape {divisors.shape}, expected {(plain.head_dim // 2,)}")
    factor, context = float(divisors.max()), read_int(metadata, "llama.rope.scaling.original_context_length", 8192)
    freqs = _frequencies(plain)
    candidates = [(1.0, 4.0)]
    with np.errstate(all="ignore"):
        unscaled = (1 / divisors - 1 / factor) / (1 - 1 / factor)  # 1: frequency unchanged, 0: divided by factor
        blended = (unscaled > 1e-3) & (unscaled < 1 - 1e-3)
    if blended.sum() > 1:
        slope, low = np.polyfit(unscaled[blended], context * freqs[blended] / (2 * np.pi), 1)
        candidates.append((float(f"{low:.4g}"), float(f"{low + slope:.4g}")))
    for low, high in candidates:
        if factor < 1 or not 0 < low <= high:
            continue
        scaling = scaling_params(factor, low, high, context)
        # Divisors and frequencies are float32, which limits the accuracy.
        if np.allclose(freqs / _frequencies(ModelArgs(**params, **scaling)), divisors, rtol=1e-4):
            return scaling
    raise ConvertError("rope_freqs.weight does not scale frequencies as Llama 3 does: not supported")


def _frequencies(args: ModelArgs) -> np.ndarray:
    """The angle in radians by which each pair is rotated per position [head_dim / 2]."""
    frequencies: np.ndarray = rotary_angles(args, 2)[1].angle().numpy()
    return frequencies


def _read_float32(metadata: dict[str, Any], key: str, default: float | None = None) -> float:
    """Read the shortest decimal that rounds to the stored float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(read_float(metadata, key, default))))


# Tokenizer ----------------------------------------------------------------------------------------


def _tokenizer(metadata: dict[str, Any], vocab_size: int) -> dict[str, bytes]:
    tokens = _array(metadata, "tokenizer.ggml.tokens", str)
    types = _array(metadata, "tokenizer.ggml.token_type", int)
    if not len(tokens) == len(types) == vocab_size:
        raise ConvertError(
            f"{len(tokens)} tokens and {len(types)} token types for an embedding of {vocab_size} rows: "
            "fetch the file again"
        )
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise ConvertError(
            f"tokenizer.ggml.model {model!r} is not supported, expected 'llama' (SentencePiece) or 'gpt2' (BPE)"
        )
    if model == "gpt2":
        vocabulary = {"tokenizer.json": _tokenizer_json(metadata, tokens, types).encode()}
    else:
        vocabulary = {"tokenizer.model": _sentencepiece(metadata, tokens, types)}
    return tokenizer_files(vocabulary, _tokenizer_config(metadata, tokens, model), vocab_size)


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> bytes:
    scores = _array(metadata, "tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise ConvertError(f"{len(scores)} scores for {len(tokens)} tokens: fetch the file again")
    ids = {
        f"{name}_id": _token_id(metadata, key, tokens)
        for name, key in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return sentencepiece_model(
        list(zip(tokens, scores, types, strict=True)),
        add_dummy_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        **{name: value for name, value in ids.items() if value is not None},
    )


def _array(metadata: dict[str, Any], key: str, kind: type) -> list[Any]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        expected = f"expected an array of {kind.__name__}"
        raise ConvertError(f"{key} is {format_value(value)}, {expected}: fetch the file again")
    return value


def _tokenizer_json(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> str:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise ConvertError(f"tokenizer.ggml.pre {pre!r} is not supported, expected {', '.join(PRE_TOKENIZERS)}")
    if unknown := sorted(set(types) - {NORMAL, CONTROL, USER_DEFINED, UNUSED}):
        raise ConvertError(f"tokenizer.ggml.token_type {unknown[0]} is not possible in a byte-level vocabulary")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        duplicate = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise ConvertError(f"tokenizer.ggml.tokens holds {duplicate!r} twice: fetch the file again")
    merges = []
    for merge in _array(metadata, "tokenizer.ggml.merges", str):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise ConvertError(f"tokenizer.ggml.merges holds {merge!r}, expected two tokens that joined are a token")
        merges.append((left, right))
    steps: list[Any] = []
    if pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    elif pre in LLAMA3_PRE:
        steps = [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")]
    # ByteLevel's own pattern is GPT-2's. Llama 3's tokenizers encode a pre-token that is in the vocabulary as that
    # token, without merges.
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in LLAMA3_PRE))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in LLAMA3_PRE))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [token for token, type_ in zip(tokens, types, strict=True) if type_ == kind]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    return tokenizer.to_str(pretty=True)


def _tokenizer_config(metadata: dict[str, Any], tokens: list[str], model: str) -> dict[str, Any]:
    # By default, llama.cpp adds BOS for SentencePiece vocabularies and Llama 3's.
    adds_bos = model == "llama" or metadata.get("tokenizer.ggml.pre") in LLAMA3_PRE
    config: dict[str, Any] = {"add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos))}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (token_id := _token_id(metadata, key, tokens)) is not None:
            config[f"{name}_token"] = tokens[token_id]
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return config


def _token_id(metadata: dict[str, Any], name: str, tokens: list[str]) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = metadata.get(key)
    if token_id is not None and (not isinstance(token_id, int) or not 0 <= token_id < len(tokens)):
        raise ConvertError(f"{key} is {token_id!r}, but the largest id is {len(tokens) - 1}: fetch the file again")
    return token_id
