"""Output of commands to stdout: streamed texts, with rows in order."""

import sys
from collections.abc import Iterable
from typing import TextIO

from llama.console import visible
from llama.engine.streaming import TextPiece
from llama.parallel.groups import all_gather_object, is_main_rank


def show(pieces: Iterable[TextPiece], heads: list[str], tail: str) -> None:
    """Print rows in order, each after its head and followed by `tail`.

    On a terminal the first unfinished row is printed piece by piece; elsewhere each row when it is complete.
    """
    if not is_main_rank():
        for _ in pieces:
            all_gather_object(None)  # wait for rank 0, whose terminal may block
        return
    live = sys.stdout.isatty()
    waiting, done, row = [""] * len(heads), [False] * len(heads), 0
    begun = False
    for piece in pieces:
        waiting[piece.row] += visible(piece.text) if live else piece.text
        done[piece.row] = piece.finish_reason is not None
        while row < len(heads) and (done[row] or (live and waiting[row])):
            write(("" if begun else heads[row]) + waiting[row] + (tail if done[row] else ""))
            waiting[row], begun = "", not done[row]
            if begun:
                break
            row += 1
        all_gather_object(None)


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def dim(text: str, stream: TextIO) -> str:
    return f"\033[2m{text}\033[0m" if stream.isatty() else text
