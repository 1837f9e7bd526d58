"""Rows of a forward in any rows of the cache ("slots"), against each row computed alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from helpers.tolerance import near
from llama import Llama, model
from llama.accelerate import native
from llama.accelerate.executor import Executor
from llama.cache import KVCache

ROWS = 6
FORMS: dict[str, dict[str, Any]] = {
    "native": {"compile": True},
    "fused": {"compile": False},
    "plain": {"plain": True},
    "hooked": {"compile": True},
    "int8": {"quantize": "int8", "compile": False},
    "int4": {"quantize": "int4", "compile": False},
    "int8 native": {"quantize": "int8", "compile": True},
    "int4 native": {"quantize": "int4", "compile": True},
}


def texts(length: int, rows: int = 4) -> torch.Tensor:
    return torch.randint(3, 512, (rows, length), generator=torch.Generator().manual_seed(length))


def open_model(build: Callable[..., Llama], form: str, dtype: str = "float32") -> Llama:
    llama = build("gqa", max_seq_len=320, max_batch_size=ROWS, dtype=dtype, **FORMS[form])
    if form == "hooked":  # one layer runs as a module, the others fused
        llama.model.layers[1].register_forward_hook(lambda module, inputs, output: output.clone())
        llama.executor.refresh()
    assert llama.executor.is_compiled == ("native" in form)
    return llama


def soil(llama: Llama) -> None:
    """Fill the cache with numbers that would change any result."""
    for cache in llama.executor.caches:
        cache.k.fill_(30.0)
        cache.v.fill_(-30.0)


@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [2, 3, 4, 5], [5, 3, 1, 0], [1, 2, 0, 4], [4, 5, 0, 1]], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_rows_at_their_own_positions(form: str, dtype: str, slots: list[int], build: Callable[..., Llama]) -> None:
    """Three passes with a position for each row: a part of a prompt, and two decode steps."""
    llama = open_model(build, form, dtype)
    hidden, ids, lengths = llama.executor.hidden, texts(300), torch.tensor([7, 256, 1, 90])
    sizes = [3, 1, 1]
    expected = []
    for row, n in enumerate(lengths.tolist()):
        soil(llama)
        states = [hidden(ids[row : row + 1, :n], 0, n)]
        for size in sizes:
            states.append(hidden(ids[row : row + 1, n : n + size], n, n + size))
            n += size
        expected.append(states)

    soil(llama)
    for row, (slot, n) in enumerate(zip(slots, lengths.tolist(), strict=True)):
        found = hidden(ids[row : row + 1, :n], 0, n, [slot])
        torch.testing.assert_close(found, expected[row][0], rtol=0, atol=near(llama, expected[row][0], dtype))
    starts = lengths
    for part, size in enumerate(sizes, 1):
        tokens = torch.stack([ids[row, n : n + size] for row, n in enumerate(starts)])
        found = hidden(tokens, starts, int(starts.max()) + size, slots).float()
        alone = torch.cat([states[part] for states in expected]).float()
        assert (found - alone).abs().max() <= near(llama, alone, dtype), f"pass {part}"
        starts = starts + size
    unused = sorted(set(range(ROWS)) - set(slots))
    for cache in llama.executor.caches:
        assert cache.slots is None
        assert (cache.k[unused] == 30).all() and (cache.v[unused] == -30).all()
        for slot, n in zip(slots, starts.tolist(), strict=True):
            assert (cache.k[slot, :, n:] == 30).all()


@pytest.mark.parametrize("slots", [[1, 2, 3], [5, 0, 2]], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_rows_at_one_position(form: str, slots: list[int], build: Callable[..., Llama]) -> None:
    """The same passes with one int for all rows: from position 0, from a later one, and a decode step."""
    llama = open_model(build, form)
    ids, found = texts(60, 3), []
    for where in (None, slots):
        soil(llama)
        bounds = [(0, 40), (40, 59), (59, 60)]
        found.append(torch.cat([llama.executor.hidden(ids[:, a:b], a, b, where) for a, b in bounds], dim=1))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=near(llama, found[0]))


@pytest.mark.parametrize("form", ["native", "plain", "fused"])
def test_a_prompt_in_parts_at_row_positions(form: str, build: Callable[..., Llama]) -> None:
    llama, slots, ids = open_model(build, form), [4, 1], texts(60, 2)
    starts, found = torch.tensor([3, 20]), []
    for chunk in (64, 9):
        soil(llama)
        llama.executor.prefill_chunk = chunk
        llama.executor.hidden(ids[:, :20], 0, 20, slots)
        passes = llama.executor.passes
        found.append(llama.executor.hidden(ids[:, :40], starts, 60, slots))
        assert llama.executor.passes - passes == -(-40 // chunk)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=near(llama, found[0]))


@pytest.mark.parametrize("form", ["native", "plain", "fused", "hooked"])
@pytest.mark.parametrize("slots", [[0], [0, ROWS], [-1, 0], [0, 1, 2]], ids=str)
def test_slots_that_do_not_exist(form: str, slots: list[int], build: Callable[..., Llama]) -> None:
    """Checked before native.c reads or writes a row."""
    llama = open_model(build, form)
    for seqlen in (1, 3):
        with pytest.raises(ValueError, match=rf"2 rows of ids in cache rows \[{slots[0]}.*the cache has {ROWS} rows"):
            llama.executor.hidden(texts(seqlen, 2), 0, seqlen, slots)


def test_custom_code_gets_the_first_rows(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has Meta's signatures, which know neither cache rows nor a position for each row."""
    llama = open_model(build, "native")
    ids = texts(5, 2)
    expected = llama.executor.logits(llama.executor.hidden(ids, 0, 5))

    class Wrapped(nn.Module):
        def __init__(self, inner: Any):
            super().__init__()
            self.inner, self.params = inner, inner.params

        def forward(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
            return self.inner(tokens, start_pos)

    custom = Executor(Wrapped(llama.model))
    for run in (custom, llama.executor):
        for slots in (None, [0, 1], range(2)):
            found = run.logits(run.hidden(ids, 0, 5, slots))
            torch.testing.assert_close(found, expected, rtol=0, atol=near(llama, expected))
        for slots, start in (([1, 0], 0), ([1, 2], 0), ([0, 1], torch.tensor([0, 0]))):
            with pytest.raises(RuntimeError, match="needs all rows at one position, in the first rows of the cache"):
                run.hidden(ids, start, 5, slots)
        # From here on: functions of llama.model replaced, for which the executor runs the modules.
        monkeypatch.setattr(model, "repeat_kv", lambda x, n: x.repeat_interleave(n, dim=2))


def test_user_code(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(model.FeedForward):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    def replace(llama: Llama) -> None:
        layer: Any = llama.model.layers[0]
        old = layer.feed_forward
        layer.feed_forward = Own(64, 256, width=old.w2.weight.shape[1])

    changes: list[Callable[[Llama], object]] = [
        lambda llama: llama.model.layers[1].register_forward_hook(lambda *_: None),
        lambda llama: llama.model.tok_embeddings.register_forward_hook(lambda *_: None),
        lambda llama: llama.model.output.register_forward_pre_hook(lambda *_: None),
        lambda llama: llama.model.register_forward_hook(lambda *_: None),
        lambda llama: monkeypatch.setattr(model, "repeat_kv", lambda x, n: x.repeat_interleave(n, dim=2)),
        replace,
    ]
    for form in ("native", "fused", "plain"):
        for change in changes:
            llama = build("gqa", max_seq_len=16, max_batch_size=1, **FORMS[form])
            assert not llama.executor.runs_user_code
            change(llama)
            llama.executor.refresh()
            assert llama.executor.runs_user_code
            monkeypatch.undo()


# The cache ----------------------------------------------------------------------------------------


@pytest.fixture
def cache() -> KVCache:
    cache = KVCache((4, 2, 8, 4), torch.float32, torch.device("cpu"))
    cache.k.normal_(generator=torch.Generator().manual_seed(1))
    cache.v.normal_(generator=torch.Generator().manual_seed(2))
    return cache


@pytest.mark.parametrize("slots", [[1, 2], [3, 0], None], ids=str)
def test_a_cache_writes_its_slots(slots: list[int] | None, cache: KVCache) -> None:
    k, v = torch.randn(2, 2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    cache.slots, rows = slots, slots or [0, 1]
    for start_pos in (2, torch.tensor([2, 2])):
        cache.clear()
        keys, values = cache.update(k, v, start_pos, 5)
        for buffer, seen, new in ((cache.k, keys, k), (cache.v, values, v)):
            assert torch.equal(buffer[rows, :, 2:5], new) and torch.equal(seen[:, :, 2:], new)
            assert buffer.count_nonzero() == new.numel()
            assert (seen.data_ptr() == buffer[rows[0]].data_ptr()) == (slots != [3, 0])  # a view
    cache.update(k, v, torch.tensor([0, 5]), 8)
    assert torch.equal(cache.k[rows[0], :, :3], k[0]) and torch.equal(cache.v[rows[1], :, 5:], v[1])


def test_copying_a_row(cache: KVCache) -> None:
    k, v = cache.k.clone(), cache.v.clone()
    cache.copy(3, 1, 5)
    cache.copy(2, 2, 8)
    for buffer, before in ((cache.k, k), (cache.v, v)):
        before[1, :, :5] = before[3, :, :5]
        assert torch.equal(buffer, before)


def test_clearing_a_row(cache: KVCache) -> None:
    cache.k[2, 0, 0, 0] = float("nan")
    k, v = cache.k.clone(), cache.v.clone()
    cache.clear(2)
    for buffer, before in ((cache.k, k), (cache.v, v)):
        before[2] = 0
        assert torch.equal(buffer, before)
    cache.clear()
    assert not cache.k.any() and not cache.v.any()


def test_a_decoder_with_more_rows_than_its_cache(build: Callable[..., Llama]) -> None:
    llama = open_model(build, "native")
    assert isinstance(llama.executor._decoder, native.NativeDecoder)
    with pytest.raises(ValueError, match=f"{ROWS + 1} rows of ids in cache rows"):
        llama.executor.hidden(texts(1, ROWS + 1), 0, 1)
