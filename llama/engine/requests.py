"""What a call asks for (prompts and settings, checked, one `Row` for each sample of each prompt), and what it gets."""

import math
import numbers
import operator
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypedDict, TypeVar

import torch

from llama.params import ModelArgs

T = TypeVar("T")
Ids: TypeAlias = tuple[int, ...]
Prompts: TypeAlias = Sequence[Sequence[int]] | torch.Tensor  # lists of ids, or an integer tensor [bsz, seqlen]
Each: TypeAlias = T | Sequence[T]  # one value for all prompts, or a list with one for each
StopIds = Sequence[int] | Sequence[Sequence[int] | None] | None
# A pass takes about as long as so many more ids in another one: it reads all weights.
PASS_COST = 64


class Settings(TypedDict, total=False):
    """Settings of a call, each one value or a list with one for each prompt (n: one value).

    max_gen_len: ids to generate at most; None is as far as max_seq_len goes.
    repetition_penalty: the logits of ids in the prompt or generated so far are divided by it where positive, else
        multiplied (CTRL, arXiv:1909.05858); 1 changes nothing.
    top_k: keep the k highest logits (and their equals); None keeps all.
    temperature: divides the logits; 0 takes the most probable id.
    top_p: keep ids whose more probable ids sum to at most this; 1 keeps all.
    stop_token_ids: ids that end a row, beside the tokenizer's own.
    seed: the row's random stream; sample j of a prompt draws with seed + j. With None each sampled row draws its seed
        from torch's default generator, so `torch.manual_seed`, which `build` calls, too, makes a call repeat. Rows of
        temperature 0 draw none.
    n: samples of each prompt, one after another in the results; they share the prompt's computation.
    """

    max_gen_len: Each[int | None]
    temperature: Each[float]
    top_p: Each[float]
    top_k: Each[int | None]
    repetition_penalty: Each[float]
    stop_token_ids: StopIds
    seed: Each[int | None]
    n: int


Alternatives = list[tuple[int, float]]  # (id, log-probability), best first


@dataclass
class Row:
    """One sample of a prompt, its settings, and what has become of it.

    index: place in the results. limit: length, prompt included, at which generation ends. stop: ids that end it.
    stream: its own random numbers. reused: leading ids that the cache already held. prompt_top, top: a list a position.
    """

    index: int
    prompt: list[int]
    limit: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    stop: set[int]
    stream: random.Random
    reused: int = 0
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top: list[Alternatives] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[Alternatives] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def cut(self, n: int) -> None:
        """Keep the first `n` generated ids and end here."""
        self.finish_reason = "stop"
        del self.tokens[n:], self.logprobs[n:], self.top[n:]


@dataclass(frozen=True)
class Token:
    """What a step brought to a row: an id, or its end at a stop id (which is not returned), or an id and its end.

    row: place in the results. top: the alternatives asked for. finish_reason: "stop" or "length" at the row's end.
    """

    row: int
    id: int | None = None
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    finish_reason: str | None = None


class Generation(tuple[list[list[int]], list[list[float]] | None]):
    """(ids, log-probabilities or None), a list a row. top: the alternatives at each position, where asked for."""

    top: list[list[Alternatives]]


def read_rows(
    args: ModelArgs,
    draw_seed: Callable[[], int],
    model_stop: Iterable[int],
    prompts: Prompts,
    *,
    max_gen_len: Each[int | None] = None,
    temperature: Each[float] = 0.6,
    top_p: Each[float] = 0.9,
    top_k: Each[int | None] = None,
    repetition_penalty: Each[float] = 1.0,
    stop_token_ids: StopIds = None,
    seed: Each[int | None] = None,
    n: int = 1,
) -> list[Row]:
    """Rows in the order of the prompts, `n` for each.

    draw_seed: called once for each sampled row without a seed. model_stop: the tokenizer's stop ids, in force beside
        `stop_token_ids`.

    Raises ValueError or TypeError for settings out of range and for prompts that are empty, longer than max_seq_len,
    or hold ids outside the vocabulary.
    """
    check_int("n", n, 1)
    if isinstance(prompts, torch.Tensor):
        prompts = _rows_of(prompts)
    check_list("prompts of ids", "lists", prompts)

    def each(name: str, value: Any, check: Callable[[str, Any], Any]) -> list[Any]:
        return [check(name, item) for item in per_prompt(name, value, len(prompts))]

    settings = zip(
        each("max_gen_len", max_gen_len, _optional_int(0)),
        each("temperature", temperature, _number),
        each("top_p", top_p, _fraction),
        each("top_k", top_k, _optional_int(1)),
        each("repetition_penalty", repetition_penalty, _positive),
        _stops(stop_token_ids, len(prompts)),
        each("seed", seed, _optional_int(0)),
        strict=True,
    )
    texts = [read_ids(f"prompt {i}", prompt, args) for i, prompt in enumerate(prompts)]
    rows: list[Row] = []
    for ids, (most, heat, p, k, penalty, stop, first_seed) in zip(texts, settings, strict=True):
        limit = args.max_seq_len if most is None else min(len(ids) + most, args.max_seq_len)
        for j in range(n):
            if first_seed is not None:
                stream = random.Random(first_seed + j)
            else:
                stream = random.Random(draw_seed() if heat else 0)
            rows.append(Row(len(rows), ids, limit, heat, p, k or 0, penalty, stop.union(model_stop), stream))
    return rows


def _rows_of(prompts: torch.Tensor) -> list[list[int]]:
    if prompts.dim() != 2:
        raise ValueError(
            f"prompts of ids are a tensor of shape {list(prompts.shape)}, expected [bsz, seqlen]: "
            "a single prompt is tensor[None]"
        )
    if prompts.is_floating_point() or prompts.is_complex() or prompts.dtype == torch.bool:
        raise TypeError(f"prompts of ids are a tensor of {prompts.dtype}, expected integers: tensor.long()")
    return prompts.tolist()


def per_prompt(name: str, value: Any, count: int) -> list[Any]:
    """A list of `count` values, from one value or from as many."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values for {count} prompts: give one value, or one for each prompt")
    return list(value)


def check_list(what: str, of: str, value: Any) -> None:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        hint = ": put a single one in brackets" if isinstance(value, str) else ""
        raise TypeError(f"{what} are a list of {of}, not {type(value).__name__}{hint}")


def check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected a whole number")
    if value < least:
        raise ValueError(f"{name} is {value}, expected a whole number from {least}")


def check_alternatives(name: str, k: Any, least: int, args: ModelArgs) -> None:
    check_int(name, k, least)
    if k > args.vocab_size:
        raise ValueError(f"{name} is {k}, but the vocabulary has {args.vocab_size} ids")


def _optional_int(least: int) -> Callable[[str, Any], int | None]:
    def check(name: str, value: Any) -> int | None:
        if value is None:
            return None
        check_int(name, value, least)
        return int(value)

    return check


def _number(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}, expected a number")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a number from 0")
    return float(value)


def _fraction(name: str, value: Any) -> float:
    if _number(name, value) > 1:
        raise ValueError(f"{name} is {value!r}, expected a number from 0 to 1")
    return float(value)


def _positive(name: str, value: Any) -> float:
    if _number(name, value) == 0:
        raise ValueError(f"{name} is {value!r}, expected a number above 0")
    return float(value)


def _stops(value: Any, count: int) -> list[set[int]]:
    """Ids for all prompts ([2, 13]), or a list of them for each ([[2], [13], None])."""
    shared = not isinstance(value, Sequence) or not any(isinstance(item, Sequence | None) for item in value)
    try:
        lists = [value] * count if shared else per_prompt("stop_token_ids", value, count)
        return [set(map(operator.index, () if ids is None else ids)) for ids in lists]
    except TypeError:
        raise TypeError(f"stop_token_ids is {value!r}, expected a list of ids, or one for each prompt") from None


def read_ids(name: str, value: Any, args: ModelArgs, *, any_length: bool = False) -> list[int]:
    """A list of ids of the vocabulary, one at least and no more than fit the context, unless of any length.

    Raises ValueError or TypeError."""
    try:
        ids = [operator.index(token) for token in value]
    except TypeError:
        raise TypeError(f"{name} is not a list of ids: {str(value)[:60]}") from None
    if not ids and not any_length:
        raise ValueError(f"{name} is empty: the model needs an id to continue, BOS for instance")
    if len(ids) > args.max_seq_len and not any_length:
        raise ValueError(
            f"{name} has {len(ids)} ids, but max_seq_len is {args.max_seq_len}: shorten it or build with a larger one"
        )
    outside = [token for token in ids if not 0 <= token < args.vocab_size]
    if outside:
        raise ValueError(f"{name} holds id {outside[0]}, outside the vocabulary of {args.vocab_size}")
    return ids


def alternatives(values: Sequence[float], k: int) -> tuple[float, Alternatives]:
    """Take the columns of `logprobs.score` apart."""
    return values[0], [(int(token), logprob) for logprob, token in zip(values[1 : k + 1], values[k + 1 :], strict=True)]


def bucket_by_length(texts: Sequence[Ids]) -> list[list[Ids]]:
    """The distinct texts, longest first, in groups for a pass each: padding by up to PASS_COST ids costs a text less
    than a pass of its own."""
    groups: list[list[Ids]] = []
    for text in sorted(dict.fromkeys(texts), key=len, reverse=True):
        if not groups or len(groups[-1][0]) - len(text) > PASS_COST:
            groups.append([])
        groups[-1].append(text)
    return groups


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two lists begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
