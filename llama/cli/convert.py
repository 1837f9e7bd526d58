"""`llama convert`: convert other formats to Meta's layout, and back."""

import click

from llama.cli.command import Command
from llama.convert import convert as convert_folder
from llama.options import DTYPES


@click.command(cls=Command)
@click.argument("src")
@click.argument("dst")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", *DTYPES]),
    help="auto: the dtype of each tensor in SRC, bfloat16 for quantized ones; float32 represents all of them exactly",
)
@click.option("--shards", type=int, default=1, show_default=True, help="number of files that hold the weights")
@click.option(
    "--to",
    default="meta",
    show_default=True,
    type=click.Choice(["meta", "hf"]),
    help="meta: consolidated.NN.pth and params.json; hf: safetensors and config.json",
)
@click.option("--force/--no_force", help="replace DST if it contains a converted model and nothing else")
def convert(src: str, dst: str, dtype: str, shards: int, to: str, force: bool) -> None:
    """Convert SRC (Meta's layout, Hugging Face's, a GGUF file, a .bin file of llama2.c) to the new folder DST.

    The format of SRC is detected from its content. DST is created when everything is written.
    """
    convert_folder(src, dst, dtype, shards, to, force)
