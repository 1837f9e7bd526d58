"""`Llama.build` on every rank: check options, connect the ranks, open and verify the files, load the weights."""

import logging
import math
import time
import traceback
import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from llama.accelerate.compiled import choose_decoder, start_compiling
from llama.accelerate.executor import Executor
from llama.accelerate.gpu import has_fp8
from llama.accelerate.native import release_freed_memory
from llama.accelerate.quantized_weight import held_bytes, quantize_part
from llama.chat.formats import ChatFormat, find_chat_format
from llama.checkpoint.errors import CheckpointError
from llama.checkpoint.folder import Checkpoint, load_weights
from llama.checkpoint.layout import OUTPUT, check_world_size
from llama.checkpoint.verify import check_before_loading
from llama.errors import OOM_EXPLAINERS, is_out_of_memory
from llama.files import as_path
from llama.memory.check import Choice, check_memory, explained
from llama.model import Transformer, TransformerBlock
from llama.options import BuildOptions, ModelOptions, read_options
from llama.parallel.device import pick_device, pick_dtype, share_cores
from llama.parallel.groups import (
    World,
    all_gather_object,
    connect_ranks,
    current_world,
    init_process_groups,
    raise_on_all_ranks,
    shutdown,
)
from llama.tokenizer import Tokenizer, TokenizerError, find_tokenizer

log = logging.getLogger(__name__)


def load(model: ModelOptions, build: BuildOptions) -> tuple[Executor, Tokenizer, ChatFormat | None]:
    """Load a model onto this rank, with its tokenizer and chat format. Arguments and errors as in `Llama.build`.

    The process group stays initialized until `groups.shutdown` is called. After an error it is shut down already.
    """
    started = time.perf_counter()
    world = current_world()
    try:
        connect_ranks(world)
        with raise_on_all_ranks():
            model, build = _check_options(model, build, world)
            device = pick_device(build["device"], world)
            if build["quantize"] == "fp8" and not has_fp8(device):
                raise ValueError(
                    "quantize 'fp8' needs a GPU of compute capability 8.9 or higher, and a torch with kernels for it: "
                    "use int8"
                )
        per_host = ("ckpt_dir", "tokenizer_path", "model_parallel_size")
        same = {f"--{name}": value for name, value in (model | build).items() if name not in per_host}
        check_same(same | {"--device": device.type}, "start all ranks with the same arguments")
        compile = False if build["plain"] else build["compile"]
        compiling = start_compiling(compile, device)
        share_cores(world)
        init_process_groups(world, device)
        with raise_on_all_ranks():
            files = _open(model, build, device, world)
        check_same({"--dtype": _name(files.dtype)}, "name one that all hosts support")
        check_same(vars(files.checkpoint.params), "give all hosts the same params.json")
        check_same(files.sums, "these are checksums: give all hosts the same files")
        decoder = choose_decoder(compile, device, files.dtype, compiling)
        with raise_on_all_ranks():
            executor, note = _load_weights(files, device, decoder, build["plain"])
    except BaseException:
        shutdown()
        raise
    log.info(_summary(executor.model, files, world.size, note, time.perf_counter() - started))
    torch.manual_seed(model["seed"])  # last, because loading may draw random numbers
    return executor, files.tokenizer, files.chat_format


def _check_options(model: ModelOptions, build: BuildOptions, world: World) -> tuple[ModelOptions, BuildOptions]:
    """Add the defaults. Raises TypeError or ValueError for options that are wrong whatever the checkpoint is."""
    model, build = read_options(ModelOptions, model, "build"), read_options(BuildOptions, build, "build")
    if model["model_parallel_size"] not in (None, world.size):
        raise ValueError(
            f"model_parallel_size is {model['model_parallel_size']}, but {world.size} ranks are running: leave it "
            "out, checkpoints load at any number of ranks"
        )
    if build["plain"] and (build["quantize"] or build["compile"] is True):
        raise ValueError("plain excludes quantize and compile: leave one of them out")
    return model, build


@dataclass
class Files:
    """A checkpoint that was checked against the options and the machine. Its weights are not read yet.

    dtype: that of the computation. fit: the result of `check_memory`. sums: file name -> checksum.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    chat_format: ChatFormat | None
    dtype: torch.dtype
    fit: Choice
    sums: dict[str, str]


def _open(model: ModelOptions, build: BuildOptions, device: torch.device, world: World) -> Files:
    ckpt_dir, max_seq_len = as_path(model["ckpt_dir"]), model["max_seq_len"]
    checkpoint = Checkpoint(model["ckpt_dir"])
    for note in checkpoint.notes:
        log.info(f"note: {note}")
    args = checkpoint.params
    args.max_seq_len, args.max_batch_size = max_seq_len, model["max_batch_size"]
    check_world_size(args, world.size)
    if args.sliding_window is not None and max_seq_len > args.sliding_window:
        raise CheckpointError(
            f"max_seq_len {max_seq_len} goes beyond this model's sliding window of {args.sliding_window} "
            f"positions, which is not implemented: give --max_seq_len {args.sliding_window} or less"
        )
    path = as_path(model["tokenizer_path"] or find_tokenizer(ckpt_dir))
    tokenizer = Tokenizer(path, use_scaled_rope=args.use_scaled_rope)
    if tokenizer.n_words != args.vocab_size:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.n_words} ids, the model {args.vocab_size}: "
            "give the tokenizer that came with the checkpoint (--tokenizer_path)"
        )
    chat_format = find_chat_format(tokenizer, build["chat_format"])
    dtype = pick_dtype(build["dtype"], checkpoint.dtype, device)
    tied = OUTPUT not in checkpoint.shapes
    quantize, prefill_chunk = build["quantize"], build["prefill_chunk"]
    fit = check_memory(args, world.size, dtype, device, tied, checkpoint.embedding_axis, quantize, prefill_chunk)
    faults, sums = check_before_loading(checkpoint, world.local_rank, world.local_size)
    if faults:
        more = f"; and {len(faults) - 1} more: python -m llama verify {model['ckpt_dir']}" if faults[1:] else ""
        raise CheckpointError(faults[0] + more)
    texts = [file for file in (path, path.with_name("tokenizer_config.json")) if file.is_file()]
    sums |= {file.name: f"{zlib.crc32(file.read_bytes()):08x}" for file in texts}
    return Files(checkpoint, tokenizer, chat_format, dtype, fit, sums)


def _load_weights(files: Files, device: torch.device, decoder: str | None, plain: bool) -> tuple[Executor, str]:
    """The executor, and a note for the log about the form of the weights. decoder: as in `Executor`."""
    checkpoint, dtype, quantize = files.checkpoint, files.dtype, files.fit.quantize
    model: Transformer | None = None
    is_native = decoder == "native"
    unquantized = 0

    def quantize_block(part: torch.nn.Module) -> None:
        nonlocal unquantized
        if isinstance(part, TransformerBlock):
            unquantized += quantize_part(part, quantize, is_native)

    try:
        with torch.device("meta"):
            model = Transformer(checkpoint.params, embedding_axis=checkpoint.embedding_axis)
        model.place_caches(dtype, device)
        held = files.fit.sizes.total - files.fit.sizes.prefill
        advice = "send fewer or shorter prompts at once, or build it with less"
        OOM_EXPLAINERS[model] = partial(explained, files.fit, device, held, advice)
        with release_freed_memory():
            load_weights(model, checkpoint, dtype, quantize_block if quantize else None)
            if quantize:
                unquantized += quantize_part(model.output, quantize, is_native, OUTPUT)
        executor = Executor(
            model,
            fused=not plain,
            decoder=decoder,
            prefill_chunk=files.fit.prefill_chunk,
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        tensors = [] if model is None else [t for cache in model.caches for t in (cache.k, cache.v)]
        weights = () if model is None else (weight for weight in model.parameters() if not weight.is_meta)
        held = sum(tensor.nbytes for tensor in tensors if not tensor.is_meta) + held_bytes(weights)
        traceback.clear_frames(error.__traceback__)
        del tensors, weights
        model = None  # or the traceback would keep it alive while a caller tries a smaller model
        raise explained(files.fit, device, held, "the model is not loaded", error) from None
    if plain:
        return executor, ", plain layers"
    if quantize is None:
        return executor, ""
    rest = f" except {unquantized} whose width does not allow it" if unquantized else ""
    return executor, f", weights in {quantize}{rest}"


def check_same(values: dict[str, Any], advice: str) -> None:
    """Raise ValueError on all ranks if the values of any rank differ from those of rank 0."""
    gathered = all_gather_object(values)
    for rank, others in enumerate(gathered):
        for name in gathered[0] | others:
            if (first := gathered[0].get(name)) != (other := others.get(name)):
                error = ValueError(f"rank {rank} has {name} {other}, rank 0 has {first}: {advice}")
                error.__dict__["reporting_rank"] = 0
                raise error


def _summary(model: Transformer, files: Files, ranks: int, note: str, seconds: float) -> str:
    """The line that `build` logs: parameters, shards, ranks, dtype, device, memory and time."""
    args, checkpoint, dtype = model.params, files.checkpoint, files.dtype
    size = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    weights, cache = held_bytes(model.parameters()), sum(kv.k.nbytes + kv.v.nbytes for kv in model.caches)
    tied = "" if OUTPUT in checkpoint.shapes else " (the embedding serves as output)"
    stored = "" if dtype == checkpoint.dtype else f" (stored as {_name(checkpoint.dtype)})"
    over = f" over {torch.distributed.get_backend()}" if ranks > 1 else ""
    factor = args.rope_factor if args.use_scaled_rope else args.rope_linear_factor
    scaled = "" if factor is None else f", RoPE scaled by {factor:g}"
    return (
        f"llama: {size / 1e6:,.1f}M parameters{tied}, {_count(len(checkpoint.paths), 'shard')} -> "
        f"{_count(ranks, 'rank')}{over}, {_name(dtype)}{stored}{note} on {model.freqs_cis.device}{scaled}; "
        f"{weights / 1e6:,.1f} MB weights and {cache / 1e6:,.1f} MB cache a rank; {seconds:.1f} s"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"
