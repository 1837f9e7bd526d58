"""Command lines: every mistake is reported in one line on stderr, before anything runs."""

import os
import signal
import subprocess
import sys
import time
from inspect import signature
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete

from llama import Llama
from llama.cli import main as cli
from llama.cli.command import Command, Group, model_options, run, stop_option
from llama.evaluate.lm_eval_adapter import MetaLlama


@click.command(cls=Command)
@click.argument("source")
@click.argument("count", type=int, default=1)
@click.option("--verbose/--no_verbose")
def command(source: str, count: int, verbose: bool) -> None:
    raise AssertionError("ran")


def fails(reason: BaseException) -> click.Command:
    def raising() -> None:
        raise reason

    return Command("fails", callback=raising)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--source", "x", "--cuont", "3"], "unknown flag --cuont: did you mean --count?"),
        (["--source=x", "--cuont=3"], "unknown flag --cuont: did you mean --count?"),
        (["x", "--cuont=3"], "unknown flag --cuont: did you mean --count?"),
        (["x", "--zzz"], "unknown flag --zzz: --help lists the flags"),
        ([], "Missing argument 'SOURCE'."),
        (["--count", "3"], "Missing argument 'SOURCE'."),
        (["-cuont", "3", "x"], "unknown flag --cuont"),
        (["x", "--count", "three"], "Invalid value for '[COUNT]': 'three' is not a valid integer."),
        (["a", "1", "b", "c"], "unexpected 'b' after the last argument; expected [source] [count]"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_misspelt_and_missing_flags_run_nothing(
    args: list[str],
    message: str,
    nested: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *(["go"] if nested else []), *args])
    with pytest.raises(SystemExit) as ended:
        run(Group("llama", commands={"go": command}) if nested else command)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("args", [["--count", "2", "x"], ["-source", "x"], ["x", "--count=-5"], ["x", "7"]])
def test_arguments_without_flags_are_assigned_in_order(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *args])
    with pytest.raises(AssertionError, match="ran"):
        run(command)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], None),
        (["--compile"], True),
        (["--compile", "auto"], None),
        (["--compile=False"], False),
        (["--no-compile"], False),
        (["--no_compile", "--quiet"], False),
        (["--nocompile"], False),
        (["--compile=false"], False),
        (["--no_compile", "False"], True),
        (["--no_compile", "--compile", "auto"], None),
    ],
)
def test_switches(args: list[str], expected: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command gets compile=None if no flag set it, and `build` uses its own default."""
    seen: list[object] = []

    @click.command(cls=Command)
    @click.option("--quiet/--no_quiet")
    @model_options("ckpt_dir")
    def switched(compile: bool | None, quiet: bool, **options: Any) -> None:
        seen.append((compile, quiet))

    monkeypatch.setattr(sys, "argv", ["program", *args])
    run(switched)
    assert seen == [(expected, "--quiet" in args)]


@pytest.mark.parametrize("word", ["--quiet=yes", "--quiet=", "--quiet=auto", "--once=0"])
def test_a_switch_with_another_value(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command(cls=Command)
    @click.option("--quiet/--loud")
    @click.option("--once", is_flag=True)
    def switched(quiet: bool, once: bool) -> None:
        raise AssertionError("ran")

    monkeypatch.setattr(sys, "argv", ["program", word])
    with pytest.raises(SystemExit) as ended:
        run(switched)
    flag, value = word.split("=")
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {flag} is {value!r}, expected True or False\n"


def test_a_switch_without_an_opposite_may_be_false(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command(cls=Command)
    @click.option("--no_cache", is_flag=True)
    def switched(no_cache: bool) -> None:
        print(no_cache)

    for words, expected in ((["--no_cache"], "True\n"), (["--no_cache", "False"], "False\n")):
        monkeypatch.setattr(sys, "argv", ["program", *words])
        run(switched)
        assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [("llama pl", "plan"), ("llama convert --sh", "--shards"), ("llama complete --dtype bf", "bfloat16")],
)
def test_a_shell_completes_unfinished_lines(line: str, expected: str) -> None:
    words = line.split()
    found = ShellComplete(cli.app, {}, "llama", "_LLAMA_COMPLETE").get_completions(words[1:-1], words[-1])
    assert expected in [item.value for item in found]


def test_every_command_compiles_by_default() -> None:
    """Commands pass compile=None without a flag, so that `build` uses its default."""
    assert signature(Llama.build).parameters["compile"].default == "auto"
    assert signature(MetaLlama.__init__).parameters["compile"].default == "auto"
    flags = [p for each in cli.app.commands.values() for p in each.params if p.name == "compile"]
    assert len(flags) == 6 and all(flag.get_default(click.Context(cli.app)) is None for flag in flags)


@pytest.mark.parametrize("error", [ValueError("no such shard"), TypeError("no number"), FileNotFoundError("nothing")])
def test_a_users_mistake_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as ended:
        run(fails(error))
    assert ended.value.code == f"error: {error}"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["chatt"], "no command 'chatt': did you mean chat?"),
        (["xyz"], "no command 'xyz'; there are bench, chat, complete, conformance, "),
        (["conformance", "exprot"], "no command 'exprot': did you mean export?"),
    ],
)
def test_a_mistyped_command_is_one_line(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["llama", *args])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(f"error: {message}")


@pytest.mark.parametrize("error", [RuntimeError("Resource temporarily unavailable"), MemoryError()])
def test_out_of_memory_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit, match=r"^error: out of memory or threads \(.*\): free some, or raise the limits"):
        run(fails(error))


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(AttributeError):
        run(fails(AttributeError("a bug")))


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as ended:
        run(fails(KeyboardInterrupt()))
    assert ended.value.code == 130


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("library", ["libtorch_python", "libtorch_python then 0.4 s"])
def test_ctrl_c_while_packages_are_imported(library: str, tmp_path: Path) -> None:
    library, _, later = library.partition(" then ")
    # The last import but one waits, so that the program is still importing on any machine.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\n"
        "class Waits:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'llama.cli.perplexity': time.sleep(30)\n"
        "sys.meta_path.insert(0, Waits())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "llama", "plan", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while library not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
    time.sleep(0.4 if later else 0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


def test_convert_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["llama", "convert", str(tmp_path / "none.gguf"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert str(ended.value.code).startswith(f"error: {tmp_path / 'none.gguf'} does not exist")


@click.command(cls=Command)
@click.argument("text", default="none")
@stop_option
@click.option("--count", type=int, default=1)
@click.option("--go_on/--no_go_on")
def texts(text: str, stop: list[str] | None, count: int, go_on: bool) -> None:
    """Print the arguments that were parsed."""
    print(repr((text, stop, count, go_on)))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["1e3"], ("1e3", None, 1, False)),
        (["[1]", "--count", "-2"], ("[1]", None, -2, False)),
        (["--- title"], ("--- title", None, 1, False)),
        (["-"], ("-", None, 1, False)),
        (["--text", "--foo bar"], ("--foo bar", None, 1, False)),
        (["--text=--count"], ("--count", None, 1, False)),
        (["--go_on", "a text"], ("a text", None, 1, True)),
        (["--go-on", "False", "x"], ("x", None, 1, False)),
        (['it\'s "so"\n'], ('it\'s "so"\n', None, 1, False)),
        (["--stop", "\\n", "--stop", "b"], ("none", ["\n", "b"], 1, False)),
        (["--stop", '["a", "\\n"]'], ("none", ["a", "\n"], 1, False)),
        (["--stop", "[1]"], ("none", ["[1]"], 1, False)),
        (["--stop", 'a", "b'], ("none", ['a", "b'], 1, False)),
        (["--count", "2", "--count", "3"], ("none", None, 3, False)),
        (["--text", "a", "--text", "b"], ("b", None, 1, False)),
        (["--go_on", "auto"], ("auto", None, 1, True)),
        (["--count", "2", "--", "--foo"], ("--foo", None, 2, False)),
    ],
)
def test_texts_arrive_as_they_were_written(
    args: list[str], expected: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "go", *args])
    run(Group("llama", commands={"go": texts}))
    assert capsys.readouterr().out == f"{expected!r}\n"


@pytest.mark.parametrize("args", [["--text"], ["--stop", "--go_on"], ["x", "--count"]])
def test_a_flag_without_its_value(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *args])
    with pytest.raises(SystemExit):
        run(texts)
    assert "needs a value" in capsys.readouterr().err


def test_help_anywhere_runs_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "go", "--count", "3", "--help"])
    with pytest.raises(SystemExit) as ended:
        run(Group("llama", commands={"go": texts}))
    shown = capsys.readouterr()
    assert ended.value.code == 0 and "('none'" not in shown.out and "--stop" in shown.out + shown.err
    assert "METADATA" not in shown.out + shown.err


def test_an_option_that_does_not_exist_cannot_be_left_out() -> None:
    with pytest.raises(TypeError, match="there is no option max_sequence_len"):
        model_options("max_sequence_len")
