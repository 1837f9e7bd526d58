"""`llama verify`: check a checkpoint folder without loading a model."""

import sys

from llama.checkpoint.errors import CheckpointError
from llama.checkpoint.paths import describe_path
from llama.checkpoint.verify import check_folder
from llama.console import in_one_line
from llama.files import as_path


def verify(ckpt_dir: str) -> None:
    """Check a folder of consolidated.NN.pth shards against its checklists, itself and params.json, without loading it.

    Prints a line for each fault on stdout and ends with exit status 1 if there is any, else a line that says what was
    checked. Lines that begin with "note:" are no faults.
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
