"""Read tokenizer.json, the format of Hugging Face's tokenizers package."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama.vocabulary.backend import TokenizerError, check_size

PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
# A letter or underscore written as \u00XX, which could hide the key that PREFIX finds.
ESCAPED_LETTER = re.compile(rb"(?<!\\)(\\\\)*\\u00(5f|6[1-9a-f]|7[0-9a])", re.IGNORECASE)
# Byte-level vocabularies spell these bytes as the characters of the same code, the others as U+0100, U+0101 ...
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTES = {chr(byte): byte for byte in PRINTABLE}
BYTES |= {chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(0x100)) - set(PRINTABLE)))}


class TokenizerJsonBackend:
    """A `Backend` with a tokenizers.Tokenizer. Raises TokenizerError.

    config: tokenizer_config.json, which names the BOS, EOS and padding tokens.
    """

    chat_format: str | None = None

    def __init__(self, path: Path, config: dict[str, Any]):
        self.model = read_tokenizer_json(path)
        from tokenizers import AddedToken

        self.model.no_padding()  # the file may enable both, but a text is encoded alone and completely
        self.model.no_truncation()
        self.bos_id, self.eos_id, self.pad_id = (
            self._id_of(config, key, path) for key in ("bos_token", "eos_token", "pad_token")
        )
        self.model.encode_special_tokens = True  # "<|im_end|>" in a text stays text
        added = self.model.get_added_tokens_decoder()
        for i in {self.bos_id, self.eos_id} - {-1}:
            # Some files do not mark them as special (Phi-3's </s>), so a text that contains one could end a turn.
            self.model.add_special_tokens([added.get(i, AddedToken(self.model.id_to_token(i), normalized=False))])
        added = self.model.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in added.items() if token.special}
        self.rstrip_ids = {i for i, token in added.items() if token.special and token.rstrip}
        self.n_words: int = max(self.model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        with _rust_errors(f"{path} cannot encode"):
            template_adds_bos = self.model.encode("").ids[:1] == [self.bos_id]
        self.unk_id = self._find_unk()
        # As in transformers, a post-processor that adds BOS has precedence over add_bos_token.
        self.adds_bos = self.bos_id >= 0 and (template_adds_bos or bool(config.get("add_bos_token")))
        decoder = self.model.decoder.__getstate__() if self.model.decoder is not None else b""
        self.unsettled_ids: set[int] = set()
        if b"ByteFallback" in decoder:
            byte_ids = (self.model.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
            self.unsettled_ids = {token for token in byte_ids if token is not None}
        self._is_byte_level = b"ByteLevel" in decoder
        self._added = {i: token.content for i, token in added.items() if not token.special}
        self._strips_first_space = b"Strip" in decoder or b"Metaspace" in decoder

    def _find_unk(self) -> int:
        from tokenizers import models

        model = self.model.model
        if not isinstance(model, models.Unigram):
            name = getattr(model, "unk_token", None)
            return -1 if name is None or (token := self.model.token_to_id(name)) is None else token
        try:  # Unigram does not expose its unk_id, so encode a code point that is in no vocabulary
            return next((token.id for token in model.tokenize("\U0010ffff")), -1)
        except Exception:  # the package's only error class: there is no unk_id
            return -1

    def _id_of(self, config: dict[str, Any], key: str, path: Path) -> int:
        token = config.get(key)
        if token is None:
            return -1
        name = token.get("content") if isinstance(token, dict) else token
        token_id = self.model.token_to_id(str(name))
        if token_id is None:
            raise TokenizerError(f"{path} has no token {name!r}, which tokenizer_config.json calls {key}")
        return token_id

    def normalize(self, s: str) -> str:
        with _rust_errors("the tokenizer's normalizer fails on the text"):
            return s if self.model.normalizer is None else self.model.normalizer.normalize_str(s)

    def encode(self, s: str) -> list[int]:
        with _rust_errors("the tokenizer fails on the text"):
            return self.model.encode(s, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        with _rust_errors("the tokenizer fails on the ids"):
            return self.model.decode(ids)

    def piece(self, token: int) -> str:
        with _rust_errors("the tokenizer fails on the ids"):
            alone = self.model.decode([token], skip_special_tokens=False)
            if self._strips_first_space:  # the second of two equal ids keeps its space
                return self.model.decode([token, token], skip_special_tokens=False)[len(alone) :]
        return alone

    def token_bytes(self, token: int) -> bytes:
        name = self.model.id_to_token(token)
        if name is None or name in self.special_ids:
            return b""
        if token in self._added:
            return self._added[token].encode()
        if token in self.unsettled_ids:
            return bytes([int(name[3:-1], 16)])
        if self._is_byte_level:
            return b"".join(bytes([BYTES[char]]) if char in BYTES else char.encode() for char in name)
        return self.piece(token).encode()

    def find(self, piece: str) -> int | None:
        return self.model.token_to_id(piece)


def read_tokenizer_json(path: Path) -> Any:
    """Read a tokenizer.json into a tokenizers.Tokenizer. Raises TokenizerError."""
    try:
        from tokenizers import Tokenizer as HFTokenizer
    except ImportError:
        raise TokenizerError(f"{path} needs the tokenizers package: pip install 'llama-runner[convert]'") from None
    check_size(path)
    _refuse_subword_prefix(path)
    with _rust_errors(f"{path} is not a tokenizer.json, fetch it again"):
        return HFTokenizer.from_file(str(path))


def _refuse_subword_prefix(path: Path) -> None:
    """Raise TokenizerError for a continuing_subword_prefix, which BERT's tokenizers have and Llama's do not.

    The tokenizers package cuts the length of this prefix off every merge. If the cut falls inside a character, the
    package aborts the process instead of raising an error. The file is searched and not parsed, because 64 MiB of JSON
    may need 2.5 GB of memory when parsed.
    """
    content = path.read_bytes()
    if PREFIX.search(content) or ESCAPED_LETTER.search(content):
        raise TokenizerError(
            f"{path} has a continuing_subword_prefix, which no Llama tokenizer has: fetch the model's own"
        )


@contextlib.contextmanager
def _rust_errors(message: str) -> Iterator[None]:
    """Turn the errors of the tokenizers package into TokenizerError.

    They are plain Exceptions and, for panics in Rust, PanicException, which is not a subclass of Exception.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{message}: {error}") from None
