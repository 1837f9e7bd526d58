"""`generate` with a tensor of prompts, and a model as a context manager."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama


def test_a_tensor_of_prompts(build: Callable[..., Llama]) -> None:
    llama = build("mha")
    prompts = [[1, 450, 319], [1, 5, 6]]
    expected = llama.generate(prompts, 4, temperature=0)
    for kind in (torch.int64, torch.int32):
        assert llama.generate(torch.tensor(prompts, dtype=kind), 4, temperature=0) == expected
    assert llama.generate([torch.tensor(prompt) for prompt in prompts], 4, temperature=0) == expected  # type: ignore[misc]


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (torch.tensor([1, 2]), ValueError, r"a tensor of shape \[2\], expected \[bsz, seqlen\]: a single prompt is"),
        (torch.ones(1, 2), TypeError, r"a tensor of torch.float32, expected integers: tensor.long\(\)"),
        (torch.ones(1, 2, dtype=torch.bool), TypeError, "a tensor of torch.bool, expected integers"),
        (torch.ones(2, 0, dtype=torch.int64), ValueError, "prompt 0 is empty"),
    ],
)
def test_tensors_that_are_not_prompts(prompts: Any, error: type, message: str, build: Callable[..., Llama]) -> None:
    with pytest.raises(error, match=message):
        build("mha").generate(prompts, 4)


def test_a_with_block_closes_the_model(checkpoint: Callable[..., Path]) -> None:
    with Llama.build(checkpoint("mha")) as llama:
        assert llama.generate([[1, 5]], 2, temperature=0)[0]
    with pytest.raises(ValueError, match="this model is closed"):
        llama.generate([[1, 5]], 2)
    with pytest.raises(KeyError), Llama.build(checkpoint("mha")) as llama:
        raise KeyError("the program's own")
    assert not torch.distributed.is_initialized()
