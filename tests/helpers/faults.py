"""Faults of checkpoints and of sources of `convert`: how to make each one, and the expected error.

`PYTHONPATH=tests python -m helpers.faults` prints docs/faults.md. It is mostly the tables FAULTS and FOREIGN.
"""

import hashlib
import json
import os
import pickle
import random
import shutil
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

FIRST, SECOND, THIRD = (f"consolidated.{i:02d}.pth" for i in range(3))
WQ = "layers.1.attention.wq.weight"
Damage = Callable[[Path, random.Random], Any]


def edit_params(folder: Path, **changes: Any) -> None:
    params = json.loads((folder / "params.json").read_text()) | changes
    (folder / "params.json").write_text(json.dumps({k: v for k, v in params.items() if v != "drop"}))


def edit_shard(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


class Bomb:
    """An object whose unpickling writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.marker, "boom"))


def write_checklist(folder: Path, kind: str = "md5", form: str = "{}  {}\n", name: str = "checklist.chk") -> None:
    """Write a checklist of all files in a folder."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix != ".chk" and path.is_file()]
    lines = [form.format(hashlib.new(kind, path.read_bytes()).hexdigest(), path.name) for path in files]
    (folder / name).write_text("".join(lines))


def flip(path: Path, rng: random.Random, start: int = 0, stop: int | None = None) -> None:
    """Flip one random bit of a file in [start, stop)."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(start, stop or len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def data_of(path: Path) -> list[tuple[int, int]]:
    """[start, stop) of each tensor's bytes in a shard."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        spans = []
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            lengths = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
            start = info.header_offset + 30 + lengths
            if "/data/" in info.filename:
                spans.append((start, start + info.file_size))
    return spans


def swap(folder: Path, rng: random.Random) -> None:
    (folder / FIRST).rename(folder / "x")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "x").rename(folder / SECOND)


def write(name: str, content: bytes) -> Damage:
    return lambda folder, rng: (folder / name).write_bytes(content)


def remove(name: str) -> Damage:
    return lambda folder, rng: (folder / name).unlink()


def truncate(folder: Path, rng: random.Random) -> None:
    content = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(content[: rng.randrange(1, len(content))])


def grow(folder: Path, rng: random.Random) -> None:
    """Insert zeros, like a download that was resumed at the wrong offset."""
    content, offset = (folder / SECOND).read_bytes(), rng.randrange(1000, 100_000)
    (folder / SECOND).write_bytes(content[:offset] + bytes(rng.randrange(1, 5000)) + content[offset:])


def zero(folder: Path, rng: random.Random) -> None:
    """Set 4096 bytes to zero, like a page that was never written to the disk."""
    content, offset = bytearray((folder / SECOND).read_bytes()), rng.randrange(1000, 100_000)
    content[offset : offset + 4096] = bytes(4096)
    (folder / SECOND).write_bytes(content)


def flip_weight(folder: Path, rng: random.Random) -> None:
    flip(folder / SECOND, rng, *rng.choice(data_of(folder / SECOND)))


def foreign(folder: Path, rng: random.Random) -> None:
    """Replace a shard's weights by those of another model with the same shapes."""
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    edit_shard(folder / SECOND, lambda tensors: [t.normal_(generator=generator) for t in tensors.values()])


def edit(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return lambda folder, rng: edit_shard(folder / SECOND, change)


def deflate(folder: Path, rng: random.Random) -> None:
    with zipfile.ZipFile(folder / SECOND) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / SECOND, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def add_line(line: str) -> Damage:
    def add(folder: Path, rng: random.Random) -> None:
        write_checklist(folder)
        with (folder / "checklist.chk").open("a") as file:
            file.write(line + "\n")

    return add


def bomb(name: str) -> Damage:
    return lambda folder, rng: torch.save(torch.load(folder / name) | {"bomb": Bomb(folder / "marker")}, folder / name)


def save_again(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    torch.save(change(torch.load(path, weights_only=True)), path)


def wrap(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return lambda folder, rng: save_again(folder / SECOND, change)


def rename_all(folder: Path, rng: random.Random) -> None:
    for name in (FIRST, SECOND):
        save_again(folder / name, lambda t: {f"net.{key}": value for key, value in t.items()})


def broken_link(folder: Path, rng: random.Random) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to(folder / "nowhere")


def change(**keys: Any) -> Damage:
    return lambda folder, rng: edit_params(folder, **keys)


def loop(name: str) -> Damage:
    """Replace a file by a link to itself, which not even root can open."""

    def link(folder: Path, rng: random.Random) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / name)

    return link


def become_folder(name: str) -> Damage:
    def become(folder: Path, rng: random.Random) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return become


def join(folder: Path, rng: random.Random) -> None:
    """Write a damaged copy and append an intact one, as a restarted download may do."""
    good = (folder / SECOND).read_bytes()
    flip_weight(folder, rng)
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes() + good)


def become_pipe(name: str) -> Damage:
    """Replace a file by a pipe. Opening it blocks until another process writes."""

    def become(folder: Path, rng: random.Random) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return become


def become_device(name: str) -> Damage:
    """Replace a file by a device. Reading it never ends."""

    def become(folder: Path, rng: random.Random) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")

    return become


def five_digits(folder: Path, rng: random.Random) -> None:
    for i, name in enumerate((FIRST, SECOND)):
        (folder / name).rename(folder / f"consolidated.{i:05d}.pth")


def flip_header(folder: Path, rng: random.Random) -> None:
    """Flip a bit of a record's name in its local header."""
    content = bytearray((folder / SECOND).read_bytes())
    content[content.index(b"data/7") + 5] ^= 1
    (folder / SECOND).write_bytes(content)


def leave_nothing(folder: Path, rng: random.Random) -> None:
    for path in folder.glob("*.pth"):
        path.unlink()


def become_hugging_face(folder: Path, rng: random.Random) -> None:
    leave_nothing(folder, rng)
    (folder / "config.json").write_text("{}")


def no_embedding(folder: Path, rng: random.Random) -> None:
    for path in folder.glob("*.pth"):
        edit_shard(path, lambda t: t.pop("tok_embeddings.weight"))


class Fault(NamedTuple):
    """How to damage a folder, and the errors of `verify` and `build`.

    verify: part of the one line that `verify` prints. The line also has the path of `file`, or of the folder.
    build: part of the error of `build`, which may name another file. None: the same text as `verify`. "": `build` does
    not read the damaged file and loads the model.
    """

    damage: Damage
    file: str
    verify: str
    build: str | None = None


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476939516\n"
PAGE = b"\n<!DOCTYPE html><html><body>403 Forbidden</body></html>"
DENIED = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code></Error>'
NAN, INFINITY = float("nan"), float("inf")
PARAMS, TOKENIZER, CHECKLIST = "params.json", "tokenizer.model", "checklist.chk"
CONFIG = "tokenizer_config.json"
PIPE, NOT_PLAIN = "it is a pipe or a device, not a file", ", expected plain tensors with every element stored"
MISMATCH = "does not match params.json as one of 2 shards"
NO_SHARDS = "holds no consolidated.NN.pth: give the folder of one model"
FAULTS: dict[str, Fault] = {
    # Shards
    "a bit of a weight": Fault(flip_weight, SECOND, "is damaged in consolidated.01/data/"),
    "a bit of a header": Fault(flip_header, SECOND, "is damaged in consolidated.01/data/7 (header)"),
    "a hole": Fault(zero, SECOND, "damaged"),
    "a gap": Fault(grow, SECOND, "damaged"),
    "cut short": Fault(truncate, SECOND, "cut short at"),
    "two files joined": Fault(join, SECOND, "two files joined, or extra bytes before"),
    "bytes after the end": Fault(
        lambda folder, rng: (folder / SECOND).open("ab").write(b"\n"),
        SECOND,
        "or extra bytes before, inside or after",
    ),
    "empty": Fault(write(SECOND, b""), SECOND, "is an empty file, expected a file of torch.save: fetch it again"),
    "LFS pointer": Fault(write(SECOND, POINTER), SECOND, "is a Git LFS pointer, expected a file of torch.save"),
    "first shard an LFS pointer": Fault(
        write(FIRST, POINTER), FIRST, "is a Git LFS pointer, expected", "is a Git LFS pointer, not what torch.save"
    ),
    "web page": Fault(write(SECOND, PAGE), SECOND, "is an HTML or XML page"),
    "XML page": Fault(write(SECOND, DENIED), SECOND, "is an HTML or XML page"),
    "JSON answer": Fault(write(SECOND, b'{"error": "gated"}'), SECOND, "is a JSON text"),
    "GGUF": Fault(write(SECOND, b"GGUF\3\0\0\0"), SECOND, "is a GGUF file, expected a file of torch.save"),
    "safetensors": Fault(write(SECOND, b"\x20\0\0\0\0\0\0\0{}"), SECOND, "is a safetensors file"),
    "pickle": Fault(write(SECOND, pickle.dumps({"a": 1})), SECOND, "is a plain pickle, expected a file of torch.save"),
    "noise": Fault(write(SECOND, random.Random(5).randbytes(5000)), SECOND, "is of unknown format"),
    "code": Fault(bomb(SECOND), SECOND, "holds more than tensors, which could run code"),
    "code in the first shard": Fault(bomb(FIRST), FIRST, "holds more than tensors, which could run code"),
    "compressed": Fault(deflate, SECOND, "compression, which torch.save does not use"),
    "folder": Fault(become_folder(SECOND), SECOND, "is a folder, expected a file"),
    "first shard a folder": Fault(become_folder(FIRST), FIRST, "is a folder, expected a file", "is a folder, not what"),
    "broken link": Fault(broken_link, SECOND, "is missing: fetch it"),
    "unreadable": Fault(loop(SECOND), SECOND, "cannot be read (Too many levels of symbolic links)"),
    "first shard unreadable": Fault(loop(FIRST), FIRST, "cannot be read (Too many levels of symbolic links)"),
    "a pipe": Fault(become_pipe(SECOND), SECOND, PIPE),
    "first shard a pipe": Fault(become_pipe(FIRST), FIRST, PIPE),
    "a device": Fault(become_device(SECOND), SECOND, PIPE),
    "no first shard": Fault(
        remove(FIRST), FIRST, "is missing, one of 2 shards of the model: fetch it", "lacks consolidated.00.pth"
    ),
    "no last shard": Fault(
        remove(SECOND),
        SECOND,
        "is missing, one of 2 shards of the model: fetch it",
        "does not match params.json as the only shard (files missing, or another model's?)",
    ),
    "no shard": Fault(leave_nothing, "", NO_SHARDS),
    "a Hugging Face folder": Fault(become_hugging_face, "", "is a Hugging Face folder, not one in Meta's layout"),
    "a shard too many": Fault(
        lambda folder, rng: shutil.copy(folder / FIRST, folder / THIRD),
        THIRD,
        "holds the same tensors as consolidated.00.pth",
        "does not match params.json as one of 3 shards (files missing, or another model's?)",
    ),
    "a repeated number": Fault(
        lambda folder, rng: shutil.copy(folder / FIRST, folder / "consolidated.000.pth"),
        "consolidated.000.pth",
        "has the same number as consolidated.00.pth",
        "has the same number as",
    ),
    "a number too large": Fault(
        lambda folder, rng: (folder / SECOND).rename(folder / "consolidated.9999.pth"),
        SECOND,
        "is missing, one of 2 shards of the model: fetch it",
        "lacks consolidated.01.pth, consolidated.02.pth, consolidated.03.pth, consolidated.04.pth and 9994 more",
    ),
    "numbers of five digits": Fault(five_digits, "", "holds consolidated.00000.pth, expected a number of up to four"),
    "repeated": Fault(
        lambda folder, rng: shutil.copy(folder / FIRST, folder / SECOND), SECOND, "holds the same tensors"
    ),
    "swapped": Fault(swap, FIRST, "was saved as consolidated.01.pth, expected consolidated.00.pth"),
    "another model's": Fault(foreign, SECOND, "has different norms from consolidated.00.pth"),
    "another dtype": Fault(edit(lambda t: t.update({WQ: t[WQ].bfloat16()})), SECOND, "has different dtypes from"),
    "not a float": Fault(edit(lambda t: t.update({WQ: t[WQ].to(torch.int8)})), SECOND, f"wrong type: {WQ} torch.int8"),
    "float64": Fault(
        edit(lambda t: t.update({WQ: t[WQ].double()})), SECOND, "has different dtypes from consolidated.00.pth"
    ),
    "NaN": Fault(edit(lambda t: t[WQ][3].fill_(NAN)), SECOND, f"holds NaN or infinity in {WQ}"),
    "infinity": Fault(edit(lambda t: t["norm.weight"][0].fill_(-INFINITY)), SECOND, "holds NaN or infinity in norm"),
    "another shape": Fault(
        edit(lambda t: t.update({WQ: torch.ones(1)})), SECOND, f"wrong shape: {WQ} (1,), expected (32, 64)"
    ),
    "a meta tensor": Fault(
        edit(lambda t: t.update({WQ: torch.empty(32, 64, device="meta")})), SECOND, f"holds {WQ}{NOT_PLAIN}"
    ),
    "an expanded tensor": Fault(
        edit(lambda t: t.update({WQ: torch.ones(1).expand(32, 64)})), SECOND, f"holds {WQ}{NOT_PLAIN}"
    ),
    "overlapping rows": Fault(
        edit(lambda t: t.update({WQ: torch.ones(5000).as_strided((32, 64), (1, 1))})), SECOND, f"holds {WQ}{NOT_PLAIN}"
    ),
    "sparse": Fault(edit(lambda t: t.update({WQ: t[WQ].to_sparse()})), SECOND, f"holds {WQ}{NOT_PLAIN}"),
    "sparse in the first shard": Fault(
        lambda folder, rng: edit_shard(folder / FIRST, lambda t: t.update({WQ: t[WQ].to_sparse()})),
        FIRST,
        f"holds {WQ}{NOT_PLAIN}",
    ),
    "two entries with weights": Fault(
        wrap(lambda t: {"model": t, "state_dict": t}),
        SECOND,
        "holds the entries model and state_dict, both could be the weights",
    ),
    "an unknown entry": Fault(wrap(lambda t: {"net": t, "step": 7}), SECOND, f"holds net, step{NOT_PLAIN}"),
    "weights outside an entry": Fault(
        wrap(lambda t: {"model": t, WQ: t[WQ]}), SECOND, f"holds weights inside the entry model and outside it ({WQ})"
    ),
    "arguments of a trainer": Fault(
        wrap(lambda t: {"model": t, "args": Namespace(lr=1)}), SECOND, "it was not loaded (argparse.Namespace); if"
    ),
    "two prefixes": Fault(
        wrap(lambda t: {("model." if key == WQ else "module.") + key: value for key, value in t.items()}),
        SECOND,
        "holds names with different prefixes (model.layers.1.attention.wq.weight, module.",
    ),
    "an unknown prefix": Fault(
        rename_all,
        FIRST,
        "has no tok_embeddings.weight, expected a Llama checkpoint in Meta's layout",
        "has no tok_embeddings.weight: its names begin with 'net.', an unknown prefix",
    ),
    "Hugging Face's names": Fault(
        wrap(lambda t: {"model.embed_tokens.weight": t[WQ]}),
        SECOND,
        "holds tensors under Hugging Face's names: name it",
    ),
    "a repeated tensor": Fault(
        edit(lambda t: t.update({f"layers.1._orig_mod.{WQ[9:]}": t[WQ]})), SECOND, f"holds {WQ} twice, with and without"
    ),
    "a missing tensor": Fault(edit(lambda t: t.pop(WQ)), SECOND, f"missing: {WQ}"),
    "an extra tensor": Fault(edit(lambda t: t.update({"extra": torch.ones(1)})), SECOND, "unexpected: extra"),
    "a list of tensors": Fault(
        lambda folder, rng: torch.save([1], folder / SECOND), SECOND, "does not hold tensors by name"
    ),
    "no embedding": Fault(
        no_embedding,
        FIRST,
        "has no tok_embeddings.weight, expected a Llama checkpoint in Meta's layout",
        "has no tok_embeddings.weight: not a Llama checkpoint in Meta's layout",
    ),
    # params.json
    "no params.json": Fault(
        remove(PARAMS), PARAMS, "is missing: fetch it", "is missing: it comes with the consolidated.NN.pth files"
    ),
    "params.json is a pointer": Fault(write(PARAMS, POINTER), PARAMS, "is a Git LFS pointer"),
    "params.json is a page": Fault(write(PARAMS, PAGE), PARAMS, "is an HTML or XML page"),
    "params.json is empty": Fault(write(PARAMS, b""), PARAMS, "is an empty file"),
    "params.json is a folder": Fault(become_folder(PARAMS), PARAMS, "is a folder"),
    "params.json is unreadable": Fault(loop(PARAMS), PARAMS, "cannot be read (Too many levels of symbolic links)"),
    "params.json is a pipe": Fault(become_pipe(PARAMS), PARAMS, PIPE),
    "params.json is a device": Fault(become_device(PARAMS), PARAMS, PIPE),
    "params.json of megabytes": Fault(write(PARAMS, b" " * 2**21), PARAMS, "it has more than 1,048,576 bytes"),
    "params.json is cut short": Fault(write(PARAMS, b'{"dim": 64, '), PARAMS, "cannot be read as JSON"),
    "params.json is nested too deep": Fault(write(PARAMS, b"[" * 100_000), PARAMS, "cannot be read as JSON"),
    "params.json in Latin-1": Fault(write(PARAMS, b'{"dim": "\xe9"}'), PARAMS, "cannot be read as JSON"),
    "params.json is a list": Fault(write(PARAMS, b"[64]"), PARAMS, "holds a list, expected an object"),
    "an unknown key": Fault(change(alpha=1), PARAMS, "unknown key 'alpha'; this runner knows dim"),
    "a missing key": Fault(change(n_heads="drop"), PARAMS, "n_heads is missing"),
    "a string instead of a number": Fault(change(dim="64x"), PARAMS, "dim is '64x', expected a positive integer"),
    "a list instead of a number": Fault(change(dim=[64]), PARAMS, "dim is [64], expected a positive integer"),
    "a number instead of a flag": Fault(
        change(use_scaled_rope=1), PARAMS, "use_scaled_rope is 1, expected true or false"
    ),
    "a negative size": Fault(change(n_layers=-1), PARAMS, "n_layers is -1, expected a positive integer"),
    "an absurd number of layers": Fault(change(n_layers=10**9), PARAMS, "n_layers is 1000000000, expected"),
    "an absurd width": Fault(change(dim=10**30), PARAMS, "dim is 1000000000000000000000000000000, expected"),
    "a large width": Fault(change(dim=2**23), FIRST, MISMATCH),
    "NaN in params.json": Fault(change(norm_eps=NAN), PARAMS, "norm_eps is nan, expected a positive number"),
    "an absurd norm_eps": Fault(
        change(norm_eps=1e11), PARAMS, "norm_eps is 100000000000.0, expected a positive number"
    ),
    "an absurd theta": Fault(
        change(rope_theta=1e-300), PARAMS, "rope_theta is 1e-300, expected a positive number from 1 to"
    ),
    "heads that do not divide": Fault(change(n_heads=7), PARAMS, "and head_dim 9 are inconsistent"),
    "another model's params.json": Fault(change(dim=128), FIRST, MISMATCH),
    "a layer too many": Fault(change(n_layers=4), FIRST, "missing: layers.3.attention.wk.weight"),
    "a layer too few": Fault(change(n_layers=2), FIRST, "unexpected: layers.2.attention.wk.weight"),
    "another vocabulary": Fault(change(vocab_size=500), FIRST, "wrong shape: output.weight (256, 64)"),
    # Tokenizer
    "no tokenizer": Fault(remove(TOKENIZER), "", "no tokenizer.model or tokenizer.json in"),
    "an empty tokenizer": Fault(write(TOKENIZER, b""), TOKENIZER, "is an empty file"),
    "a tokenizer that is a pointer": Fault(write(TOKENIZER, POINTER), TOKENIZER, "is a Git LFS pointer"),
    "a tokenizer that is a page": Fault(
        write(TOKENIZER, PAGE), TOKENIZER, "is an HTML or XML page", "is not a SentencePiece model"
    ),
    "a tokenizer that is a folder": Fault(become_folder(TOKENIZER), "", "no tokenizer.model or tokenizer.json in"),
    "a broken tokenizer": Fault(write(TOKENIZER, b"\n nothing"), TOKENIZER, "is not a SentencePiece model"),
    "a tokenizer that is a pipe": Fault(become_pipe(TOKENIZER), "", "no tokenizer.model or tokenizer.json in"),
    "tokenizer_config.json is a pipe": Fault(become_pipe(CONFIG), CONFIG, PIPE),
    "an unknown chat format": Fault(
        write(CONFIG, b'{"chat_format": "nonsense"}'), CONFIG, "chat format 'nonsense': expected llama2, llama3"
    ),
    "a chat format of other tokenizers": Fault(
        write(CONFIG, b'{"chat_format": "chatml"}'), CONFIG, "chat format 'chatml' needs <|im_end|>, <|im_start|>"
    ),
    # Checklists, which build does not read
    "a listed file is gone": Fault(
        add_line(f"{'0' * 32}  LICENSE"), "LICENSE", "is missing, but checklist.chk lists it", ""
    ),
    "a line of nonsense": Fault(add_line("nonsense"), CHECKLIST, "line 5 is 'nonsense', expected an md5 or sha256", ""),
    "a hash too short": Fault(add_line(f"{'0' * 31}  LICENSE"), CHECKLIST, "line 5 is '000", ""),
    "a listed path": Fault(
        add_line(f"{'0' * 32}  ../model/{FIRST}"), CHECKLIST, "names '../model/consolidated.00.pth'", ""
    ),
    "a listed absolute path": Fault(
        add_line(f"{'0' * 64}  /etc/passwd"), CHECKLIST, "names '/etc/passwd' in line 5", ""
    ),
    "a listed parent folder": Fault(add_line(f"{'0' * 64}  .."), CHECKLIST, "names '..' in line 5", ""),
    "a listed name of 300 letters": Fault(
        add_line(f"{'0' * 32}  {'a' * 300}"), CHECKLIST, "in line 5, expected the name of a file", ""
    ),
    "a checklist that is a pipe": Fault(become_pipe(CHECKLIST), CHECKLIST, PIPE, ""),
    "a checklist of megabytes": Fault(
        write(CHECKLIST, b"#" * 2**21), CHECKLIST, "it has more than 1,048,576 bytes", ""
    ),
    "an empty checklist": Fault(write(CHECKLIST, b""), CHECKLIST, "is an empty file", ""),
    "a checklist that is a page": Fault(write(CHECKLIST, PAGE), CHECKLIST, "is an HTML or XML page", ""),
}


# Other formats: name -> (files of a folder (name -> text), part of convert's error) ----------------------------------


def config(**changes: Any) -> str:
    plain = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512}
    return json.dumps(plain | {"num_hidden_layers": 2, "intermediate_size": 96, "rms_norm_eps": 1e-5} | changes)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 13\n"
FOREIGN: dict[str, tuple[dict[str, str], str]] = {
    "an empty folder": ({}, "holds neither consolidated.NN.pth nor config.json"),
    "gpt-2": (
        {"config.json": config(architectures=["GPT2LMHeadModel"])},
        "'GPT2LMHeadModel' is not supported, expected Llama",
    ),
    "falcon": ({"config.json": config(architectures=["FalconForCausalLM"])}, "'FalconForCausalLM' is not supported"),
    "gemma": ({"config.json": config(architectures=["GemmaForCausalLM"])}, "'GemmaForCausalLM' is not supported"),
    "qwen": ({"config.json": config(architectures=["Qwen2ForCausalLM"])}, "'Qwen2ForCausalLM' is not supported"),
    "mixtral": ({"config.json": config(architectures=["MixtralForCausalLM"])}, "'MixtralForCausalLM' is not"),
    "llama 4": ({"config.json": config(architectures=["Llama4ForConditionalGeneration"])}, "'Llama4ForConditional"),
    "vision": ({"config.json": config(architectures=["MllamaForConditionalGeneration"])}, "'MllamaForConditional"),
    "by model_type": ({"config.json": json.dumps({"model_type": "bert"})}, "'bert' is not supported"),
    "no architecture": ({"config.json": "{}"}, "names no architecture"),
    "adapter": (
        {"adapter_config.json": '{"base_model_name_or_path": "me/base"}'},
        "an adapter for 'me/base', not",
    ),
    "adapter with config": ({"adapter_config.json": "{}", "config.json": config()}, "the folder has only an adapter"),
    "no weights": ({"config.json": config()}, "neither model.safetensors nor pytorch_model.bin"),
    "config is a pointer": ({"config.json": LFS}, "config.json is a Git LFS pointer"),
    "config is a page": ({"config.json": "<!doctype html><p>Log in"}, "config.json is an HTML or XML page"),
    "config is cut": ({"config.json": config()[:40]}, "config.json is"),
    "config is a list": ({"config.json": "[]"}, "holds a list, expected an object"),
    "config is empty": ({"config.json": ""}, "config.json is an empty file"),
    "attention bias": ({"config.json": config(attention_bias=True)}, "attention_bias is True"),
    "mlp bias": ({"config.json": config(mlp_bias=True)}, "mlp_bias is True"),
    "gelu": ({"config.json": config(hidden_act="gelu")}, "hidden_act is 'gelu'"),
    "gptq": ({"config.json": config(quantization_config={"quant_method": "gptq"})}, "quantized (gptq)"),
    "yarn": ({"config.json": config(rope_scaling={"type": "yarn", "factor": 2})}, "rope scaling 'yarn' is not"),
    "dynamic": ({"config.json": config(rope_scaling={"type": "dynamic", "factor": 2})}, "rope scaling 'dynamic'"),
    "longrope": ({"config.json": config(rope_scaling={"rope_type": "longrope"})}, "rope scaling 'longrope'"),
    "llama3 without its numbers": (
        {"config.json": config(rope_scaling={"rope_type": "llama3", "factor": 8, "low_freq_factor": 2})},
        "high_freq_factor is missing",
    ),
    "linear without factor": ({"config.json": config(rope_scaling={"type": "linear"})}, "factor is missing"),
    "a scaling for each kind of layer": (
        {"config.json": config(rope_parameters={"full_attention": {"rope_type": "default"}})},
        "expected one object for all layers",
    ),
    "two thetas": (
        {"config.json": config(rope_theta=5e5, rope_parameters={"rope_theta": 1e4})},
        "rope_theta, rope_parameters and rope_scaling contradict each other",
    ),
    "two scalings": (
        {"config.json": config(rope_parameters={"rope_type": "default"}, rope_scaling={"type": "linear", "factor": 4})},
        "rope_theta, rope_parameters and rope_scaling contradict each other",
    ),
    "config is nested too deep": ({"config.json": "[" * 100_000}, "config.json is not valid JSON"),
    "partial rotary": ({"config.json": config(partial_rotary_factor=0.5)}, "partial_rotary_factor is 0.5"),
    "odd heads": ({"config.json": config(num_attention_heads=5)}, "hidden_size 64 is not a multiple of 5"),
    "kv heads": ({"config.json": config(num_key_value_heads=3)}, "3 KV heads are inconsistent"),
    "odd head_dim": ({"config.json": config(head_dim=15)}, "are inconsistent"),
    "absurd layers": ({"config.json": config(num_hidden_layers=10**12)}, "num_hidden_layers is 1000000000000"),
    "no size": ({"config.json": config(hidden_size=None)}, "hidden_size is missing"),
    "text for a size": ({"config.json": config(vocab_size="many")}, "vocab_size is 'many'"),
    "weights are a pointer": (
        {"config.json": config(), "model.safetensors": LFS},
        "model.safetensors is a Git LFS pointer, not a safetensors file",
    ),
    "weights are a page": ({"config.json": config(), "pytorch_model.bin": "<html>"}, "is an HTML or XML page, not"),
    "weights are nothing": ({"config.json": config(), "pytorch_model.bin": ""}, "is an empty file"),
    "weights are text": ({"config.json": config(), "model.safetensors": "hello there"}, "is damaged or cut off"),
    "index without files": (
        {"config.json": config(), "model.safetensors.index.json": '{"weight_map": {"a": "model-1.safetensors"}}'},
        "model-1.safetensors is missing, which model.safetensors.index.json names",
    ),
    "index out of the folder": (
        {"config.json": config(), "model.safetensors.index.json": '{"weight_map": {"a": "../secret"}}'},
        "'../secret', a file outside the folder",
    ),
    "index without map": ({"config.json": config(), "model.safetensors.index.json": "{}"}, "has no weight_map"),
    "file: pointer": ({"model.gguf": LFS}, "is a Git LFS pointer: fetch the file that it points to"),
    "file: page": ({"model.bin": "<!DOCTYPE html>"}, "is an HTML or XML page: supported are"),
    "file: nothing": ({"model.bin": ""}, "is an empty file: supported are"),
    "file: text": ({"model.bin": "what is this"}, "is of unknown format: supported are"),
    "file: json": ({"model.json": "{}"}, "is a JSON text: supported are"),
    "file: zip": ({"consolidated.00.pth": "PK\3\4"}, "a part of a model: give its folder"),
    "file: gguf alone": ({"a.gguf": "GGUF"}, "a.gguf: damaged, cut off or of an unknown GGUF version"),
    "only original": ({"original/consolidated.00.pth": ""}, "holds Meta's files in its folder original: give"),
    "folder of a gguf": ({"a.gguf": "GGUF", "readme": ""}, "is a folder: give a file in it"),
}


def table() -> str:
    """The text of docs/faults.md."""
    lines = [
        "# Faults",
        "",
        "A test makes each fault below on purpose, and the error must contain the text in the table. Every error is",
        "one line that also names the file and suggests a fix. Written by `PYTHONPATH=tests python -m helpers.faults`,",
        "tested by `tests/checkpoint/test_faults.py` and `tests/convert/test_convert.py`.",
        "",
        f"## A folder of `consolidated.NN.pth`: {len(FAULTS)} faults",
        "",
        "`build` is what every command that loads a model prints, on each rank, before memory for weights is taken.",
        "",
        "| fault | `verify` | `build` |",
        "|---|---|---|",
    ]
    for name, fault in FAULTS.items():
        build = "(not read)" if fault.build == "" else f"`{fault.build}`" if fault.build else "the same"
        lines.append(f"| {name} | `{fault.verify}` | {build} |")
    lines += ["", f"## Other formats: {len(FOREIGN)} faults", "", "| fault | `convert` |", "|---|---|"]
    lines += [f"| {name} | `{answer}` |" for name, (_, answer) in FOREIGN.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
