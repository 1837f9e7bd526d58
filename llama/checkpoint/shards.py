"""One file of weights, read into Meta's names, whichever tool saved it.

Meta's own files are a dictionary of tensors by name. Trainers and fine-tuners wrap it (`{"model": ..., "step": ...}`),
put a prefix before the names (`module.`, `_orig_mod.`), and save buffers along with the weights; Mistral publishes
consolidated.safetensors. What is ambiguous is refused by name.
"""

import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama.errors import is_out_of_memory
from llama.files import FOLDER, GGUF, LFS_POINTER, OLD_TORCH, PICKLE, SAFETENSORS, ZIP, detect_format, is_plain
from llama.params import CheckpointError

Tensors = dict[str, torch.Tensor]
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Entries of a file that hold the weights, beside an optimizer and the like.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
DEEPEST = 4  # so many of them within one another
# Before every name: nn.DataParallel and DeepSpeed (module), Lightning (model), torch.compile (_orig_mod), FSDP.
PREFIX = re.compile(r"(?:(?:module|model|_orig_mod|_forward_module|_fsdp_wrapped_module)\.)*")
# Within names, where single layers were wrapped: layers.0._orig_mod.attention.wq.weight.
INSERTED = re.compile(r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Buffers, which the model computes for itself: rotary frequencies (Llama 1 has them), masks, caches.
BUFFER = re.compile(
    r"(?:.*\.)?(?:rope\.freqs|freqs_cis|freqs_cos|freqs_sin|inv_freq|(?:causal_|attn_)?mask|cache_[kv]|[kv]_cache)"
)
OLD_NOTE = (
    "the weights are in the format that torch.save wrote before 1.6, which cannot be memory-mapped: every rank reads "
    "the files whole and holds them beside the model until it is loaded (plan does not count that)"
)


@dataclass
class Shard:
    """The tensors of a file under Meta's names, and what was done to get there, a line each."""

    tensors: Tensors
    notes: list[str]


def open_shard(path: Path) -> Shard:
    """Map a file into memory and find the weights in it. Raises CheckpointError where it holds something else."""
    content = read_file(path)
    content, wrappers, beside = _unwrap(path, content)
    notes = []
    if wrappers:
        left = f"; left unread beside it: {first(beside)}" if beside else ""
        notes.append(f"the weights were taken from the entry {'.'.join(wrappers)!r}{left}")
    content, buffers = _without_buffers(content)
    content, removed = _without_prefix(path, content)
    if removed:
        notes.append(f"{' and '.join(map(repr, sorted(removed)))} was taken out of the names of the weights")
    if buffers:
        notes.append(f"buffers were left out, which are computed here: {first(buffers)}")
    tensors = _check_plain(path, content)
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        notes.append("weights are stored as float64, and taken as float32")
    if is_read_whole(path):
        notes.append(OLD_NOTE)
    return Shard(tensors, notes)


def open_tensors(path: Path) -> Tensors:
    """Map a file of torch.save that holds nothing but tensors by name, and keep the names. Raises CheckpointError."""
    return _check_plain(path, read_file(path))


def is_read_whole(path: Path) -> bool:
    """Whether a file has to be read into memory, as it cannot be mapped."""
    try:
        return detect_format(path) == OLD_TORCH
    except OSError:  # `read_file` explains it
        return False


def names_note(shards: dict[int, Path]) -> list[str]:
    """A line where the files, by number, have other names than Meta's."""
    others = [path.name for number, path in sorted(shards.items()) if path.name != f"consolidated.{number:02d}.pth"]
    return [f"the weights were read from {first(others)}"] if others else []


def first(names: Iterable[str], limit: int = 4) -> str:
    """The names that come first, and how many there are beside them."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# What a file holds --------------------------------------------------------------------------------


def read_file(path: Path) -> Any:
    """What was saved, memory-mapped where the format allows it. Nothing in the file can run: pickles are read
    weights-only. Raises CheckpointError."""
    try:
        kind = detect_format(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): mend that or fetch it again") from error
    if path.suffix == ".safetensors":
        return _read_safetensors(path, kind)
    if kind not in (ZIP, OLD_TORCH) or (kind == ZIP and not zipfile.is_zipfile(path)):
        if kind in (None, ZIP):
            raise CheckpointError(f"{path} is cut off or damaged: fetch it again")
        raise CheckpointError(f"{path} is {kind}, not what torch.save writes: {way_out(kind)}")
    try:
        return torch.load(path, map_location="cpu", mmap=kind == ZIP, weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds; all mean that this file is no checkpoint
        if isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(_refused(path, str(error))) from error
        # The first sentence: what torch says behind it are guesses.
        reason = re.split(r"\n|(?<=\w)\. |  \(", str(error).strip())[0] or type(error).__name__
        way = "raise the limit on memory (ulimit -v)" if is_out_of_memory(error) else "fetch it again"
        raise CheckpointError(f"{path} cannot be read ({reason}): {way}") from error


def way_out(kind: str | None) -> str:
    """For a file that holds another kind than weights."""
    ways = {
        LFS_POINTER: "fetch the file that it stands for (git lfs pull)",
        SAFETENSORS: "rename it to end in .safetensors",
        ZIP: "rename it to end in .pth",
        OLD_TORCH: "rename it to end in .pth",
        PICKLE: "load it where you trust it, and write its tensors with torch.save",
        GGUF: "convert it with: python -m llama convert SRC DST",
        FOLDER: "put the file there",
    }
    return ways.get(kind or "", "fetch it again")


def _refused(path: Path, reason: str) -> str:
    """The line for a file whose objects torch.load does not make."""
    name = re.search(r"(?:GLOBAL|allowlisted:?|global) ([A-Za-z_][\w.]*\.\w+)", reason)
    found = f" ({name[1]})" if name else ""
    return (
        f"{path} holds more than tensors, which could run code: it was not loaded{found}; where you trust it, take the "
        f"weights out of torch.load('{path.name}', weights_only=False) and save them alone: "
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
        raise CheckpointError(f"{path} is {kind}, not a safetensors file: {way_out(kind)}")
    try:
        file = safe_open(path, framework="pt")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is cut off or damaged ({error}): fetch it again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}): mend that") from error


def _unwrap(path: Path, content: Any) -> tuple[dict[str, Any], list[str], list[str]]:
    """(tensors by name, the entries they lie in from the outermost on, what lies beside those)."""
    wrappers: list[str] = []
    beside: list[str] = []
    while True:
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise CheckpointError(f"{path} does not hold tensors by name: not a Llama checkpoint in Meta's layout")
        found = [key for key in WRAPPERS if isinstance(content.get(key), dict)]
        if len(found) > 1:
            raise CheckpointError(f"{path} holds the entries {' and '.join(found)}, which may both be it: save one")
        if not found or len(wrappers) == DEEPEST:
            return content, wrappers, beside
        others = [key for key in content if key != found[0]]
        if tensors := [key for key in others if isinstance(content[key], torch.Tensor) and "." in key]:
            raise CheckpointError(
                f"{path} holds weights in the entry {found[0]} and beside it ({first(tensors)}): save one of them"
            )
        wrappers += found
        beside += others
        content = content[found[0]]


def _without_buffers(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the others, names of buffers, with N for the layer)."""
    buffers = [key for key in content if BUFFER.fullmatch(key)]
    named = {re.sub(r"\.\d+\.", ".N.", key) for key in buffers}
    return {key: value for key, value in content.items() if key not in set(buffers)}, sorted(named)


def _without_prefix(path: Path, content: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """(tensors by Meta's names, what was taken out of them)."""
    if any(key.endswith("embed_tokens.weight") for key in content):
        way = "name it pytorch_model.bin, beside its config.json, and convert that folder: python -m llama convert"
        raise CheckpointError(f"{path} holds tensors under Hugging Face's names: {way}")
    prefixes = {key: PREFIX.match(key)[0] for key in content}  # type: ignore[index]  # it matches nothing, too
    if len(set(prefixes.values())) > 1:
        examples = {prefix: key for key, prefix in reversed(prefixes.items())}
        raise CheckpointError(
            f"{path} holds names with different prefixes ({first(examples.values())}): save one model's state_dict"
        )
    removed = set(prefixes.values()) - {""}
    plain: dict[str, Any] = {}
    for key, value in content.items():
        name = INSERTED.sub("", key[len(prefixes[key]) :])
        removed |= set(INSERTED.findall(key[len(prefixes[key]) :]))
        if name in plain:
            raise CheckpointError(f"{path} holds {name} twice, under names that wrappers made: save it once")
        plain[name] = value
    return plain, removed


def _check_plain(path: Path, content: Any) -> Tensors:
    """The same, detached. Raises CheckpointError for what is no tensor with all its numbers."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{path} does not hold tensors by name: not a Llama checkpoint in Meta's layout")
    if odd := [key for key, value in content.items() if not is_plain(value)]:
        way = f"save those alone, or as one of the entries {', '.join(WRAPPERS)}"
        raise CheckpointError(f"{path} holds {first(odd)}, expected plain tensors with all their numbers: {way}")
    return {key: tensor.detach() for key, tensor in content.items()}
