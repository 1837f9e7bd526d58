"""Write a tiny GGUF model with a byte-level BPE vocabulary."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

# With 2 KV heads it can be split into at most 2 files.
DIM, LAYERS, HEADS, KV_HEADS, HIDDEN = 64, 2, 4, 2, 256
Q, KV = DIM, KV_HEADS * DIM // HEADS

# Byte-level BPE writes each byte as one printable character: itself if printable, else one from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN_BYTES = [b for b in range(256) if b not in PRINTABLE]
BYTE_CHARS = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN_BYTES)}
SPACE = BYTE_CHARS[32]
# "1" and "2" are merged unless the pre-tokenizer splits digits. Two spaces before a digit are merged only if it splits
# before digits.
MERGES = [
    (SPACE, "t"),
    ("h", "e"),
    (SPACE + "t", "he"),
    ("1", "2"),
    (SPACE, SPACE),
    ("Ã", "©"),
    (SPACE, "1"),
    ("l", "l"),
]
CONTROL_TOKENS, USER_TOKEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<tab>"
TOKENS = [*CONTROL_TOKENS, *BYTE_CHARS.values(), *(a + b for a, b in MERGES), USER_TOKEN, "[PAD0]"]
TOKENS += [f"[PAD{i}]" for i in range(1, 1 + -len(TOKENS) % 4)]
TYPES = [3 if t in CONTROL_TOKENS else 4 if t == USER_TOKEN else 5 if t.startswith("[PAD") else 1 for t in TOKENS]
VOCAB = len(TOKENS)

# GGUF's name, Meta's name, shape, and the axis along which Meta's files split the tensor.
LAYOUT: list[tuple[str, str, tuple[int, ...], int | None]] = [
    ("token_embd.weight", "tok_embeddings.weight", (VOCAB, DIM), 1),
    ("output_norm.weight", "norm.weight", (DIM,), None),
    ("output.weight", "output.weight", (VOCAB, DIM), 0),
]
for i in range(LAYERS):
    LAYOUT += [
        (f"blk.{i}.attn_q.weight", f"layers.{i}.attention.wq.weight", (Q, DIM), 0),
        (f"blk.{i}.attn_k.weight", f"layers.{i}.attention.wk.weight", (KV, DIM), 0),
        (f"blk.{i}.attn_v.weight", f"layers.{i}.attention.wv.weight", (KV, DIM), 0),
        (f"blk.{i}.attn_output.weight", f"layers.{i}.attention.wo.weight", (DIM, Q), 1),
        (f"blk.{i}.ffn_gate.weight", f"layers.{i}.feed_forward.w1.weight", (HIDDEN, DIM), 0),
        (f"blk.{i}.ffn_down.weight", f"layers.{i}.feed_forward.w2.weight", (DIM, HIDDEN), 1),
        (f"blk.{i}.ffn_up.weight", f"layers.{i}.feed_forward.w3.weight", (HIDDEN, DIM), 0),
        (f"blk.{i}.attn_norm.weight", f"layers.{i}.attention_norm.weight", (DIM,), None),
        (f"blk.{i}.ffn_norm.weight", f"layers.{i}.ffn_norm.weight", (DIM,), None),
    ]
AXES = {meta_name: axis for _, meta_name, _, axis in LAYOUT}

META: dict[str, Any] = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": DIM,
    "llama.feed_forward_length": HIDDEN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.freq_base": 100000.0,
    "llama.rope.dimension_count": DIM // HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": VOCAB,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": [f"{a} {b}" for a, b in MERGES],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def write_gguf(
    path: Path,
    meta: dict[str, Any] | None = None,
    kind: str = "F32",
    tied: bool = False,
    drop: str = "",
    extra: dict[str, tuple[int, ...]] | None = None,
    architecture: str = "llama",
    endianess: str = "LITTLE",
) -> dict[str, torch.Tensor]:
    """Write a tiny GGUF file. Return the float32 weights that convert should write, by Meta's names.

    meta: changes to META, None removes a key. drop: a tensor to omit. extra: name -> shape of tensors to add or change.
    """
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, architecture, endianess=gguf.GGUFEndian[endianess])
    types = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    for key, value in {**META, **(meta or {})}.items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType[types[type(value)]])
    shapes = {name: shape for name, _, shape, _ in LAYOUT if name != drop and not (tied and name == "output.weight")}
    expected = {}
    for name, shape in {**shapes, **(extra or {})}.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if kind == "F16" and len(shape) == 2:
            values = values.astype(np.float16)
            writer.add_tensor(name, values)
        elif kind == "BF16" and len(shape) == 2:
            bits = values.view(np.uint32) >> 16  # truncated: a bfloat16 is the upper half of a float32
            writer.add_tensor(name, bits.astype(np.uint16).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
            values = (bits << 16).view(np.float32)
        elif kind == "Q8_0" and len(shape) == 2:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            values = read_q8_0(packed.tobytes(), shape)
        elif kind == "I8" and len(shape) == 2:
            writer.add_tensor(name, values.astype(np.int8))
        else:
            writer.add_tensor(name, values)
        expected[name] = torch.tensor(values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if tied:
        expected["output.weight"] = expected["token_embd.weight"]
    return {meta_name: expected[name] for name, meta_name, _, _ in LAYOUT if name in expected}


def read_q8_0(packed: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Dequantize blocks of a float16 scale and 32 int8 without the gguf package."""
    blocks = [struct.unpack("<e32b", packed[i : i + 34]) for i in range(0, len(packed), 34)]
    return np.array([[np.float32(scale) * np.float32(q) for q in qs] for scale, *qs in blocks]).reshape(shape)
