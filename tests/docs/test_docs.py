"""The documentation is correct: its links resolve, its commands and programs run, its outputs are real.

What runs: fenced blocks of `console` (lines that begin with "$ ") and `python`, page by page, in a folder of the page's
own that has the demo model. Lines after a command, and a `text` block right after a program, are compared with stdout.
A block that cannot run has the reason before it: <!-- not run: needs a GPU -->.
"""

import contextlib
import io
import itertools
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hooks
import pytest

from helpers.commands import run_command
from helpers.paths import ROOT
from llama.cli.main import app
from llama.options import BuildOptions, ModelOptions, Settings, declared

TOP = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
# Pages of the site that are written when it is built. Links to them work there, not in the repository.
GENERATED = {ROOT / "docs" / page for page in (*hooks.GENERATED, *hooks.TOP_DOCUMENTS)}
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = ("console", "python")
HEADING = re.compile(r"#{1,6} (.+)")


@dataclass
class Block:
    """A fenced block. reason: why it is not run. title: a file to write it to. line: where it begins, from 1."""

    language: str
    text: str
    line: int
    title: str | None = None
    reason: str | None = None
    follows: bool = False  # directly after another block


def blocks_of(page: Path) -> list[Block]:
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    reason, adjacent, i = None, False, 0
    while i < len(lines):
        if match := re.fullmatch(r"```(\w*)(?: title=\"(.+)\")?", lines[i]):
            end = lines.index("```", i + 1)
            text = "\n".join(lines[i + 1 : end])
            found.append(Block(match[1], text, i + 1, match[2], reason, adjacent))
            reason, adjacent, i = None, True, end
        elif lines[i].strip():
            match = NOT_RUN.fullmatch(lines[i])
            reason, adjacent = (match[1] if match else None), False
        i += 1
    return found


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, where GitHub and MkDocs agree on them."""
    anchors = set()
    for match in HEADING.finditer(prose_of(page)):
        heading = re.sub(r"[`*]|\]\([^)]*\)|\[", "", match[1]).strip().lower()
        on_github = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        in_mkdocs = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading))
        if on_github == in_mkdocs:
            anchors.add(on_github)
    return anchors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(re.sub(r"`[^`\n]+`", "", prose_of(page))):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        if goal in GENERATED and page.parent != ROOT:
            source = hooks.TOP_DOCUMENTS.get(str(goal.relative_to(ROOT / "docs")))
            goal = ROOT / source if source else goal
            assert source or not anchor, f"{target}: no anchors on generated pages"
            continue
        assert goal.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors_of(goal), f"{page.name} links to {target}, which has no such heading"


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in {*(ROOT / "docs").rglob("*.md"), *GENERATED}}
    assert named == pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    """`llama/...`, `tests/...`, `docs/...` and `benchmarks/...` in code spans, and names of tests."""
    text = prose_of(page)
    for path in re.findall(r"`((?:llama|tests|docs|benchmarks)/[\w./]*)", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert re.search(rf"def {name}\(|\b{name}\.py", tests) or list((ROOT / "tests").rglob(f"{name}.py")), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs_or_says_why_not(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language, f"{page.name}:{block.line}: a block without a language"
        if block.language == "console" and block.reason is None:
            for args, _, _ in commands_of(block):
                assert args[0] == "llama", f"{page.name}:{block.line}: {args[0]} is not run here, say why"
        assert block.language not in ("sh", "bash", "shell"), f"{page.name}:{block.line}: write console"


def commands_of(block: Block) -> Iterator[tuple[list[str], str, str]]:
    """(args, stdin, expected output) of each command of a console block."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, _, expected = part.replace("\\\n", " ").partition("\n")
        args, stdin = shlex.split(line, comments=True), ""
        if args[0] == "echo":
            at = args.index("|")
            stdin, args = " ".join(args[1:at]) + "\n", args[at + 1 :]
        yield args, stdin, expected


RUNNABLE = [
    page for page in PAGES if any(b.language in ("console", "python") and not b.reason for b in blocks_of(page))
]
SLOW = ("command-line.md", "embed.md", "evaluate.md", "hugging-face.md")  # 7 to 18 s of computing


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if page.name in SLOW else []) for page in RUNNABLE],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_commands_and_programs_run(
    page: Path, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (*ROOT.glob("*.md"), ROOT / "LICENSE", ROOT / "tests", ROOT / "checkpoints"):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    variables: dict[str, object] = {"__name__": "__main__"}
    for block, following in itertools.zip_longest(blocks := blocks_of(page), blocks[1:]):
        where = f"{page.name}:{block.line}"
        if block.title:
            Path(block.title).write_text(block.text + "\n", encoding="utf-8")
        if block.reason or block.language not in CODE:
            continue
        if block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * block.line + block.text, str(page), "exec"), variables)
            if following and following.language == "text" and following.follows:
                assert lines_of(out.getvalue()) == lines_of(following.text), where
            continue
        for args, stdin, expected in commands_of(block):
            ended = run_command(args[1:], monkeypatch, capsys, io.StringIO(stdin))
            print(f"{where}: {shlex.join(args)}\n{ended.out}", file=sys.stderr)
            assert ended.status == 0, f"{where}: {args}: {ended.err}"
            if expected.strip():
                assert lines_of(ended.out) == lines_of(expected), where


def lines_of(text: str) -> list[str]:
    """Lines without white space at their ends, which an editor may remove, and without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def test_generated_pages_have_every_command_and_option() -> None:
    commands, options = hooks.commands_page(), hooks.options_page()
    headings = set(re.findall(r"^## llama (\w+)", commands, re.MULTILINE))
    assert headings == set(app.commands)
    assert "`--max_seq_len`" in commands and "| `--ckpt_dir` | `text` | required |" in commands
    for name in declared(ModelOptions, BuildOptions, Settings):
        assert f"| `{name}` |" in options
