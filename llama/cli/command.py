"""Command lines, read by click: flags made from `llama.options`, and mistakes reported in one line."""

import contextlib
import difflib
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click

from llama.console import in_one_line
from llama.errors import is_out_of_memory
from llama.interrupt import restore_interrupt
from llama.options import BuildOptions, ModelOptions, Option, Settings, declared, suggestion
from llama.parallel.groups import current_world, is_main_rank
from llama.parallel.heartbeat import EXIT_DELAY, PeerError, prepare_lost_rank_exit, write_torchrun_error

F = TypeVar("F", bound=Callable[..., Any])
FLAG = re.compile(r"--?([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


class Command(click.Command):
    """A command whose flags may be written with - or _, and whose texts may begin with a dash.

    Arguments may also be given as flags (`--src X` for `X`), and switches may have a value (`--json False`).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs["context_settings"] = CONTEXT | kwargs.get("context_settings", {})
        super().__init__(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Rewrite `args` for click's parser: flags as `--flag=value`, then `--`, then the arguments in their order."""
        if ctx.resilient_parsing:  # a shell completes an unfinished line
            return super().parse_args(ctx, args)
        if {"-h", "--help"} & set(args):
            return super().parse_args(ctx, ["--help"])
        known: dict[str, click.Parameter] = {f"--{p.name}": p for p in self.params if isinstance(p, click.Argument)}
        known |= {flag: p for p in self.params if isinstance(p, click.Option) for flag in (*p.opts, *p.secondary_opts)}
        flags, switches = list[str](), dict[str, list[str]]()
        named, positional = dict[str, list[str]](), list[str]()
        rest = list(args)
        while rest:
            word = rest.pop(0)
            if word == "--":
                positional += rest
                break
            match = FLAG.fullmatch(word)
            if match is None:
                positional.append(word)
                continue
            flag, value = _known_flag(ctx, match[1], known), match[2]
            parameter, name = known[flag], str(known[flag].name)
            if isinstance(parameter, click.Option) and parameter.is_flag:
                if value is None and rest and rest[0] in ("True", "False", *_extra_values(parameter)):
                    value = rest.pop(0)
                switches[name] = _switch(ctx, parameter, flag, value)
                continue
            if value is None and rest and not _is_flag(rest[0], known):
                value = rest.pop(0)
            if value is None:
                raise click.UsageError(f"{flag} needs a value", ctx)
            if isinstance(parameter, click.Option):
                flags.append(f"{flag}={value}")
            else:
                named[name] = [*named.get(name, []), value] if parameter.nargs == -1 else [value]
        flags += [flag for chosen in switches.values() for flag in chosen]
        return super().parse_args(ctx, [*flags, "--", *self._in_order(ctx, named, positional)])

    def _in_order(self, ctx: click.Context, named: dict[str, list[str]], positional: list[str]) -> list[str]:
        """The values of the arguments. Positional ones go to the arguments that are not in `named`."""
        arguments = [p for p in self.params if isinstance(p, click.Argument)]
        values, rest = list[str](), list(positional)
        for argument in arguments:
            own = named.get(str(argument.name), [])
            if argument.nargs == -1:
                own, rest = own + rest, []
            elif not own and rest:
                own = [rest.pop(0)]
            if argument.required and not own:
                raise click.MissingParameter(ctx=ctx, param=argument)
            values += own
        if rest:
            expected = " ".join(f"[{argument.name}]" for argument in arguments) or "flags only"
            raise click.UsageError(
                f"unexpected {rest[0]!r} after the last argument; expected {expected} (quote texts with spaces)", ctx
            )
        return values


class Group(click.Group):
    """Commands by name. The error about an unknown one suggests the nearest, or lists all."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        args[0] = args[0].replace("-", "_")
        if args[0] not in self.commands and not ctx.resilient_parsing:
            raise click.UsageError(f"no command {args[0]!r}{suggestion(args[0], self.commands)}", ctx)
        return super().resolve_command(ctx, args)


def _known_flag(ctx: click.Context, name: str, known: dict[str, click.Parameter]) -> str:
    """The flag that a user wrote as `name`. Words may be joined by - or _, and the word "no" by neither (--nojson)."""
    flag = "--" + name.replace("-", "_")
    if flag not in known and flag.replace("--no", "--no_", 1) in known:
        flag = flag.replace("--no", "--no_", 1)
    if flag not in known:
        near = difflib.get_close_matches(flag, known, 1)
        raise click.UsageError(
            f"unknown flag {flag}: " + (f"did you mean {near[0]}?" if near else "--help lists the flags"), ctx
        )
    return flag


def _is_flag(word: str, known: dict[str, click.Parameter]) -> bool:
    match = FLAG.fullmatch(word)
    return match is not None and "--" + match[1].replace("-", "_") in known


def _extra_values(switch: click.Option) -> tuple[str, ...]:
    """The values of a switch besides True and False: "auto" if it has neither as its default."""
    return ("auto",) if switch.default is None else ()


def _switch(ctx: click.Context, switch: click.Option, flag: str, value: str | None) -> list[str]:
    """click's flags for `flag`, `flag=True`, `flag=False` or `flag=auto`. Empty if click's default means the same."""
    word = "true" if value is None else value.lower()
    if word in _extra_values(switch):
        return []
    if word not in ("true", "false"):
        expected = "True, False or auto" if _extra_values(switch) else "True or False"
        raise click.UsageError(f"{flag} is {value!r}, expected {expected}", ctx)
    is_on = (word == "true") != (flag in switch.secondary_opts)
    return switch.opts[:1] if is_on else switch.secondary_opts[:1]


class NoneOr(click.ParamType):
    """A number or None."""

    def __init__(self, kind: type):
        self.kind = click.types.convert_type(kind)
        self.name = self.kind.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value in (None, "None") else self.kind.convert(value, param, ctx)


def flag(name: str, option: Option, default: Any) -> Callable[[F], F]:
    """A decorator that adds the flag of a declared option to a command."""
    if option.kind is bool:
        # A switch of click is True or False. If the default is neither ("auto"), an unset switch is None.
        value, shown = (default, True) if isinstance(default, bool) else (None, str(default))
        return click.option(f"--{name}/--no_{name}", default=value, show_default=shown, help=option.help)
    kind: Any = click.Choice(option.choices) if option.choices else option.kind
    if option.kind in (int, float) and None in (default, option.default):
        kind = NoneOr(option.kind)
    return click.option(
        f"--{name}",
        type=kind,
        default=default,
        required=name == "ckpt_dir",
        show_default=default is not None,
        help=option.help,
    )


def options(*groups: type, without: tuple[str, ...] = (), **defaults: Any) -> Callable[[F], F]:
    """A decorator that adds the flags of these classes to a command.

    without: names of options that the command does not have. defaults: the command's own defaults, by name.

    Raises TypeError for names that no option has.
    """
    if unknown := {*without, *defaults} - declared(*groups).keys():
        raise TypeError(f"there is no option {', '.join(sorted(unknown))}")

    def decorate(function: F) -> F:
        for name, option in reversed(declared(*groups).items()):  # click lists the outermost decorator first
            if name not in without:
                function = flag(name, option, defaults.get(name, option.default))(function)
        return function

    return decorate


def model_options(*without: str, **defaults: Any) -> Callable[[F], F]:
    """The options of `Llama.build`, for commands that load a model. torchrun sets the number of ranks."""
    return options(ModelOptions, BuildOptions, without=("model_parallel_size", *without), **defaults)


def sampling_options(*without: str, **defaults: Any) -> Callable[[F], F]:
    """The options of sampling, for commands that give one answer to each prompt."""
    return options(Settings, without=("n", "stop_token_ids", "seed", *without), **defaults)


def pick(group: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that are options of `group`."""
    return {name: values[name] for name in declared(group) if name in values}


def build_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Llama.build` among a command's options. Without --compile or --no_compile, build decides."""
    found = pick(ModelOptions, values) | pick(BuildOptions, values)
    return {name: value for name, value in found.items() if not (name == "compile" and value is None)}


def sampling_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of sampling among a command's options, without `seed`: a command's --seed is that of the model."""
    return {name: value for name, value in pick(Settings, values).items() if name != "seed"}


class Texts(click.ParamType):
    """A text with JSON's escapes (\\n), or a JSON list of texts. The value is a list of texts."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        with contextlib.suppress(ValueError):
            found = json.loads(value)
            if isinstance(found, list) and all(isinstance(text, str) for text in found):
                return found
        with contextlib.suppress(ValueError):
            return [json.loads(f'"{value}"')]
        return [value]


def stop_option(function: F) -> F:
    return click.option(
        "--stop",
        type=Texts(),
        multiple=True,
        callback=lambda ctx, param, lists: [text for texts in lists for text in texts] or None,
        help="a text that ends the answer ('\\n' is a line break), or a JSON list of texts; may be repeated",
    )(function)


def bos_option(function: F) -> F:
    return click.option(
        "--bos",
        type=click.Choice(["True", "False"], case_sensitive=False),
        callback=lambda ctx, param, value: None if value is None else value == "True",
        help="put BOS before the text or not; default: as the tokenizer does",
    )(function)


# Running and reporting errors -------------------------------------------------------------------------


def run(command: click.Command, name: str = "llama") -> None:
    """Read the command line and run the command. Errors end the process with one line."""
    with one_line_errors():
        for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=errors)  # a character that the encoding lacks is no error
        if f"_{name.upper()}_COMPLETE" in os.environ:
            command.main(prog_name=name)  # prints the completions and exits
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
    except BrokenPipeError:  # `| head` has exited. The flush at exit must not write to the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, TypeError, OSError, FloatingPointError, PeerError) as error:
        write_torchrun_error(in_one_line(error))
        if not _prints(error):
            time.sleep(EXIT_DELAY)  # torchrun ends all ranks when one exits: first the other rank prints its line
            sys.exit(1)
        sys.exit(f"error: {in_one_line(error)}")
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
    """Whether this rank prints the error. One that all ranks raise is printed by its reporting rank only."""
    rank = current_world().rank
    return error.__dict__.get("reporting_rank", rank) == rank
