"""`Llama`: build a model from a checkpoint folder, complete texts, answer dialogs."""

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

from llama.chat_format import FORMATS, ChatFormat, Dialog, Message, for_tokenizer, split_system
from llama.checkpoint import OUTPUT, Checkpoint, load_weights
from llama.device import pick_device, pick_dtype, share_cores
from llama.distributed import current_world, exchange, join, leave, meet, raising_together, say
from llama.engine import Engine
from llama.fast import SpeedUp, can_compile
from llama.memory import Choice, check_room, explained
from llama.model import Transformer
from llama.native import memory_given_back
from llama.params import CheckpointError, check_world_size
from llama.quantize import SCHEMES
from llama.request import Each, Row, Settings, check_list, check_whole
from llama.shortage import EXPLAIN, is_shortage
from llama.stream import Stop, TextPiece, TextStream, read_stops
from llama.tokenizer import Tokenizer, TokenizerError, find_tokenizer
from llama.verify import check_before_loading


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


class Llama(Engine):
    """A model with its tokenizer, for ids (`generate`), texts and dialogs.

    Under torchrun every rank holds one and makes the same calls.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, chat_format: ChatFormat | None = None):
        super().__init__(model, tokenizer)
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
        compile: bool = False,
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
        quantize: hold the weights as "int8" or "int4" (`llama.quantize` has what that means).
        compile: compile the decode step, once: on a CPU with the C compiler of the machine, on CUDA with torch.compile.
        plain: the layers as they are written in `llama.model`, nothing merged, packed or compiled.
        chat_format: how dialogs are written, a name of `chat_format.FORMATS`; default is what the tokenizer says.

        Raises CheckpointError and TokenizerError (both ValueErrors) for files that do not fit, ValueError for
        arguments and for a model that does not fit the memory that is free, on every rank (PeerError where only another
        rank failed). Prints one line to stderr.
        """
        started = time.perf_counter()
        world = current_world()
        try:
            meet(world)
            with raising_together():
                for name, value in (("ckpt_dir", ckpt_dir), ("tokenizer_path", tokenizer_path or ckpt_dir)):
                    if not isinstance(value, str | Path):
                        raise TypeError(f"{name} is {value!r}, expected a path")
                check_whole("max_seq_len", max_seq_len, 1)
                check_whole("max_batch_size", max_batch_size, 1)
                check_whole("seed", seed, 0)
                if seed >= 2**64:
                    raise ValueError(f"seed is {seed}, expected a whole number below 2**64, as torch takes them")
                if model_parallel_size not in (None, world.size):
                    raise ValueError(
                        f"model_parallel_size is {model_parallel_size}, but {world.size} ranks are running: leave it "
                        "out, checkpoints load at any number of ranks"
                    )
                if quantize not in (None, *SCHEMES):
                    raise ValueError(f"quantize {quantize!r}: expected {' or '.join(SCHEMES)}")
                if plain and (quantize or compile):
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
            join(world, where)
            if compile:
                compile = can_compile(where)
            with raising_together():
                checkpoint = Checkpoint(Path(ckpt_dir))
                args = checkpoint.params
                args.max_seq_len, args.max_batch_size = max_seq_len, max_batch_size
                check_world_size(args, world.size)
                if args.sliding_window is not None and max_seq_len > args.sliding_window:
                    raise CheckpointError(
                        f"max_seq_len {max_seq_len} goes beyond this model's sliding window of {args.sliding_window} "
                        f"positions, which is not implemented: give --max_seq_len {args.sliding_window} or less"
                    )
                words = Path(tokenizer_path or find_tokenizer(Path(ckpt_dir)))
                tokenizer = Tokenizer(words, use_scaled_rope=args.use_scaled_rope)
                if tokenizer.n_words != args.vocab_size:
                    raise TokenizerError(
                        f"the tokenizer has {tokenizer.n_words} ids, the model {args.vocab_size}: "
                        "give the tokenizer that came with the checkpoint (--tokenizer_path)"
                    )
                dialogs = for_tokenizer(tokenizer, chat_format)
                kind = pick_dtype(dtype, checkpoint.dtype, where)
                tied = OUTPUT not in checkpoint.shapes
                room = check_room(args, world.size, kind, where, tied, checkpoint.embedding_axis, quantize)
                faults, sums = check_before_loading(checkpoint, world.local_rank, world.local_size)
                if faults:
                    more = f"; and {len(faults) - 1} more: python -m llama verify {ckpt_dir}" if faults[1:] else ""
                    raise CheckpointError(faults[0] + more)
                files = [path for path in (words, words.with_name("tokenizer_config.json")) if path.is_file()]
                sums |= {path.name: f"{zlib.crc32(path.read_bytes()):08x}" for path in files}
            check_same({"--dtype": _name(kind)}, "name one that all hosts can compute in")
            check_same(vars(args), "give all hosts the same params.json")
            check_same(sums, "these are their sums, give all hosts the same files")
            with raising_together():
                model, note = _load(checkpoint, kind, where, room, None if plain else compile)
        except BaseException:
            leave()
            raise
        say(_summary(model, checkpoint, world.size, kind, note, time.perf_counter() - started))
        torch.manual_seed(seed)  # of every rank, and last: nothing that loads draws from it
        return Llama(model, tokenizer, dialogs)

    @property
    def dialogs(self) -> ChatFormat:
        """The chat format. Raises ValueError where none is known."""
        if self.chat_format is None:
            raise ValueError(
                "no chat format is recorded for this model, probably a base model: text completion works; "
                f"to chat all the same, name one with chat_format= or --chat_format: {', '.join(FORMATS)}"
            )
        return self.chat_format

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
        return self._pieces(*self._text_rows(prompts, stop, echo, **settings), echo=echo)

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
        {"role": "assistant", "content": text}. A dialog that its format refuses gets the fixed refusal as its answer,
        with no tokens. Raises ValueError for roles out of order.
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
            answers.append({"generation": {"role": "assistant", "content": text.text}})
            self._add_details(answers[-1], row, text, k)
        return answers

    def stream_chat(
        self, dialogs: Sequence[Dialog], *, stop: Stop = None, **settings: Unpack[Settings]
    ) -> Generator[TextPiece, None, None]:
        """`chat_completion` as it comes, in pieces like `stream_text`'s."""
        return self._pieces(*self._chat_rows(dialogs, stop, **settings))

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
            split_system(dialog)
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
        self, rows: list[Row], texts: list[TextStream], k: int | None = None, echo: bool = False, reuse: bool = False
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
            for step in self._run(chunk, k, echo, reuse or samples):
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


def _load(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, room: Choice, compile: bool | None
) -> tuple[Transformer, str]:
    """The model, and what `build` says of its form; `compile` is None for plain layers."""
    model: Transformer | None = None
    try:
        model = Transformer(checkpoint.params, dtype, device, checkpoint.embedding_axis)
        held = room.sizes.total - room.sizes.prefill
        EXPLAIN[model] = partial(explained, room, device, held, "send fewer or shorter prompts at once, or build anew")
        fast = None if compile is None else SpeedUp(model, dtype, room.quantize, compile)
        with memory_given_back():
            load_weights(model, checkpoint, dtype, fast.layer if fast else None)
            return model, fast.finish() if fast else ", plain layers"
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        tensors = () if model is None else (*model.parameters(), *model.buffers())
        held = sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)
        traceback.clear_frames(error.__traceback__)
        del tensors
        model = fast = None  # not kept by the traceback of whoever tries a smaller one
        raise explained(room, device, held, "the model is not loaded", error) from None


def check_same(values: dict[str, Any], way: str) -> None:
    """Raise ValueError on all ranks where one was started with other values than rank 0."""
    for rank, others in enumerate(told := exchange(values)):
        for name in told[0] | others:
            if (first := told[0].get(name)) != (other := others.get(name)):
                error = ValueError(f"rank {rank} has {name} {other}, rank 0 has {first}: {way}")
                error.__dict__["told_by"] = 0
                raise error


def _summary(
    model: Transformer, checkpoint: Checkpoint, ranks: int, dtype: torch.dtype, note: str, seconds: float
) -> str:
    """The line that `build` prints: what was loaded from what, in which dtype, where, and the memory it took."""
    args = model.params
    size = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    caches = [buffer for kv in model.caches for buffer in kv.buffers()]
    others = {id(buffer) for buffer in (*caches, model.cos, model.sin)}
    held = [w for w in (*model.parameters(), *model.buffers()) if id(w) not in others]  # packed, some are buffers
    weights, cache = (sum(t.numel() * t.element_size() for t in tensors) for tensors in (held, caches))
    tied = "" if OUTPUT in checkpoint.shapes else " (the embedding serves as output)"
    stored = "" if dtype == checkpoint.dtype else f" (stored as {_name(checkpoint.dtype)})"
    over = f" over {torch.distributed.get_backend()}" if ranks > 1 else ""
    factor = args.rope_factor if args.use_scaled_rope else args.rope_linear_factor
    scaled = "" if factor is None else f", RoPE scaled by {factor:g}"
    return (
        f"llama: {size / 1e6:,.1f}M parameters{tied}, {_count(len(checkpoint.paths), 'shard')} -> "
        f"{_count(ranks, 'rank')}{over}, {_name(dtype)}{stored}{note} on {model.cos.device}{scaled}; "
        f"{weights / 1e6:,.1f} MB weights and {cache / 1e6:,.1f} MB cache a rank; {seconds:.1f} s"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
