"""`llama serve`: answer requests over HTTP, as OpenAI's API does."""

from typing import Any

import click

from llama.cli.command import Command, build_arguments, dialog_seq_len, model_options
from llama.options import check_int


@click.command(cls=Command)
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on; 0.0.0.0: all")
@click.option("--port", type=int, default=8000, show_default=True, help="port to listen on; 0: any free one")
@click.option(
    "--api_key",
    envvar="LLAMA_API_KEY",
    help="the key that clients must send; default: LLAMA_API_KEY in the environment, which other users cannot see",
)
@click.option(
    "--max_queue",
    type=int,
    default=64,
    show_default=True,
    help="requests that may wait, besides one for each slot; more are refused with status 429",
)
@click.option(
    "--grace",
    type=float,
    default=20,
    show_default=True,
    help="seconds that running requests have to finish after SIGTERM or Ctrl-C; torchrun kills after 30",
)
@model_options(max_seq_len=None, max_batch_size=16)
def serve(host: str, port: int, api_key: str | None, max_queue: int, grace: float, **options: Any) -> None:
    """Serve a model over HTTP, with the endpoints of OpenAI's API (extra "serve").

    --max_batch_size is the number of slots: of answers that are computed together. --max_seq_len is by default 2048, or
    the model's sliding window if that is smaller. Under torchrun rank 0 listens.
    """
    try:
        from llama.serve import runner
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ValueError(f"serve needs the Python package {package}: pip install 'llama-runner[serve]'") from error
    check_int("port", port, 0, 2**16)
    check_int("max_queue", max_queue, 0)
    if not 0 <= grace < float("inf"):
        raise ValueError(f"grace is {grace}, expected seconds from 0")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise ValueError("the API key is empty, or has spaces at its ends or characters other than ASCII's")
    if options["max_seq_len"] is None:
        options["max_seq_len"] = dialog_seq_len(options["ckpt_dir"])
    runner.serve(build_arguments(options), host=host, port=port, api_key=api_key, max_queue=max_queue, grace=grace)
