"""`MetaLlama`, which implements the model interface of lm-evaluation-harness with this package's models."""

import sys
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, ClassVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import hash_string
from typing_extensions import Unpack

from llama import Llama
from llama.chat.formats import BOS, EOS, FORMATS, ChatFormat, Dialog, render
from llama.console import progress
from llama.engine.streaming import TextStream
from llama.evaluate.scoring import loglikelihood, prefix_id, rolling_loglikelihood, with_bos
from llama.options import BuildOptions, declared, with_options
from llama.parallel.groups import broadcast_object, is_main_rank

AUTO_BATCH_SIZE = 8  # max_batch_size in `Llama.build`
PLACEHOLDER = "\0"  # the content of example messages; no format writes this character
# The keys of a task's generation_kwargs that are supported in addition to `until` and `max_gen_toks`.
GENERATION_KWARGS = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "seed")

Encoded = tuple[tuple[str, str], list[int], list[int]]  # ((context, continuation) as texts, ids of each)


class MetaLlama(TemplateLM):
    """A checkpoint in Meta's layout. Under torchrun every rank builds one and makes the same calls.

    Arguments are those of `Llama.build`, and:
    batch_size: the number of rows of the KV cache, or "auto" (8).
    max_batch_size: overrides batch_size.

    Raises ValueError for unknown arguments and for values that `Llama.build` refuses.
    """

    @with_options(BuildOptions)
    def __init__(
        self,
        ckpt_dir: str = "",
        tokenizer_path: str | None = None,
        max_seq_len: int | float | str = 2048,
        batch_size: int | float | str = "auto",
        max_batch_size: int | float | str | None = None,
        seed: int | float | str = 1,
        **options: Unpack[BuildOptions],
    ):
        super().__init__()
        if unknown := [name for name in options if name not in declared(BuildOptions)]:
            known = [name for name in signature(MetaLlama.__init__).parameters if name != "self"]
            raise ValueError(f"meta_llama has no argument {unknown[0]}; there are {', '.join(known)}")
        if ckpt_dir == "":
            raise ValueError("meta_llama needs a checkpoint folder: --model_args ckpt_dir=...")
        rows = batch_size if max_batch_size is None else max_batch_size
        self.llama = Llama.build(
            str(ckpt_dir),  # the harness parses the name "7" as a number
            tokenizer_path and str(tokenizer_path),
            _read_int("max_seq_len", max_seq_len),
            AUTO_BATCH_SIZE if str(rows).startswith("auto") else _read_int("batch_size", rows),
            seed=_read_int("seed", seed),
            **options,
        )
        self._device = self.llama.executor.device
        names = {i: name for name, i in self.llama.tokenizer.special_ids.items()}
        special_ids = {BOS: self.llama.tokenizer.bos_id, EOS: self.llama.tokenizer.eos_id}
        self._names = {special: names[i] for special, i in special_ids.items() if i in names}
        self._dialog_prefixes = self._find_dialog_prefixes()

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "MetaLlama":
        """Build from --model_args, which override the harness's own --batch_size, --max_batch_size and --device."""
        config = {key: value for key, value in (additional_config or {}).items() if value is not None}
        if config.get("device") == "cuda:0":  # the harness's default
            del config["device"]
        return cls(**config | arg_dict)

    # Text to ids --------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.llama.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return prefix_id(self.llama.tokenizer)

    @property
    def max_length(self) -> int:
        """The limit for the number of ids of a context and its continuation together."""
        return self.llama.model.params.max_seq_len

    @property
    def max_gen_toks(self) -> int:
        """The default limit for the number of ids of an answer."""
        return 256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text. Names of special tokens in it become ids, because dialogs arrive here as text.

        add_special_tokens: whether to add BOS, if the tokenizer adds one and the text does not begin with it. The
            default is True, except for dialogs, whose format has already written all special tokens.
        """
        tokenizer = self.llama.tokenizer
        ids = tokenizer.encode(string, bos=False, eos=False, allowed_special="all")
        add_bos = not self._is_dialog(string) if add_special_tokens is None else add_special_tokens
        return with_bos(tokenizer, ids, tokenizer.adds_bos and add_bos)

    # The harness's requests ---------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is_greedy) of each (context, continuation).

        As in the harness, context and continuation are encoded as one text, and white space at the end of the context
        is moved to the continuation.
        """
        encoded: list[Encoded] = []
        for context, continuation in progress([request.args for request in requests], "encoding"):
            if context == "":
                before, after = [], self.tok_encode(continuation, add_special_tokens=False)
            else:
                before, after = self._encode_pair(context, continuation)
            if continuation and not after:  # it was merged into the context's last id: score that one
                ids = self.tok_encode(context + continuation)
                before, after = ids[:-1], ids[-1:]
            encoded.append(((context, continuation), before, after))
        return self._loglikelihood_tokens(encoded)

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_: Any) -> list[tuple[float, bool]]:
        answers = self._on_all_ranks(_loglikelihood, [(before, after) for _texts, before, after in requests])
        for (texts, *_ids), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows of max_seq_len ids, given BOS, or EOS if there is no BOS.

        A text that begins with BOS does not get a second one. The harness's `hf` model adds a second one if the
        tokenizer adds BOS, so its sums contain log p(BOS|BOS).
        """
        prefix, lists = self.prefix_token_id, list[list[int]]()
        for (text,) in progress([request.args for request in requests], "encoding"):
            ids = self.tok_encode(text)
            lists.append(ids if ids[:1] == [prefix] else [prefix, *ids])
        sums = self._on_all_ranks(_rolling_loglikelihood, lists)
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, up to but not including its first stop text.

        Decoding is greedy unless the task samples. Request i is sampled with its `seed` + i. If a context and its
        answer do not fit max_seq_len, the beginning of the context is dropped. Raises ValueError for unknown
        generation_kwargs.
        """
        prepared = [self._read_generation(i, *request.args) for i, request in enumerate(progress(requests, "encoding"))]
        order = sorted(range(len(prepared)), key=lambda i: -len(prepared[i]["prompt"]))
        size = self.llama.model.params.max_batch_size
        answers = [""] * len(prepared)
        for batch in progress([order[start : start + size] for start in range(0, len(order), size)], "generating"):
            texts = self._on_all_ranks(_generate, [prepared[i] for i in batch])
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return answers

    def _read_generation(self, i: int, context: str, gen_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Prepare a request for `_generate`. i: the index of the request. gen_kwargs: the task's generation_kwargs."""
        settings: dict[str, Any] = {**normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)}
        until, max_gen_len = settings.pop("until"), settings.pop("max_gen_toks")
        if settings.get("num_beams") == 1:  # some tasks set it, and it is the supported number
            del settings["num_beams"]
        if unknown := sorted(settings.keys() - set(GENERATION_KWARGS)):
            raise ValueError(
                f"generation_kwargs holds {unknown[0]}, which meta_llama does not support; it supports until, "
                f"max_gen_toks, {', '.join(GENERATION_KWARGS)}"
            )
        max_prompt_len = self.max_length - max_gen_len
        if max_prompt_len < 1:
            raise ValueError(
                f"max_gen_toks is {max_gen_len}, and max_seq_len {self.max_length} leaves no room for a context: "
                "give a larger --model_args max_seq_len=..."
            )
        tokenizer = self.llama.tokenizer
        stop = {tokenizer.special_ids[text] for text in until if text in tokenizer.special_ids}
        if self._is_dialog(context):
            stop |= self.llama.dialogs.stop_tokens
        seed = settings.get("seed")
        return {
            "prompt": (self.tok_encode(context) or [self.prefix_token_id])[-max_prompt_len:],
            "until": [text for text in until if text],
            "max_gen_len": max_gen_len,
            "temperature": settings.get("temperature", 0.0) if settings["do_sample"] else 0.0,
            "top_p": settings.get("top_p", 1.0),
            "top_k": settings.get("top_k") or None,  # 0 keeps all, as in transformers
            "repetition_penalty": settings.get("repetition_penalty", 1.0),
            "stop_token_ids": sorted(stop),
            "seed": None if seed is None else seed + i,
        }

    def _on_all_ranks(self, function: Callable[..., Any], argument: Any) -> Any:
        """Call function(self.llama, argument) on every rank, with the function and argument of rank 0."""
        function, argument = broadcast_object((function, argument))
        return function(self.llama, argument)

    # Dialogs ------------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """A key for the harness's cache of requests. It depends on how dialogs are written."""
        examples = [self._render(dialog) for dialog in _example_dialogs()]
        return f"{self._format.name}-{hash_string(''.join(examples))[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The name of the dialog format. Raises ValueError if the model has none, or if `chat_template` is another."""
        if not chat_template:
            return None
        if chat_template not in (True, self._format.name):
            raise ValueError(
                f"the chat format is {self._format.name}; for another: --model_args chat_format={chat_template}"
            )
        return self._format.name

    def apply_chat_template(self, chat_history: Dialog, add_generation_prompt: bool = True) -> str:
        """A dialog as text, which `tok_encode` encodes into the ids of `ChatFormat.encode`.

        It ends where the answer begins. If the last message is from the assistant, the answer continues that message.
        """
        if not chat_history or chat_history[-1]["role"] != "assistant":
            return self._render(chat_history)
        # Find what the format writes between a question and the content of its answer.
        question = self._render(_example_dialogs()[0])
        turns: Dialog = [*_example_dialogs()[0], self._format.answer(PLACEHOLDER), *_example_dialogs()[0]]
        separator = self._render(turns).removeprefix(question).split(PLACEHOLDER)[0]
        return self._render(chat_history[:-1]) + separator + chat_history[-1]["content"]

    @property
    def _format(self) -> ChatFormat:
        if self.llama.chat_format is None:
            raise ValueError(
                "no chat format is recorded for this model, probably a base model: omit --apply_chat_template, or "
                f"name a format with --model_args chat_format=...: {', '.join(FORMATS)}"
            )
        return self.llama.chat_format

    def _render(self, dialog: Dialog) -> str:
        tokenizer, dialect = self.llama.tokenizer, self._format.dialect
        add_bos = tokenizer.dialog_bos and tokenizer.bos_id >= 0
        parts = dialect.parts(dialog, tokenizer.default_system, tokenizer.system_prefix, add_bos)
        return render(parts, self._names)

    def _find_dialog_prefixes(self) -> tuple[str, ...]:
        """The texts that dialogs begin with, up to the content of the first message."""
        if self.llama.chat_format is None:
            return ()
        return tuple(self._render(dialog).split(PLACEHOLDER)[0] for dialog in _example_dialogs())

    def _is_dialog(self, text: str) -> bool:
        """Whether a text begins like a dialog. That is the only sign, as texts may come from the harness's cache."""
        return text.startswith(self._dialog_prefixes)


class DistributedMetaLlama(MetaLlama):
    """`meta_llama` of the command `llama lm_eval` under torchrun.

    Only rank 0 returns from the constructor. It alone loads tasks, draws few-shot examples, reads caches and reports,
    so these cannot differ between ranks. The other ranks compute what rank 0 broadcasts, and exit when rank 0 is done.
    """

    is_built: ClassVar[bool] = False

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        DistributedMetaLlama.is_built = True
        if is_main_rank():
            return
        while (call := broadcast_object()) is not None:
            function, argument = call
            function(self.llama, argument)
        sys.exit()


def _example_dialogs() -> list[Dialog]:
    """A question, and a question after a system message."""
    question: Dialog = [{"role": "user", "content": PLACEHOLDER}]
    return [question, [{"role": "system", "content": PLACEHOLDER}, *question]]


def _read_int(name: str, value: Any) -> int:
    """Convert an option to int. The harness passes int or float from the command line, and strings from files too."""
    try:
        if int(value) == float(value):
            return int(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name} is {value!r}, expected an integer")


# Functions that `_on_all_ranks` broadcasts. They are pickled by name, so they must be in the module's namespace.


def _loglikelihood(llama: Llama, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    return loglikelihood(llama, pairs, bos=False)


def _rolling_loglikelihood(llama: Llama, lists: list[list[int]]) -> list[float]:
    return rolling_loglikelihood(llama, lists, bos=False)


def _generate(llama: Llama, requests: list[dict[str, Any]]) -> list[str]:
    settings: dict[str, Any] = {name: [request[name] for request in requests] for name in requests[0]}
    prompts, stops = settings.pop("prompt"), settings.pop("until")
    rows = llama._rows(prompts, **settings)
    texts = [TextStream(llama.tokenizer, stop) for stop in stops]
    for _ in llama._pieces(rows, texts):
        pass
    return [text.text for text in texts]
