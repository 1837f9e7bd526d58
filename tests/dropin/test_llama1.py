"""LLaMA 1's interface: `generate` takes and returns texts."""

from collections.abc import Callable
from typing import Any

import pytest

from helpers.peers import transformers_model
from llama import LLaMA, Llama, ModelArgs, Tokenizer, Transformer

PROMPTS = ["the software is", "this"]


def test_returned_texts_hold_prompt_and_answer(build: Callable[..., Llama], checkpoint: Callable[..., Any]) -> None:
    import torch

    built = build("mha", max_seq_len=32, max_batch_size=2, dtype="float32", device="cpu")
    generator = LLaMA(built.model, built.tokenizer)
    assert isinstance(generator.model, Transformer) and isinstance(generator.tokenizer, Tokenizer)
    assert isinstance(built.model.params, ModelArgs)
    theirs, tokenizer = transformers_model(checkpoint("mha")), built.tokenizer
    for length in (6, 1000):
        expected = []
        for prompt in PROMPTS:
            ids = tokenizer.encode(prompt, bos=True, eos=False)
            for _ in range(min(length, 32 - len(ids))):
                ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
            assert 2 not in ids
            expected.append(tokenizer.sp_model.decode(ids))
        assert generator.generate(PROMPTS, max_gen_len=length, temperature=0) == expected
    assert all(text.startswith(prompt) for text, prompt in zip(generator.generate(PROMPTS, 4), PROMPTS, strict=True))


def test_it_ends_at_eos(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    built = build("mha", max_seq_len=32)
    prompt = built.tokenizer.encode(PROMPTS[0], bos=True, eos=False)
    (ids,), _ = built.generate([prompt], 8, temperature=0)
    at = next(i for i in range(1, 8) if ids[i] not in [*prompt, *ids[:i]])
    monkeypatch.setattr(built.tokenizer, "eos_id", ids[at])
    found = LLaMA(built.model, built.tokenizer).generate(PROMPTS[:1], 8, temperature=0)
    assert found == [built.tokenizer.decode([*prompt, *ids[:at]])]
