"""Conformance kits: every number computed a second way, and what `compare` reports for wrong implementations."""

import copy
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, LlamaForCausalLM

from golden.make_checkpoint import MODELS, TOKENIZER
from helpers import plain
from helpers.commands import Ended, call, run_command
from helpers.paths import ROOT
from helpers.peers import llama_models_vectors
from llama import Llama
from llama.cli.conformance import export
from llama.convert import convert
from llama.evaluate.conformance.bounds import error_bound
from llama.evaluate.conformance.export import DIALOGS, N_NEXT_IDS, PROMPTS
from llama.evaluate.conformance.layout import LAYER

sys.path.insert(0, str(ROOT / "docs"))

import conformance_transformers as example

DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module")
def kit(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """kit(name, dtype="float32"): the kit of a seeded model, written by `conformance export`."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, dtype: str = "float32") -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = tmp_path_factory.mktemp("kits") / f"{name}-{dtype}"
            call(export, ckpt_dir=checkpoint(name), out=made[name, dtype], dtype=dtype)
        return made[name, dtype]

    return make


@pytest.fixture(scope="module")
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
def theirs(hugging_face: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """theirs(kit, name, break_model=None, dtype="float32"): a transformers model's side, after break_model(model)."""

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
    """conformance(*words): `python -m llama conformance` in this process."""

    def run(*words: Any) -> Ended:
        capsys.readouterr()
        return run_command(["conformance", *map(str, words)], monkeypatch, capsys, io.StringIO())

    return run


def kit_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "kit.json").read_text())


def edit(folder: Path, **changes: Any) -> None:
    (folder / "kit.json").write_text(json.dumps(kit_json(folder) | changes))


def change(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], prompt: int | str = 0) -> None:
    """Edit the tensors of a prompt or file, and update the sums in kit.json if it has any."""
    path = folder / (f"{prompt}.safetensors" if isinstance(prompt, str) else f"prompt-{prompt:02d}.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    if sums := kit_json(folder).get("sha256"):
        edit(folder, sha256=sums | {path.name: hashlib.sha256(path.read_bytes()).hexdigest()})


# What is exported ---------------------------------------------------------------------------------


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
    words = ("export", "--ckpt_dir", checkpoint("mha"), "--out", tmp_path / "kit", "--prompts", tmp_path / "texts")
    assert conformance(*words, "--dtype", "bfloat16").status == 0
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
    words = ("export", "--ckpt_dir", checkpoint("mha"), "--out")
    (tmp_path / "there").mkdir()
    ended = conformance(*words, tmp_path / "there")
    assert (ended.status, ended.err) == (
        1,
        f"error: {tmp_path / 'there'} exists and is left unchanged: name another folder\n",
    )
    ended = conformance(*words, tmp_path / "new", "--max_seq_len", 10)
    assert ended.status == 1 and "and max_seq_len is 10: give --max_seq_len" in ended.err.splitlines()[-1]
    ended = conformance(*words, tmp_path / "new", "--prompts", tmp_path / "none")
    assert ended.status == 1 and "does not exist: name a text file" in ended.err
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = conformance(*words, tmp_path / "new")
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
    words = ("export", "--ckpt_dir", tmp_path / "mha", "--out", tmp_path / "kit")
    ended = conformance(*words, "--dtype", "float16")
    assert ended.status == 1 and "(try --dtype float32)" in ended.err
    assert "error: layers.1.feed_forward of the prompt 'The capital of France is' is not finite: " in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["mha"]
    assert conformance(*words).status == 0


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
    theirs: Callable[..., Path],
    conformance: Callable[..., Ended],
    measured: Callable[[str, object], None],
) -> None:
    """All quantities of docs/conformance_transformers.py, against a kit of the same dtype and one in float32."""
    ended = conformance("compare", kit(name, of), theirs(kit(name, of), name, dtype=dtype), "--json")
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


# Wrong implementations ----------------------------------------------------------------------------


def theta(model: Any) -> None:
    rotary = model.model.rotary_emb
    size = model.config.head_dim
    rotary.inv_freq = 1.0 / (20000.0 ** (torch.arange(0, size, 2, dtype=torch.float) / size))


def times(path: str, factor: float) -> Callable[[Any], None]:
    """Multiply one row of a weight."""
    return lambda model: model.get_parameter(path)[3].mul_(factor)


def bos(model: Any) -> None:
    model.model.embed_tokens.weight[1].mul_(1.000001)


def epsilon(path: str) -> Callable[[Any], None]:
    def damage(model: Any) -> None:
        model.get_submodule(path).variance_epsilon = 1e-3

    return damage


def sees_the_future(model: Any) -> None:
    model.model.layers[1].self_attn.is_causal = False


FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "theta": (theta, "rope.cos, position 1, "),
    "embedding": (bos, "embedding, prompt 0 'The capital of France is', position 0, number "),
    "wq": (times("model.layers.1.self_attn.q_proj.weight", 1.001), "layers.1.q, prompt 0 "),
    "wk": (times("model.layers.2.self_attn.k_proj.weight", 1.001), "layers.2.k, prompt 0 "),
    "wv": (times("model.layers.1.self_attn.v_proj.weight", 1.001), "layers.1.cache_v, prompt 0 "),
    "wo": (times("model.layers.0.self_attn.o_proj.weight", 1.001), "layers.0.attention, prompt 0 "),
    "w1": (times("model.layers.1.mlp.gate_proj.weight", 1.1), "layers.1.feed_forward, prompt 0 "),
    "w2": (times("model.layers.2.mlp.down_proj.weight", 1.001), "layers.2.feed_forward, prompt 0 "),
    "w3": (times("model.layers.0.mlp.up_proj.weight", 1.1), "layers.0.feed_forward, prompt 0 "),
    "output": (times("lm_head.weight", 1.001), "logits, prompt 0 "),
    "epsilon of a first norm": (epsilon("model.layers.1.input_layernorm"), "layers.1.q, prompt 0 "),
    "epsilon of a second norm": (epsilon("model.layers.2.post_attention_layernorm"), "layers.2.feed_forward, prompt 0"),
    "epsilon of the last norm": (epsilon("model.norm"), "norm, prompt 0 "),
    "no mask": (sees_the_future, "layers.1.attention, prompt 0 'The capital of France is', position 0, "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(
    fault: str, kit: Callable[..., Path], theirs: Callable[..., Path], conformance: Callable[..., Ended]
) -> None:
    damage, where = FAULTS[fault]
    ended = conformance("compare", kit("mha"), theirs(kit("mha"), "mha", damage))
    (line,) = ended.out.splitlines()
    assert ended.status == 1 and line.startswith(f"DIVERGES: {where}") and line.endswith(" (float32)"), line


@pytest.mark.parametrize("dtype", DTYPES)
def test_theta_is_found_without_rope_rows(
    dtype: str, kit: Callable[..., Path], theirs: Callable[..., Path], conformance: Callable[..., Ended]
) -> None:
    """RoPE leaves position 0 unchanged, so position 1 is the first that differs, in float32."""
    other = theirs(kit("mha"), "mha", theta, dtype)
    (other / "rope.safetensors").unlink()
    note, line = conformance("compare", kit("mha"), other).out.splitlines()
    assert note.endswith("lacks them: rope.cos, rope.sin")
    found = re.match("DIVERGES: layers.0.q, prompt 0 'The capital of France is', position ([1-9]), head ", line)
    assert found and (dtype != "float32" or found[1] == "1"), line


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_in_transformers_order_are_found(
    dtype: str,
    kit: Callable[..., Path],
    theirs: Callable[..., Path],
    conformance: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(example, "interleaved", lambda x: x)
    ended = conformance("compare", kit("gqa"), theirs(kit("gqa"), "gqa", dtype=dtype))
    assert ended.status == 1 and ended.out.startswith("DIVERGES: layers.0.q, prompt 0 'The capital of France is', posi")


@pytest.mark.parametrize("which", ["q", "k"])
def test_weights_whose_rows_were_not_reordered_are_found(
    which: str, kit: Callable[..., Path], theirs: Callable[..., Path], conformance: Callable[..., Ended]
) -> None:
    """A converter that forgets the permutation leaves Meta's order in a model that rotates halves of a head."""

    def damage(model: Any) -> None:
        for layer in model.model.layers:
            weight = layer.self_attn.get_parameter(f"{which}_proj.weight")
            rows = example.interleaved(weight.unflatten(0, (-1, model.config.head_dim)).transpose(-1, -2))
            weight.copy_(rows.transpose(-1, -2).flatten(0, 1))

    ended = conformance("compare", kit("gqa"), theirs(kit("gqa"), "gqa", damage))
    assert ended.status == 1 and ended.out.startswith(f"DIVERGES: layers.0.{which}, prompt 0 ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lacking", ["nothing", "cache"])
def test_a_shifted_cache_is_found(
    dtype: str,
    lacking: str,
    kit: Callable[..., Path],
    theirs: Callable[..., Path],
    conformance: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prompt is computed correctly, then the cached keys of layer 1 move by one position. If the other side has no
    cache tensors, the attention of the first decode step differs."""
    made: Any = example.DynamicCache

    def shifted_cache(**kwargs: Any) -> Any:
        cache = made(**kwargs)
        update = cache.layers[1].update

        def shifted_update(keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if keys.shape[2] == 1 and cache.layers[1].keys.shape[2] == length:
                cache.layers[1].keys = cache.layers[1].keys.roll(1, dims=2)
            return update(keys, values, *args, **kwargs)

        cache.layers[1].update = shifted_update
        return cache

    monkeypatch.setattr(example, "DynamicCache", shifted_cache)
    length = len(kit_json(kit("mha", dtype))["prompts"][0]["ids"])
    other = theirs(kit("mha", dtype), "mha", dtype=dtype)
    if lacking == "cache":
        for prompt in range(3):
            change(other, lambda t: [t.pop(f"layers.{i}.cache_{x}") for i in range(3) for x in "kv"], prompt)
    ended = conformance("compare", kit("mha", dtype), other)
    line = ended.out.splitlines()[-1]
    if lacking == "cache":
        assert "lacks them: cache_k, cache_v\n" in ended.out
        where = f"layers.1.attention, prompt 0 'The capital of France is', position {length}, "
    else:
        where = "layers.1.cache_k, prompt 0 'The capital of France is', position 0, head "
    assert ended.status == 1 and line.startswith(f"DIVERGES: {where}"), line


def test_other_ids_are_found(
    kit: Callable[..., Path], theirs: Callable[..., Path], conformance: Callable[..., Ended]
) -> None:
    other = theirs(kit("mha"), "mha")
    made = kit_json(other)
    prompts, dialogs = copy.deepcopy(made["prompts"]), copy.deepcopy(made["dialogs"])
    dialogs[2]["ids"][4] += 1
    edit(other, dialogs=dialogs)
    ended = conformance("compare", kit("mha"), other)
    text = '[{"role": "user", "content": "I…'
    right = made["dialogs"][2]["ids"][4]
    assert (ended.status, ended.out) == (1, f"DIVERGES: dialog 2 {text!r}, id 4 is {right + 1}, expected {right}\n")
    prompts[1]["ids"].append(0)
    edit(other, prompts=prompts)
    ended = conformance("compare", kit("mha"), other)
    n = len(made["prompts"][1]["ids"])
    assert ended.out == f"DIVERGES: prompt 1 {PROMPTS[1]!r}, id {n} is 0, expected no id\n"
    prompts[1]["ids"] = prompts[1]["ids"][: n - 1]
    edit(other, prompts=prompts)
    assert f", id {n - 1} is missing, expected " in conformance("compare", kit("mha"), other).out


# Compare itself -----------------------------------------------------------------------------------


@pytest.fixture
def copied(kit: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """copied(dtype): another side, a copy of the kit of mha whose kit.json names this dtype."""

    def make(dtype: str = "float32") -> Path:
        shutil.copytree(kit("mha"), tmp_path / "copy")
        edit(tmp_path / "copy", dtype=dtype)
        return tmp_path / "copy"

    return make


ROUNDED = {"float32": 2**-24, "bfloat16": 2**-8, "float16": 2**-11}
FIRST_LAYER = {"float32": 2 * math.sqrt(192) * 2**-24, "bfloat16": 2**-5, "float16": 2**-8}


def bound(name: str, dtype: str, vectors: dict[str, torch.Tensor]) -> float:
    """From docs/conformance.md. mha has 3 layers and a hidden_dim of 192."""
    largest = float(vectors[name].abs().max())
    if name == "embedding":
        return 2 * ROUNDED[dtype] * largest
    if name == "logprobs":
        largest += float(vectors["logits"].abs().max())
    layers = int(name.split(".")[1]) if name.startswith("layers.") else 3
    return FIRST_LAYER[dtype] * (1 + layers) * largest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name",
    ["embedding", "norm", "logits", "logprobs", *(f"layers.{i}.{name}" for i in (0, 2) for name in LAYER)],
)
def test_bounds_are_those_of_the_documentation(
    name: str, dtype: str, kit: Callable[..., Path], copied: Callable[..., Path], conformance: Callable[..., Ended]
) -> None:
    """The last number of the last prompt: an error of 0.99 of the bound passes, one of 1.01 does not."""
    other = copied(dtype)
    limit = bound(name, dtype, load_file(kit("mha") / "prompt-02.safetensors"))

    def move(part: float) -> Callable[[dict[str, torch.Tensor]], None]:
        def moving(tensors: dict[str, torch.Tensor]) -> None:
            tensors[name] = tensors[name].double()
            tensors[name].view(-1)[-1] += part * limit

        return moving

    change(other, move(-0.99), 2)
    ended = conformance("compare", kit("mha"), other, "--json")
    error = json.loads(ended.out)["errors"][name.split(".")[-1]]
    assert ended.status == 0 and error["of_bound"] == pytest.approx(0.99, rel=1e-3)
    change(other, move(-0.02), 2)
    ended = conformance("compare", kit("mha"), other, "--json")
    found = json.loads(ended.out)
    first, shape = found["first"], load_file(other / "prompt-02.safetensors")[name].shape
    assert ended.status == 1 and found["dtype"] == dtype and not found["ok"]
    assert first["quantity"] == name.split(".")[-1] and first["index"] == [n - 1 for n in shape]
    assert first["where"].startswith(f"{name}, prompt 2 ") and f"position {shape[0] - 1}" in first["where"]
    assert first["error"] == pytest.approx(1.01 * limit, rel=1e-3) and first["bound"] == pytest.approx(limit)
    assert first["value"] - first["expected"] == pytest.approx(-first["error"], rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [0, 3, 6])
def test_bounds_of_rope_rows(
    row: int, dtype: str, kit: Callable[..., Path], copied: Callable[..., Path], conformance: Callable[..., Ended]
) -> None:
    other = copied(dtype)
    edit(other, sha256={})
    position = kit_json(other)["rope_positions"][row]
    limit = 2 * ROUNDED[dtype] + position * 2**-21
    rows = load_file(other / "rope.safetensors")
    for part, status in ((0.99, 0), (1.01, 1)):
        moved = rows["rope.sin"].double()
        moved[row, 2] += part * limit
        save_file(rows | {"rope.sin": moved}, other / "rope.safetensors")
        ended = conformance("compare", kit("mha"), other)
        assert ended.status == status
    assert ended.out.startswith(f"DIVERGES: rope.sin, position {position}, number 2 is ")


def test_the_first_in_the_order_of_computation_is_named(
    kit: Callable[..., Path], copied: Callable[..., Path], conformance: Callable[..., Ended]
) -> None:
    """Errors are added in reverse order: each new one comes before those already there."""
    other = copied()
    places = [
        ("logprobs", 0, (2,), "logprobs, prompt 0 {}, position 2 is "),
        ("logits", 2, (1, 7), "logits, prompt 2 {}, position 1, number 7 is "),
        ("norm", 0, (0, 0), "norm, prompt 0 {}, position 0, number 0 is "),
        ("layers.2.feed_forward", 0, (0, 0), "layers.2.feed_forward, prompt 0 {}"),
        ("layers.2.attention", 1, (0, 0), "layers.2.attention, prompt 1 {}"),
        ("layers.2.cache_v", 1, (0, 0, 1), "layers.2.cache_v, prompt 1 {}"),
        ("layers.2.cache_k", 1, (0, 0, 1), "layers.2.cache_k, prompt 1 {}"),
        ("layers.2.k", 1, (0, 3, 1), "layers.2.k, prompt 1 {}, position 0, head 3, number 1 is "),
        ("layers.2.q", 2, (4, 0, 1), "layers.2.q, prompt 2 {}, position 4, head 0, number 1 is "),
        ("layers.2.q", 1, (5, 0, 1), "layers.2.q, prompt 1 {}, position 5, head 0, number 1 is "),
        ("layers.2.q", 1, (3, 7, 0), "layers.2.q, prompt 1 {}, position 3, head 7, number 0 is "),
        ("layers.2.input", 1, (9, 9), "layers.2.input, prompt 1 {}"),
        ("layers.1.feed_forward", 2, (9, 9), "layers.1.feed_forward, prompt 2 {}"),
        ("layers.0.input", 2, (9, 9), "layers.0.input, prompt 2 {}"),
        ("embedding", 2, (9, 9), "embedding, prompt 2 {}"),
    ]
    for name, prompt, index, where in places:

        def moving(tensors: dict[str, torch.Tensor], name: str = name, index: tuple[int, ...] = index) -> None:
            tensors[name][index] += 5.0

        change(other, moving, prompt)
        ended = conformance("compare", kit("mha"), other)
        text = repr(PROMPTS[prompt] if prompt < 2 else PROMPTS[2][:31] + "…")
        assert ended.status == 1 and ended.out.startswith(f"DIVERGES: {where.format(text)}"), (name, ended.out)


def test_the_largest_error_of_a_position_is_named(
    kit: Callable[..., Path], copied: Callable[..., Path], conformance: Callable[..., Ended]
) -> None:
    other = copied()

    def moving(tensors: dict[str, torch.Tensor]) -> None:
        tensors["norm"][4, 2:5] += torch.tensor([1.0, -3.0, 2.0])
        tensors["norm"][5, 0] += 100

    change(other, moving, 1)
    assert ", position 4, number 3 is " in conformance("compare", kit("mha"), other).out


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_diverge(
    value: float, kit: Callable[..., Path], copied: Callable[..., Path], conformance: Callable[..., Ended]
) -> None:
    other = copied()
    change(other, lambda tensors: tensors["layers.1.k"][2, 1].fill_(value), 1)
    ended = conformance("compare", kit("mha"), other)
    assert ended.status == 1 and ", position 2, head 1, number 0 is not finite, expected " in ended.out
    assert ended.out.startswith("DIVERGES: layers.1.k, prompt 1 ")
    found = json.loads(conformance("compare", kit("mha"), other, "--json").out)
    assert found["first"]["value"] is None and found["first"]["error"] is None and found["first"]["index"] == [2, 1, 0]
    assert found["errors"]["k"] == {"error": None, "of_bound": None}


def test_missing_quantities_are_listed(
    kit: Callable[..., Path], copied: Callable[..., Path], conformance: Callable[..., Ended]
) -> None:
    other = copied()
    made = kit_json(other)
    for prompt in made["prompts"]:
        del prompt["ids"]
    edit(other, sha256={}, dialogs=[], prompts=made["prompts"])
    change(other, lambda tensors: [tensors.pop(f"layers.{i}.q") for i in range(3)], 0)
    change(other, lambda tensors: tensors.pop("logits"), 1)
    (other / "prompt-02.safetensors").unlink()
    ended = conformance("compare", kit("mha"), other)
    note, line = ended.out.splitlines()
    others = "k (3 of 9), cache_k (3 of 9), cache_v (3 of 9), attention (3 of 9), feed_forward (3 of 9)"
    assert note == (
        f"note: not compared, as {other} lacks them: prompt ids, dialog ids, embedding (1 of 3), input (3 of 9), "
        f"q (6 of 9), {others}, norm (1 of 3), logits (2 of 3), logprobs (1 of 3)"
    )
    assert ended.status == 0 and line.startswith(f"OK: {other} in float32, largest errors (of the bound): rope.cos 0.0")


def test_nothing_to_compare_is_an_error(
    kit: Callable[..., Path], conformance: Callable[..., Ended], tmp_path: Path
) -> None:
    texts = [{"text": prompt["text"], "next_ids": prompt["next_ids"]} for prompt in kit_json(kit("mha"))["prompts"]]
    made = {"format": "llama-conformance", "version": 1, "dtype": "float32", "prompts": texts}
    (tmp_path / "kit.json").write_text(json.dumps(made))
    ended = conformance("compare", kit("mha"), tmp_path)
    assert ended.status == 1 and f"error: {tmp_path} has nothing to compare with the kit" in ended.err and not ended.out


def test_the_kits_logits_must_be_finite(
    kit: Callable[..., Path], copied: Callable[..., Path], conformance: Callable[..., Ended], tmp_path: Path
) -> None:
    """The bound of logprobs depends on the kit's logits, even if the other side has none."""
    folder = copied()
    shutil.copytree(folder, tmp_path / "other")
    edit(tmp_path / "other", sha256={})
    for number in range(3):
        change(folder, lambda tensors: tensors["logits"][0].fill_(math.nan), number)
        change(tmp_path / "other", lambda tensors: tensors.pop("logits"), number)
    ended = conformance("compare", folder, tmp_path / "other")
    assert ended.status == 1 and "prompt-00.safetensors: logits is not finite, so it is no reference" in ended.err


def flipped(folder: Path) -> None:
    path = folder / "prompt-01.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(folder: Path) -> None:
    edit(folder, sha256={})
    path = folder / "prompt-01.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.0.q"] = tensors["layers.0.q"].flatten(1)


def as_integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm"] = tensors["norm"].long()


def misnamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layer.0.q"] = tensors.pop("layers.0.q")


def as_complex(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm"] = tensors["norm"].to(torch.complex64)


def sized(folder: Path, **sizes: Any) -> None:
    edit(folder, params=kit_json(folder)["params"] | sizes)


def one_row(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: rows[:1].clone() for name, rows in tensors.items()})


def without_columns(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({name: x[:, :0].clone() for name, x in tensors.items()}), "rope")
    sized(folder, head_dim=1)


def long_json(folder: Path) -> None:
    with (folder / "kit.json").open("r+b") as file:
        file.truncate(2**40)  # a sparse file


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def prompts(folder: Path, **entry: Any) -> list[Any]:
    first, *others = kit_json(folder)["prompts"]
    return [first | entry, *others]


# (which side is damaged, the damage, a part of the message); "itself": a kit that is compared with itself.
DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("both", lambda f: (f / "kit.json").unlink(), "kit.json is missing: name a folder that"),
    ("both", lambda f: (f / "kit.json").write_text("{"), "kit.json cannot be read as JSON"),
    ("both", lambda f: (f / "kit.json").write_bytes(b"\xff\xfe"), "kit.json cannot be read as JSON"),
    ("both", lambda f: (f / "kit.json").write_text("[1]"), "it is not a kit"),
    ("both", lambda f: (f / "kit.json").write_text("[" * 100000), "kit.json cannot be read as JSON"),
    ("both", lambda f: edit(f, format="other"), "it is not a kit"),
    ("both", lambda f: edit(f, version=2), "has layout version 2, expected 1: write it again"),
    ("both", lambda f: edit(f, dtype="float8"), "dtype is 'float8', expected float32, bfloat16, float16"),
    ("both", lambda f: edit(f, dtype=["float32"]), "dtype is a list, expected a str"),
    ("both", lambda f: edit(f, prompts={"a": 1}), "prompts is a dict, expected a list"),
    ("both", lambda f: edit(f, prompts=["a"]), "prompts[0] has no 'text'"),
    ("both", lambda f: edit(f, prompts=[{"text": "a"}]), "prompts[0] has no 'next_ids'"),
    ("both", lambda f: edit(f, dialogs=[{"ids": [1]}]), "dialogs[0] has no 'messages'"),
    ("both", lambda f: edit(f, prompts=prompts(f, ids=[1, "2"])), "ids of prompts[0] is not a list of integers"),
    ("both", lambda f: edit(f, rope_positions=[1.5]), "rope_positions is not a list of integers"),
    ("both", lambda f: edit(f, sha256={"../x": "0"}), "sha256 names '../x', expected rope.safetensors, prompt-00"),
    ("both", lambda f: pipe(f / "kit.json"), "kit.json cannot be read as JSON (it is not a regular file of at most"),
    ("both", long_json, "kit.json cannot be read as JSON (it is not a regular file of at most 16,777,216 bytes)"),
    ("both", lambda f: pipe(f / "prompt-01.safetensors"), "prompt-01.safetensors is not a regular file"),
    ("both", lambda f: edit(f, rope_positions=[10**400] * 7), "rope_positions is not a list of integers from 0 to"),
    ("both", lambda f: edit(f, rope_positions=[-(10**9)] * 7), "rope_positions is not a list of integers from 0 to"),
    ("both", lambda f: edit(f, rope_positions=[2**31]), "is not a list of integers from 0 to 2,147,483,647"),
    ("both", lambda f: edit(f, prompts=prompts(f, next_ids=[-1])), "next_ids of prompts[0] is not a list of"),
    ("both", lambda f: sized(f, n_layers=10**8), "n_layers is '100000000', expected an integer from 1 to 9,999"),
    ("both", lambda f: sized(f, n_layers=10_000), "n_layers is '10000', expected an integer from 1 to 9,999"),
    ("both", lambda f: sized(f, hidden_dim=-1), "hidden_dim is '-1', expected an integer from 1 to 16,777,215"),
    ("both", lambda f: sized(f, hidden_dim=0), "hidden_dim is '0', expected an integer from 1 to 16,777,215"),
    ("both", lambda f: sized(f, hidden_dim=10**400), "hidden_dim is '1000000000000000000000000000000…', expected an"),
    ("both", lambda f: sized(f, dim=True), "dim is 'true', expected an integer from 1 to 16,777,215"),
    ("both", lambda f: sized(f, head_dim=7), "head_dim is '7', expected an even integer from 1 to 16,777,215"),
    ("both", without_columns, "head_dim is '1', expected an even integer from 1 to 16,777,215"),
    ("both", lambda f: change(f, one_row, "rope"), "rope.cos is F32 [1, 4], expected floats [7, 4]"),
    (
        "both",
        lambda f: change(f, lambda t: t.update(logits=torch.zeros(0, 512))),
        "logits is F32 [0, 512], expected",
    ),
    ("both", lambda f: change(f, lambda t: t.update(logits=torch.tensor(1.0))), "logits is F32 [], expected"),
    ("both", lambda f: change(f, as_complex), "norm is C64 [18, 64], expected floats [18, 64]"),
    ("both", flipped, "prompt-01.safetensors is damaged, its sha256 is not the one in kit.json"),
    ("both", lambda f: (f / "rope.safetensors").unlink(), "rope.safetensors cannot be read"),
    ("both", lambda f: change(f, misnamed), "holds 'layer.0.q', expected names of the layout, such as 'logprobs'"),
    ("other", cut, "prompt-01.safetensors is damaged or cut off"),
    ("other", lambda f: edit(f, params={"dim": 32}), "is of another model: dim is 32, the kit's 64"),
    ("other", lambda f: edit(f, params={"n_kv_heads": 4}), "is of another model: n_kv_heads is 4, the kit's 8"),
    ("other", lambda f: edit(f, sha256={}, prompts=kit_json(f)["prompts"][:2]), "has 2 prompts, the kit 3"),
    (
        "other",
        lambda f: edit(f, prompts=prompts(f, text="Hi")),
        "text of prompt 0 is 'Hi', in the kit 'The capital of",
    ),
    (
        "other",
        lambda f: edit(f, prompts=prompts(f, next_ids=[1, 2])),
        "next_ids of prompt 0 is '[1, 2]', in the kit '[",
    ),
    ("other", lambda f: edit(f, prompts=[], sha256={}), "has 0 prompts, the kit 3: write those of the kit"),
    ("other", lambda f: edit(f, dialogs=kit_json(f)["dialogs"][::-1]), "messages of dialog 0 is '[{"),
    ("other", lambda f: edit(f, rope_positions=[0, 1]), "rope_positions are [0, 1], the kit's [0, 1, 2, "),
    ("both", lambda f: change(f, shape), "layers.0.q is F32 [18, 64], expected floats [18, 8, 8]"),
    ("both", lambda f: change(f, as_integers), "norm is I64 ["),
    ("kit", cut, "is not what `conformance export` writes: the kit comes first"),
    ("kit", lambda f: edit(f, params={}), "is not what `conformance export` writes: the kit comes first"),
    ("kit", lambda f: edit(f, sha256={}), "is not what `conformance export` writes: the kit comes first"),
    ("kit", lambda f: edit(f, rope_positions=[]), "kit.json is not what `conformance export` writes"),
    ("itself", lambda f: edit(f, rope_positions=[0]), "rope.cos is F32 [7, 4], expected floats [1, 4]"),
    ("itself", lambda f: edit(f, rope_positions=[0, 1]), "rope.cos is F32 [7, 4], expected floats [2, 4]"),
    ("kit", lambda f: edit(f, prompts=prompts(f, ids=[])), "kit.json is not what `conformance export` writes"),
    ("kit", lambda f: edit(f, prompts=prompts(f, ids=[1])), "embedding is F32 [18, 64], expected floats [5, 64]"),
    ("itself", lambda f: sized(f, n_layers=2), "holds 'layers.2.attention', expected names of the layout"),
    ("itself", lambda f: sized(f, n_layers=9999), "prompt-00.safetensors lacks layers.3.input: export it again"),
    (
        "kit",
        lambda f: change(f, lambda t: t["norm"][0, 0].fill_(math.nan)),
        "norm is not finite, so it is no reference",
    ),
    ("kit", lambda f: change(f, lambda t: t.pop("layers.1.k")), "lacks layers.1.k: export it again"),
]


@pytest.mark.parametrize(
    ("side", "number"),
    [(side, n) for n, (of, _, _) in enumerate(DAMAGES) for side in (("kit", "other") if of == "both" else (of,))],
)
def test_a_damaged_folder_is_named_in_one_line(
    side: str, number: int, kit: Callable[..., Path], copied: Callable[..., Path], conformance: Callable[..., Ended]
) -> None:
    _, damage, message = DAMAGES[number]
    folder = copied()
    damage(folder)
    sides = {"kit": (folder, kit("mha")), "other": (kit("mha"), folder), "itself": (folder, folder)}
    ended = conformance("compare", *sides[side])
    (line,) = ended.err.splitlines()
    assert ended.status == 1 and line.startswith(f"error: {folder}") and message in line and not ended.out, line


def test_without_safetensors(
    kit: Callable[..., Path], conformance: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama.evaluate.conformance.kit.find_spec", lambda name: None)
    ended = conformance("compare", kit("mha"), kit("mha"))
    assert ended.err == "error: kits need the Python package safetensors: pip install 'llama-runner[convert]'\n"


@pytest.mark.parametrize("word", ["export", "compare"])
def test_help(word: str, conformance: Callable[..., Ended]) -> None:
    ended = conformance(word, "--help")
    assert ended.status == 0 and ("ckpt_dir" in ended.out + ended.err) == (word == "export")
