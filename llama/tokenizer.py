"""Text to ids and back: SentencePiece (Llama 1 and 2) and tokenizer.json behind one `Tokenizer`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class TokenizerError(ValueError):
    """The tokenizer file is missing, of an unknown kind, or does not belong to the checkpoint."""


class Tokenizer:
    """A tokenizer read from `tokenizer.model` (SentencePiece) or `tokenizer.json`, told apart by content.

    n_words: size of the vocabulary. bos_id, eos_id, pad_id: -1 where the tokenizer has none.
    adds_bos: whether texts start with BOS (Llama's do, SmolLM2's do not).
    stop_tokens: ids that end a generation. special_ids: name -> id of the control tokens.
    chat_format, default_system: the dialog format that belongs to the tokenizer and the system message it puts
    before a dialog without one; None where unknown.
    unsettled_ids: bytes whose text depends on all the bytes that follow, as the backend decodes a run of them at once.

    Raises TokenizerError when the file cannot be read.
    """

    def __init__(self, model_path: str | Path):
        path = Path(model_path)
        try:
            with path.open("rb") as file:
                start = file.read(16)
        except OSError as error:
            raise TokenizerError(f"tokenizer {path} cannot be read: {error.strerror}") from None
        backend: _Backend
        if start.lstrip().startswith(b"{"):
            backend = _TokenizerJson(path)
        elif start.startswith(b"\n"):  # the first field of a SentencePiece model, in protobuf's encoding
            backend = _SentencePiece(path)
        else:
            raise TokenizerError(
                f"{path} is neither a SentencePiece model nor a tokenizer.json (Llama 3's rank files are not read yet)"
            )
        self._backend = backend
        self.n_words, self.special_ids = backend.n_words, backend.special_ids
        self.bos_id, self.eos_id, self.pad_id = backend.bos_id, backend.eos_id, backend.pad_id
        self.adds_bos, self.unsettled_ids = backend.adds_bos, backend.unsettled_ids
        self.chat_format, self.default_system = backend.chat_format, backend.default_system
        self.stop_tokens = {self.eos_id} - {-1}

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Ids of a text, with BOS before and EOS behind where asked for. Text never becomes a special id."""
        if not isinstance(s, str):
            raise TypeError(f"a text to encode must be a string, not {type(s).__name__}")
        try:
            s.encode()
        except UnicodeEncodeError:
            raise ValueError("the text holds half of a surrogate pair, which is no character") from None
        return [self.bos_id] * bos + self._backend.encode(s) + [self.eos_id] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids. Special ids give nothing, bytes that are not UTF-8 give U+FFFD."""
        return self._backend.decode(list(ids))

    def decode_token(self, token: int) -> str:
        """One id as people read it: leading spaces kept, special ids by name."""
        return self._backend.piece(token)


def find_tokenizer(ckpt_dir: Path) -> Path:
    """The tokenizer in a checkpoint folder, or beside it as Meta's downloads lay it out."""
    names = ("tokenizer.model", "tokenizer.json")
    for folder in (ckpt_dir, ckpt_dir.resolve().parent):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise TokenizerError(f"no {' or '.join(names)} in {ckpt_dir} or beside it: give --tokenizer_path")


class _Backend(Protocol):
    n_words: int
    bos_id: int
    eos_id: int
    pad_id: int
    adds_bos: bool
    special_ids: dict[str, int]
    unsettled_ids: set[int]
    chat_format: str | None
    default_system: str | None

    def encode(self, s: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def piece(self, token: int) -> str: ...


class _SentencePiece:
    chat_format: str | None = "llama2"
    default_system: str | None = None
    adds_bos = True

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        try:
            self.model = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{path} is not a SentencePiece model, fetch it again") from error
        self.n_words: int = self.model.vocab_size()
        self.bos_id: int = self.model.bos_id()
        self.eos_id: int = self.model.eos_id()
        self.pad_id: int = self.model.pad_id()
        self.unsettled_ids: set[int] = set()
        control = [i for i in range(self.n_words) if self.model.is_control(i)]
        self.special_ids: dict[str, int] = {self.model.id_to_piece(i): i for i in control}

    def encode(self, s: str) -> list[int]:
        return self.model.encode(s)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def piece(self, token: int) -> str:
        name: str = self.model.id_to_piece(token)
        if self.model.is_byte(token):  # named <0x0A>
            byte = int(name[3:-1], 16)
            return chr(byte) if byte < 128 else name
        return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")


class _TokenizerJson:
    """A Hugging Face tokenizer.json; the tokenizer_config.json beside it says which tokens are BOS, EOS and padding."""

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError:
            raise TokenizerError(f"{path} needs the tokenizers package: pip install 'llama-runner[convert]'") from None
        try:
            self.model = Reader.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise TokenizerError(f"{path} is not a tokenizer.json: {error}") from error
        config_path = path.with_name("tokenizer_config.json")
        try:
            config: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("it holds no object")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{config_path}, which names the special tokens, cannot be read: {error}") from error
        self.model.encode_special_tokens = True  # "<|im_end|>" in a text stays text
        self.n_words: int = self.model.get_vocab_size()
        added = self.model.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in added.items() if token.special}
        self.bos_id, self.eos_id, self.pad_id = (
            self._id_of(config, key, path) for key in ("bos_token", "eos_token", "pad_token")
        )
        self.adds_bos = bool(config.get("add_bos_token", False))
        self.unsettled_ids: set[int] = set()
        if self.model.decoder is not None and b"ByteFallback" in self.model.decoder.__getstate__():
            found = (self.model.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
            self.unsettled_ids = {token for token in found if token is not None}
        self.chat_format: str | None = config.get("chat_format")
        self.default_system: str | None = config.get("default_system")

    def _id_of(self, config: dict[str, Any], key: str, path: Path) -> int:
        token = config.get(key)
        if token is None:
            return -1
        name = token.get("content") if isinstance(token, dict) else token
        found = self.model.token_to_id(str(name))
        if found is None:
            raise TokenizerError(f"{path} has no token {name!r}, which tokenizer_config.json calls {key}")
        return found

    def encode(self, s: str) -> list[int]:
        return self.model.encode(s, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def piece(self, token: int) -> str:
        return self.model.decode([token], skip_special_tokens=False)
