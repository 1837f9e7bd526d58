"""Measure a text token by token, with the model's predictions at each position, for `llama inspect`."""

import math
from collections.abc import Sequence
from functools import partial
from typing import TypedDict

import torch

from llama.engine.engine import Engine
from llama.engine.logprobs import log_norm, score
from llama.engine.requests import Alternatives, alternatives, check_alternatives, read_ids
from llama.engine.streaming import TextStream
from llama.evaluate.scoring import Text, measure_texts
from llama.tokenizer import Tokenizer


class Alternative(TypedDict):
    """One of the most probable ids at a position.

    piece: the id as readable text. logprob: natural logarithm. percent: 100 * exp(logprob).
    """

    id: int
    piece: str
    logprob: float
    percent: float


class Token(TypedDict):
    """One id of a text, measured in the distribution that the model predicts from the ids before it.

    position: from 0.
    piece: the id as readable text, special ids by name.
    text: what the id adds to the decoded text. The texts of all tokens joined are the decoded text. A character that is
        encoded as several ids is in the text of the last one.
    generated: whether the model generated the id.
    logprob: natural log-probability of the id. percent: 100 * exp(logprob).
    rank: 1 for the most probable id. Ids of equal probability have the same rank.
    entropy: of the distribution, in nats.
    top: the most probable ids at this position, best first.
    next: the most probable id at the position after it.

    The first token has no context: its logprob, percent, rank and entropy are None, and its top is empty.
    """

    position: int
    id: int
    piece: str
    text: str
    generated: bool
    logprob: float | None
    percent: float | None
    rank: int | None
    entropy: float | None
    top: list[Alternative]
    next: Alternative


class TokenReport(TypedDict):
    """tokens: one for each id. next: the most probable ids after the last one, best first."""

    tokens: list[Token]
    next: list[Alternative]


def inspect_tokens(llama: Engine, ids: Sequence[int], top: int = 5, *, generated: int = 0) -> TokenReport:
    """Measure each id of a text, in one forward pass.

        ids       t0      t1       t2
        numbers   none    t1|t0    t2|t0 t1
        next      ?|t0    ?|t0 t1  ?|t0 t1 t2

    ids: 1 to max_seq_len ids. BOS is not added.
    top: the number of alternatives at each position, 1 to the size of the vocabulary.
    generated: how many ids at the end are marked as generated.

    Under torchrun every rank makes the same call. Raises ValueError or TypeError for ids that are empty, too many or
    outside the vocabulary, and for a `top` out of range.
    """
    check_alternatives("top", top, 1, llama.model.params)
    text = read_ids("the text", ids, llama.model.params)
    # Append a placeholder id, so that the prediction after the last id is returned too.
    (values,) = measure_texts(llama, [Text((*text, 0), 1)], partial(_measure, top=top))
    # The alternatives at each position and after the last one. The first has none.
    best = [[], *(_alternatives(llama.tokenizer, alternatives(scores, top)[1]) for _, _, *scores in values)]
    tokens: list[Token] = []
    for i, (token, added) in enumerate(zip(text, token_texts(llama.tokenizer, text), strict=True)):
        rank, entropy, logprob = values[i - 1][:3] if i else (None, None, None)
        tokens.append(
            {
                "position": i,
                "id": token,
                "piece": llama.tokenizer.decode_token(token),
                "text": added,
                "generated": i >= len(text) - generated,
                "logprob": logprob,
                "percent": None if logprob is None else 100 * math.exp(logprob),
                "rank": None if rank is None else int(rank),
                "entropy": entropy,
                "top": best[i],
                "next": best[i + 1][0],
            }
        )
    return {"tokens": tokens, "next": best[-1]}


def _measure(logits: torch.Tensor, targets: torch.Tensor, top: int) -> torch.Tensor:
    """Logits [n, vocab], ids [n] -> [n, 3 + 2 * top]: rank, entropy, and the columns of `score`.

    Ranks are exact in fp32 below 2^24.
    """
    rank = 1 + (logits > logits.gather(-1, targets[:, None])).sum(dim=-1, keepdim=True)
    logprobs = logits - log_norm(logits)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1, keepdim=True)
    return torch.cat((rank.float(), entropy, score(logits, targets, top)), dim=-1)


def _alternatives(tokenizer: Tokenizer, best: Alternatives) -> list[Alternative]:
    return [
        {"id": token, "piece": tokenizer.decode_token(token), "logprob": logprob, "percent": 100 * math.exp(logprob)}
        for token, logprob in best
    ]


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each id adds to the decoded text. Joined, they are `tokenizer.decode(ids)`."""
    stream, texts = TextStream(tokenizer), list[str]()
    for token in ids:
        stream.push(token)
        texts.append(stream.take())
        piece = tokenizer.decode_token(token)
        if len(texts) > 1 and piece and texts[-1].endswith(piece):
            # The stream held back the text of earlier ids. Give it to the previous id.
            texts[-2:] = [texts[-2] + texts[-1].removesuffix(piece), piece]
    stream.finish()
    texts[-1] += stream.take()
    return texts
