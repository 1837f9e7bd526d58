"""Read and write Hugging Face folders of Llama, Mistral and Phi-3.

`hf_config` handles config.json, `hf_weights` safetensors and pytorch_model.bin, `hf_tokenizer` tokenizers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llama.chat.formats import find_chat_format
from llama.checkpoint.layout import EMBEDDING, OUTPUT, tensor_shapes
from llama.convert.hf_config import family_of, read_json, read_max_positions, read_params, read_tied, write_config
from llama.convert.hf_tokenizer import export_tokenizer, import_tokenizer
from llama.convert.hf_weights import (
    NAMES,
    SAFETENSORS_TYPES,
    hf_name,
    interleave,
    n_rotary_heads,
    open_weights,
    split_fused,
    write_weights,
)
from llama.convert.params import check_shapes
from llama.convert.source import ConvertError, Source
from llama.params import ModelArgs
from llama.tokenizer import Tokenizer, find_tokenizer


def read(folder: Path) -> Source:
    """Read and check the configuration and the names and shapes of all tensors. Raises ConvertError."""
    try:
        return _read(folder)
    except ModuleNotFoundError as error:
        raise ConvertError(
            f"{folder} needs the Python package {error.name}: pip install 'llama-runner[convert]'"
        ) from error
    except OSError as error:
        raise ConvertError(f"{error.filename or folder} cannot be read ({error.strerror}): fetch it again") from error
    except ConvertError as error:
        raise ConvertError(f"{folder}: {error}") from error


def _read(folder: Path) -> Source:
    config = read_json(folder / "config.json")
    family = family_of(config)
    try:
        params, is_tied, max_positions = read_params(config, family), read_tied(config), read_max_positions(config)
    except ConvertError as error:
        raise ConvertError(f"config.json: {error}") from error
    stored = open_weights(folder)
    args = ModelArgs(**params)
    shapes = tensor_shapes(args)
    if is_tied and NAMES[OUTPUT] not in stored:  # as in transformers, a stored output matrix wins
        del shapes[OUTPUT]
    if family == "phi3":
        stored = split_fused(stored, shapes)
    expected = {hf_name(name): shape for name, shape in shapes.items()}
    check_shapes({name: tensor.shape for name, tensor in stored.items()}, expected)
    for name in expected:
        if stored[name].dtype not in SAFETENSORS_TYPES:
            raise ConvertError(
                f"{name} is stored as {stored[name].dtype}: float32, bfloat16 and float16 are supported, "
                "use the unquantized folder"
            )

    def reader(name: str) -> Callable[[], torch.Tensor]:
        tensor, heads = stored[hf_name(name)], n_rotary_heads(name, args)
        if heads is None:
            return lambda: tensor.read_rows(0, tensor.shape[0])
        return lambda: interleave(tensor.read_rows(0, tensor.shape[0]), heads)

    files, notes = import_tokenizer(folder, config, args)
    if args.sliding_window is not None:
        notes.append(f"attention has a sliding window of {args.sliding_window} ids: max_seq_len must not be longer")
    tensors = {name: reader(name) for name in shapes}
    dtypes = {name: stored[hf_name(name)].dtype for name in shapes}
    return Source(params, tensors, files, dtypes, max_positions=max_positions, notes=notes)


def check_shards(args: ModelArgs, shards: int) -> None:
    """Raise ConvertError if `shards` is not an integer from 1 to the number of tensors - 1."""
    tensors = len(tensor_shapes(args))
    if type(shards) is not int or not 1 <= shards < tensors:
        raise ConvertError(f"--shards is {shards!r}, expected a number of files from 1 to {tensors - 1}")


def write(source: Source, folder: Path, dtypes: dict[str, torch.dtype], shards: int) -> None:
    """Write all files into an empty folder, with one tensor in memory at a time."""
    args = source.args
    write_weights(source, folder, dtypes, shards)
    for filename, content in source.files.items():
        (folder / filename).write_bytes(content)
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    stop_ids: set[int] = set()
    if source.files:
        path = find_tokenizer(folder)
        for filename, text in export_tokenizer(path, args.use_scaled_rope).items():
            (folder / filename).write_text(text, encoding="utf-8")
        tokenizer = Tokenizer(path, use_scaled_rope=args.use_scaled_rope)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
        ids = {name: None if value == -1 else value for name, value in ids.items()}
        chat_format = find_chat_format(tokenizer)
        stop_ids = tokenizer.stop_tokens | (chat_format.stop_tokens if chat_format else set())
    write_config(source, folder, dtypes[EMBEDDING], ids, stop_ids)
