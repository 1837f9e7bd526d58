"""Requests and results of the engine: checks prompts and settings, and creates a `Row` for each sample of a prompt."""

import operator
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from typing_extensions import Unpack

from llama.options import Settings, check_int, declared, suggestion
from llama.params import ModelArgs

Prompts: TypeAlias = Sequence[Sequence[int]] | torch.Tensor  # lists of ids, or an integer tensor [bsz, seqlen]


Alternatives = list[tuple[int, float]]  # (id, log-probability), best first


@dataclass
class Row:
    """One sample of a prompt: its settings and its results so far.

    index: index in the results. limit: length, prompt included, at which generation ends. stop: ids that end it.
    stream: the row's own random generator. logit_bias: id -> number added to its logit.
    k: number of alternatives; None: no log-probabilities. echo: whether the prompt is scored too.
    reused: number of leading ids that the cache already held. prompt_top, top: alternatives at each position.
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
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    k: int | None = None
    echo: bool = False
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

    @property
    def is_scored(self) -> bool:
        """Whether the model must compute log-probabilities of the prompt."""
        return self.echo and self.k is not None and len(self.prompt) > 1

    def cut(self, n: int) -> None:
        """Keep the first `n` generated ids and end here."""
        self.finish_reason = "stop"
        del self.tokens[n:], self.logprobs[n:], self.top[n:]


@dataclass(frozen=True)
class Token:
    """What one step added to a row: an id, the row's end, or both. A stop id ends the row and is not returned.

    row: index in the results. top: the requested alternatives. finish_reason: "stop" or "length" at the row's end.
    """

    row: int
    id: int | None = None
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    finish_reason: str | None = None


class Generation(tuple[list[list[int]], list[list[float]] | None]):
    """(ids, log-probabilities or None), a list for each row. top: the alternatives at each position, if requested."""

    top: list[list[Alternatives]]


def read_rows(
    args: ModelArgs,
    draw_seed: Callable[[], int],
    model_stop: Iterable[int],
    prompts: Prompts,
    **settings: Unpack[Settings],
) -> list[Row]:
    """Rows in the order of the prompts, `n` for each; `options.Settings` has the defaults and meanings of `settings`.

    draw_seed: called once for each sampled row without a seed. model_stop: the tokenizer's stop ids; a row stops at
        these and at its `stop_token_ids`.

    Raises ValueError or TypeError for settings out of range, for prompts that are empty or longer than max_seq_len, and
    for ids outside the vocabulary.
    """
    if isinstance(prompts, torch.Tensor):
        prompts = _rows_of(prompts)
    check_list("prompts of ids", "lists", prompts)
    checked = [read_ids(f"prompt {i}", prompt, args) for i, prompt in enumerate(prompts)]
    n, each = _read_settings(settings, len(prompts))
    rows: list[Row] = []
    for ids, one in zip(checked, each, strict=True):
        for name in ("logit_bias", "stop_token_ids"):
            if outside := [token for token in one[name] if not 0 <= token < args.vocab_size]:
                raise ValueError(f"{name} holds id {outside[0]}, outside the vocabulary of {args.vocab_size}")
        length = one["max_gen_len"]
        limit = args.max_seq_len if length is None else min(len(ids) + length, args.max_seq_len)
        for j in range(n):
            if one["seed"] is not None:
                stream = random.Random(one["seed"] + j)
            else:
                stream = random.Random(draw_seed() if one["temperature"] else 0)
            rows.append(
                Row(
                    len(rows),
                    ids,
                    limit,
                    one["temperature"],
                    one["top_p"],
                    min(one["top_k"] or 0, args.vocab_size),
                    one["repetition_penalty"],
                    one["stop_token_ids"].union(model_stop),
                    stream,
                    one["frequency_penalty"],
                    one["presence_penalty"],
                    one["logit_bias"],
                )
            )
    return rows


def _read_settings(settings: Settings, count: int) -> tuple[int, list[dict[str, Any]]]:
    """Check all settings -> (n, the other settings of each prompt)."""
    options = declared(Settings)
    for name in settings:
        if name not in options:
            raise TypeError(f"there is no setting {name}{suggestion(name, options)}")
    n = options.pop("n")
    columns = []
    for name, option in options.items():
        value = settings.get(name, option.default)
        values = _stop_lists(value, count) if name == "stop_token_ids" else per_prompt(name, value, count)
        columns.append([option.check(name, item) for item in values])
    rows = [dict(zip(options, row, strict=True)) for row in zip(*columns, strict=True)]
    return n.check("n", settings.get("n", n.default)), rows


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
    """A value for each of `count` prompts, from one value for all or from a list of `count` values."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values for {count} prompts: give one value, or one for each prompt")
    return list(value)


def check_list(what: str, of: str, value: Any) -> None:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        hint = ": put a single one in brackets" if isinstance(value, str) else ""
        raise TypeError(f"{what} are a list of {of}, not {type(value).__name__}{hint}")


def check_alternatives(name: str, k: Any, least: int, args: ModelArgs) -> None:
    check_int(name, k, least)
    if k > args.vocab_size:
        raise ValueError(f"{name} is {k}, but the vocabulary has {args.vocab_size} ids")


def _stop_lists(value: Any, count: int) -> list[Any]:
    """Ids for all prompts ([2, 13]), or a list of them for each ([[2], [13], None])."""
    is_shared = not isinstance(value, Sequence) or not any(isinstance(item, Sequence | None) for item in value)
    return [value] * count if is_shared else per_prompt("stop_token_ids", value, count)


def read_ids(name: str, value: Any, args: ModelArgs, *, any_length: bool = False) -> list[int]:
    """Return `value` as a list of ids, which must all be in the vocabulary.

    Unless `any_length`, the list must not be empty or longer than max_seq_len. Raises ValueError or TypeError.
    """
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
    """Split a row of `logprobs.score` into the target's log-probability and the k alternatives."""
    return values[0], [(int(token), logprob) for logprob, token in zip(values[1 : k + 1], values[k + 1 :], strict=True)]


def shared_prefix(a: list[int], b: list[int]) -> int:
    """The length of the longest common prefix of two lists."""
    n, block = min(len(a), len(b)), 64
    for start in range(0, n, block):
        if a[start : start + block] != b[start : start + block]:
            return next((i for i in range(start, min(start + block, n)) if a[i] != b[i]), n)
    return n
