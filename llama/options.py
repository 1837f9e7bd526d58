"""Every option of `Llama.build` and of sampling, declared once: type, default, check and a line of help.

`Llama.build` and the methods that generate have these options as keyword arguments, the commands as flags, and the
adapter for lm-evaluation-harness as model arguments. The documentation's tables are generated from them. To add an
option, add an entry to its class here and read it where it has its effect.
"""

import difflib
import inspect
import math
import numbers
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypedDict, TypeVar, get_args, get_type_hints

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Each: TypeAlias = T | Sequence[T]  # one value for all prompts, or a list with one for each
StopIds: TypeAlias = Sequence[int] | Sequence[Sequence[int] | None] | None

DTYPES = ("float32", "bfloat16", "float16")
SCHEMES = ("int8", "int4", "fp8")
PREFILL_CHUNK = 1024  # the default of prefill_chunk


# Checks: (name, value) -> value. They raise TypeError for a wrong type, ValueError for a value out of range.


def check_int(name: str, value: Any, least: int, limit: float = math.inf) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected an integer")
    if not least <= operator.index(value) < limit:
        below = "" if limit == math.inf else f", below {limit}"
        raise ValueError(f"{name} is {value}, expected an integer from {least}{below}")
    return operator.index(value)


def _integer(least: int, limit: float = math.inf, optional: bool = False) -> Callable[[str, Any], int | None]:
    return lambda name, value: None if optional and value is None else check_int(name, value, least, limit)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer that is too large
        return math.inf if value > 0 else -math.inf


def _number(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}, expected a number")
    if not 0 <= _as_float(value) < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a number from 0")
    return float(value)


def _between(low: float, high: float) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, expected a number")
        if not low <= _as_float(value) <= high:
            raise ValueError(f"{name} is {value!r}, expected a number from {low:g} to {high:g}")
        return float(value)

    return check


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


def _bias(name: str, value: Any) -> dict[int, float]:
    """Ids may also be strings, as JSON's keys are."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {str(value)[:60]!r}, expected a mapping from ids to numbers, such as {{42: -100}}")
    found: dict[int, float] = {}
    for key, bias in value.items():
        if not re.fullmatch(r"\d{1,10}", str(key)):
            raise ValueError(f"{name} has the key {key!r}, expected an id")
        found[int(key)] = _between(-100, 100)(f"{name} of id {key}", bias)
    return found


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected True or False")
    return value


def _compile(name: str, value: Any) -> bool | str:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected True, False or 'auto'")
    return value


def _path(name: str, value: Any) -> Any:
    if not isinstance(value, str | Path):
        raise TypeError(f"{name} is {value!r}, expected a path")
    return value


def _optional_path(name: str, value: Any) -> Any:
    return None if value is None else _path(name, value)


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
    """What is declared about an option besides its type in Python.

    default: None means "not given". kind: the type of one value on a command line. choices: the values that a command
    line accepts; empty if `kind` alone limits them. check: returns the value or raises.
    """

    default: Any
    help: str
    kind: type = str
    choices: tuple[str, ...] = ()
    check: Callable[[str, Any], Any] = _any


class ModelOptions(TypedDict, total=False):
    """Arguments that Meta's `Llama.build` has too, by position or by name."""

    ckpt_dir: Annotated[str, Option(None, "folder with consolidated.NN.pth and params.json", check=_path)]
    tokenizer_path: Annotated[
        str | None,
        Option(
            None,
            "tokenizer.model or tokenizer.json; default: the one in ckpt_dir or in its parent folder",
            check=_optional_path,
        ),
    ]
    max_seq_len: Annotated[
        int, Option(512, "positions of the KV cache, for the prompt and the answer together", int, check=_integer(1))
    ]
    max_batch_size: Annotated[int, Option(8, "rows of the KV cache", int, check=_integer(1))]
    model_parallel_size: Annotated[
        int | None, Option(None, "number of ranks; it is detected, and any other number is an error", int)
    ]
    seed: Annotated[
        int,
        Option(
            1,
            "passed to torch.manual_seed; calls without a seed of their own draw from it",
            int,
            check=_integer(0, 2**64),
        ),
    ]


class BuildOptions(TypedDict, total=False):
    """Keyword options of `Llama.build`."""

    device: Annotated[str, Option("auto", "cpu, cuda, cuda:N, mps or auto; auto: cuda, else mps, else cpu")]
    dtype: Annotated[
        str,
        Option(
            "auto",
            "dtype of the computation; auto: the checkpoint's, or float32 if the device does not support it",
            choices=("auto", *DTYPES),
        ),
    ]
    quantize: Annotated[
        str | None,
        Option(
            None,
            "store the weights in 8 or 4 bits; fp8 needs a GPU of compute capability 8.9 or higher",
            choices=SCHEMES,
            check=_one_of(SCHEMES, None),
        ),
    ]
    compile: Annotated[
        bool | str,
        Option(
            "auto",
            "compile the decode step: with a C compiler on CPUs, with torch.compile (a minute for each batch size) on "
            "CUDA; auto: on CPUs only, CUDA gets CUDA graphs of other kernels; False: kernels are launched one by one",
            bool,
            check=_compile,
        ),
    ]
    plain: Annotated[
        bool,
        Option(
            False,
            "run the layers as llama/model.py has them, none of them merged, compiled or in a CUDA graph",
            bool,
            check=_switch,
        ),
    ]
    prefill_chunk: Annotated[
        int,
        Option(
            PREFILL_CHUNK,
            "ids of prompts that a step computes beside running rows; fewer delay those less and need less memory",
            int,
            check=_integer(1),
        ),
    ]
    chat_format: Annotated[
        str | None,
        Option(None, "format of dialogs: llama2, llama3, chatml, ...; default: detected"),
    ]


class SamplingOptions(TypedDict, total=False):
    """Keyword options of the methods that generate. Except for `n`, each is one value for all prompts, or a list with
    one for each."""

    top_k: Annotated[
        Each[int | None],
        Option(
            None,
            "sample from the k most probable ids, and those tied with the last; None: all",
            int,
            check=_integer(1, optional=True),
        ),
    ]
    repetition_penalty: Annotated[
        Each[float],
        Option(
            1.0,
            "for ids seen so far, divide positive logits by it and multiply negative ones (CTRL, arXiv:1909.05858)",
            float,
            check=_positive,
        ),
    ]
    frequency_penalty: Annotated[
        Each[float],
        Option(
            0.0,
            "subtract it from an id's logit, once for each time the id was generated; -2 to 2",
            float,
            check=_between(-2, 2),
        ),
    ]
    presence_penalty: Annotated[
        Each[float],
        Option(
            0.0, "subtract it from the logits of all ids generated so far, once; -2 to 2", float, check=_between(-2, 2)
        ),
    ]
    logit_bias: Annotated[
        Each[Mapping[int, float] | None],
        Option(
            None,
            """id -> number from -100 to 100, added to its logit; on a command line in JSON: '{"42": -100}'""",
            dict,
            check=_bias,
        ),
    ]
    stop_token_ids: Annotated[StopIds, Option(None, "ids that end a row, besides the tokenizer's own", int, check=_ids)]
    seed: Annotated[
        Each[int | None],
        Option(
            None,
            "seed of a row's own random numbers; sample j of a prompt uses seed + j",
            int,
            check=_integer(0, optional=True),
        ),
    ]
    n: Annotated[int, Option(1, "samples of each prompt; they are adjacent in the results", int, check=_integer(1))]


class Settings(SamplingOptions, total=False):
    """All options of sampling, including those that Meta's methods have as positional arguments."""

    max_gen_len: Annotated[
        Each[int | None],
        Option(
            None, "maximum number of ids to generate; None: until max_seq_len", int, check=_integer(0, optional=True)
        ),
    ]
    temperature: Annotated[
        Each[float], Option(0.6, "divides the logits; 0: always the most probable id", float, check=_number)
    ]
    top_p: Annotated[
        Each[float],
        Option(
            0.9,
            "sample from the most probable ids: drop an id if those above it sum to more than top_p; 1: keep all",
            float,
            check=_probability,
        ),
    ]


def declared(*groups: type) -> dict[str, Option]:
    """The options of these classes by name, in the order of declaration."""
    found: dict[str, Option] = {}
    for group in groups:
        for name, hint in get_type_hints(group, include_extras=True).items():
            found[name] = next(extra for extra in get_args(hint)[1:] if isinstance(extra, Option))
    return found


def read_options(group: type[T], given: Mapping[str, Any], caller: str) -> T:
    """Check the values in `given`, and add the defaults of the options that it lacks.

    Raises TypeError for a name that `group` does not have, and TypeError or ValueError for a value that fails its
    check.
    """
    options = declared(group)
    for name in given:
        if name not in options:
            raise TypeError(f"{caller} has no option {name}{suggestion(name, options)}")
    values: Any = {name: option.check(name, given.get(name, option.default)) for name, option in options.items()}
    return values


def suggestion(name: str, names: Mapping[str, Any]) -> str:
    """The end of an error message about an unknown name: the most similar known name, or all of them."""
    near = difflib.get_close_matches(name[:100], names, 1)  # of a name of megabytes it would take seconds
    return f": did you mean {near[0]}?" if near else f"; there are {', '.join(names)}"


def with_options(group: type) -> Callable[[F], F]:
    """Decorate a function with `**options: Unpack[group]`: list the options in its `inspect.signature` and docstring.

    Editors already get them from the annotation.
    """

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
