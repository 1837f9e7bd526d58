"""Ctrl-C in programs that start with SIGINT ignored, and during imports.

Imports the standard library only: its functions are called before torch is imported.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


def restore_interrupt() -> None:
    """If SIGINT is ignored, let Ctrl-C raise KeyboardInterrupt again in a process in its terminal's foreground."""
    # Scripts and some CI runners start programs with SIGINT ignored. Children inherit that, and Python then installs no
    # handler. Ctrl-C is still meant for a process in the foreground, not for a background job (`nohup prog &`).
    if (
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        and threading.current_thread() is threading.main_thread()  # only this one may set handlers
        and _in_foreground()
    ):
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """While the block imports packages, Ctrl-C ends the process at once, with status 130.

    A KeyboardInterrupt is unsafe there. Raised inside torch's C++ code, it may abort the process. Raised while torch
    imports numpy, it is swallowed: torch continues without numpy, and the next import of numpy fails.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _in_foreground() -> bool:
    """Whether this process belongs to the foreground process group of its terminal; False without a terminal."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)  # works even if all streams are redirected
    except (OSError, AttributeError):  # no terminal, or Windows, which has no O_NOCTTY
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:  # the terminal has hung up
        return False
    finally:
        os.close(terminal)
