import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from golden.make_checkpoint import TOKENIZER
from helpers.formats import write_gguf, write_llama2c
from helpers.hugging_face import MODELS
from helpers.paths import GOLDEN
from llama.convert import convert


@pytest.fixture
def source(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("code")


@pytest.fixture(scope="module")
def in_format(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """in_format(name, format): a seeded model in one of FORMATS, written once."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, kind: str) -> Path:
        if (name, kind) not in made:
            path = tmp_path_factory.mktemp(f"{name}-{kind}") / "model"
            one_shard = checkpoint(name)
            if kind.startswith("meta"):
                path = one_shard if kind == "meta" else checkpoint(name, 4 if name != "gqa" else 2)
            elif kind.startswith("hf"):
                convert(one_shard, path, to="hf", shards=3 if kind == "hf-3-files" else 1)
                if kind == "hf-bin":
                    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
                    (path / "model.safetensors").unlink()
            elif kind == "gguf":
                write_gguf(one_shard, path)
            else:
                write_llama2c(one_shard, path)
                shutil.copy(GOLDEN / "llama2c" / "tok512.bin", path.with_name("tok512.bin"))
            made[name, kind] = path
        return made[name, kind]

    return make


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """hugging_face(name): a folder with a random float32 model that transformers wrote, and tok512's tokenizer."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "hf"
            torch.manual_seed(len(name))
            model = AutoModelForCausalLM.from_config(MODELS[name]).float()
            for key, weight in model.named_parameters():  # norms of ones would hide mistakes
                torch.nn.init.normal_(weight, 1.0 if "norm" in key else 0.0, 0.1 if "norm" in key else 0.05)
            model.save_pretrained(made[name])
            shutil.copy(TOKENIZER, made[name] / "tokenizer.model")
        return made[name]

    return make
