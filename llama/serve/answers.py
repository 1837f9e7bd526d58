"""`Answer`: what the two endpoints have in common between a checked request and the JSON of its answer."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar

from llama.engine.requests import Row, Token
from llama.generation import Llama
from llama.serve.choices import Choice, Scored
from llama.serve.errors import RequestError
from llama.serve.protocol import Request
from llama.serve.service import Job

# Log-probabilities of one answer: alternatives times positions. Each takes about 150 bytes until the answer is sent.
MAX_SCORES = 500_000
MAX_TOKEN_CHARACTERS = 128  # texts with more characters per position of the cache are refused before they are encoded


class Answer:
    """A request with its rows and choices. The constructor encodes the prompts, so it is called in a worker thread.

    Subclasses make the rows, and write choices in the form of their endpoint. `max_tokens` has the name of the field of
    the request that limits the number of new ids.
    """

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, llama: Llama, model: str, request: Request, job: Job):
        self.llama, self.model, self.request, self.job = llama, model, request, job
        self.id, self.created = f"{self.id_prefix}-{uuid.uuid4().hex}", int(time.time())
        self.prompt_tokens = 0
        self.choices: list[Choice] = self.make_choices()

    # In subclasses

    def make_choices(self) -> list[Choice]:
        raise NotImplementedError

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A complete choice."""
        raise NotImplementedError

    def begin(self) -> list[dict[str, Any]]:
        """The choices of the first chunks of a stream, which have no text."""
        raise NotImplementedError

    def delta(self, choice: Choice, text: str, scored: Sequence[Scored]) -> list[dict[str, Any]]:
        """The choices of the chunks with this text, and with its finish_reason if the choice has ended."""
        raise NotImplementedError

    # Preparation

    def encode(self, text: str, param: str) -> list[int]:
        """The ids of a prompt. Raises RequestError if it is too long for sure, or if the tokenizer refuses it."""
        self.check_length(len(text), param)
        tokenizer = self.llama.tokenizer
        try:
            return tokenizer.encode(text, bos=tokenizer.adds_bos, eos=False)
        except ValueError as error:
            raise RequestError(error, param=param) from None

    def check_length(self, characters: int, param: str) -> None:
        limit = self.llama.model.params.max_seq_len
        if characters > limit * MAX_TOKEN_CHARACTERS:
            raise _too_long(f"{param} has {characters:,} characters", limit, param)

    def rows(self, prompts: list[list[int]], param: str, max_tokens: str, echo: bool = False, **more: Any) -> list[Row]:
        """Rows for prompts of ids. max_tokens: the name of the field; without a value an answer may fill the cache.

        Raises RequestError for prompts that do not fit, and for what the engine refuses.
        """
        request, limit = self.request, self.llama.model.params.max_seq_len
        new, is_given = getattr(request, max_tokens), max_tokens in request.model_fields_set
        longest = max(map(len, prompts))
        if longest > limit:
            raise _too_long(f"{param} has {longest:,} tokens", limit, param)
        if is_given and longest + new > limit:
            raise _too_long(f"{param} has {longest:,} tokens and {max_tokens} is {new:,}", limit, max_tokens)
        if request.k:
            self._check_alternatives(request.k, prompts, limit if new is None else new, echo)
        self.prompt_tokens = sum(map(len, prompts))
        k: bool | int = False if request.k is None else request.k
        settings = {**request.settings(), "max_gen_len": new, **more}
        try:
            return self.llama._rows(prompts, logprobs=k, echo=echo and request.k is not None, **settings)
        except (ValueError, TypeError) as error:
            name = str(error).partition(" ")[0]  # messages about a setting begin with its name
            raise RequestError(error, param=name if name in type(request).model_fields else param) from None

    def _check_alternatives(self, k: int, prompts: list[list[int]], new: int, echo: bool) -> None:
        args = self.llama.model.params
        param = "n_alternatives" if self.request.n_alternatives is not None else "logprobs"
        if k > args.vocab_size:
            raise RequestError(f"{param} is {k:,}, but the vocabulary has {args.vocab_size:,} ids", param=param)
        positions = sum(len(ids) * echo + min(new, args.max_seq_len - len(ids)) for ids in prompts) * self.request.n
        if k * positions > MAX_SCORES:
            raise RequestError(
                f"{k} alternatives at {positions:,} positions: expected up to {MAX_SCORES:,} in a request, so ask for "
                "fewer alternatives, or send fewer prompts at once",
                param=param,
            )

    # Answering

    def add(self, tokens: Sequence[Token]) -> list[Choice]:
        """Add what one step has generated -> the choices that have changed."""
        changed = {token.row for token in tokens if self.choices[token.row].add(token)}
        return [self.choices[index] for index in sorted(changed)]

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        return {**self._head(self.kind), "choices": list(map(self.choice, self.choices)), "usage": self.usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events. An error ends it with an event of its own."""
        try:
            for choice in self.begin():
                yield self._chunk([choice])
            for refused in self.choices:
                if refused.finish_reason is not None:  # its row is not run
                    for delta in self.delta(refused, *refused.take()):
                        yield self._chunk([delta])
            async for tokens in self.job.steps():
                for changed in self.add(tokens):
                    for delta in self.delta(changed, *changed.take()):
                        yield self._chunk([delta])
            if self.request.include_usage:
                yield self._chunk([], self.usage())
            yield b"data: [DONE]\n\n"
        except RequestError as error:
            yield _event(error.body)

    def usage(self) -> dict[str, Any]:
        new = sum(choice.completion_tokens for choice in self.choices)
        cached = sum(choice.row.reused for choice in self.choices if choice.index % self.request.n == 0)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        chunk = {**self._head(self.chunk_kind), "choices": choices}
        return _event(chunk | ({"usage": usage} if self.request.include_usage else {}))


def _too_long(what: str, limit: int, param: str) -> RequestError:
    return RequestError(
        f"{what}, but max_seq_len is {limit:,}: shorten it, or serve with a larger --max_seq_len",
        param=param,
        code="context_length_exceeded",
    )


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _event(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"
