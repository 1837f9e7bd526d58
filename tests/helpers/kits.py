"""Read and edit conformance kits. `example` is docs/conformance_transformers.py, another implementation."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "docs"))

import conformance_transformers as example

__all__ = ["DTYPES", "change", "edit", "example", "kit_json"]

DTYPES = ("float32", "bfloat16", "float16")


def kit_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "kit.json").read_text())


def edit(folder: Path, **changes: Any) -> None:
    (folder / "kit.json").write_text(json.dumps(kit_json(folder) | changes))


def change(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], prompt: int | str = 0) -> None:
    """Edit the tensors of a prompt or file, and update the sums in kit.json if it has any."""
    path = folder / (f"{prompt}.safetensors" if isinstance(prompt, str) else f"prompt-{prompt:02d}.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    if sums := kit_json(folder).get("sha256"):
        edit(folder, sha256=sums | {path.name: hashlib.sha256(path.read_bytes()).hexdigest()})
