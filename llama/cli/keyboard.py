"""The terminal of a chat: edited lines, and Ctrl-C during an answer."""

import contextlib
import functools
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from llama.cli.output import write
from llama.parallel.groups import is_main_rank

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

# Lines ----------------------------------------------------------------------------------------------

_ahead = b""  # keys typed during an answer, if they had to be read to find Ctrl-C


def read_line(prompt: str) -> str | None:
    """A line from stdin, with line editing if stdin is a terminal; None at the end of input."""
    global _ahead
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    while True:
        line, end, rest = _without_control(_ahead).partition("\n")
        _ahead = rest.encode()
        if end:
            write(f"{prompt}{line}\n")
            return line
        try:
            return _editor().prompt(prompt, default=line)
        except EOFError:
            return None
        except KeyboardInterrupt:  # drops the line
            continue


@functools.cache
def _editor() -> "PromptSession[str]":
    """The line editor, one for the whole chat, as it keeps the history. A paste of several lines stays one message."""
    from prompt_toolkit import PromptSession  # only chats need it
    from prompt_toolkit.output.vt100 import Vt100_Output

    if sys.platform == "win32":
        return PromptSession()
    output = Vt100_Output.from_pty(sys.stdout, os.environ.get("TERM"))
    output.enable_cpr = False  # not all terminals report the cursor's position, and the editor would wait for it
    return PromptSession(output=output)


def _without_control(keys: bytes) -> str:
    text = keys.decode(errors="ignore").replace("\r", "\n")
    while "\x7f" in text:  # backspace
        text = re.sub(r"[^\n\x7f]?\x7f", "", text, count=1)
    return "".join(char for char in text if char == "\n" or char.isprintable())


# Ctrl-C ---------------------------------------------------------------------------------------------
# On Ctrl-C a terminal sends SIGINT to its foreground process group. torchrun starts each rank in a new session, so only
# torchrun would get the signal, and it would end all ranks. In that case Ctrl-C is made an ordinary key and looked for
# in the input.

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]  # a module elsewhere


def _owns_terminal() -> bool:
    # The ranks of a host share the terminal. Only one of them may change it.
    return termios is not None and is_main_rank() and sys.stdin.isatty()


def _sends_no_signals() -> bool:
    """Whether stdin is a terminal whose Ctrl-C does not reach this process."""
    if not _owns_terminal():
        return False
    try:
        os.tcgetpgrp(sys.stdin.fileno())
    except OSError:  # another session's terminal
        return True
    return False


@contextlib.contextmanager
def _terminal(change: Callable[[list[Any]], None]) -> Iterator[None]:
    """Change the terminal's attributes inside the block."""
    fd = sys.stdin.fileno()
    before, attributes = termios.tcgetattr(fd), termios.tcgetattr(fd)
    change(attributes)
    termios.tcsetattr(fd, termios.TCSADRAIN, attributes)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _no_interrupt_key(attributes: list[Any]) -> None:
    attributes[6][termios.VINTR] = bytes([os.fpathconf(sys.stdin.fileno(), "PC_VDISABLE") % 256])


def _no_echo(attributes: list[Any]) -> None:
    attributes[3] &= ~termios.ECHO  # keys typed now are shown at the next prompt
    attributes[3] |= termios.NOFLSH  # or Ctrl-C would discard output that is not on the screen yet


def _key_by_key(attributes: list[Any]) -> None:
    attributes[3] &= ~(termios.ICANON | termios.ECHO)


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Inside the block Ctrl-C does not end the chat. The terminal is restored at the end, also if torchrun ends the
    ranks because one has died."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) if _owns_terminal() else None
    try:
        with _terminal(_no_interrupt_key) if _sends_no_signals() else contextlib.nullcontext():
            yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """For the time of an answer: yields a function that returns whether Ctrl-C was pressed.

    The second Ctrl-C raises KeyboardInterrupt, for the case that the model is in a long step. This works only if Ctrl-C
    arrives as a signal.
    """
    pressed = False

    def signalled(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def typed() -> bool:
        global _ahead
        nonlocal pressed
        fd = sys.stdin.fileno()
        while select.select([fd], [], [], 0)[0] and (keys := os.read(fd, 1024)):
            *before, after = keys.split(b"\x03")
            if before:
                pressed, _ahead = True, b""
            _ahead += after
        return pressed

    if _sends_no_signals():
        with _terminal(_key_by_key):
            yield typed
        return
    before = signal.signal(signal.SIGINT, signalled)
    try:
        with _terminal(_no_echo) if _owns_terminal() else contextlib.nullcontext():
            yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
