"""Folders that cannot be loaded raise an error of one line that names the problem and suggests a fix."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from golden.make_checkpoint import tensor
from helpers.faults import Bomb, edit_params, edit_shard
from helpers.paths import ROOT
from helpers.ranks import run_ranks
from llama import Llama
from llama.checkpoint.errors import CheckpointError
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.params_json import read_params
from llama.checkpoint.verify import check_folder
from llama.convert import convert
from llama.tokenizer import TokenizerError


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a two-shard checkpoint, to be damaged."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in checkpoint("mha", 2).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def message(folder: Path, **arguments: Any) -> str:
    """The message of build's error, which is one line."""
    with pytest.raises((CheckpointError, TokenizerError)) as caught:
        Llama.build(folder, **arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


# params.json --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_alpha": 2}, "unknown key 'rope_alpha'; this runner knows dim, n_layers"),
        ({"dim": "64x"}, "dim is '64x', expected a positive integer"),
        ({"dim": "64.5"}, "dim is 64.5, expected a positive integer"),
        ({"dim": 64.5}, "dim is 64.5, expected a positive integer"),
        ({"dim": True}, "dim is True, expected a positive integer"),
        ({"n_layers": 0}, "n_layers is 0, expected a positive integer"),
        ({"norm_eps": float("nan")}, "norm_eps is nan, expected a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, expected a positive number"),
        ({"norm_eps": 1}, "norm_eps is 1, expected a positive number from 0 to 1"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5, expected a positive number from 1 to 1e+12"),
        ({"rope_linear_factor": 1e-9}, "rope_linear_factor is 1e-09, expected a positive number from 1 to 1e+12"),
        ({"norm_eps": -1e-5}, "norm_eps is -1e-05, expected a positive number"),
        ({"use_scaled_rope": 1}, "use_scaled_rope is 1, expected true or false"),
        ({"vocab_size": -2}, "vocab_size is -2, expected"),
        ({"n_heads": 7}, "dim 64, n_heads 7, n_kv_heads 7 and head_dim 9 are inconsistent"),
        ({"n_kv_heads": 3}, "are inconsistent"),
        ({"n_heads": "drop"}, "n_heads is missing"),
        ({"vocab_size": 500}, "wrong shape"),
        ({"n_layers": 4}, "missing: layers.3.attention.wk.weight, layers.3.attention.wo.weight"),
        ({"n_layers": 2}, "unexpected: layers.2.attention.wk.weight"),
        ({"dim": 128}, "wrong shape"),
    ],
)
def test_params_that_do_not_fit(changes: dict[str, Any], expected: str, folder: Path) -> None:
    edit_params(folder, **changes)
    assert expected in message(folder)


def test_params_that_are_no_json_object(folder: Path) -> None:
    (folder / "params.json").write_text("<html>")
    assert "params.json is an HTML or XML page: fetch it again" in message(folder)
    (folder / "params.json").write_text("{]")
    assert "params.json cannot be read as JSON" in message(folder)
    (folder / "params.json").write_text("[" * 100_000)
    assert "params.json cannot be read as JSON" in message(folder)
    (folder / "params.json").write_text("[1]")
    assert "holds a list, expected an object" in message(folder)
    (folder / "params.json").unlink()
    assert "params.json is missing" in message(folder)


def test_params_of_every_generation_are_read(tmp_path: Path) -> None:
    """The params.json of Llama 1, 2, Code Llama, 3, 3.1 and 3.2 as Meta publishes them."""
    published = {
        "llama-1-7b": '{"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, '
        '"vocab_size": -1}',
        "llama-2-70b": '{"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, '
        '"n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1}',
        "codellama-7b": '{"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.0, '
        '"norm_eps": 1e-5, "rope_theta": 1000000}',
        "llama-3-8b": '{"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, '
        '"multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0}',
        "llama-3.1-8b": '{"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, '
        '"ffn_dim_multiplier": 1.3, "multiple_of": 1024, "norm_eps": 1e-05, "rope_theta": 500000.0, '
        '"use_scaled_rope": true}',
        "llama-3.2-1b": '{"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, '
        '"ffn_dim_multiplier": 1.5, "multiple_of": 256, "norm_eps": 1e-05, "rope_theta": 500000.0, '
        '"use_scaled_rope": true}',
        "llama-3.2-3b": '{"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "vocab_size": 128256, '
        '"ffn_dim_multiplier": 1.0, "multiple_of": 256, "norm_eps": 1e-05, "rope_theta": 500000.0, '
        '"use_scaled_rope": true}',
    }
    args = {}
    for name, text in published.items():
        (tmp_path / "params.json").write_text(text)
        args[name] = read_params(tmp_path)
    assert [a.hidden_dim for a in args.values()] == [11008, 28672, 11008, 14336, 14336, 8192, 8192]
    assert [a.kv_heads for a in args.values()] == [32, 8, 32, 8, 8, 8, 8]
    assert [a.rope_theta for a in args.values()] == [10000.0] * 2 + [1000000] + [500000.0] * 4
    assert [a.rope_factor for a in args.values()] == [1, 1, 1, 1, 8, 32, 32]


def test_a_key_overrides_the_rope_factor(folder: Path) -> None:
    edit_params(folder, use_scaled_rope=True, rope_scaling_factor=16.0)
    assert read_params(folder).rope_factor == 16


# World sizes --------------------------------------------------------------------------------------


def test_a_world_size_that_does_not_divide_names_those_that_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama.checkpoint.layout import check_world_size

    with pytest.raises(CheckpointError, match=r"3 ranks cannot share this model .* start 1, 2, 4, 8"):
        check_world_size(Checkpoint(folder).params, 3)


# Files --------------------------------------------------------------------------------------------


def test_a_missing_folder(tmp_path: Path) -> None:
    assert "does not exist: give the folder with" in message(tmp_path / "nowhere")
    assert "holds no consolidated.NN.pth" in message(tmp_path)


def test_other_formats_are_answered_with_the_convert_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    text = message(tmp_path)
    assert "Hugging Face folder" in text and f"python -m llama convert {tmp_path} DST" in text
    (tmp_path / "original").mkdir()
    assert f"its folder {tmp_path / 'original'} has that layout" in message(tmp_path)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF\x03\0\0\0")
    text = message(gguf)
    assert "GGUF file" in text and f"python -m llama convert {gguf} DST" in text
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    assert f"python -m llama convert {gguf} DST" in message(tmp_path)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "consolidated.00.pth").unlink()
    assert "lacks consolidated.00.pth" in message(folder)


def test_half_of_the_shards_do_not_pass_for_a_complete_model(folder: Path) -> None:
    (folder / "consolidated.01.pth").unlink()
    edit_params(folder, vocab_size=512)
    assert "does not match params.json as the only shard (files missing" in message(folder)


def test_every_tensor_is_accounted_for(folder: Path) -> None:
    path = folder / "consolidated.01.pth"
    edit_shard(path, lambda t: t.pop("layers.1.feed_forward.w2.weight"))
    assert "consolidated.01.pth" in message(folder) and "missing: layers.1.feed_forward.w2.weight" in message(folder)
    edit_shard(path, lambda t: t.update({"layers.1.feed_forward.w2.weight": torch.zeros(3, 4), "extra": torch.ones(1)}))
    text = message(folder)
    assert "unexpected: extra" in text and text.endswith(f"; and 1 more: python -m llama verify {folder}")
    edit_shard(path, lambda t: t.pop("extra"))
    text = message(folder)
    assert "wrong shape: layers.1.feed_forward.w2.weight (3, 4), expected (64, 96)" in text
    width = torch.zeros(64, 96)
    edit_shard(
        path, lambda t: t.update({"layers.1.feed_forward.w2.weight": width, "norm.weight": t["norm.weight"].char()})
    )
    assert "wrong type: norm.weight torch.int8" in message(folder)


@pytest.mark.parametrize("name", ["mha", "llama31"])
def test_a_vocabulary_of_minus_1_is_the_embeddings_rows(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The number of rows is found for both axes along which files split the embedding."""
    shutil.copytree(checkpoint(name, 2), tmp_path / "copy")
    edit_params(tmp_path / "copy", vocab_size=-1)
    assert Checkpoint(tmp_path / "copy").params.vocab_size == 512


def test_repeated_tensors_come_from_the_first_file(folder: Path) -> None:
    edit_shard(folder / "consolidated.01.pth", lambda t: t.update({"norm.weight": t["norm.weight"] * 1.001}))
    llama = Llama.build(folder, max_seq_len=8)
    first = torch.load(folder / "consolidated.00.pth", weights_only=True)["norm.weight"]
    assert torch.equal(llama.model.norm.weight, first)
    llama.close()


def test_llama_1_frequencies_are_skipped(folder: Path) -> None:
    rope = {"rope.freqs": torch.ones(4)} | {
        f"layers.{i}.attention.inner_attention.rope.freqs": torch.ones(4) for i in range(3)
    }
    for path in folder.glob("*.pth"):
        edit_shard(path, lambda t: t.update(rope))
    Llama.build(folder, max_seq_len=8).close()


def test_transposed_weights_slices_and_parameters_are_weights(folder: Path, tmp_path: Path) -> None:
    """Other programs save views that are not contiguous, or parameters of a module."""
    expected = {key: tensor.clone() for key, tensor in Checkpoint(folder)[0].items()}
    wq, wo, w1 = (f"layers.1.{name}.weight" for name in ("attention.wq", "attention.wo", "feed_forward.w1"))
    wide = torch.randn(expected[w1].shape[0], 300)
    wide[:, 7:71] = expected[w1]
    changed = {wq: expected[wq].t().contiguous().t(), wo: nn.Parameter(expected[wo].clone()), w1: wide[:, 7:71]}
    edit_shard(folder / "consolidated.00.pth", lambda tensors: tensors.update(changed))
    loaded = Checkpoint(folder)[0]
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert not loaded[wq].is_contiguous() and not loaded[w1].is_contiguous() and not loaded[wo].requires_grad
    assert not check_folder(folder).problems
    Llama.build(folder, max_seq_len=16).close()
    convert(str(folder), str(tmp_path / "converted"))


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit that Linux has")
def test_a_limit_on_memory_is_reported(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2**26)}, tmp_path / "consolidated.00.pth")
    script = """if True:
        import re, resource, sys
        from pathlib import Path
        from llama.checkpoint.shards import open_shard
        used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
        open_shard(Path(sys.argv[1]))
    """
    command = [sys.executable, "-c", script, str(tmp_path / "consolidated.00.pth")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    *_, last = ended.stderr.splitlines()
    assert "consolidated.00.pth cannot be read (unable to mmap" in last, ended.stderr
    assert last.endswith("Cannot allocate memory (12)): raise the limit on memory (ulimit -v)")


def test_a_file_cannot_run_code(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = folder / "consolidated.00.pth"
    tensors = torch.load(path, weights_only=True)
    torch.save(tensors | {"bomb": Bomb(marker)}, path)
    assert "consolidated.00.pth holds more than tensors, which could run code: it was not loaded" in message(folder)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # without weights_only the pickle does run code
    assert marker.exists()
    marker.unlink()
    path.write_bytes(pickle.dumps(Bomb(marker)))
    assert "not what torch.save writes: if you trust it, load it" in message(folder)
    assert not marker.exists()


def test_a_tokenizer_of_another_size(folder: Path, checkpoint: Callable[..., Path]) -> None:
    for path in folder.glob("*.pth"):
        edit_shard(
            path,
            lambda t: t.update(
                {
                    "tok_embeddings.weight": t["tok_embeddings.weight"][:500].clone(),
                    "output.weight": t["output.weight"][:250].clone(),
                }
            ),
        )
    assert "the tokenizer has 512 ids, the model 500: give the tokenizer that came with" in message(folder)


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()
    assert "no tokenizer.model or tokenizer.json in" in message(folder)
    path = folder.parent / "tokenizer.model"
    assert "cannot be read: No such file" in message(folder, tokenizer_path=path)
    path.write_bytes(b"\x00 not a model")
    assert "expected a SentencePiece model, tiktoken ranks or" in message(folder, tokenizer_path=path)
    path.write_bytes(b"\n not a model")
    assert "not a SentencePiece model" in message(folder)  # found in the parent folder


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        ({"max_seq_len": 0}, ValueError, "max_seq_len is 0, expected an integer from 1"),
        ({"max_batch_size": -1}, ValueError, "max_batch_size is -1, expected"),
        ({"max_batch_size": 1.5}, TypeError, "max_batch_size is 1.5, expected an integer"),
        ({"max_batch_size": True}, TypeError, "max_batch_size is True, expected an integer"),
        ({"seed": "x"}, TypeError, "seed is 'x', expected an integer"),
        ({"seed": -1}, ValueError, "seed is -1, expected an integer from 0"),
        ({"ckpt_dir": True}, TypeError, "ckpt_dir is True, expected a path"),
        ({"device": "xpu"}, ValueError, "device 'xpu': expected auto, cpu, cuda, cuda:N or mps"),
        ({"chat_format": "alpaca"}, ValueError, "chat format 'alpaca': expected llama2, llama3, chatml"),
    ],
)
def test_arguments_that_do_not_fit(
    arguments: dict[str, Any], error: type[Exception], expected: str, folder: Path
) -> None:
    with pytest.raises(error, match=expected):
        Llama.build(**{"ckpt_dir": folder, **arguments})


# Tied embeddings ----------------------------------------------------------------------------------


def tied_answers(*folders: Path) -> list[Any]:
    """The logits of each folder, and whether the output matrix is the embedding's memory."""
    found = []
    for folder in folders:
        llama = Llama.build(folder, max_seq_len=32, max_batch_size=1, device="cpu")
        shared = llama.model.output.weight is llama.model.tok_embeddings.weight
        found.append((llama.model.forward(torch.tensor([[1, 70, 400]]), 0).numpy(), shared))
        llama.close()
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["mha", "llama31"])
def test_without_output_weight_the_embedding_is_used(
    name: str, world_size: int, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Files without output.weight give the logits of files that hold the embedding twice, for both axes of it."""
    embedding = tensor(name, "tok_embeddings.weight", (512, 64 if name == "mha" else 128))
    folders = []
    for shards in (1, 4):
        for kind in ("twice", "once"):
            folders.append(tmp_path / f"{shards}-{kind}")
            shutil.copytree(checkpoint(name, shards), folders[-1])
            for i, path in enumerate(sorted(folders[-1].glob("*.pth"))):
                edit_shard(path, lambda t: t.pop("output.weight"))
                if kind == "twice":
                    rows = embedding.chunk(shards)[i].clone()
                    edit_shard(path, lambda t, rows=rows: t.update({"output.weight": rows}))  # type: ignore[misc]  # bound now
    for found in run_ranks(world_size, tied_answers, *folders):
        (twice, apart), (once, shared), (twice_4, apart_4), (once_4, shared_4) = found
        for logits in (once, twice_4, once_4):
            np.testing.assert_allclose(logits, twice, rtol=0, atol=1e-5 * np.abs(twice).max())
        # The memory is shared only if the rank needs the same rows of the output and of the embedding.
        assert (apart, apart_4, shared, shared_4) == (False, False, True, world_size == 1 or name == "llama31")


def test_a_shard_that_alone_lacks_the_output(folder: Path) -> None:
    edit_shard(folder / "consolidated.00.pth", lambda t: t.pop("output.weight"))
    assert "consolidated.00.pth" in message(folder) and "missing: output.weight" in message(folder)


def test_a_sliding_window_limits_the_context(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoint("mha"), tmp_path / "in")
    path = tmp_path / "in" / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 64}))
    with pytest.raises(CheckpointError, match="max_seq_len 65 goes beyond this model's sliding window of 64 positions"):
        Llama.build(tmp_path / "in", max_seq_len=65, device="cpu")
    Llama.build(tmp_path / "in", max_seq_len=64, device="cpu").close()
