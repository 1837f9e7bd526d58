"""Log-probabilities of given ids, against a float64 forward that shares no code, for any batch size and world size."""

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.utils import get_rolling_token_windows

from golden.make_checkpoint import MODELS, TOKENIZER
from helpers import plain
from helpers.paths import HELPERS
from helpers.ranks import run_ranks
from helpers.tolerance import logprob_sum
from llama import Llama
from llama.accelerate.executor import Executor
from llama.evaluate import scoring
from llama.evaluate.scoring import (
    hidden_states,
    loglikelihood,
    rolling_loglikelihood,
    token_logprobs,
    top_logprobs,
    windows,
)

BOS, EOS = 1, 2
Ids = list[int]


def some_ids(rng: random.Random, length: int) -> Ids:
    return [rng.randrange(3, 512) for _ in range(length)]


class Plain:
    """Log-probabilities of a seeded checkpoint in float64, from helpers/plain.py."""

    def __init__(self, folder: Path):
        self.params, self.weights = plain.load(folder)

    def logprobs(self, ids: Ids) -> np.ndarray:
        """Log-probabilities [n, vocab] of the id after each prefix."""
        logits = plain.logits(self.params, self.weights, ids)
        top = logits.max(-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

    def of(self, ids: Ids, start: int) -> list[float]:
        """Log-probabilities of ids[start:], each given all ids before it."""
        return [float(row[token]) for row, token in zip(self.logprobs(ids[:-1])[start - 1 :], ids[start:], strict=True)]


@pytest.fixture
def reference(checkpoint: Callable[..., Path]) -> Callable[[str], Plain]:
    return lambda name: Plain(checkpoint(name))


# Requests like those of a multiple-choice task, shuffled: contexts of several lengths, answers of one and more ids, a
# context with a single answer, two equal requests, an empty context.
def multiple_choice() -> list[tuple[Ids, Ids]]:
    rng = random.Random(5)
    requests = [
        (context, some_ids(rng, length))
        for context in (some_ids(rng, n) for n in (30, 1, 12, 25, 7))
        for length in (1, 4, 2, 1, 9)
    ]
    requests += [(some_ids(rng, 20), some_ids(rng, 6)), requests[1], ([], some_ids(rng, 3))]
    rng.shuffle(requests)
    return requests


def joined(context: Ids, continuation: Ids) -> tuple[Ids, int]:
    ids = [BOS, *context, *continuation]
    return ids, len(context) + 1


# Numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_token_logprobs_are_those_of_a_float64_forward(
    name: str,
    dtype: str,
    build: Callable[..., Llama],
    reference: Callable[[str], Plain],
    measured: Callable[[str, object], None],
) -> None:
    rng, exact = random.Random(1), reference(name)
    texts = [some_ids(rng, n) for n in (1, 40, 3, 100, 17)]
    found = token_logprobs(build(name, max_seq_len=100, max_batch_size=3, dtype=dtype), texts)
    worst = 0.0
    for text, logprobs in zip(texts, found, strict=True):
        assert len(logprobs) == len(text)
        worst = max(worst, float(np.abs(np.array(logprobs) - exact.of([BOS, *text], 1)).max()))
    measured(f"{dtype} to float64, {name}, worst log-probability", worst)
    # 8 bits of bfloat16 and 11 of float16 hold a logit of 4 to 16 to 0.03 and 0.004, over a few dozen roundings.
    least, most = {"float32": (0.0, 1e-4), "bfloat16": (1e-3, 0.3), "float16": (1e-4, 0.04)}[dtype]
    assert least < worst < most


def test_generate_and_the_scorer_agree(build: Callable[..., Llama]) -> None:
    llama = build("gqa", max_seq_len=64)
    prompts = [[BOS, 5, 6, 7], [BOS, *range(100, 130)], [BOS]]
    tokens, logprobs = llama.generate(prompts, 20, temperature=0.9, logprobs=True, echo=True, seed=3)
    assert logprobs is not None
    for row, generated, scored in zip(tokens, logprobs, token_logprobs(llama, tokens), strict=True):
        assert row[0] == BOS and generated[0] == scored[0] == 0.0
        np.testing.assert_allclose(scored, generated, rtol=0, atol=1e-4)


@pytest.mark.parametrize("max_batch_size", [1, 3, 64])
@pytest.mark.parametrize("name", ["gqa", "llama31"])
def test_loglikelihood_is_that_of_each_request_alone(
    name: str, max_batch_size: int, build: Callable[..., Llama], reference: Callable[[str], Plain]
) -> None:
    requests, exact = multiple_choice(), reference(name)
    found = loglikelihood(build(name, max_seq_len=64, max_batch_size=max_batch_size), requests)
    for (context, continuation), (total, _) in zip(requests, found, strict=True):
        ids, start = joined(context, continuation)
        assert total == pytest.approx(sum(exact.of(ids, start)), abs=1e-4)


def test_is_greedy_agrees_with_greedy_decoding(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=64, max_batch_size=4)
    contexts = [[BOS, 5, 6], [BOS, *range(60, 90)]]
    greedy, _ = llama.generate(contexts, 6, temperature=0)
    requests = []
    for context, answer in zip(contexts, greedy, strict=True):
        wrong = [token if i < 4 else (token + 1) % 512 for i, token in enumerate(answer)]
        requests += [(context, answer), (context, wrong), (context, answer[:1]), (context, wrong[:4])]
        requests += [(context, [(answer[0] + 1) % 512]), (context, wrong[4:])]
    assert [is_greedy for _, is_greedy in loglikelihood(llama, requests)] == [True, False, True, True, False, False] * 2


def on_a_rank(folder: Path) -> Any:
    llama = Llama.build(folder, max_seq_len=32, max_batch_size=4)
    rng = random.Random(2)
    texts = [some_ids(rng, n) for n in (3, 31, 12)]
    long = some_ids(rng, 150)
    states = hidden_states(llama, texts[1]).numpy()
    found = (
        [p for row in token_logprobs(llama, texts) for p in row],
        [total for total, _ in loglikelihood(llama, multiple_choice())],
        rolling_loglikelihood(llama, [long, texts[0]], 10),
        [p for row in top_logprobs(llama, texts[2], 4) for _, p in row],
    )
    ids = [i for row in top_logprobs(llama, texts[2], 4) for i, _ in row]
    llama.close()
    return found, ids, states


@pytest.mark.parametrize("name", ["gqa", "llama31"])
def test_results_are_equal_for_any_world_size(name: str, checkpoint: Callable[..., Path]) -> None:
    ((alone, ids, states),) = run_ranks(1, on_a_rank, checkpoint(name))
    for world_size in (2, 4):
        for found, found_ids, found_states in run_ranks(world_size, on_a_rank, checkpoint(name)):
            for ours, theirs in zip(found, alone, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
            assert found_ids == ids
            np.testing.assert_allclose(found_states, states, rtol=0, atol=1e-4)


def test_top_logprobs_are_those_of_the_model_after_each_prefix(
    build: Callable[..., Llama], reference: Callable[[str], Plain]
) -> None:
    ids = [BOS, *some_ids(random.Random(4), 20)]
    expected = reference("code").logprobs(ids)
    found = top_logprobs(build("code", max_seq_len=21), ids, 3)
    assert len(found) == 21
    for best, row in zip(found, expected, strict=True):
        assert [i for i, _ in best] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([p for _, p in best], np.sort(row)[::-1][:3], rtol=0, atol=1e-4)


def test_hidden_states_are_what_the_output_layer_reads(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=16, compile=False)  # native.c's products of few rows round otherwise
    ids = some_ids(random.Random(6), 16)
    states = hidden_states(llama, ids)
    assert states.shape == (1, 16, 64) and states.dtype == torch.float32
    assert torch.equal(llama.model.logits(states), llama.model.forward(torch.tensor([ids]), 0))


def test_the_printed_model_shows_its_shapes(build: Callable[..., Llama]) -> None:
    shown = str(build("gqa", max_seq_len=16, max_batch_size=2, plain=True).model)
    for line in (
        "(tok_embeddings): VocabEmbedding(512 x 128)",
        "(0-1): 2 x TransformerBlock(",
        "(wq): ColumnLinear(128 x 128)",
        "(wk): ColumnLinear(32 x 128)",
        "(ffn_norm): RMSNorm(128)",
        "(output): ColumnLinear(512 x 128)",
    ):
        assert line in shown


# Forward passes ---------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """(method, shape of its input) of each call of `hidden`, which gets ids, and `logits`, which gets hidden states."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    for name, at in (("hidden", 1), ("logits", 1)):
        plain_method = getattr(Executor, name)

        def spying(*args: Any, name: str = name, at: int = at, call: Any = plain_method) -> Any:
            seen.append((name, tuple(args[at].shape)))
            return call(*args)

        monkeypatch.setattr(Executor, name, spying)
    return seen


def test_a_shared_context_is_computed_once(
    build: Callable[..., Llama], passes: list[tuple[str, tuple[int, ...]]]
) -> None:
    llama = build("mha", max_seq_len=64, max_batch_size=8)
    rng = random.Random(7)
    context = some_ids(rng, 40)
    loglikelihood(llama, [(context, some_ids(rng, n)) for n in (5, 3, 1, 5)])
    # One row of the context with BOS. Then three answers, without their last ids, which are only predicted: the answer
    # of one id needs no pass. Logits of 5 + 3 + 1 + 5 positions.
    assert passes == [("hidden", (1, 41)), ("hidden", (3, 4)), ("logits", (14, 64))]
    passes.clear()
    loglikelihood(llama, [(context, [n]) for n in range(50)])
    assert passes == [("hidden", (1, 41)), ("logits", (50, 64))]
    passes.clear()
    loglikelihood(llama, [(context, some_ids(rng, 3)) for _ in range(20)])  # more than the cache has rows
    assert passes == [("hidden", (1, 41)), *[("hidden", (n, 2)) for n in (8, 8, 4)], ("logits", (60, 64))]


def test_no_padding_becomes_logits(build: Callable[..., Llama], passes: list[tuple[str, tuple[int, ...]]]) -> None:
    llama = build("mha", max_seq_len=64, max_batch_size=8)
    rng = random.Random(8)
    token_logprobs(llama, [some_ids(rng, n) for n in (3, 60, 9, 31)])
    assert passes == [("hidden", (4, 60)), ("logits", (3 + 60 + 9 + 31, 64))]


def test_batches_keep_to_the_rows_of_the_cache_and_to_the_budget(
    build: Callable[..., Llama], passes: list[tuple[str, tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = build("mha", max_seq_len=64, max_batch_size=4)
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 100)
    rng = random.Random(9)
    lengths = [3, 60, 9, 31, 30, 8, 7, 6, 5, 33]
    token_logprobs(llama, [some_ids(rng, n) for n in lengths])
    # Longest first: 60 alone, 33 + 31 + 30 in one pass, then four rows, then two.
    assert [shape for name, shape in passes if name == "hidden"] == [(1, 60), (3, 33), (4, 9), (2, 5)]
    passes.clear()
    context = some_ids(rng, 10)
    loglikelihood(llama, [(context, some_ids(rng, 41)) for _ in range(4)])  # 164 measured ids: two groups
    assert [shape for name, shape in passes if name == "hidden"] == [
        (1, 11),
        (2, 40),
        (1, 40),
        (1, 11),
        (1, 40),
    ]
    passes.clear()
    loglikelihood(llama, [(some_ids(rng, 9), [n]) for n in (5, 6) for _ in range(5)])
    # Answers of one id need no second pass.
    assert [shape for name, shape in passes if name == "hidden"] == [(4, 10), (4, 10), (2, 10)]


def test_several_groups_go_through_the_second_pass_at_once(
    build: Callable[..., Llama], reference: Callable[[str], Plain], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If each group had its own second pass, the first would overwrite the other group's prefix in the cache."""
    llama, exact, rng = build("mha", max_seq_len=64, max_batch_size=4), reference("mha"), random.Random(14)
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 100)
    requests = [(context, some_ids(rng, 41)) for context in (some_ids(rng, 21), some_ids(rng, 21)) for _ in "ab"]
    for (context, continuation), (total, _) in zip(requests, loglikelihood(llama, requests), strict=True):
        assert total == pytest.approx(sum(exact.of(*joined(context, continuation))), abs=1e-4)


def test_the_order_of_requests_changes_nothing(build: Callable[..., Llama]) -> None:
    llama = build("gqa", max_seq_len=64, max_batch_size=4)
    requests = multiple_choice()
    found = loglikelihood(llama, requests)
    order = list(range(len(requests)))
    random.Random(1).shuffle(order)
    again = loglikelihood(llama, [requests[i] for i in order])
    for i, answer in zip(order, again, strict=True):
        assert answer == pytest.approx(found[i], abs=1e-4)
    assert loglikelihood(llama, []) == [] and token_logprobs(llama, []) == [] and rolling_loglikelihood(llama, []) == []


def test_rows_near_the_end_of_the_context_do_not_run_over_it(
    build: Callable[..., Llama], reference: Callable[[str], Plain]
) -> None:
    """A long context with short answers and a short one with long answers: padded together they exceed max_seq_len."""
    llama, exact, rng = build("mha", max_seq_len=48, max_batch_size=16), reference("mha"), random.Random(10)
    requests = [(context, some_ids(rng, n)) for context, n in [(some_ids(rng, 45), 2)] * 3]
    requests += [(context, some_ids(rng, n)) for context, n in [(some_ids(rng, 20), 27)] * 3]
    for (context, continuation), (total, _) in zip(requests, loglikelihood(llama, requests), strict=True):
        assert total == pytest.approx(sum(exact.of(*joined(context, continuation))), abs=1e-4)


# BOS, and what is empty or too long -------------------------------------------------------------------


def test_bos_is_never_doubled(build: Callable[..., Llama], reference: Callable[[str], Plain]) -> None:
    llama, exact = build("mha", max_seq_len=32), reference("mha")
    ids = some_ids(random.Random(11), 8)
    ((first, *rest),) = token_logprobs(llama, [ids])
    assert first == pytest.approx(exact.of([BOS, *ids], 1)[0], abs=1e-4)
    for same in (token_logprobs(llama, [[BOS, *ids]]), token_logprobs(llama, [[BOS, *ids]], bos=True)):
        assert same == [[0.0, first, *rest]]
    without = token_logprobs(llama, [ids], bos=False)[0]
    assert without[0] == 0.0
    np.testing.assert_allclose(without[1:], exact.of(ids, 1), rtol=0, atol=1e-4)

    for context in (ids, [BOS, *ids]):
        assert loglikelihood(llama, [(context, [7])])[0][0] == pytest.approx(exact.of([BOS, *ids, 7], 9)[0], abs=1e-4)
        assert rolling_loglikelihood(llama, [context]) == pytest.approx([sum(exact.of([BOS, *ids], 1))], abs=1e-4)
    assert loglikelihood(llama, [(ids, [7])], bos=False)[0][0] == pytest.approx(exact.of([*ids, 7], 8)[0], abs=1e-4)
    assert rolling_loglikelihood(llama, [ids], bos=False) == pytest.approx([sum(exact.of(ids, 1))], abs=1e-4)


def test_without_bos_an_empty_context_is_eos(build: Callable[..., Llama], reference: Callable[[str], Plain]) -> None:
    llama, exact = build("mha", max_seq_len=32), reference("mha")
    llama.tokenizer.bos_id, llama.tokenizer.adds_bos = -1, False
    assert loglikelihood(llama, [([], [7, 8])])[0][0] == pytest.approx(sum(exact.of([EOS, 7, 8], 1)), abs=1e-4)
    assert token_logprobs(llama, [[7]]) == [[0.0]]
    with pytest.raises(ValueError, match="this tokenizer has no BOS"):
        token_logprobs(llama, [[7]], bos=True)


def test_empty_contexts_and_continuations(build: Callable[..., Llama], reference: Callable[[str], Plain]) -> None:
    llama, exact = build("mha", max_seq_len=32), reference("mha")
    requests: list[tuple[Ids, Ids]] = [([], [5, 6]), ([], [BOS, 5, 6]), ([5], []), ([], []), ([], [BOS]), ([5], [6])]
    found = loglikelihood(llama, requests)
    expected = sum(exact.of([BOS, 5, 6], 1))
    assert [total for total, _ in found[:2]] == pytest.approx([expected] * 2, abs=1e-4)
    assert found[2:5] == [(0.0, True)] * 3
    assert found[5][0] == pytest.approx(exact.of([BOS, 5, 6], 2)[0], abs=1e-4)


def test_a_context_that_does_not_fit_is_cut_at_its_beginning(
    build: Callable[..., Llama], reference: Callable[[str], Plain]
) -> None:
    llama, exact, rng = build("mha", max_seq_len=16), reference("mha"), random.Random(12)
    context, answers = some_ids(rng, 40), [some_ids(rng, n) for n in (1, 3, 16)]
    for answer, (total, _) in zip(answers, loglikelihood(llama, [(context, a) for a in answers]), strict=True):
        kept = (context + answer)[-17:]  # 16 ids of input, and the last one, which is only predicted
        assert total == pytest.approx(sum(exact.of(kept, 17 - len(answer))), abs=1e-4)
    with pytest.raises(ValueError, match="continuation 1 has 17 ids, but max_seq_len is 16"):
        loglikelihood(llama, [([5], [6]), (context, some_ids(rng, 17))])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: token_logprobs(x, [[5], []]), "list 1 is empty"),
        (lambda x: token_logprobs(x, [[5] * 17]), "list 0 has 17 ids, but max_seq_len is 16"),
        (lambda x: token_logprobs(x, [[5, 512]]), "holds id 512, outside the vocabulary of 512"),
        (lambda x: token_logprobs(x, cast(Any, [5, 6])), "list 0 is not a list of ids"),
        (lambda x: token_logprobs(x, cast(Any, "text")), "token_lists are a list of lists of ids, not str"),
        (lambda x: loglikelihood(x, [([5], [-1])]), "continuation 0 holds id -1, outside the vocabulary"),
        (lambda x: loglikelihood(x, [cast(Any, ("a", [5]))]), "context 0 is not a list of ids: a"),
        (lambda x: loglikelihood(x, [cast(Any, ([5], [5], [5]))]), "request 0 has 3 parts"),
        (lambda x: loglikelihood(x, [([], [6])], bos=cast(Any, "yes")), "bos is 'yes', expected True or False"),
        (lambda x: rolling_loglikelihood(x, [[5] * 90, [5, 600]]), "list 1 holds id 600, outside the vocabulary"),
        (lambda x: rolling_loglikelihood(x, [[600]], bos=False), "list 0 holds id 600, outside the vocabulary"),
        (lambda x: rolling_loglikelihood(x, [cast(Any, [5.7])]), "list 0 is not a list of ids"),
        (lambda x: rolling_loglikelihood(x, [[5, 6]], 17), "stride is 17, but a window has only max_seq_len 16 ids"),
        (lambda x: rolling_loglikelihood(x, [[5, 6]], 0), "stride is 0, expected an integer from 1"),
        (lambda x: top_logprobs(x, [5], 0), "k is 0, expected an integer from 1"),
        (lambda x: top_logprobs(x, [5], 513), "k is 513, but the vocabulary has 512 ids"),
        (lambda x: top_logprobs(x, [], 1), "the text is empty"),
        (lambda x: hidden_states(x, [5] * 17), "the text has 17 ids, but max_seq_len is 16"),
    ],
)
def test_mistakes_are_named(call: Callable[[Llama], object], message: str, build: Callable[..., Llama]) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(build("mha", max_seq_len=16))


def test_damaged_weights_raise_and_do_not_affect_later_calls(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=64, max_batch_size=4, plain=True)  # packed weights cannot be written to
    requests = [(context, some_ids(random.Random(n), 4)) for context in ([7] * 30, [8] * 5) for n in range(2)]
    expected = loglikelihood(llama, requests)
    weight = llama.model.get_parameter("layers.0.feed_forward.w1.weight")  # its NaN reaches the caches of later layers
    kept = weight.clone()
    weight[3, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="begins with ids 1, 5, 5, 5, 5, 5, 5, 5, rank 0: the weights are dam"):
        token_logprobs(llama, [[5] * n for n in (60, 59, 58, 57)])
    weight.copy_(kept)
    assert loglikelihood(llama, requests) == expected


def test_sums_are_float64(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, adding 1 to 2^24 changes nothing."""
    monkeypatch.setattr(scoring, "measure_texts", lambda llama, texts, measure: [[[-(2.0**24), 1], *[[-1.0, 1]] * 9]])
    llama = build("mha", max_seq_len=64)
    assert loglikelihood(llama, [([5], [6] * 10)]) == [(-(2.0**24) - 9, True)]
    monkeypatch.setattr(scoring, "measure_texts", lambda llama, texts, measure: [[[-(2.0**24)], *[[-1.0]] * 9]])
    assert rolling_loglikelihood(llama, [[5] * 10]) == [-(2.0**24) - 9]


# Long texts -------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_windows_score_every_id_once_with_all_the_context_they_can(
    length: int, limit: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, limit))
    ids = list(range(length))
    scored: list[int] = []
    for window in windows(ids, limit, stride):
        first, end = window.ids[0], window.ids[-1] + 1
        assert list(window.ids) == list(range(first, end)) and 1 <= window.start < len(window.ids)
        assert len(window.ids) - 1 == min(limit, end - 1)  # its input: as many ids as fit, or all
        assert len(window.ids) - window.start <= (stride if scored else limit)
        scored += window.ids[window.start :]
    assert scored == ids[1:]


@given(st.integers(1, 60), st.integers(1, 20))
def test_windows_without_a_stride_are_those_of_lm_evaluation_harness(length: int, limit: int) -> None:
    ids = list(range(1, length + 1))
    theirs = list(get_rolling_token_windows(ids, prefix_token=0, max_seq_len=limit, context_len=1))
    ours = [(list(w.ids[:-1]), list(w.ids[w.start :])) for w in windows([0, *ids], limit, limit)]
    assert ours == [(list(given_ids), list(predicted)) for given_ids, predicted in theirs]


@pytest.mark.parametrize("stride", [None, 16, 7, 1])
def test_rolling_sums_its_windows(
    stride: int | None, build: Callable[..., Llama], reference: Callable[[str], Plain]
) -> None:
    exact, rng = reference("gqa"), random.Random(13)
    texts = [some_ids(rng, n) for n in (50, 16, 17, 1, 0)]
    expected = []
    for text in texts:
        ids = [BOS, *text]
        # One id at a time: the last position of the window that scores it, and the ids before it in that window.
        total = 0.0
        for at in range(1, len(ids)):
            last = 16 if at <= 16 else min(len(ids) - 1, 16 + -(-(at - 16) // (stride or 16)) * (stride or 16))
            total += exact.of(ids[max(0, last - 16) : at + 1], at - max(0, last - 16))[0]
        expected.append(total)
    found = rolling_loglikelihood(build("gqa", max_seq_len=16, max_batch_size=3), texts, stride)
    for text, ours, theirs in zip(texts, found, expected, strict=True):
        assert abs(ours - theirs) <= logprob_sum(len(text))


# Memory -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status, which Linux has")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scoring_needs_little_memory(dtype: str, measured: Callable[[str, object], None]) -> None:
    """2 x 4096 ids of a vocabulary of 32000: their float32 logits would take 1 GB."""
    script = HELPERS / "scoring_memory.py"
    done = subprocess.run(
        [sys.executable, str(script), str(TOKENIZER), dtype], capture_output=True, text=True, check=True
    )
    states, scored = map(int, done.stdout.split())
    measured(f"scoring 2 x 4096 of 32000 in {dtype}, MB over the hidden states", round((scored - states) / 1e6))
    assert 0 < scored - states < 200e6
