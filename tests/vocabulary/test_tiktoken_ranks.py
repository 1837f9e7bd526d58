"""tiktoken ranks, the vocabulary of Llama 3."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from helpers.paths import LLAMA3
from helpers.vocabularies import random_texts, streamed_text, write_byte_level_json, write_ranks
from llama import Tokenizer
from llama.tokenizer import TokenizerError
from llama.vocabulary.tiktoken_ranks import LLAMA3_SPLIT, RANKS_LIMIT, read_ranks

PER_EXAMPLE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    return Tokenizer(LLAMA3)


@pytest.fixture(scope="module")
def llama31() -> Tokenizer:
    return Tokenizer(LLAMA3, use_scaled_rope=True)


def test_special_ids_of_llama3(llama3: Tokenizer, llama31: Tokenizer) -> None:
    for tokenizer in (llama3, llama31):
        assert (tokenizer.kind, tokenizer.n_words, tokenizer.chat_format) == ("tiktoken", 128256, "llama3")
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (128000, 128001, -1)
        assert tokenizer.adds_bos and not tokenizer.rstrip_ids and tokenizer.system_prefix == ""
        assert sorted(tokenizer.special_ids.values()) == list(range(128000, 128256))
        named = [tokenizer.special_ids[f"<|{name}|>"] for name in ("start_header_id", "end_header_id", "eot_id")]
        assert named == [128006, 128007, 128009]
    names, names31 = ({i: name for name, i in t.special_ids.items()} for t in (llama3, llama31))
    assert [names[i] for i in (128002, 128005, 128008, 128010, 128255)] == [
        f"<|reserved_special_token_{i}|>" for i in (0, 3, 4, 5, 250)
    ]
    assert [names31[i] for i in (128004, 128008, 128010)] == [
        "<|finetune_right_pad_id|>",
        "<|eom_id|>",
        "<|python_tag|>",
    ]
    assert llama3.stop_tokens == {128001, 128009}  # 128008 is reserved there
    assert llama31.stop_tokens == {128001, 128008, 128009}


def test_llama3_ids_are_those_of_metas_package(llama31: Tokenizer) -> None:
    from llama_models.llama3.tokenizer import Tokenizer as Peer

    peer = Peer(LLAMA3)
    assert llama31.special_ids == peer.special_tokens
    assert llama31.n_words == peer.n_words and llama31.stop_tokens == set(peer.stop_tokens)
    for text in [*random_texts(3000), "x" * 24_000, " " * 24_000]:
        ids = llama31.encode(text, bos=True, eos=True)
        assert ids == peer.encode(text, bos=True, eos=True)
        assert llama31.decode(ids) == peer.decode(ids) == f"<|begin_of_text|>{text}<|end_of_text|>"
    assert llama31.encode("Hello, world!", bos=True, eos=False) == [128000, 9906, 11, 1917, 0]


def test_allowed_special(llama31: Tokenizer, json_folder: Path) -> None:
    from llama_models.llama3.tokenizer import Tokenizer as Peer

    text = "<|start_header_id|>user<|end_header_id|>\n\nHi  <|eot_id|><|eot_id|> <|eot_i"
    theirs = Peer(LLAMA3)
    for allowed in ("all", {"<|eot_id|>"}, set[str]()):
        expected = theirs.encode(text, bos=True, eos=True, allowed_special=allowed, disallowed_special=set())
        assert llama31.encode(text, bos=True, eos=True, allowed_special=allowed) == expected
    assert llama31.encode(text, bos=True, eos=True) == expected  # none by default
    with pytest.raises(
        ValueError, match="allowed_special names '<|x|>', which is not a special token".replace("|", r"\|")
    ):
        llama31.encode(text, bos=False, eos=False, allowed_special={"<|x|>"})
    ours = Tokenizer(json_folder / "tokenizer.json")
    a = ours.encode("a", bos=False, eos=False)
    assert ours.encode("<|im_start|>a<|im_end|>", bos=False, eos=False, allowed_special="all") == [257, *a, 258]


@PER_EXAMPLE
@given(text=st.text())
@example(text="\u2581 ")
@example(text="<|eot_id|><|begin_of_text|>")
def test_ranks_decode_what_they_encoded(text: str, llama31: Tokenizer) -> None:
    ids = llama31.encode(text, bos=False, eos=False)
    assert max(ids, default=0) < 128000
    assert llama31.decode(ids) == streamed_text(llama31, ids) == text


@PER_EXAMPLE
@given(data=st.data())
def test_streamed_pieces_of_any_ranks_are_the_decoded_text(data: st.DataObject, llama31: Tokenizer) -> None:
    """Also for incomplete characters, and for characters that end in the middle of an id."""
    bytes_ = st.integers(0, 255)  # the first ranks are the bytes
    ids = data.draw(st.lists(bytes_ | st.integers(0, 128_255), max_size=30))
    assert streamed_text(llama31, ids) == llama31.decode(ids)


def test_single_ranks(llama31: Tokenizer) -> None:
    assert [llama31.decode_token(i) for i in (9906, 1917, 128009)] == ["Hello", " world", "<|eot_id|>"]
    half = llama31.encode("\U0001f9a9", bos=False, eos=False)[0]
    assert llama31.decode_token(half) == llama31.decode([half]) == "\ufffd"
    assert llama31.decode([128000, 9906, 128009]) == "<|begin_of_text|>Hello<|eot_id|>"


def test_ranks_of_any_number(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_ranks(tmp_path / "tokenizer.model", b"th", b" the", b"the"))
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.stop_tokens) == (259 + 256, 259, {260, 259 + 9})
    # The rank of a byte is 255 minus the byte. " the" is found although no two tokens merge into it.
    assert tokenizer.encode("a the", bos=True, eos=True) == [259, 255 - ord("a"), 257, 260]
    assert tokenizer.decode([257, 256, 514]) == " theth<|reserved_special_token_250|>"


def test_lines_may_end_in_crlf(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "tokenizer.model")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer(path).n_words == 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s + "YQ== 256\n", r"line 257: a second rank for the token b'a', fetch the file again$"),
        (lambda s: s + "YWI= 255\n", r"has rank 255 twice in 257 lines, fetch it again$"),
        (lambda s: s + "YWI= 257\n", r"has no rank 256 in 257 lines"),
        (lambda s: s + "YWI= 99999999999999999999\n", r"has no rank 256 in 257 lines"),
        (lambda s: s + "YWI= -1\n", r"line 257: 'YWI= -1', expected a token in base64 and its rank"),
        (lambda s: s + "YW!I= 256\n", r"line 257: 'YW!I= 256', expected a token in base64"),
        (lambda s: s + "YWI=\n", r"line 257: 'YWI=', expected a token in base64"),
        (lambda s: s + "= 256\n", r"line 257: '= 256', expected a token in base64"),
        (lambda s: s + "\n", r"line 257: '', expected a token in base64"),
        (lambda s: s[: s.index("\n") + 1], r"has no rank for the byte 0x00"),
        (lambda s: s + f"YWI= {'9' * 5000}\n", r"line 257: 'YWI= 9{55}', expected a token"),
    ],
)
def test_damaged_ranks(tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    path = write_ranks(tmp_path / "tokenizer.model")
    path.write_text(change(path.read_text()))
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer(path)
    assert "\n" not in str(caught.value)


def test_a_rank_file_that_is_too_large(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "tokenizer.model")
    with path.open("r+b") as file:
        file.truncate(RANKS_LIMIT + 1)
    with pytest.raises(TokenizerError, match=r"has 16,777,217 bytes, expected 16,777,216 at most: fetch it again"):
        Tokenizer(path)


def test_long_runs_have_tiktokens_own_ids(llama31: Tokenizer) -> None:
    ranks = {token: rank for rank, token in enumerate(read_ranks(LLAMA3))}
    peer = tiktoken.Encoding("peer", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
    for text in (" " * 100_000, "a" * 100_000, " " * 70_000 + "x" * 70_000):
        assert llama31.encode(text, bos=False, eos=False) == peer.encode_ordinary(text)
    assert (
        len(llama31.encode(" " * 100_000, bos=False, eos=False)) == 782
    )  # split every 25,000 characters they would be 784


def test_the_longest_white_space_that_tiktoken_encodes(llama31: Tokenizer) -> None:
    assert llama31.encode("x" + " " * 999_998 + "x", bos=False, eos=False)
    assert len(llama31.encode("a " * 500_000, bos=False, eos=False)) == 500_001
    message = r"^the text holds 999,999 white-space characters in a row, tiktoken's limit is 999,998: shorten them$"
    with pytest.raises(ValueError, match=message):
        llama31.encode("x" + "\t" * 999_999 + "x", bos=False, eos=False)


@pytest.fixture
def json_folder(tmp_path: Path) -> Path:
    return write_byte_level_json(tmp_path)
