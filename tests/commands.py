"""What the `command` fixture takes and gives."""

import io
from typing import NamedTuple


class Keyboard(io.StringIO):
    """A stdin at which somebody sits."""

    def isatty(self) -> bool:
        return True


class Ended(NamedTuple):
    status: int
    out: str
    err: str
