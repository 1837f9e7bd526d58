"""POST /v1/completions: texts or ids are continued."""

from collections.abc import Sequence
from typing import Any

from llama.engine.streaming import TextStream
from llama.generation import infilling_prompt_tokens
from llama.serve.answers import Answer
from llama.serve.choices import Choice, OffsetStream, Scored
from llama.serve.errors import RequestError
from llama.serve.logprobs import completion_logprobs
from llama.serve.protocol import CompletionRequest
from llama.tokenizer import ANCHOR

# Ids of the prompt that are decoded together with the answer: its first word keeps its space, and a character that the
# prompt begins is completed.
CONTEXT = 16


class Completion(Answer):
    """`text` continues the prompt: prompt and text, joined, are a text. So it begins with a space where
    `text_completion`, as Meta's code, drops it."""

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    request: CompletionRequest

    def make_choices(self) -> list[Choice]:
        request, tokenizer = self.request, self.llama.tokenizer
        is_scored = request.k is not None
        more = {} if request.suffix is None else {"stop_token": tokenizer.eot_id}
        rows = self.rows([self._ids(prompt) for prompt in request.prompt], "prompt", "max_tokens", request.echo, **more)
        choices = []
        for row in rows:
            hidden = int(request.echo and row.prompt[0] == tokenizer.bos_id)
            shown = row.prompt[hidden:] if request.echo else row.prompt[-CONTEXT:]
            if request.suffix is not None:
                shown = tokenizer.encode(ANCHOR, bos=False, eos=False)  # the prompt ends with the id of <MID>
            # With log-probabilities the id that ends the answer is reported, too. So each new id has an entry, as
            # lm-evaluation-harness expects: it drops the last entry of a prompt with one new id.
            stop_ids, row.stop = (row.stop, set()) if is_scored else (set(), row.stop)
            text = (OffsetStream if is_scored else TextStream)(tokenizer, request.stop, shown)
            choices.append(Choice(row, text, self.job.cut, prompt=request.echo, hidden=hidden, stop_ids=stop_ids))
        return choices

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if self.request.suffix is None:
            return self.encode(prompt, "prompt")
        self.check_length(len(prompt), "prompt")
        self.check_length(len(self.request.suffix), "suffix")
        try:
            return infilling_prompt_tokens(self.llama.tokenizer, prompt, self.request.suffix)
        except ValueError as error:
            raise RequestError(error, param="suffix") from None

    def choice(self, choice: Choice) -> dict[str, Any]:
        return self._form(choice, *choice.take())

    def begin(self) -> list[dict[str, Any]]:
        return []

    def delta(self, choice: Choice, text: str, scored: Sequence[Scored]) -> list[dict[str, Any]]:
        return [self._form(choice, text, scored)] if text or scored or choice.finish_reason else []

    def _form(self, choice: Choice, text: str, scored: Sequence[Scored]) -> dict[str, Any]:
        logprobs = None if self.request.k is None else completion_logprobs(scored, self.llama.tokenizer)
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}
