"""Ctrl-C for programs that were started with SIGINT ignored. Imports nothing heavy: it runs before torch is there."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


def restore_interrupt() -> None:
    """Raise KeyboardInterrupt on Ctrl-C again if SIGINT is ignored and this process is in its terminal's foreground."""
    # Scripts and some CI runners start programs with SIGINT ignored, and every child inherits that; Python then sets no
    # handler. In the foreground Ctrl-C is meant for this process. A background job (`nohup prog &`) keeps ignoring it.
    if (
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        and threading.current_thread() is threading.main_thread()  # no other thread may set handlers
        and _in_foreground()
    ):
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Around imports: Ctrl-C ends the process with status 130. An exception raised there may abort torch's C++ code, or
    be swallowed: torch goes on without numpy, and the next import of numpy fails."""
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
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)  # also where all streams are redirected
    except (OSError, AttributeError):  # no terminal; no O_NOCTTY on Windows
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:  # it has hung up
        return False
    finally:
        os.close(terminal)
