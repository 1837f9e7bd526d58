"""A real model: SmolLM2-135M-Instruct, compared with recorded answers of transformers and Meta's code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.ranks import run_ranks
from llama import Llama
from llama.convert import convert


def answers(folder: Path, cases: list[dict[str, Any]], new: int = 48) -> Any:
    """(tokens, logprobs, text) of each case, greedy, in one ragged batch. Tokens and logprobs include the prompt."""
    llama = Llama.build(folder, max_seq_len=128, max_batch_size=len(cases))
    prompts = [case["prompt_tokens"] for case in cases]
    tokens, logprobs = llama.generate(prompts, new, temperature=0, logprobs=True, echo=True)
    assert logprobs is not None
    texts = [llama.tokenizer.decode(row[len(prompt) :]) for row, prompt in zip(tokens, prompts, strict=True)]
    llama.close()
    return list(zip(tokens, logprobs, texts, strict=True))


@pytest.mark.parametrize("world_size", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_golden_answers_in_float32(world_size: int, demo_float32: Path, smollm2: dict[str, Any]) -> None:
    cases = smollm2["completions"] + smollm2["chats"]
    assert len(cases) == 8
    new = 48 if world_size == 1 else 24  # three ranks wait for each other on two cores
    for found in run_ranks(world_size, answers, demo_float32, cases, new):
        for (tokens, logprobs, text), case in zip(found, cases, strict=True):
            assert tokens == case["prompt_tokens"] + case["tokens"][:new]
            expected = case["prompt_logprobs"] + case["logprobs"][:new]
            np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-4)
            assert text == case["text"] if len(case["tokens"]) <= new else case["text"].startswith(text)


def test_bfloat16_stays_near_float32(
    demo: Path, smollm2: dict[str, Any], measured: Callable[[str, object], None]
) -> None:
    """The same texts, scored in bfloat16. The bounds are wide: they find gross errors."""
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


def test_the_same_text_from_every_format(demo_float32: Path, smollm2: dict[str, Any], tmp_path: Path) -> None:
    """GGUF -> Meta -> Hugging Face -> Meta: greedy ids of each folder, the middle one read by transformers."""
    convert(demo_float32, tmp_path / "hf", to="hf", shards=2)
    convert(tmp_path / "hf", tmp_path / "meta")
    cases = smollm2["completions"]
    for (tokens, _, text), case in zip(answers(tmp_path / "meta", cases), cases, strict=True):
        assert tokens == case["prompt_tokens"] + case["tokens"] and text == case["text"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for case in cases[:1]:
        ids = tokenizer(case["prompt"], return_tensors="pt").input_ids
        assert ids[0].tolist() == case["prompt_tokens"]
        found = theirs.generate(ids, max_new_tokens=len(case["tokens"]), do_sample=False)[0]
        assert found.tolist() == case["prompt_tokens"] + case["tokens"]
    for case in smollm2["chats"]:
        encoded: Any = tokenizer.apply_chat_template(case["dialog"], add_generation_prompt=True)
        assert list(getattr(encoded, "input_ids", encoded)) == case["prompt_tokens"]
