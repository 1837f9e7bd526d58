"""`llama inspect`: show a text token by token, with the model's predictions at each position."""

import logging
import os
import shutil
import sys
from json import dumps
from pathlib import Path
from typing import Any

import click

from llama.cli.command import Command, bos_option, build_arguments, model_options
from llama.engine.requests import check_alternatives
from llama.evaluate.html_report import html_report
from llama.evaluate.scoring import check_bos, with_bos
from llama.evaluate.text_report import summary, text_report
from llama.evaluate.token_report import TokenReport, inspect_tokens
from llama.files import as_path, read_pipe
from llama.generation import Llama
from llama.options import check_int
from llama.parallel.groups import is_main_rank, raise_on_all_ranks

log = logging.getLogger(__name__)

NO_TEXT = 'no text to inspect: give one ("..."), or pipe one in'


@click.command(cls=Command)
@click.argument("text", required=False)
@click.option(
    "--generate",
    type=int,
    default=0,
    show_default=True,
    help='tokens to generate after the text, each the most probable one, marked "+"; fewer if the model stops',
)
@click.option("--top", type=int, default=5, show_default=True, help="most probable ids to show at each position")
@click.option("--json/--no_json", help="print one JSON object instead of the table")
@click.option("--html", help="also write this HTML file: the text coloured by probability, and each token's numbers")
@bos_option
@model_options("max_batch_size", "seed", "chat_format")
def inspect(
    text: str | None, generate: int, top: int, json: bool, html: str | None, bos: bool | None, **options: Any
) -> None:
    """Show TEXT (or text from a pipe) token by token, with the model's predictions at each position.

    A row has the token's position, id and piece; its log-probability (natural) and its probability in percent, given
    the tokens before it; its rank among all ids (1 is the most probable); the entropy of the distribution in nats; the
    most probable id after it ("next"); and the most probable ids at its position ("expected here"). The first token,
    which is BOS in most models, has no numbers, because no token comes before it.

    The JSON object is {"text": the given text, "tokens": [{"position", "id", "piece", "text", "generated", "logprob",
    "percent", "rank", "entropy", "top": [{"id", "piece", "logprob", "percent"}], "next": an object as in "top"}],
    "next": a list like "top", for the position after the last token}. The "text" of all tokens, joined, is the given
    text followed by the generated one. The first token's numbers are null, and its "top" is empty.
    """
    _check_arguments(text, generate, top, bos, html)
    llama = Llama.build(**build_arguments(options), max_batch_size=1)
    text = read_pipe() if text is None else text
    report = _inspect_text(llama, text, bos, generate, top)
    with raise_on_all_ranks():
        if is_main_rank():
            _print_report(report, text, json)
            if html is not None:
                _write_html(report, html, options["ckpt_dir"])
    llama.close()


def _check_arguments(text: str | None, generate: int, top: int, bos: bool | None, html: str | None) -> None:
    """Raise for arguments that are wrong whatever the model is, before it is loaded."""
    if text == "" or (text is None and sys.stdin.isatty()):
        raise ValueError(NO_TEXT)
    check_int("generate", generate, 0)
    check_int("top", top, 1)
    check_bos(bos)
    if html == "":
        raise ValueError("--html names no file")
    if html is not None and is_main_rank():
        path = as_path(html)
        if path.is_dir():
            raise ValueError(f"--html {path} is a folder: name a file")
        if not path.parent.is_dir():
            raise ValueError(f"--html {path}: there is no folder {path.parent}")


def _inspect_text(llama: Llama, text: str, bos: bool | None, generate: int, top: int) -> TokenReport:
    """The report on a text and its greedy continuation of up to `generate` tokens."""
    max_seq_len = llama.model.params.max_seq_len
    text_ids = llama.tokenizer.encode(text, bos=False, eos=False)
    if not text_ids:
        raise ValueError(NO_TEXT)
    ids = with_bos(llama.tokenizer, text_ids, bos)
    if (needed := len(ids) + generate) > max_seq_len:
        continuation = f" and {generate} to generate" if generate else ""
        raise ValueError(
            f"the text has {len(ids)} tokens{continuation}, but max_seq_len is {max_seq_len}: "
            f"give --max_seq_len {needed}"
        )
    check_alternatives("top", top, 1, llama.model.params)
    ((generated,), _) = llama.generate([ids], generate, temperature=0)
    return inspect_tokens(llama, [*ids, *generated], top, generated=len(generated))


def _print_report(report: TokenReport, text: str, json: bool) -> None:
    if json:
        print(dumps({"text": text, **report}))
        return
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print("\n".join(text_report(report, shutil.get_terminal_size((120, 24)).columns, coloured)))
    print(summary(report))


def _write_html(report: TokenReport, html: str, ckpt_dir: str) -> None:
    content = html_report(report, Path(os.path.abspath(as_path(ckpt_dir))).name, summary(report))
    as_path(html).write_text(content, encoding="utf-8", newline="\n")
    log.info(f"{html}: {len(content.encode()) / 1000:,.1f} kB")
