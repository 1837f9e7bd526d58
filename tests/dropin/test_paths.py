"""Paths as users type them: `~`, and names of repositories on the Hugging Face hub."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import fire
import pytest

from helpers.commands import call
from helpers.paths import ROOT
from llama import Llama, Tokenizer
from llama.checkpoint.errors import CheckpointError
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.params_json import read_params
from llama.cli.command import one_line_errors
from llama.cli.main import main
from llama.cli.plan import plan
from llama.cli.verify import verify
from llama.convert import convert
from llama.parallel.device import cache_folder


@pytest.fixture
def home(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(checkpoint("mha"), tmp_path / "x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_folder().parent))  # native.c is compiled only once
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_tilde_in_python(home: Path) -> None:
    llama = Llama.build("~/x", tokenizer_path="~/x/tokenizer.model", max_seq_len=16)
    llama.close()
    assert Tokenizer("~/x/tokenizer.model").n_words == 512
    assert Checkpoint("~/x").params.dim == read_params("~/x").dim == 64
    convert("~/x", "~/y")
    assert (home / "y" / "params.json").exists()
    with pytest.raises(CheckpointError, match="~nobody-of-this-name/x does not exist"):
        Llama.build("~nobody-of-this-name/x")


@pytest.mark.parametrize(
    "arguments",
    [
        ["complete", "--ckpt_dir=~/x", "--tokenizer_path=~/x/tokenizer.model", "a", "--max_gen_len=1"],
        ["complete", "--ckpt_dir=~/x", "--file=~/p.jsonl", "--out=~/o.jsonl", "--max_gen_len=1"],
        ["inspect", "--ckpt_dir=~/x", "a b", "--html=~/page.html"],
        ["perplexity", "--ckpt_dir=~/x", "~/p.jsonl", "--max_seq_len=64"],
        ["convert", "--src=~/x", "--dst=~/z"],
        ["verify", "--ckpt_dir=~/x"],
        ["plan", "--path=~/x"],
        ["plan", "--path=~/x/params.json"],
        ["conformance", "export", "--ckpt_dir=~/x", "--out=~/kit", "--max_seq_len=64"],
    ],
    ids=" ".join,
)
def test_a_tilde_on_the_command_line(
    arguments: list[str], home: Path, built: list[Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "p.jsonl").write_text('{"prompt": "Hello"}\n')
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", ["llama", *arguments])
    main()
    assert not (home / "~").exists()
    for argument in arguments:
        name, _, path = argument.partition("=~/")
        if name in ("--out", "--html", "--dst"):
            assert (home / path).exists()


def test_examples_accept_a_tilde(home: Path, monkeypatch: pytest.MonkeyPatch, built: list[Llama]) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import example_text_completion

    monkeypatch.setattr(sys, "argv", ["example", "--ckpt_dir=~/x", "--max_gen_len=1"])
    with one_line_errors():
        fire.Fire(example_text_completion.main)


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B-Instruct", "mistralai/Mistral-7B-v0.3"])
def test_a_hub_name_is_answered_with_its_download_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = f"hf download {name} --local-dir checkpoints/{name.split('/')[1]}"
    commands = [lambda: call(verify, name), lambda: call(plan, name)]
    for ask in [lambda: Llama.build(name), *commands, lambda: convert(name, "out")]:
        with pytest.raises(ValueError) as caught:
            ask()
        assert f"{name} does not exist" in str(caught.value) and str(caught.value).count(command) == 1
    (tmp_path / name).parent.mkdir()
    with pytest.raises(
        CheckpointError
    ) as caught_path:  # the folder of the organization exists, so this is probably a mistyped path
        Llama.build(name)
    assert "hf download" not in str(caught_path.value)
