"""The engine: prompts of ids in, continuations and their log-probabilities out."""

from collections.abc import Generator
from typing import Any, cast

import torch
from typing_extensions import Self, Unpack

from llama.accelerate.executor import Executor
from llama.engine.requests import (
    Generation,
    Prompts,
    Row,
    Token,
    check_alternatives,
    read_rows,
)
from llama.engine.scheduler import Scheduler
from llama.errors import OOM_EXPLAINERS
from llama.model import Transformer
from llama.options import Each, SamplingOptions, Settings, check_int, with_options
from llama.parallel.groups import shutdown
from llama.tokenizer import Tokenizer


class Engine:
    """Generates continuations of lists of ids. The tokenizer is used only for its stop ids and its pad id.

    Any thread may call its methods. With several ranks, every rank makes the same calls.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, executor: Executor | None = None):
        self.tokenizer = tokenizer
        self.scheduler = Scheduler(executor or Executor(_checked(model)), tokenizer.pad_id)
        self._owns_process_group = executor is not None  # then `build` created the group, and `close` ends it
        self._is_closed = False

    @property
    def executor(self) -> Executor:
        """The executor that runs `model`. Raises ValueError after `close`."""
        return self.scheduler.executor

    @property
    def model(self) -> Transformer:
        """The model. Its modules and weights may be read, hooked, written and replaced. The model itself may be
        replaced by any module with `params` that is called as model(tokens, start_pos) -> logits [bsz, seqlen, vocab].
        """
        return cast(Transformer, self.executor.model)

    @model.setter
    def model(self, model: Transformer) -> None:
        old = self.executor
        if model is old.model:
            return
        if isinstance(model, torch.nn.Module) and (explain := OOM_EXPLAINERS.get(old.model)):
            OOM_EXPLAINERS[model] = explain
        self.scheduler.executor = Executor(
            _checked(model),
            fused=old.fused,
            decoder=old.decoder,
            prefill_chunk=old.prefill_chunk,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model's memory. The last open model also destroys the process group. Closing twice is harmless."""
        if self._is_closed:
            return
        on_gpu = self.executor.device.type == "cuda"
        self.scheduler.close()
        self._is_closed = True
        if on_gpu:
            torch.cuda.empty_cache()
        if self._owns_process_group:
            shutdown()

    @with_options(SamplingOptions)
    def generate(
        self,
        prompt_tokens: Prompts,
        max_gen_len: Each[int | None],
        temperature: Each[float] = 0.6,
        top_p: Each[float] = 0.9,
        logprobs: bool | int = False,
        echo: bool = False,
        stop_token: int | None = None,
        **settings: Unpack[SamplingOptions],
    ) -> Generation:
        """Continue each prompt.

        prompt_tokens: lists of ids, or an integer tensor [bsz, seqlen], each row a prompt.
        A row ends before its first stop id, after `max_gen_len` ids, or where prompt and answer fill max_seq_len.
        logprobs: also return the natural log-probability of every returned id under the raw logits; a number K also
            returns the K best alternatives at each position.
        echo: return the prompt too; its first id, which nothing predicts, has log-probability 0.0.
        stop_token: replaces the tokenizer's stop ids; `stop_token_ids` are added to it.

        Returns (ids, log-probabilities or None), with a list for each row. The tuple's attribute `top` holds the
        alternatives: lists of (id, log-probability), best first.

        Raises ValueError or TypeError for settings out of range, for more rows than max_batch_size, and for prompts
        that are empty, longer than max_seq_len or hold ids outside the vocabulary; FloatingPointError if the model
        returns logits that are not finite.
        """
        rows = self._rows(
            prompt_tokens,
            stop_token=stop_token,
            max_gen_len=max_gen_len,
            temperature=temperature,
            top_p=top_p,
            logprobs=logprobs,
            echo=echo,
            **settings,
        )
        for _ in self._run(self._one_batch(rows)):
            pass
        scores = None if logprobs is False else [row.prompt_logprobs + row.logprobs for row in rows]
        result = Generation(([row.prompt * echo + row.tokens for row in rows], scores))
        result.top = [row.prompt_top + row.top for row in rows]
        return result

    @with_options(Settings)
    def stream(
        self, prompt_tokens: Prompts, *, logprobs: bool | int = True, **settings: Unpack[Settings]
    ) -> Generator[list[Token], None, None]:
        """`generate` step by step: yields, at each step, a `Token` for every row to which the step has added something.

        Other calls may run between two steps, and the generator may be closed early: neither changes what any call
        returns. Arguments and errors are those of `generate`; errors are raised by the call, not by the first step.
        """
        return self._run(self._one_batch(self._rows(prompt_tokens, logprobs=logprobs, **settings)), is_read=True)

    def _run(self, rows: list[Row], reuse: object = None, is_read: bool = False) -> Generator[list[Token], None, None]:
        """Submit the rows, and yield what each step has added to them. Arguments as in `Scheduler.submit`."""
        call = self.scheduler.submit(rows, reuse=reuse, is_read=is_read)
        try:
            yield from self.scheduler.steps(call)
        finally:
            self.scheduler.cancel(call)

    def _rows(
        self, prompts: Prompts, *, logprobs: bool | int = False, echo: bool = False, **settings: Any
    ) -> list[Row]:
        """Check all arguments and create the rows. `stop_token` replaces the tokenizer's stop ids."""
        stop_token, stop = settings.pop("stop_token", None), self.tokenizer.stop_tokens
        if stop_token is not None:
            check_int("stop_token", stop_token, 0)
            stop = {int(stop_token)}
        k = self._alternatives(logprobs)  # before seeds are drawn
        rows = read_rows(self.model.params, draw_seed, stop, prompts, **settings)
        for row in rows:
            row.k, row.echo = k, echo
        return rows

    def _one_batch(self, rows: list[Row]) -> list[Row]:
        limit = self.model.params.max_batch_size
        if len(rows) > limit:
            raise ValueError(f"{len(rows)} rows, but max_batch_size is {limit}: build with more, or send fewer at once")
        return rows

    def _alternatives(self, logprobs: bool | int) -> int | None:
        """The number of alternatives that `logprobs` requests; None for no log-probabilities."""
        if isinstance(logprobs, bool):
            return 0 if logprobs else None
        check_alternatives("logprobs", logprobs, 0, self.model.params)
        return int(logprobs)


def _checked(model: Transformer) -> Transformer:
    """Return `model`. Raises TypeError unless it is callable and has `params`, as the engine uses both."""
    if not callable(model) or not hasattr(model, "params"):
        raise TypeError(
            f"the model is a {type(model).__name__}, expected a Transformer, or a module with its `params` "
            "that is called as model(tokens, start_pos)"
        )
    return model


def draw_seed() -> int:
    """The next seed from torch's default CPU generator, which `torch.manual_seed` sets: one draw of torch.randint.

    Every rank draws, so that generators with equal seeds stay equal. Only rank 0 samples with the result.
    """
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
