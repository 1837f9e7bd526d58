"""`conformance compare`: its bounds, the order of comparison, its output, and damaged folders."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.commands import Ended
from helpers.kits import DTYPES, change, edit, kit_json
from llama.evaluate.conformance.export import PROMPTS
from llama.evaluate.conformance.layout import LAYER


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
    """The bound of a quantity of mha, by docs/conformance.md: mha has 3 layers and a hidden_dim of 192."""
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
    """Errors are added in reverse order of computation, so each new error is the first."""
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
    ("both", lambda f: (f / "kit.json").unlink(), "kit.json is missing: give a folder that"),
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
    ("other", lambda f: edit(f, params={"dim": 32}), "is from another model: dim is 32, the kit's 64"),
    ("other", lambda f: edit(f, params={"n_kv_heads": 4}), "is from another model: n_kv_heads is 4, the kit's 8"),
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
    ("kit", cut, "is not what `conformance export` writes: give the kit first"),
    ("kit", lambda f: edit(f, params={}), "is not what `conformance export` writes: give the kit first"),
    ("kit", lambda f: edit(f, sha256={}), "is not what `conformance export` writes: give the kit first"),
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
