"""Seeded float32 checkpoints in Meta's layout, the ones that expected.json was made on.

    python tests/golden/make_checkpoint.py NAME OUT_DIR [--shards N]

Every tensor comes from its own numpy PCG64 stream, seeded by the crc32 of "model/tensor", so all machines write the
same bits however the tensors are split. Shards after the first carry norms that differ by 1e-7, as some published
checkpoints do.
"""

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch

VOCAB = 512
TOKENIZER = Path(__file__).with_name("tok512.model")
# params.json of each model, and the axis on which its files split the embedding: 1 as in Llama 2, 0 as in Llama 3.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "mha": ({"dim": 64, "multiple_of": 32, "n_heads": 8, "n_layers": 3, "norm_eps": 1e-5, "vocab_size": -1}, 1),
    "gqa": (
        {
            "dim": 128,
            "multiple_of": 16,
            "ffn_dim_multiplier": 1.3,
            "n_heads": 8,
            "n_kv_heads": 2,
            "n_layers": 2,
            "norm_eps": 1e-6,
            "vocab_size": -1,
        },
        1,
    ),
    "code": (
        {
            "dim": 64,
            "multiple_of": 32,
            "n_heads": 4,
            "n_layers": 2,
            "norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "vocab_size": VOCAB,
        },
        1,
    ),
    "llama31": (
        {
            "dim": 128,
            "multiple_of": 64,
            "ffn_dim_multiplier": 1.3,
            "n_heads": 8,
            "n_kv_heads": 4,
            "n_layers": 2,
            "norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "use_scaled_rope": True,
            "vocab_size": VOCAB,
        },
        0,
    ),
}


def layout(params: dict[str, Any], embedding_axis: int) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Tensor name -> (shape, axis on which files split it), written out apart from the package's own table."""
    dim, kv_dim = params["dim"], params["dim"] // params["n_heads"] * params.get("n_kv_heads", params["n_heads"])
    width = int(params.get("ffn_dim_multiplier", 1) * int(8 * dim / 3))
    width += -width % params["multiple_of"]
    table: dict[str, tuple[tuple[int, ...], int | None]] = {
        "tok_embeddings.weight": ((VOCAB, dim), embedding_axis),
        "norm.weight": ((dim,), None),
        "output.weight": ((VOCAB, dim), 0),
    }
    for i in range(params["n_layers"]):
        block: dict[str, tuple[tuple[int, ...], int | None]] = {
            "attention.wq": ((dim, dim), 0),
            "attention.wk": ((kv_dim, dim), 0),
            "attention.wv": ((kv_dim, dim), 0),
            "attention.wo": ((dim, dim), 1),
            "feed_forward.w1": ((width, dim), 0),
            "feed_forward.w2": ((dim, width), 1),
            "feed_forward.w3": ((width, dim), 0),
            "attention_norm": ((dim,), None),
            "ffn_norm": ((dim,), None),
        }
        table |= {f"layers.{i}.{name}.weight": entry for name, entry in block.items()}
    return table


def tensor(model: str, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal numbers from the tensor's own stream, scaled so that activations stay near 1 and logits spread."""
    stream = np.random.Generator(np.random.PCG64(zlib.crc32(f"{model}/{key}".encode())))
    values = stream.standard_normal(shape).astype(np.float32)
    if "norm" in key:
        values = 1 + 0.1 * values
    elif key == "output.weight":
        values = 0.5 * values
    elif key != "tok_embeddings.weight":
        values = values / np.float32(np.sqrt(shape[1]))
    return torch.from_numpy(values)


def write(name: str, out_dir: str | Path, shards: int = 1) -> None:
    """Write params.json, consolidated.00.pth ... and the tokenizer to `out_dir`."""
    params, embedding_axis = MODELS[name]
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for key, (shape, axis) in layout(params, embedding_axis).items():
        whole = tensor(name, key, shape)
        for i, file in enumerate(files):
            repeated = whole + (1e-7 if i else 0)
            file[key] = repeated if axis is None else whole.chunk(shards, dim=axis)[i].clone()
    for i, file in enumerate(files):
        torch.save(file, out_dir / f"consolidated.{i:02d}.pth")
    (out_dir / "params.json").write_text(json.dumps(params))
    shutil.copy(TOKENIZER, out_dir / "tokenizer.model")


if __name__ == "__main__":
    fire.Fire(write)
