"""Prepare the tokenizer's files for a converted folder."""

import json
import tempfile
from pathlib import Path
from typing import Any

from llama.convert.source import ConvertError
from llama.convert.template import chat_keys
from llama.tokenizer import Tokenizer, TokenizerError, find_tokenizer


def tokenizer_files(vocabulary: dict[str, bytes], config: dict[str, Any], rows: int) -> dict[str, bytes]:
    """The vocabulary file, unchanged, and a tokenizer_config.json with the keys that this package needs.

    vocabulary: one file, tokenizer.model or tokenizer.json, name -> content.
    config: the content of Hugging Face's tokenizer_config.json. These keys are added: chat_format (null unless the chat
        template is of a known format), default_system, system_prefix, dialog_bos, and vocab_size if the embedding has
        more rows than there are tokens.
    rows: the number of rows of the embedding.

    Raises ConvertError if there are more tokens than rows.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = vocabulary | {"tokenizer_config.json": _json(config)}
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            tokenizer = Tokenizer(find_tokenizer(Path(folder)))
        except TokenizerError as error:
            raise ConvertError(str(error).replace(f"{folder}/", "")) from error
    if tokenizer.n_words > rows:
        raise ConvertError(
            f"the tokenizer has {tokenizer.n_words} ids, the embedding {rows} rows: they are from different models"
        )
    if config.get("chat_template") or "chat_format" not in config:  # else an earlier conversion added these keys
        config = config | chat_keys(config.get("chat_template"), config, tokenizer.special_ids)
    if tokenizer.n_words < rows:
        config["vocab_size"] = rows
    return vocabulary | {"tokenizer_config.json": _json(config)}


def _json(value: Any) -> bytes:
    # UTF-8 has no lone surrogates: they become JSON escapes.
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
