"""Vocabularies of other formats: SentencePiece models written by hand, llama2.c's tokenizer.bin read, and the files
that Hugging Face's libraries want, written for any tokenizer of ours."""

import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llama.convert.meta import ConvertError
from llama.convert.template import TEMPLATES
from llama.tokenizer import Tokenizer
from llama.vocabulary.tiktoken_ranks import LLAMA3_SPLIT, read_ranks

Piece = tuple[str, float, int]  # text with U+2581 for spaces, score, type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece's types, which are GGUF's too
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
BYTE_PIECES = {f"<0x{byte:02X}>" for byte in range(256)}
LLAMA2C_LENGTH_LIMIT = 2**16  # bytes of a piece in tokenizer.bin; real ones have at most a few dozen


# SentencePiece ------------------------------------------------------------------------------------


def sentencepiece_model(
    pieces: list[Piece],
    *,
    add_dummy_prefix: bool = True,
    unk_id: int = 0,
    bos_id: int = 1,
    eos_id: int = 2,
    pad_id: int = -1,
) -> bytes:
    """A BPE `tokenizer.model` of these pieces, that sentencepiece reads. Ids are -1 where there is none.

    BOS, EOS and padding become control pieces, whatever their type: others are no BOS, EOS or padding to sentencepiece.
    Written in protobuf's wire format, as sentencepiece's own classes for it need a package that it does not install.
    Raises ConvertError for pieces that make no vocabulary.
    """
    ids = {"unk": unk_id, "bos": bos_id, "eos": eos_id, "pad": pad_id}
    for name, i in ids.items():
        if not -1 <= i < len(pieces):
            raise ConvertError(f"{name} has id {i}, but there are {len(pieces)} pieces: fetch the file again")
    if twice := _twice(piece for piece, _, _ in pieces):
        raise ConvertError(f"the vocabulary holds {twice!r} twice: fetch the file again")
    if (found := [i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN]) != [unk_id]:
        raise ConvertError(
            f"pieces of type unknown are {found}, expected the one with id {unk_id}: fetch the file again"
        )
    body = []
    for i, (piece, score, kind) in enumerate(pieces):
        if kind not in range(NORMAL, BYTE + 1) or not abs(score) < float("inf"):
            raise ConvertError(f"piece {i}, {piece!r}, has type {kind} and score {score}: fetch the file again")
        if i in (bos_id, eos_id, pad_id) and kind in (NORMAL, USER_DEFINED, UNUSED):
            kind = CONTROL
        if i in (bos_id, eos_id) and kind != CONTROL:
            raise ConvertError(f"piece {i}, {piece!r}, is BOS or EOS, but of type {kind}: fetch the file again")
        body.append(_field(1, _field(1, _utf8(piece)) + _field(2, float(score)) + _field(3, kind)))
    trainer = _field(3, 2) + _field(4, len(pieces))  # model_type BPE, vocab_size
    trainer += _field(35, int(any(kind == BYTE for _, _, kind in pieces)))  # byte_fallback
    for number, i in zip((40, 41, 42, 43), ids.values(), strict=True):
        trainer += _field(number, i)
    trainer += _field(44, " \N{DOUBLE QUESTION MARK} ".encode())  # what an unknown piece decodes to
    # Sentencepiece looks the ids up by these names, and by "<s>", "</s>" and "<pad>" where there are none.
    for number, (name, i) in zip((45, 46, 47, 48), ids.items(), strict=True):
        trainer += _field(number, _utf8(pieces[i][0] if i >= 0 else f"<no {name}>"))
    # add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = (
        _field(1, b"identity") + _field(2, b"") + _field(3, int(add_dummy_prefix)) + _field(4, 0) + _field(5, 1)
    )
    model = b"".join(body) + _field(2, trainer) + _field(3, normalizer)
    _check_model(model)
    return model


def _check_model(model: bytes) -> None:
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConvertError(f"these pieces make no SentencePiece model ({reason}): fetch the file again") from error


def _field(number: int, value: int | float | bytes) -> bytes:
    """A field in protobuf's wire format: integers as varints, floats in 4 bytes, bytes with their length."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value % 2**64)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def _utf8(piece: str) -> bytes:
    try:
        return piece.encode()
    except UnicodeEncodeError:
        raise ConvertError(f"the piece {piece!r} holds half of a surrogate pair: fetch the file again") from None


def _twice(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


# llama2.c -----------------------------------------------------------------------------------------


def read_llama2c(data: bytes, vocab_size: int) -> list[Piece]:
    """The pieces of llama2.c's tokenizer.bin, with the types that the file leaves out. Raises ConvertError.

    int32, the greatest length; then for each piece float32 score, int32 length, and its bytes, in which spaces are
    plain and ids 1 and 2, BOS and EOS, are put between line breaks.
    """
    try:
        (limit,) = struct.unpack_from("<i", data)
        if not 0 < limit <= LLAMA2C_LENGTH_LIMIT:
            raise ConvertError(f"tokenizer.bin says its longest piece has {limit} bytes: fetch it again")
        pieces: list[Piece] = []
        position = 4
        for i in range(vocab_size):
            score, length = struct.unpack_from("<fi", data, position)
            piece = data[position + 8 : position + 8 + length] if 0 <= length <= limit else b""
            if len(piece) != length or not abs(score) < float("inf"):
                raise ConvertError(f"tokenizer.bin, piece {i}: score {score}, {length} bytes: damaged, fetch it again")
            position += 8 + length
            text = piece.decode()
            if i in (1, 2):
                text = text.strip("\n")
            kind = UNKNOWN if i == 0 else CONTROL if i in (1, 2) else BYTE if text in BYTE_PIECES else NORMAL
            pieces.append((text.replace(" ", SPACE), score, kind))
    except (struct.error, UnicodeDecodeError) as error:
        raise ConvertError(f"tokenizer.bin does not hold {vocab_size} pieces ({error}): fetch it again") from error
    if position != len(data):
        raise ConvertError(
            f"tokenizer.bin goes on behind {vocab_size} pieces, which is the model's vocabulary: take the model's own"
        )
    return pieces


# Hugging Face -------------------------------------------------------------------------------------


def hf_tokenizer(path: Path, use_scaled_rope: bool) -> dict[str, str]:
    """Text of tokenizer.json and tokenizer_config.json, from which transformers encodes as our Tokenizer of the file
    does, but that special tokens written in a text become their ids there. Raises ConvertError or TokenizerError.

    use_scaled_rope: params.json's key, see Tokenizer.
    """
    from tokenizers import Tokenizer as Reader

    tokenizer = Tokenizer(path, use_scaled_rope=use_scaled_rope)
    config_path = path.with_name("tokenizer_config.json")
    source: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
    # A class of its own would build another tokenizer than the file's.
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.kind == "tokenizer.json":
        text = path.read_text(encoding="utf-8")
        if tokenizer.adds_bos and not Reader.from_str(text).encode("").ids:  # transformers looks in there alone
            text = json.dumps(json.loads(text) | {"post_processor": _bos_template(tokenizer)}, ensure_ascii=False)
        kept: tuple[str, ...] = ("unk_token", "pad_token", "add_bos_token", "chat_template")
    else:
        layout = _from_sentencepiece(path) if tokenizer.kind == "sentencepiece" else _from_ranks(path, tokenizer)
        text = json.dumps(layout | {"post_processor": _bos_template(tokenizer)}, ensure_ascii=False)
        config |= {"add_bos_token": tokenizer.adds_bos, "unk_token": layout["model"]["unk_token"]}
        kept = ("chat_template",)
    config["chat_format"] = tokenizer.chat_format
    kept += ("default_system", "system_prefix", "dialog_bos", "vocab_size")
    config |= {key: source[key] for key in kept if key in source}
    if "chat_template" not in config and tokenizer.chat_format in TEMPLATES:
        config["chat_template"] = TEMPLATES[tokenizer.chat_format]
    names = {i: name for name, i in tokenizer.special_ids.items()}
    for key, i in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id), ("pad_token", tokenizer.pad_id)):
        if i in names:
            config[key] = names[i]
    return {"tokenizer.json": text, "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}


def _from_sentencepiece(path: Path) -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(path))
    # Text with what other normalizers change: a ligature, doubled and outer spaces.
    normalized = model.normalize("  \N{LATIN SMALL LIGATURE FI}  a ")
    unchanged = f"{SPACE}{SPACE}\N{LATIN SMALL LIGATURE FI}{SPACE}{SPACE}a{SPACE}"
    if normalized not in (unchanged, SPACE + unchanged):
        raise ConvertError(f"{path} rewrites the text before it cuts it ({normalized!r}), which is not supported")
    prefix = normalized != unchanged
    pieces = _pieces(path.read_bytes())
    normal = {piece: score for piece, score, kind in pieces if kind == NORMAL}
    if unused := {piece for piece, _, kind in pieces if kind == UNUSED}.intersection(
        left + right for left, right in _splits([piece for piece, _, kind in pieces if kind in (NORMAL, UNUSED)])
    ):
        # SentencePiece merges such pieces, and takes them apart again in the end.
        raise ConvertError(f"{path} marks {min(unused)!r} unused, but needs it to cut texts: not supported")
    splits = _splits(normal)
    splits.sort(key=lambda split: -normal[split[0] + split[1]])  # the best score is merged first
    added = [
        _added(i, piece, special=kind != USER_DEFINED)
        for i, (piece, _, kind) in enumerate(pieces)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    # The space before the text, which must not come before the pieces that are looked for in it: they are normalized
    # in the same way. So a text that is nothing but such a piece gets none either.
    own = "|".join(re.escape(piece) for piece, _, kind in pieces if kind == USER_DEFINED)
    prepend: dict[str, Any] = {"type": "Prepend", "prepend": SPACE}
    if own:
        prepend = {"type": "Replace", "pattern": {"Regex": rf"\A(?!\z)(?!(?:{own})\z)"}, "content": SPACE}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return _layout(
        added,
        normalizer={
            "type": "Sequence",
            "normalizers": [prepend] * prefix + [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}],
        },
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        vocab={piece: i for i, (piece, _, _) in enumerate(pieces)},
        merges=splits,
        unk_token=pieces[model.unk_id()][0],
        byte_fallback=any(kind == BYTE for _, _, kind in pieces),
    )


def _pieces(model: bytes) -> list[Piece]:
    """The pieces of a tokenizer.model that sentencepiece has accepted."""
    pieces = []
    for number, value in _read_fields(model):
        if number == 1:
            piece = dict(_read_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
    return pieces


def _read_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protobuf message, the reverse of _field; floats as their bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            length = {1: 8, 5: 4}.get(key & 7) or varint()
            yield key >> 3, data[position : position + length]
            position += length


def _from_ranks(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    letters = _byte_letters()
    written = ["".join(letters[byte] for byte in token) for token in read_ranks(path)]
    vocab = {token: rank for rank, token in enumerate(written)}
    splits = _splits(vocab)
    splits.sort(key=lambda split: vocab[split[0] + split[1]])
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _layout(
        [_added(i, name, special=True) for name, i in tokenizer.special_ids.items()],
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]},
        decoder=byte_level,
        vocab=vocab,
        merges=splits,
        ignore_merges=True,  # a piece of the text that is a token is taken whole
    )


def _splits(pieces: Iterable[str]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a third, in the order of the third."""
    known = set(pieces)
    return [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in known and piece[i:] in known
    ]


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level vocabulary: its own, or one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _added(i: int, content: str, special: bool) -> dict[str, Any]:
    """A token that is looked for in the text before all else: a special one as it is, others after the normalizer."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": i, "content": content, **flags, "special": special}


def _bos_template(tokenizer: Tokenizer) -> dict[str, Any] | None:
    if not tokenizer.adds_bos:
        return None
    name = next(name for name, i in tokenizer.special_ids.items() if i == tokenizer.bos_id)
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    text, second = ({"Sequence": {"id": which, "type_id": i}} for i, which in enumerate("AB"))
    special = {name: {"id": name, "ids": [tokenizer.bos_id], "tokens": [name]}}
    pair = [bos, text, {"SpecialToken": {"id": name, "type_id": 1}}, second]
    return {"type": "TemplateProcessing", "single": [bos, text], "pair": pair, "special_tokens": special}


def _layout(
    added: list[dict[str, Any]],
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    **model: Any,
) -> dict[str, Any]:
    """tokenizer.json but its post-processor."""
    bpe: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    bpe |= {"end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": False, "ignore_merges": False}
    parts: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    parts |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder}
    return parts | {"model": bpe | model}
