"""Which kernel multiplies by a dense weight: all give the same, the fastest is kept, and any file can be read."""

import json
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tolerance import BFLOAT16, gamma

from llama import linear


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


def test_the_fastest_is_kept_in_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002)
        return F.linear(x, weight)

    def kernel(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight)

    monkeypatch.setattr(linear, "candidates", lambda dtype: {"torch": slow, "other": kernel})
    weight = torch.ones(8, 8)
    assert linear.kernels(weight) == (kernel,) * 3
    (file,) = folder.iterdir()
    assert json.loads(file.read_text()) == {"torch.float32 8x8": ["other"] * 3}
    # Read, not measured again; other shapes are added.
    file.write_text('{"torch.float32 8x8": ["torch", "other", "torch"]}')
    linear._choices.cache_clear()
    assert linear.kernels(weight) == (slow, kernel, slow)
    assert linear.kernels(torch.ones(9, 8)) == (kernel,) * 3
    assert len(json.loads(file.read_text())) == 2
    found = [linear.kernel_for((slow, kernel, slow), torch.ones(n, 8)) for n in (1, 2, 16, 17, 500)]
    assert found == [slow, kernel, kernel, slow, slow]


@pytest.mark.parametrize("names", ["[]", "7", '["torch"]', '["nonsense", "torch", "torch"]', "[[], 1, null]", "{}"])
@pytest.mark.parametrize("text", ["", "[]", "7", '{"torch.float32 8x8": %s}'])
def test_a_file_that_holds_something_else_is_replaced(text: str, names: str, folder: Path) -> None:
    linear.kernels(torch.ones(8, 8))
    (file,) = folder.iterdir()
    file.write_text(text.replace("%s", names))
    linear._choices.cache_clear()
    linear.kernels(torch.ones(8, 8))
    (found,) = json.loads(file.read_text()).values()
    assert len(found) == 3 and set(found) <= set(linear.candidates(torch.float32))


def test_a_wide_weight_is_widened_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "BLOCK", 100)
    x, weight = torch.randn(2, 3, 48).bfloat16(), torch.randn(11, 48).bfloat16()
    assert torch.equal(linear.widened(x, weight), F.linear(x.float(), weight.float()).bfloat16())


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    x, weight = torch.ones(2, 8), torch.ones(3, 8)
    torch.testing.assert_close(linear.linear(x, weight), torch.full((2, 3), 8.0))


def test_what_has_no_choice_is_torchs() -> None:
    assert linear.kernels(torch.ones(2, 2, dtype=torch.float64)) == (F.linear,) * 3
    assert linear.kernels(torch.ones(2, 2, device="meta")) == (F.linear,) * 3
