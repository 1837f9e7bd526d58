"""The check before loading: whether a model fits, and which flags would. Also tests/gpu.py, run on a CPU."""

import json
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu
from helpers.paths import ROOT
from helpers.ranks import run_ranks
from llama import Llama, ModelArgs
from llama.checkpoint.errors import CheckpointError
from llama.memory import check
from llama.memory.check import Choice, InsufficientMemoryError, check_memory, free_bytes, suggestions
from llama.parallel.groups import World

GIB = 2**30
SEVEN_B: dict[str, Any] = {"dim": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 32000}
CARD = torch.device("cuda", 0)
CPU = torch.device("cpu")


def seven_b(
    length: int,
    rows: int,
    device: str = "cuda",
    quantize: str | None = None,
    dtype: torch.dtype = torch.float16,
    prefill_chunk: int = 1024,
) -> Choice:
    args = ModelArgs(**SEVEN_B, max_seq_len=length, max_batch_size=rows)
    return Choice(args, 1, dtype, quantize, device, False, 1, prefill_chunk)


def applied(flags: str, choice: Choice) -> Choice:
    """The choice after a suggestion's flags are applied."""
    for name, value in re.findall(r"--(\w+) (\S+)", flags):
        if name == "quantize":
            choice = replace(choice, quantize=value)
        elif name == "dtype":
            choice = replace(choice, dtype=getattr(torch, value))
        else:
            choice = choice.resized(**{name: int(value)})
    ranks = re.search(r"(\d+) ranks", flags)
    return replace(choice, world_size=int(ranks[1])) if ranks else choice


def refusal(choice: Choice, free: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(check, "free_bytes", lambda device: free)
    device = torch.device(choice.device)
    with pytest.raises(InsufficientMemoryError) as caught:
        check_memory(
            choice.args, choice.world_size, choice.dtype, device, False, 1, choice.quantize, choice.prefill_chunk
        )
    return str(caught.value)


# What would fit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "free", "expected"),
    [
        (seven_b(4096, 1), 11.9, ["--quantize int8", "--quantize int4", "2 ranks"]),
        (seven_b(4096, 1), 13.5, ["--quantize int8", "--quantize int4", "--max_seq_len", "2 ranks"]),
        (seven_b(512, 4), 13.2, ["--quantize int8", "--quantize int4", "--max_seq_len", "--max_batch_size", "2 ranks"]),
        (seven_b(4096, 1, "cpu"), 11.9, ["--quantize int8", "--quantize int4"]),
        (
            seven_b(4096, 1, "cpu", None, torch.float32),
            16.5,
            ["--dtype bfloat16", "--quantize int8", "--quantize int4"],
        ),
        (seven_b(4096, 1, "cuda", "int8"), 7.5, ["--quantize int4", "--max_seq_len", "2 ranks"]),
        (seven_b(4096, 1, "cuda", "int4"), 5.5, ["--max_seq_len", "2 ranks"]),
        (seven_b(4096, 1), 5.5, ["--quantize int4 --max_seq_len", "4 ranks"]),
        (seven_b(4096, 8), 4.5, ["--quantize int4 --max_batch_size 1 --max_seq_len", "8 ranks"]),
    ],
)
def test_each_suggestion_fits_and_one_size_more_does_not(
    choice: Choice, free: float, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    available = int(free * GIB)
    message = refusal(choice, available, monkeypatch)
    assert "\n" not in message and message.endswith(" would fit")
    head, _, listed = message.partition(": ")
    assert head.startswith(
        f"the model needs {choice.sizes.total / GIB:.2f} GiB (weights {choice.sizes.weights / GIB:.2f}"
    )
    assert f"{free:.2f} GiB are free on {choice.device}" in head
    suggested = re.split(r", (?=--|\d+ ranks)| or ", listed.removesuffix(" would fit"))
    assert len(suggested) == len(expected)
    assert all(suggestion.startswith(flags) for suggestion, flags in zip(suggested, expected, strict=True)), suggested
    for suggestion in suggested:
        changed = applied(suggestion, choice)
        assert changed.sizes.total <= available, suggestion
        assert suggestion.endswith(f"({changed.sizes.total / GIB:.2f} GiB)")
        if "--max_seq_len" in suggestion:
            assert changed.args.max_seq_len % 64 == 0
            assert changed.resized(max_seq_len=changed.args.max_seq_len + 64).sizes.total > available
        elif "--max_batch_size" in suggestion:
            assert changed.resized(max_batch_size=changed.args.max_batch_size + 1).sizes.total > available


def test_a_12_gb_gpu() -> None:
    """The 7B with 4096 positions fits in 8 and 4 bits, with a tenth of the GPU free, and not in float16."""
    available = int(11.6 * GIB)  # what a card of 12 GB has free
    assert seven_b(4096, 1).sizes.total > available
    assert [flags for flags, _ in suggestions(seven_b(4096, 1), available)][:2] == [
        "--quantize int8",
        "--quantize int4",
    ]
    assert seven_b(4096, 1, quantize="int8").sizes.total < 0.9 * available


def test_a_smaller_prefill_chunk_needs_less(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [seven_b(4096, 8, prefill_chunk=chunk).sizes for chunk in (64, 1024, 2**20)]
    assert needs[0].prefill < needs[1].prefill < needs[2].prefill
    assert needs[2] == seven_b(4096, 8, prefill_chunk=4096).sizes  # a prompt has no more positions
    # `build` compares what the chosen chunk needs with the free memory.
    sizes: dict[str, Any] = {"max_seq_len": 2048, "max_batch_size": 8}
    args = replace(build("mha").model.params, **sizes)
    small, default = (Choice(args, 1, torch.float32, None, "cpu", False, 0, chunk).sizes.total for chunk in (64, 1024))
    monkeypatch.setattr(check, "free_bytes", lambda device: (small + default) // 2)
    with pytest.raises(InsufficientMemoryError):
        build("mha", **sizes)
    assert build("mha", **sizes, prefill_chunk=64).executor.prefill_chunk == 64


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(seven_b(4096, 8, "cpu"), 3 * GIB, monkeypatch)
    assert "no flags make it fit, as --quantize int4 --max_seq_len 64 --max_batch_size 1 still needs 4." in message


def test_what_fits_or_is_unknown_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    args = ModelArgs(**SEVEN_B, max_seq_len=4096, max_batch_size=1)
    for free in (20 * GIB, None):
        monkeypatch.setattr(check, "free_bytes", lambda device, free=free: free)
        check_memory(args, 1, torch.float16, CARD, False, 1, None, 1024)
    assert not issubclass(InsufficientMemoryError, CheckpointError) and issubclass(InsufficientMemoryError, ValueError)


# What is free -------------------------------------------------------------------------------------


def test_free_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch has reserved counts as free. Without an answer of the driver it is unknown."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 12 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * GIB)
    assert free_bytes(CARD) == 7 * GIB

    def fail(device: torch.device) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert free_bytes(CARD) is None and free_bytes(torch.device("mps")) is None


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("0::/", {}, 8 * GIB),  # no limit known
        ("0::/a/b", {"a/memory.max": "max", "a/memory.current": "1"}, 8 * GIB),
        ("0::/a/b", {"a/b/memory.max": str(4 * GIB), "a/b/memory.current": str(3 * GIB)}, GIB),
        # A parent's limit applies to its children, and the page cache counts as free.
        (
            "0::/a/b",
            {
                "a/memory.max": str(4 * GIB),
                "a/memory.current": str(3 * GIB),
                "a/memory.stat": f"anon 7\ninactive_file {GIB}\nactive_file {GIB // 2}\nfile {2 * GIB}",
            },
            5 * GIB // 2,
        ),
        # A container: the path is the host's, the limit is at the root.
        ("0::/host/only", {"memory.max": str(2 * GIB), "memory.current": "0"}, 2 * GIB),
        (
            "5:cpu,cpuacct:/x\n4:memory:/job",
            {
                "memory/job/memory.limit_in_bytes": str(3 * GIB),
                "memory/job/memory.usage_in_bytes": str(2 * GIB),
                "memory/job/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB}\ntotal_active_file 0",
            },
            2 * GIB,
        ),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_free_on_a_cpu(
    groups: str, files: dict[str, str], free: int, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    for path, text in {
        proc / "meminfo": f"MemTotal: 9 kB\nMemAvailable:   {8 * 2**20} kB\n",
        proc / "self" / "cgroup": groups,
        **{cgroups / name: text for name, text in files.items()},
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(check, "PROC", proc)
    monkeypatch.setattr(check, "CGROUPS", cgroups)
    monkeypatch.setattr(check, "current_world", lambda: World(0, ranks, 0, ranks))
    assert free_bytes(CPU) == free // ranks


def test_free_is_unknown_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "PROC", tmp_path / "nowhere")
    assert free_bytes(CPU) is None


# tests/gpu.py on a CPU ----------------------------------------------------------------------------


def run_gpu(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, gpu.__file__, *args], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_a_line() -> None:
    done = run_gpu()
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: this torch sees no GPU: install a CUDA build of torch, make test-gpu BIN=ITS/bin\n"


def test_a_wrong_golden_id_is_a_failure(golden: dict[str, Any], tmp_path: Path) -> None:
    golden["mha"]["single"]["tokens"][0][3] += 1
    (tmp_path / "expected.json").write_text(json.dumps(golden))
    golden["mha"]["single"]["tokens"][0][3] -= 1
    out = tmp_path / "report.json"
    done = run_gpu(
        "--device", "cpu", "--cases", "golden", "--golden", str(tmp_path / "expected.json"), "--out", str(out)
    )
    assert done.returncode == 1 and f"{out}" in done.stdout, done.stderr
    report = json.loads(out.read_text())
    assert {"torch", "cuda", "nccl", "gpus", "device", "python", "cases", "failures"} == set(report)
    (case,) = report["cases"]
    assert {"name", "ranks", "seconds", "figures", "failures"} == set(case)
    assert case["figures"]["worst log-probability"] < 1e-3
    assert (
        report["failures"] == case["failures"] == ["mha/single: other ids than expected: row 0, place 3: 235, not 236"]
    )


@pytest.mark.parametrize("case", ["golden", "bfloat16", "memory", "compile"])
def test_its_cases_pass_on_a_cpu(
    case: str, golden: dict[str, Any], checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, failures = gpu.CASES[case](gpu.Asked("cpu", {name: checkpoint(name) for name in gpu.MODELS}, golden, None))
    assert not failures and figures


# Out of memory in spite of the check --------------------------------------------------------------


def limited(folder: Path) -> list[str]:
    """Errors under a limit of the address space, set before builds and a batch, and whether a smaller batch works."""
    import resource

    errors = []

    def limit(more: int) -> None:
        used = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (int(used.split()[1]) * 1024 + more, resource.RLIM_INFINITY))

    Llama.build(folder, max_seq_len=64).close()  # allocates what is needed only once
    limit(200 * 2**20)
    for free in (
        free_bytes,
        lambda device: 2**40,
    ):  # refused before loading; while loading, if the estimate is wrong
        check.free_bytes = free
        try:
            Llama.build(folder, max_seq_len=8192, max_batch_size=32)
        except InsufficientMemoryError as error:
            errors.append(str(error))
    check.free_bytes = free_bytes
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    llama = Llama.build(folder, max_seq_len=4096, max_batch_size=64, plain=True)
    prompts = [[3 + i] * 4000 for i in range(64)]
    before, _ = llama.generate(prompts[:1], 4, temperature=0)
    llama.executor.prefill_chunk, chunk = 2**20, llama.executor.prefill_chunk  # all prompts in one pass
    limit(8 * 2**20)
    try:
        llama.generate(prompts, 4, temperature=0)
    except InsufficientMemoryError as error:
        errors.append(str(error))
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    llama.executor.prefill_chunk = chunk
    after, _ = llama.generate(prompts[:1], 4, temperature=0)
    llama.close()
    return [*errors, str(before == after)]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_a_limit_of_the_address_space(checkpoint: Callable[..., Path]) -> None:
    ((refused, failed, step, same),) = run_ranks(1, limited, checkpoint("mha"))
    number = r"\d+\.\d\d"
    needs = rf"the model needs {number} GiB \(weights {number}, cache {number}, prefill {number}\), "
    length, rows = rf"--max_seq_len \d+ \({number} GiB\)", rf"--max_batch_size \d+ \({number} GiB\)"
    more = rf"out of memory on cpu, {number} GiB more were requested, {number} GiB are free, "
    anew = "send fewer or shorter prompts at once, or build it with less: "
    assert re.fullmatch(rf"{needs}0\.\d\d GiB are free on cpu: {length} or .* would fit", refused)
    assert re.fullmatch(rf"{more}the model is not loaded: {needs}.* would fit", failed)
    assert re.fullmatch(rf"{more}{anew}{needs}.*{length} or {rows} would fit", step), step
    assert same == "True"


@pytest.mark.parametrize("step", ["hidden", "logits"])
def test_a_gpu_that_others_have_filled(step: str, build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is that of torch's CUDA allocator. The next request is answered as before."""
    llama = build("gqa", max_seq_len=256, max_batch_size=4)
    prompts = [[5, 6, 7], [8, 9]]
    before = llama.generate(prompts, 8, temperature=0)[0]
    calls, made = iter(range(100)), list[Any]()
    plain = type(llama.model.layers[0]).forward if step == "hidden" else type(llama.executor).logits
    owner = type(llama.model.layers[0]) if step == "hidden" else type(llama.executor)

    def short(*args: Any, **kwargs: Any) -> Any:
        if step == "hidden":
            made.append(weakref.ref(args[1]))  # the input of a layer
        if next(calls) == 9:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 11.76 GiB of which "
                "1.25 GiB is free."
            )
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, "forward" if step == "hidden" else "logits", short)
    monkeypatch.setattr(check, "free_bytes", lambda device: GIB * 5 // 4)
    with pytest.raises(
        InsufficientMemoryError, match=r"out of memory on cpu, 2\.50 GiB more were requested, 1\.25 GiB"
    ) as caught:
        llama.generate(prompts, 30, temperature=0)
    assert len(made) == 10 * (step == "hidden") and not any(tensor() for tensor in made), f"{caught} keeps it alive"
    monkeypatch.undo()
    assert llama.generate(prompts, 8, temperature=0)[0] == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_running_process_needs_no_more_memory(
    checkpoint: Callable[..., Path], measured: Callable[[str, object], None]
) -> None:
    """80,000 ids here; soak.py, started by hand, generates a million."""
    program = str(ROOT / "tests" / "soak.py")
    done = subprocess.run(
        [sys.executable, program, str(checkpoint("mha")), "--tokens", "80000"], capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    measured("memory in use after 80,000 ids, compared to that after 16,000", f"{found['in_use_growth']:+.2%}")
    assert done.returncode == 0 and found["tokens"] >= 80_000, done.stderr


def test_other_errors_are_not_changed(build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    llama = build("gqa", max_seq_len=64)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(type(llama.model.layers[0]), "forward", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        llama.generate([[5, 6]], 4)
