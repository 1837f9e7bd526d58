"""`python -m llama COMMAND`, and how commands and examples end when something is wrong."""

import sys
from collections.abc import Callable
from typing import Any

import fire

from llama.convert import convert
from llama.distributed import PeerError, is_main_rank


def run(command: Callable[..., Any] | dict[str, Callable[..., Any]]) -> None:
    """Read the command line into `command`'s arguments and call it.

    A mistake of the user's ends in one line on stderr and exit status 1, Ctrl-C in 130; anything else is a fault of
    the program and keeps its traceback.
    """
    try:
        fire.Fire(command)
    except PeerError as error:  # the rank that failed has the details
        sys.exit(f"error: {error}" if is_main_rank() else 1)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def main() -> None:
    run({"convert": convert})
