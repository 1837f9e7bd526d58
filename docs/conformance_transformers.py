"""A worked example of the other side of `python -m llama conformance compare`: the vectors of a transformers model.

    python -m llama convert CKPT_DIR HF_FOLDER --to hf
    python -m llama conformance export --ckpt_dir CKPT_DIR --out kit
    python docs/conformance_transformers.py HF_FOLDER kit OTHER
    python -m llama conformance compare kit OTHER

Nothing of the package `llama` is used: a writer needs the kit's JSON and a way to look into its model.
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

Found = dict[str, list[torch.Tensor]]  # by name, a tensor a call of the model


def interleaved(x: torch.Tensor) -> torch.Tensor:
    """[.., head_dim] from transformers' order of a head to Meta's.

    transformers turns number j together with number j + head_dim / 2, Meta numbers 2j and 2j + 1; the rows of its wq
    and wk are stored in another order to match. Products of queries and keys are the same, the vectors are not.
    """
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


@contextmanager
def recording(model: LlamaForCausalLM) -> Iterator[Found]:
    """Keep what flows through the model, by the kit's names."""
    found: Found = defaultdict(list)
    rotate = modeling_llama.apply_rotary_pos_emb
    current = 0  # the layer that is computed, which the rotation is not told

    def rotating(*args: Any, **kwargs: Any) -> Any:
        turned = rotate(*args, **kwargs)  # [1, heads, n, head_dim] each
        for name, x in zip("qk", turned, strict=True):
            found[f"layers.{current}.{name}"].append(interleaved(x[0].transpose(0, 1)))
        return turned

    def output(name: str) -> Any:
        def hook(module: Any, args: Any, value: Any) -> None:
            found[name].append((value[0] if isinstance(value, tuple) else value)[0])

        return hook

    def entering(i: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            nonlocal current
            current = i
            found[f"layers.{i}.input"].append(args[0][0])

        return hook

    hooks = [
        model.model.embed_tokens.register_forward_hook(output("embedding")),
        model.model.norm.register_forward_hook(output("norm")),
    ]
    for i, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_pre_hook(entering(i)))
        hooks.append(layer.self_attn.register_forward_hook(output(f"layers.{i}.attention")))
        hooks.append(layer.mlp.register_forward_hook(output(f"layers.{i}.feed_forward")))
    modeling_llama.apply_rotary_pos_emb = rotating
    try:
        yield found
    finally:
        modeling_llama.apply_rotary_pos_emb = rotate
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def vectors_of(model: LlamaForCausalLM, ids: list[int], next_ids: list[int]) -> dict[str, torch.Tensor]:
    """The prompt at once, then each id that follows it by itself, with the cache in between."""
    cache = DynamicCache(config=model.config)
    logits = []
    with recording(model) as found:
        for part in (ids, *([i] for i in next_ids)):
            logits.append(model(torch.tensor([part]), past_key_values=cache, use_cache=True).logits[0].float())
    vectors = {name: torch.cat(parts) for name, parts in found.items()}
    layers: list[Any] = cache.layers
    for i, layer in enumerate(layers):  # [1, kv_heads, n, head_dim]
        vectors[f"layers.{i}.cache_k"] = interleaved(layer.keys[0].transpose(0, 1))
        vectors[f"layers.{i}.cache_v"] = layer.values[0].transpose(0, 1)
    vectors["logits"] = torch.cat(logits)
    following = torch.tensor([*ids, *next_ids])[1:]
    vectors["logprobs"] = vectors["logits"][:-1].double().log_softmax(-1).gather(-1, following[:, None])[:, 0].float()
    return {name: tensor.contiguous() for name, tensor in vectors.items()}


def rope_rows(model: LlamaForCausalLM, positions: list[int]) -> dict[str, torch.Tensor]:
    """transformers has each angle twice, for both numbers of its pair."""
    cos, sin = model.model.rotary_emb(model.model.norm.weight, torch.tensor([positions]))
    return {name: x[0].chunk(2, dim=-1)[0].contiguous() for name, x in (("rope.cos", cos), ("rope.sin", sin))}


def write(model: LlamaForCausalLM, tokenizer: Any, kit: Path, other: Path) -> None:
    """The same layout as the kit's, of this model. Vectors are of the kit's ids; the ids in the JSON are our own."""
    asked, config = json.loads((kit / "kit.json").read_text(encoding="utf-8")), model.config
    other.mkdir(parents=True)
    save_file(rope_rows(model, asked["rope_positions"]), other / "rope.safetensors")
    for number, prompt in enumerate(asked["prompts"]):
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
    about = {key: asked[key] for key in ("format", "version", "rope_positions")} | {"params": sizes}
    about["dtype"] = str(model.dtype).removeprefix("torch.")
    about["prompts"] = [p | {"ids": tokenizer(p["text"]).input_ids} for p in asked["prompts"]]
    if tokenizer.chat_template is not None:
        about["dialogs"] = [
            {
                "messages": messages,
                "ids": tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"],
            }
            for messages in (dialog["messages"] for dialog in asked["dialogs"])
        ]
    (other / "kit.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_folder")
    parser.add_argument("kit", type=Path)
    parser.add_argument("other", type=Path, help="the folder to write")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    asked = parser.parse_args()
    model = LlamaForCausalLM.from_pretrained(asked.hf_folder, dtype=asked.dtype, attn_implementation="sdpa").eval()
    write(model, AutoTokenizer.from_pretrained(asked.hf_folder), asked.kit, asked.other)


if __name__ == "__main__":
    main()
