"""How the package is kept readable: sizes of modules and functions, and a sentence over the door of each room.

The order of imports between rooms is checked by import-linter (`pyproject.toml`).
"""

import ast
from pathlib import Path

import pytest

from helpers.paths import ROOT

MODULES = sorted((ROOT / "llama").rglob("*.py"))
MAX_MODULE, MAX_FUNCTION = 400, 60  # lines


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_and_no_function_is_too_long(path: Path) -> None:
    """A longer one says why in a comment that names the limit: "over 400 lines: ..." or "over 60 lines: ..."."""
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) <= MAX_MODULE or f"over {MAX_MODULE} lines:" in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = lines[node.lineno - 1 : node.end_lineno]
            too_long = len(body) > MAX_FUNCTION
            assert not too_long or any(f"over {MAX_FUNCTION} lines:" in line for line in body), (node.name, len(body))


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=lambda p: p.parent.name)
def test_every_room_says_what_it_owns(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))
