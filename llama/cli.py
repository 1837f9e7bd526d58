"""`python -m llama COMMAND`, and how commands and examples end when something is wrong."""

import sys
from collections.abc import Callable
from typing import Any

import fire

from llama.convert import convert
from llama.distributed import PeerError, should_tell


def run(command: Callable[..., Any] | dict[str, Callable[..., Any]]) -> None:
    """Read the command line into `command`'s arguments and call it.

    A mistake of the user's ends in one line on stderr and exit status 1, Ctrl-C in 130; anything else is a fault of
    the program and keeps its traceback.
    """
    try:
        fire.Fire(command)
    except (ValueError, TypeError, OSError, FloatingPointError, PeerError) as error:
        sys.exit(f"error: {error}" if should_tell(error) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def main() -> None:
    run({"convert": convert})
