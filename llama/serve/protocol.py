"""The requests: their fields with ranges and defaults, and errors that name the field and its value.

null stands for a field that is left out. A field that this server does not have is an error, also one that OpenAI has,
unless its value asks for nothing (`NEUTRAL`).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from llama.console import in_one_line
from llama.options import Settings, declared, suggestion
from llama.serve.errors import RequestError

R = TypeVar("R", bound="Request")

MAX_ALTERNATIVES = 20  # of OpenAI's fields; `n_alternatives` goes up to the vocabulary's size
MAX_N = 128
MAX_ROWS = 2048  # prompts times n
MAX_STOPS, MAX_STOP_LENGTH = 32, 256  # every new id is compared with the beginnings of all stop texts
INT64 = 2**63

# Fields of OpenAI's chat endpoint that this server does not have -> values that ask for nothing, besides null.
NEUTRAL: dict[str, Sequence[Any]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": (),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": (),
    "verbosity": (),
    "web_search_options": (),
}


# Checks of single fields. They raise ValueError with what was expected, or with the whole line.


def integer(least: int, most: int) -> BeforeValidator:
    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            upper = "" if most == INT64 else f" to {most}"
            raise ValueError(f"expected an integer from {least}{upper}")
        return value

    return BeforeValidator(check)


def number(least: float, most: float) -> BeforeValidator:
    def check(value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"expected a number from {least:g} to {most:g}")
        return float(value)

    return BeforeValidator(check)


def setting(name: str) -> BeforeValidator:
    """The check that `llama.options` declares."""
    option = declared(Settings)[name]

    def check(value: Any) -> Any:
        if isinstance(value, bool) and option.kind is not dict:
            raise ValueError(f"expected {'an integer' if option.kind is int else 'a number'}")
        try:
            return option.check(name, value)
        except TypeError as error:
            raise ValueError(str(error)) from None

    return BeforeValidator(check)


def _read_stop(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("expected a text or a list of texts")
    if len(texts) > MAX_STOPS or not all(1 <= len(text) <= MAX_STOP_LENGTH for text in texts):
        raise ValueError(f"expected up to {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters")
    return texts


def _read_prompts(value: Any) -> list[str] | list[list[int]]:
    """A text, a list of texts, a list of ids or a list of such lists -> a list of texts or of lists of ids."""
    prompts = [value] if isinstance(value, str) or (isinstance(value, list) and value and _is_id(value[0])) else value
    if isinstance(prompts, list) and prompts:
        if all(isinstance(prompt, str) for prompt in prompts):
            return prompts
        if all(isinstance(prompt, list) and all(map(_is_id, prompt)) for prompt in prompts):
            return prompts
    raise ValueError("expected a text, a list of texts, a list of ids or a list of lists of ids")


def _is_id(value: Any) -> bool:
    return type(value) is int


def _read_content(value: Any) -> str:
    """A text, or parts that are texts, which are joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("expected a text, or a list of parts")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            found = f"a part of type {kind!r}" if isinstance(kind, str) and kind != "text" else "another part"
            raise ValueError(f'expected parts {{"type": "text", "text": "..."}}, got {found}')
    return "".join(part["text"] for part in value)


# Requests -------------------------------------------------------------------------------------------


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Request(Strict):
    """What both endpoints have. `n_alternatives` is this project's: log-probabilities with that many alternatives.
    `priority` is vLLM's: requests with a lower number get slots first."""

    neutral: ClassVar[dict[str, Sequence[Any]]] = {}

    model: str | None = None
    n: Annotated[int, integer(1, MAX_N)] = 1
    stop: Annotated[list[str], BeforeValidator(_read_stop)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, number(0, 2)] = 1.0
    top_p: Annotated[float, setting("top_p")] = 1.0
    seed: Annotated[int | None, integer(-INT64, INT64)] = None
    frequency_penalty: Annotated[float, setting("frequency_penalty")] = 0.0
    presence_penalty: Annotated[float, setting("presence_penalty")] = 0.0
    logit_bias: Annotated[dict[int, float], setting("logit_bias")] = {}
    top_k: Annotated[int | None, setting("top_k")] = None
    repetition_penalty: Annotated[float, setting("repetition_penalty")] = 1.0
    stop_token_ids: list[int] = []
    n_alternatives: Annotated[int | None, integer(0, INT64)] = None
    priority: Annotated[int, integer(-100, 100)] = 0
    user: str | None = None  # no effect

    @property
    def k(self) -> int | None:
        """The number of alternatives to report at each position, or None: no log-probabilities."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise RequestError for fields that exclude each other."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def settings(self) -> dict[str, Any]:
        """The settings of the engine, except max_gen_len."""
        names = declared(Settings).keys() - {"max_gen_len", "seed"}
        seed = None if self.seed is None else self.seed % (2 * INT64)
        return {name: getattr(self, name) for name in names} | {"seed": seed}


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_read_prompts)]
    max_tokens: Annotated[int, integer(0, INT64)] = 16
    echo: bool = False
    logprobs: Annotated[int | None, integer(0, MAX_ALTERNATIVES)] = None
    suffix: str | None = None
    best_of: Annotated[int | None, integer(1, MAX_N)] = None

    @property
    def k(self) -> int | None:
        return self.logprobs if self.n_alternatives is None else self.n_alternatives

    def check(self) -> None:
        super().check()
        if len(self.prompt) * self.n > MAX_ROWS:
            raise RequestError(
                f"{len(self.prompt)} prompts times n = {self.n}: expected up to {MAX_ROWS} answers a request",
                param="prompt",
            )
        if None not in (self.logprobs, self.n_alternatives):
            raise RequestError("n_alternatives replaces logprobs: give one of them", param="n_alternatives")
        if self.best_of not in (None, self.n):
            raise RequestError(
                f"best_of is {self.best_of}: it is not supported, leave it out and give n", param="best_of"
            )
        if self.suffix is not None and self.echo:
            raise RequestError("echo and suffix exclude each other: leave one out", param="echo")
        if self.suffix is not None and not isinstance(self.prompt[0], str):
            raise RequestError("a suffix needs prompts that are texts, not ids", param="prompt")


class ChatMessage(Strict):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_read_content)]

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, value: Any) -> Any:
        """Clients send answers back with all fields that OpenAI's have: `"refusal": null`, `"annotations": []`."""
        if not isinstance(value, dict):
            return value
        return {name: field for name, field in value.items() if name == "content" or field not in (None, [])}


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    neutral: ClassVar[dict[str, Sequence[Any]]] = NEUTRAL

    messages: list[ChatMessage]
    max_completion_tokens: Annotated[int | None, integer(0, INT64)] = None
    max_tokens: Annotated[int | None, integer(0, INT64)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, integer(0, MAX_ALTERNATIVES)] = None
    safety_identifier: str | None = None  # no effect
    prompt_cache_key: str | None = None  # no effect

    @property
    def k(self) -> int | None:
        if self.n_alternatives is not None:
            return self.n_alternatives
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        if not self.messages:
            raise RequestError("messages is empty, expected at least one message", param="messages")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        if None not in (self.top_logprobs, self.n_alternatives):
            raise RequestError("n_alternatives replaces top_logprobs: give one of them", param="n_alternatives")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise RequestError("max_tokens is the old name of max_completion_tokens: give one", param="max_tokens")


class TokenizeRequest(Strict):
    """POST /tokenize, as in llama.cpp's server. add_special: put BOS before the text if the tokenizer does so."""

    content: str
    add_special: bool = False


class DetokenizeRequest(Strict):
    """POST /detokenize, as in llama.cpp's server."""

    tokens: list[int]


# Reading a body -------------------------------------------------------------------------------------


def read_request(kind: type[Any], body: bytes) -> Any:
    """The body of a request as an object of `kind`. Raises RequestError, which names the field."""
    given = read_json(body)
    if not isinstance(given, dict):
        raise RequestError(f"the body is {_shown(given)}, expected a JSON object")
    neutral: Mapping[str, Sequence[Any]] = getattr(kind, "neutral", {})
    fields = {}
    for name, value in given.items():
        if name in neutral:
            if value is not None and value not in neutral[name]:
                raise RequestError(
                    f"{name} is {_shown(value)}: {name} is not supported, leave it out",
                    param=name,
                    code="unsupported_parameter",
                )
        elif name not in kind.model_fields:
            raise RequestError(
                f"unknown field {name!r}{suggestion(name, kind.model_fields)}", param=name, code="unknown_parameter"
            )
        elif value is not None:
            fields[name] = value
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise _first_mistake(error) from None
    if isinstance(request, Request):
        request.check()
    return request


def read_json(body: bytes) -> Any:
    """Raises RequestError for what is not JSON in UTF-8, for NaN and Infinity, and for a key that is there twice."""

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"the key {name!r} is there twice")
        return found

    if not body.strip():
        raise RequestError("the body is empty, expected a JSON object")
    try:
        return json.loads(body.decode(), parse_constant=constant, object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02X}") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None


def _first_mistake(error: ValidationError) -> RequestError:
    """The first mistake, in one line. A mistake in an item of a list has the path to it: messages[0].content."""
    mistake = error.errors(include_url=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in mistake["loc"])[1:]
    if mistake["type"] == "missing":
        return RequestError(f"{path} is missing", param=path)
    if mistake["type"] == "extra_forbidden":
        return RequestError(f"{path} is not supported, leave it out", param=path, code="unknown_parameter")
    message = mistake["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if not message.startswith("expected"):  # the whole line, from `llama.options`
        return RequestError(message, param=path)
    return RequestError(f"{path} is {_shown(mistake['input'])}, {message}", param=path)


def _shown(value: Any) -> str:
    """A value as JSON, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    line = in_one_line(text[:4000])
    return line if len(line) <= 80 else f"{line[:76]} ..."
