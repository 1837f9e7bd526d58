"""tokenizer.json, the vocabulary of Hugging Face's tokenizers package."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.vocabularies import streamed_text, write_byte_level_json
from llama import Tokenizer
from llama.tokenizer import TokenizerError


@pytest.fixture
def json_folder(tmp_path: Path) -> Path:
    return write_byte_level_json(tmp_path)


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
    assert (
        tokenizer.decode([*letter, 280, *letter, 299]) == streamed_text(tokenizer, [*letter, 280, *letter, 299]) == "aa"
    )


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
