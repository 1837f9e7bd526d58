"""`Llama`: build a model from a checkpoint folder, complete texts, answer dialogs."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch

from llama.cache import KVCache
from llama.chat_format import ChatFormat, Dialog, Message, for_tokenizer, split_system
from llama.checkpoint import Checkpoint, check_world_size, load_weights, tensor_shapes
from llama.distributed import current_world, join, leave, pick_device, pick_dtype, raising_together, say, share_cores
from llama.generation import Generator, Row, check_whole
from llama.model import Transformer
from llama.tokenizer import Tokenizer, TokenizerError, find_tokenizer


class CompletionPrediction(TypedDict, total=False):
    """`tokens` and `logprobs` are there when log-probabilities were asked for."""

    generation: str
    finish_reason: str
    tokens: list[str]
    logprobs: list[float]


class ChatPrediction(TypedDict, total=False):
    """`tokens` and `logprobs` are there when log-probabilities were asked for."""

    generation: Message
    finish_reason: str
    tokens: list[str]
    logprobs: list[float]


class Llama(Generator):
    """A model with its tokenizer, for ids (`generate`), texts and dialogs.

    Under torchrun every rank holds one and makes the same calls.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, chat_format: ChatFormat | None = None, seed: int = 1):
        super().__init__(model, tokenizer, seed)
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
        chat_format: str | None = None,
    ) -> "Llama":
        """Load a folder of consolidated.NN.pth shards, however many, onto the ranks that torchrun started, or onto one.

        tokenizer_path: default is tokenizer.model or tokenizer.json in `ckpt_dir` or beside it.
        max_seq_len, max_batch_size: positions (prompt and answer) and rows that the KV cache has room for.
        model_parallel_size: the number of ranks, which is known anyway; another number is an error.
        seed: where the random streams of calls without a seed come from.
        device: "auto" (cuda, else mps, else cpu), "cpu", "cuda", "cuda:N" or "mps".
        dtype: "auto" (the checkpoint's, where the device computes in it), "float32", "bfloat16" or "float16".
        chat_format: the dialog format, "llama2" or "chatml"; default is the one that belongs to the tokenizer.

        Raises CheckpointError and TokenizerError (both ValueErrors) for files that do not fit, ValueError for
        arguments, on every rank (PeerError where only another rank failed). Prints one line to stderr.
        """
        started = time.perf_counter()
        world = current_world()
        for name, value in (("ckpt_dir", ckpt_dir), ("tokenizer_path", tokenizer_path or ckpt_dir)):
            if not isinstance(value, str | Path):
                raise TypeError(f"{name} is {value!r}, expected a path")
        check_whole("max_seq_len", max_seq_len, 1)
        check_whole("max_batch_size", max_batch_size, 1)
        check_whole("seed", seed, 0)
        if model_parallel_size not in (None, world.size):
            raise ValueError(
                f"model_parallel_size is {model_parallel_size}, but {world.size} ranks are running: leave it out, "
                "checkpoints load at any number of ranks"
            )
        where = pick_device(device, world)
        share_cores(world)
        join(world, where)
        try:
            with raising_together():
                checkpoint = Checkpoint(Path(ckpt_dir))
                args = checkpoint.params
                args.max_seq_len, args.max_batch_size = max_seq_len, max_batch_size
                check_world_size(args, world.size)
                tokenizer = Tokenizer(tokenizer_path or find_tokenizer(Path(ckpt_dir)))
                if tokenizer.n_words != args.vocab_size:
                    raise TokenizerError(
                        f"the tokenizer has {tokenizer.n_words} ids, the model {args.vocab_size}: "
                        "give the tokenizer that came with the checkpoint (--tokenizer_path)"
                    )
                dialogs = for_tokenizer(tokenizer, chat_format)
                kind = pick_dtype(dtype, checkpoint.dtype, where)
                model = Transformer(args, kind, where, checkpoint.embedding_axis)
                load_weights(model, checkpoint, kind)
        except BaseException:
            leave()
            raise
        say(_summary(model, checkpoint, world.size, kind, time.perf_counter() - started))
        return Llama(model, tokenizer, dialogs, seed)

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | None = None,
    ) -> list[CompletionPrediction]:
        """Continue texts, any number of them; BOS goes first where the tokenizer adds one. Arguments as in `generate`.

        max_gen_len: None is as far as max_seq_len goes.

        Returns a dict a prompt: "generation" (text), "finish_reason" ("stop" or "length") and, with logprobs, "tokens"
        (the text of each id) and "logprobs".
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise TypeError(f"prompts are a list of texts, not {type(prompts).__name__}: put a single text in brackets")
        ids = [self.tokenizer.encode(prompt, bos=self.tokenizer.adds_bos, eos=False) for prompt in prompts]
        rows = self._complete(ids, max_gen_len, seed, temperature, top_p, logprobs, echo, set())
        answers: list[CompletionPrediction] = []
        for row in rows:
            answer: CompletionPrediction = {
                "generation": self.tokenizer.decode(row.answer_tokens),
                "finish_reason": row.finish_reason or "length",
            }
            if logprobs:
                answer["tokens"] = [self.tokenizer.decode_token(token) for token in row.answer_tokens]
                answer["logprobs"] = row.answer_logprobs
            answers.append(answer)
        return answers

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        seed: int | None = None,
    ) -> list[ChatPrediction]:
        """Answer dialogs, any number of them. Arguments as in `generate`; `chat_format.encode(dialog)` shows the ids.

        max_gen_len: None is as far as max_seq_len goes.

        Returns a dict a dialog: "generation" ({"role": "assistant", "content": text}), "finish_reason" ("stop" or
        "length") and, with logprobs, "tokens" and "logprobs" of the answer. A dialog that its format refuses gets the
        fixed refusal as its answer, with no tokens. Raises ValueError for roles out of order.
        """
        if self.chat_format is None:
            raise ValueError(
                "this tokenizer belongs to no known chat format: build with chat_format='llama2' or 'chatml'"
            )
        if isinstance(dialogs, str) or not isinstance(dialogs, Sequence):
            raise TypeError(f"dialogs are a list of dialogs, not {type(dialogs).__name__}")
        for dialog in dialogs:
            split_system(dialog)
        refusals = [self.chat_format.refusal(dialog) for dialog in dialogs]
        ids = [self.chat_format.encode(d) for d, refusal in zip(dialogs, refusals, strict=True) if refusal is None]
        stop = self.chat_format.stop_tokens
        rows = iter(self._complete(ids, max_gen_len, seed, temperature, top_p, logprobs, False, stop))
        answers: list[ChatPrediction] = []
        for refusal in refusals:
            row = None if refusal is not None else next(rows)
            content = refusal if row is None else self.tokenizer.decode(row.tokens)
            answer: ChatPrediction = {
                "generation": {"role": "assistant", "content": content or ""},
                "finish_reason": "stop" if row is None else row.finish_reason or "length",
            }
            if logprobs:
                answer["tokens"] = [] if row is None else [self.tokenizer.decode_token(token) for token in row.tokens]
                answer["logprobs"] = [] if row is None else row.logprobs
            answers.append(answer)
        return answers

    def _complete(
        self,
        prompts: list[list[int]],
        max_gen_len: int | None,
        seed: int | None,
        temperature: float,
        top_p: float,
        logprobs: bool,
        echo: bool,
        stop: set[int],
    ) -> list[Row]:
        """Run any number of prompts, max_batch_size at a time."""
        args = self.model.params
        rows = self._rows(prompts, args.max_seq_len if max_gen_len is None else max_gen_len, echo, seed)
        for at in range(0, len(rows), args.max_batch_size):
            self._run(rows[at : at + args.max_batch_size], temperature, top_p, logprobs, stop)
        return rows


def _summary(model: Transformer, checkpoint: Checkpoint, ranks: int, dtype: torch.dtype, seconds: float) -> str:
    """The line that `build` prints: what was loaded from what, in which dtype, where, and the memory it took."""
    args = model.params
    size = sum(math.prod(shape) for shape in tensor_shapes(args).values())
    weights = sum(w.numel() * w.element_size() for w in model.parameters())
    caches = [module for module in model.modules() if isinstance(module, KVCache)]
    cache = sum(buffer.numel() * buffer.element_size() for module in caches for buffer in module.buffers())
    stored = "" if dtype == checkpoint.dtype else f" (stored as {_name(checkpoint.dtype)})"
    over = f" over {torch.distributed.get_backend()}" if ranks > 1 else ""
    scaled = f", RoPE scaled by {args.rope_factor:g}" if args.use_scaled_rope else ""
    return (
        f"llama: {size / 1e6:,.1f}M parameters, {_count(len(checkpoint.paths), 'shard')} -> {_count(ranks, 'rank')}"
        f"{over}, {_name(dtype)}{stored} on {model.cos.device}{scaled}; {weights / 1e6:,.1f} MB weights and "
        f"{cache / 1e6:,.1f} MB cache a rank; {seconds:.1f} s"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
