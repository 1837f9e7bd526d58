"""Text files, which one host has and every rank needs."""

from pathlib import Path

from llama.distributed import is_main_rank, raising_together, told_by_rank_0


def read_on_rank_0(path: Path) -> str:
    """The text of a file that rank 0's host has, on every rank; bytes that are no UTF-8 become half surrogates.

    Raises on all ranks if the file cannot be read.
    """
    text = ""
    with raising_together():
        if is_main_rank():
            text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    return told_by_rank_0(text)


def read_text(path: Path) -> str:
    """A text file as it is, line ends included; a byte order mark is left out. Raises ValueError where it is not a
    text, OSError where it cannot be read."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a text file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: name a text file")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text: byte {error.start:,} is 0x{content[error.start]:02x}") from None
    if "\0" in text:
        raise ValueError(f"{path} is not a text: byte {content.index(0):,} is NUL")
    if not text:
        raise ValueError(f"{path} is empty: there is nothing to score")
    return text
