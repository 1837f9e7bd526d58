"""The same weights in other implementations: transformers and Meta's llama-models."""

import json
from collections import defaultdict
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def transformers_model(folder: Path) -> LlamaForCausalLM:
    """Load a seeded checkpoint with one shard into transformers' Llama, in float32."""
    params = json.loads((folder / "params.json").read_text())
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True)
    heads, kv_heads = params["n_heads"], params.get("n_kv_heads", params["n_heads"])
    rope = {"rope_type": "default", "rope_theta": params.get("rope_theta", 10000.0)}
    if params.get("use_scaled_rope"):
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 8192
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=params["dim"],
        intermediate_size=weights["layers.0.feed_forward.w1.weight"].shape[0],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=params["norm_eps"],
        max_position_embeddings=131072 if params.get("use_scaled_rope") else 4096,
        rope_parameters=rope,
        tie_word_embeddings=False,
    )
    names = {
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {}
    for key, weight in weights.items():
        stem = key.removesuffix(".weight")
        prefix = ""
        if stem.startswith("layers."):
            _, layer, stem = stem.split(".", 2)
            prefix = f"model.layers.{layer}."
        if stem in ("attention.wq", "attention.wk"):
            # RoPE rotates elements i and i + head_dim / 2 of a head in transformers, 2i and 2i + 1 in Meta's code.
            n = heads if stem == "attention.wq" else kv_heads
            weight = weight.view(n, -1, 2, params["dim"]).transpose(1, 2).reshape(weight.shape)
        state[f"{prefix}{names[stem]}.weight"] = weight
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(state)
    return theirs


def llama_models_vectors(folder: Path, ids: list[int], next_ids: list[int]) -> dict[str, torch.Tensor]:
    """Activations of llama-models on a seeded checkpoint with one shard, by their names in docs/conformance.md.

    Runs `ids` in one prefill, then `next_ids` one by one. Requires that fairscale's groups are initialized.
    """
    from llama_models.llama3 import model as published
    from llama_models.llama3.args import ModelArgs

    params = json.loads((folder / "params.json").read_text()) | {"vocab_size": 512}
    sizes = {"max_seq_len": 128, "max_batch_size": 1}
    model = published.Transformer(ModelArgs(**({"rope_theta": 10000.0} | params | sizes))).eval()
    model.load_state_dict(torch.load(folder / "consolidated.00.pth", weights_only=True), strict=True)
    found: dict[str, list[torch.Tensor]] = defaultdict(list)
    rotate = published.apply_rotary_emb

    def rotating(*args: Any, **kwargs: Any) -> Any:
        q, k = rotate(*args, **kwargs)
        layer = next(layers)
        found[f"layers.{layer}.q"].append(q[0])
        found[f"layers.{layer}.k"].append(k[0])
        return q, k

    layers = cycle(range(params["n_layers"]))  # `rotate` is called once in each layer

    def output(name: str) -> Any:
        return lambda module, args, value: found[name].append(value[0])

    def argument(name: str) -> Any:
        return lambda module, args: found[name].append(args[0][0])

    for name, module in {"embedding": model.tok_embeddings, "norm": model.norm, "logits": model.output}.items():
        module.register_forward_hook(output(name))
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(argument(f"layers.{i}.input"))
        layer.attention.register_forward_hook(output(f"layers.{i}.attention"))
        layer.feed_forward.register_forward_hook(output(f"layers.{i}.feed_forward"))
    with patch.object(published, "apply_rotary_emb", rotating):
        model(torch.tensor([ids]), 0)
        for i, following in enumerate(next_ids):
            model(torch.tensor([[following]]), len(ids) + i)
    vectors = {name: torch.cat(parts) for name, parts in found.items()}
    for i, layer in enumerate(model.layers):
        for name in ("cache_k", "cache_v"):
            vectors[f"layers.{i}.{name}"] = getattr(layer.attention, name)[0, : len(ids) + len(next_ids)].clone()
    return {name: tensor.contiguous() for name, tensor in vectors.items()}
