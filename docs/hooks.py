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
    import typer

    from llama.cli.main import app

    parts = [
        "# Commands",
        "`llama COMMAND` and `python -m llama COMMAND` are the same. Flags may be written with `-` or `_`: `--max-seq-len` "
        "is `--max_seq_len`. `llama COMMAND --help` prints what is here. [Options](options.md) has those that several "
        "commands share, with their names in Python.",
    ]
    for path, command in _commands("llama", typer.main.get_command(app)):
        parts += [f"## {path}", *_command(path, command)]
    return "\n\n".join(parts) + "\n"


def _commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """(path, click command) of each command that can be called, not of groups."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, child in sorted(command.commands.items()):
        if not child.hidden:
            yield from _commands(f"{path} {name}", child)


def _command(path: str, command: Any) -> list[str]:
    """The paragraphs of one command."""
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    arguments = [parameter for parameter in shown if parameter.param_type_name == "argument"]
    usage = " ".join([path, *(["[OPTIONS]"] if len(shown) > len(arguments) else []), *map(_metavar, arguments)])
    parts = [f"```text\n{usage}\n```", as_markdown(inspect.cleandoc(command.help or ""))]
    rows = [
        (
            f"`{_metavar(parameter)}`"
            if parameter in arguments
            else " ".join(f"`{flag}`" for flag in _flags(parameter)),
            _values(parameter),
            _default(parameter),
            getattr(parameter, "help", None) or "",
        )
        for parameter in (*arguments, *(parameter for parameter in shown if parameter not in arguments))
        if parameter.name != "help"
    ]
    return [*parts, _table(("option", "values", "default", "meaning"), rows)] if rows else parts


def _metavar(parameter: Any) -> str:
    name = str(parameter.metavar or parameter.name.upper())
    name += "..." if parameter.nargs != 1 and not name.endswith("...") else ""
    return name if parameter.required else f"[{name}]"


def _flags(parameter: Any) -> list[str]:
    """One spelling of each flag: of --max_seq_len and --max-seq-len the first."""
    flags: list[str] = []
    for flag in (*parameter.opts, *parameter.secondary_opts):
        if flag.startswith("-") and flag.replace("-", "_") not in [other.replace("-", "_") for other in flags]:
            flags.append(flag)
    return flags


def _values(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return ""
    choices = getattr(parameter.type, "choices", None)
    return ", ".join(f"`{choice}`" for choice in choices) if choices else str(parameter.type.name)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    shown = getattr(parameter, "show_default", None)
    if isinstance(shown, str):
        return shown
    default = parameter.default
    return "" if default is None or callable(default) or default is False or default == () else f"`{default}`"


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
        "Python as a keyword argument (`max_seq_len=2048`), `llama lm_eval` in `--model_args`. Which command takes which, "
        "and defaults that a command changes, are in [commands](commands.md).",
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
