"""`MetaLlama`: this runner's models as lm-evaluation-harness asks models."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import hash_string

from llama import Llama
from llama.chat.formats import BOS, EOS, FORMATS, ChatFormat, Dialog, render
from llama.console import progress
from llama.engine.streaming import TextStream
from llama.evaluate.scoring import loglikelihood, prefix_id, rolling_loglikelihood, with_bos
from llama.parallel.groups import broadcast_object, is_main_rank

AUTO_BATCH_SIZE = 8  # what `Llama.build` takes
MARK = "\0"  # stands for the content of a message, to find where it goes
# What a task may ask of generation, beside `until` and the number of ids.
GENERATION = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "seed")

Encoded = tuple[tuple[str, str], list[int], list[int]]  # (context, continuation) as texts, their ids


class MetaLlama(TemplateLM):
    """A checkpoint in Meta's layout. Under torchrun every rank builds one, and makes the same calls.

    ckpt_dir, tokenizer_path, max_seq_len, seed, device, dtype, quantize, compile, plain, chat_format: as in
        `Llama.build`.
    batch_size: rows of the KV cache, or "auto" (8). max_batch_size: the same, and counts where both are given.

    Raises ValueError for other arguments and for values that `Llama.build` refuses.
    """

    def __init__(
        self,
        ckpt_dir: str = "",
        tokenizer_path: str | None = None,
        max_seq_len: int | float | str = 2048,
        batch_size: int | float | str = "auto",
        max_batch_size: int | float | str | None = None,
        seed: int | float | str = 1,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        compile: bool | str = "auto",
        plain: bool = False,
        chat_format: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ValueError(
                f"meta_llama has no argument {next(iter(unknown))}; there are ckpt_dir, tokenizer_path, max_seq_len, "
                "batch_size, max_batch_size, seed, device, dtype, quantize, compile, plain, chat_format"
            )
        if ckpt_dir == "":
            raise ValueError("meta_llama needs a checkpoint folder: --model_args ckpt_dir=...")
        rows = batch_size if max_batch_size is None else max_batch_size
        self.llama = Llama.build(
            str(ckpt_dir),  # on a command line, 7 is a name too
            tokenizer_path and str(tokenizer_path),
            _whole("max_seq_len", max_seq_len),
            AUTO_BATCH_SIZE if str(rows).startswith("auto") else _whole("batch_size", rows),
            seed=_whole("seed", seed),
            device=str(device),
            dtype=str(dtype),
            quantize=quantize,
            compile=compile,
            plain=plain,
            chat_format=chat_format,
        )
        self._device = self.llama.executor.device
        names = {i: name for name, i in self.llama.tokenizer.special_ids.items()}
        ends = {BOS: self.llama.tokenizer.bos_id, EOS: self.llama.tokenizer.eos_id}
        self._names = {special: names[i] for special, i in ends.items() if i in names}
        self._openings = self._find_openings()

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "MetaLlama":
        """From --model_args, which count, and the harness's own --batch_size, --max_batch_size and --device."""
        given = {key: value for key, value in (additional_config or {}).items() if value is not None}
        if given.get("device") == "cuda:0":  # what the harness says where its user says nothing
            del given["device"]
        return cls(**given | arg_dict)

    # Text to ids --------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.llama.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return prefix_id(self.llama.tokenizer)

    @property
    def max_length(self) -> int:
        """Ids of context and continuation together."""
        return self.llama.model.params.max_seq_len

    @property
    def max_gen_toks(self) -> int:
        """Ids of an answer where the task does not say."""
        return 256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text. Names of special tokens in it become their ids, as chat templates arrive as text.

        add_special_tokens: False leaves BOS out; otherwise it goes first where the tokenizer adds one, never twice, and
        by default not before a dialog, whose template has written all that the model is to read.
        """
        tokenizer = self.llama.tokenizer
        ids = tokenizer.encode(string, bos=False, eos=False, allowed_special="all")
        wanted = not self._is_dialog(string) if add_special_tokens is None else add_special_tokens
        return with_bos(tokenizer, ids, tokenizer.adds_bos and wanted)

    # What the harness asks ----------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is_greedy) of (context, continuation) texts, cut into ids as the harness does: together, and
        with the white space that ends a context moved to its continuation."""
        encoded: list[Encoded] = []
        for context, continuation in progress([request.args for request in requests], "encoding"):
            if context == "":
                before, after = [], self.tok_encode(continuation, add_special_tokens=False)
            else:
                before, after = self._encode_pair(context, continuation)
            if continuation and not after:  # it has become one id with the context's last: that one is scored
                whole = self.tok_encode(context + continuation)
                before, after = whole[:-1], whole[-1:]
            encoded.append(((context, continuation), before, after))
        return self._loglikelihood_tokens(encoded)

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_: Any) -> list[tuple[float, bool]]:
        answers = self._together(_loglikelihood, [(before, after) for _texts, before, after in requests])
        for (texts, *_ids), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of max_seq_len ids, given BOS, or EOS where there is no BOS.

        It stands once. The harness's own `hf` puts it in front of ids that already begin with it where the tokenizer
        adds BOS, so that its sums contain log p(BOS|BOS), too.
        """
        first, lists = self.prefix_token_id, list[list[int]]()
        for (text,) in progress([request.args for request in requests], "encoding"):
            ids = self.tok_encode(text)
            lists.append(ids if ids[:1] == [first] else [first, *ids])
        sums = self._together(_rolling_loglikelihood, lists)
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers to contexts, up to their first stop text, without it.

        Greedy unless the task samples; request i draws with its `seed` + i. Of a context that does not fit max_seq_len
        beside its answer, the end counts. Raises ValueError for generation settings that there are not.
        """
        asked = [self._read_generation(i, *request.args) for i, request in enumerate(progress(requests, "encoding"))]
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i]["prompt"]))
        size = self.llama.model.params.max_batch_size
        answers = [""] * len(asked)
        for chunk in progress([order[at : at + size] for at in range(0, len(order), size)], "generating"):
            texts = self._together(_continue, [asked[i] for i in chunk])
            for i, text in zip(chunk, texts, strict=True):
                answers[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return answers

    def _read_generation(self, i: int, context: str, asked: dict[str, Any]) -> dict[str, Any]:
        """What `_continue` takes, from a context and a task's generation_kwargs."""
        settings: dict[str, Any] = {**normalize_gen_kwargs(asked, self.max_gen_toks)}
        until, most = settings.pop("until"), settings.pop("max_gen_toks")
        if settings.get("num_beams") == 1:  # which some tasks say, and is what happens anyway
            del settings["num_beams"]
        if unknown := sorted(settings.keys() - set(GENERATION)):
            raise ValueError(
                f"generation_kwargs holds {unknown[0]}, which meta_llama does not have; there are until, max_gen_toks, "
                f"{', '.join(GENERATION)}"
            )
        room = self.max_length - most
        if room < 1:
            raise ValueError(
                f"max_gen_toks is {most}, and max_seq_len {self.max_length} leaves no room for a context: "
                "give a larger --model_args max_seq_len=..."
            )
        tokenizer = self.llama.tokenizer
        stop = {tokenizer.special_ids[text] for text in until if text in tokenizer.special_ids}
        if self._is_dialog(context):
            stop |= self.llama.dialogs.stop_tokens
        seed = settings.get("seed")
        return {
            "prompt": (self.tok_encode(context) or [self.prefix_token_id])[-room:],
            "until": [text for text in until if text],
            "max_gen_len": most,
            "temperature": settings.get("temperature", 0.0) if settings["do_sample"] else 0.0,
            "top_p": settings.get("top_p", 1.0),
            "top_k": settings.get("top_k") or None,  # 0 keeps all, as in transformers
            "repetition_penalty": settings.get("repetition_penalty", 1.0),
            "stop_token_ids": sorted(stop),
            "seed": None if seed is None else seed + i,
        }

    def _together(self, function: Callable[..., Any], values: Any) -> Any:
        """function(llama, values) on every rank, with what rank 0 has."""
        function, values = broadcast_object((function, values))
        return function(self.llama, values)

    # Dialogs ------------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """Tells dialogs apart that are written differently, in the harness's cache of requests."""
        examples = [self._render(dialog) for dialog in _examples()]
        return f"{self._format.name}-{hash_string(''.join(examples))[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The name of the dialog format. Raises ValueError where there is none, or another one is asked for."""
        if not chat_template:
            return None
        if chat_template not in (True, self._format.name):
            raise ValueError(
                f"this model's dialogs are {self._format.name}; for others: --model_args chat_format={chat_template}"
            )
        return self._format.name

    def apply_chat_template(self, chat_history: Dialog, add_generation_prompt: bool = True) -> str:
        """A dialog as text, up to where the answer begins, or to the end of the one that has begun; `tok_encode` makes
        of it the ids of `ChatFormat.encode`."""
        if not chat_history or chat_history[-1]["role"] != "assistant":
            return self._render(chat_history)
        # What the format writes between the end of a question and an answer.
        question = self._render(_examples()[0])
        turn: Dialog = [*_examples()[0], self._format.answer(MARK), *_examples()[0]]
        between = self._render(turn).removeprefix(question).split(MARK)[0]
        return self._render(chat_history[:-1]) + between + chat_history[-1]["content"]

    @property
    def _format(self) -> ChatFormat:
        if self.llama.chat_format is None:
            raise ValueError(
                "no chat format is recorded for this model, probably a base model: leave --apply_chat_template out, or "
                f"name a format with --model_args chat_format=...: {', '.join(FORMATS)}"
            )
        return self.llama.chat_format

    def _render(self, dialog: Dialog) -> str:
        tokenizer, dialect = self.llama.tokenizer, self._format.dialect
        with_first = tokenizer.dialog_bos and tokenizer.bos_id >= 0
        parts = dialect.parts(dialog, tokenizer.default_system, tokenizer.system_prefix, with_first)
        return render(parts, self._names)

    def _find_openings(self) -> tuple[str, ...]:
        """What dialogs begin with, up to the content of their first message."""
        if self.llama.chat_format is None:
            return ()
        return tuple(self._render(dialog).split(MARK)[0] for dialog in _examples())

    def _is_dialog(self, text: str) -> bool:
        """Told by how it begins, as dialogs may come out of the harness's cache of requests."""
        return text.startswith(self._openings)


class Member(MetaLlama):
    """`meta_llama` of the command under torchrun: on other ranks than 0 it does what rank 0's is asked, and ends the
    process when rank 0 is done.

    So one rank loads tasks, draws examples, reads caches and reports, and nothing of it can differ between ranks.
    """

    built: ClassVar[bool] = False

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        Member.built = True
        if is_main_rank():
            return
        while (told := broadcast_object()) is not None:
            function, values = told
            function(self.llama, values)
        sys.exit()


def _examples() -> list[Dialog]:
    question: Dialog = [{"role": "user", "content": MARK}]
    return [question, [{"role": "system", "content": MARK}, *question]]


def _whole(name: str, value: Any) -> int:
    """The harness's command line gives numbers as int or float, configuration files as texts, too."""
    try:
        if int(value) == float(value):
            return int(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name} is {value!r}, expected a whole number")


# What every rank runs; functions of the module, as their names are told to the others.


def _loglikelihood(llama: Llama, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    return loglikelihood(llama, pairs, bos=False)


def _rolling_loglikelihood(llama: Llama, lists: list[list[int]]) -> list[float]:
    return rolling_loglikelihood(llama, lists, bos=False)


def _continue(llama: Llama, asked: list[dict[str, Any]]) -> list[str]:
    settings = {name: [each[name] for each in asked] for name in asked[0]}
    prompts, stops = settings.pop("prompt"), settings.pop("until")
    rows = llama._rows(prompts, **settings)
    texts = [TextStream(llama.tokenizer, stop) for stop in stops]
    for _ in llama._pieces(rows, texts):
        pass
    return [text.text for text in texts]
