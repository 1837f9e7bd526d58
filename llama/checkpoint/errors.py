"""`CheckpointError`, and a helper to list names in messages."""

from collections.abc import Sequence


class CheckpointError(ValueError):
    """The checkpoint cannot be used. The message is one line: the file, what is wrong with it, and what to do."""


def some_names(names: Sequence[str], limit: int = 4) -> str:
    """The first `limit` names and the number of the others: "a, b and 7 more"."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
