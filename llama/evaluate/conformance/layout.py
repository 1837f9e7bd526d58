"""The layout of a kit: its files, and the name, shape and definition of each tensor."""

import hashlib
from json import dumps
from pathlib import Path
from typing import Any

FORMAT, VERSION = "llama-conformance", 1
ROPE_FILE = "rope.safetensors"
# The keys of "params" that determine the shapes of tensors.
SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size")

# Name -> (shape, definition) of each tensor, in the order of computation. n is the number of ids of a prompt and of the
# ids that the model generated after it.
ROPE = {
    "rope.cos": ("[positions, head_dim / 2]", "cosine of position * frequency of each pair, float32"),
    "rope.sin": ("[positions, head_dim / 2]", "sine of the same"),
}
BEFORE_LAYERS = {"embedding": ("[n, dim]", "the ids' rows of the embedding")}
LAYER = {  # names in files have a prefix: layers.0.input
    "input": ("[n, dim]", "input of the layer: the residual stream, before the norm of the attention"),
    "q": ("[n, n_heads, head_dim]", "queries after RoPE; numbers 2i and 2i + 1 of a head are its pair i"),
    "k": ("[n, n_kv_heads, head_dim]", "keys after RoPE, ordered as q"),
    "cache_k": (
        "[n, n_kv_heads, head_dim]",
        "keys in the KV cache at positions 0 to n - 1, after all ids are computed",
    ),
    "cache_v": ("[n, n_kv_heads, head_dim]", "values in the KV cache at the same positions"),
    "attention": ("[n, dim]", "what attention adds to the residual stream: the output of wo"),
    "feed_forward": ("[n, dim]", "what the feed-forward adds to the residual stream: the output of w2"),
}
AFTER_LAYERS = {
    "norm": ("[n, dim]", "the residual stream after the last layer and the final norm"),
    "logits": ("[n, vocab_size]", "raw logits, float32"),
    "logprobs": ("[n - 1]", "natural log-probability, under logits[i], of the id at position i + 1, float32"),
}
QUANTITIES = ROPE | BEFORE_LAYERS | LAYER | AFTER_LAYERS


class KitError(ValueError):
    """A folder is not a kit, is damaged, or is from another model. The message names it and suggests a fix."""


def prompt_file(index: int) -> str:
    return f"prompt-{index:02d}.safetensors"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def excerpt(value: Any) -> str:
    """The beginning of a text, or of another value as JSON, in quotes."""
    text = value if isinstance(value, str) else dumps(value, ensure_ascii=False)
    return repr(text if len(text) <= 32 else f"{text[:31]}…")
