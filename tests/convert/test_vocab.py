"""Converted vocabularies keep their ids, against sentencepiece and transformers."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from golden.make_checkpoint import TOKENIZER
from helpers.paths import GOLDEN, LLAMA2, LLAMA3, MISTRAL
from helpers.vocabularies import random_texts, write_ranks
from llama import Tokenizer
from llama.convert import ConvertError
from llama.convert.hf_tokenizer import export_tokenizer
from llama.convert.vocab import Piece, read_llama2c, sentencepiece_model

LLAMA2C = GOLDEN / "llama2c" / "tok512.bin"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def pieces_of(path: Path) -> list[Piece]:
    """The pieces of a model as sentencepiece reports them; none of our models has user-defined ones."""
    model = SentencePieceProcessor(model_file=str(path))
    pieces = []
    for i in range(model.vocab_size()):
        kind = UNKNOWN if model.is_unknown(i) else CONTROL if model.is_control(i) else NORMAL
        kind = UNUSED if model.is_unused(i) else BYTE if model.is_byte(i) else kind
        pieces.append((model.id_to_piece(i), model.get_score(i), kind))
    return pieces


def small_vocabulary(*extra: Piece, byte_fallback: bool = True) -> list[Piece]:
    """Letters a, b and spaces, a few pieces of them, and `extra`."""
    pieces: list[Piece] = [("<unk>", 0, UNKNOWN), ("<s>", 0, CONTROL), ("</s>", 0, CONTROL)]
    if byte_fallback:
        pieces += [(f"<0x{byte:02X}>", 0, BYTE) for byte in range(256)]
    texts = ("▁a", "ab", "▁▁", "aba", "▁ab", "▁", "a", "b")
    return [*pieces, *((text, float(-i), NORMAL) for i, text in enumerate(texts)), *extra]


@pytest.fixture(params=["tok512", "mistral", "llama2"])
def model_path(request: pytest.FixtureRequest) -> Path:
    path = {"tok512": TOKENIZER, "mistral": MISTRAL, "llama2": LLAMA2}[request.param]
    if not path.exists():
        pytest.skip(f"Llama 2's tokenizer.model is not at {path}")
    return path


# SentencePiece ------------------------------------------------------------------------------------


def test_a_model_from_its_pieces_gives_the_same_ids(model_path: Path) -> None:
    pieces = pieces_of(model_path)
    peer = SentencePieceProcessor(model_file=str(model_path))
    made = SentencePieceProcessor(model_proto=sentencepiece_model(pieces))
    assert [made.bos_id(), made.eos_id(), made.unk_id(), made.pad_id()] == [1, 2, 0, -1]
    assert [made.get_score(i) for i in range(len(pieces))] == [score for _, score, _ in pieces]
    for text in random_texts(2000):
        ids = peer.encode(text)
        assert made.encode(text) == ids
        assert made.decode([1, *ids, 0, 2, 0]) == peer.decode([1, *ids, 0, 2, 0])  # 0 decodes to a question mark


def test_pieces_appended_to_another_vocabulary(model_path: Path, tmp_path: Path) -> None:
    """As in Code Llama: Llama 2's pieces and 16 more. Texts without those keep their ids."""
    pieces = pieces_of(model_path)
    more: list[Piece] = [(f"▁<MORE{i}>", -1e9 - i, NORMAL) for i in range(16)]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model([*pieces, *more]))
    longer, original = Tokenizer(tmp_path / "tokenizer.model"), Tokenizer(model_path)
    assert (longer.kind, longer.n_words, longer.stop_tokens) == ("sentencepiece", len(pieces) + 16, {2})
    for text in random_texts(300):
        assert longer.encode(text, bos=True, eos=True) == original.encode(text, bos=True, eos=True)


def test_ids_and_prefix_of_a_model() -> None:
    pieces: list[Piece] = [("</s>", 0, CONTROL), ("<pad>", 0, CONTROL), ("<u>", 0, UNKNOWN), ("<bos>", 0, CONTROL)]
    pieces += small_vocabulary()[3:]
    data = sentencepiece_model(pieces, add_dummy_prefix=False, unk_id=2, bos_id=3, eos_id=0, pad_id=1)
    assert b"\xd8\x02\x01" in data and b"\xd8\x02" + b"\xff" * 9 + b"\x01" in sentencepiece_model(small_vocabulary())
    model = SentencePieceProcessor(model_proto=data)
    assert [model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()] == [2, 3, 0, 1]
    assert model.encode_as_pieces(" a  é") == ["▁a", "▁▁", "<0xC3>", "<0xA9>"]


def test_special_ids_that_are_not_control_pieces(tmp_path: Path) -> None:
    """GGUF files mark an added <|im_end|> as user-defined. As such it would not be EOS, and no generation would end."""
    path = tmp_path / "tokenizer.model"
    pieces = small_vocabulary(("<e>", 0, USER_DEFINED), ("<p>", 0, NORMAL))
    path.write_bytes(sentencepiece_model(pieces, bos_id=-1, eos_id=267, pad_id=268))
    tokenizer = Tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_tokens) == (-1, 267, 268, {267})
    assert not tokenizer.adds_bos
    ids = tokenizer.encode("a<e><p>", bos=False, eos=False)
    assert not {267, 268} & set(ids) and tokenizer.decode([*ids, 267]) == "a<e><p>"


@pytest.mark.parametrize(
    ("pieces", "ids", "message"),
    [
        ([*small_vocabulary(), ("ab", 0, NORMAL)], {}, r"the vocabulary holds 'ab' twice: fetch the file again"),
        (small_vocabulary(), {"pad_id": 267}, r"pad has id 267, but there are 267 pieces"),
        (small_vocabulary(("\ud800", 0, NORMAL)), {}, r"the piece '\\ud800' holds a lone surrogate"),
        (
            small_vocabulary()[1:],
            {},
            r"pieces of type unknown are \[\], expected the one with id 0: fetch the file again",
        ),
        (small_vocabulary(("x", 0, UNKNOWN)), {}, r"pieces of type unknown are \[0, 267\], expected the one with id 0"),
        (small_vocabulary(), {"unk_id": 1}, r"pieces of type unknown are \[0\], expected the one with id 1"),
        (small_vocabulary(), {"eos_id": 5}, r"piece 5, '<0x02>', is BOS or EOS, but has type 6: fetch the file again"),
        (small_vocabulary(("x", float("nan"), NORMAL)), {}, r"piece 267, 'x', has type 1 and score nan"),
        (small_vocabulary()[:100], {}, r"these pieces are not a valid SentencePiece model \(.*byte.*\)"),
        (small_vocabulary(("", 0, NORMAL)), {}, r"these pieces are not a valid SentencePiece model \(.*empty.*\)"),
        (small_vocabulary(("x", 0, 7)), {}, r"piece 267, 'x', has type 7 and score 0: fetch the file again"),
    ],
)
def test_invalid_pieces(pieces: list[Piece], ids: dict[str, int], message: str) -> None:
    with pytest.raises(ConvertError, match=message) as caught:
        sentencepiece_model(pieces, **ids)  # type: ignore[arg-type]  # ids only
    assert "\n" not in str(caught.value)


# llama2.c -----------------------------------------------------------------------------------------


def llama2c(pieces: list[Piece]) -> bytes:
    """tokenizer.bin, as llama2.c's script writes it from a SentencePiece model."""
    texts = [piece.replace("▁", " ").encode() for piece, _, _ in pieces]
    texts[1:3] = [b"\n<s>\n", b"\n</s>\n"]
    data = [struct.pack("<fi", score, len(text)) + text for text, (_, score, _) in zip(texts, pieces, strict=True)]
    return struct.pack("<i", max(map(len, texts))) + b"".join(data)


def test_llama2c_vocabulary(model_path: Path) -> None:
    pieces = pieces_of(model_path)
    assert read_llama2c(llama2c(pieces), len(pieces)) == pieces


def test_llama2cs_own_file() -> None:
    data = LLAMA2C.read_bytes()
    assert data == llama2c(pieces_of(TOKENIZER))
    made = SentencePieceProcessor(model_proto=sentencepiece_model(read_llama2c(data, 512)))
    peer = SentencePieceProcessor(model_file=str(TOKENIZER))
    assert all(made.encode(text) == peer.encode(text) for text in random_texts(3000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:2], r"tokenizer.bin does not hold 512 pieces \(.*\): fetch it again"),
        (lambda d: d[:-1], r"piece 511: score .*: damaged, fetch it again"),
        (lambda d: d[:-9], r"does not hold 512 pieces"),
        (lambda d: d + b"\0", r"tokenizer.bin has more than the model's 512 pieces"),
        (lambda d: struct.pack("<i", 2**30) + d[4:], r"says its longest piece has 1073741824 bytes: fetch it again"),
        (lambda d: struct.pack("<i", -1) + d[4:], r"says its longest piece has -1 bytes"),
        (lambda d: d[:8] + struct.pack("<i", -5) + d[12:], r"piece 0: score 0.0, -5 bytes: damaged"),
        (lambda d: d[:8] + struct.pack("<i", 99) + d[12:], r"piece 0: score 0.0, 99 bytes: damaged"),
        (lambda d: d[:4] + struct.pack("<f", float("nan")) + d[8:], r"piece 0: score nan, 5 bytes: damaged"),
        (lambda d: d[:12] + b"\xff" + d[13:], r"does not hold 512 pieces \('utf-8' codec"),
    ],
)
def test_damaged_llama2c_vocabularies(change: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        read_llama2c(change(llama2c(pieces_of(TOKENIZER))), 512)


# Hugging Face -------------------------------------------------------------------------------------


def written(folder: Path, source: Path, use_scaled_rope: bool = False) -> tuple[Any, Tokenizer]:
    """The files of export_tokenizer, as transformers and as we read them."""
    folder.mkdir()
    for name, text in export_tokenizer(source, use_scaled_rope).items():
        (folder / name).write_text(text, encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder), Tokenizer(folder / "tokenizer.json")


# transformers encodes special tokens written in a text as such, which we never do.
TEXTS = [text for text in random_texts(2500, seed=1) if "<" not in text]
RUNS = [character * n + end for character in " \na=-" for n in range(1, 70) for end in ("", "b")]


def test_sentencepiece_in_transformers(tmp_path: Path, model_path: Path) -> None:
    peer, read = written(tmp_path / "hf", model_path)
    own = Tokenizer(model_path)
    assert (peer.bos_token_id, peer.eos_token_id, peer.unk_token_id) == (1, 2, 0)
    assert (read.bos_id, read.eos_id, read.adds_bos, read.chat_format) == (1, 2, True, "llama2")
    assert len(TEXTS) > 1500
    for text in TEXTS + RUNS:
        ids = own.encode(text, bos=True, eos=False)
        assert peer(text)["input_ids"] == ids == read.encode(text, bos=True, eos=False)
        assert peer.decode(ids, skip_special_tokens=True) == own.decode(ids) == read.decode(ids)


def test_single_ids_keep_their_space_where_the_decoder_strips_one(tmp_path: Path) -> None:
    _, read = written(tmp_path / "hf", TOKENIZER)
    own = Tokenizer(TOKENIZER)
    ids = own.encode("the software is", bos=True, eos=False)
    assert "".join(map(read.decode_token, ids)) == "<s> the software is"
    assert read.decode(ids[1:]) == own.decode(ids[1:]) == "the software is"  # here the first space is stripped
    no_characters = {i for i in range(own.n_words) if own.decode_token(i) == f"<0x{i - 3:02X}>"}
    assert len(no_characters) == 128
    for i in set(range(own.n_words)) - no_characters:
        assert read.decode_token(i) == own.decode_token(i)


@pytest.mark.parametrize("use_scaled_rope", [pytest.param(False, marks=pytest.mark.slow), True])
def test_llama3_in_transformers(tmp_path: Path, use_scaled_rope: bool) -> None:
    peer, read = written(tmp_path / "hf", LLAMA3, use_scaled_rope)
    own = Tokenizer(LLAMA3, use_scaled_rope=use_scaled_rope)
    assert (peer.bos_token, peer.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    for name in ("special_ids", "stop_tokens", "bos_id", "eos_id", "adds_bos", "n_words", "chat_format"):
        assert getattr(read, name) == getattr(own, name)
    for text in TEXTS[:: 1 if use_scaled_rope else 10] + RUNS[::7]:
        ids = own.encode(text, bos=True, eos=False)
        assert peer(text)["input_ids"] == ids
        assert peer.decode(ids, skip_special_tokens=True) == text
    text = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    ids = peer(text)["input_ids"]  # as a chat template writes a turn
    assert [i for i in ids if i >= 128000] == [128000, 128006, 128007, 128009]


def test_small_ranks_in_transformers(tmp_path: Path) -> None:
    """Pre-tokens that are tokens need no merges, not even a token that no two others form."""
    path = write_ranks(tmp_path / "tokenizer.model", b"th", b" the", b"the", b"\xc3\xa9", b"  ", b"wxyz")
    peer, _ = written(tmp_path / "hf", path)
    own = Tokenizer(path)
    for text in ["a the theé  the wxyz", "wxyz", "wxyzz", *TEXTS[:300]]:
        assert peer(text)["input_ids"] == own.encode(text, bos=True, eos=False)


def test_the_demo_tokenizer_in_transformers(tmp_path: Path, demo: Path) -> None:
    source = demo / "tokenizer.json"
    peer, _ = written(tmp_path / "hf", source)
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == source.read_bytes()
    own = Tokenizer(source)
    config, given = (json.loads((f / "tokenizer_config.json").read_text()) for f in (tmp_path / "hf", demo))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    for key in ("chat_format", "default_system", "chat_template", "bos_token", "eos_token", "add_bos_token"):
        assert config[key] == given[key]
    for text in TEXTS:
        assert peer(text)["input_ids"] == own.encode(text, bos=own.adds_bos, eos=False)


def test_the_class_that_a_models_config_names_does_not_matter(tmp_path: Path) -> None:
    written(tmp_path / "hf", TOKENIZER)
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "llama"}')
    peer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    own = Tokenizer(TOKENIZER)
    for text in ("  two spaces", "the  software\n"):
        assert peer(text)["input_ids"] == own.encode(text, bos=True, eos=False)


def test_our_keys_and_the_chat_template_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(TOKENIZER.read_bytes())
    keys = {"chat_format": None, "default_system": "Be brief.", "system_prefix": "x", "vocab_size": 600}
    keys |= {"chat_template": "{{ messages }}"}
    config = {**keys, "tokenizer_class": "LlamaTokenizer", "auto_map": {"AutoTokenizer": ["run.This", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    peer, read = written(tmp_path / "hf", path)
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text()).items() >= keys.items()
    assert "run.This" not in (tmp_path / "hf" / "tokenizer_config.json").read_text()
    assert (read.chat_format, read.default_system, read.system_prefix, read.n_words) == (None, "Be brief.", "x", 600)
    assert peer.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("pieces", "options"),
    [
        (small_vocabulary(), {"add_dummy_prefix": False}),
        (small_vocabulary(), {"bos_id": -1}),
        (small_vocabulary(byte_fallback=False), {}),
        (small_vocabulary(("<X>", 0, USER_DEFINED), ("▁<Y>", 0, USER_DEFINED), ("a.b", 0, USER_DEFINED)), {}),
        (small_vocabulary(("[PAD]", 0, UNUSED)), {}),
    ],
    ids=["no prefix", "no BOS", "no byte fallback", "user-defined", "unused"],
)
def test_other_models_in_transformers(tmp_path: Path, pieces: list[Piece], options: dict[str, Any]) -> None:
    import random

    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model(pieces, **options))
    peer, read = written(tmp_path / "hf", path)
    own, draw = Tokenizer(path), random.Random(0)
    assert read.adds_bos == own.adds_bos == (options.get("bos_id") != -1)
    parts = ["a", "b", " ", "  ", "aba", "<X>", " <Y>", "a.b", "axb", "<", "é", "zz", "[PAD]"]
    for text in ["axb", *("".join(draw.choices(parts, k=draw.randint(2, 12))) for _ in range(1000))]:
        ids = own.encode(text, bos=own.adds_bos, eos=False)
        assert peer(text)["input_ids"] == ids == read.encode(text, bos=own.adds_bos, eos=False)


def test_vocabularies_that_transformers_cannot_represent(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model(small_vocabulary(("▁ba", -9.0, UNUSED), ("ba", -8.0, NORMAL))))
    with pytest.raises(ConvertError, match=r"marks '▁ba' as unused, but merges use it: not supported"):
        export_tokenizer(path, use_scaled_rope=False)
    model = sentencepiece_model(small_vocabulary())
    assert model.endswith(b"\x20\x00\x28\x01")  # remove_extra_whitespaces off, escape_whitespaces on
    path.write_bytes(model[:-4] + b"\x20\x01\x28\x01")
    with pytest.raises(ConvertError, match=r"normalizes the text before it splits it \(.*\), which is not supported"):
        export_tokenizer(path, use_scaled_rope=False)
