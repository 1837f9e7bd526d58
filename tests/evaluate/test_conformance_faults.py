"""Wrong implementations: the first quantity that `conformance compare` names is the faulty one."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.commands import Ended
from helpers.kits import DTYPES, change, edit, example, kit_json
from llama.evaluate.conformance.export import PROMPTS


def theta(model: Any) -> None:
    rotary = model.model.rotary_emb
    size = model.config.head_dim
    rotary.inv_freq = 1.0 / (20000.0 ** (torch.arange(0, size, 2, dtype=torch.float) / size))


def times(path: str, factor: float) -> Callable[[Any], None]:
    """Multiply one row of a weight."""
    return lambda model: model.get_parameter(path)[3].mul_(factor)


def bos(model: Any) -> None:
    model.model.embed_tokens.weight[1].mul_(1.000001)


def epsilon(path: str) -> Callable[[Any], None]:
    def damage(model: Any) -> None:
        model.get_submodule(path).variance_epsilon = 1e-3

    return damage


def sees_the_future(model: Any) -> None:
    model.model.layers[1].self_attn.is_causal = False


FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "theta": (theta, "rope.cos, position 1, "),
    "embedding": (bos, "embedding, prompt 0 'The capital of France is', position 0, number "),
    "wq": (times("model.layers.1.self_attn.q_proj.weight", 1.001), "layers.1.q, prompt 0 "),
    "wk": (times("model.layers.2.self_attn.k_proj.weight", 1.001), "layers.2.k, prompt 0 "),
    "wv": (times("model.layers.1.self_attn.v_proj.weight", 1.001), "layers.1.cache_v, prompt 0 "),
    "wo": (times("model.layers.0.self_attn.o_proj.weight", 1.001), "layers.0.attention, prompt 0 "),
    "w1": (times("model.layers.1.mlp.gate_proj.weight", 1.1), "layers.1.feed_forward, prompt 0 "),
    "w2": (times("model.layers.2.mlp.down_proj.weight", 1.001), "layers.2.feed_forward, prompt 0 "),
    "w3": (times("model.layers.0.mlp.up_proj.weight", 1.1), "layers.0.feed_forward, prompt 0 "),
    "output": (times("lm_head.weight", 1.001), "logits, prompt 0 "),
    "epsilon of a first norm": (epsilon("model.layers.1.input_layernorm"), "layers.1.q, prompt 0 "),
    "epsilon of a second norm": (epsilon("model.layers.2.post_attention_layernorm"), "layers.2.feed_forward, prompt 0"),
    "epsilon of the last norm": (epsilon("model.norm"), "norm, prompt 0 "),
    "no mask": (sees_the_future, "layers.1.attention, prompt 0 'The capital of France is', position 0, "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(
    fault: str, kit: Callable[..., Path], transformers_side: Callable[..., Path], conformance: Callable[..., Ended]
) -> None:
    damage, where = FAULTS[fault]
    ended = conformance("compare", kit("mha"), transformers_side(kit("mha"), "mha", damage))
    (line,) = ended.out.splitlines()
    assert ended.status == 1 and line.startswith(f"DIVERGES: {where}") and line.endswith(" (float32)"), line


@pytest.mark.parametrize("dtype", DTYPES)
def test_theta_is_found_without_rope_rows(
    dtype: str, kit: Callable[..., Path], transformers_side: Callable[..., Path], conformance: Callable[..., Ended]
) -> None:
    """RoPE leaves position 0 unchanged, so position 1 is the first that differs, in float32."""
    other = transformers_side(kit("mha"), "mha", theta, dtype)
    (other / "rope.safetensors").unlink()
    note, line = conformance("compare", kit("mha"), other).out.splitlines()
    assert note.endswith("lacks them: rope.cos, rope.sin")
    found = re.match("DIVERGES: layers.0.q, prompt 0 'The capital of France is', position ([1-9]), head ", line)
    assert found and (dtype != "float32" or found[1] == "1"), line


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_in_transformers_order_are_found(
    dtype: str,
    kit: Callable[..., Path],
    transformers_side: Callable[..., Path],
    conformance: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(example, "interleaved", lambda x: x)
    ended = conformance("compare", kit("gqa"), transformers_side(kit("gqa"), "gqa", dtype=dtype))
    assert ended.status == 1 and ended.out.startswith("DIVERGES: layers.0.q, prompt 0 'The capital of France is', posi")


@pytest.mark.parametrize("which", ["q", "k"])
def test_weights_whose_rows_were_not_reordered_are_found(
    which: str, kit: Callable[..., Path], transformers_side: Callable[..., Path], conformance: Callable[..., Ended]
) -> None:
    """A converter that forgets the permutation leaves Meta's order in a model that rotates halves of a head."""

    def damage(model: Any) -> None:
        for layer in model.model.layers:
            weight = layer.self_attn.get_parameter(f"{which}_proj.weight")
            rows = example.interleaved(weight.unflatten(0, (-1, model.config.head_dim)).transpose(-1, -2))
            weight.copy_(rows.transpose(-1, -2).flatten(0, 1))

    ended = conformance("compare", kit("gqa"), transformers_side(kit("gqa"), "gqa", damage))
    assert ended.status == 1 and ended.out.startswith(f"DIVERGES: layers.0.{which}, prompt 0 ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lacking", ["nothing", "cache"])
def test_a_shifted_cache_is_found(
    dtype: str,
    lacking: str,
    kit: Callable[..., Path],
    transformers_side: Callable[..., Path],
    conformance: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prompt is computed correctly, then the cached keys of layer 1 move by one position. If the other side has no
    cache tensors, the attention of the first decode step differs."""
    made: Any = example.DynamicCache

    def shifted_cache(**kwargs: Any) -> Any:
        cache = made(**kwargs)
        update = cache.layers[1].update

        def shifted_update(keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if keys.shape[2] == 1 and cache.layers[1].keys.shape[2] == length:
                cache.layers[1].keys = cache.layers[1].keys.roll(1, dims=2)
            return update(keys, values, *args, **kwargs)

        cache.layers[1].update = shifted_update
        return cache

    monkeypatch.setattr(example, "DynamicCache", shifted_cache)
    length = len(kit_json(kit("mha", dtype))["prompts"][0]["ids"])
    other = transformers_side(kit("mha", dtype), "mha", dtype=dtype)
    if lacking == "cache":
        for prompt in range(3):
            change(other, lambda t: [t.pop(f"layers.{i}.cache_{x}") for i in range(3) for x in "kv"], prompt)
    ended = conformance("compare", kit("mha", dtype), other)
    line = ended.out.splitlines()[-1]
    if lacking == "cache":
        assert "lacks them: cache_k, cache_v\n" in ended.out
        where = f"layers.1.attention, prompt 0 'The capital of France is', position {length}, "
    else:
        where = "layers.1.cache_k, prompt 0 'The capital of France is', position 0, head "
    assert ended.status == 1 and line.startswith(f"DIVERGES: {where}"), line


def test_other_ids_are_found(
    kit: Callable[..., Path], transformers_side: Callable[..., Path], conformance: Callable[..., Ended]
) -> None:
    other = transformers_side(kit("mha"), "mha")
    made = kit_json(other)
    prompts, dialogs = copy.deepcopy(made["prompts"]), copy.deepcopy(made["dialogs"])
    dialogs[2]["ids"][4] += 1
    edit(other, dialogs=dialogs)
    ended = conformance("compare", kit("mha"), other)
    text = '[{"role": "user", "content": "I…'
    right = made["dialogs"][2]["ids"][4]
    assert (ended.status, ended.out) == (1, f"DIVERGES: dialog 2 {text!r}, id 4 is {right + 1}, expected {right}\n")
    prompts[1]["ids"].append(0)
    edit(other, prompts=prompts)
    ended = conformance("compare", kit("mha"), other)
    n = len(made["prompts"][1]["ids"])
    assert ended.out == f"DIVERGES: prompt 1 {PROMPTS[1]!r}, id {n} is 0, expected no id\n"
    prompts[1]["ids"] = prompts[1]["ids"][: n - 1]
    edit(other, prompts=prompts)
    assert f", id {n - 1} is missing, expected " in conformance("compare", kit("mha"), other).out
