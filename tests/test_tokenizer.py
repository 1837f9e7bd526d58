"""Ids and texts of both kinds of tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from make_checkpoint import TOKENIZER

from llama import Tokenizer
from llama.tokenizer import TokenizerError, find_tokenizer

SENTENCEPIECE = Tokenizer(TOKENIZER)


def test_sentencepiece_ids() -> None:
    assert (SENTENCEPIECE.n_words, SENTENCEPIECE.bos_id, SENTENCEPIECE.eos_id) == (512, 1, 2)
    assert SENTENCEPIECE.pad_id == -1  # this tokenizer has no padding, as Meta's have none
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
    # U+2581 is how SentencePiece writes a space, so it comes back as one.
    assert decoded == text.replace("\u2581", " ")


def test_what_is_not_a_text_is_an_error() -> None:
    with pytest.raises(TypeError, match="must be a string, not int"):
        SENTENCEPIECE.encode(5, bos=True, eos=False)  # type: ignore[arg-type]  # the mistake under test


def test_tokenizers_are_found_in_and_beside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "llama-2-7b"
    folder.mkdir()
    with pytest.raises(TokenizerError, match=r"no tokenizer.model or tokenizer.json in .* give --tokenizer_path"):
        find_tokenizer(folder)
    (tmp_path / "tokenizer.model").touch()
    assert find_tokenizer(folder) == tmp_path / "tokenizer.model"
    (folder / "tokenizer.json").touch()
    assert find_tokenizer(folder) == folder / "tokenizer.json"


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
    config.unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer_config.json, which names the special tokens, cannot be read"):
        Tokenizer(path)
    path.write_text("{}")
    with pytest.raises(TokenizerError, match=r"is not a tokenizer.json"):
        Tokenizer(path)


def test_the_demo_tokenizer_encodes_the_golden_prompts(demo: Path, smollm2: dict) -> None:
    tokenizer = Tokenizer(demo / "tokenizer.json")
    for completion in smollm2["completions"]:
        assert tokenizer.encode(completion["prompt"], bos=False, eos=False) == completion["prompt_tokens"]
        assert tokenizer.decode(completion["tokens"]) == completion["text"]


def test_a_missing_package_names_the_extra(json_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match=r"needs the tokenizers package: pip install 'llama-runner\[convert\]'"):
        Tokenizer(json_folder / "tokenizer.json")


def test_the_tokenizer_of_a_folder_is_used(build: Callable[..., object]) -> None:
    assert build("mha").tokenizer.n_words == 512  # type: ignore[attr-defined]  # a Llama
