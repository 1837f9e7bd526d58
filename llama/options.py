"""Every option of `Llama.build` and of sampling, declared once: type, default, check and a line of help.

`Llama.build` and the methods that generate take them as keyword arguments, the commands as flags, the adapter for
lm-evaluation-harness as model arguments, and the documentation's tables are made from them. To add an option, add an
entry to its class here and use it where it acts.
"""

import difflib
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias, TypedDict, TypeVar, get_args, get_type_hints

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Each: TypeAlias = T | Sequence[T]  # one value for all prompts, or a list with one for each
StopIds: TypeAlias = Sequence[int] | Sequence[Sequence[int] | None] | None

DTYPES = ("float32", "bfloat16", "float16")
SCHEMES = ("int8", "int4")


# Checks: (name, value) -> value. TypeError for a wrong type, ValueError for a value out of range.


def check_int(name: str, value: Any, least: int, limit: float = math.inf) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected a whole number")
    if not least <= operator.index(value) < limit:
        below = "" if limit == math.inf else f", below {limit}"
        raise ValueError(f"{name} is {value}, expected a whole number from {least}{below}")
    return operator.index(value)


def _integer(least: int, limit: float = math.inf, optional: bool = False) -> Callable[[str, Any], int | None]:
    return lambda name, value: None if optional and value is None else check_int(name, value, least, limit)


def _number(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}, expected a number")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a number from 0")
    return float(value)


def _probability(name: str, value: Any) -> float:
    if _number(name, value) > 1:
        raise ValueError(f"{name} is {value!r}, expected a number from 0 to 1")
    return float(value)


def _positive(name: str, value: Any) -> float:
    if _number(name, value) == 0:
        raise ValueError(f"{name} is {value!r}, expected a number above 0")
    return float(value)


def _ids(name: str, value: Any) -> set[int]:
    try:
        return set(map(operator.index, () if value is None else value))
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected a list of ids, or one for each prompt") from None


def _compile(name: str, value: Any) -> bool | str:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected True, False or 'auto'")
    return value


def _one_of(choices: Sequence[str], *others: Any) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if value not in (*choices, *others):
            raise ValueError(f"{name} {value!r}: expected {', '.join(choices[:-1])} or {choices[-1]}")
        return value

    return check


def _any(name: str, value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its type in Python.

    default: None stands for "not given". kind: the type of one value on a command line. choices: the values that a
    command line takes, where they are few. check: returns the value or raises.
    """

    default: Any
    help: str
    kind: type = str
    choices: tuple[str, ...] = ()
    check: Callable[[str, Any], Any] = _any


class ModelOptions(TypedDict, total=False):
    """What Meta's `Llama.build` takes, too, by position or by name."""

    ckpt_dir: Annotated[str, Option(None, "folder with consolidated.NN.pth and params.json")]
    tokenizer_path: Annotated[
        str | None, Option(None, "default: tokenizer.model or tokenizer.json in ckpt_dir or its parent folder")
    ]
    max_seq_len: Annotated[
        int, Option(512, "positions of the KV cache: prompt and answer in tokens", int, check=_integer(1))
    ]
    max_batch_size: Annotated[int, Option(8, "rows of the KV cache", int, check=_integer(1))]
    model_parallel_size: Annotated[
        int | None, Option(None, "the number of ranks; detected, another number is an error", int)
    ]
    seed: Annotated[
        int,
        Option(1, "torch.manual_seed; calls without a seed of their own draw from it", int, check=_integer(0, 2**64)),
    ]


class BuildOptions(TypedDict, total=False):
    """Keyword options of `Llama.build`."""

    device: Annotated[str, Option("auto", "auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps")]
    dtype: Annotated[
        str,
        Option(
            "auto",
            "what to compute in; auto is the checkpoint's dtype, or float32 where the device lacks it",
            choices=("auto", *DTYPES),
        ),
    ]
    quantize: Annotated[
        str | None,
        Option(None, "hold the weights in 8 or 4 bits", choices=SCHEMES, check=_one_of(SCHEMES, None)),
    ]
    compile: Annotated[
        bool | str,
        Option(
            "auto",
            "compile the decode step: on CPUs by a C compiler, on CUDA by torch.compile (minutes); auto: on CPUs",
            bool,
            check=_compile,
        ),
    ]
    plain: Annotated[bool, Option(False, "compute as llama/model.py is written: nothing merged or compiled", bool)]
    chat_format: Annotated[
        str | None,
        Option(None, "how dialogs are written (llama2, llama3, chatml, ...); default: detected"),
    ]


class SamplingOptions(TypedDict, total=False):
    """Keyword options of the methods that generate. One value for all prompts, or a list with one for each."""

    top_k: Annotated[
        Each[int | None],
        Option(None, "keep the k highest logits and their equals", int, check=_integer(1, optional=True)),
    ]
    repetition_penalty: Annotated[
        Each[float],
        Option(
            1.0,
            "divide positive logits of ids seen so far by it, multiply negative ones (CTRL, arXiv:1909.05858)",
            float,
            check=_positive,
        ),
    ]
    stop_token_ids: Annotated[StopIds, Option(None, "ids that end a row, with the tokenizer's own", int, check=_ids)]
    seed: Annotated[
        Each[int | None],
        Option(
            None,
            "random stream of the row; sample j of a prompt draws with seed + j",
            int,
            check=_integer(0, optional=True),
        ),
    ]
    n: Annotated[int, Option(1, "samples of each prompt, one after another in the results", int, check=_integer(1))]


class Settings(SamplingOptions, total=False):
    """All options of sampling, with those that Meta's methods take by position."""

    max_gen_len: Annotated[
        Each[int | None],
        Option(
            None, "ids to generate at most; default: as far as max_seq_len goes", int, check=_integer(0, optional=True)
        ),
    ]
    temperature: Annotated[
        Each[float], Option(0.6, "divides the logits; 0 takes the most probable id", float, check=_number)
    ]
    top_p: Annotated[
        Each[float],
        Option(0.9, "keep ids whose more probable ids sum to at most this; 1 keeps all", float, check=_probability),
    ]


def declared(*groups: type) -> dict[str, Option]:
    """The options of these classes by name, in the order of their declaration."""
    found: dict[str, Option] = {}
    for group in groups:
        for name, hint in get_type_hints(group, include_extras=True).items():
            found[name] = next(extra for extra in get_args(hint)[1:] if isinstance(extra, Option))
    return found


def read_options(group: type[T], given: Mapping[str, Any], caller: str) -> T:
    """`given` with the defaults of what it leaves out, each value checked.

    Raises TypeError for a name that `group` does not have, and what the checks raise."""
    options = declared(group)
    for name in given:
        if name not in options:
            raise TypeError(f"{caller} has no option {name}{suggestion(name, options)}")
    values: Any = {name: option.check(name, given.get(name, option.default)) for name, option in options.items()}
    return values


def suggestion(name: str, names: Mapping[str, Any]) -> str:
    """The end of a message about an unknown name: the nearest one, or all."""
    near = difflib.get_close_matches(name, names, 1)
    return f": did you mean {near[0]}?" if near else f"; there are {', '.join(names)}"


def with_options(group: type) -> Callable[[F], F]:
    """For a function that takes `**options: Unpack[group]`: shows the single options in `inspect.signature` and in the
    docstring, as editors do by the annotation."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        hints = get_type_hints(group)
        *parameters, _ = signature.parameters.values()
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=hints[name])
            for name, option in declared(group).items()
        ]
        function.__signature__ = signature.replace(parameters=[*parameters, *keywords])  # type: ignore[attr-defined]
        lines = [f"    {name}: {option.help}." for name, option in declared(group).items()]
        function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Options:", *lines])
        return function

    return decorate
