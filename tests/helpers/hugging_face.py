"""Small configurations of transformers, one for each property of published models."""

from typing import Any

from transformers import LlamaConfig, MistralConfig, Phi3Config

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Properties of published models: open_llama_3b has heads of size 100, Llama 3.2 tied embeddings.
MODELS: dict[str, Any] = {
    "llama-2": LlamaConfig(**SIZES | {"num_key_value_heads": 8}),
    "llama-3.2": LlamaConfig(**SIZES | {"tie_word_embeddings": True, "rope_parameters": LLAMA3_SCALING}),
    "open-llama-3b": LlamaConfig(
        **SIZES | {"hidden_size": 200, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 540}
    ),
    "linear": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    "nemo": MistralConfig(**SIZES, head_dim=12, sliding_window=None),
    "mistral-0.1": MistralConfig(**SIZES, sliding_window=64),
    "phi-3": Phi3Config(**SIZES, sliding_window=64),
    "narrow": LlamaConfig(**SIZES | {"intermediate_size": 38, "rms_norm_eps": 1e-6}),
}
