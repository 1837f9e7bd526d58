"""Read and write the pieces of SentencePiece models, and read those of llama2.c's tokenizer.bin."""

import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from llama.convert.source import ConvertError

Piece = tuple[str, float, int]  # text with U+2581 for spaces, score, type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece's types; GGUF uses the same numbers
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
BYTE_PIECES = {f"<0x{byte:02X}>" for byte in range(256)}
LLAMA2C_MAX_BYTES = 2**16  # of a piece in tokenizer.bin; real pieces have a few dozen at most


# SentencePiece ------------------------------------------------------------------------------------
# Models are read and written in protobuf's wire format here, because sentencepiece does not install protobuf's package.


def sentencepiece_model(
    pieces: list[Piece],
    *,
    add_dummy_prefix: bool = True,
    unk_id: int = 0,
    bos_id: int = 1,
    eos_id: int = 2,
    pad_id: int = -1,
) -> bytes:
    """The content of a BPE tokenizer.model with these pieces. An id of -1 means that there is no such token.

    BOS, EOS and padding become control pieces, because sentencepiece ignores the ids of pieces of other types. Raises
    ConvertError if the pieces are not a valid vocabulary.
    """
    ids = {"unk": unk_id, "bos": bos_id, "eos": eos_id, "pad": pad_id}
    for name, i in ids.items():
        if not -1 <= i < len(pieces):
            raise ConvertError(f"{name} has id {i}, but there are {len(pieces)} pieces: fetch the file again")
    if duplicate := _find_duplicate(piece for piece, _, _ in pieces):
        raise ConvertError(f"the vocabulary holds {duplicate!r} twice: fetch the file again")
    if (unknown := [i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN]) != [unk_id]:
        raise ConvertError(
            f"pieces of type unknown are {unknown}, expected the one with id {unk_id}: fetch the file again"
        )
    body = []
    for i, (piece, score, kind) in enumerate(pieces):
        if kind not in range(NORMAL, BYTE + 1) or not abs(score) < float("inf"):
            raise ConvertError(f"piece {i}, {piece!r}, has type {kind} and score {score}: fetch the file again")
        if i in (bos_id, eos_id, pad_id) and kind in (NORMAL, USER_DEFINED, UNUSED):
            kind = CONTROL
        if i in (bos_id, eos_id) and kind != CONTROL:
            raise ConvertError(f"piece {i}, {piece!r}, is BOS or EOS, but has type {kind}: fetch the file again")
        body.append(_field(1, _field(1, _utf8(piece)) + _field(2, float(score)) + _field(3, kind)))
    trainer = _trainer_spec(pieces, ids)
    # name, precompiled_charsmap, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = (
        _field(1, b"identity") + _field(2, b"") + _field(3, int(add_dummy_prefix)) + _field(4, 0) + _field(5, 1)
    )
    model = b"".join(body) + _field(2, trainer) + _field(3, normalizer)
    _check_model(model)
    return model


def read_pieces(model: bytes) -> list[Piece]:
    """The pieces of a tokenizer.model that sentencepiece accepts."""
    pieces = []
    for number, value in _read_fields(model):
        if number == 1:
            piece = dict(_read_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
    return pieces


def _trainer_spec(pieces: list[Piece], ids: dict[str, int]) -> bytes:
    trainer = _field(3, 2) + _field(4, len(pieces))  # model_type BPE, vocab_size
    trainer += _field(35, int(any(kind == BYTE for _, _, kind in pieces)))  # byte_fallback
    for number, i in zip((40, 41, 42, 43), ids.values(), strict=True):
        trainer += _field(number, i)
    trainer += _field(44, " \N{DOUBLE QUESTION MARK} ".encode())  # the text of an unknown piece
    # sentencepiece finds the ids by these names, or by "<s>", "</s>" and "<pad>" if the fields are missing.
    for number, (name, i) in zip((45, 46, 47, 48), ids.items(), strict=True):
        trainer += _field(number, _utf8(pieces[i][0] if i >= 0 else f"<no {name}>"))
    return trainer


def _check_model(model: bytes) -> None:
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConvertError(
            f"these pieces are not a valid SentencePiece model ({reason}): fetch the file again"
        ) from error


def _field(number: int, value: int | float | bytes) -> bytes:
    """Encode a field in protobuf's wire format: integers as varints, floats in 4 bytes, bytes after their length."""
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


def _read_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of each field of a protobuf message. Inverse of `_field`, but yields a float as 4 bytes."""
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


def _utf8(piece: str) -> bytes:
    try:
        return piece.encode()
    except UnicodeEncodeError:
        raise ConvertError(f"the piece {piece!r} holds a lone surrogate: fetch the file again") from None


def _find_duplicate(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


# llama2.c -----------------------------------------------------------------------------------------


def read_llama2c(data: bytes, vocab_size: int) -> list[Piece]:
    """The pieces of llama2.c's tokenizer.bin. Their types are derived, as the file has none. Raises ConvertError.

    The file has the maximal length as int32, then for each piece its score as float32, its length as int32, and its
    bytes. Spaces are plain. Pieces 1 and 2, BOS and EOS, are enclosed in line breaks.
    """
    try:
        (limit,) = struct.unpack_from("<i", data)
        if not 0 < limit <= LLAMA2C_MAX_BYTES:
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
            f"tokenizer.bin has more than the model's {vocab_size} pieces: use the one that came with the model"
        )
    return pieces
