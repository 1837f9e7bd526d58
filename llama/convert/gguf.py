"""Reading GGUF files of architecture `llama` with a byte-level BPE vocabulary.

Weights are dequantized. GGUF's llama stores wq and wk in Meta's order (neighbouring pairs turn together), so tensors
only change their names. The vocabulary becomes a tokenizer.json, what else a tokenizer has to know a
tokenizer_config.json beside it; the chat template in there is read as text and never run.
"""

import json
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama.checkpoint import EMBEDDING, tensor_shapes
from llama.convert.meta import ConvertError, Source
from llama.params import ModelArgs

NAMES = {"token_embd.weight": EMBEDDING, "output_norm.weight": "norm.weight", "output.weight": "output.weight"}
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
# A key of the architecture that is not among these may change what the model computes: such a file is refused.
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
    "llama.vocab_size",
}
# tokenizer.ggml.token_type
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def read(path: Path) -> Source:
    """Read what the file says and check all of it; weights are read when asked for. Raises ConvertError."""
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
        meta = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # the reader raises a dozen kinds on damaged files
        reason = str(error).strip().split("\n")[0]
        raise ConvertError(f"damaged, cut off or of an unknown GGUF version ({reason}): fetch it again") from error
    if reader.byte_order != "I":
        raise ConvertError("written for the other byte order: fetch the little-endian file")
    if meta.get("split.count", 0) > 1:
        raise ConvertError(f"one of {meta['split.count']} parts: join them with llama-gguf-split --merge first")

    params = _params(meta)
    tensors = {_name(t.name): t for t in reader.tensors}
    if EMBEDDING not in tensors or len(tensors[EMBEDDING].shape) != 2:
        raise ConvertError("token_embd.weight is missing: the file holds no whole model")
    params["vocab_size"] = int(tensors[EMBEDDING].shape[1])  # GGUF writes shapes innermost first
    tensors.setdefault("output.weight", tensors[EMBEDDING])  # tied: Meta's files hold it twice
    shapes = tensor_shapes(ModelArgs(**params))
    for name in sorted(shapes.keys() | tensors.keys()):
        found = tuple(int(n) for n in reversed(tensors[name].shape)) if name in tensors else None
        if found != shapes.get(name):
            there = f"has shape {found}" if found else "is missing"
            expected = f"expected {shapes[name]}" if name in shapes else "which this model has no place for"
            raise ConvertError(f"the tensor for {name} {there}, {expected}: fetch the file again")
    files = _tokenizer_files(meta, params["vocab_size"])
    return Source(params, {name: partial(_weights, tensors[name]) for name in shapes}, files)


def _weights(tensor: Any) -> torch.Tensor:
    from gguf import dequantize

    try:
        return torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
    except NotImplementedError:
        raise ConvertError(
            f"{tensor.name} is stored as {tensor.tensor_type.name}, which the gguf package cannot dequantize: "
            "take a file of another type (F16, BF16, Q8_0 ...), or upgrade gguf"
        ) from None


def _name(name: str) -> str:
    """GGUF's tensor name -> Meta's."""
    if name in NAMES:
        return NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if match and match[2] in LAYER_NAMES:
        return f"layers.{match[1]}.{LAYER_NAMES[match[2]]}"
    if name == "rope_freqs.weight":
        raise ConvertError(
            "scaled rotary frequencies (rope_freqs.weight) are not supported yet: take an unscaled model"
        )
    raise ConvertError(f"tensor {name} has no counterpart in Meta's layout: only plain llama models convert")


# params.json --------------------------------------------------------------------------------------


def _params(meta: dict[str, Any]) -> dict[str, Any]:
    """The keys of params.json but vocab_size, which is the embedding's."""
    if (architecture := meta.get("general.architecture")) != "llama":
        raise ConvertError(f"architecture {architecture!r} is not supported: only 'llama' is")
    for key, value in meta.items():
        if key.startswith("llama.rope.scaling."):
            if meta.get("llama.rope.scaling.type") != "none":
                raise ConvertError(f"{key} = {value!r}: rope scaling is not supported yet, take an unscaled model")
        elif key.startswith("llama.expert") and value:
            raise ConvertError(f"{key} = {value!r}: mixtures of experts are not supported, take a dense model")
        elif key.startswith("llama.") and key not in KNOWN_KEYS:
            raise ConvertError(f"{key} = {value!r} is not known here and may change the results: take a plain model")
    dim, n_heads = _whole(meta, "llama.embedding_length"), _whole(meta, "llama.attention.head_count")
    n_kv_heads = _whole(meta, "llama.attention.head_count_kv", n_heads)
    if dim % n_heads or dim // n_heads % 2 or n_heads % n_kv_heads:
        raise ConvertError(
            f"llama.embedding_length {dim}, head_count {n_heads} and head_count_kv {n_kv_heads} do not go together "
            "(heads divide the embedding into even parts, KV heads divide heads): fetch the file again"
        )
    for key in ("llama.rope.dimension_count", "llama.attention.key_length", "llama.attention.value_length"):
        if _whole(meta, key, dim // n_heads) != dim // n_heads:
            raise ConvertError(
                f"{key} is {meta[key]}: only {dim // n_heads}, embedding_length / head_count, is supported"
            )
    return {
        "dim": dim,
        "n_layers": _whole(meta, "llama.block_count"),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        **feed_forward_params(dim, _whole(meta, "llama.feed_forward_length")),
        "norm_eps": _decimal(meta, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _decimal(meta, "llama.rope.freq_base", 10000.0),
    }


def _whole(meta: dict[str, Any], key: str, default: int | None = None) -> int:
    value = meta.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**24:
        raise ConvertError(f"{key} is {_shown(value)}, expected a whole number from 1 to {2**24 - 1}")
    return value


def _decimal(meta: dict[str, Any], key: str, default: float | None = None) -> float:
    """The shortest decimal that is the file's float32: 1e-05, where it reads 9.999999747378752e-06."""
    value = meta.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ConvertError(f"{key} is {_shown(value)}, expected a positive number")
    return float(str(np.float32(value)))


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:60]


def feed_forward_params(dim: int, width: int) -> dict[str, int | float]:
    """multiple_of, and ffn_dim_multiplier where that alone cannot do it, that make ModelArgs.hidden_dim == width."""

    def fits(**params: Any) -> bool:
        return ModelArgs(dim=dim, **params).hidden_dim == width

    powers = [256, *(2**n for n in range(9, 16)), *(2**n for n in range(7, -1, -1))]
    divisors = (n for n in range(1, width + 1) if width % n == 0)
    for multiple_of in (*powers, *divisors):
        if fits(multiple_of=multiple_of):
            return {"multiple_of": multiple_of}
    # Rounding goes upwards: without a multiplier no width under 8/3 * dim can be reached.
    for multiple_of in (n for n in powers if width % n == 0):
        middle = (width + 1 - multiple_of / 2) / int(8 * dim / 3)  # of the multipliers that round to this width
        for digits in range(1, 17):
            if fits(multiple_of=multiple_of, ffn_dim_multiplier=round(middle, digits)):
                return {"multiple_of": multiple_of, "ffn_dim_multiplier": round(middle, digits)}
    raise ConvertError(f"no multiple_of and ffn_dim_multiplier give feed_forward_length {width} at dim {dim}")


# Tokenizer ----------------------------------------------------------------------------------------


def _tokenizer_files(meta: dict[str, Any], vocab_size: int) -> dict[str, str]:
    tokens = _array(meta, "tokenizer.ggml.tokens", str)
    types = _array(meta, "tokenizer.ggml.token_type", int)
    if not len(tokens) == len(types) == vocab_size:
        raise ConvertError(
            f"{len(tokens)} tokens and {len(types)} token types for an embedding of {vocab_size} rows: "
            "fetch the file again"
        )
    return {
        "tokenizer.json": _tokenizer_json(meta, tokens, types),
        "tokenizer_config.json": json.dumps(_tokenizer_config(meta, tokens, types), indent=2) + "\n",
    }


def _array(meta: dict[str, Any], key: str, kind: type) -> list[Any]:
    value = meta.get(key)
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise ConvertError(f"{key} is {_shown(value)}, expected an array of {kind.__name__}: fetch the file again")
    return value


def _tokenizer_json(meta: dict[str, Any], tokens: list[str], types: list[int]) -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if (model := meta.get("tokenizer.ggml.model")) != "gpt2":
        raise ConvertError(f"tokenizer.ggml.model {model!r} is not supported: only 'gpt2' (byte-level BPE) is")
    if (pre := meta.get("tokenizer.ggml.pre")) != "smollm":
        raise ConvertError(f"tokenizer.ggml.pre {pre!r} is not supported: only 'smollm' is")
    if unknown := sorted(set(types) - {NORMAL, CONTROL, USER_DEFINED, UNUSED}):
        raise ConvertError(f"tokenizer.ggml.token_type {unknown[0]} has no place in a byte-level vocabulary")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise ConvertError(f"tokenizer.ggml.tokens holds {twice!r} twice: fetch the file again")
    merges = []
    for merge in _array(meta, "tokenizer.ggml.merges", str):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise ConvertError(f"tokenizer.ggml.merges holds {merge!r}, not two tokens that make a third")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [token for token, type_ in zip(tokens, types, strict=True) if type_ == kind]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    return tokenizer.to_str(pretty=True)


def _tokenizer_config(meta: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    # Without the key llama.cpp adds a BOS to SentencePiece vocabularies and, of the byte-level ones, to a few
    # pre-tokenizers by name; smollm is none of them.
    config: dict[str, Any] = {"add_bos_token": bool(meta.get("tokenizer.ggml.add_bos_token", False))}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        key = f"tokenizer.ggml.{key}_token_id"
        if (token_id := meta.get(key)) is None:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            raise ConvertError(f"{key} is {token_id!r}, but ids end at {len(tokens) - 1}: fetch the file again")
        config[f"{name}_token"] = tokens[token_id]
    if isinstance(template := meta.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
        control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL]
        config |= chat_keys(template, control)
    return config


def chat_keys(template: str, control: Iterable[str]) -> dict[str, str]:
    """chat_format and default_system, as far as the literal text of a Jinja template gives them away.

    ChatML is `<|im_start|>ROLE, newline, text, <|im_end|>` with both marks in the vocabulary. (Phi-4 has a third mark,
    `<|im_sep|>`, in place of the newline.) A template without a literal system message yields no default_system.
    """
    from jinja2 import Environment, TemplateSyntaxError

    try:
        # The lexer alone: it cuts the template into tokens and resolves the escapes of string literals.
        literals = [
            str(token.value) for token in Environment().lexer.tokenize(template) if token.type in ("string", "data")
        ]
    except TemplateSyntaxError:
        return {}
    written = "".join(literals)
    if "<|im_start|>assistant\n" not in written or "<|im_sep|>" in written:
        return {}
    if not {"<|im_start|>", "<|im_end|>"} <= set(control):
        return {}
    keys = {"chat_format": "chatml"}
    for literal in literals:
        if match := re.search(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", literal, re.DOTALL):
            return keys | {"default_system": match[1]}
    return keys
