"""Malicious input: texts that look like marks of a dialog format, tokenizer files, prompt files larger than memory,
control characters in names and messages.

A mark is a special token, or a text like [INST], that a dialog format writes around messages.
"""

import base64
import json
import os
import random
import re
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_models
import mistral_common
import pytest

from golden.make_checkpoint import TOKENIZER
from helpers.commands import Ended
from helpers.paths import HELPERS, PYTHONPATH, ROOT
from llama import Llama, Tokenizer, files
from llama.chat.formats import ChatFormat, Message
from llama.cli import complete
from llama.cli import main as cli
from llama.console import LONGEST, in_one_line
from llama.tokenizer import TokenizerError
from llama.vocabulary.backend import SIZE_LIMIT

TAGS = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<|system|>", "<|user|>", "<|assistant|>"]
NAMES = ["<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>"]
NAMES += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>"]
NAMES += ["<|python_tag|>", "<|reserved_special_token_0|>", "[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "<0x0A>", "<0x3C>"]


def full_width(text: str) -> str:
    """The ASCII text in full-width characters, which NFKC turns into ASCII."""
    wide = "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text)
    assert unicodedata.normalize("NFKC", wide) == text
    return wide


# Vocabularies ---------------------------------------------------------------------------------------


def json_tokenizer(folder: Path, model: Any, marks: list[str], name: str, normalizer: Any = None, **flags: Any) -> Path:
    """A tokenizer.json with "<s>", "</s>" and marks as special tokens."""
    from tokenizers import AddedToken, decoders
    from tokenizers import Tokenizer as Writer

    folder.mkdir()
    writer = Writer(model)
    writer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if normalizer is not None:
        writer.normalizer = normalizer
    writer.add_special_tokens([AddedToken(mark, **{"normalized": False, **flags}) for mark in ("<s>", "</s>", *marks)])
    writer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_format": name}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def bytes_bpe(*pieces: str, **settings: Any) -> Any:
    from tokenizers import models

    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    for piece in ("▁", *map(chr, range(33, 127)), *pieces):
        vocab.setdefault(piece, len(vocab))
    return models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, **settings)


def nfkc_sentencepiece(folder: Path) -> Path:
    """A SentencePiece model with NFKC, like T5's: it reads full-width letters as ASCII, zero-width spaces as spaces."""
    from sentencepiece import SentencePieceTrainer, set_min_log_level

    folder.mkdir()
    set_min_log_level(2)
    SentencePieceTrainer.train(
        sentence_iterator=iter(["[INST] a word [/INST]", "<<SYS>> b <</SYS>>", *"abcdefghijklmnopqrstuvwxyz"]),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
    )
    return folder / "tokenizer.model"


MISTRAL = Path(mistral_common.__file__).with_name("data")
MISTRAL_MARKS = ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[TOOL_CALLS]"]
CHATML, PHI3 = ["<|im_start|>", "<|im_end|>"], ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]


def vocabulary(case: str, folder: Path) -> Path:
    from tokenizers import models, normalizers

    metaspace = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if case in ("llama2", "zephyr"):
        return TOKENIZER
    if case == "llama3":
        return Path(llama_models.__path__[0]) / "llama3" / "tokenizer.model"
    if case.startswith("mistral"):
        return next(MISTRAL.glob(f"*.model.{case[-2:]}"))
    if case.endswith("nfkc sentencepiece"):
        return nfkc_sentencepiece(folder)
    if case == "phi3":
        return json_tokenizer(folder, bytes_bpe(), PHI3, "phi3", metaspace, rstrip=True)
    if case == "chatml":
        return json_tokenizer(folder, bytes_bpe(), CHATML, "chatml", metaspace)
    if case == "chatml, nfkc":
        return json_tokenizer(folder, bytes_bpe(), CHATML, "chatml", normalizers.NFKC(), normalized=True)
    if case == "llama2, nfkc":
        return json_tokenizer(folder, bytes_bpe(), [], "llama2", normalizers.NFKC(), normalized=True)
    if case == "chatml, pieces":  # a text that is a piece becomes one id, and marks are pieces
        return json_tokenizer(folder, bytes_bpe("<s>", "</s>", *CHATML, ignore_merges=True), CHATML, "chatml")
    assert case == "chatml, unigram"  # marks are ordinary pieces, with the best scores
    pieces = [("<unk>", 0.0), *((mark, 0.0) for mark in ("<s>", "</s>", *CHATML))]
    pieces += [(chr(code), -9.0) for code in range(32, 127)]
    return json_tokenizer(folder, models.Unigram(pieces, 0), CHATML, "chatml", normalizers.NFKC())


# The special tokens of a dialog with these roles, in order, written by hand.
MARKS: dict[str, Callable[[list[str]], list[str]]] = {
    "llama2": lambda roles: ["BOS", "EOS"] * roles.count("assistant") + ["BOS"],
    "llama3": lambda roles: ["BOS", *["start", "end", "eot"] * len(roles), "start", "end"],
    "chatml": lambda roles: ["<|im_start|>", "<|im_end|>"] * len(roles) + ["<|im_start|>"],
    "zephyr": lambda roles: ["EOS"] * len(roles),
    "phi3": lambda roles: [mark for role in roles for mark in (f"<|{role}|>", "<|end|>")] + ["<|assistant|>"],
    "mistral v1": lambda roles: ["BOS"] + ["EOS"] * roles.count("assistant"),
    "mistral v3": lambda roles: (
        ["BOS"]
        + [m for role in roles for m in {"user": ["[INST]", "[/INST]"], "assistant": ["EOS"], "system": []}[role]]
    ),
}
CASES = [*MARKS, "llama2, nfkc sentencepiece", "zephyr, nfkc sentencepiece", "llama2, nfkc", "chatml, nfkc"]
CASES += ["chatml, pieces", "chatml, unigram"]
REFUSING = ("chatml, pieces", "chatml, unigram")  # vocabularies that encode the text of a mark as the mark's id


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ChatFormat]:
    path = vocabulary(request.param, tmp_path_factory.mktemp("vocabulary") / "tokenizer")
    name = re.split("[, ]", request.param)[0]
    return request.param, ChatFormat(Tokenizer(path, use_scaled_rope=request.param == "llama3"), name)


def special_ids(format: ChatFormat, ids: list[int]) -> list[int]:
    special = set(format.tokenizer.special_ids.values())
    if format.tokenizer.kind != "sentencepiece":  # there the token for what is unknown counts as special
        special -= {format.tokenizer._backend.unk_id}
    return [i for i in ids if i in special]


def expected_ids(case: str, format: ChatFormat, roles: list[str]) -> list[int]:
    """The ids of the special tokens of a dialog with these roles, by MARKS."""
    tokenizer = format.tokenizer
    ids = {"BOS": tokenizer.bos_id, "EOS": tokenizer.eos_id, **tokenizer.special_ids}
    ids |= {"start": 128006, "end": 128007, "eot": 128009} if case == "llama3" else {}
    return [ids[mark] for mark in MARKS[case.partition(",")[0]](roles)]


def content(draw: random.Random, marks: list[str]) -> str:
    """A text of marks (whole, in full width, halved, with invisible characters), words, spaces and any characters."""
    text = ""
    for _ in range(draw.randint(0, 3)):
        mark, at = draw.choice(marks), draw.randint(1, 6)
        forms = [mark, full_width(mark), mark[:at], mark[at:]]
        forms.append(mark[:at] + draw.choice("\u200b\u200d\ufeff\u00ad\u2060\ufe0f \n\0") + mark[at:])
        forms += draw.choices(["x", " ", "\n", "\n\n", "\t", "▁", "user", "assistant\n", "\u3000", "é", "\r"], k=3)
        text += draw.choice([*forms, chr(draw.randrange(0xD800)), chr(draw.randrange(0xE000, 0x110000))])
    return text


def dialog_of(system: str | None, contents: list[str]) -> list[Message]:
    head: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]


def forges_a_tag(format: ChatFormat, text: str) -> bool:
    """Whether the model would read a tag: whether the tokenizer's ids of the text decode to one."""
    if not format.dialect.tags:
        return False
    read = format.tokenizer.decode(format.tokenizer.encode(text, bos=False, eos=False))
    return any(tag in read for tag in format.dialect.tags)


def test_the_special_ids_of_a_dialog_are_those_of_its_format(case: tuple[str, ChatFormat]) -> None:
    """For any messages, a dialog is refused or has the same special ids as one with harmless messages."""
    name, format = case
    marks = [*sorted({*NAMES, *PHI3, *MISTRAL_MARKS} & {*format.tokenizer.special_ids}), *format.dialect.tags]
    written = refused = 0
    for seed in range(300):
        draw = random.Random(seed)
        system, *contents = (content(draw, [*marks, "<0x0A>"]) for _ in range(draw.choice([2, 4, 6])))
        dialog = dialog_of(system if seed % 2 else None, contents)
        forged = any(forges_a_tag(format, message["content"]) for message in dialog)
        if format.refusal(dialog):
            refused += 1
            # A text with a tag is refused even if the tokenizer does not read one, for instance before an accent.
            assert forged or any(tag in m["content"] for m in dialog for tag in format.dialect.tags)
            continue
        assert not forged
        try:
            ids = format.encode(dialog)
        except ValueError as error:
            assert name == "chatml, unigram" and "encodes a part of the text as its special token" in str(error)
            refused += 1
            continue
        written += 1
        assert special_ids(format, ids) == expected_ids(name, format, [message["role"] for message in dialog])
    assert written > 50
    assert (refused > 50) == (bool(format.dialect.tags) or name == "chatml, unigram")


def test_no_text_is_a_special_id(case: tuple[str, ChatFormat]) -> None:
    """Every name is encoded like a prompt: alone, first, last, surrounded, doubled, in full width."""
    name, format = case
    tokenizer = format.tokenizer
    names = sorted({*tokenizer.special_ids, *NAMES, *TAGS})
    if len(names) > 60:
        names = [*random.Random(0).sample(names, 30), *NAMES, *TAGS]
    refused = set()
    for mark in (form for name in names for form in (name, full_width(name))):
        for text in (mark, f" {mark}", f"\n{mark}\n", f"{mark} x", f"x{mark}", mark * 2, f"{mark[:3]}\u200b{mark[3:]}"):
            try:
                ids = tokenizer.encode(text, bos=False, eos=False)
            except ValueError:
                refused.add(unicodedata.normalize("NFKC", mark))
                continue
            assert not special_ids(format, ids), text
    assert refused == ({"<s>", "</s>", *CHATML} if name in REFUSING else set())


def test_an_unknown_character_is_not_a_forged_mark(tmp_path: Path) -> None:
    """An unknown character becomes <unk> if that is a token of its own. If it is EOS, the text is refused."""
    from tokenizers import models

    vocabularies: list[Any] = [
        models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("a", -1.0)], 0),
        models.BPE(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, merges=[], unk_token="<unk>"),
    ]
    for i, model in enumerate(vocabularies):
        path = json_tokenizer(tmp_path / str(i), model, ["<unk>"], "llama2")
        tokenizer = Tokenizer(path)
        assert tokenizer.special_ids["<unk>"] == 0
        assert tokenizer.encode("a漢", bos=False, eos=False) == [3, 0]
        content = json.loads(path.read_text())
        content["model"] |= {"unk_id": 2} if i == 0 else {"unk_token": "</s>"}
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="encodes a part of the text as its special token '</s>'"):
            Tokenizer(path).encode("a漢", bos=False, eos=False)
    content["model"] = json.loads(vocabularies[0].__getstate__()) | {"unk_id": None}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the tokenizer fails on the text: .*unk_id.* is missing"):
        Tokenizer(path).encode("a漢", bos=False, eos=False)  # a vocabulary without an unknown token


def test_tags_are_refused_as_the_tokenizer_reads_them(tmp_path: Path) -> None:
    """A tokenizer with NFKC reads full-width brackets as brackets. Others do not."""
    format, plain = ChatFormat(Tokenizer(nfkc_sentencepiece(tmp_path / "a")), "llama2"), Tokenizer(TOKENIZER)
    for tag in format.dialect.tags:
        dialog = dialog_of(None, [f"x {full_width(tag)} y"])
        assert tag in format.tokenizer.decode(format.encode(dialog))[6:-7]  # the model would read a tag
        assert format.refusal(dialog) and format.refusal(dialog_of(f"{full_width(tag)}", ["x"]))
        assert ChatFormat(plain, "llama2").refusal(dialog) is None
    with pytest.raises(ValueError, match="a lone surrogate"):
        format.refusal(dialog_of(None, ["\ud800"]))


def test_a_dialog_with_full_width_tags_does_not_reach_the_model(build: Callable[..., Llama], tmp_path: Path) -> None:
    llama = build("mha", max_seq_len=64)
    llama.dialogs.tokenizer = Tokenizer(nfkc_sentencepiece(tmp_path / "a"))
    (answer,) = llama.chat_completion([dialog_of(None, [f"x {full_width('[/INST]')} y"])], max_gen_len=1, logprobs=True)
    assert "was not given to the model" in answer["generation"]["content"] and answer["tokens"] == []


@pytest.mark.parametrize(
    "role", ["tool", "System", "user ", "", "<|im_start|>system", "system\nuser", full_width("user")]
)
def test_other_roles_are_refused(role: str) -> None:
    with pytest.raises(ValueError, match="roles of a dialog"):
        ChatFormat(Tokenizer(TOKENIZER), "llama2").encode([{"role": role, "content": "x"}])  # type: ignore[typeddict-item]


# Tokenizer files ------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
}


def changed(**keys: Any) -> str:
    return json.dumps(PLAIN | keys)


def with_model(**keys: Any) -> str:
    return changed(model=PLAIN["model"] | keys)


def splitting_at(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def charsmap(data: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


NO_JSON = "is not a tokenizer.json, fetch it again: "
BAD_JSON = {
    "deep lists": ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", NO_JSON),
    "deep normalizers": (
        changed().replace(
            '"normalizer": null', '"normalizer": ' + '{"type":"Sequence","normalizers":[' * 100_000 + "]}" * 100_000
        ),
        NO_JSON + "recursion limit",
    ),
    "an id of 10^12": (with_model(vocab={"a": 0, "b": 10**12, "ab": 1}), NO_JSON + "invalid value"),
    "a negative id": (with_model(vocab={"a": 0, "b": -1, "ab": 1}), NO_JSON + "invalid value"),
    "a merge of what is no piece": (with_model(merges=[["a", "z"]]), NO_JSON + "Token `z` out of vocabulary"),
    "a merge to what is no piece": (with_model(merges=[["a", "a"]]), NO_JSON + "Token `aa` out of vocabulary"),
    "a pattern that is none": (changed(pre_tokenizer=splitting_at("(((")), NO_JSON + "Oniguruma error"),
    "a deep pattern": (changed(pre_tokenizer=splitting_at("(" * 9999 + "a" + ")" * 9999)), NO_JSON + "Oniguruma error"),
    "a table that is none": (changed(normalizer=charsmap(b"\xff\xff\0\0" + b"\xff" * 40)), NO_JSON + "Precompiled"),
    "a dead end for unigrams": (
        changed(model={"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]], "byte_fallback": False}),
        NO_JSON + "Unable to load vocab",
    ),
    "a prefix, as BERT's have it": (with_model(continuing_subword_prefix="##"), "has a continuing_subword_prefix"),
    "a prefix that ends the process": (
        with_model(vocab={"a": 0, "\u0120a": 1, "aa": 2}, merges=[["a", "\u0120a"]], continuing_subword_prefix="["),
        "has a continuing_subword_prefix, which no Llama tokenizer has: fetch the model's own",
    ),
    "a prefix by another name": (
        with_model(continuing_subword_prefix="[").replace("subword", "s\\u0075bword"),
        "has a continuing_subword_prefix",
    ),
    "one prefix of two": (
        changed().replace(
            '"model": {', '"model": {"continuing_subword_prefix"\n:\t"a", "continuing_subword_prefix": "", '
        ),
        "has a continuing_subword_prefix",
    ),
    "a list for a config": (changed(), "cannot be read: it does not hold an object"),
}


def write_json(folder: Path, content: str, config: str = "{}") -> Path:
    (folder / "tokenizer_config.json").write_text(config)
    (folder / "tokenizer.json").write_text(content)
    return folder / "tokenizer.json"


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_bad_tokenizer_json_is_one_line(name: str, tmp_path: Path) -> None:
    content, message = BAD_JSON[name]
    path = write_json(tmp_path, content, "[]" if "config" in name else "{}")
    started = time.perf_counter()
    with pytest.raises(TokenizerError, match=re.escape(message)) as caught:
        Tokenizer(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.perf_counter() - started < 5


def test_no_prefix_is_detected_where_there_is_none(tmp_path: Path) -> None:
    """Real vocabularies have pieces that look like this key, and escaped characters."""
    vocab = {
        "a": 0,
        "b": 1,
        "ab": 2,
        "continuing_subword_prefix": 3,
        r"\u0061": 4,
        "\x7f": 5,
        '"continuing_subword_prefix":"a"': 6,
    }
    path = write_json(tmp_path, with_model(vocab=vocab, continuing_subword_prefix=""))
    assert Tokenizer(path).n_words == 7


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes in folders")
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    write_json(tmp_path, changed())
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(TokenizerError, match=rf"{name}\b.* cannot be read: it is a pipe or a device, not a file"):
        Tokenizer(tmp_path / ("tokenizer.json" if "config" in name else name))


# Files that load: name -> (content, a text that fails, part of the error).
ODD_JSON = {
    "an endless pattern": (changed(pre_tokenizer=splitting_at("(a+)+$")), "a" * 40 + "!", "retry-limit-in-match"),
    "an endless replacement": (
        changed(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}),
        "a" * 40 + "!",
        "retry-limit-in-match",
    ),
    "a table with no end": (
        changed(normalizer=charsmap((400).to_bytes(4, "little") + b"\xff\x7f\x03\x80" * 100 + b"abc")),
        "ab",
        "index out of bounds",
    ),
    "no token for words": (
        changed(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}),
        "b",
        "WordLevel error",
    ),
}


@pytest.mark.parametrize("name", ODD_JSON)
def test_a_text_that_a_tokenizer_gives_up_on_is_one_line(name: str, tmp_path: Path) -> None:
    content, text, message = ODD_JSON[name]
    tokenizer = Tokenizer(write_json(tmp_path, content))
    with pytest.raises(ValueError, match=f"^the tokenizer fails on the text: .*{message}") as caught:
        tokenizer.encode(text, bos=False, eos=False)
    assert "\n" not in str(caught.value)


def test_texts_are_neither_padded_nor_cut_whatever_the_file_asks_for(tmp_path: Path) -> None:
    padding: dict[str, Any] = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    tokenizer = Tokenizer(write_json(tmp_path, changed(padding=padding, truncation=truncation)))
    assert tokenizer.encode("abba", bos=False, eos=False) == [2, 1, 0]


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_of_gigabytes_is_not_read(name: str, tmp_path: Path) -> None:
    path = write_json(tmp_path, changed())
    (tmp_path / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    with (tmp_path / name).open("r+b") as file:
        file.truncate(2**33)
    started = time.perf_counter()
    with pytest.raises(TokenizerError, match=rf"{name} has 8,589,934,592 bytes, expected {SIZE_LIMIT:,} at most"):
        Tokenizer(tmp_path / name if name.endswith("model") else path)
    assert time.perf_counter() - started < 1


def test_too_many_ranks_and_long_pieces(tmp_path: Path) -> None:
    """A rank file that is too large is refused before it is parsed. Long pieces are accepted."""
    path = tmp_path / "tokenizer.model"
    ranks = [bytes([byte]) for byte in range(256)] + [b"a" * n for n in (2, 10**6)]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks)))
    assert Tokenizer(path).encode("a" * 5, bos=False, eos=False)[0] == 256
    path.write_bytes(b"YWI= 1152921504606846976\n" + path.read_bytes())
    with pytest.raises(TokenizerError, match=r"has no rank 258 in 259 lines"):
        Tokenizer(path)
    path.write_bytes(b"".join(b"YWI= %d\n" % i for i in range(1_400_000)))
    with pytest.raises(TokenizerError, match=r"bytes, expected 16,777,216 at most"):
        Tokenizer(path)


@pytest.mark.parametrize(("ids", "config"), [(4_294_967_295, {}), (2, {"vocab_size": 10**12})])
def test_absurd_vocabularies_do_not_fit_the_model(
    ids: int, config: dict[str, Any], build: Callable[..., Llama], tmp_path: Path
) -> None:
    """No memory is allocated for the size before it is compared with the model's."""
    path = write_json(tmp_path, with_model(vocab={"a": 0, "b": 1, "ab": ids}), json.dumps(config))
    with pytest.raises(TokenizerError, match=r"the tokenizer has [0-9]{10,13} ids, the model 512"):
        build("mha", tokenizer_path=path)


MUTATIONS = """
import random, sys
from pathlib import Path
from llama.tokenizer import Tokenizer, TokenizerError

model, path, read = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), 0
for seed in range(200):
    draw, data = random.Random(seed), bytearray(model)
    for _ in range(draw.choice([1, 1, 2, 8])):
        # Anywhere, or in the last fields, which set how texts are normalized.
        at = draw.choice([draw.randrange(len(data)), draw.randrange(len(data) - 100, len(data))])
        data[at] = draw.choice([0, 1, 127, 128, 255, data[at] ^ 1 << draw.randrange(8)])
    if seed % 9 == 0:
        del data[draw.randrange(20, len(data)) :]
    path.write_bytes(data)
    try:
        tokenizer = Tokenizer(path)
    except TokenizerError as error:
        assert "\\n" not in str(error)
        continue
    read += 1
    for text in ("Hello </s> <0x0A> \\u6f22 \\0 \\u200b", "a" * 300, ""):
        tokenizer.decode(tokenizer.encode(text, bos=False, eos=False))
    for i in range(tokenizer.n_words):
        tokenizer.decode_token(i)
print(read)
"""


def test_damaged_sentencepiece_models_end_in_one_line_or_work(tmp_path: Path) -> None:
    """In a separate process, because the reader is C++ and may crash it."""
    command = [sys.executable, "-c", MUTATIONS, str(TOKENIZER), str(tmp_path / "tokenizer.model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 10 < int(done.stdout) < 190


def test_a_piece_that_is_not_utf8_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    data = TOKENIZER.read_bytes()
    at = data.index("\u2581the".encode())
    path.write_bytes(data[:at] + b"\xff\xff" + data[at + 2 :])
    with pytest.raises(TokenizerError, match="holds a piece that is not UTF-8, fetch it again"):
        Tokenizer(path)


# Files larger than memory ---------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status, which Linux has")
def test_a_file_of_prompts_is_not_held_in_memory(
    checkpoint: Callable[..., Path], tmp_path: Path, measured: Callable[[str, object], None]
) -> None:
    """30 MB of prompts, nearly all answered by an earlier run, and a line of 30 MB, which is skipped."""
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    lines, left = 6000, {1, 3000, 6000}
    with file.open("w") as prompts, out.open("w") as answers:
        for number in range(1, lines + 1):
            prompts.write(json.dumps({"prompt": f"x{number}", "notes": "é" * 2500}, ensure_ascii=False) + "\n")
            if number not in left:
                answer = {"line": number, "prompt": f"x{number}", "generation": "", "finish_reason": "stop"}
                answers.write(json.dumps(answer) + "\n")
        prompts.write('{"prompt": "' + "x" * 30_000_000 + '"}\n')
    command = [sys.executable, str(HELPERS / "prompts_memory.py")]
    command += [str(checkpoint("mha")), str(file), str(out)]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "skipped prompts.jsonl, line 6001: longer than 4,194,304 characters" in done.stderr
    assert f"{out} already has {lines - 3} of {lines} answers" in done.stderr
    answered = [json.loads(line)["line"] for line in out.read_text().splitlines()]
    assert len(answered) == lines and set(answered[-3:]) == left
    grown = int(done.stdout) / 1e6
    measured("memory of complete --file with 60 MB of prompts, MB", grown)
    assert grown < 50


def test_windows_are_answered_in_order_and_each_longest_first(
    command: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama.cli.complete.WINDOW_JOBS", 4)
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    lengths = [1, 5, 3, 9, 7, 2, 8, 4, 6]
    file.write_text("".join(json.dumps({"prompt": "word " * n}) + "\n\n" for n in lengths))
    args = ["--file", str(file), "--out", str(out), "--max_gen_len", "2", "--max_batch_size", "2"]
    assert command("complete", *args).status == 0
    order = [(json.loads(line)["line"] + 1) // 2 for line in out.read_text().splitlines()]
    assert order == [4, 2, 3, 1, 7, 5, 8, 6, 9]
    whole = sorted(out.read_text().splitlines())
    # Windows of one line, then of as many lines as have 60 characters.
    for characters, expected in ((1, list(range(1, 10))), (60, [2, 3, 1, 4, 5, 7, 6, 9, 8])):
        monkeypatch.setattr("llama.cli.complete.WINDOW_CHARACTERS", characters)
        out.unlink()
        assert command("complete", *args).status == 0
        assert [(json.loads(line)["line"] + 1) // 2 for line in out.read_text().splitlines()] == expected
        assert sorted(out.read_text().splitlines()) == whole


@pytest.mark.parametrize("change", [lambda s: s.replace("two", "2wo"), lambda s: s[:30], lambda s: "\n" + s])
def test_a_file_that_changes_while_it_is_read_is_reported(
    change: Callable[[str], str], command: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    text = "".join(json.dumps({"prompt": word}) + "\n" for word in ("one", "two", "three"))
    file.write_text(text)
    strike_off = complete._remove_answered

    def and_change(*args: Any) -> int:
        file.write_text(change(text))
        return strike_off(*args)

    monkeypatch.setattr("llama.cli.complete._remove_answered", and_change)
    ended = command("complete", "--file", str(file), "--out", str(out))
    assert ended.status == 1 and f"error: {file} was changed while it was read" in ended.err


def test_a_file_has_limits(command: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    args = ["--file", str(file), "--out", str(out), "--max_gen_len", "1"]
    monkeypatch.setattr("llama.cli.complete.LINE_LIMIT", 20)
    file.write_text('{"prompt": "123456"}\n{"prompt": "1234567"}\n{"prompt": "123456"}')
    ended = command("complete", *args)
    assert "prompts.jsonl, line 2: longer than 20 characters: fix" in ended.err and not out.exists()
    assert command("complete", *args, "--keep_going").status == 0
    assert sorted(json.loads(line)["line"] for line in out.read_text().splitlines()) == [1, 3]
    file.write_text(" " * 21 + "\n")
    assert "line 1: longer than 20 characters" in command("complete", *args).err
    monkeypatch.setattr("llama.cli.complete.LINES_LIMIT", 3)
    file.write_text("\n" * 4)
    assert f"error: {file} has more than 3 lines: divide it" in command("complete", *args).err
    ended = command("complete", "--file", "/dev/null", *args[2:])
    assert "is not a regular file, and it must be read twice" in ended.err


def test_texts_taken_whole_have_a_limit(
    command: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "text.txt"
    with file.open("wb") as stream:
        stream.truncate(2**40)
    started = time.perf_counter()
    ended = command("perplexity", str(file))
    assert (ended.status, ended.err) == (1, f"error: {file} has more than {files.MAX_TEXT_BYTES:,} bytes: divide it\n")
    assert time.perf_counter() - started < 5
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 9)
    file.write_text("nine char")
    assert files.read_text(file) == "nine char"
    for name in ("complete", "inspect"):
        ended = command(name, stdin="0123456789")
        assert ended.status == 1 and "error: more than 9 characters came through the pipe: give less\n" in ended.err


# Names and messages ---------------------------------------------------------------------------------

EVIL = "\x1b]0;pwned\x07\x1b[2J\n\r\x9b31m\u202egnp.\u2066\t\x7f"
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\u061c]")


def test_control_characters_in_quotes_are_shown() -> None:
    assert in_one_line(f"a{EVIL}é") == ("a␛]0;pwned␇␛[2J␊␍<U+009B>31m<U+202E>gnp.<U+2066>␉␡é")
    assert in_one_line(ValueError("\ud800 \u2028")) == "<U+D800> <U+2028>"
    assert len(in_one_line("x" * 10**7)) == LONGEST + 5
    assert in_one_line("a" + "x" * LONGEST + "z")[:: LONGEST + 4] == "az"


def test_no_error_writes_to_the_terminal_what_others_wrote(
    command: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of files, keys and values of params.json, unknown flags."""
    evil = EVIL.replace("/", "")

    def one_line(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["llama", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        line = str(ended.value.code)
        assert line.startswith("error: ") and "\n" not in line and not CONTROL.search(line), line
        return line

    params: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": 512}
    for change in ({evil: 1}, {"dim": evil}, {"dim": [evil] * 10**5}):
        (tmp_path / "params.json").write_text(json.dumps(params | change))
        assert len(one_line("plan", str(tmp_path))) < LONGEST + 100
    assert "␛" in one_line("plan", str(tmp_path / evil))
    assert "␛" in one_line("convert", str(tmp_path / evil), str(tmp_path / "x"))
    assert "␛" in one_line("verify", str(tmp_path / evil))
    assert "␛" in one_line("perplexity", str(tmp_path / evil), "--ckpt_dir", str(tmp_path))
    assert "␛" in one_line("plan", f"--x{evil}=1")


def test_verify_and_perplexity_show_names(
    command: Callable[..., Ended],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in checkpoint("mha").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "checklist.chk").write_text(f"{'0' * 32}  {EVIL.replace(chr(10), '')}\n")
    monkeypatch.setattr(sys, "argv", ["llama", "verify", str(folder)])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    assert "␛" in shown and not CONTROL.search(shown)
    file = tmp_path / EVIL
    file.write_text("The licence")
    ended = command("perplexity", str(file), "--max_seq_len", "32")
    assert ended.status == 0 and ended.out.count("\n") == 2 and not CONTROL.search(ended.out)
    ended = command("perplexity", str(file), "--max_seq_len", "32", "--json")
    assert json.loads(ended.out)["file"] == str(file) and not CONTROL.search(ended.out)


def test_every_claim_of_the_security_page_has_its_test() -> None:
    """The tests that SECURITY.md names exist."""
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text()))
    here = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert len(named) > 10 and named <= here, named - here
