"""Vocabularies with Code Llama's pieces, of 512 ids as the seeded checkpoints have."""

from pathlib import Path

from make_checkpoint import TOKENIZER
from sentencepiece import SentencePieceProcessor

from llama.convert.vocab import NORMAL, USER_DEFINED, _pieces, sentencepiece_model

INFILLING = ["\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>", "\u2581<EOT>"]  # ids 508 to 511


def write_infilling(path: Path) -> Path:
    """tok512 with the infilling pieces in place of its last four."""
    pieces = _pieces(TOKENIZER.read_bytes())[:-4] + [(name, -1000.0 - i, NORMAL) for i, name in enumerate(INFILLING)]
    path.write_bytes(sentencepiece_model(pieces))
    return path


def write_step(path: Path, source: Path = TOKENIZER, extra: int = 0, dummy_prefix: bool = False) -> Path:
    """A vocabulary whose last id is <step>, in place of the source's last or behind `extra` - 1 other new pieces. Code
    Llama 70B's puts no space before a text."""
    pieces = _pieces(source.read_bytes())
    pieces = pieces + [(f"<new{i}>", -1e6, NORMAL) for i in range(extra - 1)] if extra else pieces[:-1]
    path.write_bytes(sentencepiece_model([*pieces, ("<step>", 0.0, USER_DEFINED)], add_dummy_prefix=dummy_prefix))
    return path


def plain(path: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(path))
