"""`memory.sizes` against models that were built and published models, and the command `plan`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import llama as package
from helpers.commands import call
from helpers.faults import edit_params, edit_shard
from helpers.paths import HELPERS
from helpers.ranks import run_ranks
from llama import Llama, ModelArgs
from llama.accelerate.quantized_weight import QuantizedWeight
from llama.checkpoint.errors import CheckpointError
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.layout import legal_world_sizes, tensor_shapes
from llama.cli import main as cli
from llama.cli.plan import plan, read_bytes
from llama.memory.sizes import CUBLAS_BYTES, Sizes, count_parameters, sizes
from llama.parallel.device import DTYPES

SEVEN_B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1}
SEVENTY_B = {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8}
LLAMA_3_8B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024}
LLAMA_405B = {"dim": 16384, "n_layers": 126, "n_heads": 128, "ffn_dim_multiplier": 1.2, "multiple_of": 4096}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "llama-2-7b": (SEVEN_B | {"vocab_size": 32000}, 6_738_415_616),
    "llama-2-13b": (SEVEN_B | {"dim": 5120, "n_heads": 40, "n_layers": 40, "vocab_size": 32000}, 13_015_864_320),
    "llama-2-70b": (SEVENTY_B | {"n_layers": 80, "vocab_size": 32000}, 68_976_648_192),
    "llama-3-8b": (LLAMA_3_8B | {"ffn_dim_multiplier": 1.3, "rope_theta": 500000.0}, 8_030_261_248),
    # A layer: 2 * 16384^2 + 2 * 1024 * 16384 + 3 * 53248 * 16384 + 2 * 16384 = 3,187,703,808
    "llama-3.1-405b-mp8": (LLAMA_405B | {"n_kv_heads": 8, "vocab_size": 128256}, 405_853_388_800),
    # Twice the KV heads: 126 * 2 * 1024 * 16384 more
    "llama-3.1-405b-mp16": (LLAMA_405B | {"n_kv_heads": 16, "vocab_size": 128256}, 410_081_247_232),
}
MIB = 2**20


def held(llama: Llama) -> Sizes:
    """The bytes of this rank's tensors between calls, each counted once."""
    model = llama.model
    weights: dict[int, int] = {}
    for weight in model.parameters():
        if isinstance(weight, QuantizedWeight):
            weights[id(weight.source)] = sum(buffer.nbytes for buffer in weight.source.buffers())
        else:
            storage = weight.untyped_storage()  # several weights share that of a merged matrix
            weights[storage.data_ptr()] = storage.nbytes()
    cache = sum(cache.k.nbytes + cache.v.nbytes for cache in model.caches)
    return Sizes(sum(weights.values()), cache, model.freqs_cis.nbytes, 0)


def planned(
    folder: Path, ranks: int, dtype: torch.dtype, max_seq_len: int, max_batch_size: int, quantize: str | None = None
) -> Sizes:
    """What `sizes` expects, without the peak of a prefill."""
    checkpoint = Checkpoint(folder)
    checkpoint.params.max_seq_len, checkpoint.params.max_batch_size = max_seq_len, max_batch_size
    tied = "output.weight" not in checkpoint.shapes
    axis = checkpoint.embedding_axis
    return replace(sizes(checkpoint.params, ranks, dtype, tied=tied, embedding_axis=axis, quantize=quantize), prefill=0)


def untie(folder: Path, checkpoint: Path) -> Path:
    """A copy of a checkpoint without output.weight: the embedding serves as output."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for path in folder.glob("*.pth"):
        edit_shard(path, lambda t: t.pop("output.weight"))
    return folder


# A built model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mha", "gqa", "code", "llama31"])
@pytest.mark.parametrize(("dtype", "kind"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_one_rank_holds_what_is_planned(
    name: str, dtype: str, kind: torch.dtype, build: Callable[..., Llama], checkpoint: Callable[..., Path]
) -> None:
    llama = build(name, max_seq_len=33, max_batch_size=3, dtype=dtype)
    assert held(llama) == planned(checkpoint(name), 1, kind, 33, 3)


@pytest.mark.parametrize("name", ["mha", "gqa"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantized_model_holds_what_is_planned(
    name: str, quantize: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Tied models, too: there the output layer is an int8 copy."""
    for folder in (checkpoint(name), untie(tmp_path / "tied", checkpoint(name))):
        llama = Llama.build(folder, max_seq_len=33, max_batch_size=3, dtype="bfloat16", quantize=quantize)
        assert held(llama) == planned(folder, 1, torch.bfloat16, 33, 3, quantize)
        llama.close()


def build_and_measure(folders: list[Path]) -> list[Sizes]:
    found = []
    for folder in folders:
        llama = Llama.build(folder, max_seq_len=40, max_batch_size=2, dtype="float32")
        found.append(held(llama))
        llama.close()
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_holds_what_is_planned(ranks: int, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """On 4 ranks each of the two KV heads of gqa is stored on two ranks."""
    folders = [checkpoint(name, 2) for name in ("mha", "gqa", "llama31")]
    folders += [untie(tmp_path / name, checkpoint(name, 2)) for name in ("mha", "llama31")]
    expected = [planned(folder, ranks, torch.float32, 40, 2) for folder in folders]
    assert run_ranks(ranks, build_and_measure, folders) == [expected] * ranks


@pytest.mark.parametrize("name", ["mha", "llama31"])
def test_a_tied_model_holds_its_embedding_once(name: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """It is stored once on one rank, and on several ranks if the files split it on the vocabulary, like the output."""
    folder = untie(tmp_path / "tied", checkpoint(name))
    (found,) = build_and_measure([folder])
    assert found == planned(folder, 1, torch.float32, 40, 2)
    whole = planned(checkpoint(name), 1, torch.float32, 40, 2)
    args = Checkpoint(folder).params
    assert whole.weights - found.weights == 512 * args.dim * 4
    assert count_parameters(args, tied=True)["total"] * 4 == found.weights


# Published models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    params, total = PUBLISHED[name]
    counts = count_parameters(ModelArgs(**params))
    assert counts["total"] == total == sum(counts.values()) - total
    assert sizes(ModelArgs(**params), 1, torch.bfloat16).weights == 2 * total


def test_components_of_the_7b() -> None:
    assert count_parameters(ModelArgs(**PUBLISHED["llama-2-7b"][0])) == {
        "embedding": 32000 * 4096,
        "attention": 32 * 4 * 4096**2,
        "feed-forward": 32 * 3 * 4096 * 11008,
        "norms": 65 * 4096,
        "output": 32000 * 4096,
        "total": 6_738_415_616,
    }


def test_bytes_of_the_7b() -> None:
    args = ModelArgs(**PUBLISHED["llama-2-7b"][0], max_seq_len=2048, max_batch_size=1)
    size = sizes(args, 1, torch.float16)
    assert round(size.weights / MIB, 1) == 12_852.5
    assert size.cache == 1024 * MIB
    assert size.rope == 2 * 2048 * 64 * 8
    assert size.total == size.weights + size.cache + size.rope + size.prefill


def test_bytes_of_the_quantized_7b() -> None:
    """Worked out by hand. A layer has 4 matrices of 4096 x 4096, w1 and w3 of 11008 x 4096 and w2 of 4096 x 11008."""
    args = ModelArgs(**PUBLISHED["llama-2-7b"][0], max_seq_len=4096, max_batch_size=1)
    numbers, rows = 4 * 4096**2 + 3 * 11008 * 4096, 4 * 4096 + 2 * 11008 + 4096
    kept = 2 * (32000 * 4096 + 65 * 4096)  # embedding and norms, in 16 bits
    output8, output16 = 32000 * 4096 + 2 * 32000, 2 * 32000 * 4096
    int8, int4 = (sizes(args, 1, torch.float16, quantize=scheme) for scheme in ("int8", "int4"))
    assert int8.weights == 32 * (numbers + 2 * rows) + kept + output16 == 7_003_545_600
    assert int4.weights == 32 * (numbers // 2 + 4 * numbers // 32) + kept + output8 == 4_441_315_840
    # The 7B at its full context fits on a GPU of 12 GB in 8 and 4 bits, not in 16.
    whole = sizes(args, 1, torch.float16, device="cuda")
    assert whole.cache == int8.cache == int4.cache == 2 * 2**30
    assert whole.weights + whole.cache > 12 * 10**9
    for scheme in ("int8", "int4"):
        assert sizes(args, 1, torch.float16, quantize=scheme, device="cuda").total < 12 * 10**9


# The peak of a prefill ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/status, which Linux has")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_prefill_grows_the_process_as_planned(dtype: str, measured: Callable[[str, object], None]) -> None:
    # Freed blocks of over 64 KB are returned to the system, so that the process grows by what is in use.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    env["PYTHONPATH"] = str(Path(package.__file__).parents[1])
    command = [sys.executable, str(HELPERS / "prefill_memory.py"), dtype, "1024", "1024", "4096"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=200)
    for length, grown in json.loads(done.stdout).items():
        args = ModelArgs(dim=576, n_layers=2, n_heads=9, n_kv_heads=3, vocab_size=8192, max_batch_size=1)
        args.max_seq_len = int(length)
        expected = sizes(args, 1, DTYPES[dtype]).prefill
        measured(f"prefill of {length} tokens, {dtype}", f"{grown / MIB:.1f} MiB, planned {expected / MIB:.1f}")
        assert 0.9 * grown < expected < 1.25 * grown


@pytest.mark.parametrize(
    ("dtype", "workspaces", "allocated"), [(torch.float32, 1, 46_000_000), (torch.float16, 0, 7_300_000)]
)
def test_bytes_that_torch_allocated_on_a_gpu(
    dtype: torch.dtype, workspaces: int, allocated: int, checkpoint: Callable[..., Path]
) -> None:
    """Measured on an H200 on 2026-11-26, in one process: two prompts of 1,499 ids, and one new id each, so no decode
    step. The first run, in float32, allocated cuBLAS's workspace, which the second one found there."""
    args = replace(Checkpoint(checkpoint("mha")).params, max_seq_len=1500, max_batch_size=2)
    planned = sizes(args, 1, dtype, device="cuda").total - (2 - workspaces) * CUBLAS_BYTES
    assert 0.9 * allocated < planned < 1.25 * allocated


def test_the_longest_context_of_llama_3_1_fits_a_gpu_of_80_gb() -> None:
    args = ModelArgs(**PUBLISHED["llama-3-8b"][0], max_seq_len=131_072, max_batch_size=1)
    size = sizes(args, 1, torch.bfloat16, device="cuda")
    assert size.cache == 2 * 32 * 131_072 * 1024 * 2 and size.total < 40 * 10**9


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4", "fp8"])
def test_a_prefill_grows_with_length_rows_and_nothing_else(device: str, quantize: str | None) -> None:
    """Sizes grow monotonically, as the binary search requires, and for long contexts linearly."""

    def peak(length: int, rows: int) -> int:
        args = ModelArgs(**PUBLISHED["llama-3-8b"][0], max_seq_len=length, max_batch_size=rows)
        return sizes(args, 2, torch.bfloat16, quantize=quantize, device=device).prefill

    for of in ([peak(n, 1) for n in range(1, 9000, 37)], [peak(3000, n) for n in range(1, 40)]):
        assert of == sorted(of)
    first, second, third = (peak(n * 2**20, 1) for n in (1, 2, 3))
    assert third - second == pytest.approx(second - first, rel=1e-3)


def test_weights_of_a_layer_are_counted_once_for_each() -> None:
    for params, _ in PUBLISHED.values():
        args = ModelArgs(**params)
        assert sizes(args, 1, torch.float32).weights == 4 * sum(prod(s) for s in tensor_shapes(args).values())


def test_kv_heads_are_repeated_on_more_ranks_than_heads() -> None:
    args = ModelArgs(**PUBLISHED["llama-2-70b"][0], max_seq_len=4096, max_batch_size=2)
    assert legal_world_sizes(args) == [1, 2, 4, 8, 16, 32, 64]
    caches = [sizes(args, n, torch.bfloat16).cache for n in legal_world_sizes(args)]
    one_head = 2 * 80 * 2 * 4096 * 128 * 2  # keys and values, layers, rows, positions, head_dim, bytes
    assert [cache // one_head for cache in caches] == [8, 4, 2, 1, 1, 1, 1]
    held_by_all = 64 * sizes(args, 64, torch.bfloat16).weights
    norms, repeated = 161 * 8192, 80 * 2 * 1024 * 8192  # every rank has the norms; each KV head is on eight ranks
    assert held_by_all == 2 * (68_976_648_192 + 63 * norms + 7 * repeated)


# The command --------------------------------------------------------------------------------------


def write_params(folder: Path, params: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    return folder / "params.json"


def answer(capsys: pytest.CaptureFixture[str], path: str, **flags: Any) -> dict[str, Any]:
    call(plan, path, json=True, **flags)
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", PUBLISHED)
def test_json_of_a_params_file_alone(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params, total = PUBLISHED[name]
    found = answer(capsys, str(write_params(tmp_path, params)), max_seq_len=4096, max_batch_size=2)
    args = ModelArgs(**params, max_seq_len=4096, max_batch_size=2)
    assert found["parameters"]["total"] == total and found["notes"] == found["notes"][-1:]
    assert [row["ranks"] for row in found["per_rank"]] == 4 * legal_world_sizes(args)
    kinds = [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("bfloat16", "int4")]
    assert list(dict.fromkeys((row["dtype"], row["quantize"]) for row in found["per_rank"])) == kinds
    for row in found["per_rank"]:
        size = sizes(args, row["ranks"], DTYPES[row["dtype"]], quantize=row["quantize"])
        assert {key: row[key] for key in ("weights", "cache", "rope", "prefill")} == asdict(size)
        assert row["total"] == size.weights + size.cache + size.rope + size.prefill
        assert "fits" not in row


def test_the_prefill_chunk_changes_what_prompts_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = PUBLISHED["llama-3-8b"][0]
    path = str(write_params(tmp_path, params))
    args, peaks = ModelArgs(**params, max_seq_len=4096, max_batch_size=2), dict[int, int]()
    for chunk in (64, 1024, 4096):
        (row,) = answer(
            capsys, path, max_seq_len=4096, max_batch_size=2, ranks=1, dtype="float32", prefill_chunk=chunk
        )["per_rank"]
        peaks[chunk] = row["prefill"]
        assert row["prefill"] == sizes(args, 1, torch.float32, prefill_chunk=chunk).prefill
    assert peaks[64] < peaks[1024] == sizes(args, 1, torch.float32).prefill < peaks[4096]
    with pytest.raises(ValueError, match="prefill_chunk is 0, expected an integer from 1"):
        call(plan, path, prefill_chunk=0)


def test_a_vocabulary_left_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_params(tmp_path, SEVEN_B)
    found = answer(capsys, str(tmp_path))
    assert found["vocab_size"] == 32000 and "does not have the vocabulary size (-1): using 32000" in found["notes"][0]
    found = answer(capsys, str(path), vocab_size=32016)
    assert found["parameters"]["total"] == 6_738_415_616 + 2 * 16 * 4096 and len(found["notes"]) == 1
    write_params(tmp_path, SEVEN_B | {"vocab_size": 32000})
    with pytest.raises(ValueError, match="vocab_size is 32016, but the model's is 32000: leave it out"):
        call(plan, str(path), vocab_size=32016)


def test_a_folders_vocabulary_is_its_embeddings(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, str(checkpoint("mha", 2)))
    assert found["vocab_size"] == 512 and not found["tied"] and len(found["notes"]) == 1
    tied = answer(capsys, str(untie(tmp_path / "tied", checkpoint("mha", 2))))
    assert tied["tied"] and tied["parameters"]["output"] == 0
    with pytest.raises(ValueError, match="vocab_size is 500, but the model's is 512"):
        call(plan, str(checkpoint("mha", 2)), vocab_size=500)
    edit_params(tmp_path / "tied", n_layers=4)
    with pytest.raises(CheckpointError, match=r"does not match params\.json as one of 2 shards"):
        call(plan, str(tmp_path / "tied"))


@pytest.mark.parametrize("memory", ["12GB", "24GiB", "900MiB", "1.5 TB", "14551621632B"])
@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3.1-405b-mp16"])
def test_the_largest_sizes_that_fit(name: str, memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The largest sizes fit, and one position or row more does not."""
    params, _ = PUBLISHED[name]
    found = answer(capsys, str(write_params(tmp_path, params)), memory=memory, max_seq_len=2048)
    available = read_bytes(memory)
    assert found["memory"] == available
    for row in found["per_rank"]:

        def total(max_seq_len: int, max_batch_size: int, row: dict[str, Any] = row) -> int:
            args = ModelArgs(**params, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
            return sizes(args, row["ranks"], DTYPES[row["dtype"]], quantize=row["quantize"]).total

        context, batch = row["max_context"], row["max_batch"]
        assert row["fits"] == (row["total"] <= available) == (batch >= 1) == (context >= 2048)
        assert total(context + 1, 1) > available and total(2048, batch + 1) > available
        assert context == 0 or total(context, 1) <= available
        assert batch == 0 or total(2048, batch) <= available


def test_the_context_ends_at_the_sliding_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_params(tmp_path, SEVEN_B | {"sliding_window": 4096, "vocab_size": 32000})
    found = answer(capsys, str(path), memory="1TB", max_seq_len=8192)
    assert {row["max_context"] for row in found["per_rank"]} == {4096}
    assert "beyond the sliding window: 4096 at most" in found["notes"][0]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GB", 12 * 10**9),
        ("12GiB", 12 * 2**30),
        ("512MB", 512 * 10**6),
        ("1.5MiB", 3 * 2**19),
        ("80 gb", 80 * 10**9),
        ("0.1KB", 100),
        ("7B", 7),
    ],
)
def test_memory_sizes(text: str, size: int) -> None:
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["12", "GB", "", "-1GB", "0GB", "12G", "12 apples", "1e3GB", "nanGB", "1,5GB", "٣GB"])
def test_invalid_memory_sizes(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a number and its unit, 12GB or 11.5GiB"):
        call(plan, str(tmp_path), memory=text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ranks": 3}, r"3 ranks cannot share this model .* start 1, 2, 4, 8, 16, 32"),
        ({"ranks": 0}, "ranks is 0, expected an integer from 1"),
        ({"max_seq_len": 0}, "max_seq_len is 0, expected"),
        ({"max_batch_size": -2}, "max_batch_size is -2, expected"),
        ({"vocab_size": 0}, "vocab_size is 0, expected"),
        ({"dtype": "int8"}, "'int8' is not one of 'float32', 'bfloat16', 'float16'"),
        ({"quantize": "int2"}, "'int2' is not one of 'int8', 'int4'"),
        ({"device": "tpu"}, "'tpu' is not one of 'cpu', 'cuda'"),
    ],
)
def test_flags_that_do_not_fit(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_params(tmp_path, SEVEN_B)
    with pytest.raises((ValueError, click.UsageError), match=message):
        call(plan, str(path), **flags)


def test_paths_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist: give the folder"):
        call(plan, str(tmp_path / "nowhere"))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"other.json is a file: give .* named params.json"):
        call(plan, str(tmp_path / "other.json"))
    with pytest.raises(
        CheckpointError,
        match=r"holds no consolidated.NN.pth: .* named params.json",
    ):
        call(plan, str(tmp_path))
    with pytest.raises(CheckpointError, match="dim is missing"):
        call(plan, str(write_params(tmp_path, {"n_layers": 1})))


def test_the_table_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_params(tmp_path, SEVEN_B)
    monkeypatch.setattr(sys, "argv", ["llama", "plan", str(path), "--dtype", "float16", "--memory", "16GB"])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert "total         6,738,415,616" in lines
    head = next(i for i, line in enumerate(lines) if line.startswith("dtype"))
    table = lines[head : head + 7]
    assert len({len(line) for line in table}) == 1 and max(map(len, lines[: head + 7])) <= 120
    row = table[1].split()
    assert row[:5] == ["float16", "1", "12,852.5", "1,024.0", "2.0"] and row[7] == "yes"
    size = sizes(ModelArgs(**PUBLISHED["llama-2-7b"][0], max_seq_len=2048, max_batch_size=1), 1, torch.float16)
    assert row[5:7] == [f"{size.prefill / MIB:,.1f}", f"{size.total / MIB:,.1f}"]
    assert lines[-1].startswith("Prefill is the peak") and lines[-2].startswith("note: params.json")
    monkeypatch.setattr(sys, "argv", ["llama", "plan", str(path), "--quantize", "int4", "--ranks", "2"])
    cli.main()
    assert "\nint4   " in capsys.readouterr().out
