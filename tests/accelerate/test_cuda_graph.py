"""CUDA graphs of decode steps on a CPU, without CUDA's capture: sizes, padding, and which graphs are captured."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from helpers.captures import replace_captures
from helpers.tolerance import LOGPROB, near
from llama import Llama
from llama.accelerate import executor
from llama.accelerate.cuda_graph import Batch, CudaGraphDecoder, round_context, round_rows
from llama.parallel import groups


def ids(bsz: int, seqlen: int) -> torch.Tensor:
    return torch.randint(3, 512, (bsz, seqlen), generator=torch.Generator().manual_seed(bsz))


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    return replace_captures(monkeypatch)


def with_graphs(llama: Llama) -> CudaGraphDecoder:
    """Give the model the decoder that it would have on CUDA without Triton."""
    llama.scheduler.executor = executor.Executor(llama.model, decoder="torch")
    decoder = llama.executor._decoder
    assert isinstance(decoder, CudaGraphDecoder)
    return decoder


def test_sizes() -> None:
    assert [round_rows(n, 24) for n in (1, 2, 3, 4, 5, 8, 9, 17, 24)] == [1, 2, 4, 4, 8, 8, 16, 24, 24]
    lengths = (1, 256, 257, 1024, 1025, 2048, 2049, 4097, 9000, 32768)
    assert [round_context(n, 32768) for n in lengths] == [256, 256, 512, 1024, 1280, 2048, 2560, 5120, 10240, 32768]
    assert round_context(5, 64) == 64 and round_context(600, 700) == 700
    for limit in (100, 3000):
        for ctx_len in range(1, limit + 1):
            assert ctx_len <= round_context(ctx_len, limit) <= max(256, 1.25 * ctx_len + 255)


@pytest.mark.parametrize("form", [{}, {"quantize": "int8"}, {"quantize": "int4"}], ids=str)
def test_answers_are_those_without_graphs(
    form: dict[str, str], build: Callable[..., Llama], captured: list[torch.Tensor]
) -> None:
    llama = build("gqa", max_seq_len=300, max_batch_size=6, compile=False, **form)
    prompts = [ids(n, n)[0].tolist() for n in (3, 250, 17, 5, 64, 40)]
    batches = [prompts[:n] for n in (1, 2, 3, 5, 6, 3)]
    expected = [llama.generate(rows, 20, temperature=0) for rows in batches]
    decoder = with_graphs(llama)
    assert [llama.generate(rows, 20, temperature=0) for rows in batches] == expected
    assert {key[:2] for key in decoder.replays} >= {(1, 256), (2, 256), (2, 300), (4, 300), (6, 300)}
    assert len(captured) == len(decoder.replays)


@pytest.mark.parametrize("name", ["mha", "gqa", "code", "llama31"])
def test_golden_answers(
    name: str, golden: dict[str, Any], build: Callable[..., Llama], captured: list[torch.Tensor]
) -> None:
    llama = build(name, max_seq_len=256, max_batch_size=3, dtype="float32", compile=False)
    with_graphs(llama)
    for text in ("single", "ragged"):
        expected = golden[name][text]
        found, logprobs = llama.generate(
            expected["prompt_tokens"], expected["max_gen_len"], temperature=0, logprobs=True
        )
        assert found == expected["tokens"] and logprobs is not None
        for ours, theirs in zip(logprobs, expected["logprobs"], strict=True):
            assert ours == pytest.approx(theirs, abs=LOGPROB)
    assert captured


def test_padding_rows_change_nothing_in_the_cache(build: Callable[..., Llama], captured: list[torch.Tensor]) -> None:
    """Other rows of the cache may hold texts that are still needed, up to their last position."""
    llama = build("mha", max_seq_len=32, max_batch_size=8, compile=False)
    with_graphs(llama)
    llama.executor.hidden(ids(8, 32), 0, 32)
    before = [buffer.clone() for cache in llama.model.caches for buffer in (cache.k, cache.v)]
    steps: list[tuple[int | torch.Tensor, list[int] | None]] = [
        (torch.tensor([4, 31, 7, 20, 9]), None),
        (torch.tensor([2, 3, 1]), [6, 7, 5]),
        (31, None),
    ]
    for start_pos, slots in steps:
        rows = 5 if isinstance(start_pos, int) else len(start_pos)
        llama.executor.hidden(ids(rows, 1), start_pos, 32, slots)
    after = [buffer for cache in llama.model.caches for buffer in (cache.k, cache.v)]
    expected = {(0, 4), (1, 31), (2, 7), (3, 20), (4, 9), (6, 2), (7, 3), (5, 1), *((row, 31) for row in range(5))}
    for old, new in zip(before, after, strict=True):
        changed = (old != new).any(dim=3).any(dim=1)  # [rows, positions]
        assert {(row, position) for row, position in changed.nonzero().tolist()} == expected


def test_any_rows_of_the_cache(build: Callable[..., Llama], captured: list[torch.Tensor]) -> None:
    llama = build("gqa", max_seq_len=64, max_batch_size=6, compile=False)
    texts, start_pos = ids(3, 40), torch.tensor([39, 20, 33])
    last = texts.gather(1, start_pos[:, None])

    def states(slots: list[int] | None) -> torch.Tensor:
        llama.executor.hidden(texts, 0, 40, slots)
        return llama.executor.hidden(last, start_pos, 40, slots)

    expected = states(None)
    decoder = with_graphs(llama)
    for slots in (None, [0, 1, 2], [5, 0, 2], [2, 1, 0], None):
        torch.testing.assert_close(states(slots), expected, rtol=0, atol=near(llama, expected))
    assert set(decoder.replays) == {(4, 64, True), (4, 64, False)}


def test_a_result_stays_when_the_next_step_runs(build: Callable[..., Llama], captured: list[torch.Tensor]) -> None:
    llama = build("mha", max_seq_len=32, max_batch_size=2, compile=False)
    with_graphs(llama)
    first = llama.executor.hidden(ids(2, 1), 0, 1)
    copied = first.clone()
    llama.executor.hidden(ids(2, 2)[:, 1:], 1, 2)
    assert torch.equal(first, copied) and len(captured) == 1


def test_changed_weights_and_angles(build: Callable[..., Llama], captured: list[torch.Tensor]) -> None:
    """A graph sees what is written in place. New angles need a new graph."""
    llama = build("mha", max_seq_len=32, max_batch_size=1, compile=False)
    model, first = llama.model, llama.model.freqs_cis
    weight = model.get_parameter("layers.0.feed_forward.w2.weight")

    def steps() -> Iterator[torch.Tensor]:
        for model.freqs_cis, factor in ((first, 2), (first**2, 0.5), (first, 1)):
            llama.executor.hidden(ids(1, 4), 0, 4)
            yield llama.executor.hidden(ids(1, 1), 4, 5)
            with torch.no_grad():
                weight.mul_(factor)
            yield llama.executor.hidden(ids(1, 1), 4, 5)

    expected = list(steps())
    with_graphs(llama)
    torch.testing.assert_close(list(steps()), expected, rtol=1e-5, atol=1e-5)
    assert len(captured) == 3
    assert not torch.allclose(expected[0], expected[1]) and not torch.allclose(expected[0], expected[3])


def grow_positions(model: Any) -> None:
    model.params.max_seq_len = 64


def shorten_angles(model: Any) -> None:
    model.freqs_cis = model.freqs_cis[:4]


def narrow_angles(model: Any) -> None:
    model.freqs_cis = model.freqs_cis[:, ::2].contiguous()


@pytest.mark.parametrize("change", [grow_positions, shorten_angles, narrow_angles])
def test_sizes_are_checked_before_a_graph_runs(
    change: Callable[[Any], None], build: Callable[..., Llama], captured: list[torch.Tensor]
) -> None:
    """A Triton kernel would read or write out of bounds, and say nothing."""
    llama = build("gqa", max_seq_len=32, max_batch_size=2, compile=False)
    decoder = with_graphs(llama)
    decoder.step, decoder.reads_used = lambda batch: batch.h, True  # which checks nothing
    change(llama.model)
    with pytest.raises(ValueError, match=r"expected|position 32, but the cache has 32"):
        llama.generate([[5]], 40, temperature=0)


def test_more_rows_than_the_cache_has(build: Callable[..., Llama], captured: list[torch.Tensor]) -> None:
    llama = build("gqa", max_seq_len=32, max_batch_size=2, compile=False)
    with_graphs(llama)
    for slots in (None, [0, 1, 2], [2]):
        with pytest.raises(ValueError, match="but the cache has 2 rows"):
            llama.executor.hidden(ids(3 if slots is None else len(slots), 1), 0, 1, slots)


@pytest.mark.parametrize("kind", ["complex128", "strided"])
def test_other_forms_of_angles(kind: str, build: Callable[..., Llama], captured: list[torch.Tensor]) -> None:
    """They are converted for the graph, which also sees what is written to them later."""
    llama = build("mha", max_seq_len=32, max_batch_size=1, compile=False)
    model = llama.model
    angles = model.freqs_cis.to(torch.complex128) if kind == "complex128" else model.freqs_cis.t().contiguous().t()

    def steps() -> Iterator[torch.Tensor]:
        model.freqs_cis = angles.clone(memory_format=torch.preserve_format)
        llama.executor.hidden(ids(1, 4), 0, 4)
        yield llama.executor.hidden(ids(1, 1), 4, 5)
        model.freqs_cis[4] = model.freqs_cis[20]
        yield llama.executor.hidden(ids(1, 1), 4, 5)

    expected = list(steps())
    with_graphs(llama)
    torch.testing.assert_close(list(steps()), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1])


def test_graphs_end_before_the_process_group(build: Callable[..., Llama], captured: list[torch.Tensor]) -> None:
    """NCCL would wait for them for ever, also if the program never closes its model."""
    llama = build("mha", max_seq_len=32, max_batch_size=1, compile=False)
    decoder = with_graphs(llama)
    llama.generate([[5, 6]], 4, temperature=0)
    assert decoder.replays
    groups._destroy()  # at exit, or by the last `close`
    assert not decoder.replays


def test_a_step_that_fails_gives_way_to_torchs_kernels(
    build: Callable[..., Llama], captured: list[torch.Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    """A kernel of Triton may need more shared memory than a GPU has, for example."""

    def failing(batch: Batch) -> torch.Tensor:
        raise OSError("out of resources\nand more lines")

    llama = build("gqa", max_seq_len=300, max_batch_size=3, compile=False)
    prompts = [ids(n, n)[0].tolist() for n in (3, 250, 17)]
    expected = llama.generate(prompts, 20, temperature=0)
    decoder = with_graphs(llama)
    decoder.step, decoder.reads_used = failing, True
    capfd.readouterr()
    assert llama.generate(prompts, 20, temperature=0) == expected
    assert set(decoder.replays) == {(3, 256, True), (3, 300, True)}
    message = "llama: the Triton step failed (out of resources): decoding with torch's kernels, which is slower"
    assert capfd.readouterr().err.splitlines() == [message]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, on which graphs are captured")
def test_a_step_that_cannot_be_captured(build: Callable[..., Llama], capfd: pytest.CaptureFixture[str]) -> None:
    llama = build("gqa", max_seq_len=300, max_batch_size=3, compile=False)
    prompts = [ids(n, n)[0].tolist() for n in (3, 250, 17)]
    expected = llama.generate(prompts, 20, temperature=0)
    decoder = with_graphs(llama)
    capfd.readouterr()
    assert llama.generate(prompts, 20, temperature=0) == expected and not decoder.replays
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("llama: no CUDA graph of the decode step (")
    assert line.endswith("): its kernels run one by one, which is slower")
