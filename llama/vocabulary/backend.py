"""`Backend`, the interface of all kinds of tokenizer, and the detection and size limit of their files."""

import re
from pathlib import Path
from typing import Any, Literal, Protocol

from llama.files import detect_format, expect_file

Kind = Literal["sentencepiece", "tiktoken", "tokenizer.json"]

# Bytes of a file. The largest published files have 5 MB (SentencePiece) and 33 MB (tokenizer.json, 262,144 tokens).
SIZE_LIMIT = 64 * 2**20
STEP = "<step>"  # ends a turn of Code Llama 70B-Instruct


class TokenizerError(ValueError):
    """The tokenizer file is missing, damaged, of an unknown kind, or from another model."""


class Backend(Protocol):
    """One kind of tokenizer. Attributes are documented in `llama.tokenizer.Tokenizer`, except:

    model: the library's own object.
    unk_id: the id of unknown characters. Like bos_id, eos_id and pad_id, it is -1 if the vocabulary has none.
    chat_format: the default if tokenizer_config.json has none.
    """

    model: Any
    n_words: int
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    adds_bos: bool
    special_ids: dict[str, int]
    rstrip_ids: set[int]
    unsettled_ids: set[int]
    chat_format: str | None

    def normalize(self, s: str) -> str: ...

    def encode(self, s: str) -> list[int]:
        """The ids of a text, without BOS and EOS. Names of special tokens in the text are encoded as plain text."""
        ...

    def decode(self, ids: list[int]) -> str: ...

    def piece(self, token: int) -> str:
        """One id as readable text, with leading spaces. A special id becomes its name."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """What one id adds to the UTF-8 of a text, with leading spaces; empty for special ids that `decode` drops."""
        ...

    def find(self, piece: str) -> int | None:
        """The id of a piece, spelled as in the vocabulary, or None."""
        ...


def check_size(path: Path) -> None:
    """Raise TokenizerError for a file larger than SIZE_LIMIT, before it is read. Raises OSError if it is not a file."""
    expect_file(path)
    if (size := path.stat().st_size) > SIZE_LIMIT:
        raise TokenizerError(f"{path} has {size:,} bytes, expected {SIZE_LIMIT:,} at most: fetch it again")


def detect_kind(path: Path) -> Kind:
    """The kind of a tokenizer file, detected from its first bytes. Raises TokenizerError."""
    try:
        check_size(path)
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError as error:
        raise TokenizerError(f"tokenizer {path} cannot be read: {error.strerror}") from None
    if start.lstrip().startswith(b"{"):
        return "tokenizer.json"
    if start.startswith(b"\n"):  # protobuf's tag of a SentencePiece model's first field
        return "sentencepiece"
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", start):
        return "tiktoken"
    raise TokenizerError(
        f"{path} is {detect_format(path) or 'of an unknown kind'}, expected a SentencePiece model, tiktoken ranks or a "
        "tokenizer.json: fetch it again"
    )
