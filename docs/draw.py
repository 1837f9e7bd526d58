"""Draws the pictures of the README into docs/images: `python docs/draw.py`. Needs the demo model and '.[bench]'.

inspect.svg is what `llama inspect` says of a sentence, in float32. speed.svg draws figures of explanation/speed.md,
which has their command, machine and date.
"""

import json
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import pyplot

DOCS = Path(__file__).resolve().parent
CKPT_DIR = DOCS.parent / "checkpoints" / "smollm2-135m-instruct"
SENTENCE = "The most famous fruit is the"
SPEED = "explanation/speed.md"
CASES = {
    "float32": "decode after 128, float32, tokens/s",
    "bfloat16": "decode after 128, bfloat16, tokens/s",
    "int8": "decode after 128, int8 (Q8_0), tokens/s",
    "int4": "decode after 128, int4 (Q4_0), tokens/s",
}
# Name -> its column in that table, its color.
SIDES = {
    "this runner": (2, "#2f6db5"),
    "its --plain": (3, "#9dbfe3"),
    "Meta's code": (4, "#b0b0b0"),
    "transformers": (5, "#808080"),
    "llama.cpp": (6, "#e0913a"),
}
ROW, LEFT = 24, 16  # pixels: height of a row, margin
COLUMNS = {"": 0, "token": 34, "probability": 160, "rank": 300, "expected here": 370}
WIDTH = 860


def report() -> dict[str, Any]:
    command = [sys.executable, "-m", "llama", "inspect", SENTENCE, "--ckpt_dir", str(CKPT_DIR)]
    answer = subprocess.run(
        [*command, "--generate", "8", "--top", "4", "--dtype", "float32", "--json"],
        stdout=subprocess.PIPE,
        check=True,
        cwd=DOCS.parent,
    )
    return json.loads(answer.stdout)


def color(percent: float | None) -> str:
    """From red (improbable) by yellow to green (certain)."""
    if percent is None:
        return "#e8e8e8"
    return f"hsl({120 * (min(percent, 100) / 100) ** 0.4:.0f}, 65%, 82%)"


def text(x: float, y: float, content: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" xml:space="preserve" {style}>{escape(content)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, style: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:g}" fill="{fill}" {style}/>'


def shown(piece: str) -> str:
    return piece.replace(" ", "·").replace("\n", "⏎")


def inspect_svg(look: dict[str, Any]) -> str:
    """The sentence with its tokens coloured by their probability, and a table with a row for each."""
    tokens = look["tokens"]
    parts, x, y = [], float(LEFT), 34
    for token in tokens:
        width = 9.6 * len(token["text"]) + 4
        edge = 'stroke="#444" stroke-dasharray="3 2"' if token["generated"] else ""
        parts.append(box(x, y - 19, width, 27, color(token["percent"]), edge))
        parts.append(text(x + 2, y, token["text"], 'font-size="16"'))
        x += width + 2
    y += 40
    parts += [text(LEFT + at, y, name, 'fill="#666"') for name, at in COLUMNS.items()]
    for token in tokens:
        y += ROW
        percent, place = token["percent"], {name: LEFT + at for name, at in COLUMNS.items()}
        parts.append(text(place[""], y, f"{'+' if token['generated'] else ' '}{token['position']}", 'fill="#666"'))
        parts.append(text(place["token"], y, shown(token["piece"])))
        if percent is None:
            continue
        parts.append(box(place["probability"], y - 12, max(percent, 0.5), 15, color(percent)))
        parts.append(text(place["probability"] + 4, y, f"{percent:.2f}%" if percent >= 0.01 else "<0.01%"))
        parts.append(text(place["rank"], y, f"{token['rank']:,}"))
        best = "   ".join(f"{shown(other['piece'])} {other['percent']:.0f}%" for other in token["top"])
        parts.append(text(place["expected here"], y, best, 'fill="#444"'))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 18}" width="{WIDTH}" height="{y + 18}" '
        'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="13" fill="#111">\n'
        f'<rect width="{WIDTH}" height="{y + 18}" rx="6" fill="#fdfdfd" stroke="#ddd"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def speeds() -> dict[str, list[float | None]]:
    """Tokens per second of each implementation, a number or None for each of CASES."""
    rows = {}
    for line in (DOCS / SPEED).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[cells[0]] = cells
    found = {}
    for side, (column, _) in SIDES.items():
        cells = [rows[case][column] for case in CASES.values()]
        found[side] = [float(cell.replace(",", "")) if cell else None for cell in cells]
    return found


def draw_speed(path: Path) -> None:
    pyplot.rcParams["svg.hashsalt"] = "llama-runner"  # the same file from the same figures
    figure, axes = pyplot.subplots(figsize=(8.6, 3.2))
    width = 0.8 / len(SIDES)
    for i, (side, values) in enumerate(speeds().items()):
        known = {case: value for case, value in enumerate(values) if value is not None}
        places = [case + (i - (len(SIDES) - 1) / 2) * width for case in known]
        bars = axes.bar(places, list(known.values()), width * 0.92, label=side, color=SIDES[side][1])
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(CASES)), list(CASES))
    axes.set_ylabel("tokens per second")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    images = DOCS / "images"
    images.mkdir(exist_ok=True)
    draw_speed(images / "speed.svg")
    (images / "inspect.svg").write_text(inspect_svg(report()), encoding="utf-8")


if __name__ == "__main__":
    main()
