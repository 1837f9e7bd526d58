"""Hugging Face folders of Llama, Mistral and Phi-3, read and written: config.json, safetensors or pytorch_model*.bin.

Two things differ from Meta's layout beside the names. Rotary pairs: number i of a head turns with number
i + head_dim / 2, in Meta's with its neighbour, so the rows of wq and wk change places. And Phi-3 keeps wq, wk and wv in
one matrix, w1 and w3 in another.
"""

import contextlib
import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from llama.chat.formats import find_chat_format
from llama.checkpoint.layout import EMBEDDING, OUTPUT, tensor_shapes, without_layer
from llama.checkpoint.shards import open_tensors
from llama.checkpoint.zip_integrity import damaged_records, read_zip
from llama.console import progress
from llama.convert.meta import ConvertError, Source, raw
from llama.convert.params import (
    MOST_LAYERS,
    check_shapes,
    decimal,
    feed_forward_params,
    head_params,
    read_int,
    scaling_params,
    shown,
)
from llama.convert.tokenizer import tokenizer_files
from llama.convert.vocab import hf_tokenizer
from llama.files import JSON, SAFETENSORS, ZIP, detect_format
from llama.params import ModelArgs
from llama.tokenizer import Tokenizer, check_size, find_tokenizer, read_tokenizer_json

NAMES = {EMBEDDING: "model.embed_tokens.weight", "norm.weight": "model.norm.weight", OUTPUT: "lm_head.weight"}
LAYER_NAMES = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
# Phi-3's two fused matrices, and whose rows they hold one below the other.
FUSED = {
    "self_attn.qkv_proj.weight": ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"),
    "mlp.gate_up_proj.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
}
FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "phi3": "Phi3ForCausalLM"}
# What a configuration means that leaves these keys out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6},
    "mistral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    "phi3": {"rms_norm_eps": 1e-5},
}
SKIPPED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # old folders have them; computed here
SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def _name(name: str) -> str:
    """Meta's tensor name -> Hugging Face's."""
    if name in NAMES:
        return NAMES[name]
    return f"model.layers.{name.split('.')[1]}.{LAYER_NAMES[without_layer(name)]}"


def interleaved(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of wq or wk [n_heads * head_dim, dim] from this order to Meta's: pair i to places 2i and 2i + 1."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def half_split(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """The way back: pair i to places i and i + head_dim / 2."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _heads(name: str, args: ModelArgs) -> int | None:
    """The heads of a matrix whose rows the two layouts order differently."""
    return {"attention.wq.weight": args.n_heads, "attention.wk.weight": args.kv_heads}.get(without_layer(name))


# Reading ------------------------------------------------------------------------------------------


@dataclass
class Stored:
    """A tensor in its file: `rows` reads rows [start, stop) of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], torch.Tensor]


def read(folder: Path) -> Source:
    """Read the configuration and the names and shapes of all tensors, and check them. Raises ConvertError."""
    try:
        return _read(folder)
    except ModuleNotFoundError as error:
        raise ConvertError(
            f"{folder} needs the Python package {error.name}: pip install 'llama-runner[convert]'"
        ) from error
    except OSError as error:
        raise ConvertError(f"{error.filename or folder} cannot be read ({error.strerror}): fetch it again") from error
    except ConvertError as error:
        raise ConvertError(f"{folder}: {error}") from error


def _read(folder: Path) -> Source:
    config = _read_json(folder / "config.json")
    family = _family(config)
    try:
        params, tied, max_positions = _params(config, family), _tied(config), _max_positions(config)
    except ConvertError as error:
        raise ConvertError(f"config.json: {error}") from error
    stored = {name: tensor for name, tensor in _stored(folder).items() if not SKIPPED.fullmatch(name)}
    args = ModelArgs(**params)
    shapes = tensor_shapes(args)
    if tied and NAMES[OUTPUT] not in stored:  # one that is stored is what runs
        del shapes[OUTPUT]
    if family == "phi3":
        stored = _split(stored, shapes)
    expected = {_name(name): shape for name, shape in shapes.items()}
    check_shapes({name: tensor.shape for name, tensor in stored.items()}, expected)
    for name in expected:
        if stored[name].dtype not in SAFETENSORS_TYPES:
            raise ConvertError(
                f"{name} is stored as {stored[name].dtype}: float32, bfloat16 and float16 are supported, "
                "take the unquantized folder"
            )

    def reader(name: str) -> Callable[[], torch.Tensor]:
        tensor, heads = stored[_name(name)], _heads(name, args)
        if heads is None:
            return lambda: tensor.rows(0, tensor.shape[0])
        return lambda: interleaved(tensor.rows(0, tensor.shape[0]), heads)

    files, notes = _tokenizer(folder, config, args)
    if args.sliding_window is not None:
        notes.append(f"attention slides over {args.sliding_window} positions: max_seq_len has to stay inside")
    tensors = {name: reader(name) for name in shapes}
    dtypes = {name: stored[_name(name)].dtype for name in shapes}
    return Source(params, tensors, files, dtypes, max_positions=max_positions, notes=notes)


def _read_json(path: Path) -> dict[str, Any]:
    check_size(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        kind = detect_format(path)
        kind = f"no JSON ({error})" if kind in (None, JSON) else kind
        raise ConvertError(f"{path.name} is {kind}: fetch it again") from error
    if not isinstance(found, dict):
        raise ConvertError(f"{path.name} holds a {type(found).__name__}, expected an object: fetch it again")
    return found


def _family(config: dict[str, Any]) -> str:
    """llama, mistral or phi3; ConvertError by the name of what it is instead."""
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    kind = config.get("model_type")
    for family, name in FAMILIES.items():
        if architecture == name or (architecture is None and kind == family):
            return family
    if architecture is None and kind is None:
        raise ConvertError("config.json names no architecture: it describes no model that is supported")
    raise ConvertError(
        f"architecture {shown(architecture or kind)} is not supported: {', '.join(FAMILIES.values())} are"
    )


def _params(config: dict[str, Any], family: str) -> dict[str, Any]:
    """The keys of params.json; ConvertError for what the runner's model does not compute."""
    config = DEFAULTS[family] | config
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ConvertError(f"{key} is {shown(config[key])}: models with biases are not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ConvertError(f"hidden_act is {shown(config['hidden_act'])}: only silu is supported")
    if isinstance(quantized := config.get("quantization_config"), dict):
        raise ConvertError(
            f"weights are quantized ({quantized.get('quant_method', 'unknown method')}), which is not supported: "
            "take the unquantized folder"
        )
    dim, n_heads = read_int(config, "hidden_size"), read_int(config, "num_attention_heads")
    n_kv_heads = read_int(config, "num_key_value_heads", n_heads)
    if config.get("head_dim") is None and dim % n_heads:
        raise ConvertError(f"hidden_size {dim} is no multiple of {n_heads} heads: fetch config.json again")
    params = {
        "dim": dim,
        "n_layers": read_int(config, "num_hidden_layers", limit=MOST_LAYERS),
        **head_params(dim, n_heads, n_kv_heads, read_int(config, "head_dim", dim // n_heads)),
        "vocab_size": read_int(config, "vocab_size"),
        **feed_forward_params(dim, read_int(config, "intermediate_size")),
        "norm_eps": decimal(config, "rms_norm_eps"),
        **_rope(config),
    }
    if family != "llama" and config.get("sliding_window") is not None:
        params["sliding_window"] = read_int(config, "sliding_window")
    return params


def _tied(config: dict[str, Any]) -> bool:
    tied = config.get("tie_word_embeddings")
    if not isinstance(tied, bool | None):
        raise ConvertError(f"tie_word_embeddings is {shown(tied)}, expected true or false")
    return bool(tied)


def _max_positions(config: dict[str, Any]) -> int:
    """0 where the configuration does not say."""
    return 0 if config.get("max_position_embeddings") is None else read_int(config, "max_position_embeddings")


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and the scaling: rope_parameters since transformers 5, rope_theta and rope_scaling before."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    for rope in (new, old):
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise ConvertError(f"the rotary settings {shown(rope)} are not supported: one object for all layers is")
    kinds = [rope.get("rope_type", rope.get("type")) or "default" for rope in (new, old) if rope]
    thetas = {decimal(source, "rope_theta") for source in (config, new, old) if source.get("rope_theta") is not None}
    if len(thetas) > 1 or kinds[1:] not in ([], kinds[:1]) or new | old != old | new:
        raise ConvertError("rope_theta, rope_parameters and rope_scaling contradict each other: fetch the folder again")
    rope = new | old
    params: dict[str, Any] = {"rope_theta": next(iter(thetas), 10000.0)}
    partial = config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise ConvertError(f"partial_rotary_factor is {shown(partial)}: only 1.0 is supported")
    kind = kinds[0] if kinds else "default"
    if kind == "llama3":
        return params | scaling_params(
            factor=decimal(rope, "factor"),
            low_freq_factor=decimal(rope, "low_freq_factor"),
            high_freq_factor=decimal(rope, "high_freq_factor"),
            original_context_length=read_int(rope, "original_max_position_embeddings"),
        )
    if kind == "linear":
        return params | {"rope_linear_factor": decimal(rope, "factor")}
    if kind != "default":
        raise ConvertError(f"rope scaling {shown(kind)} is not supported: rope_type default, linear and llama3 are")
    return params


def _stored(folder: Path) -> dict[str, Stored]:
    """All tensors by Hugging Face's names, with nothing read."""
    for name, opener in (("model.safetensors", _open_safetensors), ("pytorch_model.bin", _open_torch)):
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return opener(folder / name)
        if index.exists():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise ConvertError(f"{index.name} has no weight_map of names to files: fetch it again")
            stored: dict[str, Stored] = {}
            for file in progress(sorted(set(weight_map.values())), "opening"):
                if Path(file).name != file:
                    raise ConvertError(f"{index.name} names {file!r}, a file outside the folder: do not trust it")
                if not (folder / file).exists():
                    raise ConvertError(f"{file} is missing, which {index.name} names: fetch it")
                found = opener(folder / file)
                if twice := sorted(found.keys() & stored.keys()):
                    raise ConvertError(f"{file} holds {twice[0]}, which another file holds too: fetch the folder again")
                stored |= found
            if lost := sorted(weight_map.keys() - stored.keys()):
                raise ConvertError(f"{weight_map[lost[0]]} lacks {lost[0]}, which {index.name} names: fetch it again")
            return stored
    if (folder / "adapter_config.json").exists():
        raise ConvertError("only an adapter is in here, no model: merge it into its base model first")
    raise ConvertError("neither model.safetensors nor pytorch_model.bin nor an index of them is in here: fetch them")


def _open_safetensors(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    types = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    _refuse_foreign(path, SAFETENSORS)
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise ConvertError(f"{path.name} is damaged or cut off ({error}): fetch it again") from error

    def stored(part: Any) -> Stored:
        kind = part.get_dtype()
        return Stored(tuple(part.get_shape()), types.get(kind, kind), lambda start, stop: part[start:stop])

    return {name: stored(part) for name, part in slices.items()}


def _open_torch(path: Path) -> dict[str, Stored]:
    _refuse_foreign(path, ZIP)

    def stored(tensor: torch.Tensor) -> Stored:
        return Stored(tuple(tensor.shape), tensor.dtype, lambda start, stop: tensor[start:stop])

    tensors = open_tensors(path)
    if torn := damaged_records(path, read_zip(path)):
        raise ConvertError(f"{path.name} is damaged in {torn[0]}: fetch it again")
    return {name: stored(tensor) for name, tensor in tensors.items()}


def _refuse_foreign(path: Path, expected: str) -> None:
    kind = detect_format(path)
    if kind not in (None, expected):
        raise ConvertError(f"{path.name} is {kind}, not {expected}: fetch it again")


def _split(stored: dict[str, Stored], shapes: dict[str, tuple[int, ...]]) -> dict[str, Stored]:
    """Phi-3's fused matrices as the ones they are made of."""

    def part(fused: Stored, start: int, shape: tuple[int, ...]) -> Stored:
        return Stored(shape, fused.dtype, lambda low, high: fused.rows(start + low, start + high))

    split = dict(stored)
    for name, fused in stored.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None or match[2] not in FUSED:
            continue
        members = {
            key: shapes.get(key, (0, 0)) for key in (f"layers.{match[1]}.{member}" for member in FUSED[match[2]])
        }
        expected = (sum(shape[0] for shape in members.values()), next(iter(members.values()))[1])
        check_shapes({name: fused.shape}, {name: expected})
        del split[name]
        start = 0
        for key, shape in members.items():
            split[_name(key)] = part(fused, start, shape)
            start += shape[0]
    return split


def _tokenizer(folder: Path, model_config: dict[str, Any], args: ModelArgs) -> tuple[dict[str, bytes], list[str]]:
    """The tokenizer's files for the new folder, and notes.

    tokenizer.model where it has all the ids, as it needs no further package; tokenizer.json where tokens were added.
    """
    model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    config = _read_json(path) if (path := folder / "tokenizer_config.json").exists() else {}
    named = _read_json(path) if (path := folder / "special_tokens_map.json").exists() else {}
    if config.get("chat_template") is None and (path := folder / "chat_template.jinja").exists():
        check_size(path)
        config["chat_template"] = path.read_text(encoding="utf-8", errors="replace")
    for path in (model, fast):
        if path.exists() and (kind := detect_format(path)) not in (None, JSON):
            raise ConvertError(f"{path.name} is {kind}: fetch it again")
    own = Tokenizer(model, use_scaled_rope=args.use_scaled_rope) if model.exists() else None
    if fast.exists():
        reader = read_tokenizer_json(fast)
        for name in ("bos", "eos", "pad"):  # by name, or where no file names it, by the model's id
            ids = model_config.get(f"{name}_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            by_id = next((i for i in ids if type(i) is int and 0 <= i < args.vocab_size), None)
            known = [config.get(f"{name}_token"), named.get(f"{name}_token")]
            known += [] if by_id is None else [reader.id_to_token(by_id)]
            config[f"{name}_token"] = next((token for token in known if token is not None), None)
        if own is None or not _same(model, own, reader, config["eos_token"]):
            return tokenizer_files({fast.name: fast.read_bytes()}, config, args.vocab_size), []
    if own is not None:
        added = _read_json(path) if (path := folder / "added_tokens.json").exists() else {}
        if any(not isinstance(i, int) or i >= own.n_words for i in added.values()):
            raise ConvertError(
                "tokenizer.model lacks the tokens of added_tokens.json; tokenizer.json has all: fetch it too"
            )
        return tokenizer_files({model.name: model.read_bytes()}, config, args.vocab_size), []
    return {}, [f"{folder} has neither tokenizer.model nor tokenizer.json: put one beside the new files"]


def _same(path: Path, own: Tokenizer, fast: Any, eos: Any) -> bool:
    """Whether a tokenizer.model says all that a tokenizer.json does: every token by its id, and which one is EOS."""
    from sentencepiece import SentencePieceProcessor

    if own.n_words <= max(fast.get_vocab().values(), default=-1):
        return False
    if own.kind != "sentencepiece":  # ranks name no tokens
        return all(fast.token_to_id(name) in (None, i) for name, i in own.special_ids.items())
    eos = eos.get("content") if isinstance(eos, dict) else eos
    pieces = SentencePieceProcessor(model_file=str(path))
    names = [pieces.id_to_piece(i) for i in range(own.n_words)]
    return eos in (None, names[own.eos_id]) and all(fast.id_to_token(i) == name for i, name in enumerate(names))


# Writing ------------------------------------------------------------------------------------------


def check_shards(args: ModelArgs, shards: int) -> None:
    tensors = len(tensor_shapes(args))
    if type(shards) is not int or not 1 <= shards < tensors:
        raise ConvertError(f"--shards is {shards!r}, expected a number of files from 1 to {tensors - 1}")


def write(source: Source, folder: Path, dtypes: dict[str, torch.dtype], shards: int) -> None:
    """Fill an empty folder, one tensor in memory at a time."""
    args = source.args
    shapes = {name: tensor_shapes(args)[name] for name in source.tensors}
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    total, done = sum(sizes.values()), 0
    groups: list[list[str]] = [[] for _ in range(shards)]
    for name, size in sizes.items():  # in order, each file about as large as the next: by where a tensor's middle is
        groups[(2 * done + size) * shards // (2 * total)].append(name)
        done += size
    if not all(groups):
        raise ConvertError(f"--shards {shards} would leave a file empty, as tensors stay whole: take fewer")
    files = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    if shards == 1:
        files = ["model.safetensors"]
    with contextlib.ExitStack() as stack:
        place: dict[str, BinaryIO] = {}
        for file, group in zip(files, groups, strict=True):
            out = stack.enter_context((folder / file).open("wb"))
            out.write(_header({_name(name): (shapes[name], dtypes[name]) for name in group}))
            place |= dict.fromkeys(group, out)
        for name in progress(list(shapes), "converting"):
            tensor, heads = source.read(name, dtypes[name]), _heads(name, args)
            place[name].write(raw(tensor if heads is None else half_split(tensor, heads)))
    if shards > 1:
        weight_map = {_name(name): file for file, group in zip(files, groups, strict=True) for name in group}
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    for filename, content in source.files.items():
        (folder / filename).write_bytes(content)
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    stops: set[int] = set()
    if source.files:
        path = find_tokenizer(folder)
        for filename, text in hf_tokenizer(path, args.use_scaled_rope).items():
            (folder / filename).write_text(text, encoding="utf-8")
        tokenizer = Tokenizer(path, use_scaled_rope=args.use_scaled_rope)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
        ids = {name: None if value == -1 else value for name, value in ids.items()}
        dialogs = find_chat_format(tokenizer)
        stops = tokenizer.stop_tokens | (dialogs.stop_tokens if dialogs else set())
    _write_json(folder / "config.json", _config(source, dtypes[EMBEDDING]) | ids)
    _write_json(folder / "generation_config.json", ids | {"eos_token_id": sorted(stops) or None})


def _header(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> bytes:
    """The beginning of a safetensors file: the length of the JSON text in 8 bytes, and the text."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (shape, dtype) in tensors.items():
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_TYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins aligned
    return struct.pack("<Q", len(text)) + text


def _config(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    args = source.args
    family = "llama" if args.sliding_window is None else "mistral"
    rope: dict[str, Any] | None = None
    # Meta's params.json has no limit; where the source had none, these are the families' own.
    positions = {500000.0: 8192, 1000000.0: 16384}.get(args.rope_theta, 4096)
    if args.use_scaled_rope:
        positions = 131072
        rope = {
            "rope_type": "llama3",
            "factor": args.rope_factor,
            "low_freq_factor": args.rope_low_freq_factor,
            "high_freq_factor": args.rope_high_freq_factor,
            "original_max_position_embeddings": args.rope_original_context_length,
        }
    elif args.rope_linear_factor is not None:
        rope = {"rope_type": "linear", "factor": args.rope_linear_factor}
    positions = source.max_positions or positions
    config = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "intermediate_size": args.hidden_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": positions,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": rope,
        "hidden_act": "silu",
        "tie_word_embeddings": OUTPUT not in source.tensors,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if family == "llama":
        return config | {"attention_bias": False, "mlp_bias": False}
    return config | {"sliding_window": args.sliding_window}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
