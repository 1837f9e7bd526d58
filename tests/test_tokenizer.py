"""Ids and texts of the three kinds of tokenizer."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from golden.make_checkpoint import TOKENIZER
from helpers.paths import LLAMA2, LLAMA3, MISTRAL
from helpers.vocabularies import random_texts, write_ranks
from llama import Tokenizer
from llama.engine.streaming import TextStream
from llama.tokenizer import TokenizerError, find_tokenizer
from llama.vocabulary.tiktoken_ranks import LLAMA3_SPLIT, RANKS_LIMIT, read_ranks

SENTENCEPIECE = Tokenizer(TOKENIZER)


def joined(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids, decoded by a TextStream."""
    stream, pieces = TextStream(tokenizer), []
    for token in ids:
        stream.push(token)
        pieces.append(stream.take())
    stream.finish()
    return "".join([*pieces, stream.take()])


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


# tiktoken -----------------------------------------------------------------------------------------


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


NOT_IN_THE_DEMO = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}


def test_allowed_special(llama31: Tokenizer, json_folder: Path) -> None:
    from llama_models.llama3.tokenizer import Tokenizer as Peer

    text = "<|start_header_id|>user<|end_header_id|>\n\nHi  <|eot_id|><|eot_id|> <|eot_i"
    theirs = Peer(LLAMA3)
    for allowed in ("all", {"<|eot_id|>"}, set[str]()):
        expected = theirs.encode(text, bos=True, eos=True, allowed_special=allowed, disallowed_special=set())
        assert llama31.encode(text, bos=True, eos=True, allowed_special=allowed) == expected
    assert llama31.encode(text, bos=True, eos=True) == expected  # none by default
    with pytest.raises(
        ValueError, match="allowed_special names '<|x|>', which is no special token".replace("|", r"\|")
    ):
        llama31.encode(text, bos=False, eos=False, allowed_special={"<|x|>"})
    ours = Tokenizer(json_folder / "tokenizer.json")
    a = ours.encode("a", bos=False, eos=False)
    assert ours.encode("<|im_start|>a<|im_end|>", bos=False, eos=False, allowed_special="all") == [257, *a, 258]


PER_EXAMPLE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@PER_EXAMPLE
@given(text=st.text())
@example(text="\u2581 ")
@example(text="<|eot_id|><|begin_of_text|>")
def test_ranks_decode_what_they_encoded(text: str, llama31: Tokenizer) -> None:
    ids = llama31.encode(text, bos=False, eos=False)
    assert max(ids, default=0) < 128000
    assert llama31.decode(ids) == joined(llama31, ids) == text


@PER_EXAMPLE
@given(data=st.data())
def test_streamed_pieces_of_any_ranks_are_the_decoded_text(data: st.DataObject, llama31: Tokenizer) -> None:
    """Also for incomplete characters, and for characters that end in the middle of an id."""
    bytes_ = st.integers(0, 255)  # the first ranks are the bytes
    ids = data.draw(st.lists(bytes_ | st.integers(0, 128_255), max_size=30))
    assert joined(llama31, ids) == llama31.decode(ids)


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
        (lambda s: s + "YWI= -1\n", r"line 257: 'YWI= -1' is not a token in base64 and its rank"),
        (lambda s: s + "YW!I= 256\n", r"line 257: 'YW!I= 256' is not a token in base64"),
        (lambda s: s + "YWI=\n", r"line 257: 'YWI=' is not a token in base64"),
        (lambda s: s + "= 256\n", r"line 257: '= 256' is not a token in base64"),
        (lambda s: s + "\n", r"line 257: '' is not a token in base64"),
        (lambda s: s[: s.index("\n") + 1], r"has no rank for the byte 0x00"),
        (lambda s: s + f"YWI= {'9' * 5000}\n", r"line 257: 'YWI= 9{55}' is not a token"),
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
    with pytest.raises(TokenizerError, match=r"has 16,777,217 bytes, a rank file at most 16,777,216: fetch it again"):
        Tokenizer(path)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"<html>", b"\x80\x02", b"YQ== x\n"])
def test_a_file_of_no_known_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"expected a SentencePiece model, tiktoken ranks or a tokenizer\.json"):
        Tokenizer(path)


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
    assert any_tokenizer.decode(ids) == joined(any_tokenizer, ids) == text


@pytest.mark.parametrize("character", ["a", " ", "7", "😀", "\n", "!"])
def test_100_000_equal_characters(any_tokenizer: Tokenizer, character: str) -> None:
    text = character * 100_000
    start = time.perf_counter()
    ids = any_tokenizer.encode(text, bos=False, eos=False)
    assert time.perf_counter() - start < 1
    assert any_tokenizer.decode(ids) == text


def test_long_runs_have_tiktokens_own_ids(llama31: Tokenizer) -> None:
    ranks = {token: rank for rank, token in enumerate(read_ranks(LLAMA3))}
    peer = tiktoken.Encoding("peer", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
    for text in (" " * 100_000, "a" * 100_000, " " * 70_000 + "x" * 70_000):
        assert llama31.encode(text, bos=False, eos=False) == peer.encode_ordinary(text)
    assert (
        len(llama31.encode(" " * 100_000, bos=False, eos=False)) == 782
    )  # split every 25,000 characters they would be 784


def test_the_longest_white_space_that_tiktoken_takes(llama31: Tokenizer) -> None:
    assert llama31.encode("x" + " " * 999_998 + "x", bos=False, eos=False)
    assert len(llama31.encode("a " * 500_000, bos=False, eos=False)) == 500_001
    message = r"^the text holds 999,999 white-space characters in a row, tiktoken takes 999,998: shorten them$"
    with pytest.raises(ValueError, match=message):
        llama31.encode("x" + "\t" * 999_999 + "x", bos=False, eos=False)


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
    assert tokenizer.decode([own, *ids, own + 6]) == joined(tokenizer, [own, *ids, own + 6]) == "a b"
    assert tokenizer.decode_token(own) == tokenizer.decode_token(own + 6) == ""
    assert configured(kind, vocab_size=own).n_words == own
    message = rf"says vocab_size {own - 1}, but ids of .* go up to {own - 1}: correct the key or take it out"
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


# tokenizer.json -----------------------------------------------------------------------------------


@pytest.fixture
def json_folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer.json with ChatML's marks: ids 0 to 255 are bytes, then three special tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Writer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer = Writer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    writer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    writer.decoder = decoders.ByteLevel()
    writer.add_special_tokens([AddedToken(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    writer.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": False}
    config |= {"chat_format": "chatml", "default_system": "Be brief."}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_tokenizer_json(json_folder: Path) -> None:
    tokenizer = Tokenizer(json_folder / "tokenizer.json")
    assert tokenizer.n_words == 259 and not tokenizer.adds_bos
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (257, 258, -1)
    assert tokenizer.special_ids == {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    assert (tokenizer.chat_format, tokenizer.default_system) == ("chatml", "Be brief.")
    ids = tokenizer.encode("a<|im_end|>", bos=False, eos=False)
    assert max(ids) < 256 and tokenizer.decode(ids) == "a<|im_end|>"
    assert tokenizer.decode([257, *ids, 258]) == "a<|im_end|>"
    assert tokenizer.decode_token(258) == "<|im_end|>"
    half_of_a_letter = tokenizer.encode("é", bos=False, eos=False)[:1]
    assert tokenizer.decode(half_of_a_letter) == "\ufffd"


def test_tokenizer_json_mistakes(json_folder: Path) -> None:
    path, config = json_folder / "tokenizer.json", json_folder / "tokenizer_config.json"
    config.write_text('{"eos_token": "<end>"}')
    with pytest.raises(TokenizerError, match=r"has no token '<end>', which tokenizer_config.json calls eos_token"):
        Tokenizer(path)
    config.write_text("[]")
    with pytest.raises(
        TokenizerError, match=r"which names the special tokens, cannot be read: it does not hold an object"
    ):
        Tokenizer(path)
    path.write_text("{}")
    config.write_text("{}")
    with pytest.raises(TokenizerError, match=r"is not a tokenizer.json"):
        Tokenizer(path)
    config.unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer_config.json, which names the special tokens, cannot be read"):
        Tokenizer(path)


def test_the_demo_tokenizer_encodes_the_golden_prompts(demo: Path, smollm2: dict) -> None:
    tokenizer = Tokenizer(demo / "tokenizer.json")
    for completion in smollm2["completions"]:
        assert tokenizer.encode(completion["prompt"], bos=False, eos=False) == completion["prompt_tokens"]
        assert tokenizer.decode(completion["tokens"]) == completion["text"]


def test_unused_ids_have_no_text(json_folder: Path) -> None:
    path = json_folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][-1]["id"] = content["model"]["vocab"]["<|im_end|>"] = 300
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer(path)
    assert (tokenizer.n_words, tokenizer.eos_id, tokenizer.decode_token(280)) == (301, 300, "")
    letter = tokenizer.encode("a", bos=False, eos=False)
    assert tokenizer.decode([*letter, 280, *letter, 299]) == joined(tokenizer, [*letter, 280, *letter, 299]) == "aa"


def test_eos_is_special_even_if_the_file_does_not_mark_it(json_folder: Path) -> None:
    """Phi-3's </s> is not marked special, and its special tokens drop the white space after them."""
    path = json_folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][-1] |= {"special": False, "rstrip": True}
    content["added_tokens"][0] |= {"rstrip": True}
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer(path)
    assert tokenizer.special_ids["<|im_end|>"] == 258 and tokenizer.rstrip_ids == {256, 258}
    ids = tokenizer.encode("a<|im_end|> b", bos=False, eos=True)
    assert 258 not in ids[:-1] and tokenizer.decode(ids) == "a<|im_end|> b"


def test_bos_is_added_if_the_post_processor_adds_it(json_folder: Path) -> None:
    from tokenizers import processors

    path, config_path = json_folder / "tokenizer.json", json_folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    del config["add_bos_token"]
    config_path.write_text(json.dumps(config))
    assert not Tokenizer(path).adds_bos
    model: Any = Tokenizer(path)._backend.model
    model.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)]
    )
    model.save(str(path))
    assert Tokenizer(path).adds_bos
    config_path.write_text(json.dumps(config | {"add_bos_token": False}))
    assert Tokenizer(path).adds_bos  # as in transformers, which uses only the post-processor
    config_path.write_text(json.dumps({"add_bos_token": True}))  # but no bos_token
    assert not Tokenizer(path).adds_bos


def test_other_names_of_stop_tokens(json_folder: Path) -> None:
    path = json_folder / "tokenizer.json"
    (json_folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert Tokenizer(path).stop_tokens == {256, 258}  # <|im_end|>


@pytest.mark.parametrize("kind", ["tiktoken", "tokenizers"])
def test_a_missing_package_names_the_extra(json_folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = write_ranks(json_folder / "tokenizer.model") if kind == "tiktoken" else json_folder / "tokenizer.json"
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(TokenizerError, match=rf"needs the {kind} package: pip install 'llama-runner\[convert\]'"):
        Tokenizer(path)


def test_the_tokenizer_of_a_folder_is_used(build: Callable[..., object]) -> None:
    assert build("mha").tokenizer.n_words == 512  # type: ignore[attr-defined]  # a Llama
