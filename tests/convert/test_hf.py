"""Hugging Face folders read and written, against transformers itself."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from golden.make_checkpoint import MODELS as SEEDED
from helpers.hugging_face import MODELS
from llama import Llama
from llama.checkpoint.folder import Checkpoint
from llama.convert import ConvertError, convert

IDS = torch.randint(512, (2, 48), generator=torch.Generator().manual_seed(1))


def their_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(IDS).logits


def our_logits(folder: Path) -> torch.Tensor:
    llama = Llama.build(folder, max_seq_len=64, max_batch_size=2, dtype="float32", device="cpu")
    try:
        return llama.model.forward(IDS, 0)
    finally:
        llama.close()


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.abs().max() > 0.3  # logits near zero would agree with anything
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def meta_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "consolidated.00.pth", weights_only=True)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_the_round_trip(hugging_face: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """Hugging Face -> Meta -> Hugging Face -> Meta: the same logits everywhere, and the same weights bit for bit."""
    folder = hugging_face(name)
    expected = their_logits(folder)
    convert(folder, tmp_path / "meta")
    same(our_logits(tmp_path / "meta"), expected)
    convert(tmp_path / "meta", tmp_path / "hf", to="hf", shards=3)
    same(their_logits(tmp_path / "hf"), expected)
    convert(tmp_path / "hf", tmp_path / "again", shards=2)
    same(our_logits(tmp_path / "again"), expected)

    back = weights(tmp_path / "hf")
    if name != "phi-3":  # written as a Mistral, with unfused matrices
        theirs = weights(folder)
        assert back.keys() == theirs.keys()
        assert all(torch.equal(back[key], theirs[key]) for key in theirs)
    convert(tmp_path / "again", tmp_path / "one-shard", shards=1)
    first, last = meta_weights(tmp_path / "meta"), meta_weights(tmp_path / "one-shard")
    assert first.keys() == last.keys() and all(torch.equal(first[key], last[key]) for key in first)
    assert ("output.weight" in first) == (name != "llama-3.2")


@pytest.mark.parametrize("name", SEEDED)
@pytest.mark.parametrize("shards", [1, 2])
def test_seeded_checkpoints_round_trip(
    checkpoint: Callable[..., Path], golden: dict, tmp_path: Path, name: str, shards: int
) -> None:
    """Meta -> Hugging Face: transformers computes the logits that Meta's code computed. And back: bit for bit."""
    convert(checkpoint(name, shards), tmp_path / "hf", to="hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    for asked in golden[name]["logits"]:
        with torch.inference_mode():
            last = model(torch.tensor([asked["prompt_tokens"]])).logits[0, -1]
        best = last.topk(8)
        assert best.indices.tolist() == asked["last_top8_ids"]
        torch.testing.assert_close(best.values, torch.tensor(asked["last_top8_logits"]), rtol=0, atol=1e-4)
    convert(tmp_path / "hf", tmp_path / "meta")
    original = Checkpoint(checkpoint(name, 1))
    back = meta_weights(tmp_path / "meta")
    assert back.keys() == original.shapes.keys()
    assert all(torch.equal(back[key], original[0][key]) for key in back)


@pytest.mark.parametrize("fault", ["named in no file", "in two files"])
def test_an_index_that_its_files_contradict(hugging_face: Callable[..., Path], tmp_path: Path, fault: str) -> None:
    convert(hugging_face("llama-2"), tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "in", to="hf", shards=2)
    path = tmp_path / "in" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    second = max(index["weight_map"].values())
    if fault == "named in no file":
        index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = second
        path.write_text(json.dumps(index))
        part = f"{second} lacks model.layers.9.mlp.up_proj.weight, which model.safetensors.index.json names"
    else:
        extra = {"model.embed_tokens.weight": torch.zeros(512, 64)}
        save_file(load_file(tmp_path / "in" / second) | extra, tmp_path / "in" / second, {"format": "pt"})
        part = f"{second} holds model.embed_tokens.weight, which another file holds too"
    with pytest.raises(ConvertError, match=part):
        convert(tmp_path / "in", tmp_path / "out")


def test_a_sliding_window_survives_a_round_trip(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    convert(hugging_face("mistral-0.1"), tmp_path / "meta")
    for i in range(2):
        convert(tmp_path / "meta", tmp_path / f"hf{i}", to="hf")
        convert(tmp_path / f"hf{i}", tmp_path / "meta", force=True)
    assert Checkpoint(tmp_path / "meta").params.sliding_window == 64


def test_stored_types_are_kept_one_by_one(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    """bfloat16 matrices with float32 norms, after a round trip: bit for bit."""
    shutil.copytree(hugging_face("llama-2"), tmp_path / "in")
    tensors = {k: t.bfloat16() if t.dim() == 2 else t for k, t in weights(tmp_path / "in").items()}
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "in", tmp_path / "meta", shards=2)
    convert(tmp_path / "meta", tmp_path / "hf", to="hf")
    back = weights(tmp_path / "hf")
    assert back.keys() == tensors.keys()
    assert all(back[key].dtype == tensors[key].dtype and torch.equal(back[key], tensors[key]) for key in tensors)


def test_files_are_never_empty(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    convert(hugging_face("llama-2"), tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "hf", to="hf", shards=4)
    assert all(load_file(path) for path in (tmp_path / "hf").glob("*.safetensors"))
    with pytest.raises(ConvertError, match="--shards 19 would leave a file empty"):
        convert(tmp_path / "meta", tmp_path / "more", to="hf", shards=19)


@pytest.mark.parametrize(("name", "eps"), [("mistral-0.1", 1e-6), ("phi-3", 1e-5), ("llama-2", 1e-6)])
def test_defaults_of_a_configuration(hugging_face: Callable[..., Path], tmp_path: Path, name: str, eps: float) -> None:
    """Missing keys have transformers' defaults."""
    shutil.copytree(hugging_face(name), tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text())
    del config["rms_norm_eps"]
    path.write_text(json.dumps(config))
    convert(tmp_path / "in", tmp_path / "out")
    assert Checkpoint(tmp_path / "out").params.norm_eps == eps
    same(our_logits(tmp_path / "out"), their_logits(tmp_path / "in"))


# Configurations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-3.2", {"use_scaled_rope": True, "rope_scaling_factor": 32.0, "rope_theta": 500000.0}),
        ("linear", {"rope_linear_factor": 4.0, "rope_theta": 10000.0}),
        ("mistral-0.1", {"sliding_window": 64}),
        ("nemo", {"head_dim": 12}),
        ("open-llama-3b", {"hidden_dim": 540, "n_kv_heads": 2}),
        ("narrow", {"hidden_dim": 38, "norm_eps": 1e-6}),
    ],
)
def test_params(hugging_face: Callable[..., Path], tmp_path: Path, name: str, expected: dict[str, Any]) -> None:
    convert(hugging_face(name), tmp_path / "out")
    params = json.loads((tmp_path / "out" / "params.json").read_text())
    assert expected.items() <= params.items()
    optional = {
        "use_scaled_rope",
        "rope_scaling_factor",
        "rope_linear_factor",
        "sliding_window",
        "head_dim",
        "hidden_dim",
    }
    assert not (params.keys() & optional) - expected.keys()


@pytest.mark.parametrize("keys", ["transformers 4", "transformers 5"])
def test_configurations_of_both_kinds(hugging_face: Callable[..., Path], tmp_path: Path, keys: str) -> None:
    """rope_theta and rope_scaling at the top, as before transformers 5, or rope_parameters."""
    shutil.copytree(hugging_face("llama-3.2"), tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    if keys == "transformers 4":
        config |= {"rope_theta": theta, "rope_scaling": rope}
    else:
        config |= {"rope_parameters": rope | {"rope_theta": theta}}
    path.write_text(json.dumps(config))
    convert(tmp_path / "in", tmp_path / "out")
    same(our_logits(tmp_path / "out"), their_logits(hugging_face("llama-3.2")))


def test_an_output_matrix_is_used_despite_tied_embeddings(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    """transformers ties the two only where the file does not hold both."""
    shutil.copytree(hugging_face("llama-3.2"), tmp_path / "in")
    tensors = weights(tmp_path / "in")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "in", tmp_path / "out")
    assert "output.weight" in meta_weights(tmp_path / "out")
    same(our_logits(tmp_path / "out"), their_logits(tmp_path / "in"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": [1]}, "rope_theta is [1], expected a positive number"),
        ({"rope_theta": 10**400}, "rope_theta is 1000000"),
        ({"rope_parameters": {"rope_theta": {}}}, "the rotary settings {'rope_theta': {}} are not supported"),
        ({"rope_parameters": {"rope_theta": "1"}}, "rope_theta is '1', expected a positive number"),
        ({"rope_parameters": {"rope_type": ["x"]}}, "rope scaling ['x'] is not supported, expected rope_type default"),
        ({"rope_scaling": {"type": ["x"]}}, "rope scaling ['x'] is not supported, expected rope_type default"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings is 'many', expected an integer from 1 to"),
        ({"max_position_embeddings": [1]}, "max_position_embeddings is [1], expected an integer from 1 to"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0, expected an integer from 1 to"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected an integer"),
    ],
)
def test_a_key_of_another_type_is_named(
    hugging_face: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    shutil.copytree(hugging_face("llama-2"), tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_parameters": None} | changes))
    with pytest.raises(ConvertError, match=re.escape(f"{tmp_path / 'in'}: config.json: {message}")):
        convert(tmp_path / "in", tmp_path / "out")


def test_keys_that_are_null_or_missing(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(hugging_face("llama-2"), tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text())
    keys = ("rope_parameters", "rope_theta", "rope_scaling", "max_position_embeddings", "tie_word_embeddings")
    path.write_text(json.dumps(config | dict.fromkeys(keys)))
    convert(tmp_path / "in", tmp_path / "null")
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in keys}))
    convert(tmp_path / "in", tmp_path / "missing")
    for name in ("null", "missing"):
        convert(tmp_path / name, tmp_path / f"{name}-hf", to="hf")
        written = json.loads((tmp_path / f"{name}-hf" / "config.json").read_text())
        assert [written[key] for key in keys[1:]] == [10000.0, None, 4096, False]
