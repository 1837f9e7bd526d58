"""`python -m llama chat`: what people see, and the keys and lines they send."""

import codecs
import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import CONTEXT

from llama import Llama, cli
from llama import chat as chat_module
from llama.chat import chat
from llama.chat_format import REFUSAL
from llama.conversation import Conversation
from llama.stream import TextPiece
from llama.terminal import interrupts, visible

ROOT = Path(__file__).parent.parent
CTRL_C, CTRL_D, LEFT, UP, BACKSPACE = "\x03", "\x04", "\x1b[D", "\x1b[A", "\x7f"
# Every line that is typed is answered with a quiet note at the least. A model cannot write the escapes.
PROMPT = r"\x1b\[0m\r\n(\x1b\[\?2004h)?> "
STATUS = r"\[(?:(stopped|cut by max_gen_len|cut, the context is full), )?(?:([\d.]+) tokens/s, )?context (\d+) of (\d+)\]"


def on_terminal(device: str, words: list[str]) -> None:
    """Become a program that a terminal was opened for; "llama" runs here, where torch is imported already."""
    os.setsid()
    terminal = os.open(device, os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for fd in range(3):
        os.dup2(terminal, fd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {"TERM": "xterm", "INPUTRC": "/dev/null"}
    os.chdir(ROOT)
    if words[0] != "llama":
        os.execvp(words[0], words)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115  (they stay open)
    sys.argv = words
    cli.main()


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, *words: str):
        self.master, self.device = pty.openpty()
        fcntl.ioctl(self.device, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 1000, 0, 0))  # no line is wrapped
        self.before = termios.tcgetattr(self.device)
        self.shown, self.read = "", 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.process = CONTEXT.Process(target=on_terminal, args=(os.ttyname(self.device), list(words)), daemon=True)
        self.process.start()

    def send(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def read_until(self, pattern: str, timeout: float = 60) -> str:
        """What it shows up to a match of the regular expression, and the match."""
        end = time.monotonic() + timeout
        while not (match := re.compile(pattern).search(self.shown, self.read)):
            if not self._receive(end - time.monotonic()):
                raise AssertionError(f"no {pattern!r} in {timeout} s, but {self.shown[self.read :]!r}")
        text, self.read = self.shown[self.read : match.end()], match.end()
        return text

    def enter(self, line: str) -> str:
        """Type a line -> what is shown until the next prompt, without the colours."""
        self.send(line + "\r")
        return plain(self.read_until(PROMPT))

    def ends(self, timeout: float = 60) -> int | None:
        """The exit status, when all that it showed has been read."""
        end = time.monotonic() + timeout
        while self.process.is_alive() and time.monotonic() < end:
            self._receive(0.05)
        while self._receive(0):
            pass
        return self.process.exitcode

    def _receive(self, timeout: float) -> bool:
        if not select.select([self.master], [], [], max(0, timeout))[0]:
            return False
        self.shown += self._decoder.decode(os.read(self.master, 65536))
        return True

    def close(self) -> None:
        os.close(self.device)
        os.close(self.master)  # hangs up: torchrun ends its ranks then
        self.process.join(10)
        self.process.kill()


def plain(shown: str) -> str:
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]|\r", "", shown)


def notes(shown: str) -> list[str]:
    return re.findall(r"^\[.*\]$|^error: .*$", plain(shown), re.M)


@pytest.fixture
def open_chat(checkpoint: Callable[..., Path]) -> Iterator[Callable[..., Terminal]]:
    """open_chat(*flags): a dialog with a seeded model at its first prompt; `model` and `program` name others."""
    with contextlib.ExitStack() as stack:

        def start(*flags: str, model: Path | None = None, program: tuple[str, ...] = ("llama",)) -> Terminal:
            words = [*program, "chat", "--ckpt_dir", str(model or checkpoint("mha")), "--temperature", "0", *flags]
            terminal = Terminal(*words)
            stack.callback(terminal.close)
            terminal.read_until(PROMPT)
            return terminal

        yield start
