"""The error for a checkpoint that cannot be used, and how error messages list names."""

from collections.abc import Sequence


class CheckpointError(ValueError):
    """The checkpoint cannot be used. The message is one line: the file, what is wrong with it, and what to do."""


def some_names(names: Sequence[str], limit: int = 4) -> str:
    """The first `limit` names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
