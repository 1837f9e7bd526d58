"""A Griffe extension: the package's docstrings as Markdown for the API reference.

A docstring describes an argument in a line that begins with its name and a colon ("top_k: keep the k highest logits").
Markdown would join such lines into one paragraph; here each becomes an item of a list.
"""

import re
from typing import Any

from griffe import Extension, Object

ARGUMENT = re.compile(r"((?:\*{0,2}[a-z]\w*)(?:, [a-z]\w*)*): (?=\S)")
DIAGRAM = re.compile(r" {4}\S")
TAG = re.compile(r"<(?=[A-Za-z/|])(?=[^`]*(?:`[^`]*`[^`]*)*$)")  # <PRE>, but not in `code`


def as_markdown(docstring: str) -> str:
    """`docstring` with a list item for each argument; indented diagrams stay code blocks."""
    lines: list[str] = []
    in_item = False
    for line in docstring.splitlines():
        previous = lines[-1] if lines else ""
        if match := ARGUMENT.match(line):
            if previous and not in_item:
                lines.append("")
            lines.append(f"- `{match[1]}`: {line[match.end() :]}")
            in_item = True
        elif in_item and line.strip() and previous.strip():
            indented = line.startswith(" ")  # else a sentence of its own, after the arguments
            if not indented and previous.rstrip().endswith("."):
                lines.append("")
                in_item = False
            lines.append(f"  {line.strip()}" if in_item else line)
        else:
            in_item = in_item and not line.strip()
            if DIAGRAM.match(line) and previous and not DIAGRAM.match(previous):
                lines.append("")
            lines.append(line)
    lines = [line if DIAGRAM.match(line) else TAG.sub("&lt;", line) for line in lines]
    return "\n".join(lines)


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
