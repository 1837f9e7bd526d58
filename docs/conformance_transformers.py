"""An example of the other side of `python -m llama conformance compare`: the vectors of a transformers model.

    python -m llama convert CKPT_DIR HF_FOLDER --to hf
    python -m llama conformance export --ckpt_dir CKPT_DIR --out kit
    python docs/conformance_transformers.py HF_FOLDER kit OTHER
    python -m llama conformance compare kit OTHER

The package `llama` is not used: the other side needs only the kit's JSON and hooks into its own model.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM
from transformers.models.llama import modeling_llama

Activations = dict[str, list[torch.Tensor]]  # name -> a tensor for each forward pass


def interleaved(x: torch.Tensor) -> torch.Tensor:
    """Reorder heads [.., head_dim] from transformers' order to Meta's.

    transformers rotates number j together with number j + head_dim / 2, Meta's code numbers 2j and 2j + 1. The rows of
    transformers' wq and wk are reordered to match. The products of queries and keys are the same, the vectors are not.
    """
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


@contextmanager
def recording(model: LlamaForCausalLM) -> Iterator[Activations]:
    """Record the activations of each forward pass, under the kit's names."""
    activations: Activations = defaultdict(list)
    rotate = modeling_llama.apply_rotary_pos_emb
    current = 0  # the layer being computed, which the rotation does not know

    def rotating(*args: Any, **kwargs: Any) -> Any:
        rotated = rotate(*args, **kwargs)  # [1, heads, n, head_dim] each
        for name, x in zip("qk", rotated, strict=True):
            activations[f"layers.{current}.{name}"].append(interleaved(x[0].transpose(0, 1)))
        return rotated

    def record_output(name: str) -> Any:
        def hook(module: Any, args: Any, value: Any) -> None:
            activations[name].append((value[0] if isinstance(value, tuple) else value)[0])

        return hook

    def record_input(i: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            nonlocal current
            current = i
            activations[f"layers.{i}.input"].append(args[0][0])

        return hook

    hooks = [
        model.model.embed_tokens.register_forward_hook(record_output("embedding")),
        model.model.norm.register_forward_hook(record_output("norm")),
    ]
    for i, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_pre_hook(record_input(i)))
        hooks.append(layer.self_attn.register_forward_hook(record_output(f"layers.{i}.attention")))
        hooks.append(layer.mlp.register_forward_hook(record_output(f"layers.{i}.feed_forward")))
    modeling_llama.apply_rotary_pos_emb = rotating
    try:
        yield activations
    finally:
        modeling_llama.apply_rotary_pos_emb = rotate
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def vectors_of(model: LlamaForCausalLM, ids: list[int], next_ids: list[int]) -> dict[str, torch.Tensor]:
    """All tensors of a prompt: its ids in one forward pass, then each of `next_ids` alone, with the KV cache."""
    cache = DynamicCache(config=model.config)
    logits = []
    with recording(model) as activations:
        for part in (ids, *([i] for i in next_ids)):
            logits.append(model(torch.tensor([part]), past_key_values=cache, use_cache=True).logits[0].float())
    vectors = {name: torch.cat(parts) for name, parts in activations.items()}
    layers: list[Any] = cache.layers
    for i, layer in enumerate(layers):  # [1, kv_heads, n, head_dim]
        vectors[f"layers.{i}.cache_k"] = interleaved(layer.keys[0].transpose(0, 1))
        vectors[f"layers.{i}.cache_v"] = layer.values[0].transpose(0, 1)
    vectors["logits"] = torch.cat(logits)
    targets = torch.tensor([*ids, *next_ids])[1:]
    vectors["logprobs"] = vectors["logits"][:-1].double().log_softmax(-1).gather(-1, targets[:, None])[:, 0].float()
    return {name: tensor.contiguous() for name, tensor in vectors.items()}


def rope_rows(model: LlamaForCausalLM, positions: list[int]) -> dict[str, torch.Tensor]:
    """Cosines and sines [positions, head_dim / 2]. transformers has each twice, for both numbers of a pair."""
    cos, sin = model.model.rotary_emb(model.model.norm.weight, torch.tensor([positions]))
    return {name: x[0].chunk(2, dim=-1)[0].contiguous() for name, x in (("rope.cos", cos), ("rope.sin", sin))}


def write(model: LlamaForCausalLM, tokenizer: Any, kit: Path, other: Path) -> None:
    """Write this model's side, in the kit's layout: vectors for the kit's ids, and in the JSON this tokenizer's ids."""
    content, config = json.loads((kit / "kit.json").read_text(encoding="utf-8")), model.config
    other.mkdir(parents=True)
    save_file(rope_rows(model, content["rope_positions"]), other / "rope.safetensors")
    for number, prompt in enumerate(content["prompts"]):
        vectors = vectors_of(model, prompt["ids"], prompt["next_ids"])
        save_file(vectors, other / f"prompt-{number:02d}.safetensors")
    sizes = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    written = {key: content[key] for key in ("format", "version", "rope_positions")} | {"params": sizes}
    written["dtype"] = str(model.dtype).removeprefix("torch.")
    written["prompts"] = [p | {"ids": tokenizer(p["text"]).input_ids} for p in content["prompts"]]
    if tokenizer.chat_template is not None:
        written["dialogs"] = [
            {
                "messages": messages,
                "ids": tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"],
            }
            for messages in (dialog["messages"] for dialog in content["dialogs"])
        ]
    (other / "kit.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_folder")
    parser.add_argument("kit", type=Path)
    parser.add_argument("other", type=Path, help="the folder to write")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args()
    model = LlamaForCausalLM.from_pretrained(args.hf_folder, dtype=args.dtype, attn_implementation="sdpa").eval()
    write(model, AutoTokenizer.from_pretrained(args.hf_folder), args.kit, args.other)


if __name__ == "__main__":
    main()
