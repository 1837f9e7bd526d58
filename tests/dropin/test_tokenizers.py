"""Attributes and methods of Meta's tokenizers that programs use."""

from pathlib import Path
from typing import Any
from unittest import TestCase

import pytest
import tiktoken
from llama_models.llama3.tokenizer import Tokenizer as Peer
from sentencepiece import SentencePieceProcessor

from golden.make_checkpoint import TOKENIZER
from helpers.paths import LLAMA3
from llama.tokenizer import ChatFormat, Dialog, Message, Role, Tokenizer

GREETING = [128000, 9906, 11, 1917, 0, 128001]  # <|begin_of_text|> Hello , ␣world ! <|end_of_text|>
TURN = [
    128006,
    882,
    128007,
    271,
    9906,
    11,
    1917,
    0,
    128009,
]  # <|start_header_id|> user <|end_header_id|> ... <|eot_id|>
ANSWER = [128006, 78191, 128007, 271]


class Llama3Tokenizer(TestCase):
    def setUp(self) -> None:
        self.tokenizer = Tokenizer(str(LLAMA3))
        self.format = ChatFormat(self.tokenizer)

    def test_specials(self) -> None:
        self.assertEqual(self.tokenizer.special_tokens["<|begin_of_text|>"], 128000)
        self.assertEqual(self.tokenizer.special_tokens["<|eot_id|>"], 128009)
        self.assertEqual(Tokenizer.num_reserved_special_tokens, 256)

    def test_encode_and_decode(self) -> None:
        self.assertEqual(self.tokenizer.encode("Hello, world!", bos=True, eos=True), GREETING)
        self.assertEqual(self.tokenizer.encode("Hello, world!", True, True), GREETING)
        self.assertEqual(self.tokenizer.decode(GREETING), "<|begin_of_text|>Hello, world!<|end_of_text|>")

    def test_dialog(self) -> None:
        message: Message = {"role": "user", "content": " Hello, world!\n"}
        self.assertEqual(self.format.encode_header(message), TURN[:4])
        self.assertEqual(self.format.encode_message(message), TURN)
        dialog: Dialog = [message, message]
        self.assertEqual(self.format.encode_dialog_prompt(dialog), [128000, *TURN, *TURN, *ANSWER])

    def test_encoding(self) -> None:
        model = self.tokenizer.model
        assert isinstance(model, tiktoken.Encoding)
        self.assertEqual(model.n_vocab, self.tokenizer.n_words)
        self.assertEqual(model.encode("<|eot_id|>", allowed_special="all"), [128009])


def test_llama3_equals_metas_package() -> None:
    ours, theirs = Tokenizer(LLAMA3, use_scaled_rope=True), Peer(LLAMA3)
    assert ours.special_tokens == theirs.special_tokens
    assert ours.pat_str == theirs.pat_str
    assert ours.num_reserved_special_tokens == theirs.num_reserved_special_tokens
    assert ours.model.encode_ordinary("a <|eot_id|>") == theirs.model.encode_ordinary("a <|eot_id|>")
    for ids in ([128000, 9906, 128010, 128255], list(range(127990, 128256)), [9906]):
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("allowed", ["all", {"<|eot_id|>"}, set()])
@pytest.mark.parametrize("disallowed", ["all", {"<|begin_of_text|>"}, {"<|eot_id|>"}, ()])
@pytest.mark.parametrize("text", ["Hi<|eot_id|>", "<|begin_of_text|>Hi", "Hi"])
def test_allowed_and_disallowed_specials(allowed: Any, disallowed: Any, text: str) -> None:
    ours, theirs = Tokenizer(LLAMA3, use_scaled_rope=True), Peer(LLAMA3)

    def found(tokenizer: Any) -> list[int] | None:
        try:
            return tokenizer.encode(text, bos=True, eos=False, allowed_special=allowed, disallowed_special=disallowed)
        except ValueError:
            return None

    assert found(ours) == found(theirs)


def test_sp_model_and_one_id() -> None:
    tokenizer, peer = Tokenizer(str(TOKENIZER)), SentencePieceProcessor(model_file=str(TOKENIZER))
    assert isinstance(tokenizer.sp_model, SentencePieceProcessor)
    assert tokenizer.sp_model.encode("the software") == tokenizer.encode("the software", bos=False, eos=False)
    for i in (1, 2, 13, 300):
        assert tokenizer.decode(i) == peer.decode(i) == tokenizer.decode([i])
        assert tokenizer.token_piece(i) == peer.id_to_piece(i)
    assert not hasattr(tokenizer, "model") and not hasattr(Tokenizer(LLAMA3), "sp_model")
    assert (tokenizer.prefix_id, tokenizer.middle_id, tokenizer.suffix_id, tokenizer.eot_id, tokenizer.step_id) == (
        (None,) * 5
    )


@pytest.mark.parametrize("path", [TOKENIZER, LLAMA3])
def test_ids_outside_the_vocabulary(path: Path) -> None:
    tokenizer = Tokenizer(path)
    for wrong in (-1, tokenizer.n_words, -tokenizer.n_words):
        for decode in (tokenizer.decode, tokenizer.decode_token, tokenizer.token_piece):
            with pytest.raises(ValueError, match=rf"id {wrong} is outside the vocabulary, whose ids are 0 to"):
                decode(wrong)
        with pytest.raises(ValueError, match=f"id {wrong} is outside"):
            tokenizer.decode([300, wrong])


def test_names() -> None:
    assert Role is not None and Dialog is not None and Message is not None
