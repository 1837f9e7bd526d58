"""`python -m llama COMMAND`, and how commands and examples end when something is wrong."""

import inspect
import os
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
    parameters = inspect.signature(command).parameters
    named = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--") and word != "--"}
    required = [name for name, p in parameters.items() if p.default is p.empty]
    positional = bool(words) and not words[0].startswith("-")
    problem = ""
    if unknown := sorted(named - parameters.keys()):
        problem = f"unknown flag --{unknown[0]}; there are {', '.join(f'--{name}' for name in parameters)}"
    elif not positional and (missing := [name for name in required if name not in named]):
        problem = f"--{missing[0]} is missing; --help tells more"
    if problem:
        if is_main_rank():
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    run({"convert": convert})
