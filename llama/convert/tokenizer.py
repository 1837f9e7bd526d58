"""The tokenizer's files of a new folder."""

import json
import tempfile
from pathlib import Path
from typing import Any

from llama.convert.meta import ConvertError
from llama.convert.template import chat_keys
from llama.tokenizer import Tokenizer, TokenizerError, find_tokenizer


def tokenizer_files(vocabulary: dict[str, bytes], config: dict[str, Any], rows: int) -> dict[str, bytes]:
    """The files of the tokenizer: its vocabulary as it is, and tokenizer_config.json with what the runner has to know.

    vocabulary: one file, tokenizer.model or tokenizer.json. config: a tokenizer_config.json of Hugging Face's kind.
    rows: of the embedding. The keys added to it: chat_format (null where the chat template is none that the runner
    knows, or there is none), default_system, system_prefix, and vocab_size where rows are left without a token.
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
            f"the tokenizer has {tokenizer.n_words} ids, the embedding {rows} rows: they are of two models"
        )
    if config.get("chat_template") or "chat_format" not in config:  # else it comes from a folder of ours
        config = config | chat_keys(config.get("chat_template"), config, tokenizer.special_ids)
    if tokenizer.n_words < rows:
        config["vocab_size"] = rows
    return vocabulary | {"tokenizer_config.json": _json(config)}


def _json(value: Any) -> bytes:
    # Half of a surrogate pair becomes JSON's own escape.
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
