"""Read tiktoken ranks, the tokenizer.model of Llama 3."""

import base64
import re
from pathlib import Path

from llama.vocabulary.backend import TokenizerError

# Llama 3 splits a text with this pattern, and then merges bytes within each match.
LLAMA3_SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# Index after the ranks -> name of the special token. Indices without a name are reserved tokens.
LLAMA3_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
LLAMA31_SPECIAL = LLAMA3_SPECIAL | {
    4: "<|finetune_right_pad_id|>",
    5: "<|step_id|>",
    8: "<|eom_id|>",
    10: "<|python_tag|>",
    11: "<|image|>",
}
N_LLAMA3_SPECIAL = 256
RANKS_LIMIT = 16 * 2**20  # bytes of a rank file; Llama 3's has 2 MB
SPACES_LIMIT = 999_998  # characters; tiktoken's pattern matcher panics at longer runs of white space


class TiktokenBackend:
    """A `Backend` with a tiktoken Encoding. special: index after the ranks -> name. Raises TokenizerError."""

    chat_format: str | None = "llama3"
    adds_bos = True

    def __init__(self, path: Path, special: dict[int, str]):
        tokens = read_ranks(path)
        try:
            from tiktoken import Encoding
        except ImportError:
            raise TokenizerError(f"{path} needs the tiktoken package: pip install 'llama-runner[convert]'") from None
        ranks = {token: rank for rank, token in enumerate(tokens)}
        reserved = iter(range(N_LLAMA3_SPECIAL))
        names = [special.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(N_LLAMA3_SPECIAL)]
        self.special_ids = {name: len(ranks) + i for i, name in enumerate(names)}
        # `encode` below ignores special tokens. The Encoding has them for programs that use it directly.
        self.model = Encoding(path.name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=self.special_ids)
        self.bytes = [*tokens, *(name.encode() for name in names)]  # of each id
        self.n_words = len(self.bytes)
        self.bos_id = self.special_ids["<|begin_of_text|>"]
        self.eos_id = self.special_ids["<|end_of_text|>"]
        self.pad_id = self.unk_id = -1
        self.unsettled_ids: set[int] = set()
        self.rstrip_ids: set[int] = set()

    def normalize(self, s: str) -> str:
        return s

    def encode(self, s: str) -> list[int]:
        if len(s) > SPACES_LIMIT and (longest := max(map(len, re.findall(r"\s+", s)), default=0)) > SPACES_LIMIT:
            raise ValueError(
                f"the text holds {longest:,} white-space characters in a row, tiktoken's limit is {SPACES_LIMIT:,}: "
                "shorten them"
            )
        return self.model.encode_ordinary(s)

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.bytes[i] for i in ids).decode(errors="replace")

    def piece(self, token: int) -> str:
        return self.decode([token])

    def token_bytes(self, token: int) -> bytes:
        return self.bytes[token]

    def find(self, piece: str) -> int | None:
        return self.special_ids.get(piece)


def read_ranks(path: Path) -> list[bytes]:
    """Read the tokens of a tiktoken file, whose lines are "base64 rank", and return them in the order of their ranks.

    Raises TokenizerError for a file that is too large or damaged.
    """
    if (size := path.stat().st_size) > RANKS_LIMIT:
        raise TokenizerError(f"{path} has {size:,} bytes, expected {RANKS_LIMIT:,} at most: fetch it again")
    ranks: dict[bytes, int] = {}
    for n, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if not token or not rank.isdigit():
                raise ValueError
            ranks[token] = int(rank)
        except ValueError:
            raise TokenizerError(
                f"{path}, line {n}: {str(line[:60])[1:]}, expected a token in base64 and its rank, fetch the file again"
            ) from None
        if len(ranks) < n:
            raise TokenizerError(f"{path}, line {n}: a second rank for the token {token!r}, fetch the file again")
    tokens = sorted(ranks, key=ranks.__getitem__)
    for i, token in enumerate(tokens):
        if (rank_found := ranks[token]) != i:
            fault = f"rank {rank_found} twice" if rank_found < i else f"no rank {i}"
            raise TokenizerError(f"{path} has {fault} in {len(tokens):,} lines, fetch it again")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise TokenizerError(f"{path} has no rank for the byte 0x{missing[0]:02X}, fetch it again")
    return tokens
