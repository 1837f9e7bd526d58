"""Read and check a kit of this or another implementation. Its files are untrusted and may be damaged."""

import stat
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from json import loads
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.params_json import LIMITS
from llama.evaluate.conformance.bounds import ROUNDING
from llama.evaluate.conformance.layout import (
    FORMAT,
    QUANTITIES,
    ROPE_FILE,
    SIZES,
    VERSION,
    KitError,
    excerpt,
    prompt_file,
    sha256,
)

JSON_LIMIT = 16 * 2**20  # bytes of a kit.json: a million ids. With the demo model their tensors would take 500 GB
INT_LIMIT = 2**31  # limit of positions and ids
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # safetensors' names of the dtypes that are compared

Shapes = dict[str, tuple[int, ...]]
Readers = dict[str, Callable[[], torch.Tensor]]


class Kit:
    """A folder in the layout of docs/conformance.md. The constructor checks kit.json. Tensors are read one at a time.

    Raises KitError.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "kit.json"
        content = self._read_json()
        self.dtype = self._get(content, "dtype", str, "missing")
        if self.dtype not in ROUNDING:
            raise KitError(f"{self.path}: dtype is {self.dtype!r}, expected {', '.join(ROUNDING)}")
        self.params = self._get(content, "params", dict, {})
        for name in self.params.keys() & set(SIZES):
            self._check_size(name)
        self.rope_positions = self._get(content, "rope_positions", list, [])
        self._check_ints(self.rope_positions, "rope_positions")
        self.prompts = self._get(content, "prompts", list, [])
        self.dialogs = self._get(content, "dialogs", list, [])
        for kind, keys in (("prompts", ("text", "next_ids")), ("dialogs", ("messages",))):
            for i, entry in enumerate(content.get(kind, [])):
                for key in keys:
                    if not isinstance(entry, dict) or key not in entry:
                        raise KitError(f"{self.path}: {kind}[{i}] has no {key!r}")
                for key in ("ids", "next_ids"):
                    self._check_ints(entry.get(key, []), f"{key} of {kind}[{i}]")
        self.files = [ROPE_FILE, *map(prompt_file, range(len(self.prompts)))]
        self.sha256 = self._get(content, "sha256", dict, {})
        if unknown := sorted(self.sha256.keys() - set(self.files)):
            raise KitError(f"{self.path}: sha256 names {unknown[0]!r}, expected {', '.join(self.files)}")
        for name in self.files:
            self._check_file(name)

    def _read_json(self) -> dict[str, Any]:
        try:
            status = self.path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > JSON_LIMIT:
                raise ValueError(f"it is not a regular file of at most {JSON_LIMIT:,} bytes")
            content = loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise KitError(
                f"{self.path} is missing: give a folder that `conformance export` or another implementation wrote"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise KitError(f"{self.path} cannot be read as JSON ({error}): write it again") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise KitError(f'{self.path} does not contain "format": "{FORMAT}": it is not a kit')
        if content.get("version") != VERSION:
            raise KitError(
                f"{self.path} has layout version {content.get('version')!r}, expected {VERSION}: write it again"
            )
        return content

    def _get(self, content: dict[str, Any], key: str, kind: type, default: Any) -> Any:
        value = content.get(key, default)
        if not isinstance(value, kind):
            raise KitError(f"{self.path}: {key} is a {type(value).__name__}, expected a {kind.__name__}")
        return value

    def _check_size(self, name: str) -> None:
        value, limit = self.params[name], int(LIMITS.get(name, (1, 2**24))[1])
        step, kind = (2, "an even integer") if name == "head_dim" else (1, "an integer")  # RoPE rotates pairs
        if type(value) is not int or not 0 < value < limit or value % step:
            expected = f"expected {kind} from 1 to {limit - 1:,}"
            raise KitError(f"{self.path}: {name} is {excerpt(value)}, {expected}: write it again")

    def _check_ints(self, values: Any, name: str) -> None:
        if not isinstance(values, list) or not all(type(i) is int and 0 <= i < INT_LIMIT for i in values):
            raise KitError(f"{self.path}: {name} is not a list of integers from 0 to {INT_LIMIT - 1:,}: correct it")

    def _check_file(self, name: str) -> None:
        path = self.folder / name
        try:
            if path.exists() and not path.is_file():
                raise KitError(f"{path} is not a regular file: write it again")
            if name in self.sha256 and sha256(path) != self.sha256[name]:
                raise KitError(f"{path} is damaged, its sha256 is not the one in kit.json: export it again")
        except OSError as error:
            raise KitError(
                f"{path} cannot be read ({error.strerror}), but kit.json lists it: export it again"
            ) from None

    def check_complete(self) -> None:
        """Raise KitError if a part that `conformance export` writes is missing."""
        ids = [entry.get("ids") for entry in self.prompts + self.dialogs]
        ids += [entry["next_ids"] for entry in self.prompts]
        if not (
            self.sha256.keys() == set(self.files)
            and self.params.keys() >= set(SIZES)
            and self.rope_positions
            and self.prompts
            and all(ids)
        ):
            raise KitError(
                f"{self.path} is not what `conformance export` writes: give the kit first, then the other folder"
            )

    def shapes(self, prompt: int) -> Shapes:
        """Name of a quantity -> its shape for this prompt. The kit must be complete."""
        ids = self.prompts[prompt]
        n = len(ids["ids"]) + len(ids["next_ids"])
        sizes = self.params | {"n": n, "n - 1": n - 1}
        sizes |= {"positions": len(self.rope_positions), "head_dim / 2": self.params["head_dim"] // 2}
        return {
            name: tuple(sizes[size] for size in shape.strip("[]").split(", "))
            for name, (shape, _) in QUANTITIES.items()
        }

    def tensors(self, file: str, shapes: Shapes) -> Readers:
        """Name -> a function that reads the tensor, for each tensor in the file. Empty if the file does not exist.

        shapes: the shapes of all tensors that the file may hold. Raises KitError for other names, shapes and dtypes.
        """
        from safetensors import SafetensorError, safe_open

        path = self.folder / file
        if not path.exists():
            return {}
        try:
            reader = safe_open(path, framework="pt")
            headers = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118  (not a dictionary)
        except (SafetensorError, OSError) as error:
            raise KitError(f"{path} is damaged or cut off ({error}): write it again") from error
        for name, header in headers.items():
            if name not in shapes:
                raise KitError(f"{path} holds {name!r}, expected names of the layout, such as {[*shapes][-1]!r}")
            shape, dtype = header.get_shape(), header.get_dtype()
            if shape != [*shapes[name]] or dtype not in FLOATS:
                raise KitError(
                    f"{path}: {name} is {dtype} {shape}, expected floats {[*shapes[name]]}: "
                    "docs/conformance.md describes the layout"
                )
        return {name: partial(reader.get_tensor, name) for name in headers}


def check_safetensors() -> None:
    """Raise KitError if safetensors, which reads and writes the tensors, is not installed."""
    if find_spec("safetensors") is None:
        raise KitError("kits need the Python package safetensors: pip install 'llama-runner[convert]'")
