"""`python -m llama perplexity`: how well the model predicts text files."""

import math
import re
from json import dumps
from typing import Any, TypedDict

from llama.console import in_one_line
from llama.evaluate.scoring import check_bos, check_stride, rolling_loglikelihood, with_bos
from llama.files import as_path, read_text
from llama.generation import Llama
from llama.parallel.groups import broadcast_object, is_main_rank


class Perplexity(TypedDict):
    """nll: natural logarithm, summed over the `tokens` scored. The others: exp(nll / number), by tokens, by words (what
    white space divides, counted as lm-evaluation-harness does) and by UTF-8 bytes; None where no float holds it.
    bits_per_byte: nll / (bytes * ln 2)."""

    file: str
    tokens: int
    nll: float
    perplexity: float | None
    word_perplexity: float | None
    byte_perplexity: float | None
    bits_per_byte: float


HEADS = {"perplexity": "perplexity", "word_perplexity": "word", "byte_perplexity": "byte", "bits_per_byte": "bits/byte"}


def perplexity(
    files: list[str],
    *,
    ckpt_dir: str,
    stride: int | None = None,
    bos: bool | None = None,
    json: bool = False,
    tokenizer_path: str | None = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    compile: bool | str = "auto",
    plain: bool = False,
) -> None:
    """Score text files: perplexity by token, word and byte, and bits a byte.

    files: UTF-8 texts of any length, each scored by itself.
    ckpt_dir: folder with consolidated.NN.pth and params.json; the tokenizer is looked for in it and beside it.
    stride: a long text goes in windows of max_seq_len tokens; each window after the first scores so many new ones.
        Default is max_seq_len, the fastest; half of it gives every token at least that half as context.
    bos: whether BOS goes first; default is what the tokenizer does. Without it the first token is not scored.
    json: instead of a table, print an object for each file with the keys file, tokens (those scored), nll (their
        negative log-likelihood in nats, summed), perplexity, word_perplexity, byte_perplexity, bits_per_byte.
    max_batch_size: windows computed at a time.
    """
    check_bos(bos)
    check_stride(stride, max_seq_len)
    # Before the model is loaded, and where the files are: on rank 0's host.
    texts = [read_text(as_path(file)) for file in files] if is_main_rank() else []
    llama = Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        max_batch_size,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compile=compile,
        plain=plain,
    )
    texts = broadcast_object(texts)
    encoded = [llama.tokenizer.encode(text, bos=False, eos=False) for text in texts]
    for file, ids in zip(files, encoded, strict=True):
        if len(with_bos(llama.tokenizer, ids, bos)) < 2:
            raise ValueError(
                f"{file} is one token, and nothing comes before it to predict it from: --bos True puts BOS"
            )
    names = list(map(in_one_line, files))
    width = max(map(len, names))
    if is_main_rank() and not json:
        print("  ".join([f"{'file':<{width}}", f"{'tokens':>9}", *(f"{head:>10}" for head in HEADS.values())]))
    for file, name, text, ids in zip(files, names, texts, encoded, strict=True):
        result = score_text(llama, text, ids, file, stride, bos)
        if not is_main_rank():
            continue
        if json:
            print(dumps(result), flush=True)
        else:
            cells = [_shown(number) for key, number in result.items() if key in HEADS]
            print("  ".join([f"{name:<{width}}", f"{result['tokens']:>9,}", *cells]), flush=True)
    llama.close()


def score_text(
    llama: Llama, text: str, ids: list[int], file: str, stride: int | None = None, bos: bool | None = None
) -> Perplexity:
    """The perplexity of a text with its ids; `stride` and `bos` as in `rolling_loglikelihood`."""
    (loglikelihood,) = rolling_loglikelihood(llama, [ids], stride, bos=bos)
    tokens, size = len(with_bos(llama.tokenizer, ids, bos)) - 1, len(text.encode())
    return {
        "file": file,
        "tokens": tokens,
        "nll": -loglikelihood,
        "perplexity": _exp(-loglikelihood / tokens),
        "word_perplexity": _exp(-loglikelihood / len(re.split(r"\s+", text))),
        "byte_perplexity": _exp(-loglikelihood / size),
        "bits_per_byte": -loglikelihood / size / math.log(2),
    }


def _shown(number: Any) -> str:
    if number is None:
        return f"{'-':>10}"
    return f"{number:10.4f}" if number < 1e5 else f"{number:10.3e}"


def _exp(value: float) -> float | None:
    return math.exp(value) if value < math.log(1e308) else None
