"""`Llama`: build a model from a checkpoint folder, complete texts, answer dialogs."""

import logging
import math
import time
import traceback
import zlib
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from typing_extensions import Unpack

from llama.accelerate.executor import Executor, can_compile
from llama.accelerate.native import release_freed_memory
from llama.accelerate.quantize import SCHEMES
from llama.accelerate.quantized_weight import held_bytes, quantize_part
from llama.chat.formats import (
    B_INST,
    B_SYS,
    E_INST,
    E_SYS,
    FORMATS,
    SPECIAL_TAGS,
    UNSAFE_ERROR,
    ChatFormat,
    Dialog,
    Message,
    Role,
    for_tokenizer,
)
from llama.checkpoint.folder import OUTPUT, Checkpoint, load_weights
from llama.checkpoint.verify import check_before_loading
from llama.engine.engine import Engine
from llama.engine.requests import Each, Row, Settings, check_int, check_list
from llama.engine.sampling import sample_top_p
from llama.engine.streaming import Stop, TextPiece, TextStream, read_stops
from llama.errors import OOM_EXPLAINERS, is_out_of_memory
from llama.files import as_path
from llama.memory.check import Choice, check_memory, explained
from llama.model import Transformer, TransformerBlock
from llama.parallel.device import pick_device, pick_dtype, share_cores
from llama.parallel.groups import (
    all_gather_object,
    connect_ranks,
    current_world,
    init_process_groups,
    raise_on_all_ranks,
    shutdown,
)
from llama.params import CheckpointError, check_world_size
from llama.tokenizer import Tokenizer, TokenizerError, find_tokenizer

log = logging.getLogger(__name__)

# What Meta's module of this name has.
__all__ = [
    "B_INST",
    "B_SYS",
    "E_INST",
    "E_SYS",
    "SPECIAL_TAGS",
    "UNSAFE_ERROR",
    "ChatPrediction",
    "CompletionPrediction",
    "Dialog",
    "InfillingPrediction",
    "LLaMA",
    "Llama",
    "Message",
    "Role",
    "infilling_prompt_tokens",
    "sample_top_p",
]


class Details(TypedDict, total=False):
    """What predictions have in common. `tokens`, `logprobs` and `top_logprobs` are there when asked for."""

    finish_reason: str
    tokens: list[str]
    logprobs: list[float]
    top_logprobs: list[list[tuple[str, float]]]


class CompletionPrediction(Details, total=False):
    generation: str


class ChatPrediction(Details, total=False):
    generation: Message


class InfillingPrediction(Details, total=False):
    """full_text: prefix, generation and suffix."""

    generation: str
    full_text: str


class Llama(Engine):
    """A model with its tokenizer, for ids (`generate`), texts and dialogs.

    Under torchrun every rank holds one and makes the same calls.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        chat_format: ChatFormat | None = None,
        *,
        executor: Executor | None = None,
    ):
        super().__init__(model, tokenizer, executor=executor)
        self.chat_format = chat_format or for_tokenizer(tokenizer)

    @staticmethod
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 8,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        compile: bool | str = "auto",
        plain: bool = False,
        chat_format: str | None = None,
    ) -> "Llama":
        """Load a folder of consolidated.NN.pth shards, however many, onto the ranks that torchrun started, or onto one.

        tokenizer_path: default is tokenizer.model or tokenizer.json in `ckpt_dir` or beside it.
        max_seq_len, max_batch_size: positions (prompt and answer) and rows that the KV cache has room for.
        model_parallel_size: the number of ranks, which is known anyway; another number is an error.
        seed: given to torch.manual_seed, as in Meta's code; calls without a seed of their own draw from there.
        device: "auto" (cuda, else mps, else cpu), "cpu", "cuda", "cuda:N" or "mps".
        dtype: "auto" (the checkpoint's, where the device computes in it), "float32", "bfloat16" or "float16".
        quantize: hold the weights as "int8" or "int4" (`llama.accelerate.quantize` has what that means).
        compile: the decode step, once: on a CPU by the machine's C compiler, on CUDA by torch.compile, which takes
            minutes. "auto" compiles on CPUs where there is a compiler; True and False say so.
        plain: compute as the modules are written in `llama.model`, nothing merged or compiled.
        chat_format: how dialogs are written, a name of `chat_format.FORMATS`; default is what the tokenizer says.

        Raises CheckpointError and TokenizerError (both ValueErrors) for files that do not fit, ValueError for
        arguments and for a model that does not fit the memory that is free, on every rank (PeerError where only another
        rank failed). Prints one line to stderr.
        """
        started = time.perf_counter()
        world = current_world()
        try:
            connect_ranks(world)
            with raise_on_all_ranks():
                for name, value in (("ckpt_dir", ckpt_dir), ("tokenizer_path", tokenizer_path or ckpt_dir)):
                    if not isinstance(value, str | Path):
                        raise TypeError(f"{name} is {value!r}, expected a path")
                check_int("max_seq_len", max_seq_len, 1)
                check_int("max_batch_size", max_batch_size, 1)
                check_int("seed", seed, 0)
                if seed >= 2**64:
                    raise ValueError(f"seed is {seed}, expected a whole number below 2**64, as torch takes them")
                if model_parallel_size not in (None, world.size):
                    raise ValueError(
                        f"model_parallel_size is {model_parallel_size}, but {world.size} ranks are running: leave it "
                        "out, checkpoints load at any number of ranks"
                    )
                if quantize not in (None, *SCHEMES):
                    raise ValueError(f"quantize {quantize!r}: expected {' or '.join(SCHEMES)}")
                if compile != "auto" and not isinstance(compile, bool):
                    raise ValueError(f"compile is {compile!r}, expected True, False or 'auto'")
                if plain and (quantize or compile is True):
                    raise ValueError("plain excludes quantize and compile: leave one of them out")
                where = pick_device(device, world)
            check_same(
                {
                    "--max_seq_len": max_seq_len,
                    "--max_batch_size": max_batch_size,
                    "--seed": seed,
                    "--device": where.type,
                    "--dtype": dtype,
                    "--quantize": quantize,
                    "--compile": compile,
                    "--plain": plain,
                    "--chat_format": chat_format,
                },
                "start all ranks with the same arguments",
            )
            share_cores(world)
            init_process_groups(world, where)
            with raise_on_all_ranks():
                checkpoint = Checkpoint(ckpt_dir)
                for note in checkpoint.notes:
                    log.info(f"note: {note}")
                args = checkpoint.params
                args.max_seq_len, args.max_batch_size = max_seq_len, max_batch_size
                check_world_size(args, world.size)
                if args.sliding_window is not None and max_seq_len > args.sliding_window:
                    raise CheckpointError(
                        f"max_seq_len {max_seq_len} goes beyond this model's sliding window of {args.sliding_window} "
                        f"positions, which is not implemented: give --max_seq_len {args.sliding_window} or less"
                    )
                words = as_path(tokenizer_path or find_tokenizer(as_path(ckpt_dir)))
                tokenizer = Tokenizer(words, use_scaled_rope=args.use_scaled_rope)
                if tokenizer.n_words != args.vocab_size:
                    raise TokenizerError(
                        f"the tokenizer has {tokenizer.n_words} ids, the model {args.vocab_size}: "
                        "give the tokenizer that came with the checkpoint (--tokenizer_path)"
                    )
                dialogs = for_tokenizer(tokenizer, chat_format)
                kind = pick_dtype(dtype, checkpoint.dtype, where)
                tied = OUTPUT not in checkpoint.shapes
                room = check_memory(args, world.size, kind, where, tied, checkpoint.embedding_axis, quantize)
                faults, sums = check_before_loading(checkpoint, world.local_rank, world.local_size)
                if faults:
                    more = f"; and {len(faults) - 1} more: python -m llama verify {ckpt_dir}" if faults[1:] else ""
                    raise CheckpointError(faults[0] + more)
                files = [path for path in (words, words.with_name("tokenizer_config.json")) if path.is_file()]
                sums |= {path.name: f"{zlib.crc32(path.read_bytes()):08x}" for path in files}
            check_same({"--dtype": _name(kind)}, "name one that all hosts can compute in")
            check_same(vars(args), "give all hosts the same params.json")
            check_same(sums, "these are their sums, give all hosts the same files")
            is_compiled = can_compile(False if plain else compile, where, kind)
            with raise_on_all_ranks():
                executor, note = _load(checkpoint, kind, where, room, None if plain else is_compiled)
        except BaseException:
            shutdown()
            raise
        model = executor.model
        log.info(_summary(model, checkpoint, world.size, kind, note, time.perf_counter() - started))
        torch.manual_seed(seed)  # of every rank, and last: nothing that loads draws from it
        return Llama(model, tokenizer, dialogs, executor=executor)

    @property
    def dialogs(self) -> ChatFormat:
        """The chat format. Raises ValueError where none is known."""
        if self.chat_format is None:
            raise ValueError(
                "no chat format is recorded for this model, probably a base model: text completion works; "
                f"to chat all the same, name one with chat_format= or --chat_format: {', '.join(FORMATS)}"
            )
        return self.chat_format

    @property
    def formatter(self) -> ChatFormat:
        """`dialogs`, by the name that it has in Meta's code for Llama 3. May be set."""
        return self.dialogs

    @formatter.setter
    def formatter(self, value: ChatFormat) -> None:
        self.chat_format = value

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: Each[float] = 0.6,
        top_p: Each[float] = 0.9,
        max_gen_len: Each[int | None] = None,
        logprobs: bool | int = False,
        echo: bool = False,
        *,
        stop: Stop = None,
        top_k: Each[int | None] = None,
        repetition_penalty: Each[float] = 1.0,
        seed: Each[int | None] = None,
        n: int = 1,
    ) -> list[CompletionPrediction]:
        """Continue texts, any number of them; BOS goes first where the tokenizer adds one.

        stop: texts that end an answer and are cut off it, for all prompts (["\\n\\n", "User:"]) or a list for each.
        echo: the prompt goes before the answer.
        logprobs: True, or the number of alternatives. `request.Settings` has the meanings of the others.

        Returns a dict a prompt, or n of them for each: "generation" (text), "finish_reason" ("stop" or "length"); with
        logprobs "tokens" (the text of each id) and "logprobs"; with alternatives "top_logprobs", a list of
        (text, log-probability) for each id. Errors as in `generate`.
        """
        rows, texts = self._text_rows(
            prompts,
            stop,
            echo,
            temperature=temperature,
            top_p=top_p,
            max_gen_len=max_gen_len,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
            n=n,
        )
        k = self._alternatives(logprobs)
        for _ in self._pieces(rows, texts, k, echo):
            pass
        answers: list[CompletionPrediction] = []
        for row, text in zip(rows, texts, strict=True):
            answers.append({"generation": text.text})
            self._add_details(answers[-1], row, text, k)
        return answers

    def stream_text(
        self, prompts: Sequence[str], *, stop: Stop = None, echo: bool = False, **settings: Unpack[Settings]
    ) -> Generator[TextPiece, None, None]:
        """`text_completion` as it comes: pieces (row, text, finish_reason), in which each row's texts, joined, are
        its "generation". Bytes that may become a character and the beginning of a stop text are held back."""
        return self._pieces(*self._text_rows(prompts, stop, echo, **settings), echo=echo, is_read=True)

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: Each[float] = 0.6,
        top_p: Each[float] = 0.9,
        max_gen_len: Each[int | None] = None,
        logprobs: bool | int = False,
        *,
        stop: Stop = None,
        top_k: Each[int | None] = None,
        repetition_penalty: Each[float] = 1.0,
        seed: Each[int | None] = None,
        n: int = 1,
    ) -> list[ChatPrediction]:
        """Answer dialogs, any number of them; `chat_format.encode(dialog)` shows the ids. Arguments as in
        `text_completion`.

        Returns a dict a dialog, or n of them for each, as `text_completion` does, except that "generation" is
        {"role": "assistant", "content": text}; Code Llama 70B-Instruct adds "destination": "user". A dialog that its
        format refuses gets the fixed refusal as its answer, with no tokens. Raises ValueError for roles out of order.
        """
        rows, texts = self._chat_rows(
            dialogs,
            stop,
            temperature=temperature,
            top_p=top_p,
            max_gen_len=max_gen_len,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
            n=n,
        )
        k = self._alternatives(logprobs)
        for _ in self._pieces(rows, texts, k):
            pass
        answers: list[ChatPrediction] = []
        for row, text in zip(rows, texts, strict=True):
            answers.append({"generation": self.dialogs.answer(text.text)})
            self._add_details(answers[-1], row, text, k)
        return answers

    def text_infilling(
        self,
        prefixes: Sequence[str],
        suffixes: Sequence[str],
        temperature: Each[float] = 0.6,
        top_p: Each[float] = 0.9,
        max_gen_len: Each[int | None] = None,
        logprobs: bool = False,
        suffix_first: bool = False,
    ) -> list[InfillingPrediction]:
        """What goes between each prefix and its suffix, any number of them, by a Code Llama trained for it; an answer
        ends at `tokenizer.eot_id`, and at no other id.

        suffix_first: the suffix goes first in the prompt; see `infilling_prompt_tokens`.

        Returns a dict a pair: "generation", "full_text" (prefix, generation and suffix) and "finish_reason"; with
        logprobs "tokens" (`token_piece` of each id) and "logprobs". Errors as in `generate`, and as in
        `infilling_prompt_tokens`.
        """
        check_list("prefixes", "texts", prefixes)
        check_list("suffixes", "texts", suffixes)
        if len(prefixes) != len(suffixes):
            raise ValueError(f"{len(prefixes)} prefixes and {len(suffixes)} suffixes: give each prefix its suffix")
        pairs = list(zip(prefixes, suffixes, strict=True))
        prompts = [infilling_prompt_tokens(self.tokenizer, *pair, suffix_first) for pair in pairs]
        rows = self._rows(
            prompts,
            stop_token=self.tokenizer.eot_id,
            temperature=temperature,
            top_p=top_p,
            max_gen_len=max_gen_len,
        )
        texts = [TextStream(self.tokenizer) for _ in rows]
        k = self._alternatives(logprobs)
        for _ in self._pieces(rows, texts, k):
            pass
        answers: list[InfillingPrediction] = []
        for row, text, (prefix, suffix) in zip(rows, texts, pairs, strict=True):
            middle = self.tokenizer.decode_infilling(row.tokens)
            answers.append({"generation": middle, "full_text": prefix + middle + suffix})
            self._add_details(answers[-1], row, text, k)
            if k is not None:
                answers[-1]["tokens"] = [self.tokenizer.token_piece(token) for token in row.tokens]
        return answers

    def stream_chat(
        self, dialogs: Sequence[Dialog], *, stop: Stop = None, **settings: Unpack[Settings]
    ) -> Generator[TextPiece, None, None]:
        """`chat_completion` as it comes, in pieces like `stream_text`'s."""
        return self._pieces(*self._chat_rows(dialogs, stop, **settings), is_read=True)

    def _text_rows(
        self, prompts: Sequence[str], stop: Stop, echo: bool = False, **settings: Unpack[Settings]
    ) -> tuple[list[Row], list[TextStream]]:
        check_list("prompts", "texts", prompts)
        rows = self._rows(
            [self.tokenizer.encode(p, bos=self.tokenizer.adds_bos, eos=False) for p in prompts], **settings
        )
        stops = read_stops(stop, len(prompts))
        n = len(rows) // max(1, len(prompts))
        return rows, [TextStream(self.tokenizer, stops[row.index // n], row.prompt * echo) for row in rows]

    def _chat_rows(
        self, dialogs: Sequence[Dialog], stop: Stop, **settings: Unpack[Settings]
    ) -> tuple[list[Row], list[TextStream]]:
        check_list("dialogs", "dialogs", dialogs)
        for dialog in dialogs:
            self.dialogs.dialect.split(dialog)  # a mistake is an error, whatever the texts hold
        refusals = [self.dialogs.refusal(dialog) for dialog in dialogs]
        ids = [[0] if refused else self.dialogs.encode(d) for d, refused in zip(dialogs, refusals, strict=True)]
        rows = self._rows(ids, **settings)
        stops = read_stops(stop, len(dialogs))
        n = len(rows) // max(1, len(dialogs))
        texts = []
        for row in rows:
            refusal = refusals[row.index // n]
            texts.append(TextStream(self.tokenizer, stops[row.index // n] if refusal is None else ()))
            row.stop |= self.dialogs.stop_tokens
            if refusal is not None:
                row.finish_reason, texts[-1].text = "stop", refusal  # it never reaches the model
        return rows, texts

    def _pieces(
        self,
        rows: list[Row],
        texts: list[TextStream],
        k: int | None = None,
        echo: bool = False,
        reuse: bool = False,
        is_read: bool = False,
    ) -> Generator[TextPiece, None, None]:
        """Run any number of rows, max_batch_size at a time, and give their texts as they become certain."""
        for row in rows:
            if row.finish_reason:
                yield TextPiece(row.index, texts[row.index].take(), row.finish_reason)
        waiting, size = [row for row in rows if not row.finish_reason], self.model.params.max_batch_size
        for at in range(0, len(waiting), size):
            chunk = waiting[at : at + size]
            # More samples of one prompt than fit a chunk: the cache still begins with it.
            samples = at > 0 and all(row.prompt == waiting[at - size].prompt for row in waiting[at - size : at + size])
            for step in self._run(chunk, k, echo, reuse or samples, is_read):
                for token in step:
                    row, text = rows[token.row], texts[token.row]
                    if token.id is not None:
                        text.push(token.id)
                    if token.finish_reason:
                        text.finish()
                    if text.stopped:
                        row.cut(len(text.tokens))
                    piece = text.take()
                    if piece or row.finish_reason:
                        yield TextPiece(row.index, piece, row.finish_reason)

    def _add_details(self, answer: Details, row: Row, text: TextStream, k: int | None) -> None:
        answer["finish_reason"] = row.finish_reason or "length"
        if k is not None:
            answer["tokens"] = text.pieces()
            answer["logprobs"] = row.prompt_logprobs + row.logprobs
        if k:
            decode = self.tokenizer.decode_token
            answer["top_logprobs"] = [[(decode(i), p) for i, p in top] for top in row.prompt_top + row.top]


class LLaMA:
    """The surface of Meta's first LLaMA: texts in, whole texts out."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self._llama = Llama(model, tokenizer)

    def generate(
        self, prompts: Sequence[str], max_gen_len: int, temperature: float = 0.8, top_p: float = 0.95
    ) -> list[str]:
        """Each prompt and its continuation as one text, up to the tokenizer's EOS, `max_gen_len` ids more than the
        prompt, or `max_seq_len` ids. Errors as in `Llama.generate`."""
        check_list("prompts", "texts", prompts)
        ids = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        rows, _ = self._llama.generate(
            ids, max_gen_len, temperature, top_p, echo=True, stop_token=self.tokenizer.eos_id
        )
        return [self.tokenizer.decode(row) for row in rows]


def infilling_prompt_tokens(tokenizer: Tokenizer, pre: str, suf: str, suffix_first: bool = False) -> list[int]:
    """The prompt that has Code Llama write what goes between two texts: BOS <PRE> pre <SUF> suf <MID>, or with
    suffix_first BOS <PRE> <SUF> suf <MID> pre.

    Raises ValueError for a tokenizer without these ids, and as `Tokenizer.encode` does.
    """
    begin, middle, end = tokenizer.prefix_id, tokenizer.middle_id, tokenizer.suffix_id
    if begin is None or middle is None or end is None or tokenizer.eot_id is None:
        raise ValueError(
            "this tokenizer has no <PRE>, <SUF>, <MID> and <EOT>: infilling needs a Code Llama that was trained for it "
            "(7B, 13B, and their -Instruct models)"
        )
    before, after = tokenizer.encode(pre, bos=False, eos=False), tokenizer.encode_infilling(suf)
    if suffix_first:
        return [tokenizer.bos_id, begin, end, *after, middle, *before]
    return [tokenizer.bos_id, begin, *before, end, *after, middle]


def _load(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, room: Choice, compile: bool | None
) -> tuple[Executor, str]:
    """The model and what computes it, and what `build` says of its form; `compile` is None for plain layers."""
    model: Transformer | None = None
    is_native = bool(compile) and device.type == "cpu"
    kept = 0

    def finish(part: torch.nn.Module) -> None:
        nonlocal kept
        if isinstance(part, TransformerBlock):
            kept += quantize_part(part, room.quantize, is_native)

    try:
        with torch.device("meta"):
            model = Transformer(checkpoint.params, embedding_axis=checkpoint.embedding_axis)
        model.place_caches(dtype, device)
        held = room.sizes.total - room.sizes.prefill
        OOM_EXPLAINERS[model] = partial(
            explained, room, device, held, "send fewer or shorter prompts at once, or build anew"
        )
        with release_freed_memory():
            load_weights(model, checkpoint, dtype, finish if room.quantize else None)
            if room.quantize:
                kept += quantize_part(model.output, room.quantize, is_native, OUTPUT)
        executor = Executor(
            model, fused=compile is not None, native=is_native, graph=bool(compile) and device.type == "cuda"
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        tensors = [] if model is None else [t for cache in model.caches for t in (cache.k, cache.v)]
        weights = () if model is None else (weight for weight in model.parameters() if not weight.is_meta)
        held = sum(tensor.nbytes for tensor in tensors if not tensor.is_meta) + held_bytes(weights)
        traceback.clear_frames(error.__traceback__)
        del tensors, weights
        model = None  # not kept by the traceback of whoever tries a smaller one
        raise explained(room, device, held, "the model is not loaded", error) from None
    if compile is None:
        return executor, ", plain layers"
    if room.quantize is None:
        return executor, ""
    return executor, f", weights in {room.quantize}{f' but for {kept} whose width does not allow it' if kept else ''}"


def check_same(values: dict[str, Any], way: str) -> None:
    """Raise ValueError on all ranks where one was started with other values than rank 0."""
    for rank, others in enumerate(told := all_gather_object(values)):
        for name in told[0] | others:
            if (first := told[0].get(name)) != (other := others.get(name)):
                error = ValueError(f"rank {rank} has {name} {other}, rank 0 has {first}: {way}")
                error.__dict__["reporting_rank"] = 0
                raise error


def _summary(
    model: Transformer, checkpoint: Checkpoint, ranks: int, dtype: torch.dtype, note: str, seconds: float
) -> str:
    """The line that `build` prints: what was loaded from what, in which dtype, where, and the memory it took."""
    args = model.params
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
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
