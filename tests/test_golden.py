"""Results against those of Meta's own code, for every legal combination of shards and ranks."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.ranks import run_ranks
from llama import Llama

CASES = ("single", "single_echo", "ragged", "ragged_echo", "eos")
FEW_CASES = ("single", "ragged_echo")
MODELS = ("mha", "gqa", "code", "llama31")
FORMS: dict[str, dict[str, Any]] = {"default": {}, "eager": {"compile": False}, "plain": {"plain": True}}


def answers(
    folders: dict[str, Path], golden: dict[str, Any], cases: tuple[str, ...], form: str = "default"
) -> dict[str, Any]:
    """Run these golden cases of each model on this rank: (tokens, logprobs), and the golden logits."""
    found: dict[str, Any] = {}
    for name, folder in folders.items():
        llama = Llama.build(folder, max_seq_len=256, max_batch_size=3, **FORMS[form])
        for case in cases:
            asked = golden[name][case]
            found[f"{name}/{case}"] = llama.generate(
                asked["prompt_tokens"],
                asked["max_gen_len"],
                temperature=0,
                logprobs=True,
                echo=asked.get("echo", False),
                stop_token_ids=[asked["eos_id"]] if "eos_id" in asked else None,
            )
        for i, asked in enumerate(golden[name]["logits"]):
            logits = llama.model.forward(torch.tensor([asked["prompt_tokens"]]), 0)[0]
            found[f"{name}/logits{i}"] = (logits[-1].numpy(), logits.mean().item(), logits.std().item())
        llama.close()
    return found


SLOW = [(1, 4), (4, 4)]
COMBINATIONS = [(shards, ranks) for shards in (1, 2, 4, 8) for ranks in (1, 2, 4)]


@pytest.mark.parametrize(
    ("shards", "world_size"),
    [pytest.param(*sizes, marks=[pytest.mark.slow] if sizes in SLOW else []) for sizes in COMBINATIONS],
)
def test_golden_cases(shards: int, world_size: int, checkpoint: Callable[..., Path], golden: dict[str, Any]) -> None:
    # gqa has 2 KV heads: of 4 ranks, two hold the same one.
    folders = {name: checkpoint(name, shards) for name in MODELS}
    # Ranks spend most of the time on messages. With several, all cases run for eight files on two ranks only.
    cases = CASES if world_size == 1 or (shards, world_size) == (8, 2) else FEW_CASES
    for found in run_ranks(world_size, answers, folders, golden, cases):
        check(found, golden, cases)


def check(found: dict[str, Any], golden: dict[str, Any], cases: tuple[str, ...]) -> None:
    for name in MODELS:
        for case in cases:
            tokens, logprobs = found[f"{name}/{case}"]
            assert tokens == golden[name][case]["tokens"], f"{name}/{case}"
            for ours, theirs in zip(logprobs, golden[name][case]["logprobs"], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4, err_msg=f"{name}/{case}")
        for i, expected in enumerate(golden[name]["logits"]):
            last, mean, std = found[f"{name}/logits{i}"]
            assert np.argsort(-last)[:8].tolist() == expected["last_top8_ids"]
            np.testing.assert_allclose(np.sort(last)[::-1][:8], expected["last_top8_logits"], rtol=0, atol=1e-4)
            np.testing.assert_allclose((mean, std), (expected["mean"], expected["std"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("form", ["plain", "eager"])
def test_golden_cases_of_every_form(
    form: str, world_size: int, checkpoint: Callable[..., Path], golden: dict[str, Any]
) -> None:
    """The cases above have the default settings, with a compiled decode step."""
    folders = {name: checkpoint(name, 2) for name in MODELS}
    cases = CASES if world_size == 1 else FEW_CASES
    for found in run_ranks(world_size, answers, folders, golden, cases, form):
        check(found, golden, cases)


def far_logits(folder: Path, ids: list[int], positions: list[int]) -> Any:
    llama = Llama.build(folder, max_seq_len=len(ids), max_batch_size=1)
    logits = llama.model.forward(torch.tensor([ids]), 0)[0, positions].numpy()
    llama.close()
    return logits


@pytest.mark.parametrize(
    ("name", "shards", "world_size"), [("mha", 1, 1), ("code", 1, 1), ("llama31", 1, 1), ("llama31", 4, 2)]
)
def test_far_positions(
    name: str, shards: int, world_size: int, checkpoint: Callable[..., Path], golden: dict[str, Any]
) -> None:
    """9,000 tokens: rotary angles are right at far positions, with each theta and with scaling."""
    stream = np.random.Generator(np.random.PCG64(zlib.crc32(f"far/{name}".encode())))
    ids = [1, *stream.integers(3, 512, 8999).tolist()]
    expected = golden[name]["far"]["positions"]
    positions = [entry["position"] for entry in expected]
    assert positions == [1999, 8999]
    for logits in run_ranks(world_size, far_logits, checkpoint(name, shards), ids, positions):
        for row, entry in zip(logits, expected, strict=True):
            assert np.argsort(-row)[:8].tolist() == entry["top8_ids"]
            np.testing.assert_allclose(np.sort(row)[::-1][:8], entry["top8_logits"], rtol=0, atol=5e-3)
            np.testing.assert_allclose(np.logaddexp.reduce(row), entry["logsumexp"], rtol=0, atol=5e-3)
