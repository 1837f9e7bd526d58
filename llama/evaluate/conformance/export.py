"""Write a kit with the tensors that the plain model computes for a few prompts."""

from collections import defaultdict
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import Any, cast

import torch

import llama
from llama.chat.formats import Dialog
from llama.console import progress
from llama.engine.logprobs import score
from llama.evaluate.conformance.layout import (
    FORMAT,
    QUANTITIES,
    ROPE,
    ROPE_FILE,
    SIZES,
    VERSION,
    excerpt,
    prompt_file,
    sha256,
)
from llama.generation import Llama
from llama.model import Transformer, TransformerBlock, apply_rotary_emb, rotary_angles
from llama.params import ModelArgs

# Number of ids generated after each prompt, one at a time. These steps read the KV cache, which the prompt only fills.
N_NEXT_IDS = 4
PROMPTS = (
    "The capital of France is",
    "def add(a, b):\n    return a + b\n",
    "Über die Brücke gehen 12 Katzen, 三匹の猫 und 1 🐈.",
)
DIALOGS: tuple[Dialog, ...] = (
    ({"role": "user", "content": "What is 2 + 2?"},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": " Why is the sky blue?\n"}),
    (
        {"role": "user", "content": "Ich heiße Ana."},
        {"role": "assistant", "content": "Hello, Ana!"},
        {"role": "user", "content": "What is my name?"},
    ),
)
ROPE_POSITIONS = (0, 1, 2, 100, 4095, 8191, 131071)

# Name -> a tensor for each forward pass.
Activations = dict[str, list[torch.Tensor]]


def encode_prompts(source: Llama, texts: list[str]) -> list[list[int]]:
    """The ids of each text. Raises ValueError if they and N_NEXT_IDS more do not fit max_seq_len."""
    tokenizer, max_seq_len = source.tokenizer, source.model.params.max_seq_len
    encoded = [tokenizer.encode(text, bos=tokenizer.adds_bos, eos=False) for text in texts]
    for text, ids in zip(texts, encoded, strict=True):
        if not 0 < len(ids) <= max_seq_len - N_NEXT_IDS:
            raise ValueError(
                f"the prompt {excerpt(text)} has {len(ids)} ids, {N_NEXT_IDS} more are generated, and max_seq_len is "
                f"{max_seq_len}: give --max_seq_len {len(ids) + N_NEXT_IDS}, or a shorter prompt"
            )
    return encoded


def write_kit(source: Llama, texts: list[str], encoded: list[list[int]], folder: Path) -> dict[str, Any]:
    """Write a kit of these prompts into an empty folder, and return the content of its kit.json.

    source: a model built with plain=True, on one rank. encoded: what `encode_prompts` returned for the texts. Only one
    prompt's tensors are in memory at a time.

    Raises FloatingPointError for activations that are not finite, OSError for files that cannot be written.
    """
    from safetensors.torch import save

    model, args = source.model, source.model.params
    (folder / ROPE_FILE).write_bytes(save(_rope_rows(args)))
    activations = record_activations(model)
    prompts = []
    for i, (text, ids) in enumerate(zip(progress(texts, "prompts"), encoded, strict=True)):
        vectors, next_ids = prompt_vectors(model, activations, ids)
        for name, tensor in vectors.items():
            if not tensor.isfinite().all():
                raise FloatingPointError(
                    f"{name} of the prompt {excerpt(text)} is not finite: the weights are damaged, or their dtype "
                    "overflows (try --dtype float32)"
                )
        (folder / prompt_file(i)).write_bytes(save(vectors))
        prompts.append({"text": text, "ids": ids, "next_ids": next_ids})
    dialogs = [] if source.chat_format is None else DIALOGS
    kit = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"llama-runner {llama.__version__}, torch {torch.__version__}",
        "dtype": str(model.norm.weight.dtype).removeprefix("torch."),
        "params": _params(args),
        "prompts": prompts,
        "chat_format": source.chat_format and source.chat_format.name,
        "dialogs": [{"messages": dialog, "ids": source.dialogs.encode(dialog)} for dialog in dialogs],
        "rope_positions": ROPE_POSITIONS,
        "quantities": {
            name: {"shape": shape, "definition": definition} for name, (shape, definition) in QUANTITIES.items()
        },
        "sha256": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / "kit.json").write_text(dumps(kit, indent=1) + "\n", encoding="utf-8")
    return kit


def _rope_rows(args: ModelArgs) -> dict[str, torch.Tensor]:
    """Cosines and sines at ROPE_POSITIONS, [positions, head_dim / 2] each.

    The model's own table may be shorter, so a longer one with the same rows is computed.
    """
    rows = torch.view_as_real(rotary_angles(args, max(ROPE_POSITIONS) + 1)[torch.tensor(ROPE_POSITIONS)])
    return {name: column.contiguous() for name, column in zip(ROPE, rows.unbind(-1), strict=True)}


def record_activations(model: Transformer) -> Activations:
    """Register hooks on a plain model that record the activations of each forward pass, [seqlen, ...], on the CPU.

    Returns the dictionary that they fill. It does not contain KV caches and logits.
    """
    activations: Activations = defaultdict(list)

    def record_output(name: str) -> Callable[..., None]:
        return lambda module, args, output: activations[name].append(output[0].cpu())

    def record_input(name: str) -> Callable[..., None]:
        return lambda module, args: activations[name].append(args[0][0].cpu())

    def record_rotated(i: int, layer: TransformerBlock) -> None:
        """Record q and k after RoPE. No hook sees them, so the outputs of wq and wk are rotated again here."""
        outputs: dict[str, torch.Tensor] = {}

        def rotate(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            q, k = (outputs[name].unflatten(-1, (-1, layer.attention.head_dim)) for name in ("wq", "wk"))
            for name, rotated in zip("qk", apply_rotary_emb(q, k, args[2]), strict=True):
                activations[f"layers.{i}.{name}"].append(rotated[0].cpu())

        for name in ("wq", "wk"):
            getattr(layer.attention, name).register_forward_hook(lambda m, a, y, name=name: outputs.update({name: y}))
        layer.attention.register_forward_hook(rotate)

    model.tok_embeddings.register_forward_hook(record_output("embedding"))
    for i, layer in enumerate(cast(list[TransformerBlock], model.layers)):
        layer.register_forward_pre_hook(record_input(f"layers.{i}.input"))
        record_rotated(i, layer)
        layer.attention.register_forward_hook(record_output(f"layers.{i}.attention"))
        layer.feed_forward.register_forward_hook(record_output(f"layers.{i}.feed_forward"))
    model.norm.register_forward_hook(record_output("norm"))
    return activations


def prompt_vectors(
    model: Transformer, activations: Activations, ids: list[int]
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Return (all tensors of a prompt by name, the N_NEXT_IDS ids that the model generates greedily after it).

    activations: what `record_activations` returned for this model.
    """
    activations.clear()
    device = model.freqs_cis.device
    next_ids: list[int] = []
    logits = model(torch.tensor([ids], device=device), 0)[0]  # [len(ids), vocab]
    while len(next_ids) < N_NEXT_IDS:
        next_ids.append(int(logits[-1].argmax()))
        position = len(ids) + len(next_ids) - 1
        logits = torch.cat((logits, model(torch.tensor([next_ids[-1:]], device=device), position)[0]))
    vectors = {name: torch.cat(parts) for name, parts in activations.items()}
    for i, cache in enumerate(model.caches):
        for name, buffer in (("cache_k", cache.k), ("cache_v", cache.v)):
            vectors[f"layers.{i}.{name}"] = buffer[0, :, : len(logits)].transpose(0, 1).cpu()
    vectors["logits"] = logits.cpu()
    # logits    l0  l1  l2  l3      predict
    # targets       t1  t2  t3      one position later
    targets = torch.tensor([*ids, *next_ids][1:])
    vectors["logprobs"] = score(vectors["logits"][:-1], targets, 0)[:, 0]
    return {name: tensor.contiguous() for name, tensor in vectors.items()}, next_ids


def _params(args: ModelArgs) -> dict[str, Any]:
    """All parameters that affect what a model computes, including defaults."""
    rope: dict[str, Any] = {"rope_theta": args.rope_theta, "use_scaled_rope": args.use_scaled_rope}
    names = ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_context_length", "rope_linear_factor")
    rope |= {"rope_scaling_factor": args.rope_factor} | {name: getattr(args, name) for name in names}
    sizes: dict[str, Any] = {name: getattr(args, name) for name in SIZES} | {"n_kv_heads": args.kv_heads}
    return sizes | {"norm_eps": args.norm_eps} | rope
