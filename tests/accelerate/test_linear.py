"""Kernels for dense weights: all give the same result, the fastest is kept in a file, and a damaged file is ignored."""

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from helpers.tolerance import BFLOAT16, gamma
from llama.accelerate import linear, native


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    linear._choices.cache_clear()
    return tmp_path / "llama-runner"


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kernel_gives_the_product(dtype: torch.dtype, rows: int) -> None:
    stream = torch.Generator().manual_seed(rows)
    weight = torch.randn(50, 96, generator=stream).to(dtype)
    x = torch.randn(2, rows, 96, generator=stream).to(dtype)
    exact = x.double() @ weight.double().T
    bound = gamma(96) * (x.double().abs() @ weight.double().abs().T)
    if dtype != torch.float32:
        bound += {torch.bfloat16: BFLOAT16, torch.float16: 2.0**-11}[dtype] * (exact.abs() + bound)
    for kernel in linear.candidates(dtype).values():
        found = kernel(x, weight)
        assert found.shape == (2, rows, 50) and found.dtype == dtype
        assert ((found.double() - exact).abs() <= bound).all()


def slow(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    time.sleep(0.002)
    return F.linear(x, weight)


def fast(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)


def test_the_fastest_is_kept_in_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "candidates", lambda dtype: {"torch": slow, "other": fast})
    weight = torch.ones(8, 8)
    assert linear.kernel(weight, 16) is fast
    (file,) = folder.iterdir()
    assert json.loads(file.read_text()) == {"torch.float32 8x8 16": "other"}
    # The file is read, not measured again; other shapes are added.
    file.write_text('{"torch.float32 8x8 16": "torch"}')
    linear._choices.cache_clear()
    assert linear.kernel(weight, 16) is slow and linear.kernel(torch.ones(9, 8), 1) is fast
    assert len(json.loads(file.read_text())) == 2


def test_other_programs_do_not_change_the_choice() -> None:
    """They delay two of three runs of the faster kernel."""
    runs = itertools.count()

    def steady(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        time.sleep(0.004)
        return F.linear(x, weight)

    def delayed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        time.sleep(0.012 if next(runs) % 3 else 0)
        return F.linear(x, weight)

    assert linear.measure(torch.ones(8, 8), 16, {"torch": steady, "other": delayed}) == "other"


def test_a_kernel_of_the_caller_is_measured_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice with it is another one, because a model that is not compiled has no such kernel."""

    monkeypatch.setattr(linear, "candidates", lambda dtype: {"torch": slow, "other": slow})
    weight = torch.ones(8, 8)
    assert linear.kernel(weight, 128, {"own": fast}) is fast
    assert linear.kernel(weight, 128) is slow
    (file,) = folder.iterdir()
    assert set(json.loads(file.read_text())) == {"torch.float32 8x8 128 own", "torch.float32 8x8 128"}


def test_a_kernel_is_chosen_per_range_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    requested = []

    def kernel(weight: torch.Tensor, rows: int) -> linear.Kernel:
        requested.append(rows)
        return F.linear

    monkeypatch.setattr(linear, "kernel", kernel)
    for n in (1, 2, 16, 17, 500):
        linear.linear(torch.ones(n, 8), torch.ones(8, 8))
    assert requested == [1, 16, 16, 128, 128]


@pytest.mark.parametrize("text", ["", "[]", "7", '{"torch.float32 8x8 1": []}', '{"torch.float32 8x8 1": "nonsense"}'])
def test_a_file_that_holds_something_else_is_replaced(text: str, folder: Path) -> None:
    linear.kernel(torch.ones(8, 8), 1)
    (file,) = folder.iterdir()
    file.write_text(text)
    linear._choices.cache_clear()
    linear.kernel(torch.ones(8, 8), 1)
    (found,) = json.loads(file.read_text()).values()
    assert found in linear.candidates(torch.float32)


def test_threads_measure_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    active, peak = 0, 0

    def measure(weight: torch.Tensor, rows: int, kernels: object) -> str:
        nonlocal active, peak
        active += 1
        peak = max(peak, active)
        time.sleep(0.005)
        active -= 1
        return "torch"

    monkeypatch.setattr(linear, "measure", measure)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda n: linear.kernel(torch.ones(n, 8), 1) is F.linear, range(1, 20)))
    assert peak == 1


def test_a_wide_weight_is_converted_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "BLOCK_NUMEL", 100)
    x, weight = torch.randn(2, 3, 48).bfloat16(), torch.randn(11, 48).bfloat16()
    assert torch.equal(linear.in_float32(x, weight), F.linear(x.float(), weight.float()).bfloat16())


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    x, weight = torch.ones(2, 8), torch.ones(3, 8)
    torch.testing.assert_close(linear.linear(x, weight), torch.full((2, 3), 8.0))


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    torch.testing.assert_close(linear.linear(torch.ones(2, 8), torch.ones(3, 8)), torch.full((2, 3), 8.0))
    with pytest.raises(native.NoCompilerError, match="no home folder: set XDG_CACHE_HOME"):
        native.compile_library()


def test_other_dtypes_and_devices_use_torchs_kernel() -> None:
    assert linear.kernel(torch.ones(2, 2, dtype=torch.float64), 1) is F.linear
    assert linear.kernel(torch.ones(2, 2, device="meta"), 1) is F.linear
