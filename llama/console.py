"""Output for people: log lines, progress bars, tables, and text with control characters made visible.

Modules log with `logging.getLogger(__name__)`. The logger "llama" has one handler, which prints to stderr on rank 0.
stdout is for results. The environment variable LLAMA_LOG is the level: debug, info (the default) or warning.
"""

import logging
import os
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from llama.parallel.groups import is_main_rank

T = TypeVar("T")
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}
LONGEST = 4000  # characters; longer messages are shortened
# Characters that change the direction of text, so that it is displayed in another order.
BIDI_MARKS = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), "\u200e", "\u200f", "\u061c"}


def visible(text: str) -> str:
    """Replace control characters, which a terminal would execute, by visible ones. Line breaks and tabs stay."""
    return "".join(char if char in "\n\t" or not _is_control(char) else _picture(char) for char in text)


def in_one_line(text: object) -> str:
    """`visible` in one line of limited length, for messages that quote other people's text."""
    line = str(text)
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    return "".join(_picture(char) if char in "\n\t" else char for char in visible(line))


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in BIDI_MARKS


def _picture(char: str) -> str:
    code = ord(char)
    if code < 32 or code == 127:
        return chr(0x2400 + code if code < 32 else 0x2421)  # Unicode's control pictures
    return f"<U+{code:04X}>"


class _Handler(logging.Handler):
    """Prints records to stderr on rank 0. Control characters, for instance from a file name, are made visible."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is not None and is_main_rank():
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            print(prefix + visible(record.getMessage()), file=sys.stderr, flush=True)


def configure_logging() -> None:
    """Add a handler to the logger "llama". A program may replace its `handlers` to send the records elsewhere."""
    level = os.environ.get("LLAMA_LOG", "info").lower()
    logger = logging.getLogger("llama")
    logger.setLevel(LEVELS.get(level, logging.INFO))
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(_Handler())
    if level not in LEVELS:
        logger.warning("LLAMA_LOG is %r, expected %s: info is used", level, ", ".join(LEVELS))


def progress(items: Sequence[T], label: str) -> Iterator[T]:
    """Iterate over `items` with a progress bar on rank 0's stderr, if that is a terminal. The bar appears
    when an item ends more than one second after the start."""
    is_visible = sys.stderr is not None and sys.stderr.isatty() and is_main_rank()
    started, bar = time.perf_counter(), None
    try:
        for done, item in enumerate(items, 1):
            yield item
            if bar is None and is_visible and time.perf_counter() - started > 1:
                columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                # By default rich would redirect the program's own output through the bar.
                bar = Progress(*columns, console=Console(stderr=True), redirect_stdout=False, redirect_stderr=False)
                task = bar.add_task(label, total=len(items))
                bar.start()
            if bar is not None:
                bar.update(task, completed=done)
    finally:
        if bar is not None:
            bar.stop()


def print_table(rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table to stdout. The first row is the header; the first `left` columns are aligned left, others right.

    On a terminal long headers are wrapped; elsewhere each row is one line.
    """
    is_terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, width=None if is_terminal else 10_000, highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, head in enumerate(rows[0]):
        table.add_column(Text(head), justify="left" if i < left else "right")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    console.print(table)
