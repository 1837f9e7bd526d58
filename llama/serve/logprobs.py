"""Log-probabilities in OpenAI's two forms."""

from collections.abc import Sequence
from typing import Any

from llama.serve.choices import Scored
from llama.tokenizer import Tokenizer

LOWEST = -9999.0  # OpenAI's number for what is lower; JSON has no -Infinity


def completion_logprobs(scored: Sequence[Scored], tokenizer: Tokenizer) -> dict[str, list[Any]]:
    """The form of /v1/completions: parallel lists.

    The alternatives of a position are keyed by their text, and include the id itself. An id that is part of a character
    is written "bytes:\\xe2\\x82". If two ids have the same text, the more probable one is kept.
    """
    return {
        "tokens": [_text_of(each, tokenizer) for each in scored],
        "token_logprobs": [_number(each.logprob) for each in scored],
        "top_logprobs": [None if each.logprob is None else _by_text(each, tokenizer) for each in scored],
        "text_offset": [each.start for each in scored],
    }


def chat_logprobs(scored: Sequence[Scored], tokenizer: Tokenizer) -> dict[str, Any]:
    """The form of /v1/chat/completions: an object for each id."""
    content = []
    for each in scored:
        entry = _entry(each.id, each.logprob, tokenizer, each.text)
        content.append({**entry, "top_logprobs": [_entry(token, value, tokenizer) for token, value in each.top]})
    return {"content": content, "refusal": None}


def _by_text(scored: Scored, tokenizer: Tokenizer) -> dict[str, float]:
    found: dict[str, float] = {}
    for token, value in [*scored.top, (scored.id, scored.logprob or 0.0)]:
        text = token_text(token, tokenizer)
        found[text] = max(_number(value), found.get(text, LOWEST))
    return found


def _text_of(scored: Scored, tokenizer: Tokenizer) -> str:
    return token_text(scored.id, tokenizer) if scored.text is None else scored.text


def token_text(token: int, tokenizer: Tokenizer, prefix: str = "bytes:") -> str:
    """An id as text, a special id by its name. Bytes that are not UTF-8 are written in hexadecimal."""
    data = tokenizer.token_bytes(token)
    try:
        data.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in data)
    return tokenizer.decode_token(token)


def _entry(token: int, logprob: float | None, tokenizer: Tokenizer, text: str | None = None) -> dict[str, Any]:
    """text: the beginning of the id's text that counts, if not all of it."""
    if text is not None:
        return {"token": text, "logprob": _number(logprob), "bytes": list(text.encode())}
    data = tokenizer.token_bytes(token)
    return {"token": token_text(token, tokenizer, ""), "logprob": _number(logprob), "bytes": list(data)}


def _number(logprob: float | None) -> Any:
    return None if logprob is None else max(logprob, LOWEST)
