"""`python -m llama COMMAND`, and how commands and examples end when something is wrong."""

import contextlib
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import fire

from llama.chat import chat
from llama.complete import complete
from llama.convert import convert
from llama.distributed import PeerError, is_main_rank, should_tell

Command = Callable[..., Any]


def run(command: Command | dict[str, Command]) -> None:
    """Read the command line into `command`'s arguments and call it.

    A mistake of the user's ends in one line on stderr and exit status 1 or 2, Ctrl-C in 130; anything else is a fault
    of the program and keeps its traceback.
    """
    try:
        _check_flags(command, sys.argv[1:])
        for function in command.values() if isinstance(command, dict) else [command]:
            _take_texts_as_written(function)
        for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=errors)  # characters that the terminal's encoding lacks end nothing
        fire.Fire(command)
    except BrokenPipeError:  # `| head` has seen enough; nothing may be flushed there at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, TypeError, OSError, FloatingPointError, PeerError) as error:
        sys.exit(f"error: {error}" if should_tell(error) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _take_texts_as_written(command: Command) -> None:
    """Keep fire from reading a text as Python: "1e3" or "[1]" would become a number or a list."""
    kinds = {p.name: str(p.annotation) for p in inspect.signature(command).parameters.values()}
    texts = [name for name, kind in kinds.items() if kind in ("<class 'str'>", "str | None")]
    lists = [name for name, kind in kinds.items() if kind == "list[str] | None"]
    fire.decorators.SetParseFns(**dict.fromkeys(texts, str), **dict.fromkeys(lists, _text_or_list))(command)


def _text_or_list(word: str) -> list[str]:
    """A JSON list of texts, or one text."""
    if word.startswith("["):
        with contextlib.suppress(ValueError):
            return json.loads(word)
    return [word]


def _check_flags(command: Command | dict[str, Command], words: list[str]) -> None:
    """Refuse a misspelt or missing flag before anything runs: fire would run the command first and complain after."""
    if isinstance(command, dict):
        if not words or words[0] not in command:
            return  # fire lists the commands
        command, words = command[words[0]], words[1:]
    if {"-h", "--help"} & set(words):
        return
    parameters = list(inspect.signature(command).parameters.values())
    names = [p.name for p in parameters]
    given, free, flag = set(), 0, False
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            given.add(word.lstrip("-").split("=")[0].replace("-", "_"))
            flag = "=" not in word  # the next word is its value
        else:
            free, flag = free + (not flag), False
    # Words without a flag fill what is left, in turn.
    places = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in given]
    given |= set(places[:free])
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in given]
    problem = ""
    if unknown := sorted(given - set(names)):
        problem = f"unknown flag --{unknown[0]}; there are {', '.join(f'--{name}' for name in names)}"
    elif free > len(places):
        problem = f"{free} words without a flag, but {len(places)} have a place: quote a text with spaces"
    elif missing:
        problem = f"--{missing[0]} is missing; --help tells more"
    if problem:
        if is_main_rank():
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    run({"chat": chat, "complete": complete, "convert": convert})
