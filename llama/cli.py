"""`python -m llama COMMAND`, and how commands and examples end when something is wrong."""

import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import fire

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
        fire.Fire(command)
    except BrokenPipeError:  # `| head` has seen enough; nothing may be flushed there at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, TypeError, OSError, FloatingPointError, PeerError) as error:
        sys.exit(f"error: {error}" if should_tell(error) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


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
    given |= set(
        [name for name in names if name not in given][:free]
    )  # words without a flag fill what is left, in turn
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in given]
    problem = ""
    if unknown := sorted(given - set(names)):
        problem = f"unknown flag --{unknown[0]}; there are {', '.join(f'--{name}' for name in names)}"
    elif len(given) > len(names) or free > len(names):
        problem = f"too many words; there are {', '.join(f'--{name}' for name in names)}"
    elif missing:
        problem = f"--{missing[0]} is missing; --help tells more"
    if problem:
        if is_main_rank():
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    run({"convert": convert})
