"""How far long work has come: one line on rank 0's terminal."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from llama.parallel.groups import is_main_rank

T = TypeVar("T")
WIDTH = 20  # of the bar


def progress(items: Sequence[T], label: str) -> Iterator[T]:
    """Iterate, drawing a bar with count and time left on rank 0's stderr when that is a terminal. What takes less than
    a second draws none."""
    visible = is_main_rank() and sys.stderr.isatty()
    started = shown = time.perf_counter()
    try:
        for done, item in enumerate(items, 1):
            yield item
            now = time.perf_counter()
            if not visible or now - started < 1 or (now - shown < 0.1 and done < len(items)):
                continue
            shown = now
            left = round((now - started) / done * (len(items) - done))
            bar = f"{'#' * (WIDTH * done // len(items)):.<{WIDTH}}"
            line = f"{label} {bar} {done}/{len(items)}, {left // 60}:{left % 60:02} left"
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
    finally:
        if shown > started:
            print(file=sys.stderr, flush=True)
