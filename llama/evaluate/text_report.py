"""A token report as a table for the terminal. `html_report` formats pieces and probabilities with its functions."""

import math
import unicodedata

from llama.console import visible
from llama.evaluate.token_report import Alternative, TokenReport

COLUMNS = ["#", "id", "piece", "logprob      %   rank entropy", "next"]
PIECE, NUMBERS, NEXT = range(2, 5)
MIN_EXPECTED = 13  # width of the last column on a narrow terminal
# Lower bounds of the probability levels in percent. The last level has none.
LEVELS = (50, 10, 1, 0.1)
COLOURS = (32, 36, 33, 35, 31)  # ANSI colour of each level: green, cyan, yellow, magenta, red


def text_report(report: TokenReport, width: int, coloured: bool) -> list[str]:
    """The lines of a table with a row for each token, and as many alternatives as fit.

    width: the number of terminal columns. If it is at least 80, no line is wider.
    """
    longest = width // 8
    rows = [COLUMNS]
    for token in report["tokens"]:
        numbers = ""
        if token["percent"] is not None:
            numbers = f"{token['logprob']:7.2f} {percent_text(token['percent']):>6} {token['rank']:6} "
            numbers += f"{token['entropy']:7.2f}"
        position = "+" * token["generated"] + str(token["position"])
        piece, next_piece = (
            _shorten(display_piece(piece), longest) for piece in (token["piece"], token["next"]["piece"])
        )
        rows.append([position, str(token["id"]), piece, numbers, next_piece])
    rows.append([str(len(report["tokens"])), "", "(next)", "", ""])
    widths = [max(map(text_width, column)) for column in zip(*rows, strict=True)]
    remaining = max(width - sum(widths) - 2 * len(widths), MIN_EXPECTED)
    expected = ["expected here", *(_fitting(token["top"], remaining) for token in report["tokens"])]
    expected.append(_fitting(report["next"], remaining))
    percents = [None, *(token["percent"] for token in report["tokens"]), None]
    lines = []
    for row, last, percent in zip(rows, expected, percents, strict=True):
        cells = []
        for i, (cell, column_width) in enumerate(zip(row, widths, strict=True)):
            padding = " " * (column_width - text_width(cell))
            if coloured and percent is not None and i in (PIECE, NUMBERS):
                cell = f"\033[{COLOURS[level(percent)]}m{cell}\033[0m"
            cells.append(cell + padding if i in (PIECE, NEXT) else padding + cell)
        lines.append("  ".join([*cells, last]).rstrip())
    return lines


def summary(report: TokenReport) -> str:
    """One line: the number of tokens, the sum of their log-probabilities, and the perplexity of the given tokens."""
    parts = []
    for generated, name in ((False, "token"), (True, "generated token")):
        tokens = [token for token in report["tokens"] if token["generated"] == generated]
        logprobs = [token["logprob"] for token in tokens if token["logprob"] is not None]
        if not tokens:
            continue
        part = f"{len(tokens)} {name}{'s' * (len(tokens) > 1)}"
        if logprobs:
            total = math.fsum(logprobs)
            part += f": log-probability {total:.3f}"
            if not generated:
                part += f", perplexity {math.exp(-total / len(logprobs)):,.2f}"
        parts.append(part)
    return "; ".join(parts)


def level(percent: float) -> int:
    """The level of a probability, which selects its colour. 0 is the highest."""
    return sum(percent < bound for bound in LEVELS)


def percent_text(percent: float) -> str:
    return f"{percent:.2f}" if percent >= 0.005 else "<0.01"


def text_width(text: str) -> int:
    """The number of terminal columns of a text."""
    return sum(
        0 if unicodedata.category(char) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


def display_piece(piece: str) -> str:
    """A piece on one line, with white space, control characters and zero-width characters made visible."""
    text = visible(piece.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥"))
    zero_width = not text_width(text)  # a combining accent would attach to the character before the piece
    return "".join(f"<U+{ord(char):04X}>" if zero_width or not char.isprintable() else char for char in text)


def _fitting(alternatives: list[Alternative], width: int) -> str:
    """As many alternatives as fit, in whole percents. The first one is shortened if it does not fit."""
    line = ""
    for alternative in alternatives:
        percent = f"{alternative['percent']:.0f}%" if alternative["percent"] >= 0.5 else "<1%"
        piece = display_piece(alternative["piece"])
        if not line:
            line = f"{_shorten(piece, width - len(percent) - 1)} {percent}"
        elif text_width(longer := f"{line}  {piece} {percent}") <= width:
            line = longer
        else:
            break
    return line


def _shorten(text: str, width: int) -> str:
    if text_width(text) <= width:
        return text
    while text_width(text) > width - 1:
        text = text[:-1]
    return f"{text}…"
