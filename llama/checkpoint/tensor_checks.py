"""Check the tensors of all shards against params.json and against each other."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.errors import some_names
from llama.checkpoint.layout import (
    EMBEDDING,
    OUTPUT,
    SHARD_AXIS,
    Shapes,
    Tensors,
    tensor_problems,
    tensor_shapes,
    without_layer,
)
from llama.checkpoint.paths import shard_number
from llama.checkpoint.report import Report
from llama.console import progress
from llama.params import ModelArgs

# Every shard holds all norms. Between shards of one model they may differ in the last bit (0.8 % in bfloat16), between
# shards of different models they differ by far more.
NORM_TOLERANCE = 0.01
CHUNK = 2**20  # elements of a non-contiguous tensor that are copied at a time


def check_tensors(
    paths: dict[int, Path],
    shards: dict[int, Tensors],
    args: ModelArgs | None,
    report: Report,
    part: int = 0,
    parts: int = 1,
) -> ModelArgs | None:
    """Compare every tensor with params.json, and look for NaN, infinity and shards of another model.

    paths: shard number -> file.
    shards: shard number -> tensors, for the files that could be opened.
    args: None if params.json could not be read.
    part, parts: look for NaN and infinity only in tensors part, part + parts, part + 2 * parts, ... of each shard.

    Returns `args` with its vocabulary size. Returns None if `args` is None, or if no shard has an embedding.
    """
    if not args or not shards:  # only the numbers of the files can be checked
        check_count(paths, max(paths) + 1, report)
        return args
    embeddings = [tensors[EMBEDDING] for tensors in shards.values() if EMBEDDING in tensors]
    if not any(embedding.dim() == 2 for embedding in embeddings):
        report.add_problem(
            next(iter(paths.values())), f"has no {EMBEDDING}, expected a Llama checkpoint in Meta's layout"
        )
        return None
    axis = 0 if _most_common(e.shape[1] for e in embeddings if e.dim() == 2) == args.dim else 1
    rows = _most_common(e.shape[0] for e in embeddings if e.dim() == 2)
    is_tied = not any(OUTPUT in tensors for tensors in shards.values())
    # Find the number of shards that the model is divided into. Files may be missing, or there may be extra ones, so try
    # several numbers and use the first that matches the shapes in at least one file, or else the first of all.
    counts = [len(paths), max(paths) + 1, *filter(None, (_shard_count(tensors, args) for tensors in shards.values()))]
    candidates = {}
    for count in dict.fromkeys(counts):
        vocab_size = args.vocab_size if args.vocab_size != -1 else rows * count if axis == 0 else rows
        model = replace(args, vocab_size=vocab_size)
        shapes = {key: shape for key, shape in tensor_shapes(model).items() if not (is_tied and key == OUTPUT)}
        problems = {number: tensor_problems(tensors, shapes, axis, count) for number, tensors in shards.items()}
        candidates[count] = model, shapes, problems
    count = min(candidates, key=lambda n: all(candidates[n][2].values()))
    args, shapes, problems = candidates[count]
    check_count(paths, count, report)
    expected = "the only shard" if count == 1 else f"one of {count} shards"
    for number in (number for number in shards if number < count):
        for problem in problems[number]:
            mismatch = f"does not match params.json as {expected}, {problem}"
            report.add_problem(
                paths[number], f"{mismatch}: put the model's own file there, or the params.json of this one"
            )
    _check_finite(paths, shards, report, part, parts)
    fitting = {n: tensors for n, tensors in shards.items() if n < count and paths[n] not in report.bad_files}
    check_same_model(paths, fitting, shapes, report)
    if is_tied:
        report.notes.append(f"no file has {OUTPUT}: the embedding is used as the output too")
    report.checked.append(f"{count} shard{'s' * (count > 1)} of {len(shapes)} tensors against params.json")
    return args


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite. Copies at most CHUNK elements, or one row, at a time."""
    if not tensor.numel():
        return True
    # Put the axes in memory order. aminmax copies a tensor that is still not contiguous, so pass it in chunks.
    rows = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    chunks = [rows] if rows.is_contiguous() else rows.split(max(1, CHUNK // rows[0].numel()))
    # aminmax propagates NaN, and allocates no mask as isfinite would.
    return all(bool(limit.isfinite()) for chunk in chunks for limit in chunk.aminmax())


def _check_finite(paths: dict[int, Path], shards: dict[int, Tensors], report: Report, part: int, parts: int) -> None:
    for number, tensors in shards.items():
        if paths[number] not in report.bad_files:
            names, label = list(tensors)[part::parts], f"looking for NaN in {paths[number].name}"
            if bad := [name for name in progress(names, label) if not is_finite(tensors[name])]:
                problem = f"holds NaN or infinity in {some_names(bad)}"
                report.add_problem(paths[number], f"{problem}: use another checkpoint")


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _shard_count(tensors: Tensors, args: ModelArgs) -> int | None:
    """The number of shards of this shard's model, computed from the rows of the shard's first query projection."""
    wq = tensors.get("layers.0.attention.wq.weight")
    return args.n_heads * args.head_dim // wq.shape[0] if wq is not None and wq.dim() and wq.shape[0] else None


def check_count(paths: dict[int, Path], count: int, report: Report) -> None:
    """Add a problem for each missing and each extra file of a model in `count` shards."""
    folder = next(iter(paths.values())).parent
    reported = {number for path in report.bad_files if (number := shard_number(path)) is not None}
    known = paths.keys() | reported
    missing = count - sum(number < count for number in known)
    first = [folder / f"consolidated.{n:02d}.pth" for n in islice((n for n in range(count) if n not in known), 4)]
    if missing > len(first):  # do not list a million files for a damaged params.json
        names = ", ".join(path.name for path in first)
        report.add_problem(
            folder, f"lacks {names} and {missing - 4:,} more of the model's {count:,} shards: fetch them"
        )
        first = []
    for path in first:
        report.add_problem(path, f"is missing, one of {count} shards of the model: fetch it")
    for number, path in paths.items():
        if number >= count and path not in report.bad_files:
            fix = "remove it, or fetch the shards that belong to it"
            report.add_problem(path, f"is an extra file, expected {count} shards: {fix}")


def check_same_model(paths: dict[int, Path], shards: dict[int, Tensors], shapes: Shapes, report: Report) -> None:
    """Add a problem for each shard whose dtypes or norms differ from those of most shards.

    shards: only those whose tensors have the expected names and shapes.
    """
    if len(shards) < 2:
        return
    norms = [key for key in shapes if key != EMBEDDING and SHARD_AXIS[without_layer(key)] is None]
    dtypes = {number: [tensors[key].dtype for key in shapes] for number, tensors in shards.items()}
    shard_norms = {n: torch.cat([tensors[key].flatten().float() for key in norms]) for n, tensors in shards.items()}

    def is_alike(a: int, b: int) -> bool:
        is_far = (shard_norms[a] - shard_norms[b]).abs().mean() > NORM_TOLERANCE * shard_norms[a].abs().mean()
        return not is_far and dtypes[a] == dtypes[b]

    typical = max(shards, key=lambda number: sum(is_alike(number, other) for other in shards))
    for number in shards:
        if not is_alike(typical, number):
            difference = "dtypes" if dtypes[typical] != dtypes[number] else "norms"
            problem = f"has different {difference} from {paths[typical].name}, expected shards of one model"
            report.add_problem(paths[number], f"{problem}: replace the one that is from another model")
