"""Fixtures for conformance kits."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from helpers.commands import Ended, call, run_command
from helpers.kits import example
from llama.cli.conformance import export
from llama.convert import convert


@pytest.fixture(scope="session")
def kit(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """kit(name, dtype="float32"): the kit of a seeded model, written by `conformance export`."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, dtype: str = "float32") -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = tmp_path_factory.mktemp("kits") / f"{name}-{dtype}"
            call(export, ckpt_dir=checkpoint(name), out=made[name, dtype], dtype=dtype)
        return made[name, dtype]

    return make


@pytest.fixture(scope="session")
def hugging_face(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """hugging_face(name): the folder of a seeded model in Hugging Face's layout."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("hf") / name
            convert(checkpoint(name), made[name], to="hf")
        return made[name]

    return make


@pytest.fixture
def transformers_side(hugging_face: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """transformers_side(kit, name, break_model=None, dtype="float32"): a folder with vectors of transformers' model.

    break_model: is called with the model before the vectors are computed.
    """

    def make(
        kit: Path, name: str, break_model: Callable[[Any], None] | None = None, dtype: str = "float32", **config: Any
    ) -> Path:
        folder = hugging_face(name)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", **config).eval()
        if break_model is not None:
            with torch.no_grad():
                break_model(model)
        example.write(model, AutoTokenizer.from_pretrained(folder), kit, tmp_path / "other")
        return tmp_path / "other"

    return make


@pytest.fixture
def conformance(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """conformance(*args): `python -m llama conformance` in this process."""

    def run(*args: Any) -> Ended:
        capsys.readouterr()
        return run_command(["conformance", *map(str, args)], monkeypatch, capsys, io.StringIO())

    return run
