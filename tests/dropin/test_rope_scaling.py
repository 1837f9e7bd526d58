"""The four numbers of Llama 3's rope scaling, in params.json and in other formats."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.faults import edit_params
from llama import Llama
from llama.checkpoint.errors import CheckpointError
from llama.checkpoint.params_json import read_params
from llama.convert import convert
from llama.model import rotary_angles
from llama.params import ModelArgs


@pytest.fixture
def copy(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    return lambda shards=1: Path(shutil.copytree(checkpoint("mha", shards), tmp_path / "saved"))


def greedy_ids(folder: Path) -> list[list[int]]:
    llama = Llama.build(folder, max_seq_len=32, max_batch_size=1, device="cpu")
    try:
        return llama.generate([[1, 20, 300, 4, 77]], 12, temperature=0)[0]
    finally:
        llama.close()


NUMBERS = [(8.0, 1.0, 4.0, 8192), (16.0, 1.0, 2.0, 4096), (32.0, 2.0, 8.0, 16384), (4.0, 1.0, 1.0, 512)]


@pytest.mark.parametrize(("factor", "low", "high", "context"), NUMBERS)
def test_rope_scaling_is_that_of_transformers(
    factor: float, low: float, high: float, context: int, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The frequencies for these numbers, and the numbers after a round trip through config.json."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = Path(shutil.copytree(checkpoint("llama31"), tmp_path / "meta"))
    numbers = {"rope_low_freq_factor": low, "rope_high_freq_factor": high, "rope_original_context_length": context}
    edit_params(folder, rope_scaling_factor=factor, **numbers)
    args = read_params(folder)
    convert(folder, tmp_path / "hf", to="hf")
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    turned = rotary_angles(args, 2)[1]
    torch.testing.assert_close(turned.angle(), theirs, rtol=1e-5, atol=1e-9)
    convert(tmp_path / "hf", tmp_path / "back")
    back = read_params(tmp_path / "back")
    names = ("rope_factor", *numbers)
    assert [getattr(back, name) for name in names] == [factor, low, high, context]
    assert greedy_ids(tmp_path / "back") == greedy_ids(folder)


@pytest.mark.parametrize(("low", "high", "context"), [(1.0, 4.0, 8192), (1.0, 4.0, 2048), (2.0, 6.0, 8192)])
def test_gguf_carries_the_numbers_in_its_divisors(
    low: float, high: float, context: int, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Only ratios can be recovered: 1 and 4 with a context of 2,048 equal 4 and 16 with 8,192."""
    import numpy as np

    from helpers import formats

    def divisors(theta: float, head_dim: int, factor: float) -> Any:
        turns = context * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return (1 / ((1 - kept) / factor + kept)).astype(np.float32)

    folder = Path(shutil.copytree(checkpoint("llama31"), tmp_path / "meta"))
    edit_params(folder, n_heads=2, n_kv_heads=1)  # wide heads: some of their 32 frequencies are interpolated
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "llama3_divisors", divisors)
        formats.write_gguf(folder, tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "out")
    found = read_params(tmp_path / "out")
    expected = ModelArgs(**vars(found) | {"rope_low_freq_factor": low, "rope_high_freq_factor": high})
    expected.rope_original_context_length = context
    assert found.rope_factor == 8
    ours, theirs = rotary_angles(found, 16), rotary_angles(expected, 16)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_low_freq_factor": 5.0}, "rope_high_freq_factor is 4, expected at least rope_low_freq_factor (5)"),
        ({"rope_original_context_length": 0}, "rope_original_context_length is 0, expected a positive integer"),
        ({"rope_high_freq_factor": "x"}, "rope_high_freq_factor is 'x', expected a positive number"),
    ],
)
def test_inconsistent_scaling(changes: dict[str, Any], expected: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    edit_params(folder, use_scaled_rope=True, **changes)
    with pytest.raises(CheckpointError) as caught:
        read_params(folder)
    assert expected in str(caught.value)
