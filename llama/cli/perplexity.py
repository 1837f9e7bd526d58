"""`llama perplexity`: perplexity of text files."""

from json import dumps
from typing import Any

import click

from llama.cli.command import Command, bos_option, build_arguments, model_options
from llama.console import in_one_line
from llama.evaluate.perplexity import Perplexity, score_text
from llama.evaluate.scoring import check_bos, check_stride, with_bos
from llama.files import as_path, read_text
from llama.generation import Llama
from llama.parallel.groups import broadcast_object, is_main_rank

HEADERS = ("perplexity", "word", "byte", "bits/byte")  # of the last four keys of a Perplexity


@click.command(cls=Command)
@click.argument("files", nargs=-1, required=True)
@click.option(
    "--stride",
    type=int,
    help="tokens that each window of max_seq_len tokens scores for the first time; default: all of them, the fastest. "
    "With max_seq_len / 2, every token has at least that many tokens of context",
)
@bos_option
@click.option("--json/--no_json", help="print an object for each file instead of the table")
@model_options("seed", "chat_format", max_seq_len=2048, max_batch_size=1)
def perplexity(files: tuple[str, ...], stride: int | None, bos: bool | None, json: bool, **options: Any) -> None:
    """Score UTF-8 text FILES of any length, each by itself: perplexity per token, word and byte, and bits per byte.

    Without BOS the first token is not scored. The keys of a JSON object are file, tokens (the number scored), nll (the
    sum of their negative log-likelihoods in nats), perplexity, word_perplexity, byte_perplexity and bits_per_byte.
    --max_batch_size is the number of windows computed at a time.
    """
    check_bos(bos)
    check_stride(stride, options["max_seq_len"])
    # Read on rank 0 only, whose host has the files, and before the model is loaded.
    texts = [read_text(as_path(file)) for file in files] if is_main_rank() else []
    llama = Llama.build(**build_arguments(options))
    _score_files(llama, list(files), broadcast_object(texts), stride, bos, json)
    llama.close()


def _score_files(
    llama: Llama, files: list[str], texts: list[str], stride: int | None, bos: bool | None, json: bool
) -> None:
    """Print each file's results as soon as they are computed."""
    encoded = [llama.tokenizer.encode(text, bos=False, eos=False) for text in texts]
    for file, ids in zip(files, encoded, strict=True):
        if len(with_bos(llama.tokenizer, ids, bos)) < 2:
            raise ValueError(f"{file} has one token, and no token before it to predict it from: give --bos True")
    width = max(len(in_one_line(file)) for file in files)
    if is_main_rank() and not json:
        print("  ".join([f"{'file':<{width}}", f"{'tokens':>9}", *(f"{header:>10}" for header in HEADERS)]))
    for file, text, ids in zip(files, texts, encoded, strict=True):
        result = score_text(llama, text, ids, file, stride, bos)
        if is_main_rank():
            print(dumps(result) if json else _table_row(result, width), flush=True)


def _table_row(result: Perplexity, width: int) -> str:
    figures = (result["perplexity"], result["word_perplexity"], result["byte_perplexity"], result["bits_per_byte"])
    return "  ".join([f"{in_one_line(result['file']):<{width}}", f"{result['tokens']:>9,}", *map(_cell, figures)])


def _cell(number: float | None) -> str:
    if number is None:
        return f"{'-':>10}"
    return f"{number:10.4f}" if number < 1e5 else f"{number:10.3e}"
