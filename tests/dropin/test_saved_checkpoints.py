"""Checkpoints as fine-tuners, trainers and other tools save them give the same results as the original folder."""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from helpers.commands import call
from helpers.faults import Bomb, edit_params, write_checklist
from helpers.paths import ROOT
from helpers.ranks import run_ranks
from llama import Llama
from llama.checkpoint.errors import CheckpointError
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.params_json import read_params
from llama.checkpoint.verify import check_folder
from llama.cli.plan import plan
from llama.cli.verify import verify
from llama.convert import ConvertError, convert

PROMPT = [1, 20, 300, 4, 77]
Tensors = dict[str, Any]


def single(folder: Path) -> Path:
    return folder / "consolidated.00.pth"


def every(change: Callable[[Tensors], Any], **options: Any) -> Callable[[Path], None]:
    """Replace the tensors of each file by `change(tensors)`."""

    def save(folder: Path) -> None:
        for path in folder.glob("consolidated.*.pth"):
            torch.save(change(torch.load(path, weights_only=True)), path, **options)

    return save


def prefixed(prefix: str) -> Callable[[Path], None]:
    return every(lambda tensors: {prefix + key: value for key, value in tensors.items()})


def renamed(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "consolidated.00.pth").rename(folder / name)


def unpadded(folder: Path) -> None:
    for i, path in enumerate(sorted(folder.glob("*.pth"))):
        path.rename(folder / f"consolidated.{i}.pth")


def as_safetensors(name: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        save_file(torch.load(single(folder), weights_only=True), folder / name)
        single(folder).unlink()

    return save


def params_text(change: Callable[[str], bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "params.json"
        path.write_bytes(change(json.dumps(json.loads(path.read_text()), indent=1)))

    return write


def params(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_params(folder, **changes)


def numbers_as_text(folder: Path) -> None:
    found = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({key: str(value) for key, value in found.items()}))


def with_optimizer(tensors: Tensors) -> Tensors:
    state = {i: {"exp_avg": torch.ones_like(t), "step": torch.tensor(7.0)} for i, t in enumerate(tensors.values())}
    return {"model": tensors, "optimizer": {"state": state, "param_groups": [{"lr": 1e-4}]}, "step": 7}


def with_buffers(tensors: Tensors) -> Tensors:
    layers = {f"layers.{i}.attention.{name}": torch.zeros(2) for i in range(3) for name in ("cache_k", "mask")}
    frequencies = {"freqs_cis": torch.ones(4, dtype=torch.complex64), "rope.freqs": torch.ones(4)}
    return tensors | layers | frequencies | {"causal_mask": torch.full((4, 4), -torch.inf)}


class Saved(NamedTuple):
    """save: rewrites a folder. note: part of the only note that is printed, "" for none. shards: of the original."""

    save: Callable[[Path], Any]
    note: str = ""
    shards: int = 1


WRAPPED = "the weights were read from the entry"
IGNORED = {"max_seq_len": 2048, "max_batch_size": 4, "model_parallel_size": 1, "use_kv_cache": True, "dropout": 0.1}
SAVED: dict[str, Saved] = {
    "model": Saved(every(lambda t: {"model": t}), f"{WRAPPED} 'model'"),
    "state_dict and step": Saved(
        every(lambda t: {"state_dict": t, "step": 7}), f"{WRAPPED} 'state_dict'; entries not read: step"
    ),
    "with an optimizer": Saved(every(with_optimizer), f"{WRAPPED} 'model'; entries not read: optimizer, step", 2),
    "a wrapper in a wrapper": Saved(every(lambda t: {"state_dict": {"model": t}}), f"{WRAPPED} 'state_dict.model'"),
    "DataParallel": Saved(prefixed("module."), "'module.' was removed from the names of the weights", 2),
    "torch.compile": Saved(prefixed("_orig_mod."), "'_orig_mod.' was removed from"),
    "Lightning": Saved(prefixed("model."), "'model.' was removed from"),
    "stacked prefixes": Saved(prefixed("module._orig_mod."), "'module._orig_mod.' was removed from"),
    "a compiled layer": Saved(
        every(lambda t: {key.replace("layers.1.", "layers.1._orig_mod."): v for key, v in t.items()}),
        "'_orig_mod.' was removed from",
    ),
    "float64": Saved(every(lambda t: {key: v.double() for key, v in t.items()}), "stored as float64 and loaded as", 2),
    "parameters": Saved(every(lambda t: {key: nn.Parameter(v) for key, v in t.items()})),
    "buffers": Saved(
        every(with_buffers),
        "buffers that the model computes itself were skipped: causal_mask, freqs_cis, layers.N.attention.cache_k, "
        "layers.N.attention.mask and 1 more",
        2,
    ),
    "consolidated.pth": Saved(renamed("consolidated.pth"), "read from consolidated.pth"),
    "consolidated.0.pth": Saved(unpadded, "read from consolidated.0.pth, consolidated.1.pth", shards=2),
    "consolidated.safetensors": Saved(as_safetensors("consolidated.safetensors"), "read from consolidated.safetensors"),
    "consolidated.00.safetensors": Saved(
        as_safetensors("consolidated.00.safetensors"), "read from consolidated.00.safetensors"
    ),
    "torch.save before 1.6": Saved(
        every(lambda t: t, _use_new_zipfile_serialization=False), "every rank reads whole files", 2
    ),
    "a byte order mark": Saved(params_text(lambda text: text.encode("utf-8-sig")), "byte-order mark was skipped"),
    "CRLF": Saved(params_text(lambda text: text.replace("\n", "\r\n").encode())),
    "UTF-16": Saved(params_text(lambda text: text.encode("utf-16")), "byte-order mark was skipped"),
    "numbers as text": Saved(
        numbers_as_text, "params.json: dim, multiple_of, n_heads, n_layers, norm_eps, vocab_size written as text"
    ),
    "keys of a run": Saved(
        params(**IGNORED, weight_tying=False, use_biases=False, rope_scaling_factor=None),
        "params.json: dropout, max_batch_size, max_seq_len, model_parallel_size, use_biases, use_kv_cache, "
        "weight_tying ignored",
    ),
}


def answer(folder: Path, **options: Any) -> tuple[list[list[int]], torch.Tensor]:
    """(ids generated greedily, logits of the prompt)."""
    llama = Llama.build(folder, max_seq_len=32, max_batch_size=1, device="cpu", **options)
    try:
        ids, _ = llama.generate([PROMPT], 12, temperature=0)
        return ids, llama.model.forward(torch.tensor([PROMPT]), 0)
    finally:
        llama.close()


@pytest.fixture
def copy(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    return lambda shards=1: Path(shutil.copytree(checkpoint("mha", shards), tmp_path / "saved"))


@pytest.mark.parametrize("name", SAVED)
def test_results_are_those_of_the_original_folder(
    name: str, copy: Callable[..., Path], checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    saved = SAVED[name]
    expected = answer(checkpoint("mha", saved.shards))
    folder = copy(saved.shards)
    saved.save(folder)
    capsys.readouterr()

    ids, logits = answer(folder)
    assert ids == expected[0] and torch.equal(logits, expected[1])
    *notes, last = capsys.readouterr().err.splitlines()
    assert last.startswith("llama: 0.2M parameters")
    assert len(notes) == bool(saved.note) and all(line.startswith("note: ") and saved.note in line for line in notes)

    call(verify, str(folder))
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("OK: ")
    assert [line for line in lines if line in notes] == notes, "verify prints the same notes"


@pytest.mark.parametrize("name", SAVED)
def test_convert_and_plan_accept_them_too(
    name: str, copy: Callable[..., Path], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    saved = SAVED[name]
    folder = copy(saved.shards)
    saved.save(folder)
    call(plan, str(folder))
    convert(folder, tmp_path / "out")
    found = torch.load(single(tmp_path / "out"), weights_only=True)
    expected = torch.load(single(checkpoint("mha")), weights_only=True)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert read_params(tmp_path / "out") == Checkpoint(checkpoint("mha")).params


def test_two_ranks_read_one_wrapped_file(checkpoint: Callable[..., Path], copy: Callable[..., Path]) -> None:
    folder = copy()
    every(lambda t: {"model": {f"module.{key}": value for key, value in t.items()}})(folder)
    assert run_ranks(2, ids_of, folder) == [answer(checkpoint("mha"))[0]] * 2


def ids_of(folder: Path) -> list[list[int]]:
    llama = Llama.build(folder, max_seq_len=32, max_batch_size=1, device="cpu")
    ids, _ = llama.generate([PROMPT], 12, temperature=0)
    llama.close()
    return ids


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_optimizer_is_mapped_and_not_read(copy: Callable[..., Path]) -> None:
    """The peak memory of a process that opens a file of 257 MB with 1 MB of weights."""
    folder = copy()
    every(lambda t: {"model": t, "optimizer": {"exp_avg": torch.ones(2**26)}})(folder)
    script = """if True:
        import re, sys
        from pathlib import Path
        from llama.checkpoint.shards import open_shard
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        before = peak()
        tensors = open_shard(Path(sys.argv[1])).tensors
        print(len(tensors), peak() - before)
    """
    command = [sys.executable, "-c", script, str(single(folder))]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    count, kilobytes = map(int, ended.stdout.split())
    assert count == 30 and kilobytes < 64_000


def test_mistrals_own_release(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """consolidated.safetensors next to a Hugging Face config.json, and params.json with hidden_dim and head_dim."""
    folder = Path(shutil.copytree(checkpoint("gqa"), tmp_path / "mistral"))
    expected = answer(folder)
    as_safetensors("consolidated.safetensors")(folder)
    (folder / "config.json").write_text('{"architectures": ["MistralForCausalLM"]}')
    width = Checkpoint(folder).params.hidden_dim
    written: dict[str, Any] = {"dim": 128, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "head_dim": 16}
    written |= {"hidden_dim": width, "norm_eps": 1e-6, "vocab_size": 512, "rope_theta": 10000.0, "sliding_window": 4096}
    (folder / "params.json").write_text(json.dumps(written))
    ids, logits = answer(folder)
    assert ids == expected[0] and torch.equal(logits, expected[1])
    assert not check_folder(folder).problems
    edit_params(folder, hidden_dim=width - 8)  # multiple_of would give the width above
    with pytest.raises(
        CheckpointError, match=r"safetensors does not match params.json as the only shard .*wrong shape"
    ):
        Llama.build(folder)
    edit_params(folder, hidden_dim=width)
    convert(folder, tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "meta")
    assert answer(tmp_path / "meta")[0] == expected[0]


def test_a_hugging_face_folder_with_a_stray_shard_is_recognized(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    with pytest.raises(ConvertError, match="names no architecture"):
        convert(tmp_path, tmp_path / "out")


# Refusals -----------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "two wrappers": (
        every(lambda t: {"model": t, "model_state_dict": t}),
        "the entries model and model_state_dict, both",
    ),
    "two prefixes": (
        every(lambda t: {(("a" in key and "model.") or "module.") + key: v for key, v in t.items()}),
        "holds names with different prefixes (",
    ),
    "a prefix on some": (
        every(lambda t: {key if key == "norm.weight" else f"module.{key}": v for key, v in t.items()}),
        "holds names with different prefixes (module.",
    ),
    "an unknown prefix": (prefixed("student."), "its names begin with 'student.', an unknown prefix"),
    "an unknown wrapper": (every(lambda t: {"weights": t}), "holds weights, expected plain tensors"),
    "wrappers without end": (
        every(lambda t: {"model": {"model": {"model": {"model": {"model": t}}}}}),
        "holds model, expected plain tensors",
    ),
    "a trainer's arguments": (
        every(lambda t: {"model": t, "args": argparse.Namespace(lr=1)}),
        "it was not loaded (argparse.Namespace); if you trust it, take the weights out of torch.load('",
    ),
    "a module": (every(lambda t: nn.Linear(2, 2)), "it was not loaded (torch.nn.modules.linear.Linear)"),
    "an unknown tensor": (every(lambda t: t | {"lora.weight": torch.ones(2)}), "unexpected: lora.weight"),
    "a bias called mask": (every(lambda t: t | {"maskless": torch.ones(2)}), "unexpected: maskless"),
    "an unknown key": (params(norm_type="layernorm"), "unknown key 'norm_type'"),
    "biases": (params(use_biases=True), "unknown key 'use_biases'"),
    "a text that is no number": (params(dim="many"), "dim is 'many', expected a positive integer"),
    "a wrong number as text": (params(n_layers="3.5"), "n_layers is 3.5, expected"),
    "two names for one number": (
        lambda folder: shutil.copy(single(folder), folder / "consolidated.pth"),
        "has the same number as",
    ),
    "two formats": (
        lambda folder: save_file(torch.load(single(folder)), folder / "consolidated.safetensors"),
        "has the same number as",
    ),
    "safetensors under another name": (
        lambda folder: save_file(torch.load(single(folder)), single(folder)),
        "is a safetensors file, not what torch.save writes: rename it to end in .safetensors",
    ),
    "a pickle called safetensors": (
        renamed("consolidated.safetensors"),
        "is a zip file, not a safetensors file: rename it to end in .pth",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_ambiguous_folders_are_refused(name: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    damage, expected = REFUSED[name]
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        Llama.build(folder, max_seq_len=8)
    line = str(caught.value)
    assert expected in line and "\n" not in line and "fetch it again" not in line
    faults = check_folder(folder).problems
    assert faults and not any("fetch it again" in fault for fault in faults)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("consolidated.safetensors", lambda content: content[:-100]),
        ("consolidated.safetensors", lambda content: content[:100]),
        ("consolidated.00.pth", lambda content: content[:-100]),
        ("consolidated.00.pth", lambda content: content[:60]),
    ],
)
def test_files_cut_short_without_sums(name: str, damage: Callable[[bytes], bytes], copy: Callable[..., Path]) -> None:
    folder = copy()
    if name.endswith("pth"):
        every(lambda t: t, _use_new_zipfile_serialization=False)(folder)
    else:
        as_safetensors(name)(folder)
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="fetch it again"):
        Llama.build(folder)
    (fault,) = check_folder(folder).problems
    assert fault.startswith(str(path)) and fault.endswith("fetch it again")


def test_files_without_sums_are_noted_and_checked_by_a_list(copy: Callable[..., Path]) -> None:
    folder = copy()
    as_safetensors("consolidated.safetensors")(folder)
    path = folder / "consolidated.safetensors"
    assert any("holds no checksums" in note for note in check_folder(folder).notes)
    write_checklist(folder)
    assert not any("checksums: only" in note for note in check_folder(folder).notes)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    (fault,) = check_folder(folder).problems
    assert fault.startswith(str(path)) and "does not match checklist.chk" in fault


@pytest.mark.parametrize("wrapped", [False, True])
def test_old_files_cannot_run_code(wrapped: bool, copy: Callable[..., Path], tmp_path: Path) -> None:
    folder, marker = copy(), tmp_path / "marker"
    every(
        lambda t: {"model": t, "extra": Bomb(marker)} if wrapped else t | {"extra": Bomb(marker)},
        _use_new_zipfile_serialization=not wrapped,
    )(folder)
    with pytest.raises(CheckpointError, match="could run code: it was not loaded"):
        Llama.build(folder)
    assert check_folder(folder).problems and not marker.exists()


def test_a_wrapper_that_holds_itself(copy: Callable[..., Path]) -> None:
    folder = copy()
    ring: dict[str, Any] = {}
    ring["model"] = ring
    torch.save(ring, single(folder))
    with pytest.raises(CheckpointError, match="holds model, expected plain tensors"):
        Llama.build(folder)


def test_safetensors_without_its_package(copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy()
    as_safetensors("consolidated.safetensors")(folder)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match=r"needs the Python package safetensors: pip install 'llama-runner"):
        Llama.build(folder)
