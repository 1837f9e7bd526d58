"""The scheduler: results do not depend on other calls, and what is shared is computed once."""

import gc
import random
import threading
import weakref
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.tolerance import LOGPROB
from llama import Llama
from llama.engine.calls import Call, Slot
from llama.engine.planner import group_by_length
from llama.engine.requests import shared_prefix
from llama.parallel.groups import is_main_rank

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


def test_a_stop_text_frees_its_slot_at_once(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    llama = build("mha", max_seq_len=64, max_batch_size=1)
    settings: dict[str, Any] = {"temperature": 0, "max_gen_len": 40}
    (whole,) = llama.text_completion(["The licence"], **settings)
    shapes, passes = watch(llama, monkeypatch), []
    for n in (1, 3):
        answers = llama.text_completion(["The licence"] * n, stop=whole["generation"][3:5], **settings)
        assert answers == [{"generation": whole["generation"][:3], "finish_reason": "stop"}] * n
        passes.append(len(shapes))
        shapes.clear()
    assert passes[0] < 20 and passes[1] == 3 * passes[0]


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
    llama = build("mha", max_seq_len=256, max_batch_size=3, prefill_chunk=32)
    long = [1, *range(3, 200)]
    expected = [llama.generate([prompt], 6, temperature=0)[0][0] for prompt in (long, PROMPTS[0])]
    shapes = watch(llama, monkeypatch)
    rows = llama._rows([long, PROMPTS[0]], max_gen_len=6, temperature=0)
    first = next(token.row for step in llama._run(rows) for token in step)
    assert first == 1  # the short one does not wait for the long one
    assert max(seqlen for _, seqlen in shapes) == 32
    tokens, _ = llama.generate([long, PROMPTS[0]], 6, temperature=0)
    assert tokens == expected


def test_a_short_prompt_does_not_wait_for_another_chunk(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first id comes one step after the chunk that is computed when it arrives. The long prompt goes on then."""
    llama = build("mha", max_seq_len=256, max_batch_size=3, prefill_chunk=32)
    shapes = watch(llama, monkeypatch)
    scheduler = llama.scheduler

    def submit(prompt: list[int]) -> Call:
        return scheduler.submit(llama._rows([prompt], max_gen_len=6), listener=lambda: None)

    def step() -> list[tuple[int, ...]]:
        shapes.clear()
        assert scheduler._claim_for_calls(timeout=0)
        scheduler._step(None)
        scheduler._release_model()
        return list(shapes)

    long = submit([1, *range(3, 200)])
    assert step() == [(1, 32)]
    others = [submit([1, 5, 6, 7, 8])]
    assert step() == [(1, 5)] and len(others[0].rows[0].tokens) == 1
    others.append(submit([1, 9, 10]))
    assert step() == [(1, 1), (1, 32)]  # the long one had waited for a step
    assert step() == [(1, 1), (1, 3)] and len(others[1].rows[0].tokens) == 1
    for call in (long, *others):
        scheduler.cancel(call)

    two = [submit([start, *range(3, 200)]) for start in (300, 301)]
    assert [step(), step(), step()] == [[(1, 32)]] * 3  # the first, the second, the first
    late = submit([1, 5, 6, 7, 8])
    assert step() == [(1, 32)]  # the second, which has waited as long as the new one
    assert step() == [(1, 5)] and len(late.rows[0].tokens) == 1
    for call in (*two, late):
        scheduler.cancel(call)


@pytest.mark.parametrize("options", [{}, {"compile": False}, {"plain": True}], ids=str)
def test_ids_do_not_depend_on_the_prefill_chunk(
    options: dict[str, Any], build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[1, *range(3, 3 + n)] for n in (100, 4, 70, 1, 33)]
    settings: dict[str, Any] = {"max_gen_len": 12, "temperature": 0.8, "seed": 3}
    found = {}
    for chunk in (1, 7, 64, 1024):
        llama = build("gqa", max_seq_len=128, max_batch_size=3, prefill_chunk=chunk, **options)
        llama.model = copy(llama.model)  # another executor, with the same chunk
        shapes, rows = watch(llama, monkeypatch), llama._rows(prompts, **settings)
        for _ in llama._run(rows):
            pass
        found[chunk] = [row.tokens for row in rows]
        assert max(seqlen for _, seqlen in shapes) == min(chunk, 101)
    assert found[1] == found[7] == found[64] == found[1024]


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
    with pytest.raises(FloatingPointError, match="in the prompt, row 1"):  # in a part of it, in the step of row 0
        llama.generate([[1, 9], [9] * 60], 4)
    llama.model.tok_embeddings.weight[9] = weight
    assert llama.generate(PROMPTS[:2], 8, temperature=0) == expected


def test_values_that_are_not_finite_leave_nothing_to_reuse(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the other rows of the same pass, nor in a row that is cancelled during the step."""
    llama = build("mha", max_seq_len=64, max_batch_size=2, plain=True)
    prompts = [[1, 9, *range(20, 60)], [1, 8, *range(20, 60)]]
    expected = llama.generate(prompts, 6, temperature=0)[0]
    weight = llama.model.tok_embeddings.weight[9].clone()
    for is_cancelled in (False, True):
        llama.model.tok_embeddings.weight[9] = float("nan")
        failing = llama._rows(prompts[: 1 if is_cancelled else 2], max_gen_len=6, temperature=0)
        call = llama.scheduler.submit(failing, reuse=llama)
        if is_cancelled:
            run = llama.scheduler._worker.run

            def cancelling(*args: Any, call: Any = call, run: Any = run) -> Any:
                llama.scheduler.cancel(call)
                return run(*args)

            with monkeypatch.context() as patch:
                patch.setattr(llama.scheduler._worker, "run", cancelling)
                assert not list(llama.scheduler.steps(call))
        else:
            with pytest.raises(FloatingPointError):
                list(llama.scheduler.steps(call))
            llama.scheduler.cancel(call)
        llama.model.tok_embeddings.weight[9] = weight
        for prompt, tokens in zip(prompts, expected, strict=True):
            rows = llama._rows([prompt], max_gen_len=6, temperature=0)
            for _ in llama._run(rows, reuse=llama):
                pass
            assert rows[0].tokens == tokens


def test_a_prompt_whose_scores_are_there_already(build: Callable[..., Llama]) -> None:
    """Those of a row that is scored at the same time, and of one that ended."""
    llama = build("mha", max_seq_len=64, max_batch_size=2)
    prompt = list(range(20, 60))
    alone = llama.generate([prompt], 0, logprobs=True, echo=True)[1]
    both = llama.generate([prompt] * 2, 0, logprobs=True, echo=True)[1]
    rows = [llama._rows([ids], max_gen_len=0, logprobs=True, echo=True)[0] for ids in ([*prompt, 5], prompt)]
    for row in rows:
        for _ in llama._run([row], reuse=llama):
            pass
    assert rows[1].reused == len(prompt) - 2
    assert alone is not None and both is not None
    for found in (*both, rows[1].prompt_logprobs):
        assert found == pytest.approx(alone[0], abs=LOGPROB)


def test_a_row_that_is_not_scored_passes_on_only_the_scores_of_its_prefix(build: Callable[..., Llama]) -> None:
    """Not the one of the id that follows in the row from which it copied the prefix."""
    llama = build("mha", max_seq_len=64, max_batch_size=2)
    first, second = [*range(20, 60), 5, 6], [*range(20, 60), 8, 9]
    alone = llama.generate([second], 0, logprobs=True, echo=True)[1]
    scored = llama._rows([first], max_gen_len=0, logprobs=True, echo=True)
    unscored = llama._rows([second], max_gen_len=1)
    run_together(llama, [(scored, llama), (unscored, llama)])
    assert unscored[0].reused == 40
    again = llama._rows([second], max_gen_len=0, logprobs=True, echo=True)
    for _ in llama._run(again, reuse=llama):
        pass
    assert again[0].reused == 39 and alone is not None
    assert again[0].prompt_logprobs == pytest.approx(alone[0], abs=LOGPROB)


@pytest.mark.parametrize("is_same_key", [True, False])
def test_the_row_that_computes_a_prefix_leaves(
    is_same_key: bool, build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second row waits for the prefix that the first one computes. The first one is cancelled, and its slot goes to
    a third row with this prefix. With the same key this row could wait for the second one, and both forever. With
    another one the second row must use nothing that the third one computes, whose next id is another."""
    llama = build("mha", max_seq_len=64, max_batch_size=2)
    prefix = list(range(20, 60))
    prompts = [[*prefix, 5, 6, 7], [*prefix, 5, 8], [*prefix, 9, 10]]
    alone = [llama.generate([prompt], 0, logprobs=True, echo=True)[1] for prompt in prompts]
    llama.executor.prefill_chunk = 16
    rows = [llama._rows([prompt], max_gen_len=0, logprobs=True, echo=True) for prompt in prompts]
    keys = (llama, llama, llama if is_same_key else None)
    done = threading.Semaphore(0)
    calls = [
        llama.scheduler.submit(each, reuse=key, listener=done.release) for each, key in zip(rows, keys, strict=True)
    ]
    run, steps = llama.scheduler._worker.run, 0

    def cancelling(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2:
            llama.scheduler.cancel(calls[0])
        if steps > 30:
            llama.scheduler.stop()
        return run(*args)

    monkeypatch.setattr(llama.scheduler._worker, "run", cancelling)
    engine = threading.Thread(target=llama.scheduler.run)
    engine.start()
    assert done.acquire(timeout=30) and done.acquire(timeout=30), "rows wait for each other"
    llama.scheduler.stop()
    engine.join(timeout=10)
    for call, expected in zip(calls[1:], alone[1:], strict=True):
        assert call.is_done and expected is not None
        assert call.rows[0].prompt_logprobs == pytest.approx(expected[0], abs=LOGPROB)


@pytest.mark.parametrize("options", [{"compile": False}, {"compile": True}, {"plain": True}])
def test_a_part_of_a_prompt_leaves_no_values_that_are_not_finite(
    options: dict[str, Any], build: Callable[..., Llama]
) -> None:
    """Its row is dropped before anything is sampled, and the next row in the slot is in a pass with longer ones."""
    llama = build("mha", max_seq_len=64, max_batch_size=2, **options)
    prompts = [[1, 5, 6], [1, *range(20, 60)]]
    expected = llama.generate(prompts, 5, temperature=0)
    llama.model.tok_embeddings.weight[9] = float("nan")
    llama.executor.prefill_chunk = 16
    stream = llama.scheduler.submit(llama._rows([[3, 9, *range(20, 60)]] * 2), is_read=True)
    with llama.scheduler._condition:
        llama.scheduler._runner = threading.get_ident()
    llama.scheduler._step(stream)
    llama.scheduler._release_model()
    llama.scheduler.cancel(stream)
    assert llama.generate(prompts, 5, temperature=0) == expected


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


def test_nothing_of_a_call_stays_except_for_its_ids(build: Callable[..., Llama]) -> None:
    """Its results may be large: their alternatives take a hundred bytes each."""
    llama = build("mha", max_seq_len=64, max_batch_size=2)
    for settings in ({"logprobs": 512, "echo": True}, {"repetition_penalty": 1.2}):
        rows = llama._rows(PROMPTS[:2], max_gen_len=4, **settings)
        for _ in llama._run(rows, reuse=llama):
            pass
        alive = [weakref.ref(row) for row in rows]
        del rows
        gc.collect()
        assert [row() for row in alive] == [None, None]


def test_an_interrupted_step_counts_no_ids_twice(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the call of the thread that runs the step. Another one in the step goes on, with its penalties."""
    llama = build("mha", max_seq_len=64, max_batch_size=2)
    settings: dict[str, Any] = {"max_gen_len": 12, "temperature": 0, "repetition_penalty": 1.5}
    expected = llama.generate([[1, 5, 6]], **settings)[0][0]
    llama.executor.prefill_chunk = 16
    other = llama.scheduler.submit(llama._rows([[1, 5, 6]], **settings), reuse=llama, listener=lambda: None)
    run, steps = llama.scheduler._worker.run, 0

    def interrupted(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        outcomes = run(*args)
        if steps == 3:
            raise KeyboardInterrupt
        return outcomes

    with monkeypatch.context() as patch:
        patch.setattr(llama.scheduler._worker, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llama.generate([list(range(60))], 3)
    assert len(other.rows[0].tokens) == 2
    for _ in llama.scheduler.steps(other):
        pass
    assert other.rows[0].tokens == expected


def fail_on_rank_0(folder: Path) -> str:
    """What `run` raises."""
    llama = Llama.build(folder, max_seq_len=64, max_batch_size=2)
    if is_main_rank():
        llama.scheduler._worker._sampler_of = lambda rows: 1 / 0  # type: ignore
        llama.scheduler.submit(llama._rows([[1, 5]]), listener=lambda: None)
    try:
        llama.scheduler.run()
    except Exception as error:
        return type(error).__name__
    return ""


def test_an_error_on_rank_0_ends_run(checkpoint: Callable[..., Path]) -> None:
    """The other rank is in the middle of the step, and would take the next plan for sampled ids."""
    assert run_ranks(2, fail_on_rank_0, checkpoint("gqa"), timeout=60) == ["ZeroDivisionError", "RuntimeError"]


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
