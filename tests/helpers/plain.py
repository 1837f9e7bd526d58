"""An independent Llama forward pass in float64, in numpy: no cache, no batch, no parallel layers, no shared code.

Written from the papers: RMSNorm (arXiv:1910.07467), rotary positions (2104.09864), SwiGLU (2002.05202), grouped
queries (2305.13245), Llama 3.1's frequency scaling (2407.21783).
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

Array = np.ndarray


def load(folder: Path) -> tuple[dict, dict[str, Array]]:
    """(params.json, float64 weights by name) of a checkpoint with one shard."""
    tensors = torch.load(folder / "consolidated.00.pth", weights_only=True)
    return json.loads((folder / "params.json").read_text()), {k: t.double().numpy() for k, t in tensors.items()}


def norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def frequencies(params: dict, head_dim: int) -> list[float]:
    freqs = []
    for i in range(0, head_dim, 2):
        freq = params.get("rope_theta", 10000.0) ** (-i / head_dim)
        if params.get("use_scaled_rope"):
            wavelength = 2 * math.pi / freq
            if wavelength > 8192 / 1:
                freq /= params.get("factor", 8)
            elif wavelength > 8192 / 4:
                smooth = (8192 / wavelength - 1) / (4 - 1)
                freq = (1 - smooth) * freq / params.get("factor", 8) + smooth * freq
        freqs.append(freq)
    return freqs


def rotate(x: Array, freqs: list[float]) -> Array:
    """Apply RoPE to x [n, heads, head_dim]. Adjacent elements form a complex number, which is rotated by position *
    frequency."""
    rotation = np.exp(1j * np.outer(np.arange(len(x)), freqs))[:, None, :]
    rotated = (x[..., 0::2] + 1j * x[..., 1::2]) * rotation
    return np.stack((rotated.real, rotated.imag), axis=-1).reshape(x.shape)


def forward(params: dict, w: dict[str, Array], ids: list[int]) -> dict[str, Array]:
    """All activations of one sequence up to its logits [n, vocab], by their names in docs/conformance.md.

    The values are called cache_v, although there is no cache.
    """
    n, heads = len(ids), params["n_heads"]
    kv_heads, head_dim = params.get("n_kv_heads", heads), params["dim"] // heads
    freqs = frequencies(params, head_dim)
    future = np.triu(np.full((n, n), -np.inf), 1)
    x = w["tok_embeddings.weight"][ids]
    activations = {"embedding": x}
    for layer in range(params["n_layers"]):
        p = f"layers.{layer}."
        activations[p + "input"] = x
        h = norm(x, w[p + "attention_norm.weight"], params["norm_eps"])
        q = rotate((h @ w[p + "attention.wq.weight"].T).reshape(n, heads, head_dim), freqs)
        k = rotate((h @ w[p + "attention.wk.weight"].T).reshape(n, kv_heads, head_dim), freqs)
        v = (h @ w[p + "attention.wv.weight"].T).reshape(n, kv_heads, head_dim)
        activations |= {p + "q": q, p + "k": k, p + "cache_v": v}
        out = np.empty_like(q)
        for head in range(heads):
            shared = head * kv_heads // heads
            scores = q[:, head] @ k[:, shared].T / math.sqrt(head_dim) + future
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, shared]
        activations[p + "attention"] = out.reshape(n, -1) @ w[p + "attention.wo.weight"].T
        x = x + activations[p + "attention"]
        h = norm(x, w[p + "ffn_norm.weight"], params["norm_eps"])
        gate = h @ w[p + "feed_forward.w1.weight"].T
        up = h @ w[p + "feed_forward.w3.weight"].T
        activations[p + "feed_forward"] = (gate / (1 + np.exp(-gate)) * up) @ w[p + "feed_forward.w2.weight"].T
        x = x + activations[p + "feed_forward"]
    activations["norm"] = norm(x, w["norm.weight"], params["norm_eps"])
    activations["logits"] = activations["norm"] @ w.get("output.weight", w["tok_embeddings.weight"]).T
    return activations


def logits(params: dict, w: dict[str, Array], ids: list[int]) -> Array:
    """float64 logits [n, vocab] of all positions of one sequence."""
    return forward(params, w, ids)["logits"]
