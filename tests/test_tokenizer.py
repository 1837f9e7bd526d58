"""`Tokenizer`: SentencePiece models, and what all kinds of vocabulary have in common."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from golden.make_checkpoint import TOKENIZER
from helpers.paths import LLAMA2, LLAMA3, MISTRAL
from helpers.vocabularies import (
    byte_fallback_tokenizer,
    random_texts,
    streamed_text,
    write_byte_level_json,
    write_ranks,
)
from llama import Tokenizer
from llama.tokenizer import TokenizerError, find_tokenizer

SENTENCEPIECE = Tokenizer(TOKENIZER)
NOT_IN_THE_DEMO = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}
PER_EXAMPLE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_sentencepiece_ids() -> None:
    assert (SENTENCEPIECE.n_words, SENTENCEPIECE.bos_id, SENTENCEPIECE.eos_id) == (512, 1, 2)
    assert SENTENCEPIECE.pad_id == -1  # this tokenizer has no padding, like Meta's
    assert SENTENCEPIECE.stop_tokens == {2} and SENTENCEPIECE.adds_bos
    ids = SENTENCEPIECE.encode("The licence", bos=False, eos=False)
    assert SENTENCEPIECE.encode("The licence", bos=True, eos=True) == [1, *ids, 2]
    assert SENTENCEPIECE.encode("", bos=True, eos=False) == [1]


def test_special_text_stays_text() -> None:
    ids = SENTENCEPIECE.encode("<s> and </s>", bos=False, eos=False)
    assert not {1, 2} & set(ids)
    assert SENTENCEPIECE.decode(ids) == "<s> and </s>"


def test_single_tokens_keep_their_space() -> None:
    ids = SENTENCEPIECE.encode("the software is", bos=True, eos=False)
    assert "".join(map(SENTENCEPIECE.decode_token, ids)) == "<s> the software is"
    newline = SENTENCEPIECE.encode("\n", bos=False, eos=False)[-1]
    assert SENTENCEPIECE.decode_token(newline) == "\n"


@given(st.text())
@example("  two  spaces ")
@example("\u2581")
def test_sentencepiece_decodes_what_it_encoded(text: str) -> None:
    decoded = SENTENCEPIECE.decode(SENTENCEPIECE.encode(text, bos=True, eos=True))
    # SentencePiece writes a space as U+2581, so U+2581 in a text is decoded to a space.
    assert decoded == text.replace("\u2581", " ")


def test_llama2_ids() -> None:
    if not LLAMA2.exists():
        pytest.skip(f"Llama 2's tokenizer.model is not at {LLAMA2}")
    tokenizer = Tokenizer(LLAMA2)
    assert (tokenizer.kind, tokenizer.n_words, tokenizer.pad_id) == ("sentencepiece", 32000, -1)
    #                                                                     ▁Today ▁is ▁a ▁beautiful ▁day ▁to
    assert tokenizer.encode("Today is a beautiful day to", bos=False, eos=False) == [20628, 338, 263, 9560, 2462, 304]
    assert tokenizer.encode("Hello, ", bos=True, eos=False) == [1, 15043, 29892, 29871]


def test_mistral_ids_are_those_of_mistrals_package() -> None:
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    peer, tokenizer = SentencePieceTokenizer(str(MISTRAL)), Tokenizer(MISTRAL)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.n_words) == (peer.bos_id, peer.eos_id, peer.n_words)
    for text in random_texts(1000):
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert ids == peer.encode(text, bos=True, eos=True)
        assert tokenizer.decode(ids) == peer.decode(ids) == text


def test_encode_refuses_other_types() -> None:
    with pytest.raises(TypeError, match="must be a string, not int"):
        SENTENCEPIECE.encode(5, bos=True, eos=False)  # type: ignore[arg-type]  # the mistake under test


def test_tokenizers_are_found_in_the_folder_and_its_parent(tmp_path: Path) -> None:
    folder = tmp_path / "llama-2-7b"
    folder.mkdir()
    with pytest.raises(TokenizerError, match=r"no tokenizer.model or tokenizer.json in .* give --tokenizer_path"):
        find_tokenizer(folder)
    (tmp_path / "tokenizer.model").touch()
    assert find_tokenizer(folder) == tmp_path / "tokenizer.model"
    (folder / "tokenizer.json").touch()
    assert find_tokenizer(folder) == folder / "tokenizer.json"


@pytest.mark.parametrize("content", [b"", b"hello\n", b"<html>", b"\x80\x02", b"YQ== x\n"])
def test_a_file_of_no_known_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"expected a SentencePiece model, tiktoken ranks or a tokenizer\.json"):
        Tokenizer(path)


@pytest.fixture
def json_folder(tmp_path: Path) -> Path:
    return write_byte_level_json(tmp_path)


@pytest.fixture(scope="module")
def llama31() -> Tokenizer:
    return Tokenizer(LLAMA3, use_scaled_rope=True)


# Long texts ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sentencepiece", "tiktoken", "tokenizer.json"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "sentencepiece":
        return Tokenizer(MISTRAL)
    if request.param == "tiktoken":
        return request.getfixturevalue("llama31")
    return Tokenizer(request.getfixturevalue("demo") / "tokenizer.json")


@PER_EXAMPLE
@given(text=st.text())
@example(text="  leading and trailing  ")
@example(text="👩\u200d👩\u200d👧 <s></s><|im_end|>\x00\r\n")
def test_decode_inverts_encode(text: str, any_tokenizer: Tokenizer) -> None:
    if any_tokenizer.kind == "tokenizer.json":  # the demo model's, which has no token for some bytes
        text = "".join(character for character in text if not NOT_IN_THE_DEMO & set(character.encode()))
    with_ends = any_tokenizer.kind != "tiktoken"  # it decodes BOS and EOS to their names
    ids = any_tokenizer.encode(text, bos=any_tokenizer.adds_bos and with_ends, eos=with_ends)
    assert not any_tokenizer.stop_tokens & set(ids[:-1])
    if any_tokenizer.kind == "sentencepiece":
        text = text.replace("\u2581", " ")
    assert any_tokenizer.decode(ids) == streamed_text(any_tokenizer, ids) == text


@PER_EXAMPLE
@given(text=st.text())
@example(text="👩\u200d👩\u200d👧 \ufffd <s></s><|im_end|>\x00\r\n")
def test_the_bytes_of_ids_joined_are_the_text(text: str, any_tokenizer: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (any_tokenizer, byte_fallback_tokenizer(tmp_path)):
        ids = tokenizer.encode(text, bos=tokenizer.adds_bos, eos=tokenizer.eos_id >= 0)
        joined, decoded = b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace"), tokenizer.decode(ids)
        assert joined in (decoded, " " + decoded)  # some drop a leading space when they decode


def test_the_bytes_of_special_added_and_unnamed_ids(json_folder: Path, demo: Path) -> None:
    for tokenizer in (Tokenizer(json_folder / "tokenizer.json"), Tokenizer(demo / "tokenizer.json")):
        assert tokenizer.token_bytes(tokenizer.special_ids["<|im_end|>"]) == b""
    llama3 = Tokenizer(LLAMA3)
    assert llama3.token_bytes(llama3.eos_id) == b"<|end_of_text|>"  # as `decode` writes it
    mistral = Tokenizer(MISTRAL)
    assert [mistral.token_bytes(i) for i in (0, 1, 2, 3 + 0xE2)] == [" \u2047 ".encode(), b"", b"", b"\xe2"]
    config = json.loads((json_folder / "tokenizer_config.json").read_text())
    (json_folder / "tokenizer_config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    assert Tokenizer(json_folder / "tokenizer.json").token_bytes(299) == b""
    with pytest.raises(ValueError, match="id 300 is outside the vocabulary"):
        Tokenizer(json_folder / "tokenizer.json").token_bytes(300)


@pytest.mark.parametrize("character", ["a", " ", "7", "😀", "\n", "!"])
def test_100_000_equal_characters(any_tokenizer: Tokenizer, character: str) -> None:
    text = character * 100_000
    start = time.perf_counter()
    ids = any_tokenizer.encode(text, bos=False, eos=False)
    assert time.perf_counter() - start < 1
    assert any_tokenizer.decode(ids) == text


# tokenizer_config.json ----------------------------------------------------------------------------


@pytest.fixture
def configured(tmp_path: Path, json_folder: Path) -> Callable[..., Tokenizer]:
    """configured(kind, **keys): a tokenizer of this kind, with a tokenizer_config.json of these keys."""

    def make(kind: str, **keys: Any) -> Tokenizer:
        path = json_folder / ("tokenizer.json" if kind == "tokenizer.json" else "tokenizer.model")
        if kind == "sentencepiece":
            path.write_bytes(TOKENIZER.read_bytes())
        elif kind == "tiktoken":
            write_ranks(path)
        (json_folder / "tokenizer_config.json").write_text(json.dumps(keys))
        return Tokenizer(path)

    return make


KINDS = ("sentencepiece", "tiktoken", "tokenizer.json")


@pytest.mark.parametrize(("kind", "default"), list(zip(KINDS, ("llama2", "llama3", None), strict=True)))
def test_keys_of_this_project(configured: Callable[..., Tokenizer], kind: str, default: str | None) -> None:
    plain = configured(kind)
    assert (plain.kind, plain.chat_format, plain.default_system, plain.system_prefix) == (kind, default, None, "")
    keys: dict[str, Any] = {"chat_format": None, "default_system": "Be brief.", "system_prefix": "Date: today\n"}
    tokenizer = configured(kind, **keys)
    assert (tokenizer.chat_format, tokenizer.default_system, tokenizer.system_prefix) == tuple(keys.values())
    assert configured(kind, chat_format="chatml").chat_format == "chatml"


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_may_have_more_rows_than_there_are_ids(configured: Callable[..., Tokenizer], kind: str) -> None:
    own = configured(kind).n_words
    tokenizer = configured(kind, vocab_size=own + 7)
    assert tokenizer.n_words == own + 7
    ids = tokenizer.encode("a b", bos=False, eos=False)
    assert tokenizer.decode([own, *ids, own + 6]) == streamed_text(tokenizer, [own, *ids, own + 6]) == "a b"
    assert tokenizer.decode_token(own) == tokenizer.decode_token(own + 6) == ""
    assert configured(kind, vocab_size=own).n_words == own
    message = rf"says vocab_size {own - 1}, but ids of .* go up to {own - 1}: correct or remove the key"
    with pytest.raises(TokenizerError, match=message):
        configured(kind, vocab_size=own - 1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("chat_format", 5, r"tokenizer_config.json: chat_format is '5', expected str or null"),
        ("default_system", ["x"], r"default_system is .*, expected str or null"),
        ("system_prefix", None, r"system_prefix is 'None', expected str$"),
        ("vocab_size", True, r"vocab_size is 'True', expected int"),
        ("vocab_size", "9", r"vocab_size is '9', expected int"),
    ],
)
def test_keys_of_another_type(configured: Callable[..., Tokenizer], key: str, value: Any, message: str) -> None:
    for kind in KINDS:
        with pytest.raises(TokenizerError, match=message):
            configured(kind, **{key: value})


@pytest.mark.parametrize("content", ["{", "[]", '{"chat_format": "\xff'])
def test_a_broken_config_is_an_error(tmp_path: Path, content: str) -> None:
    path = write_ranks(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(TokenizerError, match=r"tokenizer_config.json cannot be read: "):
        Tokenizer(path)


# Packages and folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiktoken", "tokenizers"])
def test_a_missing_package_names_the_extra(json_folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = write_ranks(json_folder / "tokenizer.model") if kind == "tiktoken" else json_folder / "tokenizer.json"
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(TokenizerError, match=rf"needs the {kind} package: pip install 'llama-runner\[convert\]'"):
        Tokenizer(path)


def test_the_tokenizer_of_a_folder_is_used(build: Callable[..., object]) -> None:
    assert build("mha").tokenizer.n_words == 512  # type: ignore[attr-defined]  # a Llama
