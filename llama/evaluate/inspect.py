"""`python -m llama inspect`: a text token by token, with what the model expected in each place."""

import logging
import math
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from json import dumps
from pathlib import Path

import torch

from llama.engine.engine import Engine
from llama.engine.logprobs import log_norm, score
from llama.engine.requests import Alternatives, alternatives, check_alternatives, check_int, read_ids
from llama.engine.streaming import TextStream
from llama.evaluate.html_report import Alternative, Token, TokenReport, html_report, level, percent_text, shown, width
from llama.evaluate.scoring import Text, check_bos, measure_texts, with_bos
from llama.files import as_path, read_pipe
from llama.generation import Llama
from llama.parallel.groups import is_main_rank, raise_on_all_ranks
from llama.tokenizer import Tokenizer

log = logging.getLogger(__name__)

NOTHING = 'nothing to look at: give a text ("..."), or pipe one in'


def inspect(
    text: str | None = None,
    *,
    ckpt_dir: str,
    generate: int = 0,
    top: int = 5,
    json: bool = False,
    html: str | None = None,
    tokenizer_path: str | None = None,
    max_seq_len: int = 512,
    bos: bool | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    compile: bool | str = "auto",
    plain: bool = False,
) -> None:
    """Show a text token by token, with what the model expected in each place.

    A row has the token's position, id and piece, its log-probability (natural) and its probability in percent given the
    tokens before it, its rank among all ids (1 is the most probable), the entropy of their distribution in nats, the
    most probable id after it ("next"), and the most probable ones in its place ("expected here"). Nothing predicts the
    first token, unless BOS stands before it.

    text: what to look at, the one word that needs no flag; without it, what comes through a pipe, less one line break
        at its end.
    ckpt_dir: folder with consolidated.NN.pth and params.json; the tokenizer is looked for in it and beside it.
    generate: how many tokens to add, each the most probable one; fewer if the model ends there. They are marked: "+".
    top: how many of the most probable ids to show in each place; the table shows those that fit.
    json: instead of the table, one JSON object: {"text": the given one, "tokens": [{"position", "id", "piece", "text",
        "generated", "logprob", "percent", "rank", "entropy", "top": [{"id", "piece", "logprob", "percent"}], "next":
        one like those of "top"}], "next": a list like "top", after the last token}. The tokens' "text", joined, is
        the given and the generated text. Where nothing predicts a token there is null, and an empty "top".
    html: a file to write the same to as a page: the text, coloured by probability, the numbers of a token where it is
        pointed at or tapped.
    max_seq_len: room for the text and what is generated, in tokens.
    bos: whether BOS goes first, True or False; by default as the tokenizer has it.
    """
    if text == "" or (text is None and sys.stdin.isatty()):
        raise ValueError(NOTHING)
    check_int("generate", generate, 0)
    check_int("top", top, 1)
    check_bos(bos)
    if html == "":
        raise ValueError("--html names no file")
    if html is not None and is_main_rank():
        _check_writable(as_path(html))
    llama = Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        1,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compile=compile,
        plain=plain,
    )
    if text is None:
        text = read_pipe()
    given = llama.tokenizer.encode(text, bos=False, eos=False)
    if not given:
        raise ValueError(NOTHING)
    ids = with_bos(llama.tokenizer, given, bos)
    if (needed := len(ids) + generate) > max_seq_len:
        adding = f" and {generate} to generate" if generate else ""
        raise ValueError(
            f"the text has {len(ids)} tokens{adding}, but max_seq_len is {max_seq_len}: give --max_seq_len {needed}"
        )
    check_alternatives("top", top, 1, llama.model.params)
    ((added,), _) = llama.generate([ids], generate, temperature=0)
    look = inspect_tokens(llama, [*ids, *added], top, generated=len(added))
    with raise_on_all_ranks():
        if is_main_rank():
            if json:
                print(dumps({"text": text, **look}))
            else:
                coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
                print("\n".join(table(look, shutil.get_terminal_size((120, 24)).columns, coloured)))
                print(summary(look))
            if html is not None:
                content = html_report(look, Path(os.path.abspath(as_path(ckpt_dir))).name, summary(look))
                as_path(html).write_text(content, encoding="utf-8", newline="\n")
                log.info(f"{html}: {len(content.encode()) / 1000:,.1f} kB")
    llama.close()


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"--html {path} is a folder: name a file")
    if not path.parent.is_dir():
        raise ValueError(f"--html {path}: there is no folder {path.parent}")


# The numbers ------------------------------------------------------------------------------------------


def inspect_tokens(llama: Engine, ids: Sequence[int], top: int = 5, *, generated: int = 0) -> TokenReport:
    """{"tokens": a `html_report.Token` for each id, "next": what the model would say behind the last}.

        ids       t0      t1       t2
        numbers   none    t1|t0    t2|t0 t1
        next      ?|t0    ?|t0 t1  ?|t0 t1 t2

    The ids count as they are, without BOS unless they have it. top: how many alternatives in each place, 1 to the size
    of the vocabulary. generated: how many of the last ids to mark as generated.

    Under torchrun every rank makes the same call. Raises ValueError or TypeError for ids that are none, more than
    max_seq_len or outside the vocabulary, and for a `top` out of range.
    """
    check_alternatives("top", top, 1, llama.model.params)
    text = read_ids("the text", ids, llama.model.params)
    # What follows the last id is asked for too: 0 stands for it, and its own numbers are left out.
    (values,) = measure_texts(llama, [Text((*text, 0), 1)], partial(_measure, top=top))
    # In the place of each id, and behind the last.
    best = [[], *(_described(llama.tokenizer, alternatives(scores, top)[1]) for _, _, *scores in values)]
    tokens: list[Token] = []
    for i, (token, added) in enumerate(zip(text, _texts(llama.tokenizer, text), strict=True)):
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
    """Logits [n, vocab], ids [n] -> [n, 3 + 2 top]: rank, entropy, and what `score` gives. fp32 holds ranks below 2^24
    exactly."""
    rank = 1 + (logits > logits.gather(-1, targets[:, None])).sum(dim=-1, keepdim=True)
    logprobs = logits - log_norm(logits)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1, keepdim=True)
    return torch.cat((rank.float(), entropy, score(logits, targets, top)), dim=-1)


def _described(tokenizer: Tokenizer, best: Alternatives) -> list[Alternative]:
    return [
        {"id": token, "piece": tokenizer.decode_token(token), "logprob": logprob, "percent": 100 * math.exp(logprob)}
        for token, logprob in best
    ]


def _texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each id adds to the text of all."""
    stream, texts = TextStream(tokenizer), list[str]()
    for token in ids:
        stream.push(token)
        texts.append(stream.take())
        piece = tokenizer.decode_token(token)
        if len(texts) > 1 and piece and texts[-1].endswith(piece):  # before it comes what was held back
            texts[-2:] = [texts[-2] + texts[-1].removesuffix(piece), piece]
    stream.finish()
    texts[-1] += stream.take()
    return texts


# The table --------------------------------------------------------------------------------------------

HEADS = ["#", "id", "piece", "logprob      %   rank entropy", "next"]
PIECE, NUMBERS, NEXT = range(2, 5)
COLOURS = (32, 36, 33, 35, 31)  # of each level: green, cyan, yellow, magenta, red


def table(look: TokenReport, columns: int, coloured: bool) -> list[str]:
    """Lines of at most so many columns (if they are 80 or more), with as many of the alternatives as fit."""
    longest = columns // 8
    rows = [HEADS]
    for token in look["tokens"]:
        numbers = ""
        if token["percent"] is not None:
            numbers = f"{token['logprob']:7.2f} {percent_text(token['percent']):>6} {token['rank']:6} "
            numbers += f"{token['entropy']:7.2f}"
        position = "+" * token["generated"] + str(token["position"])
        piece, following = (_cut(shown(piece), longest) for piece in (token["piece"], token["next"]["piece"]))
        rows.append([position, str(token["id"]), piece, numbers, following])
    rows.append([str(len(look["tokens"])), "", "(next)", "", ""])
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    room = max(columns - sum(widths) - 2 * len(widths), 13)
    expected = ["expected here", *(_fitting(token["top"], room) for token in look["tokens"])]
    percents = [None, *(token["percent"] for token in look["tokens"]), None]
    lines = []
    for row, last, percent in zip(rows, [*expected, _fitting(look["next"], room)], percents, strict=True):
        cells = []
        for i, (cell, space) in enumerate(zip(row, widths, strict=True)):
            padding = " " * (space - width(cell))
            if coloured and percent is not None and i in (PIECE, NUMBERS):
                cell = f"\033[{COLOURS[level(percent)]}m{cell}\033[0m"
            cells.append(cell + padding if i in (PIECE, NEXT) else padding + cell)
        lines.append("  ".join([*cells, last]).rstrip())
    return lines


def _fitting(alternatives: list[Alternative], room: int) -> str:
    """The alternatives that fit, with whole percents; of the first one what fits."""
    line = ""
    for alternative in alternatives:
        percent = f"{alternative['percent']:.0f}%" if alternative["percent"] >= 0.5 else "<1%"
        piece = shown(alternative["piece"])
        if not line:
            line = f"{_cut(piece, room - len(percent) - 1)} {percent}"
        elif width(longer := f"{line}  {piece} {percent}") <= room:
            line = longer
        else:
            break
    return line


def _cut(text: str, longest: int) -> str:
    if width(text) <= longest:
        return text
    while width(text) > longest - 1:
        text = text[:-1]
    return f"{text}…"


def summary(look: TokenReport) -> str:
    """Tokens, the sum of their log-probabilities, and the perplexity of the given ones, in a line."""
    parts = []
    for generated, name in ((False, "token"), (True, "generated token")):
        tokens = [token for token in look["tokens"] if token["generated"] == generated]
        logprobs = [token["logprob"] for token in tokens if token["logprob"] is not None]
        if not tokens:
            continue
        part = f"{len(tokens)} {name}{'s' * (len(tokens) > 1)}"
        if logprobs:
            total = math.fsum(logprobs)
            part += f": log-probability {total:.3f}"
            if not generated:
                part += f", perplexity {math.exp(-total / len(logprobs)):,.2f}"
        parts.append(part)
    return "; ".join(parts)
