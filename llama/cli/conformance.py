"""`llama conformance export` and `compare`: test vectors for other implementations."""

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from json import dumps
from pathlib import Path
from typing import Any

import click

from llama.cli.command import Command, Group, build_arguments, model_options
from llama.evaluate.conformance.compare import Comparison
from llama.evaluate.conformance.export import N_NEXT_IDS, PROMPTS, encode_prompts, write_kit
from llama.evaluate.conformance.kit import Kit, check_safetensors
from llama.files import as_path, read_text
from llama.generation import Llama
from llama.parallel.groups import current_world

log = logging.getLogger(__name__)


@click.command(cls=Command)
@click.option("--out", required=True, help="the new folder; it is created when it is complete")
@click.option(
    "--prompts",
    help="a file with additional prompts, one per line. While a prompt is computed, each of its positions needs 0.5 MB "
    "of memory for a model of 135M parameters, 4 MB for one of 7B",
)
@model_options("max_batch_size", "seed", "quantize", "compile", "plain", "chat_format", dtype="float32", device="cpu")
def export(out: str, prompts: str | None, **options: Any) -> None:
    """Write a model's intermediate results, for other implementations to compare with.

    For a few short prompts: the embeddings, the inputs and outputs of the parts of each layer, the KV cache, logits and
    log-probabilities. Also rows of the RoPE table at far positions, and the ids of texts and dialogs.
    docs/conformance.md describes the layout. The layers are those of llama/model.py, run as with --plain, on one rank.
    --max_seq_len must hold the longest prompt and the 4 ids that the model adds to it.
    """
    check_safetensors()
    if (world_size := current_world().size) > 1:
        raise ValueError(f"{world_size} ranks are running, but export needs one: start it without torchrun")
    folder = as_path(out)
    if os.path.lexists(folder):
        raise ValueError(f"{folder} exists and is left unchanged: name another folder")
    texts = [*PROMPTS]
    if prompts is not None:
        texts += [line for line in read_text(as_path(prompts)).replace("\r\n", "\n").split("\n") if line.strip()]
    model = Llama.build(**build_arguments(options), max_batch_size=1, plain=True)
    try:
        _write_folder(model, texts, folder)
    finally:
        model.close()


def _write_folder(model: Llama, texts: list[str], folder: Path) -> None:
    """Write a kit into a temporary folder, and rename it when it is complete."""
    encoded = encode_prompts(model, texts)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    unfinished.mkdir()
    try:
        kit = write_kit(model, texts, encoded, unfinished)
        size = sum(path.stat().st_size for path in unfinished.iterdir())
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    n_positions = sum(len(ids) + N_NEXT_IDS for ids in encoded)
    log.info(
        f"wrote {folder}: {len(texts)} prompts, {n_positions} positions, {len(kit['dialogs'])} dialogs, "
        f"{size / 1e6:,.1f} MB"
    )


@click.command(cls=Command)
@click.argument("kit")
@click.argument("other")
@click.option(
    "--json/--no_json",
    help='print one object instead: {"ok", "dtype", "first": null or the first number that differs too much, "errors": '
    '{quantity: {"error", "of_bound"}}, "not_compared": [quantities]}',
)
def compare(kit: str, other: str, json: bool) -> None:
    """Compare the vectors of OTHER, another implementation, with those of KIT.

    If an error exceeds the bound for rounding in the coarser of the two dtypes, prints the first layer and quantity
    that does, in the order of computation, and exits with status 1. Otherwise prints a line that begins with OK and has
    the largest error of each quantity, as a fraction of its largest magnitude and in percent of its bound. Quantities
    that OTHER lacks are listed.

    KIT is a folder that `conformance export` wrote. OTHER is one of the same layout, which may have fewer quantities
    (docs/conformance.md).
    """
    check_safetensors()
    comparison = Comparison(Kit(as_path(kit)), Kit(as_path(other)))
    if json:
        print(dumps(comparison.as_json(), allow_nan=False))
    else:
        print("\n".join(_lines(comparison)))
    if comparison.first is not None:
        sys.exit(1)


def _lines(comparison: Comparison) -> Iterator[str]:
    folder, counts = comparison.other.folder, comparison.counts
    missing = {
        name: name if n_missing == total else f"{name} ({n_missing} of {total})"
        for name, (total, n_missing) in counts.items()
        if n_missing
    }
    if missing:
        yield f"note: not compared, as {folder} lacks them: {', '.join(missing.values())}"
    if (first := comparison.first) is not None:
        yield f"DIVERGES: {first}" + ("" if first.bound is None else f" ({comparison.dtype})")
        return
    equal = [f"{name} equal" for name in ("prompt ids", "dialog ids") if name in counts and missing.get(name) != name]
    errors = [f"{name} {error:.1e} ({of_bound:.0%})" for name, (error, of_bound) in comparison.errors.items()]
    yield f"OK: {folder} in {comparison.dtype}, largest errors (of the bound): {', '.join(equal + errors)}"


conformance = Group("conformance", commands=[compare, export], help="Test vectors for other implementations.")
