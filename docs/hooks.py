"""An MkDocs hook that writes the pages generated from code, and publishes the documents at the top of the repository.

reference/commands.md comes from the command `llama`, reference/options.md from `llama.options`. ARCHITECTURE.md,
CONTRIBUTING.md, CHANGELOG.md and SECURITY.md become pages; links in them are written for the repository.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from docstrings import as_markdown

ROOT = Path(__file__).resolve().parent.parent
TOP_DOCUMENTS = {
    "architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}


def top_document(name: str) -> str:
    """A document at the top of the repository, its links rewritten for the site."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = text.replace("](docs/", "](")
    for page, source in TOP_DOCUMENTS.items():
        text = text.replace(f"]({source}", f"]({page}")
    return re.sub(r"\]\(README\.md[^)]*\)", "](index.md)", text)


def commands_page() -> str:
    """Usage, help and flags of every command, from the command line's own tree."""
    import click

    from llama.cli.main import app

    parts = [
        "# Commands",
        "`llama COMMAND` and `python -m llama COMMAND` are the same. `llama COMMAND --help` prints what is here.",
        "A flag may be written with `-` or `_`: `--max-seq-len` is `--max_seq_len`. [Options](options.md) has those "
        "that several commands share, with their names in Python.",
    ]
    for path, command in _commands("llama", app):
        context = click.Context(command, info_name=path)
        usage = " ".join([path, *command.collect_usage_pieces(context)])
        parts += [f"## {path}", f"```text\n{usage}\n```", as_markdown(inspect.cleandoc(command.help or ""))]
        flags = [p for p in command.params if isinstance(p, click.Option) and not p.hidden and p.name != "help"]
        if flags:
            rows = [_flag(context, option) for option in sorted(flags, key=lambda option: not option.required)]
            parts.append(_table(("flag", "values", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def _commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """(path, command) of each command that can be called, groups excluded."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, child in sorted(command.commands.items()):
        if not child.hidden:
            yield from _commands(f"{path} {name}", child)


def _flag(context: Any, option: Any) -> tuple[str, str, str, str]:
    """A row of the table of flags."""
    choices = getattr(option.type, "choices", None)
    values = "" if option.is_flag else ", ".join(f"`{choice}`" for choice in choices or [option.type.name])
    shown = option.get_help_extra(context)
    default = f"`{shown['default']}`" if "default" in shown else shown.get("required", "")
    flags = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    return flags, values, default, option.help or ""


def options_page() -> str:
    """The options of `llama.options`, a table for each group."""
    from llama.options import BuildOptions, ModelOptions, SamplingOptions, Settings, declared

    groups = {
        "Loading, as in Meta's code": (declared(ModelOptions), "Arguments of `Llama.build`, by position or by name."),
        "Loading": (declared(BuildOptions), "Keyword arguments of `Llama.build`."),
        "Sampling, as in Meta's code": (
            {name: option for name, option in declared(Settings).items() if name not in declared(SamplingOptions)},
            "Arguments of the methods that generate: `text_completion`, `chat_completion`, `generate`, `stream` ...",
        ),
        "Sampling": (
            declared(SamplingOptions),
            "Keyword arguments of the same methods. In Python each is one value, or a list with one for each prompt "
            "(`n`: one value).",
        ),
    }
    parts = [
        "# Options",
        "Every option is declared once, in `llama/options.py`. Commands take it as a flag (`--max_seq_len 2048`), "
        "Python as a keyword argument (`max_seq_len=2048`), `llama lm_eval` in `--model_args`. [Commands](commands.md) "
        "says which command takes which option, and where its default is another one.",
    ]
    for title, (options, text) in groups.items():
        rows = [
            (
                f"`{name}`",
                ", ".join(f"`{choice}`" for choice in option.choices) or option.kind.__name__,
                "" if option.default is None else f"`{option.default}`",
                option.help,
            )
            for name, option in options.items()
        ]
        parts += [f"## {title}", text, _table(("option", "values", "default", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    cells = ([str(cell).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


GENERATED: dict[str, Callable[[], str]] = {
    "reference/commands.md": commands_page,
    "reference/options.md": options_page,
}


def on_files(files: Any, config: Any, **_: Any) -> Any:
    from mkdocs.structure.files import File

    for page, source in TOP_DOCUMENTS.items():
        files.append(File.generated(config, page, content=top_document(source)))
    for page, write in GENERATED.items():
        files.append(File.generated(config, page, content=write()))
    return files
