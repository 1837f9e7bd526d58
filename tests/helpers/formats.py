"""Write a seeded checkpoint in other formats: GGUF and llama2.c."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from sentencepiece import SentencePieceProcessor

from golden.make_checkpoint import TOKENIZER

GGUF_NAMES = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
    "attention.wq.weight": "attn_q.weight",
    "attention.wk.weight": "attn_k.weight",
    "attention.wv.weight": "attn_v.weight",
    "attention.wo.weight": "attn_output.weight",
    "feed_forward.w1.weight": "ffn_gate.weight",
    "feed_forward.w2.weight": "ffn_down.weight",
    "feed_forward.w3.weight": "ffn_up.weight",
    "attention_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
}

# Formats that the fixture `in_format` of tests/convert writes.
FORMATS = ("meta", "meta-4-shards", "hf", "hf-3-files", "hf-bin", "gguf", "llama2c")


def meta_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Meta folder with one shard."""
    return torch.load(folder / "consolidated.00.pth", weights_only=True)


def write_gguf(folder: Path, path: Path, factor: float = 8.0) -> None:
    """Write a seeded Meta folder with one shard as GGUF, with a SentencePiece vocabulary.

    factor: Llama 3's rope scaling factor, for models with scaled rope.
    """
    params, weights = json.loads((folder / "params.json").read_text()), meta_weights(folder)
    heads = params["n_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(params["n_layers"])
    writer.add_context_length(4096)
    writer.add_embedding_length(params["dim"])
    writer.add_feed_forward_length(weights["layers.0.feed_forward.w1.weight"].shape[0])
    writer.add_head_count(heads)
    writer.add_head_count_kv(params.get("n_kv_heads", heads))
    writer.add_layer_norm_rms_eps(params["norm_eps"])
    writer.add_rope_freq_base(params.get("rope_theta", 10000.0))
    writer.add_tokenizer_model("llama")
    pieces = SentencePieceProcessor(model_file=str(TOKENIZER))
    writer.add_token_list([pieces.id_to_piece(i) for i in range(512)])
    writer.add_token_scores([pieces.get_score(i) for i in range(512)])
    kinds = (("unknown", 2), ("control", 3), ("unused", 5), ("byte", 6))
    writer.add_token_types([next((n for kind, n in kinds if getattr(pieces, f"is_{kind}")(i)), 1) for i in range(512)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in weights.items():
        prefix, stem = "", name
        if name.startswith("layers."):
            _, layer, stem = name.split(".", 2)
            prefix = f"blk.{layer}."
        writer.add_tensor(prefix + GGUF_NAMES[stem], weight.numpy())
    if params.get("use_scaled_rope"):
        writer.add_tensor("rope_freqs.weight", llama3_divisors(params["rope_theta"], params["dim"] // heads, factor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_divisors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """llama.cpp's divisors of Llama 3's frequencies [head_dim / 2]: 1 for short wavelengths, factor for long ones."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        smooth = min(1.0, max(0.0, (8192 / wavelength - 1) / (4 - 1)))
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def write_llama2c(folder: Path, path: Path) -> None:
    """Write a seeded Meta folder with one shard in llama2.c's version 1, untied."""
    params, weights = json.loads((folder / "params.json").read_text()), meta_weights(folder)
    hidden = weights["layers.0.feed_forward.w1.weight"].shape[0]
    sizes = (params["dim"], hidden, params["n_layers"], params["n_heads"], params.get("n_kv_heads", params["n_heads"]))
    layered: list[Any] = ["attention_norm", "ffn_norm"]
    rest = [f"attention.w{x}" for x in "qkvo"] + [f"feed_forward.w{n}" for n in (1, 2, 3)]
    with path.open("wb") as file:
        file.write(struct.pack("<4si7iB", b"24ka", 1, *sizes, 512, 128, 0).ljust(256, b"\0"))

        def put(name: str) -> None:
            file.write(weights[f"{name}.weight"].numpy().tobytes())

        for kind in (*layered, "norm", "tok_embeddings", *rest, "output"):
            if kind in ("norm", "tok_embeddings", "output"):
                put(kind)
            else:
                for i in range(params["n_layers"]):
                    put(f"layers.{i}.{kind}")
