"""Tokenizers of GGUF files, a tiny one and the demo model's: the same token ids after conversion."""

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from golden.make_checkpoint import TOKENIZER
from helpers import formats
from helpers.paths import DEMO_GGUF, GOLDEN
from helpers.tiny_gguf import BYTE_CHARS, CONTROL_TOKENS, MERGES, SPACE, TOKENS, USER_TOKEN, VOCAB, write_gguf
from llama import Tokenizer
from llama.checkpoint.folder import Checkpoint
from llama.convert import convert

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class ReferenceTokenizer:
    """Byte-level BPE in plain Python: single digits, GPT-2's pattern on the rest, merges by rank. No special tokens."""

    PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

    def __init__(self, tokens: list[str], merges: list[tuple[str, str]]):
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.regex = pytest.importorskip("regex")

    def encode(self, text: str) -> list[int]:
        pieces = self.regex.findall(r"\p{N}|\P{N}+", text)
        words = [word for piece in pieces for word in self.regex.findall(self.PATTERN, piece)]
        return [self.ids[part] for word in words for part in self.merged(word)]

    def merged(self, word: str) -> list[str]:
        parts = [BYTE_CHARS[b] for b in word.encode()]
        while pairs := [pair for pair in pairwise(parts) if pair in self.ranks]:
            best, i = min(pairs, key=self.ranks.__getitem__), 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1
        return parts


def random_texts(count: int, tokens: list[str]) -> list[str]:
    """Seeded texts of letters, digits, spaces and any code point whose bytes the vocabulary has."""
    rng = random.Random(5)
    missing = {b for b, char in BYTE_CHARS.items() if char not in tokens}

    def character() -> str:
        while True:
            code = rng.choice((rng.randrange(0x80), rng.randrange(0x800), rng.randrange(0x110000)))
            char = rng.choice((" ", " ", "\n", "1", "2", "t", "he", "'ll", "é", "²", chr(code)))
            if not 0xD800 <= code < 0xE000 and not missing & set(char.encode()):
                return char

    return ["".join(character() for _ in range(rng.randrange(40))) for _ in range(count)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_gguf(folder / "m.gguf", {"tokenizer.chat_template": "{{ messages }}"})
    convert(folder / "m.gguf", folder / "out")
    return folder / "out"


def test_tiny_tokenizer(tiny: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert [tokenizer.id_to_token(i) for i in range(VOCAB)] == TOKENS
    assert tokenizer.get_vocab_size() == VOCAB
    reference = ReferenceTokenizer(TOKENS, MERGES)
    for text in [*random_texts(400, TOKENS), "a  1 12 the   12", " 12", "the the12²"]:
        ids = tokenizer.encode(text).ids
        assert ids == reference.encode(text), repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_added_tokens(tiny: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    added = {t.content: (i, t.special, t.normalized) for i, t in tokenizer.get_added_tokens_decoder().items()}
    assert added == {
        "<|endoftext|>": (0, True, False),
        "<|im_start|>": (1, True, False),
        "<|im_end|>": (2, True, False),
        "<tab>": (TOKENS.index("<tab>"), False, False),
    }
    ids = tokenizer.encode("t<|im_end|><tab>[PAD0]").ids
    assert ids[:3] == [TOKENS.index("t"), 2, TOKENS.index("<tab>")]
    assert len(ids) == 3 + len("[PAD0]")  # unused tokens are never encoded


def test_tokenizer_config(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    assert config == {
        "add_bos_token": False,  # llama.cpp's default for this pre-tokenizer
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": "{{ messages }}",
        "chat_format": None,  # no known format
    }
    more = {"tokenizer.ggml.padding_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}
    write_gguf(tmp_path / "m.gguf", {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None, **more})
    convert(tmp_path / "m.gguf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {
        "add_bos_token": True,
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_format": None,
    }


@pytest.mark.parametrize("pre", ["llama-bpe", "gpt-2"])
def test_other_byte_level_vocabularies(tmp_path: Path, pre: str) -> None:
    """The pre-tokenizers of Llama 3 and GPT-2, against tiktoken with the same ranks."""
    import tiktoken

    # "(t" is merged only if a pre-token may begin with "(", and no merge leads to "zq".
    tokens = [{"ll": "(t", SPACE + "1": "zq"}.get(token, token) for token in TOKENS]
    merges = [pair for pair in MERGES if "".join(pair) in tokens] + [("(", "t")]
    meta = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges]}
    write_gguf(tmp_path / "m.gguf", {"tokenizer.ggml.pre": pre, **meta})
    convert(tmp_path / "m.gguf", tmp_path / "out")
    ours = Tokenizer(tmp_path / "out" / "tokenizer.json")
    assert ours.adds_bos == (pre == "llama-bpe")  # llama.cpp's default
    byte_of = {char: byte for byte, char in BYTE_CHARS.items()}
    first = len(CONTROL_TOKENS)  # the ids of the bytes follow
    last = first + 256 + len(MERGES)
    ranks = {bytes(byte_of[char] for char in token): rank for rank, token in enumerate(tokens[first:last])}
    patterns = {"llama-bpe": LLAMA3_PATTERN, "gpt-2": ReferenceTokenizer.PATTERN}
    theirs = tiktoken.Encoding("theirs", pat_str=patterns[pre], mergeable_ranks=ranks, special_tokens={})
    for text in [*random_texts(500, TOKENS), "the 12 112 1122  1", "  t\n\n the'll LL'LL", "zq\nzq", "x(the (the"]:
        if pre == "gpt-2" and "zq" in text:
            continue  # tiktoken uses pre-tokens that are tokens without merges, GPT-2 does not
        text = text.replace(USER_TOKEN, "")
        assert ours.encode(text, bos=False, eos=False) == [first + i for i in theirs.encode_ordinary(text)], text


def test_sentencepiece_vocabulary(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The ids are those of the tokenizer.model that was written to GGUF. A base model, so without a chat format."""
    formats.write_gguf(checkpoint("mha"), tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out")
    ours, theirs = Tokenizer(tmp_path / "out" / "tokenizer.model"), Tokenizer(TOKENIZER)
    assert (ours.n_words, ours.bos_id, ours.eos_id, ours.pad_id) == (512, 1, 2, -1)
    assert ours.encode("a", bos=False, eos=False) == theirs.encode("a", bos=False, eos=False)
    assert ours.chat_format is None and ours.adds_bos and ours.special_ids == theirs.special_ids
    for text in random_texts(500, TOKENS):
        ids = ours.encode(text, bos=True, eos=True)
        assert ids == theirs.encode(text, bos=True, eos=True)
        assert ours.decode(ids) == theirs.decode(ids)


# The demo model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not DEMO_GGUF.exists():
        pytest.skip(f"{DEMO_GGUF.name} is not in checkpoints/: `make demo` fetches it")
    folder = tmp_path_factory.mktemp("demo") / "out"
    convert(DEMO_GGUF, folder, shards=3)
    return folder


@pytest.fixture(scope="module")
def demo_fields(demo: Path) -> dict[str, Any]:
    """The file's metadata, read without llama.convert."""
    return {key: field.contents() for key, field in gguf.GGUFReader(DEMO_GGUF).fields.items()}


def test_demo_folder(demo: Path) -> None:
    assert json.loads((demo / "params.json").read_text()) == {
        "dim": 576,
        "n_layers": 30,
        "n_heads": 9,
        "n_kv_heads": 3,
        "vocab_size": 49152,
        "multiple_of": 256,
        "norm_eps": 1e-05,
        "rope_theta": 100000.0,
    }
    checkpoint = Checkpoint(demo)
    assert [len(checkpoint[i]) for i in range(3)] == [272, 272, 272]
    size = sum(t.numel() * t.element_size() for t in checkpoint[0].values())
    assert (demo / "consolidated.00.pth").stat().st_size < size * 1.01


def test_demo_config(demo: Path, demo_fields: dict[str, Any]) -> None:
    config = json.loads((demo / "tokenizer_config.json").read_text())
    template = config.pop("chat_template")
    assert template == demo_fields["tokenizer.chat_template"]
    assert config == {
        "add_bos_token": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_format": "chatml",
        "default_system": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    }


def test_demo_golden_ids(demo: Path) -> None:
    golden = json.loads((GOLDEN / "smollm2.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(demo / "tokenizer.json"))
    texts = [(case["prompt"], case["prompt_tokens"]) for case in golden["completions"]]
    texts += [(case["rendered"], case["prompt_tokens"]) for case in golden["chats"]]
    assert len(texts) > 3
    for text, ids in texts:
        assert tokenizer.encode(text).ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_demo_tokenizer_against_reference(demo: Path, demo_fields: dict[str, Any]) -> None:
    tokens = demo_fields["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in demo_fields["tokenizer.ggml.merges"])]
    reference = ReferenceTokenizer(tokens, merges)
    tokenizer = tokenizers.Tokenizer.from_file(str(demo / "tokenizer.json"))
    for text in [*random_texts(300, tokens), "x =   12 + 3.14\n\n  7", "It's 1999's\t\tbest; 10000  ²½ Ⅷ 一二三 ١٢"]:
        ids = tokenizer.encode(text).ids
        assert ids == reference.encode(text), repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_demo_tokenizer_against_transformers(demo: Path) -> None:
    """transformers reads the same GGUF file with its own code.

    Unlike the pre-tokenizer "smollm", it does not split digits, so the texts have none.
    """
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(DEMO_GGUF.parent, gguf_file=DEMO_GGUF.name)
    ours = tokenizers.Tokenizer.from_file(str(demo / "tokenizer.json"))
    regex = pytest.importorskip("regex")
    tokens = [ours.id_to_token(i) for i in range(ours.get_vocab_size())]
    texts = [regex.sub(r"\p{N}", "", text) for text in random_texts(300, tokens)]
    for text in [*texts, "<|im_start|>user\nWho's there?<|im_end|>\n<|endoftext|>"]:
        assert ours.encode(text).ids == theirs.encode(text, add_special_tokens=False), repr(text)
