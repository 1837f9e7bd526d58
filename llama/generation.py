"""`Llama`: build a model from a checkpoint folder, complete texts, answer dialogs."""

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TypedDict

from typing_extensions import Unpack

from llama.accelerate.executor import Executor
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
    find_chat_format,
)
from llama.engine.engine import Engine
from llama.engine.requests import Row, check_list
from llama.engine.sampling import sample_top_p
from llama.engine.streaming import Stop, TextPiece, TextStream, read_stops
from llama.loading import load
from llama.model import Transformer
from llama.options import BuildOptions, Each, ModelOptions, SamplingOptions, Settings, with_options
from llama.tokenizer import Tokenizer

# The names in Meta's module llama.generation.
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
    """The common part of predictions. `tokens`, `logprobs` and `top_logprobs` are present if the call requests them."""

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

    Under torchrun every rank has one and makes the same calls.
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
        self.chat_format = chat_format or find_chat_format(tokenizer)

    @staticmethod
    @with_options(BuildOptions)
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 8,
        model_parallel_size: int | None = None,
        seed: int = 1,
        **options: Unpack[BuildOptions],
    ) -> "Llama":
        """Load a folder of consolidated.NN.pth shards onto one rank, or onto the ranks that torchrun started. Their
        number may differ from the number of shards.

        tokenizer_path: by default tokenizer.model or tokenizer.json in `ckpt_dir` or in its parent folder.
        max_seq_len, max_batch_size: positions (prompt and answer) and rows of the KV cache.
        model_parallel_size: the number of ranks. It is detected, and any other number is an error.
        seed: passed to torch.manual_seed, as in Meta's code; calls without a seed of their own draw from it.

        Raises CheckpointError and TokenizerError (both ValueErrors) for files that are damaged or do not match,
        ValueError for arguments out of range and for a model that does not fit into free memory, TypeError for unknown
        options and arguments of the wrong type. If a rank fails, every rank raises: a rank without an error of its
        own raises PeerError. Logs one line about what was loaded.
        """
        values: ModelOptions = {
            "ckpt_dir": ckpt_dir,  # type: ignore[typeddict-item]  # may be a Path
            "tokenizer_path": tokenizer_path,  # type: ignore[typeddict-item]  # may be a Path
            "max_seq_len": max_seq_len,
            "max_batch_size": max_batch_size,
            "model_parallel_size": model_parallel_size,
            "seed": seed,
        }
        executor, tokenizer, chat_format = load(values, options)
        return Llama(executor.model, tokenizer, chat_format, executor=executor)

    @property
    def dialogs(self) -> ChatFormat:
        """The chat format. Raises ValueError if it is unknown."""
        if self.chat_format is None:
            raise ValueError(
                "no chat format is recorded for this model, probably a base model: text completion works; "
                f"to chat anyway, name a format with chat_format= or --chat_format: {', '.join(FORMATS)}"
            )
        return self.chat_format

    @property
    def formatter(self) -> ChatFormat:
        """`dialogs` under its name in Meta's code for Llama 3. It can be assigned."""
        return self.dialogs

    @formatter.setter
    def formatter(self, value: ChatFormat) -> None:
        self.chat_format = value

    @with_options(SamplingOptions)
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
        **settings: Unpack[SamplingOptions],
    ) -> list[CompletionPrediction]:
        """Continue any number of texts. BOS is added to each if the tokenizer does so.

        stop: texts that end an answer and are removed from it: one list for all prompts (["\\n", "User:"]), or a list
            of such lists, one for each prompt.
        echo: return the prompt before the answer.
        logprobs: True, or the number of alternatives to return for each id.

        Returns a dict for each prompt, or n of them for each: "generation" (text), "finish_reason" ("stop" or
        "length"); with logprobs also "tokens" (the text of each id) and "logprobs"; with alternatives also
        "top_logprobs", a list of (text, log-probability) for each id. Errors as in `generate`.
        """
        rows, texts = self._text_rows(
            prompts,
            stop,
            echo,
            temperature=temperature,
            top_p=top_p,
            max_gen_len=max_gen_len,
            logprobs=logprobs,
            **settings,
        )
        for _ in self._pieces(rows, texts):
            pass
        answers: list[CompletionPrediction] = []
        for row, text in zip(rows, texts, strict=True):
            answers.append({"generation": text.text})
            self._add_details(answers[-1], row, text)
        return answers

    @with_options(Settings)
    def stream_text(
        self, prompts: Sequence[str], *, stop: Stop = None, echo: bool = False, **settings: Unpack[Settings]
    ) -> Generator[TextPiece, None, None]:
        """Stream `text_completion`: yields pieces (row, text, finish_reason). The texts of a row, joined, are its
        "generation".

        Bytes of an incomplete character, and text that may be the beginning of a stop text, are held back.
        """
        return self._pieces(*self._text_rows(prompts, stop, echo, **settings), is_read=True)

    @with_options(SamplingOptions)
    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: Each[float] = 0.6,
        top_p: Each[float] = 0.9,
        max_gen_len: Each[int | None] = None,
        logprobs: bool | int = False,
        *,
        stop: Stop = None,
        **settings: Unpack[SamplingOptions],
    ) -> list[ChatPrediction]:
        """Answer any number of dialogs. `chat_format.encode(dialog)` shows the ids of a prompt. Arguments as in
        `text_completion`.

        Returns what `text_completion` does, except that "generation" is {"role": "assistant", "content": text}; Code
        Llama 70B-Instruct adds "destination": "user". A dialog that its format refuses is answered with the fixed
        refusal, which has no tokens. Raises ValueError for roles out of order.
        """
        rows, texts = self._chat_rows(
            dialogs,
            stop,
            temperature=temperature,
            top_p=top_p,
            max_gen_len=max_gen_len,
            logprobs=logprobs,
            **settings,
        )
        for _ in self._pieces(rows, texts):
            pass
        answers: list[ChatPrediction] = []
        for row, text in zip(rows, texts, strict=True):
            answers.append({"generation": self.dialogs.answer(text.text)})
            self._add_details(answers[-1], row, text)
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
        """Generate the text between each prefix and its suffix, with a Code Llama that was trained for infilling. The
        only id that ends an answer is `tokenizer.eot_id`.

        suffix_first: put the suffix first in the prompt; see `infilling_prompt_tokens`.

        Returns a dict for each pair: "generation", "full_text" (prefix, generation and suffix) and "finish_reason";
        with logprobs also "tokens" (`token_piece` of each id) and "logprobs". Errors as in `generate` and
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
            logprobs=logprobs,
        )
        texts = [TextStream(self.tokenizer) for _ in rows]
        for _ in self._pieces(rows, texts):
            pass
        answers: list[InfillingPrediction] = []
        for row, text, (prefix, suffix) in zip(rows, texts, pairs, strict=True):
            middle = self.tokenizer.decode_infilling(row.tokens)
            answers.append({"generation": middle, "full_text": prefix + middle + suffix})
            self._add_details(answers[-1], row, text)
            if logprobs:
                answers[-1]["tokens"] = [self.tokenizer.token_piece(token) for token in row.tokens]
        return answers

    @with_options(Settings)
    def stream_chat(
        self, dialogs: Sequence[Dialog], *, stop: Stop = None, **settings: Unpack[Settings]
    ) -> Generator[TextPiece, None, None]:
        """Stream `chat_completion`, in pieces as from `stream_text`."""
        return self._pieces(*self._chat_rows(dialogs, stop, **settings), is_read=True)

    def _text_rows(
        self,
        prompts: Sequence[str],
        stop: Stop,
        echo: bool = False,
        logprobs: bool | int = False,
        **settings: Unpack[Settings],
    ) -> tuple[list[Row], list[TextStream]]:
        check_list("prompts", "texts", prompts)
        rows = self._rows(
            [self.tokenizer.encode(p, bos=self.tokenizer.adds_bos, eos=False) for p in prompts],
            logprobs=logprobs,
            echo=echo,
            **settings,
        )
        stops = read_stops(stop, len(prompts))
        n = len(rows) // max(1, len(prompts))
        return rows, [TextStream(self.tokenizer, stops[row.index // n], row.prompt * echo) for row in rows]

    def _chat_rows(
        self, dialogs: Sequence[Dialog], stop: Stop, logprobs: bool | int = False, **settings: Unpack[Settings]
    ) -> tuple[list[Row], list[TextStream]]:
        check_list("dialogs", "dialogs", dialogs)
        for dialog in dialogs:
            self.dialogs.dialect.split(dialog)  # raises for a malformed dialog, even if its texts would be refused
        refusals = [self.dialogs.refusal(dialog) for dialog in dialogs]
        ids = [[0] if refused else self.dialogs.encode(d) for d, refused in zip(dialogs, refusals, strict=True)]
        rows = self._rows(ids, logprobs=logprobs, **settings)
        stops = read_stops(stop, len(dialogs))
        n = len(rows) // max(1, len(dialogs))
        texts = []
        for row in rows:
            refusal = refusals[row.index // n]
            texts.append(TextStream(self.tokenizer, stops[row.index // n] if refusal is None else ()))
            row.stop |= self.dialogs.stop_tokens
            if refusal is not None:
                row.finish_reason, texts[-1].text = "stop", refusal  # such a row is not run
        return rows, texts

    def _pieces(
        self, rows: list[Row], texts: list[TextStream], reuse: object = None, is_read: bool = False
    ) -> Generator[TextPiece, None, None]:
        """Run any number of rows, and yield their texts as soon as they are final.

        Arguments as in `Scheduler.submit`.
        """
        for row in rows:
            if row.finish_reason:
                yield TextPiece(row.index, texts[row.index].take(), row.finish_reason)
        call = self.scheduler.submit(rows, reuse=reuse, is_read=is_read)
        try:
            for step in self.scheduler.steps(call):
                for token in step:
                    text = texts[token.row]
                    if text.stopped:  # the row was cut, and the scheduler was ahead
                        continue
                    finish_reason = text.add(token)
                    if text.stopped:
                        self.scheduler.cut(call, rows[token.row], len(text.tokens))
                    piece = text.take()
                    if piece or finish_reason:
                        yield TextPiece(token.row, piece, finish_reason)
        finally:
            self.scheduler.cancel(call)

    def _add_details(self, answer: Details, row: Row, text: TextStream) -> None:
        answer["finish_reason"] = row.finish_reason or "length"
        if row.k is not None:
            answer["tokens"] = text.pieces()
            answer["logprobs"] = row.prompt_logprobs + row.logprobs
        if row.k:
            decode = self.tokenizer.decode_token
            answer["top_logprobs"] = [[(decode(i), p) for i, p in top] for top in row.prompt_top + row.top]


class LLaMA:
    """The API of Meta's first LLaMA: prompts as texts, results as texts that include the prompt."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self._llama = Llama(model, tokenizer)

    def generate(
        self, prompts: Sequence[str], max_gen_len: int, temperature: float = 0.8, top_p: float = 0.95
    ) -> list[str]:
        """Return each prompt with its continuation, which ends at EOS, after `max_gen_len` new ids, or at `max_seq_len`
        ids in total. Errors as in `Llama.generate`."""
        check_list("prompts", "texts", prompts)
        ids = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        rows, _ = self._llama.generate(
            ids, max_gen_len, temperature, top_p, echo=True, stop_token=self.tokenizer.eos_id
        )
        return [self.tokenizer.decode(row) for row in rows]


def infilling_prompt_tokens(tokenizer: Tokenizer, pre: str, suf: str, suffix_first: bool = False) -> list[int]:
    """The prompt that makes Code Llama generate the text between `pre` and `suf`: BOS <PRE> pre <SUF> suf <MID>, or
    with suffix_first BOS <PRE> <SUF> suf <MID> pre.

    Raises ValueError for a tokenizer without these ids. Other errors as in `Tokenizer.encode`.
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
