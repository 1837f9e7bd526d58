"""What people see and type: text made safe to show, pieces in order, Ctrl-C during an answer."""

import contextlib
import functools
import os
import re
import select
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from llama.engine.streaming import TextPiece
from llama.parallel.groups import all_gather_object, is_main_rank, say

LONGEST = 4000  # characters of a message
# Marks that turn the direction of text, and so can show other words than there are.
BIDI_MARKS = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), "\u200e", "\u200f", "\u061c"}


def visible(text: str) -> str:
    """Show control characters, which a terminal would obey, as what they are; line breaks and tabs stay."""
    return "".join(char if char in "\n\t" or not _is_control(char) else _picture(char) for char in text)


def in_one_line(text: object) -> str:
    """The same, with line breaks and tabs shown, too, and cut where it is endless: for messages that quote what others
    wrote."""
    line = str(text)
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    return "".join(_picture(char) if char in "\n\t" else char for char in visible(line))


def tell(text: str) -> None:
    """`say` what may quote a file or name one."""
    say(visible(text))


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in BIDI_MARKS


def _picture(char: str) -> str:
    code = ord(char)
    if code < 32 or code == 127:
        return chr(0x2400 + code if code < 32 else 0x2421)  # the pictures of Unicode: ESC as one small character
    return f"<U+{code:04X}>"


def show(pieces: Iterable[TextPiece], heads: list[str], tail: str) -> None:
    """Print rows one below the other, each behind its head and followed by its tail: on a terminal the first unfinished
    row as it comes, elsewhere each when it is whole."""
    if not is_main_rank():
        for _ in pieces:
            all_gather_object(None)  # rank 0 may wait for its terminal
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


# Lines ----------------------------------------------------------------------------------------------

_ahead = b""  # keys pressed during an answer, where we had to read them to find Ctrl-C


def read_line(prompt: str) -> str | None:
    """A line, edited where stdin is a terminal; None at the end of input."""
    global _ahead
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    try:
        import readline
    except ImportError:  # Windows edits lines by itself
        readline = None  # type: ignore[assignment]  # a module elsewhere
    while True:
        line, end, rest = _without_control(_ahead).partition("\n")
        _ahead = rest.encode()
        if end:
            write(f"{prompt}{line}\n")
            return line
        if readline is not None:
            readline.parse_and_bind(r'"\C-c": kill-whole-line')  # for where Ctrl-C is no signal
            readline.set_startup_hook(functools.partial(readline.insert_text, line))
        try:
            return input(prompt)
        except EOFError:
            write("\n")
            return None
        except KeyboardInterrupt:  # a new line
            write("\n")


def _without_control(keys: bytes) -> str:
    text = keys.decode(errors="ignore").replace("\r", "\n")
    while "\x7f" in text:  # rubbed out
        text = re.sub(r"[^\n\x7f]?\x7f", "", text, count=1)
    return "".join(char for char in text if char == "\n" or char.isprintable())


# Ctrl-C ---------------------------------------------------------------------------------------------
# A terminal sends Ctrl-C as SIGINT to the programs in front. torchrun starts ranks in sessions of their own, so there
# it reaches torchrun alone, which would end all of them: then Ctrl-C is made an ordinary key and looked for among what
# was typed.

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]  # a module elsewhere


def _owns_terminal() -> bool:
    # The ranks of a host share theirs; one of them may change it.
    return termios is not None and is_main_rank() and sys.stdin.isatty()


def _sends_no_signals() -> bool:
    """Whether stdin is a terminal whose Ctrl-C does not reach this process."""
    if not _owns_terminal():
        return False
    try:
        os.tcgetpgrp(sys.stdin.fileno())
    except OSError:  # not the terminal of our session
        return True
    return False


@contextlib.contextmanager
def _terminal(change: Callable[[list[Any]], None]) -> Iterator[None]:
    """Change the terminal's attributes for a while."""
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
    attributes[3] &= ~termios.ECHO  # what is typed meanwhile shows at the next prompt
    attributes[3] |= termios.NOFLSH  # or Ctrl-C would discard what has been written and is not on the screen yet


def _key_by_key(attributes: list[Any]) -> None:
    attributes[3] &= ~(termios.ICANON | termios.ECHO)


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Around a dialog at the terminal: Ctrl-C must not end it, and when torchrun ends the ranks because one has died,
    the terminal is left as it was."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) if _owns_terminal() else None
    try:
        with _terminal(_no_interrupt_key) if _sends_no_signals() else contextlib.nullcontext():
            yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Around an answer: gives a function that tells whether Ctrl-C has been pressed. Pressed twice it raises
    KeyboardInterrupt, where signals arrive: the model may be in the middle of a long step."""
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
