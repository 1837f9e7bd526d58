"""Tokenizers of Hugging Face folders, read and written, against transformers itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config

from golden.make_checkpoint import TOKENIZER
from helpers.hugging_face import SIZES
from helpers.paths import LLAMA3
from llama import Llama, ModelArgs, Tokenizer
from llama.chat.formats import ChatFormat, base_model_note
from llama.checkpoint.layout import tensor_shapes
from llama.convert import ConvertError, convert
from llama.tokenizer import find_tokenizer

DIALOGS: list[Any] = [
    [{"role": "user", "content": " Hi there\n"}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Hello. "},
        {"role": "user", "content": "Bye"},
    ],
]
TEXTS = ["Permission is  hereby granted\n\n", "é\u2603\U0001f600 1234567", "def f(x):\n\treturn x", " a", ""]


def tiny(folder: Path, rows: int, tokenizer: Path) -> Path:
    """A Meta folder of the smallest possible model, with a tokenizer."""
    folder.mkdir()
    params: dict[str, Any] = {
        "dim": 8,
        "n_layers": 1,
        "n_heads": 2,
        "vocab_size": rows,
        "hidden_dim": 8,
        "rope_theta": 500000.0,
    }
    params |= {"use_scaled_rope": rows > 128000}
    shapes = tensor_shapes(ModelArgs(**params))
    torch.save({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(params))
    shutil.copy(tokenizer, folder / tokenizer.name)
    return folder


@pytest.mark.parametrize(
    ("rows", "tokenizer", "dialect"),
    [(512, TOKENIZER, "llama2"), pytest.param(128256, LLAMA3, "llama3", marks=pytest.mark.slow)],
)
def test_transformers_reads_the_same_ids(tmp_path: Path, rows: int, tokenizer: Path, dialect: str) -> None:
    shutil.copy(tokenizer, tmp_path / "tokenizer.model")
    folder = tiny(tmp_path / "meta", rows, tmp_path / "tokenizer.model")
    convert(folder, tmp_path / "hf", to="hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Tokenizer(folder / "tokenizer.model", use_scaled_rope=rows > 512)
    for text in TEXTS:
        ids = ours.encode(text, bos=True, eos=False)
        assert theirs(text).input_ids == ids
        specials = ours.kind != "tiktoken"  # which decodes them to their names, as Meta's does
        assert theirs.decode(ids, skip_special_tokens=specials) == ours.decode(ids)
    # The chat format of Meta's models is exported as a template.
    for dialog in DIALOGS:
        encoded = theirs.apply_chat_template(dialog, add_generation_prompt=True)
        assert list(getattr(encoded, "input_ids", encoded)) == ChatFormat(ours, dialect).encode(dialog)
    # And back: from tokenizer.model if it exists, else from tokenizer.json.
    (tmp_path / "without").mkdir()
    for path in (tmp_path / "hf").iterdir():
        if path.name != "tokenizer.model":
            shutil.copy(path, tmp_path / "without")
    for source, name in (("hf", "tokenizer.model"), ("without", "tokenizer.json")):
        convert(tmp_path / source, tmp_path / f"meta-{source}")
        found = Tokenizer(find_tokenizer(tmp_path / f"meta-{source}"), use_scaled_rope=rows > 512)
        assert (tmp_path / f"meta-{source}" / name).exists()
        assert (found.n_words, found.bos_id, found.eos_id) == (ours.n_words, ours.bos_id, ours.eos_id)
        assert found.stop_tokens == ours.stop_tokens and found.adds_bos and found.chat_format == dialect
        assert all(found.encode(text, bos=True, eos=False) == ours.encode(text, bos=True, eos=False) for text in TEXTS)


PHI3_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_added_tokens_and_spare_rows(tmp_path: Path) -> None:
    """As in Phi-3: tokens added to a SentencePiece vocabulary, white space after them stripped, and unused rows."""
    shutil.copy(TOKENIZER, tmp_path / "tokenizer.model")
    folder = tiny(tmp_path / "meta", 512, tmp_path / "tokenizer.model")
    convert(folder, tmp_path / "plain", to="hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    names = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(name, rstrip=True) for name in names]})
    tokenizer.chat_template = PHI3_TEMPLATE
    model = AutoModelForCausalLM.from_config(Phi3Config(**SIZES | {"vocab_size": 528}, sliding_window=None))
    model.save_pretrained(tmp_path / "phi")
    tokenizer.save_pretrained(tmp_path / "phi")
    shutil.copy(TOKENIZER, tmp_path / "phi" / "tokenizer.model")

    convert(tmp_path / "phi", tmp_path / "out")
    llama = Llama.build(tmp_path / "out", max_seq_len=64, max_batch_size=1, device="cpu")
    assert llama.tokenizer.n_words == 528 and llama.tokenizer.decode([600 % 528, 527]) is not None
    assert llama.dialogs.name == "phi3"
    dialog: list[Any] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "  Hi there  "},
        {"role": "assistant", "content": "Hello <|end|> x"},
        {"role": "user", "content": "Bye"},
    ]
    plain: list[Any] = [dict(m, content=m["content"].replace("<|end|>", "|end|")) for m in dialog]
    theirs = tokenizer.apply_chat_template(plain, add_generation_prompt=True)
    assert llama.dialogs.encode(plain) == list(getattr(theirs, "input_ids", theirs))
    assert llama.dialogs.encode(dialog).count(llama.tokenizer.special_ids["<|end|>"]) == 4
    llama.close()
    # Meta -> Hugging Face keeps the added tokens and the template.
    convert(tmp_path / "out", tmp_path / "back", to="hf")
    end = llama.tokenizer.special_ids["<|end|>"]
    assert end in json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"]
    back = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert list(getattr(back.apply_chat_template(plain, add_generation_prompt=True), "input_ids", theirs)) == list(
        getattr(theirs, "input_ids", theirs)
    )


def test_another_order_or_another_eos_than_tokenizer_model(tmp_path: Path) -> None:
    """tokenizer.json is used if the two disagree."""
    shutil.copy(TOKENIZER, tmp_path / "tokenizer.model")
    convert(tiny(tmp_path / "meta", 512, tmp_path / "tokenizer.model"), tmp_path / "hf", to="hf")
    path, config = tmp_path / "hf" / "tokenizer.json", tmp_path / "hf" / "tokenizer_config.json"
    convert(tmp_path / "hf", tmp_path / "same")
    assert (tmp_path / "same" / "tokenizer.model").exists()
    original, keys = path.read_text(), json.loads(config.read_text())
    content = json.loads(original)
    vocab = content["model"]["vocab"]
    names = {i: name for name, i in vocab.items()}
    vocab[names[400]], vocab[names[401]] = 401, 400
    path.write_text(json.dumps(content))
    convert(tmp_path / "hf", tmp_path / "swapped")
    path.write_text(original)
    config.write_text(json.dumps(keys | {"eos_token": "<s>"}))
    convert(tmp_path / "hf", tmp_path / "eos")
    for name, eos in (("swapped", 2), ("eos", 1)):
        assert Tokenizer(find_tokenizer(tmp_path / name)).kind == "tokenizer.json"
        assert Tokenizer(find_tokenizer(tmp_path / name)).eos_id == eos


@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json", "config.json"])
def test_bos_and_eos_wherever_they_are_named(tmp_path: Path, where: str) -> None:
    shutil.copy(TOKENIZER, tmp_path / "tokenizer.model")
    convert(tiny(tmp_path / "meta", 512, tmp_path / "tokenizer.model"), tmp_path / "hf", to="hf")
    (tmp_path / "hf" / "tokenizer.model").unlink()
    if where != "tokenizer_config.json":
        (tmp_path / "hf" / "tokenizer_config.json").unlink()
    if where == "config.json":
        config = json.loads((tmp_path / "hf" / where).read_text())
        (tmp_path / "hf" / where).write_text(json.dumps(config | {"eos_token_id": [10**20, 2]}))  # no valid id, EOS
    if where == "special_tokens_map.json":
        names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
        (tmp_path / "hf" / where).write_text(json.dumps(names))
    convert(tmp_path / "hf", tmp_path / "out")
    found = Tokenizer(tmp_path / "out" / "tokenizer.json")
    assert (found.bos_id, found.eos_id, found.adds_bos, found.stop_tokens) == (1, 2, True, {2})


def test_tokens_that_only_a_tokenizer_json_has(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(hugging_face("llama-2"), tmp_path / "in")
    added = tmp_path / "in" / "added_tokens.json"
    added.write_text('{"<s>": 1, "</s>": 2}')  # older folders list tokens that the vocabulary has anyway
    convert(tmp_path / "in", tmp_path / "plain")
    added.write_text('{"<pad>": 512}')
    with pytest.raises(ConvertError, match=r"tokenizer.model lacks the tokens of added_tokens.json"):
        convert(tmp_path / "in", tmp_path / "out")


def test_a_tokenizer_larger_than_the_embedding(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(hugging_face("llama-2"), tmp_path / "in")
    shutil.copy(LLAMA3, tmp_path / "in" / "tokenizer.model")
    with pytest.raises(ConvertError, match=r"the tokenizer has 128256 ids, the embedding 512 rows"):
        convert(tmp_path / "in", tmp_path / "out")


def test_a_base_model_stays_one(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Meta's base models are detected from the folder's name only, and the new folder has another name."""
    shutil.copytree(checkpoint("mha"), tmp_path / "llama-2-7b")
    convert(tmp_path / "llama-2-7b", tmp_path / "mine", to="hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "mine").chat_template is None
    for source in ("llama-2-7b", "mine"):
        convert(tmp_path / source, tmp_path / f"from-{source}")
        assert Tokenizer(tmp_path / f"from-{source}" / "tokenizer.model").chat_format is None
        assert "looks like a base model" in str(base_model_note(tmp_path / f"from-{source}"))
    shutil.copytree(checkpoint("mha"), tmp_path / "llama-2-7b-chat")
    convert(tmp_path / "llama-2-7b-chat", tmp_path / "chat")
    assert Tokenizer(tmp_path / "chat" / "tokenizer.model").chat_format == "llama2"


def test_without_a_tokenizer(
    hugging_face: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(hugging_face("llama-2"), tmp_path / "in")
    (tmp_path / "in" / "tokenizer.model").unlink()
    convert(tmp_path / "in", tmp_path / "out")
    assert "has neither tokenizer.model nor tokenizer.json: put one into the new folder" in capsys.readouterr().err
