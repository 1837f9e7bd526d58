"""Read one file of weights, written by any tool, into tensors under Meta's names.

Meta's own files are a dictionary of tensors by name. Trainers and fine-tuners wrap it (`{"model": ..., "step": ...}`),
put a prefix before the names (`module.`, `_orig_mod.`), and save buffers along with the weights; Mistral publishes
consolidated.safetensors. A file with two possible readings is refused, with an error that names both.
"""

import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.errors import CheckpointError, some_names
from llama.checkpoint.layout import Tensors
from llama.errors import is_out_of_memory
from llama.files import FOLDER, GGUF, LFS_POINTER, OLD_TORCH, PICKLE, SAFETENSORS, ZIP, detect_format

# Entries in which trainers store the weights; others hold the optimizer and similar state.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
MAX_WRAPPERS = 4  # levels of nesting
# Prefixes of all names: nn.DataParallel and DeepSpeed (module), Lightning (model), torch.compile (_orig_mod), FSDP.
PREFIX = re.compile(r"(?:(?:module|model|_orig_mod|_forward_module|_fsdp_wrapped_module)\.)*")
# Wrappers of single layers add their prefix inside the name: layers.0._orig_mod.attention.wq.weight.
INSERTED = re.compile(r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Buffers that the model computes itself: rotary frequencies (Llama 1's files have them), masks, caches.
BUFFER = re.compile(
    r"(?:.*\.)?(?:rope\.freqs|freqs_cis|freqs_cos|freqs_sin|inv_freq|(?:causal_|attn_)?mask|cache_[kv]|[kv]_cache)"
)
OLD_FORMAT_NOTE = (
    "the weights are in the format that torch.save wrote before 1.6, which cannot be memory-mapped: every rank reads "
    "whole files and keeps them in memory until the model is loaded (plan does not count that)"
)


@dataclass
class Shard:
    """The tensors of a file under Meta's names, and notes: a line for each thing that was renamed or skipped."""

    tensors: Tensors
    notes: list[str]


def open_shard(path: Path) -> Shard:
    """Memory-map a file and find the weights in it. Raises CheckpointError if it is damaged or holds anything else."""
    content, wrappers, others = _unwrap(path, read_file(path))
    notes = []
    if wrappers:
        skipped = f"; entries not read: {some_names(sorted(others))}" if others else ""
        notes.append(f"the weights were read from the entry {'.'.join(wrappers)!r}{skipped}")
    content, buffers = _remove_buffers(content)
    content, removed = _remove_prefixes(path, content)
    if removed:
        notes.append(f"{' and '.join(map(repr, sorted(removed)))} was removed from the names of the weights")
    if buffers:
        notes.append(f"buffers that the model computes itself were skipped: {some_names(buffers)}")
    tensors = _check_plain(path, content)
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        notes.append("weights are stored as float64 and loaded as float32")
    if needs_full_read(path):
        notes.append(OLD_FORMAT_NOTE)
    return Shard(tensors, notes)


def open_tensors(path: Path) -> Tensors:
    """Memory-map a file of torch.save that holds only tensors by name, without renaming. Raises CheckpointError."""
    return _check_plain(path, read_file(path))


def needs_full_read(path: Path) -> bool:
    """Whether a file cannot be memory-mapped, so that opening it reads all of it."""
    try:
        return detect_format(path) == OLD_TORCH
    except OSError:  # `read_file` reports it
        return False


def is_plain_tensor(value: Any) -> bool:
    """Whether it is a dense CPU tensor in which every element has its own place in the storage.

    Other tensors (meta, sparse, expanded, overlapping) can claim any size without having the data, so they are refused.
    Transposed tensors and slices are plain.
    """
    if not isinstance(value, torch.Tensor) or value.is_nested:
        return False
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_neg():
        return False
    span = 0  # largest offset that the axes with smaller strides reach
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride <= span:
            return False
        span += stride * max(0, size - 1)
    return value.untyped_storage().nbytes() >= value.numel() * value.itemsize


# Reading a file -----------------------------------------------------------------------------------


def read_file(path: Path) -> Any:
    """Load the saved object, memory-mapped if the format allows it. Raises CheckpointError.

    Pickles are loaded with weights_only=True, so they cannot run code.
    """
    try:
        kind = detect_format(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): fix that or fetch it again") from error
    if path.suffix == ".safetensors":
        return _read_safetensors(path, kind)
    if kind not in (ZIP, OLD_TORCH) or (kind == ZIP and not zipfile.is_zipfile(path)):
        if kind in (None, ZIP):
            raise CheckpointError(f"{path} is cut off or damaged: fetch it again")
        raise CheckpointError(f"{path} is {kind}, not what torch.save writes: {suggest_fix(kind)}")
    try:
        return torch.load(path, map_location="cpu", mmap=kind == ZIP, weights_only=True)
    except Exception as error:  # torch.load raises a dozen types; all mean that this file is not a checkpoint
        if isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(_explain_refusal(path, str(error))) from error
        # Only the first sentence: the rest of torch's message is guesses.
        reason = re.split(r"\n|(?<=\w)\. |  \(", str(error).strip())[0] or type(error).__name__
        fix = "raise the limit on memory (ulimit -v)" if is_out_of_memory(error) else "fetch it again"
        raise CheckpointError(f"{path} cannot be read ({reason}): {fix}") from error


def suggest_fix(kind: str | None) -> str:
    """What to do with a file of format `kind` (see `llama.files`) if a file of weights was expected."""
    fixes = {
        LFS_POINTER: "fetch the file that it points to (git lfs pull)",
        SAFETENSORS: "rename it to end in .safetensors",
        ZIP: "rename it to end in .pth",
        OLD_TORCH: "rename it to end in .pth",
        PICKLE: "if you trust it, load it and write its tensors with torch.save",
        GGUF: "convert it with: python -m llama convert SRC DST",
        FOLDER: "put the file there",
    }
    return fixes.get(kind or "", "fetch it again")


def _explain_refusal(path: Path, reason: str) -> str:
    """The message for a file with objects that weights_only refuses. reason: torch's own, which may name the class."""
    name = re.search(r"(?:GLOBAL|allowlisted:?|global) ([A-Za-z_][\w.]*\.\w+)", reason)
    refused = f" ({name[1]})" if name else ""
    return (
        f"{path} holds more than tensors, which could run code: it was not loaded{refused}; if you trust it, take "
        f"the weights out of torch.load('{path.name}', weights_only=False) and save them alone: "
        "torch.save(model.state_dict(), 'new.pth')"
    )


def _read_safetensors(path: Path, kind: str | None) -> Tensors:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise CheckpointError(
            f"{path} needs the Python package safetensors: pip install 'llama-runner[convert]'"
        ) from None
    if kind not in (None, SAFETENSORS):
        raise CheckpointError(f"{path} is {kind}, not a safetensors file: {suggest_fix(kind)}")
    try:
        file = safe_open(path, framework="pt")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is cut off or damaged ({error}): fetch it again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}): fix that") from error


def _unwrap(path: Path, content: Any) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return (tensors by name; the nested entries that hold them, outermost first; the other entries)."""
    wrappers: list[str] = []
    others: list[str] = []
    while True:
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise CheckpointError(f"{path} does not hold tensors by name: not a Llama checkpoint in Meta's layout")
        nested = [key for key in WRAPPERS if isinstance(content.get(key), dict)]
        if len(nested) > 1:
            raise CheckpointError(
                f"{path} holds the entries {' and '.join(nested)}, both could be the weights: save one"
            )
        if not nested or len(wrappers) == MAX_WRAPPERS:
            return content, wrappers, others
        outside = [key for key in content if key != nested[0]]
        if tensors := [key for key in outside if isinstance(content[key], torch.Tensor) and "." in key]:
            raise CheckpointError(
                f"{path} holds weights inside the entry {nested[0]} and outside it ({some_names(sorted(tensors))}): "
                "save one of them"
            )
        wrappers += nested
        others += outside
        content = content[nested[0]]


def _remove_buffers(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return (tensors without the buffers; names of the buffers, with N in place of the layer's number)."""
    buffers = {key for key in content if BUFFER.fullmatch(key)}
    names = {re.sub(r"\.\d+\.", ".N.", key) for key in buffers}
    return {key: value for key, value in content.items() if key not in buffers}, sorted(names)


def _remove_prefixes(path: Path, content: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Return (tensors by Meta's names, the strings that were removed from the names)."""
    if any(key.endswith("embed_tokens.weight") for key in content):
        fix = "name it pytorch_model.bin, put config.json next to it, and convert that folder: python -m llama convert"
        raise CheckpointError(f"{path} holds tensors under Hugging Face's names: {fix}")
    prefixes = {key: PREFIX.match(key)[0] for key in content}  # type: ignore[index]  # PREFIX matches "" too
    if len(set(prefixes.values())) > 1:
        examples = {prefix: key for key, prefix in reversed(prefixes.items())}
        raise CheckpointError(
            f"{path} holds names with different prefixes ({some_names(sorted(examples.values()))}): "
            "save one model's state_dict"
        )
    removed = set(prefixes.values()) - {""}
    renamed: dict[str, Any] = {}
    for key, value in content.items():
        name = INSERTED.sub("", key[len(prefixes[key]) :])
        removed |= set(INSERTED.findall(key[len(prefixes[key]) :]))
        if name in renamed:
            raise CheckpointError(f"{path} holds {name} twice, with and without a wrapper's prefix: save it once")
        renamed[name] = value
    return renamed, removed


def _check_plain(path: Path, content: Any) -> Tensors:
    """The tensors, detached. Raises CheckpointError for anything but plain tensors by name (see `is_plain_tensor`)."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{path} does not hold tensors by name: not a Llama checkpoint in Meta's layout")
    if odd := [key for key, value in content.items() if not is_plain_tensor(value)]:
        fix = f"save those alone, or as one of the entries {', '.join(WRAPPERS)}"
        raise CheckpointError(
            f"{path} holds {some_names(sorted(odd))}, expected plain tensors with every element stored: {fix}"
        )
    return {key: tensor.detach() for key, tensor in content.items()}
