"""The progress bar of long operations."""

import os
import pty
import re
import subprocess
import sys

CALL = """
import time
from llama.console import progress
for n in progress(range(6), "thinking"):
    time.sleep(0.25)
print("done", file=__import__("sys").stderr)
for n in progress(range(6), "hurrying"):
    pass
for n in progress(range(6), "failing"):
    time.sleep(0.6)
    if n == 3:
        raise SystemExit("error: it failed")
"""


def test_a_terminal_shows_a_bar_that_counts_and_ends_its_line() -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", CALL], stderr=follower, stdout=subprocess.DEVNULL)
    os.close(follower)
    shown = b""
    while True:
        try:
            block = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        shown += block
    assert process.wait() == 1
    screen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    lines = [line.split("\r")[-1] for line in screen.split("\r\n")]
    assert re.fullmatch(r"thinking ━+ 6/6 0:00:00", lines[0]) and lines[1] == "done"
    assert re.search(r"thinking ━+[╸╺ ]*━* 5/6 ", screen)
    assert re.fullmatch(r"failing ━+[╸╺ ]*━* 3/6 \S+", lines[2]) and lines[3] == "error: it failed"
    assert "hurrying" not in screen  # no bar for what takes no time


def test_elsewhere_nothing_is_shown() -> None:
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True)
    assert done.stderr == "done\nerror: it failed\n"
