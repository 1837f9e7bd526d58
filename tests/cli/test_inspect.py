"""`llama inspect`: the table, the JSON object, the HTML file, and error messages."""

import contextlib
import io
import json
import math
import os
import pty
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import Ended, Keyboard, call
from helpers.ranks import run_ranks
from helpers.report_reader import ReportReader
from llama import Llama
from llama.cli.inspect import inspect as inspect_command
from llama.console import visible
from llama.evaluate.text_report import display_piece, level, percent_text, text_width
from llama.evaluate.token_report import inspect_tokens

TEXT = "The licence of it"
HOSTILE = (
    '<script>alert("x")</script>&\' &amp; <!-- ]]> \x00\x07\x1b[31mred\x7f\x85\r\n\n\t  two '
    "\u202eevil\u202c \u200d\ufeff\u2028 漢字 é e\u0301 👩‍👧 \u05d0\u05d1 <span class='t'> {x} %s --"
)


@pytest.fixture
def inspect(command: Callable[..., Ended]) -> Callable[..., Ended]:
    """inspect(*args, stdin=""): the command in this process, on a seeded model."""
    return partial(command, "inspect")


def read(ended: Ended) -> dict[str, Any]:
    """The one JSON object of a command's stdout."""
    assert ended.status == 0, ended.err
    assert ended.out.endswith("}\n") and ended.out.count("\n") == 1
    return json.loads(ended.out)


def test_json_is_the_token_report(inspect: Callable[..., Ended], build: Callable[..., Llama]) -> None:
    llama = build("mha")
    ids = llama.tokenizer.encode(TEXT, bos=True, eos=False)
    for text, args in ((TEXT, {}), (HOSTILE, {"stdin": HOSTILE + "\n"})):
        ids = llama.tokenizer.encode(text, bos=True, eos=False)
        found = read(inspect(*([] if args else [text]), "--json", "--top", "3", **args))
        assert found == {"text": text, **inspect_tokens(llama, ids, 3)}
        assert "".join(token["text"] for token in found["tokens"]) == text
        assert len(found["next"]) == 3 and [token["id"] for token in found["tokens"]] == ids
    keys = ["position", "id", "piece", "text", "generated", "logprob", "percent", "rank", "entropy", "top", "next"]
    assert list(found["tokens"][0]) == keys


@pytest.mark.parametrize("text", ["1e3", "[1, 2]", "None", "-5", " 07 ", "{'a': 1}"])
def test_a_text_is_never_parsed(text: str, inspect: Callable[..., Ended]) -> None:
    assert read(inspect(text, "--json"))["text"] == text
    assert "".join(token["text"] for token in read(inspect("--json", stdin=text))["tokens"]) == text


def test_generated_tokens_are_those_of_generate(inspect: Callable[..., Ended], build: Callable[..., Llama]) -> None:
    llama = build("mha")
    ids = llama.tokenizer.encode(TEXT, bos=True, eos=False)
    (row,), scores = llama.generate([ids], 12, temperature=0, logprobs=True, echo=True)
    found = read(inspect(TEXT, "--generate", "12", "--json"))
    assert found["text"] == TEXT
    assert [token["id"] for token in found["tokens"]] == row and len(row) == len(ids) + 12
    assert [token["generated"] for token in found["tokens"]] == [False] * len(ids) + [True] * 12
    assert scores is not None
    assert [token["logprob"] for token in found["tokens"][1:]] == pytest.approx(scores[0][1:], abs=1e-4)
    assert all(token["rank"] == 1 and token["id"] == token["top"][0]["id"] for token in found["tokens"][len(ids) :])
    last = read(inspect(TEXT, "--generate", "13", "--json"))["tokens"][-1]
    assert last["id"] == found["next"][0]["id"]


def test_a_stop_token_ends_the_generated_tokens(inspect: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = read(inspect(TEXT, "--generate", "6", "--json"))["tokens"]
    given = sum(not token["generated"] for token in tokens)
    stop = tokens[given + 1]["id"]
    assert stop != tokens[given]["id"]
    build = Llama.build

    def stopping(*args: Any, **kwargs: Any) -> Llama:
        llama = build(*args, **kwargs)
        llama.tokenizer.stop_tokens = {stop}
        return llama

    monkeypatch.setattr(Llama, "build", staticmethod(stopping))
    found = read(inspect(TEXT, "--generate", "6", "--json"))
    assert [token["id"] for token in found["tokens"]] == [token["id"] for token in tokens[: given + 1]]
    assert found["next"][0]["id"] == stop


def test_bos(inspect: Callable[..., Ended]) -> None:
    default, with_it, without = (
        read(inspect(TEXT, "--json", *args))["tokens"] for args in ([], ["--bos", "True"], ["--bos=False"])
    )
    assert default == with_it and with_it[0]["id"] == 1 and with_it[0]["text"] == ""
    assert [token["id"] for token in without] == [token["id"] for token in with_it[1:]]
    assert without[0]["logprob"] is None and with_it[1]["logprob"] is not None
    assert without[1]["logprob"] != with_it[2]["logprob"]


NO_TEXT = r'no text to inspect: give one \("..."\), or pipe one in'


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], NO_TEXT),
        ([""], NO_TEXT),
        (["text", "--top", "0"], "top is 0, expected an integer from 1"),
        (["text", "--top", "2.5"], "Invalid value for '--top': '2.5' is not a valid integer."),
        (["text", "--generate", "-1"], "generate is -1, expected an integer from 0"),
        (["text", "--bos", "maybe"], "Invalid value for '--bos': 'maybe' is not one of 'true', 'false'."),
        (["text", "--html", "{tmp}"], "--html {tmp} is a folder: name a file"),
        (["text", "--html", "{tmp}/no/report.html"], "--html {tmp}/no/report.html: there is no folder {tmp}/no"),
    ],
)
def test_mistakes_found_before_the_model_is_loaded(
    args: list[str], message: str, inspect: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Llama, "build", None)
    ended = inspect(*(word.replace("{tmp}", str(tmp_path)) for word in args), stdin=Keyboard())
    assert ended.status == (2 if message.startswith("Invalid value") else 1) and ended.out == ""
    assert re.fullmatch(rf"error: {message.replace('{tmp}', re.escape(str(tmp_path)))}\n", ended.err)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--json"], NO_TEXT),  # an empty pipe
        (["text", "--top", "513"], "top is 513, but the vocabulary has 512 ids"),
        ([TEXT, "--max_seq_len", "4"], r"the text has \d+ tokens, but max_seq_len is 4: give --max_seq_len \d+"),
        (
            [TEXT, "--generate", "30", "--max_seq_len", "32"],
            r"the text has \d+ tokens and 30 to generate, but max_seq_len is 32: give --max_seq_len \d+",
        ),
    ],
)
def test_mistakes_found_after_the_model_is_loaded(args: list[str], message: str, inspect: Callable[..., Ended]) -> None:
    ended = inspect(*args)
    assert ended.status == 1 and ended.out == ""
    assert re.fullmatch(rf"llama: .*\nerror: {message}\n", ended.err)


def test_the_suggested_max_seq_len_is_the_smallest_that_fits(inspect: Callable[..., Ended]) -> None:
    ended = inspect(TEXT, "--generate", "30", "--max_seq_len", "32")
    needed = ended.err.split()[-1]
    found = read(inspect(TEXT, "--generate", "30", "--max_seq_len", needed, "--json"))
    assert len(found["tokens"]) == int(needed)
    assert inspect(TEXT, "--generate", "30", "--max_seq_len", str(int(needed) - 1)).status == 1


def printed(folder: Path, out: Path) -> tuple[str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        sys.stdin = io.StringIO(TEXT if os.environ["RANK"] == "0" else "")
        call(inspect_command, ckpt_dir=folder, generate=4, json=True, html=out)
    return stdout.getvalue(), stderr.getvalue()


def test_of_two_ranks_one_prints(
    checkpoint: Callable[..., Path], inspect: Callable[..., Ended], tmp_path: Path
) -> None:
    out = tmp_path / "report.html"
    (stdout, stderr), other = run_ranks(2, printed, checkpoint("mha", 2), out)
    assert other == ("", "")
    both, alone = json.loads(stdout), read(inspect(TEXT, "--generate", "4", "--json"))
    assert [token["id"] for token in both["tokens"]] == [token["id"] for token in alone["tokens"]]
    logprobs = [[token["logprob"] for token in found["tokens"][1:]] for found in (both, alone)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
    assert f"{out}: " in stderr and "".join(ReportReader(out.read_text(encoding="utf-8")).texts).startswith(TEXT)


# The table ----------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_token(inspect: Callable[..., Ended]) -> None:
    found = read(inspect(TEXT, "--generate", "3", "--json"))
    ended = inspect(TEXT, "--generate", "3")
    head, *rows, last, total = ended.out.splitlines()
    assert re.fullmatch(r" +#  +id  piece +logprob  +% +rank +entropy  next +expected here", head)
    assert "\033" not in ended.out and len(rows) == len(found["tokens"])
    for row, token in zip(rows, found["tokens"], strict=True):
        assert row.split()[:3] == [
            "+" * token["generated"] + str(token["position"]),
            str(token["id"]),
            *row.split()[2:3],
        ]
        assert row[head.index("piece") :].startswith(display_piece(token["piece"]))
        assert row[head.index("next") :].startswith(display_piece(token["next"]["piece"]))
        if token["rank"] is not None:
            numbers = [f"{token['logprob']:.2f}", percent_text(token["percent"]), str(token["rank"])]
            assert row.split()[3:7] == [*numbers, f"{token['entropy']:.2f}"]
            best = token["top"][0]
            assert row[head.index("expected") :].startswith(f"{display_piece(best['piece'])} {best['percent']:.0f}%")
    assert last.split()[:2] == [str(len(rows)), "(next)"]
    assert last[head.index("expected") :].startswith(display_piece(found["next"][0]["piece"]))
    given = [token["logprob"] for token in found["tokens"] if not token["generated"] and token["logprob"] is not None]
    assert total == (
        f"{len(given) + 1} tokens: log-probability {sum(given):.3f}, "
        f"perplexity {math.exp(-sum(given) / len(given)):,.2f}; 3 generated tokens: log-probability "
        f"{sum(token['logprob'] for token in found['tokens'][-3:]):.3f}"
    )


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colours_on_a_terminal_unless_no_color_is_set(
    no_color: str, inspect: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setenv("NO_COLOR", no_color)
    plain_text = inspect(TEXT).out
    master, device = pty.openpty()
    with open(device, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert inspect(TEXT).status == 0
        out = os.read(master, 65536).decode().replace("\r\n", "\n")
    os.close(master)
    assert re.sub(r"\033\[\d+m", "", out) == plain_text and "\033" not in plain_text
    assert all(text_width(line) <= 90 for line in plain_text.splitlines()[:-1])
    found = re.findall(r"\033\[(\d+)m([^\033]*)\033\[0m", out)  # alternately a piece and its numbers
    assert bool(found) == (not no_color) == ("\033" in out)
    for (colour, _), (same, numbers) in zip(found[::2], found[1::2], strict=True):
        assert colour == same == str((32, 36, 33, 35, 31)[level(float(numbers.split()[1].replace("<", "")))])


# The HTML file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [TEXT, HOSTILE, "\n\n  def f():\n\treturn 1\n"])
def test_the_html_reads_as_the_text(text: str, inspect: Callable[..., Ended], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    ended = inspect("--generate", "5", "--json", "--html", str(out), stdin=text + "\n")
    found = read(ended)
    content = out.read_bytes().decode("utf-8")
    assert re.search(rf"^{re.escape(str(out))}: [\d.]+ kB$", ended.err, re.M)
    reader = ReportReader(content)
    tokens = found["tokens"]
    assert "".join(reader.texts) == visible("".join(token["text"] for token in tokens))
    assert "".join(reader.texts).startswith(visible(text))
    assert reader.texts[:-1] == [visible(token["text"]) for token in tokens] and reader.texts[-1] == ""
    assert [("g" in kinds) for kinds in reader.classes] == [*(token["generated"] for token in tokens), False]
    levels = [next((int(kind[1]) for kind in kinds if kind[0] == "p"), None) for kinds in reader.classes]
    percents = [token["percent"] for token in tokens]
    assert levels == [*(None if percent is None else level(percent) for percent in percents), None]
    for token, card, marks in zip(tokens, reader.cards, reader.marks, strict=False):
        assert card.startswith(f"{display_piece(token['piece'])} token {token['position']}, id {token['id']}")
        assert f"{display_piece(token['next']['piece'])} {percent_text(token['next']['percent'])}" in card
        for alternative in token["top"]:
            assert f"{display_piece(alternative['piece'])} {percent_text(alternative['percent'])}" in card
        if token["rank"] is not None:
            assert f"{percent_text(token['percent'])} %" in card and f"rank{token['rank']:,}" in card
            assert f"{token['logprob']:.3f}" in card and f"{token['entropy']:.2f} nats" in card
        # Line breaks and tokens without text have a mark.
        assert marks == (["⏎"] * token["text"].count("\n") if token["text"] else [display_piece(token["piece"])])
    for alternative in found["next"]:
        assert f"{display_piece(alternative['piece'])} {percent_text(alternative['percent'])}" in reader.cards[-1]


def test_the_html_loads_nothing_and_runs_nothing(inspect: Callable[..., Ended], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    text = HOSTILE + ' onclick="x" src="http://a.b/c.js" url(x) @import <img src=x onerror=y>'
    tokens = read(inspect("--json", "--html", str(out), stdin=text))["tokens"]
    content = out.read_text(encoding="utf-8")
    reader = ReportReader(content)
    assert {tag for tag, _ in reader.used} == {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "h1",
        "p",
        "span",
        "main",
        "i",
        "b",
        "bdi",
    }
    names = {name for _, given in reader.used for name in given}
    assert names == {"lang", "charset", "name", "content", "class", "tabindex", "translate", "data-s", "style"}
    styles = [given["style"] for _, given in reader.used if "style" in given]
    assert styles and all(re.fullmatch(r"--w:[\d.]+%", style or "") for style in styles)
    head = content.split("<body>")[0]
    assert "http" not in head and "url(" not in head and "@import" not in head and "src" not in head
    assert all(char == "\n" or char == "\t" or char.isprintable() or char in "\u200d\ufeff" for char in content)
    assert not any(char in content for char in "\u202e\u202c\x1b\x00\r")
    assert '<html lang="en">' in head and '<meta charset="utf-8">' in head
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in head
    assert "prefers-color-scheme:dark" in head
    assert reader.title.startswith("<script>alert") and len(reader.title) < 120
    assert len(content.encode()) < 6000 + 1100 * len(tokens)


def test_table_and_html_together(inspect: Callable[..., Ended], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("an older one")
    ended = inspect(TEXT, "--html", str(out))
    assert ended.status == 0 and ended.out == inspect(TEXT).out
    assert "".join(ReportReader(out.read_text(encoding="utf-8")).texts) == TEXT
    assert "generated" not in out.read_text(encoding="utf-8")
