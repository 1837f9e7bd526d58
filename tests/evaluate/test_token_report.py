"""Token reports: the numbers, the texts of tokens, the table, the HTML."""

import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import plain
from helpers.report_reader import ReportReader
from helpers.vocabularies import byte_fallback_tokenizer
from llama import Llama
from llama.evaluate.html_report import html_report
from llama.evaluate.text_report import display_piece, level, summary, text_report, text_width
from llama.evaluate.token_report import TokenReport, inspect_tokens, token_texts

TEXT = "The licence of it"
HOSTILE = (
    '<script>alert("x")</script>&\' &amp; <!-- ]]> \x00\x07\x1b[31mred\x7f\x85\r\n\n\t  two '
    "\u202eevil\u202c \u200d\ufeff\u2028 漢字 é e\u0301 👩‍👧 \u05d0\u05d1 <span class='t'> {x} %s --"
)


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
    report = inspect_tokens(llama, ids, 7)
    first, *others = report["tokens"]
    assert first["top"] == [] and [first[key] for key in ("logprob", "percent", "rank", "entropy")] == [None] * 4
    ranks = set()
    for i, token in enumerate(others):  # the token after position i
        assert (token["position"], token["id"], token["generated"]) == (i + 1, ids[i + 1], False)
        assert token["piece"] == llama.tokenizer.decode_token(ids[i + 1])
        assert token["logprob"] == pytest.approx(logprobs[i, ids[i + 1]], abs=1e-4)
        assert token["percent"] == pytest.approx(100 * np.exp(logprobs[i, ids[i + 1]]), rel=1e-4)
        assert token["rank"] == order[i].tolist().index(ids[i + 1]) + 1
        assert token["entropy"] == pytest.approx(-(np.exp(logprobs[i]) * logprobs[i]).sum(), abs=1e-4)
        ranks.add(token["rank"])
    assert len(ranks) > 30
    for i, alternatives in enumerate([*(token["top"] for token in others), report["next"]]):
        best = order[i, :7].tolist()
        assert [alternative["id"] for alternative in alternatives] == best
        assert [alternative["logprob"] for alternative in alternatives] == pytest.approx(logprobs[i, best], abs=1e-4)
        for alternative in alternatives:
            assert alternative["piece"] == llama.tokenizer.decode_token(alternative["id"])
            assert alternative["percent"] == pytest.approx(100 * math.exp(alternative["logprob"]))
    # The most probable id after each prefix.
    assert [token["next"]["id"] for token in report["tokens"]] == order[:, 0].tolist()
    assert [token["next"] for token in report["tokens"]] == [*(token["top"][0] for token in others), report["next"][0]]


def test_ids_that_are_equally_probable_share_a_rank(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=16, plain=True)  # packed weights cannot be written to
    with torch.inference_mode():
        llama.model.output.weight.zero_()  # all 512 ids are equally probable
    (_, token) = inspect_tokens(llama, [1, 300])["tokens"]
    assert token["rank"] == 1
    assert token["logprob"] == pytest.approx(-math.log(512)) and token["entropy"] == pytest.approx(math.log(512))


def test_the_demo_predicts_what_its_forward_predicts_after_each_prefix(demo: Path) -> None:
    llama = Llama.build(demo, max_seq_len=32, max_batch_size=1, dtype="float32")
    ids = llama.tokenizer.encode("The most famous fruit is the", bos=False, eos=False)
    report = inspect_tokens(llama, ids, 3)
    predicted = [int(llama.model.forward(torch.tensor([ids[:n]]), 0)[0, -1].argmax()) for n in range(1, len(ids) + 1)]
    assert [token["next"]["id"] for token in report["tokens"]] == predicted
    assert [token["text"] for token in report["tokens"]] == ["The", " most", " famous", " fruit", " is", " the"]
    assert report["tokens"][4]["rank"] == 1 and report["tokens"][4]["id"] == predicted[3]  # "is"
    llama.close()


def test_ids_and_top_out_of_range(build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=4)
    assert len(inspect_tokens(llama, [1, 2, 3, 4], 512)["next"]) == 512
    for ids, top, message in (
        ([], 5, "the text is empty"),
        ([1] * 5, 5, "the text has 5 ids, but max_seq_len is 4"),
        ([512], 5, "holds id 512, outside the vocabulary of 512"),
        ([1], 513, "top is 513, but the vocabulary has 512 ids"),
        ([1], 0, "top is 0, expected an integer from 1"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect_tokens(llama, ids, top)


# The texts of tokens ------------------------------------------------------------------------------


def test_texts_joined_are_the_text(build: Callable[..., Llama], tmp_path: Path) -> None:
    llama = build("mha", max_seq_len=512)
    ids = llama.tokenizer.encode(HOSTILE, bos=True, eos=False)
    assert "".join(token_texts(llama.tokenizer, ids)) == llama.tokenizer.decode(ids) == HOSTILE
    rng = random.Random(5)
    for tokenizer in (llama.tokenizer, byte_fallback_tokenizer(tmp_path)):
        for _ in range(300):
            ids = [rng.randrange(tokenizer.n_words) for _ in range(rng.randint(1, 12))]
            assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_of_several_ids_is_in_the_text_of_the_last(build: Callable[..., Llama], tmp_path: Path) -> None:
    tokenizer = build("mha").tokenizer
    ids = tokenizer.encode("a漢b", bos=False, eos=False)
    assert token_texts(tokenizer, ids)[-4:] == ["", "", "漢", "b"]
    tokenizer = byte_fallback_tokenizer(tmp_path)  # it decodes bytes once the id after them is known
    text = "a漢a"
    ids = tokenizer.encode(text, bos=False, eos=False)
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == text and texts[-4:] == ["", "", "漢", "a"]


# The table and the HTML ---------------------------------------------------------------------------


def test_a_single_token_has_no_log_probability(build: Callable[..., Llama]) -> None:
    assert summary(inspect_tokens(build("mha"), [5])) == "1 token"


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_columns_are_straight_and_fit(columns: int, build: Callable[..., Llama]) -> None:
    llama = build("mha", max_seq_len=512)
    report = inspect_tokens(llama, llama.tokenizer.encode(HOSTILE, bos=True, eos=False), 30, generated=9)
    for token, piece in zip(
        report["tokens"], ["漢字" * 30, "e\u0301", "\u0301", "👩‍👧", "\u3000", " " * 50], strict=False
    ):
        token["piece"] = token["next"]["piece"] = piece
        token["top"] = [{**report["next"][0], "piece": piece}] * 4
    lines = text_report(report, columns, False)
    assert all(text_width(line) <= columns for line in lines)
    assert all(char == " " or char.isprintable() for line in lines for char in line)
    start = lines[0].index("expected here")
    for line in lines[1:]:
        cut = next(i for i in range(len(line) + 1) if text_width(line[:i]) >= start)
        assert text_width(line[:cut]) == start and line[cut - 2 : cut] == "  "
    coloured = text_report(report, columns, True)
    assert [re.sub(r"\033\[\d+m", "", line) for line in coloured] == lines


def test_white_space_and_control_characters_in_pieces_are_shown() -> None:
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
        assert display_piece(piece) == expected
    assert [text_width(text) for text in ("ab", "漢字", "e\u0301", "👍", "é", "ｱ")] == [2, 4, 1, 2, 1, 1]
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


def test_pieces_of_alternatives_are_escaped(build: Callable[..., Llama]) -> None:
    report: TokenReport = inspect_tokens(build("mha"), [1, 300, 301])
    for token in report["tokens"]:
        token["piece"], token["text"] = "</span><script>\"'&", ""  # a special id, shown by its name
        for alternative in (*token["top"], token["next"], *report["next"]):
            alternative["piece"] = "</bdi><img src='x' onerror=\"y\">\x1b\u202e&amp;"
    content = html_report(report, "</h1><b>&", 'a "summary" <i>')
    reader = ReportReader(content)
    assert not {tag for tag, _ in reader.used} & {"img", "script"}
    assert all("</bdi><img·src='x'·onerror=\"y\">␛<U+202E>&amp;" in card for card in reader.cards)
    assert "\x1b" not in content and "\u202e" not in content
    assert all(card.startswith("</span><script>\"'&") for card in reader.cards[:-1])
    assert reader.marks == [["</span><script>\"'&"]] * 3 + [["next?"]]
