"""Compare two kits in the order of computation and find the first difference that rounding cannot explain."""

import math
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, cast

import torch

from llama.evaluate.conformance.bounds import ROUNDING, error_bound, rope_bound
from llama.evaluate.conformance.kit import Kit, Readers
from llama.evaluate.conformance.layout import (
    AFTER_LAYERS,
    BEFORE_LAYERS,
    LAYER,
    ROPE,
    ROPE_FILE,
    SIZES,
    KitError,
    excerpt,
    prompt_file,
)

TINY = 1e-300  # avoids a division by zero if a quantity is all zeros


def check_same_model(kit: Kit, other: Kit) -> None:
    """Raise KitError if model, prompts or dialogs of the two differ."""
    for name in SIZES:
        if name in other.params and other.params[name] != kit.params[name]:
            raise KitError(
                f"{other.folder} is from another model: {name} is {other.params[name]!r}, "
                f"the kit's {kit.params[name]!r}"
            )
    for kind, keys, expected, found in (
        ("prompt", ("text", "next_ids"), kit.prompts, other.prompts),
        ("dialog", ("messages",), kit.dialogs, other.dialogs or kit.dialogs),
    ):
        if len(found) != len(expected):
            raise KitError(f"{other.folder} has {len(found)} {kind}s, the kit {len(expected)}: write those of the kit")
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            for key in keys:
                if a[key] != b[key]:
                    raise KitError(
                        f"{other.folder} was written for another kit: {key} of {kind} {i} is {excerpt(b[key])}, "
                        f"in the kit {excerpt(a[key])}"
                    )
    if other.rope_positions not in ([], kit.rope_positions):
        raise KitError(
            f"{other.folder}: rope_positions are {other.rope_positions}, the kit's {kit.rope_positions}: write those"
        )


@dataclass
class Divergence:
    """The first number or id that differs too much.

    where: its tensor or text and its position, as text for users.
    index: its index in the tensor or list.
    value, expected: None if that list of ids is shorter.
    error, bound: absolute. None for ids.
    """

    quantity: str
    where: str
    index: list[int]
    value: float | None
    expected: float | None
    error: float | None = None
    bound: float | None = None

    def __str__(self) -> str:
        if self.bound is None:
            value = "missing" if self.value is None else self.value
            return f"{self.where} is {value}, expected {'no id' if self.expected is None else self.expected}"
        value = f"{self.value:.7g}" if math.isfinite(cast(float, self.value)) else "not finite"
        return f"{self.where} is {value}, expected {self.expected:.7g}: error {self.error:.2g}, bound {self.bound:.2g}"


class Comparison:
    """The result of comparing two kits, up to the first divergence.

    dtype: the coarser dtype of the two kits.
    first: the first divergence in the order of computation, or None.
    errors: quantity -> (largest error as a fraction of the quantity's largest magnitude, largest error as a fraction of
        its bound), over all layers and prompts.
    counts: quantity -> (number of tensors or lists of ids in the kit, number of those that the other kit lacks).

    Raises KitError if the kit is incomplete, or if the other kit is from another model.
    """

    def __init__(self, kit: Kit, other: Kit):
        kit.check_complete()
        check_same_model(kit, other)
        self.kit, self.other = kit, other
        self.dtype = max(kit.dtype, other.dtype, key=lambda name: ROUNDING[name])
        self.first: Divergence | None = None
        self.errors: dict[str, tuple[float, float]] = {}
        self.counts: dict[str, tuple[int, int]] = {}
        n_layers: int = kit.params["n_layers"]
        names = [(name, name, 0) for name in BEFORE_LAYERS]
        names += [(f"layers.{i}.{name}", name, i) for i in range(n_layers) for name in LAYER]
        names += [(name, name, n_layers) for name in AFTER_LAYERS]
        self._compare_ids("prompt ids", kit.prompts, other.prompts)
        self._compare_ids("dialog ids", kit.dialogs, other.dialogs)
        self._compare_files([ROPE_FILE], [(name, name, 0) for name in ROPE])
        self._compare_files(kit.files[1:], names)
        if all(total == missing for total, missing in self.counts.values()):
            raise KitError(
                f"{other.folder} has nothing to compare with the kit: no {ROPE_FILE}, {prompt_file(0)}, ... and no ids"
            )

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.first is None,
            "dtype": self.dtype,
            "first": self.first and {name: _finite_or_none(value) for name, value in asdict(self.first).items()},
            "errors": {
                name: {"error": _finite_or_none(error), "of_bound": _finite_or_none(of_bound)}
                for name, (error, of_bound) in self.errors.items()
            },
            "not_compared": [name for name, (_, missing) in self.counts.items() if missing],
        }

    def _should_compare(self, quantity: str, found: Any) -> bool:
        """Count a tensor or list of the kit, and return whether to compare it. found: the other kit's, or None."""
        total, missing = self.counts.get(quantity, (0, 0))
        self.counts[quantity] = (total + 1, missing + (found is None))
        return found is not None and self.first is None

    def _compare_ids(self, quantity: str, expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
        for number, entry in enumerate(expected):
            ids = found[number].get("ids") if found else None
            if not self._should_compare(quantity, ids) or ids is None:
                continue
            for i, (a, b) in enumerate(zip_longest(ids, entry["ids"])):
                if a != b:
                    where = f"{quantity.split()[0]} {number} {excerpt(entry.get('text', entry.get('messages')))}"
                    self.first = Divergence(quantity, f"{where}, id {i}", [i], a, b)
                    break

    def _compare_files(self, files: list[str], names: list[tuple[str, str, int]]) -> None:
        """Compare tensors in the order of `names`, each for all prompts before the next one.

        files: one for each prompt, or RoPE's file. names: (tensor, quantity, number of layers before it).
        """
        sides = []
        for prompt, file in enumerate(files):
            shapes = self.kit.shapes(prompt)
            shapes = {name: shapes[quantity] for name, quantity, _ in names}
            ours, theirs = self.kit.tensors(file, shapes), self.other.tensors(file, shapes)
            if missing := [name for name in shapes if name not in ours]:
                raise KitError(f"{self.kit.folder / file} lacks {missing[0]}: export it again")
            sides.append((file, ours, theirs))
        for name, quantity, layer in names:
            for prompt, (file, ours, theirs) in enumerate(sides):
                if not self._should_compare(quantity, theirs.get(name)):
                    continue
                expected, found = self._reference(file, name, ours), theirs[name]().double()
                largest = float(expected.abs().max())
                if quantity in ROPE:
                    where = name
                    bounds = [rope_bound(position, self.dtype) for position in self.kit.rope_positions]
                else:
                    where = f"{name}, prompt {prompt} {excerpt(self.kit.prompts[prompt]['text'])}"
                    if quantity == "logprobs":  # differences of logits, so errors scale with the logits
                        largest += float(self._reference(file, "logits", ours).abs().max())
                    bound = error_bound(quantity, layer, self.dtype, self.kit.params["hidden_dim"]) * largest
                    bounds = [bound] * len(expected)
                self._compare_tensor(quantity, where, found, expected, bounds, largest)

    def _reference(self, file: str, name: str, readers: Readers) -> torch.Tensor:
        tensor = readers[name]()
        if not tensor.float().isfinite().all():  # float32 is the widest dtype of a kit
            raise KitError(f"{self.kit.folder / file}: {name} is not finite, so it is no reference: export it again")
        return tensor.double()

    def _compare_tensor(
        self, quantity: str, where: str, found: torch.Tensor, expected: torch.Tensor, bounds: list[float], scale: float
    ) -> None:
        """Record the errors of a tensor, and its first divergence.

        found, expected: [positions, ...]. bounds: one for each position. scale: the reported error is a fraction of it.
        """
        error = (found - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf).reshape(len(expected), -1)
        bound = torch.tensor(bounds, dtype=torch.float64)[:, None]
        largest, largest_of_bound = self.errors.get(quantity, (0.0, 0.0))
        largest = max(largest, float(error.max()) / max(scale, TINY))
        largest_of_bound = max(largest_of_bound, float((error / bound.clamp(min=TINY)).max()))
        self.errors[quantity] = (largest, largest_of_bound)
        too_large = (error > bound).any(dim=1)
        if not too_large.any():
            return
        row = int(too_large.nonzero()[0])
        column = int(error[row].argmax())
        index = (row, *(int(i) for i in torch.unravel_index(torch.tensor(column), expected.shape[1:])))
        axes = ("head", "number")[3 - expected.dim() :]  # names of the indices after the position
        position = self.kit.rope_positions[row] if quantity in ROPE else row
        where += f", position {position}" + "".join(f", {axis} {i}" for axis, i in zip(axes, index[1:], strict=True))
        self.first = Divergence(
            quantity,
            where,
            [*index],
            float(found[index]),
            float(expected[index]),
            float(error[row, column]),
            bounds[row],
        )


def _finite_or_none(value: Any) -> Any:
    """Replace infinity and NaN, which JSON does not have, with None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
