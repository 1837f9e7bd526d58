"""`python -m llama inspect`: the numbers, the table, the JSON object, the page."""

import contextlib
import io
import json
import math
import os
import pty
import random
import re
import sys
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import plain
from helpers.commands import Ended, Keyboard
from helpers.ranks import run_ranks
from helpers.vocabularies import byte_fallback_tokenizer
from llama import Llama
from llama.console import visible
from llama.evaluate.html_report import TokenReport, html_report, level, percent_text, shown, width
from llama.evaluate.inspect import _texts, inspect_tokens, summary, table
from llama.evaluate.inspect import inspect as inspect_command

TEXT = "The licence of it"
HOSTILE = (
    '<script>alert("x")</script>&\' &amp; <!-- ]]> \x00\x07\x1b[31mred\x7f\x85\r\n\n\t  two '
    "\u202eevil\u202c \u200d\ufeff\u2028 漢字 é e\u0301 👩‍👧 \u05d0\u05d1 <span class='t'> {x} %s --"
)


@pytest.fixture
def inspect(command: Callable[..., Ended]) -> Callable[..., Ended]:
    """inspect(*words, stdin=""): the command in this process, on a seeded model."""
    return partial(command, "inspect")


# The numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mha", "llama31"])
def test_the_numbers_are_those_of_the_float64_forward(
    name: str, build: Callable[..., Llama], checkpoint: Callable[..., Path]
) -> None:
    llama = build(name, max_seq_len=64)
    rng = random.Random(3)
    ids = [1, *(rng.randrange(3, 512) for _ in range(63))]  # fills max_seq_len
    logits = plain.logits(*plain.load(checkpoint(name)), ids)  # [n, vocab]
    logprobs = logits - logits.max(-1, keepdims=True)
    logprobs -= np.log(np.exp(logprobs).sum(-1, keepdims=True))
    order = (-logits).argsort(-1)  # best first
    look = inspect_tokens(llama, ids, 7)
    first, *others = look["tokens"]
    assert first["top"] == [] and [first[key] for key in ("logprob", "percent", "rank", "entropy")] == [None] * 4
    ranks = set()
    for i, token in enumerate(others):  # what stands behind position i
        assert (token["position"], token["id"], token["generated"]) == (i + 1, ids[i + 1], False)
        assert token["piece"] == llama.tokenizer.decode_token(ids[i + 1])
        assert token["logprob"] == pytest.approx(logprobs[i, ids[i + 1]], abs=1e-4)
        assert token["percent"] == pytest.approx(100 * np.exp(logprobs[i, ids[i + 1]]), rel=1e-4)
        assert token["rank"] == order[i].tolist().index(ids[i + 1]) + 1
        assert token["entropy"] == pytest.approx(-(np.exp(logprobs[i]) * logprobs[i]).sum(), abs=1e-4)
        ranks.add(token["rank"])
    assert len(ranks) > 30
    for i, alternatives in enumerate([*(token["top"] for token in others), look["next"]]):
        best = order[i, :7].tolist()
        assert [alternative["id"] for alternative in alternatives] == best
        assert [alternative["logprob"] for alternative in alternatives] == pytest.approx(logprobs[i, best], abs=1e-4)
        for alternative in alternatives:
            assert alternative["piece"] == llama.tokenizer.decode_token(alternative["id"])
            assert alternative["percent"] == pytest.approx(100 * math.exp(alternative["logprob"]))
    # After each prefix the most probable id: above the one that does stand there.
    assert [token["next"]["id"] for token in look["tokens"]] == order[:, 0].tolist()
    assert [token["next"] for token in look["tokens"]] == [*(token["top"][0] for token in others), look["next"][0]]


def test_ids_that_are_equally_probable_share_a_rank(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=16, plain=True)  # packed weights cannot be written to
    with torch.inference_mode():
        llama.model.output.weight.zero_()  # all 512 are
    (_, token) = inspect_tokens(llama, [1, 300])["tokens"]
    assert token["rank"] == 1
    assert token["logprob"] == pytest.approx(-math.log(512)) and token["entropy"] == pytest.approx(math.log(512))


def test_the_demo_says_what_its_forward_says_after_each_prefix(demo: Path) -> None:
    llama = Llama.build(demo, max_seq_len=32, max_batch_size=1, dtype="float32")
    ids = llama.tokenizer.encode("The most famous fruit is the", bos=False, eos=False)
    look = inspect_tokens(llama, ids, 3)
    said = [int(llama.model.forward(torch.tensor([ids[:n]]), 0)[0, -1].argmax()) for n in range(1, len(ids) + 1)]
    assert [token["next"]["id"] for token in look["tokens"]] == said
    assert [token["text"] for token in look["tokens"]] == ["The", " most", " famous", " fruit", " is", " the"]
    assert look["tokens"][4]["rank"] == 1 and look["tokens"][4]["id"] == said[3]  # "is"
    llama.close()


def test_look_at_refuses_what_it_cannot_do(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=4)
    assert len(inspect_tokens(llama, [1, 2, 3, 4], 512)["next"]) == 512
    for ids, top, message in (
        ([], 5, "the text is empty"),
        ([1] * 5, 5, "the text has 5 ids, but max_seq_len is 4"),
        ([512], 5, "holds id 512, outside the vocabulary of 512"),
        ([1], 513, "top is 513, but the vocabulary has 512 ids"),
        ([1], 0, "top is 0, expected a whole number from 1"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect_tokens(llama, ids, top)


# The texts of tokens ------------------------------------------------------------------------------


def test_texts_joined_are_the_text(build: Callable[..., Llama], tmp_path: Path) -> None:
    llama = build("mha", max_seq_len=512)
    ids = llama.tokenizer.encode(HOSTILE, bos=True, eos=False)
    assert "".join(_texts(llama.tokenizer, ids)) == llama.tokenizer.decode(ids) == HOSTILE
    rng = random.Random(5)
    for tokenizer in (llama.tokenizer, byte_fallback_tokenizer(tmp_path)):
        for _ in range(300):
            ids = [rng.randrange(tokenizer.n_words) for _ in range(rng.randint(1, 12))]
            assert "".join(_texts(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_of_several_ids_comes_with_the_last(build: Callable[..., Llama], tmp_path: Path) -> None:
    tokenizer = build("mha").tokenizer
    ids = tokenizer.encode("a漢b", bos=False, eos=False)
    assert _texts(tokenizer, ids)[-4:] == ["", "", "漢", "b"]
    tokenizer = byte_fallback_tokenizer(tmp_path)  # which tells what bytes are when the next id has come
    text = "a漢a"
    ids = tokenizer.encode(text, bos=False, eos=False)
    texts = _texts(tokenizer, ids)
    assert "".join(texts) == text and texts[-4:] == ["", "", "漢", "a"]


# The command --------------------------------------------------------------------------------------


def read(ended: Ended) -> dict[str, Any]:
    """The one JSON object of a command's stdout."""
    assert ended.status == 0, ended.err
    assert ended.out.endswith("}\n") and ended.out.count("\n") == 1
    return json.loads(ended.out)


def test_json_is_what_look_at_gives(inspect: Callable[..., Ended], build: Callable[..., Llama]) -> None:
    llama = build("mha")
    ids = llama.tokenizer.encode(TEXT, bos=True, eos=False)
    for text, words in ((TEXT, {}), (HOSTILE, {"stdin": HOSTILE + "\n"})):
        ids = llama.tokenizer.encode(text, bos=True, eos=False)
        found = read(inspect(*([] if words else [text]), "--json", "--top", "3", **words))
        assert found == {"text": text, **inspect_tokens(llama, ids, 3)}
        assert "".join(token["text"] for token in found["tokens"]) == text
        assert len(found["next"]) == 3 and [token["id"] for token in found["tokens"]] == ids
    keys = ["position", "id", "piece", "text", "generated", "logprob", "percent", "rank", "entropy", "top", "next"]
    assert list(found["tokens"][0]) == keys


@pytest.mark.parametrize("text", ["1e3", "[1, 2]", "None", "-5", " 07 ", "{'a': 1}"])
def test_a_text_stays_the_text_it_is(text: str, inspect: Callable[..., Ended]) -> None:
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


def test_the_model_may_end_before_all_are_generated(
    inspect: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_bos_is_as_asked(inspect: Callable[..., Ended]) -> None:
    default, with_it, without = (
        read(inspect(TEXT, "--json", *words))["tokens"] for words in ([], ["--bos", "True"], ["--bos=False"])
    )
    assert default == with_it and with_it[0]["id"] == 1 and with_it[0]["text"] == ""
    assert [token["id"] for token in without] == [token["id"] for token in with_it[1:]]
    assert without[0]["logprob"] is None and with_it[1]["logprob"] is not None
    assert without[1]["logprob"] != with_it[2]["logprob"]


NOTHING = r'nothing to look at: give a text \("..."\), or pipe one in'


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], NOTHING),
        ([""], NOTHING),
        (["text", "--top", "0"], "top is 0, expected a whole number from 1"),
        (["text", "--top", "2.5"], "top is 2.5, expected a whole number"),
        (["text", "--generate", "-1"], "generate is -1, expected a whole number from 0"),
        (["text", "--bos", "maybe"], "bos is 'maybe', expected True or False"),
        (["text", "--html", "{tmp}"], "--html {tmp} is a folder: name a file"),
        (["text", "--html", "{tmp}/no/page.html"], "--html {tmp}/no/page.html: there is no folder {tmp}/no"),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(
    words: list[str], message: str, inspect: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Llama, "build", None)
    ended = inspect(*(word.replace("{tmp}", str(tmp_path)) for word in words), stdin=Keyboard())
    assert ended.status == 1 and ended.out == ""
    assert re.fullmatch(rf"error: {message.replace('{tmp}', re.escape(str(tmp_path)))}\n", ended.err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json"], NOTHING),  # an empty pipe
        (["text", "--top", "513"], "top is 513, but the vocabulary has 512 ids"),
        ([TEXT, "--max_seq_len", "4"], r"the text has \d+ tokens, but max_seq_len is 4: give --max_seq_len \d+"),
        (
            [TEXT, "--generate", "30", "--max_seq_len", "32"],
            r"the text has \d+ tokens and 30 to generate, but max_seq_len is 32: give --max_seq_len \d+",
        ),
    ],
)
def test_a_mistake_that_shows_later_is_one_line_too(
    words: list[str], message: str, inspect: Callable[..., Ended]
) -> None:
    ended = inspect(*words)
    assert ended.status == 1 and ended.out == ""
    assert re.fullmatch(rf"llama: .*\nerror: {message}\n", ended.err)


def test_the_length_that_the_message_names_is_enough(inspect: Callable[..., Ended]) -> None:
    ended = inspect(TEXT, "--generate", "30", "--max_seq_len", "32")
    needed = ended.err.split()[-1]
    found = read(inspect(TEXT, "--generate", "30", "--max_seq_len", needed, "--json"))
    assert len(found["tokens"]) == int(needed)
    assert inspect(TEXT, "--generate", "30", "--max_seq_len", str(int(needed) - 1)).status == 1


def printed(folder: Path, out: Path) -> tuple[str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        sys.stdin = io.StringIO(TEXT if os.environ["RANK"] == "0" else "")
        inspect_command(ckpt_dir=str(folder), generate=4, json=True, html=str(out))
    return stdout.getvalue(), stderr.getvalue()


def test_of_two_ranks_one_prints(
    checkpoint: Callable[..., Path], inspect: Callable[..., Ended], tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    (stdout, stderr), other = run_ranks(2, printed, checkpoint("mha", 2), out)
    assert other == ("", "")
    both, alone = json.loads(stdout), read(inspect(TEXT, "--generate", "4", "--json"))
    assert [token["id"] for token in both["tokens"]] == [token["id"] for token in alone["tokens"]]
    logprobs = [[token["logprob"] for token in found["tokens"][1:]] for found in (both, alone)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
    assert f"{out}: " in stderr and "".join(Reader(out.read_text(encoding="utf-8")).texts).startswith(TEXT)


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
        assert row[head.index("piece") :].startswith(shown(token["piece"]))
        assert row[head.index("next") :].startswith(shown(token["next"]["piece"]))
        if token["rank"] is not None:
            numbers = [f"{token['logprob']:.2f}", percent_text(token["percent"]), str(token["rank"])]
            assert row.split()[3:7] == [*numbers, f"{token['entropy']:.2f}"]
            best = token["top"][0]
            assert row[head.index("expected") :].startswith(f"{shown(best['piece'])} {best['percent']:.0f}%")
    assert last.split()[:2] == [str(len(rows)), "(next)"]
    assert last[head.index("expected") :].startswith(shown(found["next"][0]["piece"]))
    given = [token["logprob"] for token in found["tokens"] if not token["generated"] and token["logprob"] is not None]
    assert total == (
        f"{len(given) + 1} tokens: log-probability {sum(given):.3f}, "
        f"perplexity {math.exp(-sum(given) / len(given)):,.2f}; 3 generated tokens: log-probability "
        f"{sum(token['logprob'] for token in found['tokens'][-3:]):.3f}"
    )


def test_a_token_alone_has_no_sum(build: Callable[..., Llama]) -> None:
    assert summary(inspect_tokens(build("mha"), [5])) == "1 token"


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_columns_are_straight_and_fit(columns: int, build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=512)
    look = inspect_tokens(llama, llama.tokenizer.encode(HOSTILE, bos=True, eos=False), 30, generated=9)
    for token, piece in zip(
        look["tokens"], ["漢字" * 30, "e\u0301", "\u0301", "👩‍👧", "\u3000", " " * 50], strict=False
    ):
        token["piece"] = token["next"]["piece"] = piece
        token["top"] = [{**look["next"][0], "piece": piece}] * 4
    lines = table(look, columns, False)
    assert all(width(line) <= columns for line in lines)
    assert all(char == " " or char.isprintable() for line in lines for char in line)
    start = lines[0].index("expected here")
    for line in lines[1:]:
        cut = next(i for i in range(len(line) + 1) if width(line[:i]) >= start)
        assert width(line[:cut]) == start and line[cut - 2 : cut] == "  "
    coloured = table(look, columns, True)
    assert [re.sub(r"\033\[\d+m", "", line) for line in coloured] == lines


def test_pieces_show_what_is_in_them() -> None:
    for piece, expected in {
        " the": "·the",
        "\n\n": "⏎⏎",
        "\t": "⇥",
        "\x1b[31m": "␛[31m",
        "\u202e": "<U+202E>",
        "\xa0": "<U+00A0>",
        "\u0301": "<U+0301>",
        "é": "é",
        "漢": "漢",
        "": "",
    }.items():
        assert shown(piece) == expected
    assert [width(text) for text in ("ab", "漢字", "e\u0301", "👍", "é", "ｱ")] == [2, 4, 1, 2, 1, 1]
    assert [level(percent) for percent in (100, 50, 49.9, 10, 9, 1, 0.9, 0.1, 0.09, 0)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
    ]


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_sees_colours_unless_it_wants_none(
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
    assert all(width(line) <= 90 for line in plain_text.splitlines()[:-1])
    found = re.findall(r"\033\[(\d+)m([^\033]*)\033\[0m", out)  # a piece and its numbers, in turn
    assert bool(found) == (not no_color) == ("\033" in out)
    for (colour, _), (same, numbers) in zip(found[::2], found[1::2], strict=True):
        assert colour == same == str((32, 36, 33, 35, 31)[level(float(numbers.split()[1].replace("<", "")))])


# The page -----------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Checks that elements nest, and takes a page apart: the text of the tokens, their cards, classes, marks."""

    VOID = ("meta",)

    def __init__(self, content: str):
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, str]] = []
        self.used: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.cards: list[str] = []
        self.classes: list[list[str]] = []
        self.marks: list[list[str | None]] = []
        self.title = ""
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs)
        self.used.append((tag, given))
        kinds = (given.get("class") or "").split()
        if "t" in kinds:
            assert given["tabindex"] == "0" and self.open[-1][0] == "main"
            self.classes.append(kinds)
            self.texts.append("")
            self.cards.append("")
            self.marks.append([])
        if tag == "i":
            self.marks[-1].append(given["data-s"])
        if tag not in self.VOID:
            self.open.append((tag, "card" if "card" in kinds else "t" if "t" in kinds else ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        within = [kind for _, kind in self.open]
        if "card" in within:
            self.cards[-1] += data
        elif "t" in within:
            self.texts[-1] += data
        elif self.open and self.open[-1][0] == "main":
            raise AssertionError(f"text between tokens: {data!r}")
        elif self.open and self.open[-1][0] == "title":
            self.title += data


@pytest.mark.parametrize("text", [TEXT, HOSTILE, "\n\n  def f():\n\treturn 1\n"])
def test_the_page_reads_as_the_text(text: str, inspect: Callable[..., Ended], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    ended = inspect("--generate", "5", "--json", "--html", str(out), stdin=text + "\n")
    found = read(ended)
    content = out.read_bytes().decode("utf-8")
    assert re.search(rf"^{re.escape(str(out))}: [\d.]+ kB$", ended.err, re.M)
    read_page = Reader(content)
    tokens = found["tokens"]
    assert "".join(read_page.texts) == visible("".join(token["text"] for token in tokens))
    assert "".join(read_page.texts).startswith(visible(text))
    assert read_page.texts[:-1] == [visible(token["text"]) for token in tokens] and read_page.texts[-1] == ""
    assert [("g" in kinds) for kinds in read_page.classes] == [*(token["generated"] for token in tokens), False]
    levels = [next((int(kind[1]) for kind in kinds if kind[0] == "p"), None) for kinds in read_page.classes]
    percents = [token["percent"] for token in tokens]
    assert levels == [*(None if percent is None else level(percent) for percent in percents), None]
    for token, card, marks in zip(tokens, read_page.cards, read_page.marks, strict=False):
        assert card.startswith(f"{shown(token['piece'])} token {token['position']}, id {token['id']}")
        assert f"{shown(token['next']['piece'])} {percent_text(token['next']['percent'])}" in card
        for alternative in token["top"]:
            assert f"{shown(alternative['piece'])} {percent_text(alternative['percent'])}" in card
        if token["rank"] is not None:
            assert f"{percent_text(token['percent'])} %" in card and f"rank{token['rank']:,}" in card
            assert f"{token['logprob']:.3f}" in card and f"{token['entropy']:.2f} nats" in card
        # What has nothing to see has a mark.
        assert marks == (["⏎"] * token["text"].count("\n") if token["text"] else [shown(token["piece"])])
    for alternative in found["next"]:
        assert f"{shown(alternative['piece'])} {percent_text(alternative['percent'])}" in read_page.cards[-1]


def test_the_page_needs_nothing_and_runs_nothing(inspect: Callable[..., Ended], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    text = HOSTILE + ' onclick="x" src="http://a.b/c.js" url(x) @import <img src=x onerror=y>'
    tokens = read(inspect("--json", "--html", str(out), stdin=text))["tokens"]
    content = out.read_text(encoding="utf-8")
    read_page = Reader(content)
    assert {tag for tag, _ in read_page.used} == {
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
    names = {name for _, given in read_page.used for name in given}
    assert names == {"lang", "charset", "name", "content", "class", "tabindex", "translate", "data-s", "style"}
    styles = [given["style"] for _, given in read_page.used if "style" in given]
    assert styles and all(re.fullmatch(r"--w:[\d.]+%", style or "") for style in styles)
    head = content.split("<body>")[0]
    assert "http" not in head and "url(" not in head and "@import" not in head and "src" not in head
    assert all(char == "\n" or char == "\t" or char.isprintable() or char in "\u200d\ufeff" for char in content)
    assert not any(char in content for char in "\u202e\u202c\x1b\x00\r")
    assert '<html lang="en">' in head and '<meta charset="utf-8">' in head
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in head
    assert "prefers-color-scheme:dark" in head
    assert read_page.title.startswith("<script>alert") and len(read_page.title) < 120
    assert len(content.encode()) < 6000 + 1100 * len(tokens)


def test_pieces_of_alternatives_are_escaped(build: Callable[..., Llama]) -> None:
    look: TokenReport = inspect_tokens(build("mha"), [1, 300, 301])
    for token in look["tokens"]:
        token["piece"], token["text"] = "</span><script>\"'&", ""  # a special id, shown by its name
        for alternative in (*token["top"], token["next"], *look["next"]):
            alternative["piece"] = "</bdi><img src='x' onerror=\"y\">\x1b\u202e&amp;"
    content = html_report(look, "</h1><b>&", 'a "summary" <i>')
    read_page = Reader(content)
    assert not {tag for tag, _ in read_page.used} & {"img", "script"}
    assert all("</bdi><img·src='x'·onerror=\"y\">␛<U+202E>&amp;" in card for card in read_page.cards)
    assert "\x1b" not in content and "\u202e" not in content
    assert all(card.startswith("</span><script>\"'&") for card in read_page.cards[:-1])
    assert read_page.marks == [["</span><script>\"'&"]] * 3 + [["next?"]]


def test_a_table_and_a_page_go_together(inspect: Callable[..., Ended], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("an older one")
    ended = inspect(TEXT, "--html", str(out))
    assert ended.status == 0 and ended.out == inspect(TEXT).out
    assert "".join(Reader(out.read_text(encoding="utf-8")).texts) == TEXT
    assert "generated" not in out.read_text(encoding="utf-8")
