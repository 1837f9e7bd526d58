"""`generate`: rows do not depend on each other, and log-probabilities equal those of rescoring."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import plain
from helpers.ranks import run_ranks
from llama import Llama

PROMPTS = [[1, 450, 319, 352, 499], [1, 278], [1, *range(3, 60)], [7], [1, 205, 8, 26, 508, 468, 143, 185]]
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": 11}


def close(ours: list[float], theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["mha", "gqa", "llama31"])
def test_ragged_equals_alone_equals_shuffled(name: str, settings: dict[str, Any], build: Callable[..., Llama]) -> None:
    llama = build(name, max_seq_len=96, max_batch_size=len(PROMPTS))
    tokens, logprobs = llama.generate(PROMPTS, 12, logprobs=True, echo=True, **settings)
    assert logprobs is not None
    order = [3, 0, 4, 2, 1]
    shuffled, shuffled_logprobs = llama.generate([PROMPTS[i] for i in order], 12, logprobs=True, echo=True, **settings)
    assert shuffled_logprobs is not None
    for place, i in enumerate(order):
        assert shuffled[place] == tokens[i]
        close(shuffled_logprobs[place], logprobs[i])
    for i, prompt in enumerate(PROMPTS):
        alone, alone_logprobs = llama.generate([prompt], 12, logprobs=True, echo=True, **settings)
        assert alone_logprobs is not None
        assert alone[0] == tokens[i]
        close(alone_logprobs[0], logprobs[i])


@pytest.mark.parametrize("settings", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["mha", "gqa", "code", "llama31"])
def test_logprobs_equal_rescoring_with_an_uncached_forward(
    name: str, settings: dict[str, Any], build: Callable[..., Llama], checkpoint: Callable[..., Path]
) -> None:
    llama = build(name, max_seq_len=96, max_batch_size=len(PROMPTS))
    tokens, logprobs = llama.generate(PROMPTS, 20, logprobs=True, echo=True, **settings)
    assert logprobs is not None
    params, weights = plain.load(checkpoint(name))
    for ids, scores in zip(tokens, logprobs, strict=True):
        logits = plain.logits(params, weights, ids)
        expected = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        close(scores, [0.0, *expected[np.arange(len(ids) - 1), ids[1:]]])
        assert len(set(scores)) > len(scores) // 2  # not all of them are one number such as -0.0


def generated(folder: Path) -> Any:
    llama = Llama.build(folder, max_seq_len=96, max_batch_size=len(PROMPTS))
    greedy = llama.generate(PROMPTS, 16, temperature=0, logprobs=True, echo=True)
    sampled = llama.generate(PROMPTS, 16, logprobs=True, **SAMPLED)
    llama.close()
    return greedy, sampled


@pytest.mark.parametrize("name", ["mha", "gqa", "llama31"])
def test_one_two_and_four_ranks_agree(name: str, checkpoint: Callable[..., Path]) -> None:
    one = run_ranks(1, generated, checkpoint(name, 2))[0]
    for world_size in (2, 4):
        for found in run_ranks(world_size, generated, checkpoint(name, 2)):
            for (tokens, logprobs), (expected, expected_logprobs) in zip(found, one, strict=True):
                assert tokens == expected
                for ours, theirs in zip(logprobs, expected_logprobs, strict=True):
                    close(ours, theirs)


# Lengths, stops, padding --------------------------------------------------------------------------


def test_max_gen_len_holds_for_each_row(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=96, max_batch_size=5)
    tokens, logprobs = llama.generate(PROMPTS, 9, temperature=0)
    assert [len(row) for row in tokens] == [9] * 5 and logprobs is None


def test_generation_ends_where_the_context_is_full(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=10, max_batch_size=3)
    prompts = [[1, 5, 6], [1] * 10, [1] * 9]
    tokens, _ = llama.generate(prompts, 100, temperature=0)
    assert [len(row) for row in tokens] == [7, 0, 1]
    alone, _ = build("mha", max_seq_len=96).generate(prompts[:1], 7, temperature=0)
    assert tokens[0] == alone[0]


def test_max_gen_len_0_with_echo_scores_the_prompt(build: Callable[..., Llama]) -> None:
    llama = build("gqa", max_seq_len=64, max_batch_size=3)
    prompts = [[1, 450, 319, 352, 499], [1], [1] * 64]
    tokens, logprobs = llama.generate(prompts, 0, logprobs=True, echo=True)
    _, more = llama.generate(prompts[:2], 5, logprobs=True, echo=True, temperature=0)
    assert tokens == prompts and logprobs is not None and more is not None
    assert logprobs[1] == [0.0] and logprobs[0][0] == 0.0
    close(logprobs[0], more[0][:5])
    assert llama.generate(prompts, 0) == ([[], [], []], None)
    assert llama.generate([], 5) == ([], None)
    assert llama.generate([], 5, logprobs=True, echo=True) == ([], [])


def test_a_stop_id_ends_its_row_and_is_not_returned(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=64, max_batch_size=3)
    free, _ = llama.generate(PROMPTS[:2], 12, temperature=0)
    stop = free[0][5]
    tokens, logprobs = llama.generate(PROMPTS[:2], 12, temperature=0, logprobs=True, stop_token_ids=[stop])
    assert logprobs is not None
    assert tokens[0] == free[0][: free[0].index(stop)] and len(logprobs[0]) == len(tokens[0])
    assert tokens[1] == (free[1][: free[1].index(stop)] if stop in free[1] else free[1])


def test_stop_ids_of_a_call_are_added_to_the_models_own(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=64)
    (row,), _ = llama.generate([[1, 5]], 20, temperature=0)
    llama.tokenizer.stop_tokens = {row[4]}
    unused: Any = np.array([i for i in range(512) if i not in row][:2])
    found = llama.generate([[1, 5]], 20, temperature=0, stop_token_ids=unused)
    assert found[0] == [row[: row.index(row[4])]]


def test_a_refused_call_draws_no_seed(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=64, seed=5)
    expected = llama.generate([[1, 5]], 12, temperature=1.0)
    torch.manual_seed(5)
    with pytest.raises(ValueError):
        llama.generate([[1], []], 4)
    assert llama.generate([[1, 5]], 12, temperature=1.0) == expected


def test_a_stop_id_in_the_prompt_ends_nothing(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=64)
    eos = llama.tokenizer.eos_id
    tokens, _ = llama.generate([[1, eos, 300, eos]], 6, temperature=0, echo=True)
    assert tokens[0][:4] == [1, eos, 300, eos] and len(tokens[0]) == 10


@pytest.mark.parametrize("pad_id", [-1, 0, 2, 319])
def test_padding_is_known_by_length_whatever_the_pad_id(pad_id: int, build: Callable[..., Llama]) -> None:
    """319 occurs in a prompt. It counts as a token there even if it is the pad id."""
    llama = build("mha", max_seq_len=96, max_batch_size=5)
    expected = llama.generate(PROMPTS, 8, temperature=0, logprobs=True, echo=True)
    assert llama.tokenizer.pad_id == -1
    llama.tokenizer.pad_id = pad_id
    assert llama.generate(PROMPTS, 8, temperature=0, logprobs=True, echo=True) == expected


# Random streams -----------------------------------------------------------------------------------


def test_a_seed_repeats_and_calls_without_one_continue_the_stream(build: Callable[..., Llama]) -> None:
    sampled: dict[str, Any] = {"temperature": 2.0, "top_p": 1.0}
    first = build("mha", seed=5)
    a, b = first.generate([[1, 5]] * 2, 12, **sampled)[0], first.generate([[1, 5]] * 2, 12, **sampled)[0]
    assert len({tuple(row) for row in a + b}) == 4  # unseeded rows and calls differ
    second = build("mha", seed=5)
    assert second.generate([[1, 5]] * 2, 12, **sampled)[0] == a  # they repeat with the seed of `build`
    assert build("mha", seed=6).generate([[1, 5]] * 2, 12, **sampled)[0] != a
    seeded = first.generate([[1, 5]], 12, seed=3, **sampled)[0]
    assert seeded == second.generate([[1, 5]], 12, seed=3, **sampled)[0]
    assert seeded != first.generate([[1, 5]], 12, seed=4, **sampled)[0]


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt_tokens": [[1], []]}, ValueError, "prompt 1 is empty"),
        ({"prompt_tokens": [[1] * 17]}, ValueError, "prompt 0 has 17 ids, but max_seq_len is 16"),
        ({"prompt_tokens": [[1], [512]]}, ValueError, "prompt 1 holds id 512, outside the vocabulary of 512"),
        ({"prompt_tokens": [[-1]]}, ValueError, "prompt 0 holds id -1"),
        ({"prompt_tokens": [[1]] * 3}, ValueError, "3 rows, but max_batch_size is 2"),
        ({"prompt_tokens": "hello"}, TypeError, "a list of lists, not str"),
        ({"prompt_tokens": ["hello"]}, TypeError, "prompt 0 is not a list of ids"),
        ({"prompt_tokens": [1, 2]}, TypeError, "prompt 0 is not a list of ids"),
        ({"prompt_tokens": [[1.5]]}, TypeError, "prompt 0 is not a list of ids"),
        ({"max_gen_len": -1}, ValueError, "max_gen_len is -1"),
        ({"max_gen_len": 2.5}, TypeError, "max_gen_len is 2.5"),
        ({"temperature": -0.1}, ValueError, "temperature is -0.1"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"temperature": float("inf")}, ValueError, "temperature is inf"),
        ({"temperature": "sampled"}, TypeError, "temperature is 'sampled'"),
        ({"top_p": 1.1}, ValueError, "top_p is 1.1"),
        ({"temperature": [0.5, 0.6]}, ValueError, "temperature has 2 values for 1 prompts: give one"),
        ({"temperature": [None]}, TypeError, "temperature is None, expected a number"),
        ({"top_p": ["0.5"]}, TypeError, "top_p is '0.5'"),
        ({"top_k": 0}, ValueError, "top_k is 0, expected an integer from 1"),
        ({"top_k": [2.0]}, TypeError, "top_k is 2.0"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty is 0, expected a number above 0"),
        ({"repetition_penalty": -1.0}, ValueError, "repetition_penalty is -1.0"),
        ({"frequency_penalty": 2.1}, ValueError, "frequency_penalty is 2.1, expected a number from -2 to 2"),
        ({"presence_penalty": "a"}, TypeError, "presence_penalty is 'a', expected a number"),
        ({"presence_penalty": True}, TypeError, "presence_penalty is True, expected a number"),
        ({"frequency_penalty": math.nan}, ValueError, "frequency_penalty is nan, expected a number from -2 to 2"),
        ({"logit_bias": 3}, TypeError, "logit_bias is '3', expected a mapping from ids to numbers"),
        ({"logit_bias": {"a": 1}}, ValueError, "logit_bias has the key 'a', expected an id"),
        ({"logit_bias": {-1: 1}}, ValueError, "logit_bias has the key -1, expected an id"),
        ({"logit_bias": {3: 101}}, ValueError, "logit_bias of id 3 is 101, expected a number from -100 to 100"),
        ({"logit_bias": {512: 1}}, ValueError, "logit_bias holds id 512, outside the vocabulary of 512"),
        ({"stop_token_ids": [2, 512]}, ValueError, "stop_token_ids holds id 512, outside the vocabulary of 512"),
        ({"stop_token_ids": [-1]}, ValueError, "stop_token_ids holds id -1, outside the vocabulary of 512"),
        ({"n": 0}, ValueError, "n is 0"),
        ({"n": 3}, ValueError, "3 rows, but max_batch_size is 2"),
        ({"n": True}, TypeError, "n is True"),
        ({"logprobs": -1}, ValueError, "logprobs is -1"),
        ({"logprobs": 513}, ValueError, "logprobs is 513, but the vocabulary has 512 ids"),
        ({"logprobs": 1.5}, TypeError, "logprobs is 1.5"),
        ({"stop_token_ids": [[5], [6]]}, ValueError, "stop_token_ids has 2 values for 1 prompts"),
        ({"stop_token_ids": ["\n"]}, TypeError, "stop_token_ids"),
        ({"stop_token_ids": 5}, TypeError, "stop_token_ids is 5, expected a list of ids"),
        ({"seed": "x"}, TypeError, "seed is 'x'"),
        ({"seed": -1}, ValueError, "seed is -1"),  # random.Random would treat it as 1
    ],
)
def test_mistakes_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str, build: Callable[..., Llama]
) -> None:
    llama = build("mha", max_seq_len=16, max_batch_size=2)
    with pytest.raises(error, match=message):
        llama.generate(**{"prompt_tokens": [[1]], "max_gen_len": 4, **arguments})


def test_log_probabilities_are_those_of_the_raw_logits(build: Callable[..., Llama]) -> None:
    """Whatever the settings add to the logits, the log-probabilities equal those of scoring the answer."""
    llama = build("mha", max_seq_len=64)
    plain_ids, _ = llama.generate(PROMPTS[:2], 12, temperature=0)
    added: dict[str, Any] = {"frequency_penalty": 1.0, "presence_penalty": 2.0, "logit_bias": {9: 100, 77: 3}}
    ids, logprobs = llama.generate(PROMPTS[:2], 12, 0, logprobs=True, echo=True, **added)
    _, rescored = llama.generate(ids, 0, logprobs=True, echo=True)
    assert logprobs is not None and rescored is not None
    for ours, theirs in zip(logprobs, rescored, strict=True):
        close(ours, theirs)
    answers = [row[len(prompt) :] for row, prompt in zip(ids, PROMPTS, strict=False)]
    assert answers != plain_ids and all(row[0] == 9 for row in answers)


def test_numpy_numbers_are_numbers(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=16)
    expected = llama.generate([[1, 5]], 4, temperature=0.5, top_p=0.5, stop_token_ids=[7], seed=3)
    arguments: dict[str, Any] = {"temperature": np.float32(0.5), "top_p": np.float32(0.5), "seed": np.int64(3)}
    arguments |= {"prompt_tokens": [np.array([1, 5])], "max_gen_len": np.int64(4), "stop_token_ids": [np.int64(7)]}
    assert llama.generate(**arguments) == expected


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_raise(value: float, logprobs: bool, build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=32, plain=True)  # as its modules are written
    llama.model.output.weight[7] = value
    for temperature in (0, 0.8):
        with pytest.raises(FloatingPointError, match="at step 0, row 0, rank 0"):
            llama.generate([[1, 5]], 4, temperature, logprobs=logprobs)


def test_logits_are_checked_at_every_step(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    llama = build("mha", max_seq_len=32)
    logits, steps = llama.executor.logits, iter(range(100))
    spoilt = lambda h: logits(h) + (float("nan") if next(steps) == 2 else 0) * torch.eye(2, 512)[:, :1]  # noqa: E731
    monkeypatch.setattr(llama.executor, "logits", spoilt)
    with pytest.raises(FloatingPointError, match="at step 2, row 0, rank 0"):
        llama.generate([[1, 5], [1, 6]], 6)


def test_a_failed_call_leaves_nothing_in_the_cache(build: Callable[..., Llama]) -> None:
    """A masked position has weight 0, but 0 * NaN is NaN."""
    llama = build("mha", max_seq_len=64)
    expected = llama.generate(PROMPTS[:2], 8, temperature=0, logprobs=True)
    healthy = llama.model.tok_embeddings.weight[9].clone()
    llama.model.tok_embeddings.weight[9] = float("nan")
    with pytest.raises(FloatingPointError):
        llama.generate([[1, *[9] * 50]] * 2, 4)
    with pytest.raises(FloatingPointError, match="in the prompt, row 1"):
        llama.generate([[1, 5], [1, 9, 5]], 0, echo=True, logprobs=True)
    llama.model.tok_embeddings.weight[9] = healthy
    assert llama.generate(PROMPTS[:2], 8, temperature=0, logprobs=True) == expected


def test_a_batch_is_prefilled_in_passes_of_about_one_length(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = build("mha", max_seq_len=96, max_batch_size=5)
    hidden, shapes = llama.executor.hidden, []

    def watched(tokens: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return hidden(tokens, *rest, **named)

    monkeypatch.setattr(llama.executor, "hidden", watched)
    llama.generate(PROMPTS, 4, temperature=0)
    assert shapes == [(5, 58), (5, 1), (5, 1), (5, 1)]  # no pass for the last id, as nothing follows it
    expected = llama.generate(PROMPTS, 4, temperature=0, logprobs=True, echo=True)
    for cost, passes in ((2, [(1, 58), (1, 8), (1, 5), (2, 2)]), (0, [(1, 58), (1, 8), (1, 5), (1, 2), (1, 1)])):
        shapes.clear()
        monkeypatch.setattr("llama.engine.planner.PASS_COST", cost)
        found = llama.generate(PROMPTS, 4, temperature=0, logprobs=True, echo=True)
        assert shapes == [*passes, (5, 1), (5, 1), (5, 1)]
        assert found[0] == expected[0] and found[1] is not None and expected[1] is not None
        for ours, theirs in zip(found[1], expected[1], strict=True):
            close(ours, theirs)


def test_prompts_are_scored_in_chunks(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    llama = build("gqa", max_seq_len=64, max_batch_size=5)
    _, expected = llama.generate(PROMPTS, 0, logprobs=True, echo=True)
    monkeypatch.setattr("llama.accelerate.executor.SCORING_CHUNK", 5 * 512 * 7)  # 7 positions at a time, of 57
    _, found = llama.generate(PROMPTS, 0, logprobs=True, echo=True)
    assert expected is not None and found is not None
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)


# Properties ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    max_gen_len=st.integers(0, 12),
    temperature=st.sampled_from([0.0, 1e-4, 0.7, 1.5]),
    top_p=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**32),
    pass_cost=st.sampled_from([0, 5, 64]),
)
def test_any_ragged_batch_equals_its_rows_alone(
    lengths: list[int],
    max_gen_len: int,
    temperature: float,
    top_p: float,
    seed: int,
    pass_cost: int,
    build: Callable[..., Llama],
) -> None:
    llama = build("gqa", max_seq_len=44, max_batch_size=6)
    stream = random.Random(seed)
    prompts = [[stream.randrange(512) for _ in range(n)] for n in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama.engine.planner.PASS_COST", pass_cost)  # prompts in one pass, or in several
        batch, logprobs = llama.generate(prompts, max_gen_len, temperature, top_p, True, True, seed=seed)
    assert logprobs is not None
    for prompt, tokens, scores in zip(prompts, batch, logprobs, strict=True):
        alone, alone_scores = llama.generate([prompt], max_gen_len, temperature, top_p, True, True, seed=seed)
        assert alone_scores is not None
        assert tokens == alone[0] and tokens[: len(prompt)] == prompt
        assert len(tokens) <= min(44, len(prompt) + max_gen_len) and len(scores) == len(tokens)
        close(scores, alone_scores[0])


def test_bfloat16_batches_diverge_little(build: Callable[..., Llama], measured: Callable[[str, object], None]) -> None:
    """Results are independent of the batch in float32. In bfloat16 the log-probabilities of the same ids differ by
    rounding, which is measured here."""
    llama = build("llama31", max_seq_len=96, max_batch_size=5, dtype="bfloat16")
    tokens, _ = llama.generate(PROMPTS, 12, temperature=0, echo=True)
    _, together = llama.generate(tokens, 0, logprobs=True, echo=True)
    assert together is not None
    worst = 0.0
    for ids, scores in zip(tokens, together, strict=True):
        _, alone = llama.generate([ids], 0, logprobs=True, echo=True)
        assert alone is not None
        worst = max(worst, max(abs(a - b) for a, b in zip(scores, alone[0], strict=True)))
    measured("bfloat16, in a batch to alone, worst log-probability", worst)
    assert worst < 1.0
    assert torch.bfloat16 == llama.model.norm.weight.dtype
