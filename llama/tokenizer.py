"""`Tokenizer`, which encodes and decodes text with SentencePiece models (Llama 1 and 2, Mistral), tiktoken ranks
(Llama 3) and tokenizer.json."""

import json
import operator
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from typing_extensions import NotRequired

from llama.files import as_path
from llama.vocabulary.backend import STEP, Backend, TokenizerError, check_size, detect_kind
from llama.vocabulary.sentencepiece_model import SentencePieceBackend
from llama.vocabulary.tiktoken_ranks import (
    LLAMA3_SPECIAL,
    LLAMA3_SPLIT,
    LLAMA31_SPECIAL,
    N_LLAMA3_SPECIAL,
    TiktokenBackend,
)
from llama.vocabulary.tokenizer_json import TokenizerJsonBackend

if TYPE_CHECKING:
    from llama.chat.formats import ChatFormat as ChatFormat

Names = Literal["all"] | Collection[str]
Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One message of a dialog.

    destination: the recipient, in the format of Code Llama 70B-Instruct. Other formats ignore it.
    """

    role: Role
    content: str
    destination: NotRequired[str]


Dialog = Sequence[Message]

# Special tokens that end an answer, in addition to EOS. A vocabulary may lack them.
STOP_NAMES = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>")
# Code Llama's pieces for infilling, in the order of prefix_id, middle_id, suffix_id and eot_id.
INFILLING = ("\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>", "\u2581<EOT>")
# SentencePiece adds a space before a text. If this character is put first, the text after it gets none.
ANCHOR = "\N{WHITE SMILING FACE}"


def __getattr__(name: str) -> Any:
    """Provide ChatFormat, as Meta's module of this name does. Its module imports this one, so it is imported late."""
    if name == "ChatFormat":
        from llama.chat.formats import ChatFormat

        return ChatFormat
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Tokenizer:
    """The tokenizer of a checkpoint. Its kind is detected from the content of the file.

    model_path: tokenizer.model or tokenizer.json. A tokenizer_config.json in the same folder may set chat_format,
        default_system, system_prefix, dialog_bos, add_bos_token and vocab_size (n_words). A tokenizer.json requires
        one, which names the BOS, EOS and padding tokens.
    use_scaled_rope: params.json's key. It selects the special tokens of tiktoken ranks: Llama 3.1's if true, or 3.0's.

    Attributes:

    kind: "sentencepiece", "tiktoken" or "tokenizer.json".
    n_words: the number of rows of the embedding. If the file has fewer ids, the others have no text.
    bos_id, eos_id, pad_id: -1 if the tokenizer has none.
    adds_bos: whether texts begin with BOS (Llama's do, SmolLM2's do not).
    stop_tokens: ids that end a generation.
    special_ids, special_tokens: name -> id of the control tokens.
    prefix_id, middle_id, suffix_id, eot_id: Code Llama's infilling ids, or None.
    step_id: the id of `<step>`, which ends a turn of Code Llama 70B-Instruct, or None.
    rstrip_ids: special ids after which white space at the start of a text is dropped.
    chat_format: the name of the tokenizer's dialog format, or None if it is unknown.
    default_system: the system message of a dialog without one, or None.
    system_prefix: a text before the system message of a dialog that has one.
    dialog_bos: whether BOS is added before dialogs whose format has none.
    unsettled_ids: ids of single bytes, if the backend decodes consecutive ones together. The text of each then depends
        on the ids that follow.

    Raises TokenizerError.
    """

    num_reserved_special_tokens = N_LLAMA3_SPECIAL
    pat_str = LLAMA3_SPLIT

    def __init__(self, model_path: str | Path, *, use_scaled_rope: bool = False):
        path = as_path(model_path)
        self.kind = detect_kind(path)
        self.config_path = path.with_name("tokenizer_config.json")
        config = _read_config(self.config_path, required=self.kind == "tokenizer.json")
        backend: Backend
        if self.kind == "sentencepiece":
            backend = SentencePieceBackend(path)
        elif self.kind == "tiktoken":
            backend = TiktokenBackend(path, LLAMA31_SPECIAL if use_scaled_rope else LLAMA3_SPECIAL)
        else:
            backend = TokenizerJsonBackend(path, config)
        self._backend = backend
        self.special_ids, self.rstrip_ids = backend.special_ids, backend.rstrip_ids
        self.special_tokens = self.special_ids
        self.prefix_id, self.middle_id, self.suffix_id, self.eot_id = map(backend.find, INFILLING)
        self.step_id = backend.find(STEP)
        self.bos_id, self.eos_id, self.pad_id = backend.bos_id, backend.eos_id, backend.pad_id
        self.adds_bos = backend.adds_bos and (self.kind != "sentencepiece" or config.get("add_bos_token") is not False)
        self.unsettled_ids = backend.unsettled_ids
        self.stop_tokens = {self.eos_id} - {-1}
        self.stop_tokens |= {self.special_ids[name] for name in STOP_NAMES if name in self.special_ids}
        # Ids that encoding a text must not produce. Unknown characters may become unk_id, unless that is also another
        # special token.
        allowed = {backend.unk_id} - {self.bos_id, self.eos_id, self.pad_id} - self.stop_tokens
        self._reserved = {i: name for name, i in self.special_ids.items() if i not in allowed}
        self.chat_format: str | None = config.get("chat_format", backend.chat_format)
        self.default_system: str | None = config.get("default_system")
        self.system_prefix: str = config.get("system_prefix", "")
        self.dialog_bos: bool = config.get("dialog_bos", False)
        self.n_words: int = config.get("vocab_size", backend.n_words)
        if self.n_words < backend.n_words:
            raise TokenizerError(
                f"tokenizer_config.json says vocab_size {self.n_words}, but ids of {path} go up to "
                f"{backend.n_words - 1}: correct or remove the key"
            )

    @property
    def sp_model(self) -> Any:
        """The SentencePieceProcessor. Raises AttributeError for other kinds of tokenizer."""
        if self.kind != "sentencepiece":
            raise AttributeError(f"a {self.kind} tokenizer has no sp_model, only SentencePiece tokenizers have one")
        return self._backend.model

    @property
    def model(self) -> Any:
        """The tiktoken Encoding, including special tokens. Raises AttributeError for other kinds of tokenizer."""
        if self.kind != "tiktoken":
            raise AttributeError(f"a {self.kind} tokenizer has no model, only tiktoken ranks have one")
        return self._backend.model

    def encode(
        self, s: str, bos: bool, eos: bool, *, allowed_special: Names = (), disallowed_special: Names = ()
    ) -> list[int]:
        """The ids of a text.

        bos, eos: whether to add BOS before and EOS after the text.
        allowed_special: names of special tokens that become their ids if they occur in the text, or "all". By default
            none does, so that text written by users cannot end a turn.
        disallowed_special: names that must not occur in the text. "all" is all special tokens that are not allowed.

        Raises TypeError for a value that is not a string, and ValueError for a text that the tokenizer cannot encode or
        in which a disallowed name occurs.
        """
        _check_text(s)
        if disallowed_special == "all":
            allowed = self.special_ids.keys() if allowed_special == "all" else allowed_special
            disallowed_special = self.special_ids.keys() - set(allowed)
        if disallowed := next((name for name in disallowed_special if name in s), None):
            raise ValueError(
                f"the text holds {disallowed!r}, which is in disallowed_special: remove it from the text, or remove it "
                "from disallowed_special to encode it as text"
            )
        ids = [self.bos_id] * bos
        for i, part in enumerate(self._split(s, allowed_special)):
            if i % 2:
                ids.append(self.special_ids[part])
            elif part := part.lstrip() if i and ids[-1] in self.rstrip_ids else part:
                part_ids = self._backend.encode(part)
                if not self._reserved.keys().isdisjoint(part_ids):
                    # The vocabulary also has the special token's name as an ordinary piece.
                    name = next(self._reserved[i] for i in part_ids if i in self._reserved)
                    raise ValueError(
                        f"this tokenizer encodes a part of the text as its special token {name!r}: change the text"
                    )
                ids += part_ids
        return ids + [self.eos_id] * eos

    def _split(self, s: str, names: Names) -> list[str]:
        """Split a text at these special tokens. Texts, which may be empty, and names of special tokens alternate."""
        names = self.special_ids.keys() if names == "all" else names
        if not names:
            return [s]
        if unknown := sorted(set(names) - self.special_ids.keys()):
            raise ValueError(f"allowed_special names {unknown[0]!r}, which is not a special token of this tokenizer")
        return re.split(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})", s)

    def normalize(self, s: str) -> str:
        """Normalize a text as the tokenizer does before it splits it. Raises as `encode` does.

        For example, NFKC turns a full-width bracket into "[". Spaces may become U+2581.
        """
        _check_text(s)
        return self._backend.normalize(s)

    def decode(self, ids: int | Sequence[int]) -> str:
        """The text of one id or several. Raises ValueError for ids outside the vocabulary.

        Bytes that are not UTF-8 become U+FFFD. As in Meta's code, special ids become their names with tiktoken ranks,
        and nothing with other kinds of tokenizer.
        """
        return self._backend.decode([token for token in self._read_ids(ids) if token < self._backend.n_words])

    def decode_token(self, token: int) -> str:
        """One id as readable text, with leading spaces. A special id becomes its name. Raises as `decode` does."""
        (token,) = self._read_ids(token)
        return self._backend.piece(token) if token < self._backend.n_words else ""

    def token_piece(self, token: int) -> str:
        """The id's spelling in a SentencePiece vocabulary, with U+2581 for spaces. Raises as `decode` does.

        Other kinds of tokenizer return `decode_token`.
        """
        (token,) = self._read_ids(token)
        if self.kind == "sentencepiece" and token < self._backend.n_words:
            return self.sp_model.id_to_piece(token)
        return self.decode_token(token)

    def token_bytes(self, token: int) -> bytes:
        """What one id adds to the UTF-8 of a text, with leading spaces. Raises as `decode` does.

        A character may be spread over several ids. Empty for ids without text, as control tokens are to `decode`.
        """
        (token,) = self._read_ids(token)
        return self._backend.token_bytes(token) if token < self._backend.n_words else b""

    def encode_infilling(self, s: str) -> list[int]:
        """The ids of a text that continues another one, without the space that SentencePiece adds before a text.

        Raises as `encode` does.
        """
        anchor, alone = (self.encode(text, bos=False, eos=False) for text in (ANCHOR, s))
        anchored = self.encode(ANCHOR + s, bos=False, eos=False)
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor and self.kind != "tiktoken" else alone

    def decode_infilling(self, ids: Sequence[int]) -> str:
        """The text of ids that continue another text, with its leading space. Raises as `decode` does."""
        anchor = self.encode(ANCHOR, bos=False, eos=False)
        return self.decode([*anchor, *ids])[len(self.decode(anchor)) :]

    def _read_ids(self, ids: Any) -> list[int]:
        try:
            tokens = [operator.index(ids)]
        except TypeError:
            tokens = list(map(operator.index, ids))
        for token in tokens:
            if not 0 <= token < self.n_words:
                raise ValueError(
                    f"id {token} is outside the vocabulary, whose ids are 0 to {self.n_words - 1}: remove "
                    "padding and other placeholders before you decode"
                )
        return tokens


def _check_text(s: object) -> None:
    if not isinstance(s, str):
        raise TypeError(f"a text to encode must be a string, not {type(s).__name__}")
    try:
        s.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds a lone surrogate, which is not a character") from None


def find_tokenizer(ckpt_dir: Path) -> Path:
    """Find the tokenizer file in a checkpoint folder, or in its parent, where Meta's downloads have it.

    Raises TokenizerError.
    """
    names = ("tokenizer.model", "tokenizer.json")
    for folder in (ckpt_dir, ckpt_dir.resolve().parent):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise TokenizerError(f"no {' or '.join(names)} in {ckpt_dir} or its parent folder: give --tokenizer_path")


def _read_config(path: Path, required: bool) -> dict[str, Any]:
    """Read tokenizer_config.json and check the types of this package's own keys. Raises TokenizerError.

    Returns {} if the file does not exist and is not required.
    """
    if not required and not path.exists():
        return {}
    try:
        check_size(path)
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it does not hold an object")
    except TokenizerError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        use = ", which names the special tokens," if required else ""
        raise TokenizerError(f"{path}{use} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    expected: dict[str, tuple[type, ...]] = {
        "chat_format": (str, type(None)),
        "default_system": (str, type(None)),
        "system_prefix": (str,),
        "dialog_bos": (bool,),
        "vocab_size": (int,),
    }
    for key, types in expected.items():
        if key in config and type(config[key]) not in types:
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise TokenizerError(f"{path}: {key} is {str(config[key])[:60]!r}, expected {names}")
    return config
