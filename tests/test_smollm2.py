"""A real model: SmolLM2-135M-Instruct against what transformers and Meta's code answered."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks

from llama import Llama


def answers(folder: Path, cases: list[dict[str, Any]]) -> Any:
    """All cases in one ragged batch, greedy: (tokens, logprobs and text of each, prompt included but in the text)."""
    llama = Llama.build(folder, max_seq_len=128, max_batch_size=len(cases))
    prompts = [case["prompt_tokens"] for case in cases]
    tokens, logprobs = llama.generate(prompts, 48, temperature=0, logprobs=True, echo=True)
    assert logprobs is not None
    texts = [llama.tokenizer.decode(row[len(prompt) :]) for row, prompt in zip(tokens, prompts, strict=True)]
    llama.close()
    return list(zip(tokens, logprobs, texts, strict=True))


@pytest.mark.parametrize("world_size", [1, 3])
def test_golden_answers_in_float32(world_size: int, demo_float32: Path, smollm2: dict[str, Any]) -> None:
    cases = smollm2["completions"] + smollm2["chats"]
    assert len(cases) == 8
    for found in run_ranks(world_size, answers, demo_float32, cases):
        for (tokens, logprobs, text), case in zip(found, cases, strict=True):
            assert tokens == case["prompt_tokens"] + case["tokens"]
            expected = case["prompt_logprobs"] + case["logprobs"]
            np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-4)
            assert text == case["text"]


def test_bfloat16_stays_near_float32(
    demo: Path, smollm2: dict[str, Any], measured: Callable[[str, object], None]
) -> None:
    """The same texts, scored in bfloat16: measured, and bounded so that a gross error shows."""
    cases = smollm2["completions"][1:3] + smollm2["chats"][:1]
    llama = Llama.build(demo, max_seq_len=128, max_batch_size=len(cases), dtype="bfloat16")
    prompts = [case["prompt_tokens"] + case["tokens"] for case in cases]
    _, logprobs = llama.generate(prompts, 0, logprobs=True, echo=True)
    llama.close()
    assert logprobs is not None
    differences = np.concatenate(
        [np.subtract(ours, c["prompt_logprobs"] + c["logprobs"]) for ours, c in zip(logprobs, cases, strict=True)]
    )
    measured("bfloat16 to float32, demo, median", float(np.median(np.abs(differences))))
    measured("bfloat16 to float32, demo, worst", float(np.abs(differences).max()))
    assert 1e-4 < np.median(np.abs(differences)) < 0.05
    assert np.abs(differences).max() < 1.0
