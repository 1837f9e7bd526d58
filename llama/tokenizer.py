"""Text to ids and back: SentencePiece (Llama 1 and 2, Mistral), tiktoken ranks (Llama 3) and tokenizer.json behind one
`Tokenizer`."""

import base64
import contextlib
import json
import operator
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

from typing_extensions import NotRequired

from llama.files import as_path, detect_format, expect_file

if TYPE_CHECKING:
    from llama.chat.formats import ChatFormat as ChatFormat

Kind = Literal["sentencepiece", "tiktoken", "tokenizer.json"]
Names = Literal["all"] | Collection[str]
Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """destination: whom a message of Code Llama 70B-Instruct is for; other formats do not read it."""

    role: Role
    content: str
    destination: NotRequired[str]


Dialog = Sequence[Message]

# Special tokens that end an answer, beside EOS, wherever a vocabulary has them.
STOP_NAMES = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>")
# How Llama 3 cuts a text into the pieces within which bytes are merged.
LLAMA3_SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# Those of Llama 3's special tokens that have a use, by their place behind the ranks; the others are reserved.
LLAMA3_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
LLAMA31_SPECIAL = LLAMA3_SPECIAL | {
    4: "<|finetune_right_pad_id|>",
    5: "<|step_id|>",
    8: "<|eom_id|>",
    10: "<|python_tag|>",
    11: "<|image|>",
}
N_LLAMA3_SPECIAL = 256
# Bytes of a file. The largest that are published: 5 MB of SentencePiece, 33 MB of tokenizer.json (262,144 tokens).
SIZE_LIMIT = 64 * 2**20
RANKS_LIMIT = 16 * 2**20  # of a rank file; Llama 3's has 2 MB
PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
ESCAPED_LETTER = re.compile(rb"(?<!\\)(\\\\)*\\u00(5f|6[1-9a-f]|7[0-9a])", re.IGNORECASE)  # of its name
# Code Llama's pieces for infilling, in the order of prefix_id, middle_id, suffix_id and eot_id, and its end of a turn.
INFILLING = ("\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>", "\u2581<EOT>")
STEP = "<step>"
MARK = "\N{WHITE SMILING FACE}"  # goes before a text that must get no space before it
SPACES_LIMIT = 999_998  # tiktoken's pattern matcher panics at longer runs of white space


class TokenizerError(ValueError):
    """The tokenizer file is missing, of an unknown kind, or does not belong to the checkpoint."""


def __getattr__(name: str) -> Any:
    """ChatFormat, which Meta's module has here, too; its own module imports this one."""
    if name == "ChatFormat":
        from llama.chat.formats import ChatFormat

        return ChatFormat
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Tokenizer:
    """A tokenizer read from `tokenizer.model` (SentencePiece or tiktoken ranks) or `tokenizer.json`, told apart by
    content.

    use_scaled_rope: params.json's key, which says which special tokens belong to Llama 3's ranks: 3.1's or 3.0's.

    kind: "sentencepiece", "tiktoken" or "tokenizer.json".
    n_words: rows of the embedding. Models may have more than the tokenizer has ids; those beyond give no text.
    bos_id, eos_id, pad_id: -1 where the tokenizer has none.
    adds_bos: whether texts start with BOS (Llama's do, SmolLM2's do not).
    stop_tokens: ids that end a generation. special_ids, special_tokens: name -> id of the control tokens.
    prefix_id, middle_id, suffix_id, eot_id: Code Llama's infilling ids; step_id: the id of `<step>`, which ends a turn
    of Code Llama 70B-Instruct. None where the vocabulary lacks them.
    rstrip_ids: special ids behind which white space is dropped from a text.
    chat_format, default_system: the dialog format that belongs to the tokenizer and the system message it puts
    before a dialog without one; None where unknown. system_prefix: what it puts before every system message.
    dialog_bos: whether BOS goes before dialogs in formats that have none.
    unsettled_ids: bytes whose text depends on all the bytes that follow, as the backend decodes a run of them at once.

    `tokenizer_config.json` beside the file is read for chat_format, default_system, system_prefix, dialog_bos,
    add_bos_token and vocab_size (n_words); a tokenizer.json needs it for its BOS, EOS and padding too.

    Raises TokenizerError.
    """

    num_reserved_special_tokens = N_LLAMA3_SPECIAL
    pat_str = LLAMA3_SPLIT

    def __init__(self, model_path: str | Path, *, use_scaled_rope: bool = False):
        path = as_path(model_path)
        self.kind = _kind(path)
        self.config_path = path.with_name("tokenizer_config.json")
        config = _read_config(self.config_path, needed=self.kind == "tokenizer.json")
        backend: _Backend
        if self.kind == "sentencepiece":
            backend = _SentencePiece(path)
        elif self.kind == "tiktoken":
            backend = _Tiktoken(path, LLAMA31_SPECIAL if use_scaled_rope else LLAMA3_SPECIAL)
        else:
            backend = _TokenizerJson(path, config)
        self._backend, self._n_own = backend, backend.n_words
        self.special_ids, self.rstrip_ids = backend.special_ids, backend.rstrip_ids
        self.special_tokens = self.special_ids
        self.prefix_id, self.middle_id, self.suffix_id, self.eot_id = map(backend.find, INFILLING)
        self.step_id = backend.find(STEP)
        self.bos_id, self.eos_id, self.pad_id = backend.bos_id, backend.eos_id, backend.pad_id
        self.adds_bos = backend.adds_bos and (self.kind != "sentencepiece" or config.get("add_bos_token") is not False)
        self.unsettled_ids = backend.unsettled_ids
        self.stop_tokens = {self.eos_id} - {-1}
        self.stop_tokens |= {self.special_ids[name] for name in STOP_NAMES if name in self.special_ids}
        # Ids that no text becomes. An unknown character may become the token for such, unless that has another use.
        harmless = {backend.unk_id} - {self.bos_id, self.eos_id, self.pad_id} - self.stop_tokens
        self._reserved = {i: name for name, i in self.special_ids.items() if i not in harmless}
        self.chat_format: str | None = config.get("chat_format", backend.chat_format)
        self.default_system: str | None = config.get("default_system")
        self.system_prefix: str = config.get("system_prefix", "")
        self.dialog_bos: bool = config.get("dialog_bos", False)
        self.n_words: int = config.get("vocab_size", self._n_own)
        if self.n_words < self._n_own:
            raise TokenizerError(
                f"tokenizer_config.json says vocab_size {self.n_words}, but ids of {path} go up to {self._n_own - 1}: "
                "correct the key or take it out"
            )

    @property
    def sp_model(self) -> Any:
        """The SentencePieceProcessor. AttributeError for other kinds of tokenizer."""
        if self.kind != "sentencepiece":
            raise AttributeError(f"a {self.kind} tokenizer has no sp_model, only SentencePiece tokenizers have one")
        return self._backend.model

    @property
    def model(self) -> Any:
        """The tiktoken Encoding of Llama 3's ranks, special tokens included. AttributeError for other kinds."""
        if self.kind != "tiktoken":
            raise AttributeError(f"a {self.kind} tokenizer has no model, only tiktoken ranks have one")
        return self._backend.model

    def encode(
        self, s: str, bos: bool, eos: bool, *, allowed_special: Names = (), disallowed_special: Names = ()
    ) -> list[int]:
        """Ids of a text, with BOS before and EOS behind where asked for.

        allowed_special: names of special tokens, or "all", that become their ids where the text holds them. By default
        none does: text that users write cannot end a turn.
        disallowed_special: names that the text must not hold; "all" is every special token that is not allowed.

        Raises TypeError for what is no text, ValueError for one that the tokenizer cannot take or that holds a
        disallowed name.
        """
        _check_text(s)
        if disallowed_special == "all":
            allowed = self.special_ids.keys() if allowed_special == "all" else allowed_special
            disallowed_special = self.special_ids.keys() - set(allowed)
        if found_name := next((name for name in disallowed_special if name in s), None):
            raise ValueError(
                f"the text holds {found_name!r}, which disallowed_special names: take it out of the text, or leave it "
                "out of disallowed_special to encode it as text"
            )
        ids = [self.bos_id] * bos
        for i, part in enumerate(self._split(s, allowed_special)):
            if i % 2:
                ids.append(self.special_ids[part])
            elif part := part.lstrip() if i and ids[-1] in self.rstrip_ids else part:
                found = self._backend.encode(part)
                if not self._reserved.keys().isdisjoint(found):
                    # A vocabulary that holds the name as an ordinary piece, too.
                    name = next(self._reserved[i] for i in found if i in self._reserved)
                    raise ValueError(
                        f"this tokenizer makes its special token {name!r} of a part of the text: change it"
                    )
                ids += found
        return ids + [self.eos_id] * eos

    def _split(self, s: str, names: Names) -> list[str]:
        """Texts and the special tokens between them, in turn."""
        names = self.special_ids.keys() if names == "all" else names
        if not names:
            return [s]
        if unknown := sorted(set(names) - self.special_ids.keys()):
            raise ValueError(f"allowed_special names {unknown[0]!r}, which is no special token of this tokenizer")
        return re.split(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})", s)

    def normalize(self, s: str) -> str:
        """A text as it is before it is cut: some tokenizers rewrite it, as NFKC makes "[" of a full-width bracket.
        Spaces may have become U+2581. Raises as `encode` does."""
        _check_text(s)
        return self._backend.normalize(s)

    def decode(self, ids: int | Sequence[int]) -> str:
        """Text of ids, or of one. Bytes that are not UTF-8 give U+FFFD. Special ids give their names in Llama 3's ranks
        and nothing in other tokenizers, as Meta's do. Raises ValueError for ids outside the vocabulary."""
        return self._backend.decode([token for token in self._read_ids(ids) if token < self._n_own])

    def decode_token(self, token: int) -> str:
        """One id as people read it: leading spaces kept, special ids by name. Raises as `decode` does."""
        (token,) = self._read_ids(token)
        return self._backend.piece(token) if token < self._n_own else ""

    def token_piece(self, token: int) -> str:
        """The vocabulary's own spelling of an id, with U+2581 for spaces in SentencePiece; other kinds have none and
        give `decode_token`. Raises as `decode` does."""
        (token,) = self._read_ids(token)
        if self.kind == "sentencepiece" and token < self._n_own:
            return self.sp_model.id_to_piece(token)
        return self.decode_token(token)

    def encode_infilling(self, s: str) -> list[int]:
        """Ids of a text that continues another one: without the space that SentencePiece puts before a text. Raises as
        `encode` does."""
        mark, alone = (self.encode(text, bos=False, eos=False) for text in (MARK, s))
        marked = self.encode(MARK + s, bos=False, eos=False)
        return marked[len(mark) :] if marked[: len(mark)] == mark and self.kind != "tiktoken" else alone

    def decode_infilling(self, ids: Sequence[int]) -> str:
        """Text of ids that continue another text: with its leading space. Raises as `decode` does."""
        mark = self.encode(MARK, bos=False, eos=False)
        return self.decode([*mark, *ids])[len(self.decode(mark)) :]

    def _read_ids(self, ids: Any) -> list[int]:
        try:
            found = [operator.index(ids)]
        except TypeError:
            found = list(map(operator.index, ids))
        for token in found:
            if not 0 <= token < self.n_words:
                raise ValueError(
                    f"id {token} is outside the vocabulary, whose ids are 0 to {self.n_words - 1}: take padding and "
                    "other placeholders out before you decode"
                )
        return found


def _check_text(s: object) -> None:
    if not isinstance(s, str):
        raise TypeError(f"a text to encode must be a string, not {type(s).__name__}")
    try:
        s.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair, which is no character") from None


def find_tokenizer(ckpt_dir: Path) -> Path:
    """The tokenizer in a checkpoint folder, or beside it as Meta's downloads lay it out."""
    names = ("tokenizer.model", "tokenizer.json")
    for folder in (ckpt_dir, ckpt_dir.resolve().parent):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise TokenizerError(f"no {' or '.join(names)} in {ckpt_dir} or beside it: give --tokenizer_path")


def check_size(path: Path) -> None:
    """Before a file of a tokenizer is read. Raises TokenizerError, or OSError."""
    expect_file(path)
    if (size := path.stat().st_size) > SIZE_LIMIT:
        raise TokenizerError(f"{path} has {size:,} bytes, expected {SIZE_LIMIT:,} at most: fetch it again")


def read_tokenizer_json(path: Path) -> Any:
    """A tokenizers.Tokenizer. Raises TokenizerError."""
    try:
        from tokenizers import Tokenizer as Reader
    except ImportError:
        raise TokenizerError(f"{path} needs the tokenizers package: pip install 'llama-runner[convert]'") from None
    check_size(path)
    _refuse_prefix(path)
    with _rust_errors(f"{path} is not a tokenizer.json, fetch it again"):
        return Reader.from_file(str(path))


def _refuse_prefix(path: Path) -> None:
    """BERT's tokenizers have a continuing_subword_prefix, no Llama's has. With one, the package takes as many bytes off
    every merge, also where that is half of a character: then the process dies, with no error that could be caught.

    Looked for in the bytes: parsed, 64 MiB of JSON may take 2.5 GB.
    """
    content = path.read_bytes()
    if PREFIX.search(content) or ESCAPED_LETTER.search(content):
        raise TokenizerError(f"{path} has a continuing_subword_prefix, which no Llama's has: fetch the model's own")


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of a tiktoken file, which is lines of "base64 rank", in the order of their ranks."""
    if (size := path.stat().st_size) > RANKS_LIMIT:
        raise TokenizerError(f"{path} has {size:,} bytes, a rank file at most {RANKS_LIMIT:,}: fetch it again")
    ranks: dict[bytes, int] = {}
    for n, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if not token or not rank.isdigit():
                raise ValueError
            ranks[token] = int(rank)
        except ValueError:
            raise TokenizerError(
                f"{path}, line {n}: {str(line[:60])[1:]} is not a token in base64 and its rank, fetch the file again"
            ) from None
        if len(ranks) < n:
            raise TokenizerError(f"{path}, line {n}: a second rank for the token {token!r}, fetch the file again")
    tokens = sorted(ranks, key=ranks.__getitem__)
    for i, token in enumerate(tokens):
        if (found := ranks[token]) != i:
            fault = f"rank {found} twice" if found < i else f"no rank {i}"
            raise TokenizerError(f"{path} has {fault} in {len(tokens):,} lines, fetch it again")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise TokenizerError(f"{path} has no rank for the byte 0x{missing[0]:02X}, fetch it again")
    return tokens


def _kind(path: Path) -> Kind:
    try:
        check_size(path)
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError as error:
        raise TokenizerError(f"tokenizer {path} cannot be read: {error.strerror}") from None
    if start.lstrip().startswith(b"{"):
        return "tokenizer.json"
    if start.startswith(b"\n"):  # the first field of a SentencePiece model, in protobuf's encoding
        return "sentencepiece"
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", start):
        return "tiktoken"
    raise TokenizerError(
        f"{path} is {detect_format(path) or 'of no known kind'}, expected a SentencePiece model, tiktoken ranks or a "
        "tokenizer.json: fetch it again"
    )


def _read_config(path: Path, needed: bool) -> dict[str, Any]:
    """tokenizer_config.json; of our own keys, those that it has are of the right type."""
    if not needed and not path.exists():
        return {}
    try:
        check_size(path)
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except TokenizerError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        use = ", which names the special tokens," if needed else ""
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


@contextlib.contextmanager
def _rust_errors(what: str) -> Iterator[None]:
    """The tokenizers package raises bare Exception, or where it panics PanicException, which is not even that."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what}: {error}") from None


class _Backend(Protocol):
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
    chat_format: str | None  # where tokenizer_config.json does not say

    def normalize(self, s: str) -> str: ...
    def encode(self, s: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def piece(self, token: int) -> str: ...
    def find(self, piece: str) -> int | None: ...


class _SentencePiece:
    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        try:
            self.model = SentencePieceProcessor(model_file=str(path))
            self.n_words: int = self.model.vocab_size()
            self.unk_id: int = self.model.unk_id()
            names = self.model.id_to_piece(list(range(self.n_words)))
            self.model.decode([self.unk_id])  # which has a text of its own
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} holds a piece that is not UTF-8, fetch it again") from error
        except (OSError, RuntimeError, IndexError) as error:
            raise TokenizerError(f"{path} is not a SentencePiece model, fetch it again") from error
        self.bos_id: int = self.model.bos_id()
        self.eos_id: int = self.model.eos_id()
        self.pad_id: int = self.model.pad_id()
        self.adds_bos = self.bos_id >= 0
        self.unsettled_ids: set[int] = set()
        self.rstrip_ids: set[int] = set()
        self.special_ids: dict[str, int] = {name: i for i, name in enumerate(names) if self.model.is_control(i)}
        self.chat_format: str | None = "llama2" if self.find(STEP) is None else "codellama-70b"

    def normalize(self, s: str) -> str:
        return self.model.normalize(s)

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

    def find(self, piece: str) -> int | None:
        found: int = self.model.piece_to_id(piece)  # the id for what is unknown where there is no such piece
        return found if self.model.id_to_piece(found) == piece else None


class _Tiktoken:
    chat_format: str | None = "llama3"
    adds_bos = True

    def __init__(self, path: Path, special: dict[int, str]):
        tokens = read_ranks(path)
        try:
            from tiktoken import Encoding
        except ImportError:
            raise TokenizerError(f"{path} needs the tiktoken package: pip install 'llama-runner[convert]'") from None
        ranks = {token: rank for rank, token in enumerate(tokens)}
        reserved = iter(range(N_LLAMA3_SPECIAL))
        names = [special.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(N_LLAMA3_SPECIAL)]
        self.special_ids = {name: len(ranks) + i for i, name in enumerate(names)}
        # No text becomes a special token in encode_ordinary, though the Encoding has them for those who use it.
        self.model = Encoding(path.name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=self.special_ids)
        self.bytes = [*tokens, *(name.encode() for name in names)]  # of each id
        self.n_words = len(self.bytes)
        self.bos_id = self.special_ids["<|begin_of_text|>"]
        self.eos_id = self.special_ids["<|end_of_text|>"]
        self.pad_id = self.unk_id = -1
        self.unsettled_ids: set[int] = set()
        self.rstrip_ids: set[int] = set()

    def normalize(self, s: str) -> str:
        return s

    def encode(self, s: str) -> list[int]:
        if len(s) > SPACES_LIMIT and (longest := max(map(len, re.findall(r"\s+", s)), default=0)) > SPACES_LIMIT:
            raise ValueError(
                f"the text holds {longest:,} white-space characters in a row, tiktoken takes {SPACES_LIMIT:,}: "
                "shorten them"
            )
        return self.model.encode_ordinary(s)

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.bytes[i] for i in ids).decode(errors="replace")

    def piece(self, token: int) -> str:
        return self.decode([token])

    def find(self, piece: str) -> int | None:
        return self.special_ids.get(piece)


class _TokenizerJson:
    """A Hugging Face tokenizer.json; the tokenizer_config.json beside it says which tokens are BOS, EOS and padding."""

    chat_format: str | None = None

    def __init__(self, path: Path, config: dict[str, Any]):
        self.model = read_tokenizer_json(path)
        from tokenizers import AddedToken

        self.model.no_padding()  # a text is encoded as it is, all of it, whatever the file asks for
        self.model.no_truncation()
        self.bos_id, self.eos_id, self.pad_id = (
            self._id_of(config, key, path) for key in ("bos_token", "eos_token", "pad_token")
        )
        self.model.encode_special_tokens = True  # "<|im_end|>" in a text stays text
        added = self.model.get_added_tokens_decoder()
        for i in {self.bos_id, self.eos_id} - {-1}:
            # Also where it is not marked special, as Phi-3's </s>: a text could end a turn.
            self.model.add_special_tokens([added.get(i, AddedToken(self.model.id_to_token(i), normalized=False))])
        added = self.model.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in added.items() if token.special}
        self.rstrip_ids = {i for i, token in added.items() if token.special and token.rstrip}
        self.n_words: int = max(self.model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        with _rust_errors(f"{path} cannot encode"):
            template_adds_bos = self.model.encode("").ids[:1] == [self.bos_id]
        self.unk_id = self._find_unk()
        # As transformers has it, where the file's post-processor counts whatever the configuration says.
        self.adds_bos = self.bos_id >= 0 and (template_adds_bos or bool(config.get("add_bos_token")))
        decoder = self.model.decoder.__getstate__() if self.model.decoder is not None else b""
        self.unsettled_ids: set[int] = set()
        if b"ByteFallback" in decoder:
            found = (self.model.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
            self.unsettled_ids = {token for token in found if token is not None}
        self._strips = b"Strip" in decoder or b"Metaspace" in decoder

    def _find_unk(self) -> int:
        from tokenizers import models

        model = self.model.model
        if not isinstance(model, models.Unigram):
            name = getattr(model, "unk_token", None)
            return -1 if name is None or (found := self.model.token_to_id(name)) is None else found
        try:  # which does not tell: ask for what is no character
            return next((token.id for token in model.tokenize("\U0010ffff")), -1)
        except Exception:  # the package's own: there is none
            return -1

    def _id_of(self, config: dict[str, Any], key: str, path: Path) -> int:
        token = config.get(key)
        if token is None:
            return -1
        name = token.get("content") if isinstance(token, dict) else token
        found = self.model.token_to_id(str(name))
        if found is None:
            raise TokenizerError(f"{path} has no token {name!r}, which tokenizer_config.json calls {key}")
        return found

    def normalize(self, s: str) -> str:
        with _rust_errors("the tokenizer's normalizer gives up on the text"):
            return s if self.model.normalizer is None else self.model.normalizer.normalize_str(s)

    def encode(self, s: str) -> list[int]:
        with _rust_errors("the tokenizer gives up on the text"):
            return self.model.encode(s, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        with _rust_errors("the tokenizer gives up on the ids"):
            return self.model.decode(ids)

    def piece(self, token: int) -> str:
        with _rust_errors("the tokenizer gives up on the ids"):
            alone = self.model.decode([token], skip_special_tokens=False)
            if self._strips:  # the space before the first id: look at the second of two
                return self.model.decode([token, token], skip_special_tokens=False)[len(alone) :]
        return alone

    def find(self, piece: str) -> int | None:
        return self.model.token_to_id(piece)
