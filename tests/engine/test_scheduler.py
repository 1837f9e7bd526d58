"""The scheduler: results do not depend on other calls, and what is shared is computed once."""

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llama import Llama
from llama.engine.calls import Slot
from llama.engine.planner import group_by_length
from llama.engine.requests import shared_prefix

PROMPTS = [[1, 450, 319, 352, 499], [1, 278], [1, *range(3, 60)], [7], [1, 205, 8, 26, 508, 468, 143, 185]]


def watch(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the passes from now on."""
    hidden, shapes = llama.executor.hidden, list[tuple[int, ...]]()

    def watched(tokens: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return hidden(tokens, *rest, **named)

    monkeypatch.setattr(llama.executor, "hidden", watched)
    return shapes


@pytest.mark.parametrize("options", [{"compile": False}, {"compile": True}, {"plain": True}, {"quantize": "int8"}])
def test_calls_of_threads_equal_those_alone(options: dict[str, Any], build: Callable[..., Llama]) -> None:
    """Random arrivals, settings and cancellations."""
    llama = build("gqa", max_seq_len=96, max_batch_size=3, **options)
    stream = random.Random(1)
    jobs: list[dict[str, Any]] = [
        {
            "prompt_tokens": [[stream.randrange(512) for _ in range(stream.randint(1, 60))]] * stream.randint(1, 3),
            "max_gen_len": stream.randint(0, 24),
            "temperature": stream.choice([0.0, 0.8, 1.3]),
            "repetition_penalty": stream.choice([1.0, 1.3]),
            "seed": seed,
        }
        for seed in range(24)
    ]
    alone = [llama.generate(**job) for job in jobs]
    found: list[Any] = [None] * len(jobs)

    def work(start: int) -> None:
        for i in range(start, len(jobs), 4):
            if i % 3 == 2:  # a neighbour that goes away early
                steps = llama.stream(**jobs[i])
                next(steps, None)
                steps.close()
            found[i] = llama.generate(**jobs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == alone


def test_calls_of_threads_share_steps(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    llama = build("mha", max_seq_len=64, max_batch_size=4)
    shapes = watch(llama, monkeypatch)
    with llama.scheduler.exclusive(None):  # until all threads have submitted
        threads = [
            threading.Thread(target=llama.generate, args=([prompt], 20), kwargs={"temperature": 0})
            for prompt in PROMPTS[:4]
        ]
        for thread in threads:
            thread.start()
        while len(llama.scheduler._calls) < 4:
            pass
    for thread in threads:
        thread.join(timeout=60)
    assert shapes[:4] == [(4, 58), (4, 1), (4, 1), (4, 1)] and len(shapes) <= 20


def test_rows_enter_as_others_leave(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    llama = build("mha", max_seq_len=64, max_batch_size=2)
    texts = ["The licence", "the software", "copyright", "or"]
    lengths = [12, 3, 3, 3]
    expected = [
        llama.text_completion([text], temperature=0, max_gen_len=n)[0] for text, n in zip(texts, lengths, strict=True)
    ]
    shapes = watch(llama, monkeypatch)
    assert llama.text_completion(texts, temperature=0, max_gen_len=lengths) == expected
    assert shapes.count((2, 1)) >= 5


def test_a_common_prefix_is_computed_once(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    llama = build("gqa", max_seq_len=96, max_batch_size=3)
    system = list(range(3, 63))
    prompts = [[*system, 100 + i, 200 + i] for i in range(7)]
    arguments: dict[str, Any] = {"max_gen_len": 4, "temperature": 0}
    expected = [llama.generate([prompt], **arguments)[0][0] for prompt in prompts]
    shapes = watch(llama, monkeypatch)
    rows = llama._rows(prompts, **arguments)
    for _ in llama._run(rows):
        pass
    assert [row.tokens for row in rows] == expected
    assert sum(rows * seqlen for rows, seqlen in shapes) < 62 + 7 * (2 + 4) + 16
    assert [row.reused for row in rows] == [0, *[60] * 6]
    shapes.clear()
    llama.generate(prompts[:1], **arguments)
    assert shapes[0] == (1, 62)  # a call does not use what another one left: the weights may have been written since
    for key, reused in ((llama, 0), (llama, 61), (prompts, 0), (None, 0)):  # only of calls with the same key
        rows = llama._rows(prompts[:1], **arguments)
        for _ in llama._run(rows, reuse=key):
            pass
        assert rows[0].reused == reused and rows[0].tokens == expected[0]


def test_a_long_prompt_delays_others_by_one_chunk(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    llama = build("mha", max_seq_len=256, max_batch_size=3)
    llama.executor.prefill_chunk = 32
    long = [1, *range(3, 200)]
    expected = [llama.generate([prompt], 6, temperature=0)[0][0] for prompt in (long, PROMPTS[0])]
    shapes = watch(llama, monkeypatch)
    rows = llama._rows([long, PROMPTS[0]], max_gen_len=6, temperature=0)
    first = next(token.row for step in llama._run(rows) for token in step)
    assert first == 1  # the short one does not wait for the long one
    assert max(seqlen for _, seqlen in shapes) == 32
    tokens, _ = llama.generate([long, PROMPTS[0]], 6, temperature=0)
    assert tokens == expected


def test_a_paused_stream_gives_up_its_slot(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=64, max_batch_size=1)
    expected = llama.generate(PROMPTS[:1], 10, temperature=0.9, seed=3)[0][0]
    stream = llama.stream(PROMPTS[:1], max_gen_len=10, temperature=0.9, seed=3)
    ids = [token.id for token in next(stream)]
    for prompt in PROMPTS:
        llama.generate([prompt], 3, temperature=0)
        ids += [token.id for token in next(stream)]
    ids += [token.id for step in stream for token in step]
    assert ids == expected


def test_a_listener_on_an_engine_thread(build: Callable[..., Llama]) -> None:
    """What a server does: one thread runs the steps of calls from others. Priority, cancellation, cutting, failing."""
    llama = build("mha", max_seq_len=64, max_batch_size=1, plain=True)
    expected = [llama.generate([prompt], 5, temperature=0)[0][0] for prompt in PROMPTS]
    order: list[int] = []
    calls: list[Any] = []

    def submit(i: int, priority: int = 0, **settings: Any) -> None:
        rows = llama._rows([PROMPTS[i]], **({"max_gen_len": 5, "temperature": 0} | settings))
        calls.append(llama.scheduler.submit(rows, priority=priority, reuse=True, listener=lambda: order.append(i)))

    submit(0)
    submit(1, priority=1)
    submit(2)
    submit(3, max_gen_len=0)
    submit(4)
    llama.scheduler.cancel(calls[4])
    engine = threading.Thread(target=llama.scheduler.run)
    engine.start()
    while not all(call.is_done for call in calls):
        pass
    assert list(dict.fromkeys(order)) == [3, 0, 2, 1]
    for i in (0, 1, 2):
        assert [token.id for token in calls[i].take()] == calls[i].rows[0].tokens == expected[i]
    assert [token.finish_reason for token in calls[3].take()] == ["length"]
    assert not calls[4].take() and not calls[4].rows[0].tokens

    weight = llama.model.output.weight[9].clone()
    llama.model.output.weight[9] = float("nan")
    submit(0)
    while not calls[-1].is_done:
        pass
    assert isinstance(calls[-1].error, FloatingPointError)
    llama.model.output.weight[9] = weight
    submit(0)
    while not calls[-1].is_done:
        pass
    assert calls[-1].rows[0].tokens == expected[0]
    llama.scheduler.stop()
    engine.join(timeout=10)
    assert not engine.is_alive()
    assert all(slot.task is None for slot in llama.scheduler._planner.slots)


def run_together(llama: Llama, calls: list[Any]) -> list[Any]:
    """Run calls [(rows, reuse)] in the same steps, by an engine thread."""
    done = threading.Semaphore(0)
    submitted = [llama.scheduler.submit(rows, reuse=reuse, listener=done.release) for rows, reuse in calls]
    engine = threading.Thread(target=llama.scheduler.run)
    engine.start()
    while not all(call.is_done for call in submitted):
        assert done.acquire(timeout=30)
    llama.scheduler.stop()
    engine.join(timeout=10)
    return submitted


def test_a_call_that_fails_does_not_touch_its_neighbours(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=64, max_batch_size=4)
    prompts = [[1, 5, 6], [1, 8], [3, 4, 7]]
    expected = [llama.generate([prompt], 6, temperature=0)[0][0] for prompt in prompts]
    llama.model.tok_embeddings.weight[9] = float("nan")
    failing = llama._rows([[1, 9, 5]], max_gen_len=6, temperature=0, logprobs=True, echo=True)
    healthy = [llama._rows([prompt], max_gen_len=6, temperature=0) for prompt in prompts]
    calls = run_together(llama, [(failing, None), *((rows, None) for rows in healthy)])
    assert isinstance(calls[0].error, FloatingPointError) and "in the prompt" in str(calls[0].error)
    assert [rows[0].tokens for rows in healthy] == expected


def test_a_call_that_fails_leaves_nothing_in_its_other_slots(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=64, max_batch_size=2, plain=True)  # masks what other paths do not read
    expected = llama.generate(PROMPTS[:2], 8, temperature=0)
    weight = llama.model.tok_embeddings.weight[9].clone()
    llama.model.tok_embeddings.weight[9] = float("nan")
    llama.executor.prefill_chunk = 32
    with pytest.raises(FloatingPointError, match="row 0"):  # while a part of row 1 is computed
        llama.generate([[1, 9], [9] * 60], 4)
    llama.model.tok_embeddings.weight[9] = weight
    assert llama.generate(PROMPTS[:2], 8, temperature=0) == expected


def test_scores_with_more_alternatives_are_computed_again(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=96, max_batch_size=2)
    prompt = list(range(3, 63))
    alone = llama.generate([prompt], 0, logprobs=5, echo=True)
    rows = [llama._rows([prompt], max_gen_len=0, logprobs=k, echo=True) for k in (2, 5)]
    run_together(llama, [(each, llama) for each in rows])
    for k, ((row,)) in zip((2, 5), rows, strict=True):
        assert [[token for token, _ in top] for top in row.prompt_top] == [
            [token for token, _ in top][:k] for top in alone.top[0]
        ]


def test_a_call_from_a_hook_raises(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=64)
    handle = llama.model.layers[0].register_forward_hook(lambda *_: llama.generate([[1]], 1) and None)
    with pytest.raises(RuntimeError, match="within a forward pass"):
        llama.generate([[1, 5]], 2)
    handle.remove()
    assert llama.generate([[1, 5]], 2)[0]


def test_groups_stay_within_the_cache() -> None:
    slots = [Slot(i, [0] * n) for i, n in enumerate((0, 90, 10))]
    parts = [(slots[0], 40), (slots[1], 5), (slots[2], 30)]
    groups = [[slot.index for slot, _ in group] for group in group_by_length(parts, 100)]
    assert groups == [[0, 2], [1]]


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 200])
def test_shared_prefix(n: int) -> None:
    ids = list(range(200))
    assert shared_prefix(ids, [*ids[:n], -1]) == shared_prefix([*ids[:n], -1, 7], ids) == n
    assert shared_prefix(ids, ids[:n]) == n
