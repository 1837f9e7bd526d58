"""The engine: prompts of ids in, continuations and their log-probabilities out."""

import math
import numbers
import operator
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from llama import sampling
from llama.cache import KVCache
from llama.distributed import current_world, from_rank_0, is_main_rank, leave
from llama.model import Transformer
from llama.tokenizer import Tokenizer


@dataclass
class Row:
    """One prompt and what has become of it.

    index: place among the call's prompts. limit: length, prompt included, at which generation ends.
    stream: the row's own random numbers. echo: whether the answer includes the prompt.
    """

    index: int
    prompt: list[int]
    limit: int
    stream: random.Random
    echo: bool
    prompt_logprobs: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def answer_tokens(self) -> list[int]:
        return self.prompt + self.tokens if self.echo else self.tokens

    @property
    def answer_logprobs(self) -> list[float]:
        return self.prompt_logprobs + self.logprobs if self.echo else self.logprobs


class Generator:
    """The engine: a model that continues lists of ids. Text stays outside; the tokenizer only names its stop ids."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, seed: int = 1):
        self._model: Transformer | None = model
        self.tokenizer = tokenizer
        check_whole("seed", seed, 0)
        self._seeds = random.Random(seed)  # the seeds of rows that are given none

    @property
    def model(self) -> Transformer:
        if self._model is None:
            raise ValueError("this model is closed: build it again")
        return self._model

    def close(self) -> None:
        """Give back the memory and, with the last open model, the process group. Closing twice is harmless."""
        if self._model is None:
            return
        on_gpu = self._model.cos.is_cuda
        self._model = None
        if on_gpu:
            torch.cuda.empty_cache()
        leave()

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        stop_token_ids: Sequence[int] | None = None,
        seed: int | None = None,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue each prompt by up to `max_gen_len` ids, all rows in one batch.

        temperature: 0 takes the most probable id. top_p: draws among ids whose more probable ids sum to at most this.
        logprobs: also return the natural log-probability of every returned id under the raw logits.
        echo: return the prompt too; its first id, which nothing predicts, has log-probability 0.0.
        stop_token_ids: ids that end a row, beside the tokenizer's own. A row ends before its first stop id, after
            `max_gen_len` ids, or where prompt and answer fill max_seq_len.
        seed: the random stream of every row, so a row draws the same whatever stands beside it. Without it each row
            takes the next of the streams that `build`'s seed begins.

        Returns (ids, log-probabilities or None), a list a row. Raises ValueError or TypeError for prompts that are
        empty, longer than max_seq_len, more than max_batch_size, or hold ids outside the vocabulary, and
        FloatingPointError when the model answers with logits that are not finite.
        """
        rows = self._rows(prompt_tokens, max_gen_len, echo, seed)
        limit = self.model.params.max_batch_size
        if len(rows) > limit:
            raise ValueError(
                f"{len(rows)} prompts, but max_batch_size is {limit}: build with more, or send fewer at once"
            )
        try:
            stop = set(map(operator.index, stop_token_ids or ()))
        except TypeError:
            raise TypeError(f"stop_token_ids is {stop_token_ids!r}, expected a list of ids") from None
        self._run(rows, temperature, top_p, logprobs, stop)
        return [row.answer_tokens for row in rows], [row.answer_logprobs for row in rows] if logprobs else None

    def _rows(self, prompts: Sequence[Sequence[int]], max_gen_len: int, echo: bool, seed: int | None) -> list[Row]:
        """Check prompts and give each its limit and its random stream."""
        args = self.model.params
        check_whole("max_gen_len", max_gen_len, 0)
        if seed is not None:
            check_whole("seed", seed, 0)
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise TypeError(f"prompts of ids are a list of lists, not {type(prompts).__name__}")
        rows = []
        for i, prompt in enumerate(prompts):
            try:
                ids = [operator.index(token) for token in prompt]
            except TypeError:
                raise TypeError(f"prompt {i} is not a list of ids: {str(prompt)[:60]}") from None
            if not ids:
                raise ValueError(f"prompt {i} is empty: the model needs an id to continue, BOS for instance")
            if len(ids) > args.max_seq_len:
                raise ValueError(
                    f"prompt {i} has {len(ids)} ids, but max_seq_len is {args.max_seq_len}: "
                    "shorten it or build with a larger one"
                )
            outside = [token for token in ids if not 0 <= token < args.vocab_size]
            if outside:
                raise ValueError(f"prompt {i} holds id {outside[0]}, outside the vocabulary of {args.vocab_size}")
            row_seed = self._seeds.getrandbits(63) if seed is None else seed
            rows.append(Row(i, ids, min(len(ids) + max_gen_len, args.max_seq_len), random.Random(int(row_seed)), echo))
        return rows

    @torch.inference_mode()
    def _run(self, rows: list[Row], temperature: float, top_p: float, logprobs: bool, stop_token_ids: set[int]) -> None:
        """Prefill all prompts in one padded pass, then add an id a step to each row until all are finished."""
        _check_number("temperature", temperature, sys.float_info.max)
        _check_number("top_p", top_p, 1)
        model, device = self.model, self.model.cos.device
        stop = self.tokenizer.stop_tokens | stop_token_ids
        for row in rows:
            row.finish_reason = "length" if row.length >= row.limit else None
        score_prompts = logprobs and any(row.echo for row in rows)
        if all(row.finish_reason for row in rows) and not score_prompts:
            return

        # Left-aligned and padded on the right: causality hides the padding from every prompt position, and each
        # padded cache slot is overwritten by the row's own id before a query of that row can see it.
        lengths = [len(row.prompt) for row in rows]
        pad_id = max(self.tokenizer.pad_id, 0)  # -1 is no row of the embedding
        tokens = torch.full((len(rows), max(lengths)), pad_id, dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(row.prompt)] = torch.tensor(row.prompt)
        tokens = tokens.to(device)
        h = model.hidden(tokens, 0, max(lengths))  # [bsz, seqlen, dim]
        if score_prompts:
            # h:       h0  h1  h2        predicts
            # tokens:  t0  t1  t2  t3    one place to the left
            scores = model.token_logprobs(h[:, :-1], tokens[:, 1:])
            for row, values in zip(rows, read_back(scores), strict=True):
                row.prompt_logprobs = [0.0, *values[: len(row.prompt) - 1]]
            self._check_finite(rows, [all(map(math.isfinite, row.prompt_logprobs)) for row in rows], "in the prompt")
        h = h[range(len(rows)), [n - 1 for n in lengths]]  # [bsz, dim], the last position of each row

        for step in range(max(row.limit - row.length for row in rows)):
            logits = model.logits(h)  # [bsz, vocab]
            uniform = torch.tensor([row.stream.random() for row in rows], dtype=sampling.wide_dtype(device)).to(device)
            ids = torch.zeros(len(rows), dtype=torch.int64, device=device)
            if is_main_rank():
                ids = sampling.sample(logits, temperature, top_p, uniform)
            from_rank_0(ids)
            finite = logits.isfinite().all(dim=-1).float()
            scores = logits.log_softmax(dim=-1).gather(-1, ids[:, None])[:, 0] if logprobs else finite
            # fp32 holds every id below 2^24 exactly, so one transfer brings everything.
            id_list, logprob_list, finite_list = read_back(torch.stack((ids.float(), scores, finite)))
            self._check_finite(rows, finite_list, f"at step {step}")
            for row, token, logprob in zip(rows, map(int, id_list), logprob_list, strict=True):
                if row.finish_reason:
                    continue
                if token in stop:
                    row.finish_reason = "stop"
                    continue
                row.tokens.append(token)
                row.logprobs.append(logprob)
                if row.length >= row.limit:
                    row.finish_reason = "length"
            if all(row.finish_reason for row in rows):
                return
            # A finished row computes its last position again: its slot is its own and nobody reads the result.
            positions = [row.length - 1 for row in rows]
            start_pos: int | torch.Tensor = positions[0]
            if len(set(positions)) > 1:
                start_pos = torch.tensor(positions).to(device)
            h = model.hidden(ids[:, None], start_pos, max(positions) + 1)[:, 0]

    def _check_finite(self, rows: list[Row], finite: Sequence[float], where: str) -> None:
        for row, is_finite in zip(rows, finite, strict=True):
            if not is_finite:
                for module in self.model.modules():
                    if isinstance(module, KVCache):
                        module.clear()
                raise FloatingPointError(
                    f"logits that are not finite {where}, row {row.index}, rank {current_world().rank}: "
                    "the weights are damaged, or their dtype overflows (try --dtype float32)"
                )


def read_back(values: torch.Tensor) -> list[list[float]]:
    """Bring numbers from the device to Python: the one place where the engine waits for the device."""
    return values.tolist()


def check_whole(name: str, value: int, least: int) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected a whole number")
    if value < least:
        raise ValueError(f"{name} is {value}, expected a whole number from {least}")


def _check_number(name: str, value: float, highest: float) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}, expected a number")
    if not 0 <= float(value) <= highest:
        raise ValueError(f"{name} is {value!r}, expected a number from 0" + (" to 1" if highest == 1 else ""))
