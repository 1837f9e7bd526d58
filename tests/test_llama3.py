"""Llama 3's checkpoints as Meta publishes them, 8B's proportions scaled down: against Meta's own `llama-models`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_models.llama3
import numpy as np
import pytest
import torch

from helpers.ranks import run_ranks
from llama import Llama

TOKENIZER = Path(llama_models.llama3.__file__).with_name("tokenizer.model")
VOCAB, DIM, HIDDEN, N_HEADS, N_KV_HEADS = 128256, 128, 512, 8, 2
PARAMS: dict[str, Any] = {
    "dim": DIM,
    "n_layers": 2,
    "n_heads": N_HEADS,
    "n_kv_heads": N_KV_HEADS,
    "vocab_size": VOCAB,
    "multiple_of": 128,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
LENGTH, POSITIONS = 9000, [0, 1, 4095, 8191, 8192, 8999]


def layout() -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Name -> shape, and the axis on which Llama 3's files split it."""
    kv = DIM // N_HEADS * N_KV_HEADS
    layer: dict[str, tuple[tuple[int, ...], int | None]] = {
        "attention.wq": ((DIM, DIM), 0),
        "attention.wk": ((kv, DIM), 0),
        "attention.wv": ((kv, DIM), 0),
        "attention.wo": ((DIM, DIM), 1),
        "feed_forward.w1": ((HIDDEN, DIM), 0),
        "feed_forward.w2": ((DIM, HIDDEN), 1),
        "feed_forward.w3": ((HIDDEN, DIM), 0),
        "attention_norm": ((DIM,), None),
        "ffn_norm": ((DIM,), None),
    }
    every = {f"layers.{i}.{name}.weight": entry for i in range(2) for name, entry in layer.items()}
    ends: dict[str, tuple[tuple[int, ...], int | None]] = {
        "tok_embeddings.weight": ((VOCAB, DIM), 0),
        "norm.weight": ((DIM,), None),
        "output.weight": ((VOCAB, DIM), 0),
    }
    return every | ends


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """In bfloat16, as Meta stores them."""
    stream = torch.Generator().manual_seed(3)
    made = {}
    for name, (shape, _) in layout().items():
        values = torch.randn(shape, generator=stream)
        if len(shape) == 1:
            values = 1 + 0.1 * values
        elif "layers" in name:
            values *= shape[1] ** -0.5
        made[name] = values.bfloat16()
    return made


@pytest.fixture(scope="module")
def folder(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """folder(tied): the checkpoint in two files, with or without output.weight."""
    made: dict[bool, Path] = {}

    def make(tied: bool) -> Path:
        if tied not in made:
            path = made[tied] = tmp_path_factory.mktemp("llama3")
            for i in range(2):
                names = {name: axis for name, (_, axis) in layout().items() if not (tied and name == "output.weight")}
                parts = {n: weights[n] if axis is None else weights[n].chunk(2, axis)[i] for n, axis in names.items()}
                torch.save({n: part.clone() for n, part in parts.items()}, path / f"consolidated.{i:02d}.pth")
            (path / "params.json").write_text(json.dumps(PARAMS))
            shutil.copy(TOKENIZER, path / "tokenizer.model")
        return made[tied]

    return make


def prompt() -> torch.Tensor:
    return torch.randint(VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(5))


def our_logits(*folders: Path) -> list[np.ndarray]:
    """Logits at POSITIONS: all of 9,000 positions would take 4.6 GB."""
    found = []
    for folder in folders:
        llama = Llama.build(folder, max_seq_len=LENGTH, max_batch_size=1, dtype="float32", device="cpu")
        found.append(llama.model.logits(llama.model.hidden(prompt(), 0, LENGTH)[0, POSITIONS]).numpy())
        llama.close()
    return found


@pytest.fixture(scope="module")
def their_hidden(weights: dict[str, torch.Tensor], folder: Callable[..., Path]) -> torch.Tensor:
    """Hidden states at POSITIONS from llama-models, float32, a thousand positions at a time."""
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer

    # llama-models' layers need fairscale's groups, which a model of this package sets up.
    groups = Llama.build(folder(False), max_seq_len=8, max_batch_size=1, device="cpu")
    theirs = Transformer(ModelArgs(**PARAMS, max_seq_len=LENGTH, max_batch_size=1)).eval()
    theirs.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=True)
    theirs.output = torch.nn.Identity()
    ids = prompt()
    with torch.inference_mode():
        parts = [theirs(ids[:, start : start + 1000], start) for start in range(0, LENGTH, 1000)]
    groups.close()
    return torch.cat(parts, dim=1)[0, POSITIONS]


@pytest.mark.parametrize(
    "world_size", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_logits_equal_llama_models(
    folder: Callable[..., Path],
    weights: dict[str, torch.Tensor],
    their_hidden: torch.Tensor,
    measured: Callable[[str, object], None],
    world_size: int,
) -> None:
    """9,000 positions, 1, 2 and 4 ranks (KV heads repeated at 4), with output.weight and without, as in Llama 3.2."""
    outputs = [weights[name].float() for name in ("output.weight", "tok_embeddings.weight")]
    expected = [(their_hidden @ output.T).numpy() for output in outputs]
    worst = 0.0
    for found in run_ranks(world_size, our_logits, folder(False), folder(True)):
        for ours, theirs in zip(found, expected, strict=True):
            worst = max(worst, float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    measured(f"Llama 3.1 shape to llama-models, 9,000 positions, {world_size} ranks, worst logit / largest", worst)
    assert worst < 1e-4


def test_dialogs_and_stops(folder: Callable[..., Path]) -> None:
    """tiktoken, the special ids of 3.1 and Llama 3's chat format are detected."""
    llama = Llama.build(folder(False), max_seq_len=64, max_batch_size=1, device="cpu")
    tokenizer = llama.tokenizer
    assert tokenizer.stop_tokens == {128001, 128008, 128009}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.n_words) == (128000, 128001, -1, VOCAB)
    ids = llama.dialogs.encode([{"role": "user", "content": "Hi <|eot_id|>"}])
    assert ids[0] == 128000 and ids.count(128009) == 1 and ids[-1] == 271
    answer = llama.chat_completion([[{"role": "user", "content": "Hi"}]], temperature=0, max_gen_len=4, logprobs=True)
    assert len(answer[0]["tokens"]) == 4 and answer[0]["finish_reason"] == "length"
    llama.close()
