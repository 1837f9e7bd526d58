"""Text files that one host has and every rank needs."""

from pathlib import Path

from llama.distributed import is_main_rank, raising_together, told_by_rank_0


def read_on_rank_0(path: Path) -> str:
    """The text of a file that rank 0's host has, on every rank; bytes that are no UTF-8 become half surrogates.

    Raises on all ranks if the file cannot be read.
    """
    text = ""
    with raising_together():
        if is_main_rank():
            text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    return told_by_rank_0(text)
