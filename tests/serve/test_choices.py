"""`Choice` and `OffsetStream`: the place of each id in the text, and what a stream may send when."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from golden.make_checkpoint import TOKENIZER
from helpers.paths import LLAMA3, MISTRAL
from helpers.vocabularies import byte_fallback_tokenizer
from llama.engine.requests import Row, Token
from llama.engine.streaming import TextStream
from llama.serve.choices import Choice, OffsetStream, Scored
from llama.serve.logprobs import LOWEST, chat_logprobs, completion_logprobs, token_text
from llama.tokenizer import Tokenizer

PER_EXAMPLE = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.text(st.sampled_from(" \n ab\t.é€😀👩‍👩‍👧\ufffd") | st.characters(exclude_categories=["Cs"]), max_size=25)


@pytest.fixture(scope="module", params=["tok512", "mistral", "tiktoken", "byte fallback", "demo"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    paths = {"tok512": TOKENIZER, "mistral": MISTRAL, "tiktoken": LLAMA3}
    if request.param in paths:
        return Tokenizer(paths[request.param])
    if request.param == "demo":
        return Tokenizer(request.getfixturevalue("demo") / "tokenizer.json")
    return byte_fallback_tokenizer(tmp_path_factory.mktemp("byte-fallback"))


def row_of(prompt: list[int], k: int | None = 0) -> Row:
    row = Row(0, prompt, 10_000, 0, 1, 0, 1, set(), random.Random(0))
    row.k, row.prompt_top = k, [[] for _ in prompt]
    row.prompt_logprobs = [-float(i) for i in range(len(prompt))]
    return row


# Offsets ------------------------------------------------------------------------------------------


@PER_EXAMPLE
@given(text=TEXTS)
@example(text="a\ufffdb")
@example(text="👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag")
def test_offsets_in_a_text(text: str, tokenizer: Tokenizer) -> None:
    """Against the bytes of all ids: an id begins after the characters that are complete before its first byte."""
    ids = tokenizer.encode(text, bos=False, eos=False)
    stream = OffsetStream(tokenizer)
    for token in ids:
        stream.push(token)
    stream.finish()
    joined = b"".join(map(tokenizer.token_bytes, ids))
    if joined.decode(errors="ignore") != joined.decode(errors="replace"):
        return  # a vocabulary without some bytes: see the next test
    dropped = len(joined.decode()) - len(stream.text)  # the space before the first word
    assert joined.decode()[dropped:] == stream.text
    at, expected = 0, []
    for token in ids:
        expected.append(max(0, len(joined[:at].decode(errors="ignore")) - dropped))
        at += len(tokenizer.token_bytes(token))
    assert stream.starts == expected


@PER_EXAMPLE
@given(data=st.data())
def test_offsets_of_any_ids(data: st.DataObject, tokenizer: Tokenizer) -> None:
    """Partial characters, invalid UTF-8, special ids: wherever the text so far is final, the next id begins at its
    end."""
    some = st.integers(0, tokenizer.n_words - 1)
    low = st.integers(0, min(300, tokenizer.n_words - 1))  # where tokenizers keep bytes and special ids
    ids = data.draw(st.lists(some | low, max_size=30))
    stream = OffsetStream(tokenizer)
    for i, token in enumerate(ids):
        if stream.is_complete:
            assert stream.text == tokenizer.decode(ids[:i])
            expected = len(stream.text)
        else:
            expected = None
        stream.push(token)
        assert expected is None or stream.starts[-1] == expected, (ids, i)
    stream.finish()
    assert stream.text == tokenizer.decode(ids)
    assert stream.starts == sorted(stream.starts) and len(stream.starts) == len(ids)
    assert all(0 <= start <= len(stream.text) for start in stream.starts)


def test_an_id_after_a_broken_character_begins_after_it() -> None:
    tokenizer = Tokenizer(MISTRAL)
    byte = {value: 3 + value for value in range(256)}
    (letter,) = tokenizer.encode_infilling("a")
    for ids, text, starts in (
        ([byte[0xE2], byte[0x82], byte[0xAC], letter], "€a", [0, 0, 0, 1]),
        ([letter, byte[0xE2], letter], "a\ufffda", [0, 1, 2]),
        ([byte[0xE2], byte[0xE2], byte[0x82], byte[0xAC]], "\ufffd€", [0, 1, 1, 1]),
        ([byte[0xEF], byte[0xBF], byte[0xBD], letter], "\ufffda", [0, 0, 0, 1]),  # U+FFFD itself
        ([byte[0xE2], byte[0x82], letter], "\ufffd\ufffda", [0, 0, 2]),  # SentencePiece: one for each byte
    ):
        stream = OffsetStream(tokenizer)
        for token in ids:
            stream.push(token)
        stream.finish()
        assert (stream.text, stream.starts) == (text, starts)


# What a stream sends ------------------------------------------------------------------------------


def run(tokenizer: Tokenizer, ids: list[int], stop: list[str], prompt: list[int] | None, takes: Any) -> tuple[Any, ...]:
    """(text, scored, finish_reason, cut) of a choice whose text is taken after each id for which `takes` is true.

    prompt: an echoed prompt.
    """
    cuts: list[int] = []
    row = row_of(prompt or [7])
    text = OffsetStream(tokenizer, stop, prompt or ())
    choice = Choice(row, text, lambda _, n: cuts.append(n), prompt=prompt is not None)
    pieces, found, length = [], list[Scored](), 0
    for i, token in enumerate(ids):
        last = "length" if i == len(ids) - 1 else None
        choice.add(Token(0, token, -float(i), [(token, -float(i))], last))
        if takes(i) and choice.finish_reason is None:
            piece, scored = choice.take()
            length += len(piece)
            assert all(one.start <= length for one in scored)
            pieces.append(piece)
            found += scored
    if not ids:
        choice.add(Token(0, finish_reason="length"))
    piece, scored = choice.take()
    assert choice.completion_tokens == len(text.tokens)
    return "".join([*pieces, piece]), [*found, *scored], choice.finish_reason, cuts


@PER_EXAMPLE
@given(data=st.data())
def test_a_stream_joined_is_the_answer(data: st.DataObject, tokenizer: Tokenizer) -> None:
    """Text and ids sent piece by piece, joined, are those sent at once, for any ids and stop texts. The text and the
    number of ids are those of a plain `TextStream`, as `text_completion` uses it."""
    some = st.integers(0, tokenizer.n_words - 1)
    low = st.integers(0, min(300, tokenizer.n_words - 1))
    ids = data.draw(st.lists(some | low, max_size=25))
    prompt = data.draw(st.none() | st.lists(some | low, min_size=1, max_size=5))
    whole = tokenizer.decode(ids)
    begin = data.draw(st.integers(0, max(0, len(whole) - 1)))
    inside = whole[begin : begin + data.draw(st.integers(1, 4))]
    stop = data.draw(st.lists(st.just(inside or "x") | st.text(min_size=1, max_size=3), max_size=3))
    takes = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    at_once = run(tokenizer, ids, stop, prompt, lambda _: False)
    assert run(tokenizer, ids, stop, prompt, takes.__getitem__) == at_once
    text, scored, reason, cuts = at_once
    plain = TextStream(tokenizer, stop, prompt or ())
    for token in ids:
        plain.push(token)
        if plain.stopped:
            break
    plain.finish()
    assert text == plain.text and reason == ("stop" if plain.stopped else "length")
    assert cuts == ([len(plain.tokens)] if plain.stopped and ids else [])
    assert [one.id for one in scored] == [*(prompt or []), *plain.tokens]
    generated = scored[len(prompt or []) :]
    assert [one.logprob for one in generated] == [-float(i) for i in range(len(generated))]
    if prompt:
        assert [one.logprob for one in scored[: len(prompt)]] == [None, *(-float(i) for i in range(1, len(prompt)))]
    if generated:
        pieces = plain.pieces()
        assert generated[-1].text in (None, pieces[-1])


def test_text_that_may_change_is_not_sent_and_neither_are_its_ids() -> None:
    tokenizer = Tokenizer(MISTRAL)
    byte = [3 + value for value in "€".encode()]
    letters = [tokenizer.encode_infilling(c)[0] for c in "abc"]
    choice = Choice(row_of([7]), OffsetStream(tokenizer, ["bc"]), lambda *_: None)

    def add(token: int) -> tuple[str, list[int]]:
        choice.add(Token(0, token, -1.0, []))
        text, scored = choice.take()
        return text, [one.id for one in scored]

    assert [add(token) for token in byte] == [("", []), ("", []), ("€", byte)]
    assert add(letters[0]) == ("a", [letters[0]])
    assert add(letters[1]) == ("", [])  # "b" may begin the stop text
    assert add(letters[0]) == ("ba", [letters[1], letters[0]])
    assert add(letters[1]) == ("", [])
    assert add(letters[2]) == ("", []) and choice.finish_reason == "stop"


def test_an_id_that_ends_the_answer_is_reported_after_it() -> None:
    tokenizer, cuts = Tokenizer(MISTRAL), list[int]()
    (letter,) = tokenizer.encode_infilling("a")
    choice = Choice(row_of([7]), OffsetStream(tokenizer), lambda _, n: cuts.append(n), stop_ids={2})
    for token in (letter, 2, letter):  # the scheduler may be one step ahead
        choice.add(Token(0, token, -float(token), []))
    text, scored = choice.take()
    assert (text, choice.finish_reason, cuts, choice.completion_tokens) == ("a", "stop", [1], 1)
    assert [(one.id, one.start) for one in scored] == [(letter, 0), (2, 1)]


# OpenAI's forms -----------------------------------------------------------------------------------


def test_forms_of_ids_that_are_no_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(MISTRAL)
    (letter,) = tokenizer.encode_infilling("a")
    half, other = 3 + 0xE2, 3 + 0xC3
    scored = [
        Scored(1, None, [], 0),
        Scored(half, -0.5, [(half, -0.5), (other, -1.0)], 0),
        Scored(letter, -12345.0, [(2, -0.25)], 1, "cut"),
    ]
    assert completion_logprobs(scored, tokenizer) == {
        "tokens": ["<s>", "bytes:\\xe2", "cut"],
        "token_logprobs": [None, -0.5, LOWEST],
        "top_logprobs": [None, {"bytes:\\xe2": -0.5, "bytes:\\xc3": -1.0}, {"</s>": -0.25, "a": LOWEST}],
        "text_offset": [0, 0, 1],
    }
    content = chat_logprobs(scored[1:], tokenizer)["content"]
    assert content[0] == {
        "token": "\\xe2",
        "logprob": -0.5,
        "bytes": [0xE2],
        "top_logprobs": [
            {"token": "\\xe2", "logprob": -0.5, "bytes": [0xE2]},
            {"token": "\\xc3", "logprob": -1.0, "bytes": [0xC3]},
        ],
    }
    assert content[1]["token"] == "cut" and content[1]["bytes"] == list(b"cut")
    assert content[1]["top_logprobs"] == [{"token": "</s>", "logprob": -0.25, "bytes": []}]


def test_of_two_ids_with_the_same_text_the_more_probable_is_kept() -> None:
    """lm-evaluation-harness compares the id's log-probability with the largest one."""
    tokenizer = Tokenizer(MISTRAL)
    same = [i for i in range(tokenizer.n_words) if token_text(i, tokenizer) == "a"]
    assert len(same) == 2  # the piece, and the byte
    for order in (same, same[::-1]):
        scored = [Scored(order[1], -3.0, [(order[0], -0.5)])]
        assert completion_logprobs(scored, tokenizer)["top_logprobs"] == [{"a": -0.5}]
    assert not math.isfinite(-math.inf) and LOWEST == -9999.0
