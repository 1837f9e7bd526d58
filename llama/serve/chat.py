"""POST /v1/chat/completions: a dialog is answered."""

from collections.abc import Sequence
from typing import Any

from llama.chat.formats import Dialog
from llama.engine.requests import Row
from llama.engine.streaming import TextStream
from llama.serve.answers import Answer
from llama.serve.choices import Choice, OffsetStream, Scored
from llama.serve.errors import RequestError
from llama.serve.logprobs import chat_logprobs
from llama.serve.protocol import ChatRequest


class ChatCompletion(Answer):
    """A dialog with a tag that marks turns gets the fixed refusal of its format, and finish_reason "content_filter"."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    request: ChatRequest

    def make_choices(self) -> list[Choice]:
        request, tokenizer = self.request, self.llama.tokenizer
        dialog: Dialog = [{"role": message.role, "content": message.content} for message in request.messages]
        self.check_length(sum(len(message["content"]) for message in dialog), "messages")
        name = "max_tokens" if request.max_tokens is not None else "max_completion_tokens"
        try:
            dialogs = self.llama.dialogs
        except ValueError as error:  # a base model
            raise RequestError(error, param="model") from None
        try:
            dialogs.dialect.split(dialog)  # raises for roles out of order
            refusal = dialogs.refusal(dialog)
            ids = [0] if refusal is not None else dialogs.encode(dialog)
        except ValueError as error:
            raise RequestError(error, param="messages") from None
        choices = []
        for row in self.rows([ids], "messages", name):
            if refusal is not None:
                self.prompt_tokens = 0
                choices.append(self._refused(row, refusal))
                continue
            row.stop |= dialogs.stop_tokens
            kind = TextStream if request.k is None else OffsetStream
            choices.append(Choice(row, kind(tokenizer, request.stop), self.job.cut))
        return choices

    def _refused(self, row: Row, refusal: str) -> Choice:
        """A choice whose row is not run."""
        row.finish_reason = "content_filter"
        text = TextStream(self.llama.tokenizer)
        text.text = refusal
        return Choice(row, text, self.job.cut, prompt=True)

    def choice(self, choice: Choice) -> dict[str, Any]:
        text, scored = choice.take()
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": choice.index, "message": message, **self._details(choice, scored)}

    def begin(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [
            {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None} for choice in self.choices
        ]

    def delta(self, choice: Choice, text: str, scored: Sequence[Scored]) -> list[dict[str, Any]]:
        details = self._details(choice, scored)
        deltas = []
        if text or scored:
            deltas.append({"index": choice.index, "delta": {"content": text}, **details, "finish_reason": None})
        if choice.finish_reason:
            deltas.append({"index": choice.index, "delta": {}, **details, "logprobs": None})
        return deltas

    def _details(self, choice: Choice, scored: Sequence[Scored]) -> dict[str, Any]:
        logprobs = None if self.request.k is None else chat_logprobs(scored, self.llama.tokenizer)
        return {"logprobs": logprobs, "finish_reason": choice.finish_reason}
