"""Ctrl-C in programs that were started with SIGINT ignored; tests/test_download.py has download.sh."""

import contextlib
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.paths import ROOT

# Runs a program with SIGINT ignored, in a session of its own. With "foreground" and "background" it opens the terminal
# that is its stdin, which makes it the controlling terminal.
LAUNCH = """
import os, signal, sys
place, *args = sys.argv[1:]
signal.signal(signal.SIGINT, signal.SIG_IGN)
if place != "no terminal":
    os.close(os.open(os.ttyname(0), os.O_RDWR))
if place == "background" and (child := os.fork()):
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
if place == "background":
    os.setpgid(0, 0)
os.execv(sys.executable, [sys.executable, *args])
"""
SIGNALS_ITSELF = """
import os, signal
from llama.cli.command import one_line_errors

with one_line_errors():
    os.kill(os.getpid(), signal.SIGINT)
    print("SIGINT was ignored")
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Program:
    """A Python program whose stdin and stdout are a terminal, started with SIGINT ignored."""

    def __init__(self, *args: str, place: str = "foreground"):
        self.master, device = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, place, *args],
            stdin=device,
            stdout=device,
            stderr=device,
            cwd=ROOT,
            start_new_session=True,
        )
        os.close(device)

    def waits_for(self, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + 60
        while not condition():
            assert self.process.poll() is None and time.monotonic() < limit, self.shown
            self._receive(0.01)

    def ctrl_c(self) -> None:
        os.write(self.master, b"\x03")

    def ends(self) -> int:
        limit = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < limit:
            self._receive(0.05)
        while self._receive(0):
            pass
        if self.process.poll() is None:
            self.process.kill()
        os.close(self.master)
        return self.process.wait()

    def _receive(self, timeout: float) -> bool:
        if select.select([self.master], [], [], timeout)[0]:
            with contextlib.suppress(OSError):  # no process has the terminal open
                self.shown += os.read(self.master, 65536).decode(errors="replace")
                return True
        return False


@pytest.mark.parametrize(("place", "status"), [("foreground", 130), ("background", 0), ("no terminal", 0)])
def test_only_the_foreground_receives_sigint(place: str, status: int) -> None:
    program = Program("-c", SIGNALS_ITSELF, place=place)
    assert program.ends() == status, program.shown
    assert ("SIGINT was ignored" in program.shown) == (status == 0)
    assert "Traceback" not in program.shown


@pytest.mark.parametrize("script", ["example_text_completion.py", "example_chat_completion.py"])
def test_examples(script: str, checkpoint: Callable[..., Path]) -> None:
    sizes = ["--max_seq_len", "20000", "--max_gen_len", "15000"]
    program = Program(script, "--ckpt_dir", str(checkpoint("mha")), *sizes)
    program.waits_for(lambda: "\n> " in program.shown or "Assistant: " in program.shown)
    program.ctrl_c()
    assert program.ends() == 130, program.shown[-2000:]
    assert "Traceback" not in program.shown


def test_commands_while_torch_is_imported(tmp_path: Path) -> None:
    program = Program("-m", "llama", "plan", str(tmp_path))
    maps = Path(f"/proc/{program.process.pid}/maps")
    program.waits_for(lambda: "libtorch_python" in maps.read_text())
    program.ctrl_c()
    assert program.ends() == 130, program.shown
    assert program.shown.replace("^C", "").strip() == ""
