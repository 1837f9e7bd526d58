"""`llama verify`: check a checkpoint folder without loading the model."""

import sys

import click

from llama.checkpoint.errors import CheckpointError
from llama.checkpoint.paths import describe_path
from llama.checkpoint.verify import check_folder
from llama.cli.command import Command
from llama.console import in_one_line
from llama.files import as_path


@click.command(cls=Command)
@click.argument("ckpt_dir")
def verify(ckpt_dir: str) -> None:
    """Check that the consolidated.NN.pth shards in CKPT_DIR match its checklists, its params.json and each other.

    No model is loaded. Prints a line for each fault and exits with status 1 if there are any; otherwise prints one line
    that lists what was checked. Lines that begin with "note:" are not faults.
    """
    folder = as_path(ckpt_dir)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} {describe_path(folder)}")
    report = check_folder(folder)
    for line in [*report.problems, *(f"note: {note}" for note in report.notes)]:
        print(in_one_line(line))
    if report.problems:
        sys.exit(1)
    print(f"OK: {in_one_line(folder)}: {', '.join(report.checked)}")
