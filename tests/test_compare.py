"""benchmarks/compare.py: all sides hold the same model (here a small random one), and a peer that crashes does not end
the comparison.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from golden.make_checkpoint import TOKENIZER
from helpers.paths import ROOT
from helpers.ranks import CONTEXT
from llama.parallel.groups import shutdown

sys.path.insert(0, str(ROOT / "benchmarks"))

import compare
import sides
from helpers.fake_sides import Faulty, fails_to_start

SHAPE: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "hidden_dim": 256, "vocab_size": 512}


@pytest.fixture
def forkserver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start peers from a forkserver that has torch already imported, which is quicker."""
    monkeypatch.setattr(sides, "START_METHOD", CONTEXT.get_start_method())


@pytest.mark.usefixtures("forkserver")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_all_sides_hold_the_same_model(tmp_path: Path, kind: str) -> None:
    """Meta, transformers, llama.cpp if installed, and our variants give the same ids, alone and in a ragged batch."""
    left_out = list[str]()
    sides.write_random(tmp_path / kind, TOKENIZER, SHAPE, kind)
    found = sides.sides_of(kind, tmp_path / kind, None, 4, left_out.append, no_failure)
    try:
        assert {"ours", "ours, plain", "Meta", "transformers"} <= {side.name for side in found}, left_out
        assert compare.check(found, kind, 512, no_failure) == found
        prompts = [compare.random_ids(n, 512, n) for n in (3, 9, 20)]
        batches = [side.ragged(prompts, 5) for side in found if side.name != "llama.cpp"]
        assert kind == "bfloat16" or all(batch == batches[0] for batch in batches)

        other = sides.in_meta_groups(tmp_path / kind, kind)
        assert isinstance(other, sides.Meta)
        with torch.inference_mode():
            other.model.output.weight.neg_()
        with pytest.raises(SystemExit, match="Meta continues like ours after 0 of"):
            compare.check([found[0], other], kind, 512, no_failure)
        shutdown()
    finally:
        for side in found:
            side.close()
            if isinstance(side, sides.Ours):
                side.llama.close()


def no_failure(name: str, reason: str) -> None:
    raise AssertionError(f"{name}: {reason}")


@pytest.fixture
def peer() -> Iterator[Callable[..., sides.Peer]]:
    """peer(name, make): a sides.Peer that is closed at the end."""
    made: list[sides.Peer] = []

    def make(*args: object) -> sides.Peer:
        made.append(sides.Peer(*args))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.usefixtures("forkserver")
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("SIGILL", "SIGILL"),
        ("SIGKILL", r"SIGKILL \(out of memory\?\)"),
        ("exit", "exit status 3"),
        ("MemoryError", "MemoryError"),
        ("CUDA | broken", r"RuntimeError: CUDA \| broken"),
    ],
)
def test_a_peer_that_fails_to_start(fault: str, reason: str) -> None:
    with pytest.raises(sides.PeerFailed, match=f"^{reason}$"):
        sides.Peer("Meta", partial(fails_to_start, fault))


def test_a_peer_that_is_not_installed() -> None:
    with pytest.raises(ImportError, match=r"^No module named 'fake'$"):
        sides.Peer("Meta", partial(fails_to_start, "ImportError"))


@pytest.mark.usefixtures("forkserver")
def test_after_an_exception_a_peer_answers_and_after_a_crash_not(
    tmp_path: Path, peer: Callable[..., sides.Peer]
) -> None:
    sides.write_random(tmp_path / "float32", TOKENIZER, SHAPE, "float32")
    arguments = ("Meta", tmp_path / "float32", tmp_path / "log")
    raises = peer("Meta", partial(Faulty, *arguments, "time_prefill", 1, "no luck"))
    with pytest.raises(sides.PeerFailed, match=r"^RuntimeError: no luck$"):
        raises.time_prefill([1, 2, 3])
    assert raises.time_prefill([1, 2, 3]) > 0

    crashes = peer("Meta", partial(Faulty, *arguments, "time_prefill", 1, "SIGILL"))
    with pytest.raises(sides.PeerFailed, match=r"^SIGILL$"):
        crashes.time_prefill([1, 2, 3])
    with pytest.raises(sides.PeerFailed, match=r"^had ended: SIGILL$"):
        crashes.time_prefill([1, 2, 3])


@pytest.mark.slow
@pytest.mark.usefixtures("forkserver", "built")  # built closes our own models
def test_a_crash_is_in_the_table_and_the_others_are_measured(
    tmp_path: Path,
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """llama.cpp dies of SIGILL in the last round of a case, transformers raises in a prefill, Meta does not fail."""
    log = tmp_path / "log"

    def peers(kind: str, folder: Path, gguf: Path | None) -> dict[str, Callable[[], sides.Side]]:
        return {
            "Meta": partial(Faulty, "Meta", folder, log, "none", 0, ""),
            "transformers": partial(Faulty, "transformers", folder, log, "time_prefill", 1, "no memory"),
            "llama.cpp": partial(Faulty, "llama.cpp", folder, log, "time_decode", 3, "SIGILL"),
        }

    monkeypatch.setattr(sides, "peers_of", peers)
    monkeypatch.setattr(compare, "FILE_TYPES", {"float32": sides.FILE_TYPES["float32"]})
    monkeypatch.setattr(compare, "measure_loading", lambda *_: [])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    asked = argparse.Namespace(
        ckpt_dir=checkpoint("mha"), gguf=None, random_1b=False, rounds=2, quick=True, out=tmp_path / "out", plot=None
    )
    compare.run(asked)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in (line.split("|") for line in table)}
    names = rows["case"]
    assert names == list(compare.COLUMNS)
    decode, prefill = rows["decode after 128, float32, tokens/s"], rows["prefill of 512, float32, ms"]
    assert decode[names.index("llama.cpp")] == "SIGILL"
    assert prefill[names.index("llama.cpp")] == "had ended: SIGILL"
    assert prefill[names.index("transformers")] == "RuntimeError: no memory"
    for row, name in ((decode, "Meta"), (decode, "transformers"), (prefill, "Meta"), (prefill, "ours")):
        assert row[names.index(name)][0].isdigit(), (name, row)

    cases = json.loads((tmp_path / "out").read_text())["cases"]
    assert cases[0]["failed"] == {"llama.cpp": "SIGILL"} and "llama.cpp" not in cases[0]["seconds"]
    assert len(cases[0]["seconds"]["Meta"]) == len(cases[0]["seconds"]["ours"]) == 2
    calls = [line.split()[0] for line in log.read_text().splitlines() if line.endswith("time_decode")]
    assert calls == ["Meta", "transformers", "llama.cpp"] * 3, "the sides alternate"


class Fixed(sides.Side):
    """Always returns the same id, or fails with `reason`."""

    def __init__(self, name: str, reason: str = ""):
        self.name, self.reason = name, reason

    def first(self, prompt: list[int], n: int) -> list[int]:
        if self.reason:
            raise sides.PeerFailed(self.reason)
        return [7] * n


def test_a_crash_in_the_check_leaves_the_others() -> None:
    found: list[sides.Side] = [Fixed("ours"), Fixed("Meta", "SIGILL"), Fixed("llama.cpp")]
    start = compare.Case("start, bfloat16", "s")
    assert compare.check(found, "bfloat16", 512, start.fail) == [found[0], found[2]]
    assert start.failed == {"Meta": "SIGILL"}


def test_a_crash_before_anything_is_measured_is_a_row() -> None:
    start = compare.Case("start, int8", "s")
    start.fail("llama.cpp", "RuntimeError: a | b")
    args = compare.ModelArgs(**SHAPE)
    assert compare.report([start], args).splitlines()[:3] == [
        "| case | llama.cpp |",
        "|---|---|",
        "| start, int8, s | RuntimeError: a \\| b |",
    ]
