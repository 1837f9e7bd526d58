"""Small vocabularies of every kind, and texts to encode with them."""

import base64
import json
import random
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from golden.make_checkpoint import TOKENIZER
from llama import Tokenizer
from llama.convert.vocab import NORMAL, USER_DEFINED, read_pieces, sentencepiece_model
from llama.engine.streaming import TextStream

INFILLING = ["\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>", "\u2581<EOT>"]  # ids 508 to 511

ALPHABETS = [  # characters that tokenizers treat differently
    " ab\n\t\r",
    "etaoinshrdlu ,.'",
    "0123456789.,- ",
    "'sStTlLdDmMvVeErR \u017f",
    "".join(map(chr, range(160))),
    "\x85\xa0\u200b\u200d\u2028\u3000\ufeff\ufffd A",
    "👩\u200d👧🏳\ufe0f🌈😀❤🇩🇪 ab",
    "éàßğşñ ÉÀ ЖжЩ αβγ שלום مرحبا",
    "漢字かなカナ한국어 नमस्ते ",
    "<s></s><|begin_of_text|>[INST]<0x0A>",
]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Short texts. Each has runs of characters of one alphabet, random characters of one, or any characters."""
    rng = random.Random(seed)
    texts = []
    for i in range(count):
        alphabet = ALPHABETS[i % len(ALPHABETS)]
        if i % 3 == 0:
            texts.append("".join(rng.choice(alphabet) * rng.randint(1, 40) for _ in range(rng.randint(0, 5))))
        elif i % 3 == 1:
            texts.append("".join(rng.choices(alphabet, k=rng.randint(0, 50))))
        else:
            codes = [rng.choice([rng.randint(0, 0xD7FF), rng.randint(0xE000, 0x10FFFF)]) for _ in range(20)]
            texts.append("".join(chr(code) + rng.choice(["", " ", "a"]) for code in codes))
    return texts


def write_infilling(path: Path) -> Path:
    """Write tok512 with its last four pieces replaced by the infilling pieces."""
    pieces = read_pieces(TOKENIZER.read_bytes())[:-4] + [
        (name, -1000.0 - i, NORMAL) for i, name in enumerate(INFILLING)
    ]
    path.write_bytes(sentencepiece_model(pieces))
    return path


def write_step(path: Path, source: Path = TOKENIZER, extra: int = 0, dummy_prefix: bool = False) -> Path:
    """Write a vocabulary whose last id is <step>, like Code Llama 70B's.

    extra: how many pieces to append to the source, <step> included. If 0, <step> replaces the source's last piece.
    dummy_prefix: whether a space is added before texts. Code Llama 70B's vocabulary adds none.
    """
    pieces = read_pieces(source.read_bytes())
    pieces = pieces + [(f"<new{i}>", -1e6, NORMAL) for i in range(extra - 1)] if extra else pieces[:-1]
    path.write_bytes(sentencepiece_model([*pieces, ("<step>", 0.0, USER_DEFINED)], add_dummy_prefix=dummy_prefix))
    return path


def plain(path: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(path))


def write_ranks(path: Path, *tokens: bytes) -> Path:
    """Write a rank file of all bytes, in descending order, and then these tokens."""
    all_tokens = [*(bytes([byte]) for byte in reversed(range(256))), *tokens]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(all_tokens)))
    return path


def byte_fallback_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer.json like Hugging Face's of Llama 2: 256 bytes, and pieces with U+2581 for spaces."""
    from tokenizers import Tokenizer as Writer
    from tokenizers import decoders, models

    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", "\u2581a", "a", "b", "\u2581\u2581", "é", "\ufffd"]
    writer = Writer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    space = decoders.Replace("\u2581", " ")
    writer.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    writer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return Tokenizer(folder / "tokenizer.json")


def write_byte_level_json(folder: Path) -> Path:
    """A byte-level tokenizer.json with ChatML's special tokens: ids 0 to 255 are bytes, then three special tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Writer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer = Writer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    writer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    writer.decoder = decoders.ByteLevel()
    writer.add_special_tokens([AddedToken(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    writer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": False}
    config |= {"chat_format": "chatml", "default_system": "Be brief."}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def streamed_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids, decoded by a TextStream."""
    stream, pieces = TextStream(tokenizer), []
    for token in ids:
        stream.push(token)
        pieces.append(stream.take())
    stream.finish()
    return "".join([*pieces, stream.take()])
