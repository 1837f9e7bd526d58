"""Import Hugging Face's tokenizer files into a folder in Meta's layout, and export them for any `Tokenizer`."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama.convert.hf_config import read_json
from llama.convert.source import ConvertError
from llama.convert.template import TEMPLATES
from llama.convert.tokenizer import tokenizer_files
from llama.convert.vocab import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, read_pieces
from llama.files import JSON, detect_format
from llama.params import ModelArgs
from llama.tokenizer import Tokenizer
from llama.vocabulary.backend import check_size
from llama.vocabulary.tiktoken_ranks import LLAMA3_SPLIT, read_ranks
from llama.vocabulary.tokenizer_json import read_tokenizer_json

# Reading ------------------------------------------------------------------------------------------


def import_tokenizer(folder: Path, model_config: dict[str, Any], args: ModelArgs) -> tuple[dict[str, bytes], list[str]]:
    """Return (the tokenizer's files for the new folder, name -> content; notes).

    The vocabulary is tokenizer.model if that has all tokens, because the new folder then works without the tokenizers
    package. Otherwise it is tokenizer.json.
    """
    model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    config = _read_if_exists(folder / "tokenizer_config.json")
    special_tokens = _read_if_exists(folder / "special_tokens_map.json")
    if config.get("chat_template") is None and (path := folder / "chat_template.jinja").exists():
        check_size(path)
        config["chat_template"] = path.read_text(encoding="utf-8", errors="replace")
    for path in (model, fast):
        if path.exists() and (kind := detect_format(path)) not in (None, JSON):
            raise ConvertError(f"{path.name} is {kind}: fetch it again")
    tokenizer = Tokenizer(model, use_scaled_rope=args.use_scaled_rope) if model.exists() else None
    if fast.exists():
        reader = read_tokenizer_json(fast)
        for name in ("bos", "eos", "pad"):  # by name, or if no file names it, by the id in config.json
            ids = model_config.get(f"{name}_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            token_id = next((i for i in ids if type(i) is int and 0 <= i < args.vocab_size), None)
            tokens = [config.get(f"{name}_token"), special_tokens.get(f"{name}_token")]
            tokens += [] if token_id is None else [reader.id_to_token(token_id)]
            config[f"{name}_token"] = next((token for token in tokens if token is not None), None)
        if tokenizer is None or not _is_equivalent(model, tokenizer, reader, config["eos_token"]):
            return tokenizer_files({fast.name: fast.read_bytes()}, config, args.vocab_size), []
    if tokenizer is not None:
        added = _read_if_exists(folder / "added_tokens.json")
        if any(not isinstance(i, int) or i >= tokenizer.n_words for i in added.values()):
            raise ConvertError(
                "tokenizer.model lacks the tokens of added_tokens.json: fetch tokenizer.json too, which has all"
            )
        return tokenizer_files({model.name: model.read_bytes()}, config, args.vocab_size), []
    return {}, [f"{folder} has neither tokenizer.model nor tokenizer.json: put one into the new folder"]


def _read_if_exists(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _is_equivalent(path: Path, tokenizer: Tokenizer, fast: Any, eos: Any) -> bool:
    """Whether a tokenizer.model has every token of a tokenizer.json under the same id, and the same EOS."""
    from sentencepiece import SentencePieceProcessor

    if tokenizer.n_words <= max(fast.get_vocab().values(), default=-1):
        return False
    if tokenizer.kind != "sentencepiece":  # in tiktoken ranks only special tokens have names
        return all(fast.token_to_id(name) in (None, i) for name, i in tokenizer.special_ids.items())
    eos = eos.get("content") if isinstance(eos, dict) else eos
    pieces = SentencePieceProcessor(model_file=str(path))
    names = [pieces.id_to_piece(i) for i in range(tokenizer.n_words)]
    return eos in (None, names[tokenizer.eos_id]) and all(fast.id_to_token(i) == name for i, name in enumerate(names))


# Writing ------------------------------------------------------------------------------------------


def export_tokenizer(path: Path, use_scaled_rope: bool) -> dict[str, str]:
    """The contents of tokenizer.json and tokenizer_config.json for a tokenizer of this package, by file name.

    With them, transformers encodes as `llama.tokenizer.Tokenizer` does, except that names of special tokens in a text
    become ids. Raises ConvertError or TokenizerError.

    path: the tokenizer file. use_scaled_rope: params.json's key, see `Tokenizer`.
    """
    from tokenizers import Tokenizer as FastTokenizer

    tokenizer = Tokenizer(path, use_scaled_rope=use_scaled_rope)
    config_path = path.with_name("tokenizer_config.json")
    source: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
    # A model's own tokenizer_class would rebuild the tokenizer instead of using the file.
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.kind == "tokenizer.json":
        text = path.read_text(encoding="utf-8")
        # transformers adds BOS only if the post-processor in this file does.
        if tokenizer.adds_bos and not FastTokenizer.from_str(text).encode("").ids:
            text = json.dumps(json.loads(text) | {"post_processor": _bos_template(tokenizer)}, ensure_ascii=False)
        kept: tuple[str, ...] = ("unk_token", "pad_token", "add_bos_token", "chat_template")
    else:
        content = _from_sentencepiece(path) if tokenizer.kind == "sentencepiece" else _from_ranks(path, tokenizer)
        text = json.dumps(content | {"post_processor": _bos_template(tokenizer)}, ensure_ascii=False)
        config |= {"add_bos_token": tokenizer.adds_bos, "unk_token": content["model"]["unk_token"]}
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
    """The content of a tokenizer.json, without post-processor, for a SentencePiece model."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(path))
    # Only the identity normalizer is supported. Others change this text, which has a ligature, and repeated, leading
    # and trailing spaces.
    normalized = model.normalize("  \N{LATIN SMALL LIGATURE FI}  a ")
    unchanged = f"{SPACE}{SPACE}\N{LATIN SMALL LIGATURE FI}{SPACE}{SPACE}a{SPACE}"
    if normalized not in (unchanged, SPACE + unchanged):
        raise ConvertError(f"{path} normalizes the text before it splits it ({normalized!r}), which is not supported")
    has_prefix = normalized != unchanged
    pieces = read_pieces(path.read_bytes())
    normal = {piece: score for piece, score, kind in pieces if kind == NORMAL}
    if unused := {piece for piece, _, kind in pieces if kind == UNUSED}.intersection(
        left + right for left, right in _merges([piece for piece, _, kind in pieces if kind in (NORMAL, UNUSED)])
    ):
        # SentencePiece merges into unused pieces too, and splits them again at the end.
        raise ConvertError(f"{path} marks {min(unused)!r} as unused, but merges use it: not supported")
    merges = _merges(normal)
    merges.sort(key=lambda pair: -normal[pair[0] + pair[1]])  # the best score is merged first
    added = [
        _added_token(i, piece, special=kind != USER_DEFINED)
        for i, (piece, _, kind) in enumerate(pieces)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    # The normalizer prepends a space to the text. The tokenizers package also normalizes user-defined pieces before it
    # searches the text for them, so the normalizer must not change a string that is exactly such a piece.
    user_defined = "|".join(re.escape(piece) for piece, _, kind in pieces if kind == USER_DEFINED)
    prepend: dict[str, Any] = {"type": "Prepend", "prepend": SPACE}
    if user_defined:
        pattern = rf"\A(?!\z)(?!(?:{user_defined})\z)"
        prepend = {"type": "Replace", "pattern": {"Regex": pattern}, "content": SPACE}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    from_space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return _tokenizer_json(
        added,
        normalizer={"type": "Sequence", "normalizers": [prepend] * has_prefix + [from_space]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        vocab={piece: i for i, (piece, _, _) in enumerate(pieces)},
        merges=merges,
        unk_token=pieces[model.unk_id()][0],
        byte_fallback=any(kind == BYTE for _, _, kind in pieces),
    )


def _from_ranks(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json, without post-processor, for tiktoken ranks of Llama 3."""
    letters = _byte_letters()
    tokens = ["".join(letters[byte] for byte in token) for token in read_ranks(path)]
    vocab = {token: rank for rank, token in enumerate(tokens)}
    merges = _merges(vocab)
    merges.sort(key=lambda pair: vocab[pair[0] + pair[1]])
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _tokenizer_json(
        [_added_token(i, name, special=True) for name, i in tokenizer.special_ids.items()],
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]},
        decoder=byte_level,
        vocab=vocab,
        merges=merges,
        ignore_merges=True,  # a pre-token that is a token needs no merges
    )


def _merges(pieces: Iterable[str]) -> list[tuple[str, str]]:
    """All pairs of pieces whose concatenation is a piece too, in the order of the concatenations."""
    known = set(pieces)
    return [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in known and piece[i:] in known
    ]


def _byte_letters() -> list[str]:
    """The printable character that byte-level vocabularies use for each byte: its own, or one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _added_token(i: int, content: str, special: bool) -> dict[str, Any]:
    """A token that is matched before any merge: in the raw text if it is special, else in the normalized text."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": i, "content": content, **flags, "special": special}


def _bos_template(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """A post-processor that adds BOS, or None if the tokenizer adds none."""
    if not tokenizer.adds_bos:
        return None
    name = next(name for name, i in tokenizer.special_ids.items() if i == tokenizer.bos_id)
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    text, second = ({"Sequence": {"id": letter, "type_id": i}} for i, letter in enumerate("AB"))
    special = {name: {"id": name, "ids": [tokenizer.bos_id], "tokens": [name]}}
    pair = [bos, text, {"SpecialToken": {"id": name, "type_id": 1}}, second]
    return {"type": "TemplateProcessing", "single": [bos, text], "pair": pair, "special_tokens": special}


def _tokenizer_json(
    added: list[dict[str, Any]],
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    **model: Any,
) -> dict[str, Any]:
    """The content of a tokenizer.json, without post-processor. model: keys of the BPE model."""
    bpe: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    bpe |= {"end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": False, "ignore_merges": False}
    parts: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    parts |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder}
    return parts | {"model": bpe | model}
