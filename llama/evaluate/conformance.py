"""Vectors that other implementations check themselves against: `python -m llama conformance export` and `compare`.

docs/conformance.md says how a kit is laid out and how another implementation writes one.
"""

import hashlib
import logging
import math
import os
import shutil
import stat
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import zip_longest
from json import dumps, loads
from pathlib import Path
from typing import Any, cast

import torch

import llama
from llama.accelerate.executor import score
from llama.chat.formats import Dialog
from llama.checkpoint.params_json import LIMITS
from llama.console import progress
from llama.files import as_path, read_text
from llama.generation import Llama
from llama.model import Transformer, TransformerBlock, apply_rotary_emb, rotary_angles
from llama.parallel.groups import current_world
from llama.params import ModelArgs

log = logging.getLogger(__name__)

FORMAT, VERSION = "llama-conformance", 1
STEPS = 4  # ids that follow each prompt, one at a time: they read the cache, where a prompt only fills it
PROMPTS = (
    "The capital of France is",
    "def add(a, b):\n    return a + b\n",
    "Über die Brücke gehen 12 Katzen, 三匹の猫 und 1 🐈.",
)
DIALOGS: tuple[Dialog, ...] = (
    ({"role": "user", "content": "What is 2 + 2?"},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": " Why is the sky blue?\n"}),
    (
        {"role": "user", "content": "Ich heiße Ana."},
        {"role": "assistant", "content": "Hello, Ana!"},
        {"role": "user", "content": "What is my name?"},
    ),
)
ROPE_POSITIONS = (0, 1, 2, 100, 4095, 8191, 131071)
SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size")
ROPE_FILE = "rope.safetensors"
JSON_LIMIT = 16 * 2**20  # bytes of a kit.json: a million ids, whose vectors are 500 GB in the demo model
NUMBER_LIMIT = 2**31  # of positions and ids
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # what safetensors calls the types that are compared


# What is compared, in the order of computation: name -> (shape, definition). n is the number of ids of a prompt, those
# that follow it included.
ROPE = {
    "rope.cos": ("[positions, head_dim / 2]", "cosine of position * frequency of each pair, float32"),
    "rope.sin": ("[positions, head_dim / 2]", "sine of the same"),
}
BEFORE = {"embedding": ("[n, dim]", "the ids' rows of the embedding")}
LAYER = {  # each with its layer's number: layers.0.input
    "input": ("[n, dim]", "what enters the layer: the residual stream, before the norm of the attention"),
    "q": ("[n, n_heads, head_dim]", "queries after RoPE; numbers 2i and 2i + 1 of a head are its pair i"),
    "k": ("[n, n_kv_heads, head_dim]", "keys after RoPE, ordered as q"),
    "cache_k": ("[n, n_kv_heads, head_dim]", "the cache's keys of positions 0 to n - 1, once all ids are computed"),
    "cache_v": ("[n, n_kv_heads, head_dim]", "its values of the same positions"),
    "attention": ("[n, dim]", "what attention adds to the residual stream: after wo"),
    "feed_forward": ("[n, dim]", "what the feed-forward adds to the residual stream: after w2"),
}
AFTER = {
    "norm": ("[n, dim]", "the residual stream after the last layer and the final norm"),
    "logits": ("[n, vocab_size]", "raw logits, float32"),
    "logprobs": ("[n - 1]", "natural log-probability, under logits[i], of the id at position i + 1, float32"),
}
QUANTITIES = ROPE | BEFORE | LAYER | AFTER

# Bounds -------------------------------------------------------------------------------------------
# docs/conformance.md has where these numbers come from.

# The largest error that rounding makes of a number of size 1.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
GROWING_LAYERS = 16  # each adds to the error as much as the first one makes; from the next on it no longer grows
ANGLE = 2.0**-21  # by this many radians a position, as all compute angles in float32


def bound_of(quantity: str, layer: int, dtype: str, hidden_dim: int) -> float:
    """How far right implementations may lie apart, as a part of the quantity's largest number.

    layer: as many come before it. A sum of n products is off by about sqrt(n) roundings where it is made in the dtype
    of the products, as in float32; those of 16 bits are summed in float32, and rounded once.
    """
    if quantity == "embedding":
        return 2 * ROUNDING[dtype]
    roundings = 2 * math.sqrt(hidden_dim) if dtype == "float32" else 8
    return roundings * min(1 + layer, GROWING_LAYERS) * ROUNDING[dtype]


def prompt_file(number: int) -> str:
    return f"prompt-{number:02d}.safetensors"


# Export -------------------------------------------------------------------------------------------


def export(
    *,
    ckpt_dir: str,
    out: str,
    prompts: str | None = None,
    dtype: str = "float32",
    tokenizer_path: str | None = None,
    max_seq_len: int = 512,
    device: str = "cpu",
) -> None:
    """Write what a model computes, step by step, for other implementations to compare themselves with.

    For a few short prompts, the embeddings, the vectors between the layers' parts, the KV cache, logits and
    log-probabilities; RoPE rows at far positions; ids of texts and dialogs. docs/conformance.md has the layout. The
    layers are those of llama/model.py, as --plain runs them, on one rank.

    ckpt_dir: folder with consolidated.NN.pth and params.json; the tokenizer is looked for in it and beside it.
    out: the new folder; it appears when all is written.
    prompts: a file with further prompts, one a line. A position takes 0.5 MB for a model of 135M parameters, 4 MB for
        one of 7B, in memory as long as its prompt is computed.
    dtype: what is computed in; float32 whatever the files hold.
    max_seq_len: room for the longest prompt and the 4 ids that the model adds to it.
    """
    _need_safetensors()
    if current_world().size > 1:
        raise ValueError(f"{current_world().size} ranks are running: vectors are exported by one, start it without")
    target = as_path(out)
    if os.path.lexists(target):
        raise ValueError(f"{target} exists and is left as it is: name another folder")
    texts = [*PROMPTS]
    if prompts is not None:
        texts += [line for line in read_text(as_path(prompts)).replace("\r\n", "\n").split("\n") if line.strip()]
    model = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, 1, device=device, dtype=dtype, plain=True)
    try:
        _export(model, texts, target)
    finally:
        model.close()


def _export(source: Llama, texts: list[str], target: Path) -> None:
    from safetensors.torch import save

    args, tokenizer = source.model.params, source.tokenizer
    encoded = [tokenizer.encode(text, bos=tokenizer.adds_bos, eos=False) for text in texts]
    for text, ids in zip(texts, encoded, strict=True):
        if not 0 < len(ids) <= args.max_seq_len - STEPS:
            raise ValueError(
                f"the prompt {_short(text)} has {len(ids)} ids, and {STEPS} follow it, but max_seq_len is "
                f"{args.max_seq_len}: give --max_seq_len {len(ids) + STEPS}, or a shorter prompt"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.partial-{os.getpid()}")
    unfinished.mkdir()
    try:
        positions = torch.tensor(ROPE_POSITIONS)
        # The model's own table ends at max_seq_len; its rows do not depend on how many there are.
        table = torch.view_as_real(rotary_angles(args, max(ROPE_POSITIONS) + 1)[positions])
        rows = {name: column.contiguous() for name, column in zip(ROPE, table.unbind(-1), strict=True)}
        (unfinished / ROPE_FILE).write_bytes(save(rows))
        found = record(source.model)
        described = []
        for number, (text, ids) in enumerate(zip(progress(texts, "prompts"), encoded, strict=True)):
            vectors, next_ids = vectors_of(source.model, found, ids)
            for name, tensor in vectors.items():
                if not tensor.isfinite().all():
                    raise FloatingPointError(
                        f"{name} of the prompt {_short(text)} is not finite: the weights are damaged, or their dtype "
                        "overflows (try --dtype float32)"
                    )
            (unfinished / prompt_file(number)).write_bytes(save(vectors))
            described.append({"text": text, "ids": ids, "next_ids": next_ids})
        dialogs = [] if source.chat_format is None else [*DIALOGS]
        about = {
            "format": FORMAT,
            "version": VERSION,
            "written_by": f"llama-runner {llama.__version__}, torch {torch.__version__}",
            "dtype": str(source.model.norm.weight.dtype).removeprefix("torch."),
            "params": _params(args),
            "prompts": described,
            "chat_format": source.chat_format and source.chat_format.name,
            "dialogs": [{"messages": dialog, "ids": source.dialogs.encode(dialog)} for dialog in dialogs],
            "rope_positions": ROPE_POSITIONS,
            "quantities": {
                name: {"shape": shape, "definition": definition} for name, (shape, definition) in QUANTITIES.items()
            },
            "sha256": {path.name: _sha256(path) for path in sorted(unfinished.iterdir())},
        }
        (unfinished / "kit.json").write_text(dumps(about, indent=1) + "\n", encoding="utf-8")
        size = sum(path.stat().st_size for path in unfinished.iterdir())
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    count = sum(len(prompt["ids"]) + STEPS for prompt in described)
    log.info(f"wrote {target}: {len(texts)} prompts, {count} positions, {len(dialogs)} dialogs, {size / 1e6:,.1f} MB")


def record(model: Transformer) -> dict[str, list[torch.Tensor]]:
    """Keep, from now on, what flows through a plain model: by name, a tensor a call. KV caches are not among it."""
    found: dict[str, list[torch.Tensor]] = defaultdict(list)

    def output(name: str) -> Callable[..., None]:
        return lambda module, args, value: found[name].append(value[0].cpu())

    def argument(name: str) -> Callable[..., None]:
        return lambda module, args: found[name].append(args[0][0].cpu())

    def turned(i: int, layer: TransformerBlock) -> None:
        """No hook sees q and k as RoPE has turned them: turn once more what the products gave."""
        flat: dict[str, torch.Tensor] = {}

        def attention(module: torch.nn.Module, args: tuple[Any, ...], value: torch.Tensor) -> None:
            q, k = (flat[name].unflatten(-1, (-1, layer.attention.head_dim)) for name in ("wq", "wk"))
            for name, turned in zip("qk", apply_rotary_emb(q, k, args[2]), strict=True):
                found[f"layers.{i}.{name}"].append(turned[0].cpu())

        for name in ("wq", "wk"):
            getattr(layer.attention, name).register_forward_hook(lambda m, a, y, name=name: flat.update({name: y}))
        layer.attention.register_forward_hook(attention)

    model.tok_embeddings.register_forward_hook(output("embedding"))
    for i, layer in enumerate(cast(list[TransformerBlock], model.layers)):
        layer.register_forward_pre_hook(argument(f"layers.{i}.input"))
        turned(i, layer)
        layer.attention.register_forward_hook(output(f"layers.{i}.attention"))
        layer.feed_forward.register_forward_hook(output(f"layers.{i}.feed_forward"))
    model.norm.register_forward_hook(output("norm"))
    return found


def vectors_of(
    model: Transformer, found: dict[str, list[torch.Tensor]], ids: list[int]
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """All quantities of a prompt, and the STEPS ids that the model adds; `found` is what `record` gave."""
    found.clear()
    device = model.freqs_cis.device
    next_ids: list[int] = []
    logits = model(torch.tensor([ids], device=device), 0)[0]
    while len(next_ids) < STEPS:
        next_ids.append(int(logits[-1].argmax()))
        position = len(ids) + len(next_ids) - 1
        logits = torch.cat((logits, model(torch.tensor([next_ids[-1:]], device=device), position)[0]))
    vectors = {name: torch.cat(parts) for name, parts in found.items()}
    for i, cache in enumerate(model.caches):
        for name, buffer in (("cache_k", cache.k), ("cache_v", cache.v)):
            vectors[f"layers.{i}.{name}"] = buffer[0, :, : len(logits)].transpose(0, 1).cpu()
    vectors["logits"] = logits.cpu()
    following = torch.tensor([*ids, *next_ids][1:])
    vectors["logprobs"] = score(vectors["logits"][:-1], following, 0)[:, 0]
    return {name: tensor.contiguous() for name, tensor in vectors.items()}, next_ids


# Compare ------------------------------------------------------------------------------------------


def compare(kit: str, other: str, *, json: bool = False) -> None:
    """Compare another implementation's vectors with a kit's, and name the first that lie too far apart.

    Ends with exit status 1 and the first layer and quantity, in the order of computation, whose error is beyond what
    rounding explains in the dtype of the coarser side; else with one line that begins with OK and has the largest error
    of each quantity, as a part of its largest number, and in percent of its bound. What `other` lacks is named.

    kit: a folder that `conformance export` wrote.
    other: a folder of the same layout; it may hold fewer quantities (docs/conformance.md).
    json: instead, print one object: {"ok", "dtype", "first": null or what the line says of the first that is too far,
        "errors": {quantity: {"error", "of_bound"}}, "not_compared": [quantities]}.
    """
    _need_safetensors()
    ours, theirs = Kit(as_path(kit)), Kit(as_path(other))
    _check_kinship(ours, theirs)
    found = Comparison(ours, theirs)
    if json:
        print(dumps(found.as_json(), allow_nan=False))
    else:
        print("\n".join(found.lines()))
    if found.first is not None:
        sys.exit(1)


class KitError(ValueError):
    """A folder is no kit, a damaged one, or one of another model; the message names it and the way out."""


class Kit:
    """A folder in the layout of docs/conformance.md, its JSON checked. Tensors are read one at a time."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "kit.json"
        about = self._read()
        self.dtype = self._checked(about, "dtype", str, "missing")
        if self.dtype not in ROUNDING:
            raise KitError(f"{self.path}: dtype is {self.dtype!r}, expected {', '.join(ROUNDING)}")
        self.params = self._checked(about, "params", dict, {})
        for name in self.params.keys() & set(SIZES):
            self._check_size(name)
        self.rope_positions = self._checked(about, "rope_positions", list, [])
        self._check_whole(self.rope_positions, "rope_positions")
        self.prompts = self._checked(about, "prompts", list, [])
        self.dialogs = self._checked(about, "dialogs", list, [])
        for kind, keys in (("prompts", ("text", "next_ids")), ("dialogs", ("messages",))):
            for number, entry in enumerate(about.get(kind, [])):
                for key in keys:
                    if not isinstance(entry, dict) or key not in entry:
                        raise KitError(f"{self.path}: {kind}[{number}] has no {key!r}")
                for key in ("ids", "next_ids"):
                    self._check_whole(entry.get(key, []), f"{key} of {kind}[{number}]")
        self.files = [ROPE_FILE, *(prompt_file(number) for number in range(len(self.prompts)))]
        self.sha256 = self._checked(about, "sha256", dict, {})
        if unknown := sorted(self.sha256.keys() - set(self.files)):
            raise KitError(f"{self.path}: sha256 names {unknown[0]!r}, expected {', '.join(self.files)}")
        for name in self.files:
            self._check_file(name)

    def _read(self) -> dict[str, Any]:
        try:
            found = self.path.stat()
            if not stat.S_ISREG(found.st_mode) or found.st_size > JSON_LIMIT:
                raise ValueError(f"it is no regular file of at most {JSON_LIMIT:,} bytes")
            about = loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise KitError(
                f"{self.path} is missing: name a folder that `conformance export` or a writer has made"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise KitError(f"{self.path} cannot be read as JSON ({error}): write it again") from error
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise KitError(f'{self.path} does not say "format": "{FORMAT}": it is no kit')
        if about.get("version") != VERSION:
            raise KitError(
                f"{self.path} has version {about.get('version')!r} of the layout, this is {VERSION}: write it anew"
            )
        return about

    def _checked(self, about: dict[str, Any], key: str, kind: type, default: Any) -> Any:
        value = about.get(key, default)
        if not isinstance(value, kind):
            raise KitError(f"{self.path}: {key} is a {type(value).__name__}, expected a {kind.__name__}")
        return value

    def _check_size(self, name: str) -> None:
        value, limit = self.params[name], int(LIMITS.get(name, (1, 2**24))[1])
        step, kind = (2, "an even") if name == "head_dim" else (1, "a whole")  # a head is made of pairs
        if type(value) is not int or not 0 < value < limit or value % step:
            expected = f"expected {kind} number from 1 to {limit - 1:,}"
            raise KitError(f"{self.path}: {name} is {_short(value)}, {expected}: write it again")

    def _check_whole(self, numbers: Any, name: str) -> None:
        if not isinstance(numbers, list) or not all(type(i) is int and 0 <= i < NUMBER_LIMIT for i in numbers):
            raise KitError(f"{self.path}: {name} is no list of whole numbers from 0 to {NUMBER_LIMIT - 1:,}: mend it")

    def _check_file(self, name: str) -> None:
        path, digest = self.folder / name, self.sha256.get(name)
        try:
            if path.exists() and not path.is_file():
                raise KitError(f"{path} is no regular file: write it again")
            if name in self.sha256 and _sha256(path) != digest:
                raise KitError(f"{path} is damaged, its sha256 is another than kit.json says: export it anew")
        except OSError as error:
            raise KitError(f"{path} cannot be read ({error.strerror}), and kit.json names it: export it anew") from None

    def shapes(self, number: int) -> dict[str, tuple[int, ...]]:
        """By quantity, what the table above says for a prompt; of a kit that `_check_kinship` took for a whole one."""
        prompt = self.prompts[number]
        n = len(prompt["ids"]) + len(prompt["next_ids"])
        sizes = self.params | {"n": n, "n - 1": n - 1}
        sizes |= {"positions": len(self.rope_positions), "head_dim / 2": self.params["head_dim"] // 2}
        return {
            name: tuple(sizes[word] for word in shape.strip("[]").split(", "))
            for name, (shape, _) in QUANTITIES.items()
        }

    def tensors(self, name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Callable[[], torch.Tensor]]:
        """What reads each of the file's tensors, by name; nothing where there is no such file. Raises KitError where
        one has another name, shape or type than those of the layout."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / name
        if not path.exists():
            return {}
        try:
            file = safe_open(path, framework="pt")
            headers = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (not a dictionary)
        except (SafetensorError, OSError) as error:
            raise KitError(f"{path} is damaged or cut off ({error}): write it again") from error
        for key, header in headers.items():
            if key not in shapes:
                raise KitError(f"{path} holds {key!r}, which is no name of the layout, as {[*shapes][-1]!r} is one")
            shape, kind = header.get_shape(), header.get_dtype()
            if shape != [*shapes[key]] or kind not in FLOATS:
                raise KitError(
                    f"{path}: {key} is {kind} {shape}, expected floats {[*shapes[key]]}: "
                    "docs/conformance.md has the layout"
                )
        return {key: partial(file.get_tensor, key) for key in headers}


def _check_kinship(kit: Kit, other: Kit) -> None:
    """Raises KitError where the two are not of one model and the same prompts."""
    whole = kit.sha256.keys() == set(kit.files) and kit.params.keys() >= set(SIZES) and kit.rope_positions
    ids = [entry.get("ids") for entry in kit.prompts + kit.dialogs] + [entry["next_ids"] for entry in kit.prompts]
    if not whole or not kit.prompts or not all(ids):
        raise KitError(f"{kit.path} is not what `conformance export` writes: the kit comes first, then the other side")
    for name in SIZES:
        if name in other.params and other.params[name] != kit.params[name]:
            raise KitError(
                f"{other.folder} is of another model: {name} is {other.params[name]!r}, the kit's {kit.params[name]!r}"
            )
    for kind, keys, mine, theirs in (
        ("prompt", ("text", "next_ids"), kit.prompts, other.prompts),
        ("dialog", ("messages",), kit.dialogs, other.dialogs or kit.dialogs),
    ):
        if len(theirs) != len(mine):
            raise KitError(f"{other.folder} has {len(theirs)} {kind}s, the kit {len(mine)}: write those of the kit")
        for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            for key in keys:
                if a[key] != b[key]:
                    raise KitError(
                        f"{other.folder} was written for another kit: {key} of {kind} {number} is {_short(b[key])}, "
                        f"in the kit {_short(a[key])}"
                    )
    if other.rope_positions not in ([], kit.rope_positions):
        raise KitError(
            f"{other.folder}: rope_positions are {other.rope_positions}, the kit's {kit.rope_positions}: write those"
        )


@dataclass
class Divergence:
    """Where two sides part first. where: the same in words. index: of the number, the position first.

    error and bound are those of the number, None for ids; value and expected are None where the ids have ended.
    """

    quantity: str
    where: str
    index: list[int]
    value: float | None
    expected: float | None
    error: float | None = None
    bound: float | None = None

    def __str__(self) -> str:
        if self.bound is None:
            value, expected = ("no more" if i is None else i for i in (self.value, self.expected))
            return f"{self.where} is {value}, expected {expected}"
        value = f"{self.value:.7g}" if math.isfinite(cast(float, self.value)) else "not finite"
        return f"{self.where} is {value}, expected {self.expected:.7g}: error {self.error:.2g}, bound {self.bound:.2g}"


class Comparison:
    """What comes of comparing two kits, in the order of computation, up to the first divergence.

    errors: by quantity, all layers together, the largest error as a part of the quantity's largest number, and the
    largest as a part of its bound. lacking: by quantity, how many tensors or lists were there to be compared, and how
    many of them the other side lacks.
    """

    def __init__(self, kit: Kit, other: Kit):
        self.kit, self.other = kit, other
        self.dtype = max(kit.dtype, other.dtype, key=lambda name: ROUNDING[name])
        self.first: Divergence | None = None
        self.errors: dict[str, tuple[float, float]] = {}
        self.lacking: dict[str, tuple[int, int]] = {}
        layers: int = kit.params["n_layers"]
        names = [(name, name, 0) for name in BEFORE]
        names += [(f"layers.{i}.{name}", name, i) for i in range(layers) for name in LAYER]
        names += [(name, name, layers) for name in AFTER]
        self._ids("prompt ids", kit.prompts, other.prompts)
        self._ids("dialog ids", kit.dialogs, other.dialogs)
        self._tensors([ROPE_FILE], [(name, name, 0) for name in ROPE])
        self._tensors(kit.files[1:], names)
        if all(there == missing for there, missing in self.lacking.values()):
            raise KitError(
                f"{other.folder} has nothing of what the kit has, neither {ROPE_FILE}, {prompt_file(0)}, ... nor ids"
            )

    def lines(self) -> Iterator[str]:
        absent = [
            name if missing == there else f"{name} ({missing} of {there})"
            for name, (there, missing) in self.lacking.items()
            if missing
        ]
        if absent:
            yield f"note: not compared, as {self.other.folder} lacks them: {', '.join(absent)}"
        if self.first is not None:
            yield f"DIVERGES: {self.first}" + ("" if self.first.bound is None else f" ({self.dtype})")
            return
        equal = [
            f"{name} equal" for name in ("prompt ids", "dialog ids") if name in self.lacking and name not in absent
        ]
        errors = [f"{name} {error:.1e} ({part:.0%})" for name, (error, part) in self.errors.items()]
        yield f"OK: {self.other.folder} in {self.dtype}, largest errors (of the bound): {', '.join(equal + errors)}"

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.first is None,
            "dtype": self.dtype,
            "first": self.first and {name: _or_none(value) for name, value in asdict(self.first).items()},
            "errors": {
                name: {"error": _or_none(error), "of_bound": _or_none(part)}
                for name, (error, part) in self.errors.items()
            },
            "not_compared": [name for name, (_, missing) in self.lacking.items() if missing],
        }

    def _is_there(self, name: str, found: Any) -> bool:
        there, missing = self.lacking.get(name, (0, 0))
        self.lacking[name] = (there + 1, missing + (found is None))
        return found is not None

    def _ids(self, name: str, mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
        for number, entry in enumerate(mine):
            found = theirs[number].get("ids") if theirs else None
            if not self._is_there(name, found) or found is None or self.first is not None:
                continue
            for i, (value, expected) in enumerate(zip_longest(found, entry["ids"])):
                if value != expected:
                    what = f"{name.split()[0]} {number} {_short(entry.get('text', entry.get('messages')))}"
                    self.first = Divergence(name, f"{what}, id {i}", [i], value, expected)
                    break

    def _tensors(self, files: list[str], names: list[tuple[str, str, int]]) -> None:
        """files: those that hold the tensors, one for each prompt. names: (tensor, quantity, layer) in order."""
        sides = []
        for number, file in enumerate(files):
            of = self.kit.shapes(number)
            shapes = {name: of[quantity] for name, quantity, _ in names}
            mine, theirs = self.kit.tensors(file, shapes), self.other.tensors(file, shapes)
            if lacking := [name for name in shapes if name not in mine]:
                raise KitError(f"{self.kit.folder / file} lacks {lacking[0]}: export it anew")
            sides.append((file, mine, theirs))
        for name, quantity, layer in names:
            for number, (file, mine, theirs) in enumerate(sides):
                if not self._is_there(quantity, theirs.get(name)) or self.first is not None:
                    continue
                expected, found = self._reference(file, name, mine), theirs[name]().double()
                largest = float(expected.abs().max())
                if quantity in ROPE:
                    where = name
                    bounds = [2 * ROUNDING[self.dtype] + ANGLE * position for position in self.kit.rope_positions]
                else:
                    where = f"{name}, prompt {number} {_short(self.kit.prompts[number]['text'])}"
                    if quantity == "logprobs":  # a difference of logits, and not exacter than they are
                        largest += float(self._reference(file, "logits", mine).abs().max())
                    bound = bound_of(quantity, layer, self.dtype, self.kit.params["hidden_dim"]) * largest
                    bounds = [bound] * len(expected)
                self._numbers(quantity, where, found, expected, bounds, largest)

    def _reference(self, file: str, name: str, mine: dict[str, Callable[[], torch.Tensor]]) -> torch.Tensor:
        tensor = mine[name]()
        if not tensor.float().isfinite().all():  # the layout's largest type: sums of these are finite as float64
            raise KitError(f"{self.kit.folder / file}: {name} is not finite, so it is no reference: export it anew")
        return tensor.double()

    def _numbers(
        self, quantity: str, where: str, found: torch.Tensor, expected: torch.Tensor, bounds: list[float], scale: float
    ) -> None:
        """Compare two tensors [positions, ..]. bounds: one a position. scale: what errors are told as a part of."""
        error = (found - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf).reshape(len(expected), -1)
        bound = torch.tensor(bounds, dtype=torch.float64)[:, None]
        tiny = 1e-300  # of a quantity that is all zeros
        worst, share = self.errors.get(quantity, (0.0, 0.0))
        worst = max(worst, float(error.max()) / max(scale, tiny))
        self.errors[quantity] = (worst, max(share, float((error / bound.clamp(min=tiny)).max())))
        far = (error > bound).any(dim=1)
        if not far.any():
            return
        row = int(far.nonzero()[0])
        column = int(error[row].argmax())
        place = (row, *(int(i) for i in torch.unravel_index(torch.tensor(column), expected.shape[1:])))
        words = ("head", "number")[3 - expected.dim() :]  # what the numbers of a place are, after the position
        position = self.kit.rope_positions[row] if quantity in ROPE else row
        where += f", position {position}" + "".join(f", {word} {i}" for word, i in zip(words, place[1:], strict=True))
        value, right, off = float(found[place]), float(expected[place]), float(error[row, column])
        self.first = Divergence(quantity, where, [*place], value, right, off, bounds[row])


def _or_none(value: Any) -> Any:
    """JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _params(args: ModelArgs) -> dict[str, Any]:
    """What decides a model's numbers, every default filled in."""
    rope: dict[str, Any] = {"rope_theta": args.rope_theta, "use_scaled_rope": args.use_scaled_rope}
    names = ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_context_length", "rope_linear_factor")
    rope |= {"rope_scaling_factor": args.rope_factor} | {name: getattr(args, name) for name in names}
    sizes: dict[str, Any] = {name: getattr(args, name) for name in SIZES} | {"n_kv_heads": args.kv_heads}
    return sizes | {"norm_eps": args.norm_eps} | rope


def _need_safetensors() -> None:
    if find_spec("safetensors") is None:
        raise KitError("kits need the Python package safetensors: pip install 'llama-runner[convert]'")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _short(text: Any) -> str:
    text = text if isinstance(text, str) else dumps(text, ensure_ascii=False)
    return repr(text if len(text) <= 32 else f"{text[:31]}…")
