"""Conformance kits: every number computed a second way, and correct implementations compared with them."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor

from golden.make_checkpoint import MODELS, TOKENIZER
from helpers import plain
from helpers.commands import Ended
from helpers.kits import DTYPES, example, kit_json
from helpers.paths import ROOT
from helpers.peers import llama_models_vectors
from llama import Llama
from llama.convert import convert
from llama.evaluate.conformance.bounds import error_bound
from llama.evaluate.conformance.export import DIALOGS, N_NEXT_IDS, PROMPTS
from llama.evaluate.conformance.layout import LAYER


@pytest.mark.parametrize("name", MODELS)
def test_every_number_equals_a_plain_float64_forward(
    name: str, kit: Callable[..., Path], checkpoint: Callable[..., Path], measured: Callable[[str, object], None]
) -> None:
    """helpers/plain.py shares no code with the package."""
    params, weights = plain.load(checkpoint(name))
    made, worst, width = kit_json(kit(name)), 0.0, weights["layers.0.feed_forward.w2.weight"].shape[1]
    assert len(made["prompts"]) == len(PROMPTS) == 3
    for number, prompt in enumerate(made["prompts"]):
        vectors = load_file(kit(name) / f"prompt-{number:02d}.safetensors")
        ids = prompt["ids"] + prompt["next_ids"]
        exact = plain.forward(params, weights, ids)
        for i in range(params["n_layers"]):
            exact[f"layers.{i}.cache_k"] = exact[f"layers.{i}.k"]
        assert prompt["next_ids"] == exact["logits"][-N_NEXT_IDS - 1 : -1].argmax(-1).tolist()
        scores = exact["logits"] - np.log(np.exp(exact["logits"]).sum(-1, keepdims=True))
        exact["logprobs"] = scores[range(len(ids) - 1), ids[1:]]
        assert vectors.keys() == exact.keys()
        for key, found in vectors.items():
            assert found.dtype == torch.float32 and found.shape == exact[key].shape
            layer, quantity = (int(key.split(".")[1]), key.split(".")[2]) if "." in key else (params["n_layers"], key)
            largest = np.abs(exact[key]).max() + (np.abs(exact["logits"]).max() if key == "logprobs" else 0)
            bound = error_bound(quantity, layer, "float32", width) * largest
            worst = max(worst, float(np.abs(found.double().numpy() - exact[key]).max() / bound))
    measured(f"kit to float64, {name}, worst part of a bound", worst)
    assert worst <= 1


@pytest.mark.parametrize("name", MODELS)
def test_rope_rows_at_far_positions(name: str, kit: Callable[..., Path], checkpoint: Callable[..., Path]) -> None:
    """Angles are computed in float32, with an error of up to 2^-22 radians per position."""
    params = plain.load(checkpoint(name))[0]
    positions = kit_json(kit(name))["rope_positions"]
    assert {0, 1, 4095, 8191, 131071} <= set(positions)
    rows = load_file(kit(name) / "rope.safetensors")
    angles = np.outer(positions, plain.frequencies(params, params["dim"] // params["n_heads"]))
    for key, exact in (("rope.cos", np.cos(angles)), ("rope.sin", np.sin(angles))):
        far = np.abs(rows[key].double().numpy() - exact).max(-1)
        assert (far <= 2**-23 + np.array(positions) * 2.0**-22).all()


def test_rope_rows_are_the_models_own(kit: Callable[..., Path], build: Callable[..., Llama]) -> None:
    model = build("llama31", max_seq_len=8192).model
    positions = [p for p in kit_json(kit("llama31"))["rope_positions"] if p < 8192]
    rows = load_file(kit("llama31") / "rope.safetensors")
    assert torch.equal(rows["rope.cos"][: len(positions)], model.freqs_cis.real[positions])
    assert torch.equal(rows["rope.sin"][: len(positions)], model.freqs_cis.imag[positions])


def test_ids_of_texts_and_dialogs(kit: Callable[..., Path]) -> None:
    pieces = SentencePieceProcessor(model_file=str(TOKENIZER))
    made = kit_json(kit("mha"))
    assert [prompt["text"] for prompt in made["prompts"]] == list(PROMPTS)
    assert [prompt["ids"] for prompt in made["prompts"]] == [[1, *pieces.encode(text)] for text in PROMPTS]
    assert made["chat_format"] == "llama2" and [d["messages"] for d in made["dialogs"]] == [list(d) for d in DIALOGS]
    rounds = ["[INST] Ich heiße Ana. [/INST] Hello, Ana! ", "[INST] What is my name? [/INST]"]
    assert [dialog["ids"] for dialog in made["dialogs"]] == [
        [1, *pieces.encode("[INST] What is 2 + 2? [/INST]")],
        [1, *pieces.encode("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Why is the sky blue? [/INST]")],
        [1, *pieces.encode(rounds[0]), 2, 1, *pieces.encode(rounds[1])],
    ]


def test_kit_json_describes_the_model(kit: Callable[..., Path]) -> None:
    made = kit_json(kit("llama31"))
    assert (made["format"], made["version"], made["dtype"]) == ("llama-conformance", 1, "float32")
    sizes = {"dim": 128, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "head_dim": 16, "vocab_size": 512}
    rope = {"rope_theta": 500000.0, "use_scaled_rope": True, "rope_scaling_factor": 8.0, "rope_linear_factor": None}
    rope |= {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_context_length": 8192}
    # 1.3 * int(8 / 3 * 128) = 443.3, rounded up to a multiple of 64
    assert made["params"] == sizes | {"hidden_dim": 448, "norm_eps": 1e-5} | rope
    per_layer = {f"layers.{i}.{name}" for i in range(2) for name in LAYER}
    named = {key for key in made["quantities"] if key not in LAYER and not key.startswith("rope")}
    assert load_file(kit("llama31") / "prompt-00.safetensors").keys() == per_layer | named
    page = (ROOT / "docs" / "conformance.md").read_text()
    names = [f"layers.N.{key}" if key in LAYER else key for key in made["quantities"]]
    assert [page.index(f"`{name}`") for name in names] == sorted(page.index(f"`{name}`") for name in names)


def test_exporting_twice_gives_the_same_bytes(
    kit: Callable[..., Path], checkpoint: Callable[..., Path], conformance: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = conformance("export", "--ckpt_dir", checkpoint("gqa"), "--out", tmp_path / "again")
    assert ended.status == 0 and "3 prompts" in ended.err and "MB" in ended.err and ended.out == ""
    files = sorted(path.name for path in kit("gqa").iterdir())
    assert files == ["kit.json", *(f"prompt-{i:02d}.safetensors" for i in range(3)), "rope.safetensors"]
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == files
    for file in files:
        assert (kit("gqa") / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_prompts_of_a_file_come_after_the_built_in_ones(
    checkpoint: Callable[..., Path], conformance: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "texts").write_text("One more\n\n  and\u2028another  \r\n", "utf-8", newline="")
    args = ("export", "--ckpt_dir", checkpoint("mha"), "--out", tmp_path / "kit", "--prompts", tmp_path / "texts")
    assert conformance(*args, "--dtype", "bfloat16").status == 0
    assert [prompt["text"] for prompt in kit_json(tmp_path / "kit")["prompts"][3:]] == [
        "One more",
        "  and\u2028another  ",
    ]
    vectors = load_file(tmp_path / "kit" / "prompt-04.safetensors")
    assert vectors["layers.1.q"].dtype == torch.bfloat16 and vectors["logits"].dtype == torch.float32
    assert len(vectors["norm"]) == len(kit_json(tmp_path / "kit")["prompts"][4]["ids"]) + N_NEXT_IDS


def test_mistakes_of_export(
    checkpoint: Callable[..., Path],
    conformance: Callable[..., Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = ("export", "--ckpt_dir", checkpoint("mha"), "--out")
    (tmp_path / "there").mkdir()
    ended = conformance(*args, tmp_path / "there")
    assert (ended.status, ended.err) == (
        1,
        f"error: {tmp_path / 'there'} exists and is left unchanged: name another folder\n",
    )
    ended = conformance(*args, tmp_path / "new", "--max_seq_len", 10)
    assert ended.status == 1 and "and max_seq_len is 10: give --max_seq_len" in ended.err.splitlines()[-1]
    ended = conformance(*args, tmp_path / "new", "--prompts", tmp_path / "none")
    assert ended.status == 1 and "does not exist: name a text file" in ended.err
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = conformance(*args, tmp_path / "new")
    assert ended.status == 1 and ended.err.startswith(
        "error: 2 ranks are running, but export needs one: start it without torchrun"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_model_that_overflows_gives_no_kit(
    checkpoint: Callable[..., Path], conformance: Callable[..., Ended], tmp_path: Path
) -> None:
    """Gate and up projections in the hundreds: their product overflows float16."""
    shutil.copytree(checkpoint("mha"), tmp_path / "mha")
    weights = torch.load(tmp_path / "mha" / "consolidated.00.pth", weights_only=True)
    for name in ("w1", "w3"):
        weights[f"layers.1.feed_forward.{name}.weight"] *= 1000
    torch.save(weights, tmp_path / "mha" / "consolidated.00.pth")
    args = ("export", "--ckpt_dir", tmp_path / "mha", "--out", tmp_path / "kit")
    ended = conformance(*args, "--dtype", "float16")
    assert ended.status == 1 and "(try --dtype float32)" in ended.err
    assert "error: layers.1.feed_forward of the prompt 'The capital of France is' is not finite: " in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["mha"]
    assert conformance(*args).status == 0


# Correct implementations --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "dtype"), [("float32", "float32"), *((of, dtype) for dtype in DTYPES[1:] for of in ("float32", dtype))]
)
@pytest.mark.parametrize("name", MODELS)
def test_transformers_agrees(
    name: str,
    of: str,
    dtype: str,
    kit: Callable[..., Path],
    transformers_side: Callable[..., Path],
    conformance: Callable[..., Ended],
    measured: Callable[[str, object], None],
) -> None:
    """All quantities of docs/conformance_transformers.py, against a kit of the same dtype and one in float32."""
    ended = conformance("compare", kit(name, of), transformers_side(kit(name, of), name, dtype=dtype), "--json")
    found = json.loads(ended.out)
    assert ended.status == 0 and found["ok"] and found["first"] is None and found["not_compared"] == []
    assert found["dtype"] == dtype and len(found["errors"]) == 2 + 1 + len(LAYER) + 3
    worst = max(found["errors"], key=lambda key: found["errors"][key]["of_bound"])
    part = found["errors"][worst]["of_bound"]
    measured(f"transformers in {dtype} to a kit in {of}, {name}, worst part of a bound ({worst})", part)
    assert part <= 1
    assert dtype == "float32" or found["errors"]["logits"]["error"] > 1e-5  # it was computed in 16 bits


@pytest.mark.parametrize("name", MODELS)
def test_llama_models_agrees(
    name: str,
    checkpoint: Callable[..., Path],
    kit: Callable[..., Path],
    build: Callable[..., Llama],
    conformance: Callable[..., Ended],
    tmp_path: Path,
    measured: Callable[[str, object], None],
) -> None:
    build("mha", max_seq_len=8, max_batch_size=1)  # sets up fairscale's groups
    made = kit_json(kit(name))
    for number, prompt in enumerate(made["prompts"]):
        vectors = llama_models_vectors(checkpoint(name), prompt["ids"], prompt["next_ids"])
        save_file(vectors, tmp_path / f"prompt-{number:02d}.safetensors")
    texts = [{key: prompt[key] for key in ("text", "next_ids")} for prompt in made["prompts"]]
    (tmp_path / "kit.json").write_text(
        json.dumps({"format": made["format"], "version": 1, "dtype": "float32", "prompts": texts})
    )
    ended = conformance("compare", kit(name), tmp_path)
    note, line = ended.out.splitlines()
    assert ended.status == 0 and line.startswith(f"OK: {tmp_path} in float32")
    lacking = "prompt ids, dialog ids, rope.cos, rope.sin, logprobs"
    assert note == f"note: not compared, as {tmp_path} lacks them: {lacking}"
    errors = json.loads(conformance("compare", kit(name), tmp_path, "--json").out)["errors"]
    worst = max(error["of_bound"] for error in errors.values())
    measured(f"llama-models to a kit, {name}, float32, worst part of a bound", worst)
    assert worst <= 1


@pytest.mark.slow
def test_the_demo_model_through_the_example_as_a_script(
    demo: Path,
    conformance: Callable[..., Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: Callable[[str, object], None],
) -> None:
    convert(demo, tmp_path / "hf", to="hf")
    assert conformance("export", "--ckpt_dir", demo, "--out", tmp_path / "kit").status == 0
    monkeypatch.setattr(sys, "argv", ["example", *(str(tmp_path / name) for name in ("hf", "kit", "other"))])
    example.main()
    ended = conformance("compare", tmp_path / "kit", tmp_path / "other", "--json")
    found = json.loads(ended.out)
    assert ended.status == 0 and found["ok"] and found["not_compared"] == []
    worst = max(error["of_bound"] for error in found["errors"].values())
    measured("transformers, demo, float32, worst part of a bound", worst)
    assert worst <= 1
