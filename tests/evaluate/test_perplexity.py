"""Perplexity: compared with transformers' and with figures computed by hand; the command, and its mistakes."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.commands import Ended, call
from helpers.paths import GOLDEN
from helpers.ranks import run_ranks
from helpers.tolerance import logprob_sum
from llama import Llama
from llama.cli.perplexity import perplexity
from llama.evaluate.perplexity import score_text
from llama.evaluate.scoring import token_logprobs

TEXT = "The first sentence.\nA second one,\r\n with an é. \n"
KEYS = ["file", "tokens", "nll", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"]


@pytest.mark.slow
def test_thousands_of_tokens_of_the_demo_model(
    demo_float32: Path, tmp_path: Path, measured: Callable[[str, object], None]
) -> None:
    """Compared with transformers in float32, in the same windows (tests/golden/make_perplexity.py).

    Uses only the first lines of the text, because all of it takes a minute.
    """
    golden = json.loads((GOLDEN / "perplexity.json").read_text())
    lines = (GOLDEN / "text.txt").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "lines.txt").write_text("".join(lines[: golden["lines"]]), "utf-8")
    command = [sys.executable, "-m", "llama", "perplexity", str(tmp_path / "lines.txt"), "--json"]
    command += ["--ckpt_dir", str(demo_float32), "--max_seq_len", str(golden["max_seq_len"])]
    # Two threads, unlike other tests: this one computes long enough to profit.
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "2"}
    )
    ours, theirs = json.loads(done.stdout), golden["first_lines"]
    assert ours["tokens"] == theirs["tokens"] > 2_000
    apart = abs(ours["perplexity"] / theirs["perplexity"] - 1)
    measured(f"perplexity of {ours['tokens']:,} tokens of the demo model to transformers', relative", apart)
    within = logprob_sum(ours["tokens"])
    assert apart < math.expm1(within / ours["tokens"])  # 1.4e-6; torch's log_softmax alone would be 7e-6 off
    assert ours["nll"] == pytest.approx(theirs["nll"], rel=0, abs=within)


def test_figures_computed_by_hand(build: Callable[..., Llama]) -> None:
    llama = build("gqa", max_seq_len=128)
    ids = llama.tokenizer.encode(TEXT, bos=False, eos=False)
    nll = -sum(token_logprobs(llama, [ids])[0])
    found = score_text(llama, TEXT, ids, "some.txt")
    assert list(found) == KEYS and found["file"] == "some.txt" and found["tokens"] == len(ids)
    assert found["nll"] == pytest.approx(nll)
    assert found["perplexity"] == pytest.approx(math.exp(nll / len(ids)))
    # Words as the harness counts them: The, first, sentence., A, second, one,, with, an, é., and an empty one after the
    # last white space.
    assert len(TEXT.encode()) == 49
    assert math.log(found["word_perplexity"] or 0) == pytest.approx(nll / 10)
    assert math.log(found["byte_perplexity"] or 0) == pytest.approx(nll / 49)
    assert found["bits_per_byte"] == pytest.approx(nll / 49 / math.log(2))
    without = score_text(llama, TEXT, ids, "some.txt", bos=False)
    assert without["tokens"] == len(ids) - 1
    assert without["nll"] == pytest.approx(-sum(token_logprobs(llama, [ids], bos=False)[0]))


def test_overflow_is_none(build: Callable[..., Llama]) -> None:
    text = "x" * 2000  # one word, of 2,000 bytes
    llama = build("mha", max_seq_len=512)
    found = score_text(llama, text, llama.tokenizer.encode(text, bos=False, eos=False), "x")
    assert found["word_perplexity"] is None and found["nll"] > 800
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def on_a_rank(folder: Path, file: Path) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        call(perplexity, file, ckpt_dir=folder, json=True, max_seq_len=32, stride=9)
    return shown.getvalue()


def test_rank_0_reads_and_prints(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode() * 5)
    shown = []
    for world_size in (1, 2):
        first, *others = run_ranks(world_size, on_a_rank, checkpoint("gqa"), file)
        shown.append(json.loads(first))
        assert others == [""] * (world_size - 1)
    assert list(shown[0]) == KEYS and shown[0]["tokens"] > 100
    for key in KEYS[1:]:
        assert shown[1][key] == pytest.approx(shown[0][key], rel=1e-5)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "llama", "perplexity", *args], capture_output=True, text=True)


def test_several_files_in_a_table(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for name, text in (("a.txt", TEXT), ("with space.txt", "\ufeff" + TEXT * 2)):
        (tmp_path / name).write_bytes(text.encode())
    done = run(str(tmp_path / "a.txt"), str(tmp_path / "with space.txt"), "--ckpt_dir", str(checkpoint("mha")))
    head, first, second = done.stdout.splitlines()
    assert head.split() == ["file", "tokens", "perplexity", "word", "byte", "bits/byte"]
    assert first.startswith(str(tmp_path / "a.txt")) and second.startswith(str(tmp_path / "with space.txt"))
    assert len({len(line) for line in (head, first, second)}) == 1
    llama = Llama.build(checkpoint("mha"))
    for line, text in ((first, TEXT), (second, TEXT * 2)):
        expected = score_text(llama, text, llama.tokenizer.encode(text, bos=False, eos=False), "")
        tokens, *numbers = line.split(".txt")[1].split()
        assert int(tokens.replace(",", "")) == expected["tokens"]
        assert [float(number) for number in numbers] == pytest.approx(
            [
                expected["perplexity"],
                expected["word_perplexity"],
                expected["byte_perplexity"],
                expected["bits_per_byte"],
            ],
            rel=1e-3,
        )
    llama.close()


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        (b"", [], "is empty: there is nothing to score"),
        (b"\xef\xbb\xbf", [], "is empty: there is nothing to score"),
        (b"text \xff\xfe", [], "is not a UTF-8 text: byte 5 is 0xff"),
        (b"\x7fELF\0\0", [], "is not a text: byte 4 is NUL"),
        (b"a", ["--bos", "False"], "has one token, and no token before it to predict it from: give --bos True"),
        (b"text", ["--stride", "9", "--max_seq_len", "8"], "stride is 9, but a window has only max_seq_len 8 ids"),
        (b"text", ["--stride", "0"], "stride is 0, expected an integer from 1"),
        (b"text", ["--bos", "maybe"], "Invalid value for '--bos': 'maybe' is not one of 'true', 'false'."),
        (None, [], "does not exist: name a text file"),
        (b"text", ["."], "is a folder: name a text file"),
    ],
)
def test_mistakes_end_in_one_line(
    content: bytes | None, args: list[str], message: str, command: Callable[..., Ended], tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    ended = command("perplexity", str(file), *args)
    *before, last = ended.err.splitlines()
    assert ended.status == (2 if "Invalid value" in message else 1)
    assert ended.out == "" and last.startswith("error: ") and message in last
    assert all(line.startswith("llama: ") for line in before)  # what was loaded


def test_a_file_must_be_named(command: Callable[..., Ended]) -> None:
    assert command("perplexity") == (2, "", "error: Missing argument 'FILES...'.\n")
