"""Names that programs import from Meta's modules."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_models.llama3
import pytest
import torch

from llama.generation import (
    B_INST,
    B_SYS,
    E_INST,
    E_SYS,
    SPECIAL_TAGS,
    UNSAFE_ERROR,
    ChatPrediction,
    CompletionPrediction,
    Dialog,
    InfillingPrediction,
    Llama,
    Message,
    Role,
    sample_top_p,
)


def test_names() -> None:
    assert (B_INST, E_INST, B_SYS, E_SYS) == ("[INST]", "[/INST]", "<<SYS>>\n", "\n<</SYS>>\n\n")
    assert SPECIAL_TAGS == ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<step>"]
    assert "not given to the model" in UNSAFE_ERROR
    assert None not in (ChatPrediction, CompletionPrediction, InfillingPrediction, Llama, Message, Dialog, Role)


@pytest.fixture(scope="module")
def published() -> Callable[[torch.Tensor, float], torch.Tensor]:
    """llama-models' sample_top_p. Its module cannot be imported without torchvision, so the function is extracted."""
    source = Path(llama_models.llama3.__file__).with_name("generation.py").read_text()
    (function,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "sample_top_p")
    names: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module([function], []), "generation.py", "exec"), names)
    return names["sample_top_p"]


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
def test_sample_top_p_draws_as_metas_package(
    p: float, published: Callable[[torch.Tensor, float], torch.Tensor]
) -> None:
    probs = torch.softmax(torch.randn(6, 40, generator=torch.Generator().manual_seed(2)) * 2, dim=-1)
    for seed in range(20):
        torch.manual_seed(seed)
        theirs = published(probs.clone(), p)
        torch.manual_seed(seed)
        ours = sample_top_p(probs, p)
        assert ours.shape == (6, 1) and torch.equal(ours, theirs)
    assert p or torch.equal(ours[:, 0], probs.argmax(-1))
