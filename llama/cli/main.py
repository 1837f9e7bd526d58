"""`python -m llama COMMAND`, and how commands and examples end when something is wrong."""

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from inspect import Parameter, signature
from typing import Any, NoReturn

import fire

from llama.checkpoint.verify import verify
from llama.cli.bench import bench
from llama.cli.chat import chat
from llama.cli.complete import complete
from llama.console import in_one_line
from llama.convert import convert
from llama.errors import is_out_of_memory
from llama.evaluate.conformance import compare, export
from llama.evaluate.harness import lm_eval
from llama.evaluate.inspect import inspect
from llama.evaluate.perplexity import perplexity
from llama.interrupt import restore_interrupt
from llama.memory.plan import plan
from llama.parallel.groups import current_world, is_main_rank
from llama.parallel.heartbeat import PeerError, prepare_lost_rank_exit, write_torchrun_error

Command = Callable[..., Any]
Commands = dict[str, "Command | Commands"]


def run(command: Command | Commands) -> None:
    """Read the command line into `command`'s arguments and call it."""
    with ending_in_one_line():
        words = _read_words(command, sys.argv[1:])
        for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=errors)  # characters that the terminal's encoding lacks end nothing
        fire.Fire(command, words, "llama" if isinstance(command, dict) else None)


@contextlib.contextmanager
def ending_in_one_line() -> Iterator[None]:
    """A mistake of the user's ends in one line on stderr and exit status 1 or 2, Ctrl-C in 130; anything else is a
    fault of the program and keeps its traceback."""
    restore_interrupt()
    try:
        yield
    except BrokenPipeError:  # `| head` has seen enough; nothing may be flushed there at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, TypeError, OSError, FloatingPointError, PeerError) as error:
        write_torchrun_error(in_one_line(error))
        sys.exit(f"error: {in_one_line(error)}" if _should_tell(error) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        line = prepare_lost_rank_exit(error)
        if is_out_of_memory(error):  # before or after a model has its place
            line = f"out of memory or threads ({in_one_line(error)}): free some, or raise the limits (ulimit -v, -u)"
        if line:
            write_torchrun_error(line)
            sys.exit(f"error: {line}")
        raise


def _should_tell(error: BaseException) -> bool:
    """Whether this rank is the one to print an error: each its own, but one of those that all raise together."""
    rank = current_world().rank
    return error.__dict__.get("reporting_rank", rank) == rank


def _read_words(command: Command | Commands, words: list[str]) -> list[str]:
    """The command line as fire cannot misread it: --name=value for everything, texts in Python's quotes.

    By itself fire runs a command before it complains about a flag or shows its help, and takes texts for Python: "1e3"
    for a number, "- a" for a flag.
    """
    if isinstance(command, dict):
        if not words or words[0].startswith("-"):
            return words  # fire lists the commands
        if words[0] not in command:
            _refuse(f"no command {words[0]!r}; there are {', '.join(command)}")
        return [words[0], *_read_words(command[words[0]], words[1:])]
    if {"-h", "--help"} & set(words):
        return ["--help"]
    parameters = signature(command).parameters
    given, free, rest = dict[str, list[str]](), list[str](), list(words)
    while rest:
        word = rest.pop(0)
        name, value = _flag(word, list(parameters))
        if name is None:
            free.append(word)
            continue
        if (
            value is None
            and (off := re.sub("^no_?", "", name)) != name
            and off in parameters
            and _is_switch(parameters[off])
        ):
            name, value = off, "False"
        if name not in parameters:
            _refuse(f"unknown flag --{name}; there are {', '.join(f'--{name}' for name in parameters)}")
        if value is None and _is_switch(parameters[name]):
            value = rest.pop(0) if rest and rest[0] in ("True", "False", "auto") else "True"
        elif value is None and rest and _flag(rest[0], list(parameters))[0] not in parameters:
            value = rest.pop(0)
        if value is None:
            _refuse(f"--{name} needs a value")
        given.setdefault(name, []).append(value)
    # Words without a flag fill what is left, in turn.
    places = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD and name not in given]
    if places and parameters[places[-1]].annotation == list[str] and len(free) >= len(places):
        most = places.pop()  # a list takes all the words that are left
        given[most] = free[len(places) :]
        del free[len(places) :]
    if len(free) > len(places):
        _refuse(f"{len(free)} words without a flag, but {len(places)} have a place: quote a text with spaces")
    given |= {name: [word] for name, word in zip(places, free, strict=False)}
    if missing := [name for name, p in parameters.items() if p.default is p.empty and name not in given]:
        name = missing[0]
        what = "FILE..." if parameters[name].annotation == list[str] else f"--{name}"
        _refuse(f"{what} is missing; --help tells more")
    return [f"--{name}={_as_python(values, str(parameters[name].annotation))}" for name, values in given.items()]


def _is_switch(parameter: Parameter) -> bool:
    """Whether --name alone means True, and --no-name False."""
    return parameter.annotation in (bool, bool | str)


def _flag(word: str, names: list[str]) -> tuple[str | None, str | None]:
    """Name and value of "--name=value", "--name" or "-n", where one name begins with n; no name for other words."""
    match = re.fullmatch(r"--?([A-Za-z][\w-]*)(?:=(.*))?", word, re.DOTALL)
    if not match:
        return None, None
    name = match[1].replace("-", "_")
    long = [other for other in names if len(name) == 1 and other.startswith(name)]
    return (long[0] if len(long) == 1 else name), match[2]


def _as_python(values: list[str], kind: str) -> str:
    """The values that a flag was given, as fire reads them: lists are joined, otherwise the last one counts."""
    if kind == "list[str] | None":
        return repr([text for value in values for text in _text_or_list(value)])
    if kind == "list[str]":
        return repr(values)
    return repr(values[-1]) if kind in ("<class 'str'>", "str | None") else values[-1]


def _text_or_list(word: str) -> list[str]:
    """A JSON list of texts, or one text, in which \\n and the like may stand."""
    for json_text in (word, f'["{word}"]'):
        with contextlib.suppress(ValueError):
            found = json.loads(json_text)
            if isinstance(found, list) and all(isinstance(text, str) for text in found):
                return found
    return [word]


def _refuse(problem: str) -> NoReturn:
    if is_main_rank():
        print(f"error: {in_one_line(problem)}", file=sys.stderr)
    sys.exit(2)


COMMANDS: Commands = {
    "bench": bench,
    "chat": chat,
    "complete": complete,
    "conformance": {"compare": compare, "export": export},
    "convert": convert,
    "inspect": inspect,
    "lm_eval": lm_eval,
    "perplexity": perplexity,
    "plan": plan,
    "verify": verify,
}


def main() -> None:
    if sys.argv[1:2] == ["lm_eval"]:  # the harness reads its flags by itself
        with ending_in_one_line():
            lm_eval(sys.argv[2:])
    else:
        run(COMMANDS)
