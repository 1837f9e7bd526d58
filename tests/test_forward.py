"""Logits against three implementations that share no code with ours."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from golden.make_checkpoint import MODELS
from helpers import plain
from helpers.peers import transformers_model
from helpers.tolerance import FLOAT32, near
from llama import Llama, ModelArgs
from llama.model import rotary_angles

LENGTHS = (1, 24, 300)


def prompt(length: int) -> list[int]:
    return [1, *np.random.default_rng(length).integers(3, 512, length - 1).tolist()]


def distance(ours: torch.Tensor, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest logit."""
    return float(np.abs(ours.double().numpy() - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", MODELS)
def test_float32_is_within_1e5_of_a_plain_float64_forward(
    name: str, checkpoint: Callable[..., Path], build: Callable[..., Llama], measured: Callable[[str, object], None]
) -> None:
    params, weights = plain.load(checkpoint(name))
    llama = build(name, max_seq_len=300)
    worst = max(
        distance(llama.model.forward(torch.tensor([ids]), 0)[0], plain.logits(params, weights, ids))
        for ids in map(prompt, LENGTHS)
    )
    measured(f"float32 to float64, {name}, worst logit / largest", worst)
    assert worst < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_within_its_rounding_of_a_plain_float64_forward(
    name: str, checkpoint: Callable[..., Path], build: Callable[..., Llama], measured: Callable[[str, object], None]
) -> None:
    """bfloat16 has 8 bits: up to 0.4 % a rounding, with a few dozen roundings from the embedding to a logit."""
    params, weights = plain.load(checkpoint(name))
    llama = build(name, max_seq_len=300, dtype="bfloat16")
    worst = max(
        distance(llama.model.forward(torch.tensor([ids]), 0)[0], plain.logits(params, weights, ids))
        for ids in map(prompt, LENGTHS)
    )
    measured(f"bfloat16 to float64, {name}, worst logit / largest", worst)
    assert 1e-4 < worst < 5e-2  # less would mean that it did not run in bfloat16


@pytest.mark.parametrize("name", MODELS)
def test_transformers_agrees(name: str, checkpoint: Callable[..., Path], build: Callable[..., Llama]) -> None:
    theirs = transformers_model(checkpoint(name))
    llama = build(name, max_seq_len=2000)
    for length in (1, 24, 2000):
        ids = torch.tensor([prompt(length)])
        with torch.inference_mode():
            expected = theirs(ids).logits[0].numpy()
        assert distance(llama.model.forward(ids, 0)[0], expected) < 1e-4, length


@pytest.fixture
def model_parallel_of_one(build: Callable[..., Llama]) -> Iterator[None]:
    """llama-models' layers need fairscale's groups, which a model of this package sets up."""
    build("mha", max_seq_len=8, max_batch_size=1)
    yield


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("model_parallel_of_one")
def test_llama_models_agrees(name: str, checkpoint: Callable[..., Path], build: Callable[..., Llama]) -> None:
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer

    params = json.loads((checkpoint(name) / "params.json").read_text())
    params |= {"vocab_size": 512, "max_seq_len": 2000, "max_batch_size": 1}
    theirs = Transformer(ModelArgs(**({"rope_theta": 10000.0} | params))).eval()
    theirs.load_state_dict(torch.load(checkpoint(name) / "consolidated.00.pth", weights_only=True), strict=True)
    llama = build(name, max_seq_len=2000)
    for length in (1, 24, 2000):
        ids = torch.tensor([prompt(length)])
        assert distance(llama.model.forward(ids, 0)[0], theirs(ids, 0)[0].numpy()) < 1e-4, length


@pytest.mark.parametrize("name", MODELS)
def test_forward_in_pieces_equals_forward_at_once(name: str, build: Callable[..., Llama]) -> None:
    """forward(tokens, start_pos) as Meta's callers use it: chunks of any size, then single tokens, with two rows."""
    llama = build(name, max_seq_len=64, max_batch_size=2)
    tokens = torch.tensor([prompt(40), prompt(41)[:40]])
    whole = llama.model.forward(tokens, 0)
    assert whole.shape == (2, 40, 512) and whole.dtype == torch.float32
    start = 0
    for size in (7, 1, 20, 1, 1, 10):
        piece = llama.model.forward(tokens[:, start : start + size], start)
        torch.testing.assert_close(piece, whole[:, start : start + size], rtol=0, atol=near(llama, whole))
        start += size
    assert start == 40


def test_forward_outside_the_cache_is_refused(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=16, max_batch_size=1)
    for shape, start in (((1, 17), 0), ((1, 2), 15), ((2, 1), 0), ((1, 1), -1)):
        with pytest.raises(ValueError, match="max_batch_size 1 and max_seq_len 16"):
            llama.model.forward(torch.ones(shape, dtype=torch.int64), start)


def test_forward_refuses_ids_that_would_embed_as_zeros(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=16)
    for token in (512, -1):
        with pytest.raises(ValueError, match="ids outside the vocabulary of 512"):
            llama.model.forward(torch.tensor([[1, token]]), 0)
    with pytest.raises(ValueError, match=r"shape \(2,\), expected \[bsz, seqlen\]"):
        llama.model.forward(torch.tensor([1, 2]), 0)


@pytest.mark.parametrize(("factor", "args"), [(8.0, {}), (32.0, {"dim": 2048, "n_layers": 16}), (5.0, {})])
def test_the_rope_factor_is_applied(factor: float, args: dict[str, int]) -> None:
    named = {"rope_scaling_factor": 5.0} if factor == 5 else {}
    shape = {"dim": 4096, "n_layers": 32} | args
    made = ModelArgs(**shape, n_heads=32, use_scaled_rope=True, rope_theta=500000.0, max_seq_len=1000, **named)  # type: ignore[arg-type]  # ints and floats
    found = rotary_angles(made, 1000)
    params = {"use_scaled_rope": True, "rope_theta": 500000.0, "factor": factor}
    angles = np.outer(np.arange(1000), plain.frequencies(params, made.head_dim))
    # A frequency of at most 1 has up to four roundings, multiplied by the position; a cosine has two.
    bound = 2 * FLOAT32 + 4 * FLOAT32 * np.arange(1000)[:, None]
    assert (np.abs(found.real.double().numpy() - np.cos(angles)) <= bound).all()
    assert (np.abs(found.imag.double().numpy() - np.sin(angles)) <= bound).all()
