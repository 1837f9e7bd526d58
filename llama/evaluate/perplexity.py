"""Perplexity of a text: per token, word and byte."""

import math
import re
from collections.abc import Sequence
from typing import TypedDict

from llama.engine.engine import Engine
from llama.evaluate.scoring import rolling_loglikelihood, with_bos


class Perplexity(TypedDict):
    """How well a model predicts a text.

    tokens: the number of ids scored.
    nll: their negative log-likelihood, summed, in nats.
    perplexity, word_perplexity, byte_perplexity: exp(nll / number of tokens, words, UTF-8 bytes), or None if that
        overflows a float. Words are separated by white space and counted as in lm-evaluation-harness.
    bits_per_byte: nll / (bytes * ln 2).
    """

    file: str
    tokens: int
    nll: float
    perplexity: float | None
    word_perplexity: float | None
    byte_perplexity: float | None
    bits_per_byte: float


def score_text(
    llama: Engine, text: str, ids: Sequence[int], file: str, stride: int | None = None, bos: bool | None = None
) -> Perplexity:
    """The perplexity of a text.

    ids: the ids of the text, without BOS. At least two, or one if BOS is added, because the first is not scored.
    file: the name of the text, returned unchanged.
    stride, bos: as in `rolling_loglikelihood`.

    Raises ValueError or TypeError as `rolling_loglikelihood` does.
    """
    (loglikelihood,) = rolling_loglikelihood(llama, [ids], stride, bos=bos)
    n_tokens, n_bytes = len(with_bos(llama.tokenizer, list(ids), bos)) - 1, len(text.encode())
    return {
        "file": file,
        "tokens": n_tokens,
        "nll": -loglikelihood,
        "perplexity": _exp(-loglikelihood / n_tokens),
        "word_perplexity": _exp(-loglikelihood / len(re.split(r"\s+", text))),
        "byte_perplexity": _exp(-loglikelihood / n_bytes),
        "bits_per_byte": -loglikelihood / n_bytes / math.log(2),
    }


def _exp(value: float) -> float | None:
    return math.exp(value) if value < math.log(1e308) else None
