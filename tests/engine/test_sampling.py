"""Sampling filters on distributions small enough to compute by hand, and their properties on random ones."""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from llama import ModelArgs
from llama.engine.requests import read_rows
from llama.engine.sampling import (
    Sampler,
    draw,
    draw_top_p,
    keep_top_k,
    keep_top_p,
    nucleus,
    penalize,
    probabilities,
)

FOUR = [0.5, 0.25, 0.125, 0.125]


def sample(logits: torch.Tensor, uniform: float | list[float], prompts: Any = None, **settings: Any) -> list[int]:
    """One id for each row of logits, with the settings of `generate`."""
    bsz, vocab = logits.shape
    args = ModelArgs(vocab_size=vocab, max_seq_len=10_000)
    rows = read_rows(args, lambda: 1, (), prompts or [[0]] * bsz, **settings)
    uniforms = torch.tensor(uniform if isinstance(uniform, list) else [uniform] * bsz, dtype=torch.float64)
    return Sampler(rows, vocab, logits.device).sample(logits, uniforms).tolist()


def kept(probs: list[float], top_p: float) -> list[int]:
    filtered = keep_top_p(torch.tensor([probs], dtype=torch.float64), top_p)[0]
    return [i for i, p in enumerate(filtered.tolist()) if p > 0]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.0, [0]),
        (0.4999, [0]),
        (0.5, [0, 1]),  # token 0 sums to 0.5, which is not above 0.5: token 1 stays
        (0.75, [0, 1, 2]),
        (0.8, [0, 1, 2]),
        (0.875, [0, 1, 2, 3]),  # token 3 ranks after token 2, which has the same probability
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_tokens_whose_more_probable_ones_sum_to_at_most_p(top_p: float, expected: list[int]) -> None:
    assert kept(FOUR, top_p) == expected


def test_top_p_ranks_by_probability_not_by_place() -> None:
    assert kept([0.125, 0.25, 0.5, 0.125], 0.5) == [1, 2]
    assert kept([0.125, 0.125, 0.25, 0.5], 0.8) == [0, 2, 3]  # of equal probabilities the lower id ranks first
    assert kept([0.25, 0.25, 0.25, 0.25], 0.0) == [0]


def test_rows_are_filtered_apart() -> None:
    probs = torch.tensor([FOUR, [0.1, 0.1, 0.1, 0.7]], dtype=torch.float64)
    assert (keep_top_p(probs, 0.6) > 0).tolist() == [[True, True, False, False], [False, False, False, True]]


def test_kept_weights_are_unchanged() -> None:
    assert keep_top_p(torch.tensor([FOUR]), 0.5).tolist() == [[0.5, 0.25, 0, 0]]


def row_logits(kind: str, vocab: int) -> torch.Tensor:
    logits = 4 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    if kind == "bfloat16":  # many ids with the same logit
        logits = logits.bfloat16().float()
    elif kind == "flat":
        logits.zero_()
    elif kind == "two values":
        logits = (logits > 0).float()
    elif kind == "peaked":
        logits[vocab // 2] = 60
    elif kind == "few":
        logits[vocab // 8 :] = -torch.inf
    elif kind == "one":
        logits[1:] = -torch.inf
    elif kind == "NaN":
        logits[vocab // 3] = torch.nan
    elif kind == "inf":
        logits[vocab // 3] = torch.inf
    elif kind == "only -inf":
        logits.fill_(-torch.inf)
    return logits


KINDS = ["random", "bfloat16", "flat", "two values", "peaked", "few", "one", "NaN", "inf", "only -inf"]


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.1, 0.9, 0.9999, 1 - 2**-53, 1.0, math.inf])
@pytest.mark.parametrize("vocab", [2, 100, 49_152])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_top_p_on_cpus_draws_as_after_a_full_sort(temperature: float, vocab: int, top_p: float) -> None:
    """With NaN rows too: what these draw is an error, but the same one on every device."""
    probs = probabilities(torch.stack([row_logits(kind, vocab) for kind in KINDS]), temperature)
    limits = torch.full((len(KINDS), 1), top_p, dtype=torch.float64)
    kept = keep_top_p(probs, limits)
    for kind, row, expected in zip(KINDS, probs, kept, strict=True):
        ids = torch.from_numpy(nucleus(row.numpy(), top_p))
        if not row.isnan().any():
            assert torch.equal(torch.zeros_like(row).index_copy(0, ids, row[ids]), expected), kind
    stream = torch.Generator().manual_seed(vocab)
    for _ in range(10):
        uniform = torch.rand(len(KINDS), generator=stream, dtype=torch.float64)
        assert torch.equal(draw_top_p(probs, limits, uniform), draw(kept, uniform))
    limits[::2] = 0.5
    assert torch.equal(draw_top_p(probs, limits, uniform), draw(keep_top_p(probs, limits), uniform))
    for point in (0.0, 1 - 2**-53):
        uniform.fill_(point)
        assert torch.equal(draw_top_p(probs, limits, uniform), draw(keep_top_p(probs, limits), uniform))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 40))
def test_top_p_of_tied_weights_on_cpus(levels: list[int], top_p: float, step: int) -> None:
    probs = torch.softmax(-torch.tensor(levels, dtype=torch.float64) * step / 8, dim=-1)
    boundary = probs.sort(descending=True).values.cumsum(dim=-1)[len(levels) // 2].item()
    for limit in (top_p, boundary):
        expected = keep_top_p(probs[None], limit)[0].nonzero()[:, 0]
        assert [i for i in nucleus(probs.numpy(), limit) if probs[i] > 0] == expected.tolist()


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
        assert sample(logits, uniform, temperature=0, top_p=0.9) == [1, 2]
        assert sample(logits, uniform, temperature=1.0, top_p=0.0) == [1, 2]
        assert sample(logits, uniform, temperature=1e-4, top_p=1.0)[1] == 2


def test_top_p_1_keeps_everything() -> None:
    """Ten thousand equal tokens: the last can be drawn, even if the rounded cumulative sum exceeds 1 before it."""
    logits = torch.zeros(1, 10_000)
    assert sample(logits, 1 - 2**-53, temperature=1.0, top_p=1.0) == [9_999]


MIXED: dict[str, Any] = {
    "temperature": [0.7, 0, 1.3, 1.0, 0.5, 1.0],
    "top_p": [1.0, 0.5, 0.9, 0.6, 0.8, 1.0],
    "top_k": [None, 3, 20, None, 1, 300],
    "repetition_penalty": [1.0, 1.0, 1.3, 2.0, 0.8, 1.1],
}
ADDED: dict[str, Any] = {
    "frequency_penalty": [0, 0.5, -2, 2, 0, 1.5],
    "presence_penalty": [0, 2, 0.3, -1, 0, 0],
    "logit_bias": [None, {7: 5}, {"3": -100, 9: 2.5}, None, {11: 100}, {}],
}


def test_settings_of_rows_do_not_mix() -> None:
    torch.manual_seed(3)
    logits, prompts = 4 * torch.randn(6, 512), [[row, 7, 99, 500 - row] for row in range(6)]
    uniform = torch.rand(6, dtype=torch.float64).tolist()
    settings = MIXED | ADDED
    for _ in range(50):
        together = sample(logits, uniform, prompts, **settings)
        for row in range(6):
            one = {name: values[row] for name, values in settings.items()}
            assert sample(logits[row : row + 1], uniform[row], [prompts[row]], **one) == [together[row]]
        logits, uniform = 4 * torch.randn(6, 512), torch.rand(6, dtype=torch.float64).tolist()


def test_penalized_rows_see_what_they_have_drawn() -> None:
    """An id counts as seen in its row if it is in the prompt or has been drawn."""
    args = ModelArgs(vocab_size=4, max_seq_len=10)
    rows = read_rows(args, lambda: 1, (), [[0], [1]], temperature=0, repetition_penalty=[10.0, 1.0])
    sampler, uniform = Sampler(rows, 4, torch.device("cpu")), torch.zeros(2, dtype=torch.float64)
    logits = torch.tensor([[4.0, 3.0, 2.0, -1.0]] * 2)
    assert [sampler.sample(logits, uniform).tolist() for _ in range(4)] == [[1, 0], [2, 0], [0, 0], [0, 0]]
    # 0.4, 0.3, 0.2, -1: the three that were seen are still more probable than the negative one.


def test_counted_penalties_are_openais() -> None:
    """Against OpenAI's formula, id by id, over the ids that a row has drawn. Those of the prompt do not count."""
    torch.manual_seed(4)
    args, bsz, vocab = ModelArgs(vocab_size=9, max_seq_len=100), 6, 9
    frequency, presence = [0, 0.5, -2, 2, 0, 1.5], [0, 2, 0.3, -1, 0.7, 0]
    bias: list[dict[int, float]] = [{}, {7: 0.5}, {3: -9}, {}, {}, {0: 1}]
    rows = read_rows(
        args, lambda: 1, (), [[0, 1, 1]] * bsz,
        temperature=0, frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias,
    )  # fmt: skip
    rows[5].tokens += [2, 2, 4]  # a row that is resumed: these were drawn by another sampler
    drawn: list[list[int]] = [[], [], [], [], [], [2, 2, 4]]
    sampler, repeats = Sampler(rows, vocab, torch.device("cpu")), 0
    for _ in range(30):
        logits = torch.randn(bsz, vocab)
        expected = []
        for row in range(bsz):
            counts = Counter(drawn[row])
            scores = [
                logits[row, j].item()
                - counts[j] * frequency[row]
                - (counts[j] > 0) * presence[row]
                + bias[row].get(j, 0)
                for j in range(vocab)
            ]
            expected.append(max(range(vocab), key=scores.__getitem__))
        found = sampler.sample(logits, torch.zeros(bsz, dtype=torch.float64)).tolist()
        assert found == expected
        repeats += sum(a != b for a, b in zip(found, logits.argmax(dim=-1).tolist(), strict=True))
        for row in range(bsz):
            drawn[row].append(found[row])
    assert repeats > 20  # the settings made a difference


def test_the_repetition_penalty_sees_the_models_own_logits() -> None:
    """Id 1 is in the prompt. 4 / 2 + 1 exceeds 2.9; (4 + 1) / 2 would not."""
    logits = torch.tensor([[2.9, 4.0, 0.0, -1.0]])
    assert sample(logits, 0.0, [[1]], temperature=0, repetition_penalty=2.0, logit_bias={1: 1.0}) == [1]
    assert sample(logits, 0.0, [[1]], temperature=0, repetition_penalty=2.0, logit_bias={1: 0.8}) == [0]


def test_a_bias_of_100_forces_an_id_and_one_of_minus_100_bans_it() -> None:
    logits = torch.tensor([[30.0, -20.0, 3.0, 2.0]] * 2)
    for temperature in (0, 1.0):
        found = sample(logits, 0.999, temperature=temperature, logit_bias=[{1: 100}, {0: -100}])
        assert found[0] == 1 and found[1] in (2, 3)


def test_settings_that_no_row_uses_cost_nothing() -> None:
    rows = read_rows(ModelArgs(vocab_size=4), lambda: 1, (), [[0], [1]])
    sampler = Sampler(rows, 4, torch.device("cpu"))
    assert sampler.counts is None and sampler.bias is None and sampler.penalty is None


@pytest.mark.parametrize("vocab", [13, 512, 32_000])
def test_filters_are_those_of_transformers(vocab: int) -> None:
    """transformers' logits processors in our order, on random logits, each row with its own settings."""
    torch.manual_seed(vocab)
    logits = 3 * torch.randn(6, vocab)
    prompts = torch.randint(vocab, (6, 40))
    columns = {name: [2 * vocab if v is None else v for v in values] for name, values in MIXED.items()}
    columns["temperature"] = [t or 0.9 for t in columns["temperature"]]
    expected = []
    for row in range(6):
        scores = logits[row : row + 1]
        for processor in (
            transformers.RepetitionPenaltyLogitsProcessor(float(columns["repetition_penalty"][row])),
            transformers.TemperatureLogitsWarper(columns["temperature"][row]),
            transformers.TopKLogitsWarper(columns["top_k"][row]),
            transformers.TopPLogitsWarper(columns["top_p"][row]),
        ):
            scores = processor(prompts[row : row + 1], scores)
        expected.append(scores.double().softmax(dim=-1))
    column = {name: torch.tensor(values)[:, None] for name, values in columns.items()}
    seen = torch.zeros(6, vocab, dtype=torch.bool).scatter(1, prompts, True)
    found = penalize(logits, seen, column["repetition_penalty"])
    found = keep_top_k(found, column["top_k"], vocab)
    found = keep_top_p(probabilities(found, column["temperature"]), column["top_p"])
    found /= found.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-12)
    assert ((found > 0).sum(dim=-1) < vocab).any()


def test_a_tiny_penalty_does_not_overflow() -> None:
    logits = torch.tensor([[0.5, 1.0, 2.0, 1.0]])
    for temperature in (0, 1.0):
        assert sample(logits, 0.5, [[1]], temperature=temperature, repetition_penalty=1e-40) == [1]


def test_top_k_keeps_the_equals_of_the_last() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]] * 4)
    kept = keep_top_k(logits, torch.tensor([[1], [2], [0], [9]]), 9) > -torch.inf
    assert kept.int().tolist() == [[0, 1, 0, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]


def test_top_p_1_keeps_everything_in_a_mixed_batch() -> None:
    """45 equal ids, whose rounded probabilities sum to more than 1, and one improbable id."""
    logits = torch.tensor([[0.0] * 45 + [-31.0]] * 2)
    assert keep_top_p(probabilities(logits[:1], 1.0), 1.0)[0, 45] == 0  # the filter at 1 would drop it
    assert sample(logits, 1 - 2**-53, temperature=1.0, top_p=[1.0, 0.5])[0] == 45


def test_draws_with_every_setting_follow_the_probabilities() -> None:
    """Chi-square over 20,000 draws against weights computed by hand.

    Ids 0 and 2 were seen, so their logits 2 and -0.5 become 1 and -1. Top-k 4 leaves 1, 1, 0.5, 0. Temperature 2 halves
    them, and top-p leaves three ids. With 2 degrees of freedom, the 0.1 % quantile is 13.8.
    """
    logits = torch.tensor([[2.0, 1.0, -0.5, 0.5, 0.0, -0.7]])
    weights = [math.exp(0.5), math.exp(0.5), 0, math.exp(0.25), 0, 0]
    stream = random.Random(2)
    counts = Counter(
        sample(
            logits.expand(20_000, -1),
            [stream.random() for _ in range(20_000)],
            [[0, 2]] * 20_000,
            temperature=2.0,
            top_k=4,
            top_p=0.7,
            repetition_penalty=2.0,
        )
    )
    expected = {i: 20_000 * w / sum(weights) for i, w in enumerate(weights) if w}
    assert counts.keys() == expected.keys()
    assert sum((counts[i] - e) ** 2 / e for i, e in expected.items()) < 13.8


def test_draws_follow_the_probabilities() -> None:
    """Chi-square over 20,000 draws; 5 kept tokens have 4 degrees of freedom, whose 0.1 % quantile is 18.5."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -0.5, -3.0]])
    weights = keep_top_p(probabilities(logits, 0.8), 0.98)[0]
    expected = (weights / weights.sum()).tolist()
    assert expected[5] == 0 and all(expected[:5])
    stream = random.Random(1)
    uniform = [stream.random() for _ in range(20_000)]
    counts = Counter(sample(logits.expand(20_000, -1), uniform, temperature=0.8, top_p=0.98))
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
    token = sample(row, uniform, temperature=temperature, top_p=top_p)[0]
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
