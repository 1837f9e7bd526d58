"""Code Llama's infilling, as example_infilling.py of its repository uses it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from golden.make_checkpoint import TOKENIZER
from helpers.peers import transformers_model
from helpers.vocabularies import INFILLING, plain, write_infilling
from llama import Llama
from llama.convert.hf_tokenizer import export_tokenizer
from llama.convert.vocab import read_pieces, sentencepiece_model
from llama.generation import infilling_prompt_tokens
from llama.tokenizer import Tokenizer

PREFIXES = ["the software is ", "this licence", ""]
SUFFIXES = [" for the work", "\nthe end", "a"]


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("infilling") / "model"
    shutil.copytree(checkpoint("mha"), path)
    write_infilling(path / "tokenizer.model")
    return path


@pytest.fixture
def llama(folder: Path) -> Iterator[Llama]:
    llama = Llama.build(folder, max_seq_len=128, max_batch_size=4, device="cpu")
    yield llama
    llama.close()


@pytest.mark.parametrize("suffix_first", [False, True])
def test_prompts_equal_transformers(folder: Path, suffix_first: bool) -> None:
    from transformers import CodeLlamaTokenizer

    tokenizer = Tokenizer(folder / "tokenizer.model")
    layout = json.loads(export_tokenizer(folder / "tokenizer.model", False)["tokenizer.json"])["model"]
    merges: Any = list(map(tuple, layout["merges"]))
    peer = CodeLlamaTokenizer(vocab=layout["vocab"], merges=merges)
    assert [peer.prefix_id, peer.middle_id, peer.suffix_id, peer.eot_id] == [508, 509, 510, 511]
    assert [tokenizer.prefix_id, tokenizer.middle_id, tokenizer.suffix_id, tokenizer.eot_id] == [508, 509, 510, 511]
    # transformers 5 puts a space before a suffix that begins without one. Meta's code does not, and the suffixes here
    # begin with white space.
    for prefix, suffix in (("the software is ", " for the work"), ("\nthis licence", "  end\n"), (" a", " \n")):
        expected = peer(prefix, suffix=suffix, suffix_first=suffix_first)["input_ids"]
        assert infilling_prompt_tokens(tokenizer, prefix, suffix, suffix_first) == expected


def test_no_space_is_added(folder: Path, tmp_path: Path) -> None:
    """Compared with a SentencePiece model that adds no space before a text."""
    tokenizer = Tokenizer(folder / "tokenizer.model")
    bare = tmp_path / "bare.model"
    pieces = read_pieces((folder / "tokenizer.model").read_bytes())
    bare.write_bytes(sentencepiece_model(pieces, add_dummy_prefix=False))
    for text in ("the software", " the", "", "\n  x", "é\u263a", "  "):
        ids = tokenizer.encode_infilling(text)
        assert ids == plain(bare).encode(text)
        assert tokenizer.decode_infilling(ids) == plain(bare).decode(ids) == text
    assert tokenizer.token_piece(508) == INFILLING[0]


def test_text_infilling(llama: Llama, folder: Path) -> None:
    """Greedy, against transformers' model on the same prompts."""
    answers = llama.text_infilling(PREFIXES, SUFFIXES, temperature=0, max_gen_len=8, logprobs=True)
    theirs = transformers_model(folder)
    for prefix, suffix, answer in zip(PREFIXES, SUFFIXES, answers, strict=True):
        ids = infilling_prompt_tokens(llama.tokenizer, prefix, suffix)
        start, logprobs = len(ids), []
        for _ in range(8):
            scores = theirs(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
        assert answer["tokens"] == [plain(folder / "tokenizer.model").id_to_piece(i) for i in ids[start:]]
        assert answer["logprobs"] == pytest.approx(logprobs, abs=1e-4)
        assert answer["full_text"] == prefix + answer["generation"] + suffix


def test_only_eot_ends_infilling(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    (ids,), _ = llama.generate([infilling_prompt_tokens(llama.tokenizer, "the", " end")], 8, temperature=0)
    at = next(i for i in range(1, 8) if ids[i] not in ids[:i])
    monkeypatch.setattr(llama.tokenizer, "eot_id", ids[at])
    monkeypatch.setattr(llama.tokenizer, "stop_tokens", {ids[0]})
    (answer,) = llama.text_infilling(["the"], [" end"], temperature=0, max_gen_len=8)
    assert answer["generation"] == llama.tokenizer.decode_infilling(ids[:at])


def test_stop_token_of_generate(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [llama.tokenizer.encode("the", bos=True, eos=False)]
    (ids,), _ = llama.generate(prompt, 8, 0.0)
    at = next(i for i in range(1, 8) if ids[i] not in ids[:i])
    monkeypatch.setattr(llama.tokenizer, "stop_tokens", {ids[0]})
    assert llama.generate(prompt, 8, 0.0)[0] == [[]]
    assert llama.generate(prompt, 8, 0.0, 0.9, False, False, ids[at])[0] == [ids[:at]]


def test_tokenizers_without_the_ids(build: Callable[..., Llama]) -> None:
    llama = build("mha")
    with pytest.raises(ValueError, match=r"^this tokenizer has no <PRE>, <SUF>, <MID> and <EOT>: .*$"):
        llama.text_infilling(["a"], ["b"])
    with pytest.raises(ValueError, match="2 prefixes and 1 suffixes: give each prefix its suffix"):
        llama.text_infilling(["a", "b"], ["b"])
    assert Tokenizer(TOKENIZER).eot_id is None
