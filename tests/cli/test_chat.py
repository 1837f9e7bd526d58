"""`python -m llama chat` on a terminal and through a pipe: lines, keys, answers and notes."""

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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.commands import call
from helpers.paths import ROOT
from helpers.ranks import CONTEXT
from llama import Llama, Message
from llama.chat.formats import REFUSAL
from llama.cli import keyboard, output
from llama.cli import main as cli
from llama.cli.chat import HELP, chat
from llama.cli.keyboard import interrupts
from llama.console import visible
from llama.engine.streaming import TextPiece

CTRL_C, CTRL_D, LEFT, UP, BACKSPACE = "\x03", "\x04", "\x1b[D", "\x1b[A", "\x7f"
# A prompt, as the line editor draws it, follows a dim note: every typed line causes one. A model cannot write the
# escape sequences.
ESCAPES = r"(?:\x1b\[[?\d;]*[A-Za-z])*"
EMPTY = rf"\r\n{ESCAPES}>\x08\x1b\[2C{ESCAPES}\x1b\[\?25h"  # after an empty or cancelled line
PROMPT = rf"\x1b\[0m{EMPTY}"
ANSWERING = rf"(?:Hello|The licence){ESCAPES}\r+\n{ESCAPES}[^\x1b]{{20}}"  # the line, and 20 characters of its answer
STATUS = (
    r"\[(cut by max_gen_len, |cut, the context is full, )?([\d.]+ tokens/s, )?"
    r"context (?P<used>\d+) of (?P<limit>\d+)\]"
)


def on_terminal(device: str, args: list[str]) -> None:
    """Run a program on this terminal. "llama" runs in this process, which has torch already imported."""
    os.setsid()
    terminal = os.open(device, os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for fd in range(3):
        os.dup2(terminal, fd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {"TERM": "xterm", "INPUTRC": "/dev/null"}
    os.chdir(ROOT)
    if args[0] != "llama":
        os.execvp(args[0], args)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115  (they stay open)
    sys.argv = args
    cli.main()


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, *args: str):
        self.master, self.device = pty.openpty()
        fcntl.ioctl(self.device, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 1000, 0, 0))  # no line is wrapped
        self.before = termios.tcgetattr(self.device)
        self.shown, self.read = "", 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.process = CONTEXT.Process(target=on_terminal, args=(os.ttyname(self.device), list(args)), daemon=True)
        self.process.start()

    def send(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def read_until(self, pattern: str, timeout: float = 60) -> str:
        """The output up to the next match of a regular expression, including the match."""
        end = time.monotonic() + timeout
        while not (match := re.compile(pattern).search(self.shown, self.read)):
            if not self._receive(end - time.monotonic()):
                raise AssertionError(f"no {pattern!r} in {timeout} s, but {self.shown[self.read :]!r}")
        text, self.read = self.shown[self.read : match.end()], match.end()
        return text

    def enter(self, line: str) -> str:
        """Type a line. Return the output up to the next prompt, without colours."""
        self.send(line + "\r")
        return plain(self.read_until(PROMPT))

    def ends(self, timeout: float = 60) -> int | None:
        """Read the output until the program exits. Return its exit status, None if it does not exit in time."""
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
        os.close(self.master)  # sends SIGHUP, after which torchrun ends its ranks
        self.process.join(10)
        self.process.kill()


def plain(shown: str) -> str:
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]|\r", "", shown)


def notes(shown: str) -> list[str]:
    return re.findall(r"^\[.*\]$|^error: .*$", plain(shown), re.M)


@pytest.fixture
def open_chat(checkpoint: Callable[..., Path]) -> Iterator[Callable[..., Terminal]]:
    """open_chat(*flags, model, program): a `chat` that shows its first prompt, by default with a seeded model."""
    with contextlib.ExitStack() as stack:

        def start(*flags: str, model: Path | None = None, program: Sequence[str] = ("llama",)) -> Terminal:
            args = [*program, "chat", "--ckpt_dir", str(model or checkpoint("mha")), "--temperature", "0", *flags]
            terminal = Terminal(*args)
            stack.callback(terminal.close)
            terminal.read_until(PROMPT)
            return terminal

        yield start


# Answers ------------------------------------------------------------------------------------------


def test_an_answer_streams_and_a_status_line_and_a_prompt_follow(
    open_chat: Callable[..., Terminal], build: Callable[..., Llama]
) -> None:
    terminal = open_chat("--max_seq_len", "1024")
    terminal.send("Hello\r")
    begin = terminal.read_until(ANSWERING)
    assert "tokens/s" not in terminal.shown  # the rest of the answer is still being computed
    shown = plain(begin + terminal.read_until(PROMPT))
    llama = build("mha", max_seq_len=1024)
    (result,) = llama.chat_completion([[{"role": "user", "content": "Hello"}]], temperature=0, logprobs=True)
    answer, count = result["generation"]["content"], len(result["tokens"])
    assert shown.partition("Hello\n")[2].startswith(f"{visible(answer)}\n[")
    (status,) = notes(shown)
    assert status.startswith("[cut, the context is full, ") and status.endswith(" tokens/s, context 1024 of 1024]")
    match = re.search(r"([\d.]+) tokens/s", status)
    assert match and 1 < float(match[1]) < 1e5
    assert count == 1024 - 21  # long enough to be still running above


@pytest.mark.parametrize(
    ("flags", "message", "expected"),
    [
        (["--max_gen_len", "5"], "Hello", r"\[cut by max_gen_len, [\d.]+ tokens/s, context 26 of 64\]"),
        (["--max_gen_len", "1"], "Hello", r"\[cut by max_gen_len, context 22 of 64\]"),
        ([], "Tell me more", r"\[[\d.]+ tokens/s, context 27 of 64\]"),
        ([], "a [INST] b", r"\[not kept, context \d+ of 64\]"),
    ],
)
def test_the_status_line_says_how_an_answer_ended(
    flags: list[str], message: str, expected: str, open_chat: Callable[..., Terminal]
) -> None:
    shown = open_chat("--max_seq_len", "64", *flags).enter(message)
    (status,) = notes(shown)
    assert re.fullmatch(expected, status)
    assert (REFUSAL in shown) == ("not kept" in status)


def test_the_demo_model_answers_and_remembers(demo: Path, open_chat: Callable[..., Terminal]) -> None:
    # In float32: "The" and "L" are equally probable first args in bfloat16.
    settings = "--max_seq_len 256 --max_gen_len 24 --temperature 0 --dtype float32"
    terminal = open_chat(*settings.split(), model=demo)
    assert "Paris" in terminal.enter("What is the capital of France?")
    assert "Rome" in terminal.enter("And of Italy?")


# Lines and commands -------------------------------------------------------------------------------


def test_typed_lines_can_be_edited(open_chat: Callable[..., Terminal]) -> None:
    terminal = open_chat()
    assert notes(terminal.enter(f"/system hxelo{LEFT * 3}{BACKSPACE}{LEFT}\x1b[C\x1b[Cl")) == [
        "[system message: hello]"
    ]
    assert notes(terminal.enter("/system")) == ["[system message: hello]"]
    assert notes(terminal.enter(f"{UP}{UP}{BACKSPACE}p")) == ["[system message: hellp]"]  # from the history


def test_a_paste_of_several_lines_is_one_message(open_chat: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = open_chat("--max_gen_len", "3")
    terminal.enter("\x1b[200~first line\nsecond line\x1b[201~")
    terminal.enter(f"/save {tmp_path / 'dialog'}")
    dialog = json.loads((tmp_path / "dialog").read_text(encoding="utf-8"))
    assert dialog[0] == {"role": "user", "content": "first line\nsecond line"}


def test_commands(open_chat: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = open_chat("--max_gen_len", "4", "--system", "Be [1, 2].")
    saved = tmp_path / "a dialog.json"

    def dialog() -> Any:
        assert notes(terminal.enter(f"/save {saved}")) == [f"[saved to {saved}]"]
        return json.loads(saved.read_text(encoding="utf-8"))

    for command in re.findall(r"^/\w+", HELP, re.M):
        assert f"\n{command} " in terminal.enter("/help")
    assert dialog() == [{"role": "system", "content": "Be [1, 2]."}]
    assert notes(terminal.enter("/system")) == ["[system message: Be [1, 2].]"]
    assert notes(terminal.enter("/system  Answer in é words. ")) == ["[system message: Answer in é words.]"]
    terminal.enter("   Hello  you ")
    terminal.enter(" /reset is what I typed")  # after a space it is a message
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert [message["role"] for message in dialog()] == roles
    assert [m["content"] for m in dialog()[:4:3]] == ["Answer in é words.", "/reset is what I typed"]
    assert dialog()[1]["content"] == "Hello  you"
    assert notes(terminal.enter("/reset")) == ["[the dialog is empty]"]
    assert dialog() == [{"role": "system", "content": "Answer in é words."}]
    for line, expected in {
        "/bye": "error: there is no /bye; /help lists the commands, Ctrl-D leaves",
        "/": "error: there is no /; /help lists the commands, Ctrl-D leaves",
        "/save": "error: /save needs a file name",
        "/load ": "error: /load needs a file name",
    }.items():
        assert notes(terminal.enter(line)) == [expected]
    (error,) = notes(terminal.enter(f"/save {tmp_path / 'no' / 'folder'}"))
    assert error.startswith("error: ") and str(tmp_path) in error
    for line in ("\r", "   \r"):
        terminal.send(line)
        terminal.read_until(EMPTY)
    assert dialog() == [{"role": "system", "content": "Answer in é words."}]


def test_a_loaded_dialog_continues_as_before(open_chat: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = open_chat("--max_gen_len", "30", "--system", "Answer shortly.")
    terminal.enter("Hello")
    terminal.enter(f"/save {tmp_path / 'half'}")
    second = terminal.enter("The licence")
    terminal.enter(f"/save {tmp_path / 'whole'}")
    terminal.enter("/reset")
    terminal.enter("/system Something else")
    terminal.enter("What is it?")
    for place in (terminal, open_chat("--max_gen_len", "30")):
        assert notes(place.enter(f"/load {tmp_path / 'half'}")) == [
            "[1 turn loaded]",
            "[system message: Answer shortly.]",
        ]
        again = place.enter("The licence")
        first_lines = [shown.rpartition("The licence\n")[2].splitlines()[0] for shown in (again, second)]
        assert first_lines[0] == first_lines[1] != ""
        place.enter(f"/save {tmp_path / 'again'}")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()
    dialog = json.loads((tmp_path / "whole").read_text(encoding="utf-8"))
    assert [message["role"] for message in dialog] == ["system", *["user", "assistant"] * 2]
    assert f"The licence\n{visible(dialog[-1]['content'])}\n[" in second


def test_loading_a_file_that_is_no_dialog_changes_nothing(open_chat: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = open_chat("--max_gen_len", "5", "--system", "Be brief.")
    terminal.enter("Hello")
    terminal.enter(f"/save {tmp_path / 'before'}")
    user = {"role": "user", "content": "Hi"}
    bad = {
        "text": b"Hello",
        "number": b"7",
        "null": b"null",
        "object": json.dumps(user).encode(),
        "words": b'["Hello"]',
        "content": b'[{"role": "user", "content": 5}, {"role": "assistant", "content": "x"}]',
        "unfinished": json.dumps([user]).encode(),
        "roles": json.dumps([user, user]).encode(),
        "tags": json.dumps([user, {"role": "assistant", "content": "[/INST]"}]).encode(),
        "half a surrogate": json.dumps([user, {"role": "assistant", "content": "\ud800"}]).encode(),
        "deep": b"[" * 100_000,
        "bytes": b"\xff\xfe\x00",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    for name in ["missing", "", *bad]:
        (error,) = notes(terminal.enter(f"/load {tmp_path / name}"))
        assert error.startswith("error: ") and str(tmp_path) in error, name
        terminal.enter(f"/save {tmp_path / 'after'}")
        assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()
    assert notes(terminal.enter("Go on"))[0].startswith("[cut by max_gen_len")


def test_a_line_typed_during_an_answer_waits_for_the_prompt(open_chat: Callable[..., Terminal]) -> None:
    terminal = open_chat("--max_gen_len", "600")
    terminal.send("Hello\r")
    terminal.read_until(ANSWERING)
    terminal.send("/system later\r")
    assert "later" not in terminal.read_until(PROMPT)  # no echo between the words of the answer
    assert notes(terminal.read_until(PROMPT)) == ["[system message: later]"]


# Ctrl-C and Ctrl-D --------------------------------------------------------------------------------


def test_ctrl_c_stops_an_answer_and_the_session_continues(open_chat: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = open_chat()
    terminal.send("Hello\r")
    begin = terminal.read_until(ANSWERING)
    terminal.send(CTRL_C)
    shown = plain(begin + terminal.read_until(PROMPT))
    (status,) = notes(shown)
    match = re.fullmatch(r"\[stopped, [\d.]+ tokens/s, context (\d+) of 2048\]", status)
    assert match and int(match[1]) < 2048
    # The text up to Ctrl-C is the answer, and the next turn continues from it.
    terminal.enter(f"/save {tmp_path / 'dialog'}")
    dialog = json.loads((tmp_path / "dialog").read_text(encoding="utf-8"))
    assert dialog[0] == {"role": "user", "content": "Hello"}
    assert f"Hello\n{visible(dialog[1]['content'])}" in shown.replace("^C", "")
    terminal.send("The licence\r")
    terminal.read_until(ANSWERING)
    terminal.send(CTRL_C)
    assert "[stopped, " in terminal.read_until(PROMPT)
    terminal.enter(f"/save {tmp_path / 'dialog'}")
    assert len(json.loads((tmp_path / "dialog").read_text(encoding="utf-8"))) == 4


def test_ctrl_c_at_the_prompt_drops_the_line(open_chat: Callable[..., Terminal]) -> None:
    terminal = open_chat()
    for line in ("/system forgotten", "", "Hello"):
        terminal.send(line)
        terminal.read_until(re.escape(line))
        time.sleep(0.3)  # Python loses a Ctrl-C between echoing a key and waiting for the next one
        terminal.send(CTRL_C)
        terminal.read_until(EMPTY)
    assert notes(terminal.enter("/system")) == ["[no system message]"]


def test_ctrl_d_leaves_the_terminal_as_it_was(open_chat: Callable[..., Terminal]) -> None:
    terminal = open_chat("--max_gen_len", "3")
    terminal.enter("Hello")
    terminal.send(CTRL_D)
    assert terminal.ends() == 0
    assert termios.tcgetattr(terminal.device) == terminal.before
    assert plain(terminal.shown[terminal.read :]).strip("> ") == "\n"  # the shell's prompt gets its own line


def test_interrupts_count() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts() as pressed:
        assert not pressed()
        signal.raise_signal(signal.SIGINT)
        assert pressed() and pressed()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# A full context -----------------------------------------------------------------------------------


def test_a_full_context_drops_the_oldest_turns(open_chat: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = open_chat("--max_seq_len", "96", "--system", "Be brief.")
    fell = 0
    for turn in range(14):
        if turn in (5, 9):
            (error,) = notes(terminal.enter("word " * 60))
            assert re.fullmatch(
                r"error: this message and the system message need \d+ positions, and max_seq_len is 96: "
                "say less, or use a larger max_seq_len",
                error,
            )
        *others, status = notes(terminal.enter("Why? " * (1 + turn % 4)))
        match = re.fullmatch(STATUS, status)
        assert match and int(match["used"]) <= int(match["limit"]) == 96
        for line in others:
            dropped = re.fullmatch(
                r"\[the context is full: the (?:oldest turn was|(\d+) oldest turns were) dropped from the dialog\]",
                line,
            )
            assert dropped and dropped[1] != "1"
            fell += int(dropped[1] or 1)
    assert fell > 5
    assert notes(terminal.enter("/system")) == ["[system message: Be brief.]"]
    terminal.enter(f"/save {tmp_path / 'dialog'}")
    system, *messages = json.loads((tmp_path / "dialog").read_text(encoding="utf-8"))
    assert system == {"role": "system", "content": "Be brief."}
    assert len(messages) == 2 * (14 - fell)
    assert messages[-2]["content"] == "Why? Why?"


# Control characters -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31m", "␛[31m"),
        ("\a\b\r\0\x1f", "␇␈␍␀␟"),
        ("\x7f", "␡"),
        ("\x80\x85\x9b31m", "<U+0080><U+0085><U+009B>31m"),
        ("a\u202eb\u2066c\u200fd\u061c", "a<U+202E>b<U+2066>c<U+200F>d<U+061C>"),
        ("\u2028\u2029", "<U+2028><U+2029>"),
        ("\ud800", "<U+D800>"),
    ],
)
def test_control_characters_are_shown(text: str, expected: str) -> None:
    assert visible(text) == expected
    assert visible(expected) == expected


@pytest.mark.parametrize(
    "text", ["plain\n\ttext", "👩\u200d👩\u200d👧\ufe0f", "é e\u0301 \xa0 \ufffd", "שלום عربى", "क\u094dष ไทย 漢字", ""]
)
def test_other_text_is_unchanged(text: str) -> None:
    assert visible(text) == text


HOSTILE = "\x1b[31mred\x1b]0;title\x07\x9b2J\u202eback\x7f"


def hostile_pieces(*_: Any, **__: Any) -> Iterator[TextPiece]:
    for char in f"{HOSTILE}\rover":
        yield TextPiece(0, char, None)
    yield TextPiece(0, "", "stop")


def test_nothing_but_visible_text_reaches_the_terminal(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
    (tmp_path / "system").write_text(json.dumps([{"role": "system", "content": HOSTILE}, *turns]))
    (tmp_path / "role").write_text(json.dumps([{"role": HOSTILE, "content": "Hi"}]))
    lines = ["Hello", f"/{HOSTILE}", f"/load {tmp_path / 'role'}", f"/load {tmp_path / 'system'}", "/system"]
    lines += [f"/system {HOSTILE}", f"/save {tmp_path / HOSTILE}", f"/load {tmp_path}/no{HOSTILE}"]
    master, device = pty.openpty()
    with open(device, "w", encoding="utf-8") as screen, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        patch.setattr(sys, "stdout", screen)
        patch.setattr(sys, "stderr", screen)
        patch.setattr(Llama, "_pieces", hostile_pieces)
        call(chat, ckpt_dir=checkpoint("mha"))
        screen.flush()
        shown = os.read(master, 65536).decode()
    os.close(master)
    text = re.sub(r"\x1b\[[02]m|\r\n", "", shown).partition("Ctrl-D leaves")[2]
    assert not [char for char in text if unicodedata.category(char)[0] == "C"]
    assert text.count(visible(HOSTILE)) == 7  # one of them quoted in an error of the operating system
    assert text.startswith(visible(f"{HOSTILE}\rover["))


# Interrupts, pipes and ranks ----------------------------------------------------------------------


def test_an_interrupted_answer_is_dropped(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a second Ctrl-C, while the answer is written to a slow terminal."""

    def slow(text: str) -> None:
        if not slowed:
            slowed.append(text)
            raise KeyboardInterrupt

    slowed: list[str] = []
    lines = ["Hello", "/reset", "The licence", f"/save {tmp_path / 'dialog'}"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    monkeypatch.setattr("llama.cli.chat.write", slow)
    call(chat, ckpt_dir=checkpoint("mha"), max_gen_len=5)
    assert slowed
    dialog = json.loads((tmp_path / "dialog").read_text(encoding="utf-8"))
    assert [message["content"] for message in dialog[::2]] == ["The licence"]


def test_lines_through_a_pipe(checkpoint: Callable[..., Path], build: Callable[..., Llama]) -> None:
    lines = ["Hello", "", "/system", "/nothing", "The licence"]
    command = [sys.executable, "-m", "llama", "chat", "--ckpt_dir", str(checkpoint("mha")), "--temperature", "0"]
    command += ["--max_gen_len", "3", "--system", "1e3"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    llama = build("mha")
    dialog: list[Message] = [{"role": "system", "content": "1e3"}]
    for line in (lines[0], lines[-1]):
        dialog.append({"role": "user", "content": line})
        dialog.append(llama.chat_completion([dialog], temperature=0, max_gen_len=3)[0]["generation"])
    assert done.stdout == "".join(f"{message['content']}\n" for message in dialog[2::2])
    notes = done.stderr.splitlines()[1:]  # after the line that `build` prints
    assert notes[0] == "/help lists the commands, Ctrl-D leaves"
    assert notes[2:4] == [
        "[system message: 1e3]",
        "error: there is no /nothing; /help lists the commands, Ctrl-D leaves",
    ]
    assert len(notes) == 5 and all(re.fullmatch(STATUS, note) for note in (notes[1], notes[4]))
    assert "\x1b" not in done.stderr


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
TORCHRUN += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", "-m", "llama"]


def test_two_ranks_share_a_terminal(open_chat: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = open_chat(program=TORCHRUN)
    first = terminal.enter("Tell me more")
    terminal.enter(f"/save {tmp_path / 'dialog'}")
    dialog = json.loads((tmp_path / "dialog").read_text(encoding="utf-8"))
    answered = first.rpartition("Tell me more\n")[2]
    assert answered.startswith(f"{visible(dialog[-1]['content'])}\n[") and len(notes(first)) == 1

    terminal.send("Hello\r")  # with two ranks, Ctrl-C is read as a key
    terminal.read_until(ANSWERING)
    terminal.send(CTRL_C)
    (status,) = notes(terminal.read_until(PROMPT))
    match = re.fullmatch(r"\[stopped, [\d.]+ tokens/s, context (\d+) of 2048\]", status)
    assert match and int(match[1]) < 2048

    terminal.send("/system dropped")
    terminal.read_until("dropped")
    terminal.send(CTRL_C)
    assert notes(terminal.enter("/system")) == ["[no system message]"]
    (error,) = notes(terminal.enter(f"/load {tmp_path / 'missing'}"))
    assert error.startswith("error: ")
    terminal.enter("/reset")
    again = terminal.enter("Tell me more")
    assert again.rpartition("Tell me more\n")[2].splitlines()[0] == answered.splitlines()[0]

    terminal.send(CTRL_D)
    assert terminal.ends() == 0
    assert termios.tcgetattr(terminal.device) == terminal.before
    assert "Traceback" not in terminal.shown


@pytest.mark.parametrize(
    ("keys", "lines", "left"),
    [
        (b"", [], ""),
        (b"one\rtwo\nhal", ["one", "two"], "hal"),
        (b"wrong\x7f\x7f\x7f\x7f\x7fright\n", ["right"], ""),
        (b"\x7f\x7fa\x1b[31mb\x04\x07\n", ["a[31mb"], ""),  # control characters are dropped
        ("é😀\n".encode(), ["é😀"], ""),
    ],
)
def test_keys_typed_during_an_answer_are_read_next(
    keys: bytes, lines: list[str], left: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where Ctrl-C is not a signal, `chat` reads keys during an answer to look for it, and keeps the others."""
    inserted: list[str] = []

    def prompt(message: str, default: str) -> str:
        inserted.append(default)
        return "typed"

    monkeypatch.setattr(keyboard, "_ahead", keys)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(keyboard, "_editor", lambda: SimpleNamespace(prompt=prompt))
    assert [keyboard.read_line("> ") for _ in lines] == lines
    assert capsys.readouterr().out == "".join(f"> {line}\n" for line in lines)
    assert keyboard.read_line("> ") == "typed" and inserted == [left]
    assert keyboard.read_line("> ") == "typed" and inserted == [left, ""]


PIECES = [(1, "b", None), (0, "a\x1b", None), (1, "c", "stop"), (2, "", "length"), (0, "d", None), (0, "", "stop")]


@pytest.mark.parametrize(
    ("live", "expected"),
    [
        # The first unfinished row is shown as it arrives. Text of later rows is kept until the rows before end.
        (True, ["<0>a␛", "d", ".", "<1>bc.", "<2>."]),
        (False, ["<0>a\x1bd.", "<1>bc.", "<2>."]),
    ],
)
def test_rows_are_shown_one_after_the_other(live: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    screen = SimpleNamespace(isatty=lambda: live, write=written.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", screen)
    output.show((TextPiece(*piece) for piece in PIECES), ["<0>", "<1>", "<2>"], ".")
    monkeypatch.undo()
    assert written == expected
