"""`Conversation`: a dialog over several turns. The KV cache is kept, so a turn computes only the new ids."""

from collections.abc import Generator
from dataclasses import dataclass

from typing_extensions import Unpack

from llama.chat.formats import Message
from llama.engine.requests import Row, read_rows
from llama.engine.streaming import Stop, TextStream, read_stops
from llama.generation import Llama
from llama.options import Settings, check_int, with_options


@dataclass
class Turn:
    """What the last `say` did.

    prompt_tokens: number of ids of the dialog without the answer.
    reused: how many of them were still in the cache.
    new_tokens: number of ids of the answer.
    dropped: the number of turns dropped from the dialog, oldest first, because it did not fit max_seq_len.
    finish_reason: "stop", "length" (max_gen_len or max_seq_len is reached), or None: the answer is still being
        generated, or its reader stopped early.
    kept: whether the turn was added to the dialog.
    """

    prompt_tokens: int
    dropped: int
    reused: int = 0
    new_tokens: int = 0
    finish_reason: str | None = None
    kept: bool = False

    @property
    def context(self) -> int:
        """Positions in use: those of the dialog and the answer."""
        return self.prompt_tokens + self.new_tokens


class Conversation:
    """A dialog between one user and one model.

    messages: the dialog so far, {"role": ..., "content": ...}, user and assistant alternating. system: the system
    message, or None. Both may be edited at any time, but messages must be removed in pairs. The next turn computes
    everything after the first change. last: the last `Turn`.

    The settings are those of `chat_completion`, one value each. With a `seed`, every answer is sampled with that seed.

    A quarter of max_seq_len, or max_gen_len if that is less, is reserved for the answer. If the dialog does not fit the
    remaining positions, its oldest turns are dropped. The system message is always kept.

    Other calls of `llama` are allowed between turns. If you write to the model's weights, start a new conversation, as
    this one continues with keys and values of the old weights. Under torchrun every rank has a conversation and makes
    the same calls.

    Raises ValueError or TypeError for wrong settings, and ValueError for a model without a chat format.
    """

    @with_options(Settings)
    def __init__(
        self,
        llama: Llama,
        system: str | None = None,
        *,
        stop: Stop = None,
        **settings: Unpack[Settings],
    ):
        self.llama, self.system, self.stop, self.settings = llama, system, stop, settings
        # These lines raise errors about the arguments now, not in the first `say`.
        self._format = llama.dialogs
        _check_one(read_rows(llama.model.params, lambda: 0, (), [[0]], **self.settings))
        read_stops(stop, 1)
        self._reserved = llama.model.params.max_seq_len // 4
        if (max_gen_len := settings.get("max_gen_len")) is not None:
            self._reserved = min(self._reserved, check_int("max_gen_len", max_gen_len, 1))
        self.messages: list[Message] = []
        self.last: Turn | None = None
        self._answering: Generator[str, None, None] | None = None

    def say(self, text: str) -> Generator[str, None, None]:
        """Send a user message, and yield the answer in pieces.

        The turn is added to `messages` with the first piece, and its answer grows with every piece. If the reader stops
        early, the part that was read stays there. Only one answer is generated at a time: another `say` ends this one.

        A message that the chat format refuses is answered with the fixed refusal, and the turn is not added.

        Raises ValueError if the system message and `text` alone fill max_seq_len.
        """
        user: Message = {"role": "user", "content": text}
        limit = self.llama.model.params.max_seq_len
        start = 0  # index of the first message that is not dropped
        needed = self._length(user, start)
        while needed + self._reserved > limit and start < len(self.messages):
            start += 2
            needed = self._length(user, start)
        if needed >= limit:
            raise ValueError(
                f"this message and the system message need {needed} positions, and max_seq_len is {limit}: "
                "say less, or use a larger max_seq_len"
            )
        messages = [*self.messages[start:], user]
        rows, texts = self.llama._chat_rows([[*self._system(), *messages]], self.stop, **self.settings)
        _check_one(rows)  # `settings` may have been edited
        if self._answering is not None:
            self._answering.close()
        self.last = Turn(needed, start // 2)
        self._answering = self._answer(messages, rows[0], texts[0], self.last)
        return self._answering

    def dialog(self) -> list[Message]:
        """The system message, if there is one, and the messages. With a question appended, it is a dialog for
        `chat_completion`."""
        return [*self._system(), *self.messages]

    def _system(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _length(self, user: Message, start: int) -> int:
        return len(self._format.encode([*self._system(), *self.messages[start:], user]))

    def _answer(self, messages: list[Message], row: Row, text: TextStream, turn: Turn) -> Generator[str, None, None]:
        answer = self._format.answer("")
        dialog = [*messages, answer]
        for piece in self.llama._pieces([row], [text], reuse=self, is_read=True):
            turn.reused, turn.new_tokens, turn.finish_reason = row.reused, len(text.tokens), piece.finish_reason
            answer["content"] += piece.text
            accepted = self._format.refusal(dialog) is None
            if accepted and not turn.kept:
                self.messages, turn.kept = dialog, True
            elif turn.kept and not accepted:  # the answer now contains a tag: the format would refuse every later turn
                turn.kept = False
                if self.messages and self.messages[-1] is answer:
                    del self.messages[-2:]
            if piece.text:
                yield piece.text


def _check_one(rows: list[Row]) -> None:
    if len(rows) != 1:
        raise ValueError(f"n is {len(rows)}, but a conversation has one answer at a time: leave it out")
