"""How commands read their arguments: click, with the flags made from `llama.options`, and one-line errors."""

import contextlib
import difflib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click

from llama.console import in_one_line
from llama.errors import is_out_of_memory
from llama.interrupt import restore_interrupt
from llama.options import BuildOptions, ModelOptions, Option, Settings, declared, suggestion
from llama.parallel.groups import current_world, is_main_rank
from llama.parallel.heartbeat import PeerError, prepare_lost_rank_exit, write_torchrun_error

F = TypeVar("F", bound=Callable[..., Any])
FLAG = re.compile(r"--?([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


class Command(click.Command):
    """A command whose flags may be written with - or _, and whose texts may begin with a dash.

    Arguments may also be given as flags (`--src X` for `X`), and switches a value (`--json False`).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs["context_settings"] = CONTEXT | kwargs.get("context_settings", {})
        super().__init__(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if {"-h", "--help"} & set(args):
            return super().parse_args(ctx, ["--help"])
        options = {flag: p for p in self.params if isinstance(p, click.Option) for flag in (*p.opts, *p.secondary_opts)}
        arguments = {f"--{p.name}": p for p in self.params if isinstance(p, click.Argument)}
        flags, words, named, rest = list[str](), list[str](), dict[str, list[str]](), list(args)
        while rest:
            word = rest.pop(0)
            match = FLAG.fullmatch(word)
            if match is None:
                words.append(word)
                continue
            flag, value = "--" + match[1].replace("-", "_"), match[2]
            if flag not in options and flag.replace("--no", "--no_", 1) in options:
                flag = flag.replace("--no", "--no_", 1)
            if flag not in options and flag not in arguments:
                near = difflib.get_close_matches(flag, [*options, *arguments], 1)
                hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
                raise click.UsageError(f"unknown flag {flag}: {hint}", ctx)
            option = options.get(flag)
            if option is not None and option.is_flag:
                if value is None and rest and rest[0] in ("True", "False", "auto"):
                    value = rest.pop(0)
                if value != "auto":
                    flags.append(option.secondary_opts[0] if value == "False" else flag)
                continue
            if value is None and rest and not _is_flag(rest[0], {**options, **arguments}):
                value = rest.pop(0)
            if value is None:
                raise click.UsageError(f"{flag} needs a value", ctx)
            if option is not None:
                flags.append(f"{flag}={value}")
            else:
                named.setdefault(flag, []).append(value)
        for flag, argument in arguments.items():  # words without a flag fill the arguments that are left, in turn
            if argument.nargs == -1:
                named.setdefault(flag, []).extend(words)
                words = []
            elif flag not in named and words:
                named[flag] = [words.pop(0)]
            if argument.required and not named.get(flag):
                raise click.MissingParameter(ctx=ctx, param=argument)
        if words:
            places = " ".join(f"[{argument.name}]" for argument in arguments.values()) or "none"
            raise click.UsageError(f"{len(words)} words too many ({words[0]!r}); expected {places}: quote spaces", ctx)
        return super().parse_args(ctx, [*flags, "--", *(word for flag in arguments for word in named.get(flag, []))])


class Group(click.Group):
    """Commands by name; a mistyped one is answered with the nearest, or all."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        args[0] = args[0].replace("-", "_")
        if args[0] not in self.commands:
            raise click.UsageError(f"no command {args[0]!r}{suggestion(args[0], self.commands)}", ctx)
        return super().resolve_command(ctx, args)


def _is_flag(word: str, known: dict[str, Any]) -> bool:
    match = FLAG.fullmatch(word)
    return match is not None and "--" + match[1].replace("-", "_") in known


class NoneOr(click.ParamType):
    """A number, or None, which stands for "no limit"."""

    def __init__(self, kind: type):
        self.kind = click.types.convert_type(kind)
        self.name = self.kind.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value in (None, "None") else self.kind.convert(value, param, ctx)


def flag(name: str, option: Option, default: Any = ...) -> click.Option:
    """The flag of a declared option, with the default that a command has instead."""
    default = option.default if default is ... else default
    if option.kind is bool:
        shown: bool | str = True if isinstance(default, bool) else str(default)
        value = default if isinstance(default, bool) else None
        return click.Option([f"--{name}/--no_{name}"], default=value, show_default=shown, help=option.help)
    kind: Any = click.Choice(option.choices) if option.choices else option.kind
    if (option.kind in (int, float) and default is None) or name == "max_gen_len":
        kind = NoneOr(option.kind)
    is_required = name == "ckpt_dir"
    return click.Option(
        [f"--{name}"],
        type=kind,
        default=default,
        required=is_required,
        show_default=default is not None,
        help=option.help,
    )


def options(*groups: type, without: tuple[str, ...] = (), **defaults: Any) -> Callable[[F], F]:
    """A decorator that adds the options of these classes to a command, but for some, with other defaults for some."""

    def decorate(function: F) -> F:
        flags = [
            flag(name, option, defaults.get(name, ...))
            for name, option in declared(*groups).items()
            if name not in without
        ]
        if not hasattr(function, "__click_params__"):
            function.__click_params__ = []  # type: ignore[attr-defined]  # where click collects them, last one first
        function.__click_params__.extend(reversed(flags))  # type: ignore[attr-defined]
        return function

    return decorate


def model_options(*without: str, **defaults: Any) -> Callable[[F], F]:
    """The options of `Llama.build`, for commands that load a model. The number of ranks is torchrun's."""
    return options(ModelOptions, BuildOptions, without=("model_parallel_size", *without), **defaults)


def sampling_options(*without: str, **defaults: Any) -> Callable[[F], F]:
    """The options of sampling, for commands that give one answer to each prompt."""
    return options(Settings, without=("n", "stop_token_ids", "seed", *without), **defaults)


def pick(group: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that are options of `group`."""
    return {name: value for name, value in values.items() if name in declared(group)}


def build_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """Those of a command's options that `Llama.build` takes. A switch that was not given keeps its default."""
    found = pick(ModelOptions, values) | pick(BuildOptions, values)
    return {name: value for name, value in found.items() if not (name == "compile" and value is None)}


def sampling_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """Those of a command's options that the methods that generate take. `seed` is the model's there."""
    return {name: value for name, value in pick(Settings, values).items() if name != "seed"}


class Texts(click.ParamType):
    """A text in which \\n and the like are escapes, or a JSON list of texts -> a list of texts."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        for json_text in (value, f'["{value}"]'):
            with contextlib.suppress(ValueError):
                found = json.loads(json_text)
                if isinstance(found, list) and all(isinstance(text, str) for text in found):
                    return found
        return [value]


def stop_option(function: F) -> F:
    return click.option(
        "--stop",
        type=Texts(),
        multiple=True,
        callback=lambda ctx, param, lists: [text for texts in lists for text in texts] or None,
        help="a text that ends the answer ('\\n' is a line break), or a JSON list of them; may be repeated",
    )(function)


def bos_option(function: F) -> F:
    return click.option(
        "--bos",
        type=click.Choice(["True", "False"], case_sensitive=False),
        callback=lambda ctx, param, value: None if value is None else value == "True",
        help="whether BOS goes first; default: where the tokenizer adds it",
    )(function)


# Endings ---------------------------------------------------------------------------------------------


def run(command: click.Command, name: str = "llama") -> None:
    """Read the command line, run the command, end the process."""
    with one_line_errors():
        for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=errors)  # characters that the terminal's encoding lacks end nothing
        if f"_{name.upper()}_COMPLETE" in os.environ:
            command.main(prog_name=name)  # answers the shell, and ends
        try:
            with command.make_context(name, sys.argv[1:]) as context:
                command.invoke(context)
        except click.UsageError as error:
            if is_main_rank():
                print(f"error: {in_one_line(error.format_message())}", file=sys.stderr)
            sys.exit(2)
        except click.exceptions.Exit as ended:  # --help
            sys.exit(ended.exit_code)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line on stderr and status 1 after a user's mistake, with 130 after Ctrl-C. Any other
    exception is a bug and keeps its traceback."""
    restore_interrupt()
    try:
        yield
    except BrokenPipeError:  # `| head` has read enough; nothing may be flushed there at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, TypeError, OSError, FloatingPointError, PeerError) as error:
        write_torchrun_error(in_one_line(error))
        sys.exit(f"error: {in_one_line(error)}" if _prints(error) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        line = prepare_lost_rank_exit(error)
        if is_out_of_memory(error):  # before a model is loaded, or after it is closed
            line = f"out of memory or threads ({in_one_line(error)}): free some, or raise the limits (ulimit -v, -u)"
        if line:
            write_torchrun_error(line)
            sys.exit(f"error: {line}")
        raise


def _prints(error: BaseException) -> bool:
    """Whether this rank prints the error: each its own, but one rank those that all raise together."""
    rank = current_world().rank
    return error.__dict__.get("reporting_rank", rank) == rank
