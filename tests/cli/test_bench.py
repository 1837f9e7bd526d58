"""`bench`: its runs, its figures, its output, and the errors before it loads a model."""

import contextlib
import io
import json
import mmap
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers.commands import Ended, call
from helpers.faults import edit_params, edit_shard
from helpers.ranks import run_ranks
from llama import Llama
from llama.accelerate.executor import Executor
from llama.cli import bench, plot

CPU = torch.device("cpu")
KEYS = {*bench.COLUMNS, "steps"}


@pytest.fixture(autouse=True)
def short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "READ_BYTES", 4_000_000)


def run_json(command: Callable[..., Ended], *args: str) -> dict[str, Any]:
    ended = command("bench", "--json", *args)
    assert ended.status == 0, ended.err
    (line,) = ended.out.splitlines()
    return json.loads(line)


# What runs ----------------------------------------------------------------------------------------


def test_every_pair_runs_to_its_end(command: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[tuple[list[list[int]], dict[str, Any], int]] = []
    passes: list[tuple[tuple[int, ...], Any, int]] = []
    build, stream, hidden = Llama.build, Llama.stream, Executor.hidden

    def with_every_id_a_stop_id(*args: Any, **kwargs: Any) -> Llama:
        llama = build(*args, **kwargs)
        llama.tokenizer.stop_tokens = set(range(512))
        return llama

    def watched_stream(self: Llama, prompts: list[list[int]], **settings: Any) -> Iterator[Any]:
        count = 0
        for step in stream(self, prompts, **settings):
            count += sum(token.id is not None for token in step)
            yield step
        streams.append((prompts, settings, count))

    def watched_hidden(
        self: Executor, tokens: torch.Tensor, start: Any, ctx_len: int, *slots: Any, **named: Any
    ) -> torch.Tensor:
        passes.append((tuple(tokens.shape), start, ctx_len))
        return hidden(self, tokens, start, ctx_len, *slots, **named)

    monkeypatch.setattr(Llama, "build", staticmethod(with_every_id_a_stop_id))
    monkeypatch.setattr(Llama, "stream", watched_stream)
    monkeypatch.setattr(Executor, "hidden", watched_hidden)
    found = run_json(command, "--batch", "1,3", "--prompt", "5,9", "--gen", "6", "--no_cache")

    rows = found["rows"]
    order = [(1, 5, True), (1, 5, False), (1, 9, True), (1, 9, False)]
    order += [(3, 5, True), (3, 5, False), (3, 9, True), (3, 9, False)]
    assert [(row["batch"], row["prompt"], row["cache"]) for row in rows] == order
    # One warm-up and three timed runs with the same prompts. In each, five steps after the first are timed.
    assert [(len(prompts), len(prompts[0]), count) for prompts, _, count in streams] == [
        (rows, length, rows * 6) for rows in (1, 3) for length in (5, 9) for _ in range(4)
    ]
    assert all(settings == {"max_gen_len": 6, "temperature": 0, "logprobs": False} for _, settings, _ in streams)
    assert all(0 <= token < 512 for prompts, _, _ in streams for ids in prompts for token in ids)
    assert streams[8][0] == streams[11][0] and len({tuple(ids) for ids in streams[8][0]}) == 3
    assert [row["steps"] for row in rows] == [15, 5] * 4
    # Without the cache each step is a pass over the whole prefix, at the same lengths as with the cache.
    first = passes.index(((3, 6), 0, 6))
    assert passes[first + 1 : first + 6] == [((3, n), 0, n) for n in range(6, 11)]

    for row in rows:
        assert set(row) == KEYS and row["collectives_share"] is None
        assert 0 < row["step_s"] <= row["step_p95_s"] and row["tokens_per_s"] == row["batch"] / row["step_s"]
        share = row["bytes_per_token"] * row["batch"] / row["step_s"] / found["bandwidth"]
        assert row["bandwidth_share"] == pytest.approx(share)
        assert (row["first_token_s"] is None) == (row["prefill_tokens_per_s"] is None) == (not row["cache"])
    assert found["bandwidth_of"] == "sum"
    assert (
        found["contexts"] == []
        and found["machine"].items()
        >= {
            "dtype": "float32",
            "quantize": None,
            "compile": True,
            "plain": False,
            "ranks": 1,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }.items()
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["machine"]["date"]) and found["machine"]["cpu"]


def test_medians_and_percentiles(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter([[9.0, 9.0], [5.0, *map(float, range(1, 11))], [3.0, *map(float, range(11, 21))], [4.0]])
    monkeypatch.setattr(bench, "_step_seconds", lambda stream: next(runs))
    llama = build("mha", max_seq_len=16, max_batch_size=2)
    (row,) = bench.measure(llama, 2, 4, 11, 1e9, False)
    assert (row["step_s"], row["step_p95_s"], row["first_token_s"], row["steps"]) == (10.5, 19.0, 4.0, 20)
    assert row["tokens_per_s"] == 2 / 10.5


def test_steps_without_the_cache_are_few_and_spread(build: Callable[..., Llama]) -> None:
    cached, uncached = bench.measure(build("mha", max_seq_len=37), 1, 4, 33, 1e9, True)
    assert (cached["steps"], uncached["steps"]) == (96, 8)


# What is counted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("args", [[], ["--plain"]])
@pytest.mark.parametrize(
    ("name", "dim", "kv_dim", "width", "layers"), [("mha", 64, 64, 192, 3), ("gqa", 128, 32, 448, 2)]
)
def test_bytes_a_token(
    name: str,
    dim: int,
    kv_dim: int,
    width: int,
    layers: int,
    args: list[str],
    tied: bool,
    command: Callable[..., Ended],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = checkpoint(name)
    if tied:
        folder = shutil.copytree(folder, tmp_path / "tied")
        edit_shard(folder / "consolidated.00.pth", lambda tensors: tensors.pop("output.weight"))
    args = ["--ckpt_dir", str(folder), "--batch", "3", "--prompt", "7", "--gen", "4", *args]
    (row,) = run_json(command, *args)["rows"]
    layer = 2 * dim * dim + 2 * kv_dim * dim + 3 * dim * width + 2 * dim
    weights = (
        layers * layer + dim + 512 * dim
    )  # tied or not, a step reads the output matrix, and of the embedding only single rows
    positions = 7 + 4 / 2  # in the cache at the average step
    assert row["bytes_per_token"] == pytest.approx(4 * (weights / 3 + positions * layers * 2 * kv_dim))


@pytest.mark.parametrize(("kind", "moved"), [("sum", 4_000_000), ("copy", 2 * bench.COPIES * 8_000_000)])
def test_bytes_of_the_bandwidth(kind: str, moved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum reads its buffer. Copies, as on CUDA, read one buffer and write another one as large."""
    called: list[torch.Tensor] = []
    monkeypatch.setattr(bench, "COPY_BYTES", 8_000_000)
    monkeypatch.setattr(bench, "bandwidth_of", lambda device: kind)

    def seconds(call: Callable[[], torch.Tensor]) -> float:
        called.append(call())
        return 0.5

    monkeypatch.setattr(bench, "_seconds", seconds)
    assert bench.bandwidth(CPU) == moved / 0.5
    assert [value.item() for value in called] == [1_000_000.0 if kind == "sum" else 1.0] * 5


def test_cuda_is_measured_by_copies() -> None:
    assert [bench.bandwidth_of(torch.device(name)) for name in ("cuda", "cpu", "mps")] == ["copy", "sum", "sum"]


def test_weights_of_one_quantized_matrix_count_once(build: Callable[..., Llama]) -> None:
    model = build("gqa", dtype="bfloat16", quantize="int8").model
    norms, layers = 5 * 128, sum(w.numel() for name, w in model.named_parameters() if "feed_forward" in name)
    layers += sum(w.numel() for name, w in model.named_parameters() if "attention.w" in name)
    rows = sum(len(w) for name, w in model.named_parameters() if ".w" in name and w.dim() == 2 and "layers" in name)
    assert bench.weight_bytes(model) == 2 * norms + layers + 2 * rows + 2 * 512 * 128


def test_peak_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    if not bench.STATUS.exists():
        pytest.skip("no /proc here")
    with bench.peak_memory(CPU) as before:
        pass
    with bench.peak_memory(CPU) as seen:
        held = mmap.mmap(
            -1, 80_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )  # fresh pages, whatever this process has freed before
        for i in range(0, len(held), 4096):
            held[i] = 1
        time.sleep(10 * bench.SAMPLE_SECONDS)
    assert len(held) and max(seen) - max(before) > 70e6
    monkeypatch.setattr(bench, "STATUS", Path("/nowhere/status"))
    with bench.peak_memory(CPU) as nothing:
        pass
    assert nothing == []


def on_a_rank(folder: str) -> tuple[str, bool]:
    originals, printed = [getattr(dist, name) for name in bench.COLLECTIVES], io.StringIO()
    bench.READ_BYTES = 4_000_000
    with contextlib.redirect_stdout(printed):
        call(bench.bench, ckpt_dir=folder, batch=2, prompt="5", gen=4, device="cpu", json=True)
    return printed.getvalue(), originals == [getattr(dist, name) for name in bench.COLLECTIVES]


def test_ranks_report_their_collectives(checkpoint: Callable[..., Path]) -> None:
    (first, restored), (second, _) = run_ranks(2, on_a_rank, str(checkpoint("mha")))
    assert second == "" and restored
    found = json.loads(first)
    assert found["machine"]["ranks"] == 2 and 0 < found["rows"][0]["collectives_share"] < 1
    assert bench.table(found["rows"])[0][-1] == "collectives"


# What is shown ------------------------------------------------------------------------------------


def test_the_table(command: Callable[..., Ended]) -> None:
    ended = command("bench", "--batch", "2", "--prompt", "5", "--gen", "3")
    facts, head, row = ended.out.splitlines()
    assert re.search(r"dtype float32, compile True, reads \d+\.\d GB/s$", facts) and "quantize" not in facts
    assert len(head) == len(row) and head.startswith("batch  prompt  prefill tok/s  first ms  decode tok/s  step ms")
    assert row.split()[:2] == ["2", "5"] and head.endswith("bandwidth")
    both = command("bench", "--batch", "2", "--prompt", "5", "--gen", "3", "--no_cache").out.splitlines()
    assert [line.split()[2] for line in both[2:]] == ["yes", "no"] and both[3].split()[3:5] == ["-", "-"]


def test_figures_are_shown_in_their_units() -> None:
    row = dict.fromkeys(bench.COLUMNS) | {"batch": 16, "cache": True, "step_s": 0.0123, "peak_memory": 1_234_000_000}
    head, line = bench.table([row | {"bandwidth_share": 0.5}])
    assert head == ["batch", "step ms", "peak MB", "bandwidth"]
    assert line == ["16", "12.30", "1,234", "50%"]


def test_the_plot(command: Callable[..., Ended], tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    found = run_json(command, "--batch", "1", "--prompt", "4,600", "--gen", "2", "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    first, second, third = found["contexts"]
    assert [point["context"] for point in (first, second, third)] == [128, 256, 512]
    assert first["kv_bytes"] == 128 * 1536 and first["expected_step_s"] == first["step_s"] > 0
    assert third["expected_step_s"] - first["step_s"] == pytest.approx((512 - 128) * 1536 / found["bandwidth"])


def test_steps_of_the_plot_are_those_of_the_whole_text(build: Callable[..., Llama]) -> None:
    """The cache is filled in pieces. At each context, the logits are those of one pass over the text."""
    llama = build("gqa", max_seq_len=300)
    model, executor = llama.model, llama.executor
    bench.measure_contexts(executor, 256, 1e9)
    ids = torch.tensor([bench.random.Random(1).choices(range(512), k=256)])
    after = [executor.logits(executor.hidden(ids[:, n - 1 : n], n - 1, n))[0, 0] for n in (128, 256)]
    whole = model.forward(ids, 0)[0]
    torch.testing.assert_close(torch.stack(after), whole[[127, 255]], atol=1e-4, rtol=1e-4)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["1,4,16", (1, 4, 16), [1, 4, 16], " 1, 4,16"])
def test_lists_come_in_any_form(value: Any) -> None:
    assert bench.read_list("batch", value) == [1, 4, 16]
    assert bench.read_list("batch", 7) == bench.read_list("batch", "7") == [7]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch", "1,0"], "--batch is '1,0', expected integers from 1 with commas between them, like 1,4,16"),
        (["--batch", "1,x"], "--batch is '1,x', expected integers from 1"),
        (["--batch", "1.5"], "--batch is '1.5', expected integers from 1"),
        (["--batch=[]"], "--batch is '[]', expected integers from 1"),
        (["--batch", "True"], "--batch is 'True', expected integers from 1"),
        (["--prompt", "-3"], "--prompt is '-3', expected integers from 1"),
        (["--prompt="], "--prompt is '', expected integers from 1"),
        (["--gen", "0"], "gen is 0, expected an integer from 2"),
        (["--gen", "1"], "gen is 1, expected an integer from 2"),
        (["--gen", "x"], "Invalid value for '--gen': 'x' is not a valid integer."),
        (["--plot", "{tmp}/none/out.png"], "out.png cannot be written (No such file or directory): name another file"),
        (["--plot", "{tmp}"], "give a name that ends in .png"),
        (["--plot", "{tmp}/folder.png"], "folder.png cannot be written (Is a directory): name another file"),
        (
            ["--plot", "{tmp}/out.png", "--prompt", "64"],
            "--plot begins at 128 tokens: give a --prompt that long, not 6",
        ),
        (["--ckpt_dir", "{tmp}/window"], "--prompt 512 and --gen 64 are more than the 100 positions of this model's"),
    ],
)
def test_mistakes_are_reported_before_anything_is_loaded(
    args: list[str],
    message: str,
    command: Callable[..., Ended],
    built: list[Llama],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    (tmp_path / "folder.png").mkdir()
    if "{tmp}/window" in args:
        edit_params(shutil.copytree(checkpoint("mha"), tmp_path / "window"), sliding_window=100)
    ended = command("bench", *(word.replace("{tmp}", str(tmp_path)) for word in args))
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ") and message in line and ended.out == "" and not built
    assert ended.status == (2 if "Invalid value" in message else 1)


def test_a_plot_without_matplotlib(
    command: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, built: list[Llama]
) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    assert command("bench", "--plot", "x.png").err == "error: --plot needs matplotlib: pip install -e '.[bench]'\n"
    assert not built


def test_an_existing_plot_survives_a_mistake(command: Callable[..., Ended], tmp_path: Path) -> None:
    old, new = tmp_path / "old.png", tmp_path / "new.png"
    old.write_text("old")
    for path in (old, new):
        assert command("bench", "--ckpt_dir", str(tmp_path / "none"), "--plot", str(path)).status == 1
    assert old.read_text() == "old" and not new.exists()


def test_a_prompt_that_needs_too_much_memory(command: Callable[..., Ended]) -> None:
    ended = command("bench", "--batch", "1", "--prompt", str(10**13))
    expected = r"error: the model needs [\d.]+ GiB \(.*\), [\d.]+ GiB are free on cpu: .* would fit\n"
    assert re.fullmatch(expected, ended.err)
