"""Filters on distributions small enough to work out by hand, and their properties on any."""

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama.sampling import draw, keep_top_p, probabilities, sample

FOUR = [0.5, 0.25, 0.125, 0.125]


def kept(probs: list[float], top_p: float) -> list[int]:
    filtered = keep_top_p(torch.tensor([probs], dtype=torch.float64), top_p)[0]
    return [i for i, p in enumerate(filtered.tolist()) if p > 0]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.0, [0]),
        (0.4999, [0]),
        (0.5, [0, 1]),  # what is more probable than token 1 sums to 0.5, which is at most 0.5
        (0.75, [0, 1, 2]),
        (0.8, [0, 1, 2]),
        (0.875, [0, 1, 2, 3]),  # token 3 ranks behind its equal, token 2
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_tokens_whose_more_probable_ones_sum_to_at_most_p(top_p: float, expected: list[int]) -> None:
    assert kept(FOUR, top_p) == expected


def test_top_p_ranks_by_probability_not_by_place() -> None:
    assert kept([0.125, 0.25, 0.5, 0.125], 0.5) == [1, 2]
    assert kept([0.125, 0.125, 0.25, 0.5], 0.8) == [0, 2, 3]  # of equals the lower id ranks first
    assert kept([0.25, 0.25, 0.25, 0.25], 0.0) == [0]


def test_rows_are_filtered_apart() -> None:
    probs = torch.tensor([FOUR, [0.1, 0.1, 0.1, 0.7]], dtype=torch.float64)
    assert (keep_top_p(probs, 0.6) > 0).tolist() == [[True, True, False, False], [False, False, False, True]]


def test_kept_weights_are_unchanged() -> None:
    assert keep_top_p(torch.tensor([FOUR]), 0.5).tolist() == [[0.5, 0.25, 0, 0]]


@pytest.mark.parametrize(
    ("uniform", "expected"),
    [(0.0, 0), (0.4999, 0), (0.5, 1), (0.7499, 1), (0.75, 2), (0.875, 3), (1 - 2**-53, 3)],
)
def test_draw_inverts_the_cumulative_distribution(uniform: float, expected: int) -> None:
    point = torch.tensor([uniform], dtype=torch.float64)
    assert draw(torch.tensor([FOUR], dtype=torch.float64), point).tolist() == [expected]
    assert draw(torch.tensor([[8 * p for p in FOUR]], dtype=torch.float64), point).tolist() == [expected]


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.999999999, 1 - 2**-53, 1.0])
def test_draw_never_takes_a_token_of_weight_0(uniform: float) -> None:
    weights = torch.tensor([[0.0, 0.1, 0.0, 0.3, 0.0]], dtype=torch.float64)
    assert draw(weights, torch.tensor([uniform], dtype=torch.float64)).item() in (1, 3)


@pytest.mark.parametrize("temperature", [1e-300, 1e-4, 1.0, 100.0])
def test_probabilities_are_a_softmax_at_any_temperature(temperature: float) -> None:
    logits = [2000.0, 1999.0, -3000.0]
    expected = [math.exp((x - 2000) / temperature) if (x - 2000) / temperature > -700 else 0.0 for x in logits]
    found = probabilities(torch.tensor([logits]), temperature)[0].tolist()
    assert found == pytest.approx([e / sum(expected) for e in expected], rel=1e-12)


def test_temperature_0_and_top_p_0_take_the_most_probable_token() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, -1.0, 5.0, 4.0]])
    for uniform in (0.0, 0.5, 0.9999):
        u = torch.full((2,), uniform, dtype=torch.float64)
        assert sample(logits, 0, 0.9, u).tolist() == [1, 2]
        assert sample(logits, 1.0, 0.0, u).tolist() == [1, 2]
        assert sample(logits, 1e-4, 1.0, u)[1].item() == 2


def test_top_p_1_keeps_everything() -> None:
    """Ten thousand equal tokens: their rounded cumulative sum may pass 1, and the last is still drawn."""
    logits = torch.zeros(1, 10_000)
    assert sample(logits, 1.0, 1.0, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 9_999


def test_draws_follow_the_probabilities() -> None:
    """Chi-square over 20,000 draws; 5 kept tokens have 4 degrees of freedom, whose 0.1 % quantile is 18.5."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -0.5, -3.0]])
    weights = keep_top_p(probabilities(logits, 0.8), 0.98)[0]
    expected = (weights / weights.sum()).tolist()
    assert expected[5] == 0 and all(expected[:5])
    stream = random.Random(1)
    uniform = torch.tensor([stream.random() for _ in range(20_000)], dtype=torch.float64)
    counts = Counter(sample(logits.expand(20_000, -1), 0.8, 0.98, uniform).tolist())
    assert counts[5] == 0
    assert sum((counts[i] - 20_000 * p) ** 2 / (20_000 * p) for i, p in enumerate(expected[:5])) < 18.5


@given(
    logits=st.lists(st.floats(-50, 50), min_size=2, max_size=40),
    temperature=st.floats(1e-4, 10),
    top_p=st.floats(0, 1),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_a_drawn_token_belongs_to_the_nucleus(
    logits: list[float], temperature: float, top_p: float, uniform: float
) -> None:
    row = torch.tensor([logits], dtype=torch.float64)
    token = int(sample(row, temperature, top_p, torch.tensor([uniform], dtype=torch.float64)))
    probs = probabilities(row, temperature)[0].tolist()
    assert probs[token] > 0
    assert sum(p for p in probs if p > probs[token]) <= top_p + 1e-9


@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=30), st.floats(0, 1))
def test_the_nucleus_is_the_shortest_run_of_the_most_probable(weights: list[float], top_p: float) -> None:
    probs = [w / sum(weights) for w in weights]
    ranked = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    tokens = set(kept(probs, top_p))
    assert tokens == set(ranked[: len(tokens)]) and tokens
    assert sum(probs[i] for i in ranked[: len(tokens) - 1]) <= top_p + 1e-9
    if len(tokens) < len(probs):
        assert sum(probs[i] for i in ranked[: len(tokens)]) > top_p - 1e-9
