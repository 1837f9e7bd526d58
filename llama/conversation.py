"""A dialog that goes on: the cache keeps what was said, so a turn computes only what is new."""

from collections.abc import Generator
from dataclasses import dataclass

from llama.chat.formats import Message
from llama.engine.requests import Row, Settings, check_int, read_rows
from llama.engine.streaming import Stop, TextStream, read_stops
from llama.generation import Llama


@dataclass
class Turn:
    """What the last `say` did.

    prompt_tokens: ids of the whole dialog, of which `reused` were still in the cache. new_tokens: ids of the answer.
    dropped: turns that were forgotten, the oldest first, to make room.
    finish_reason: "stop", "length" (max_gen_len or the context's end), or None until then and for an answer broken off.
    kept: whether the turn is part of the dialog from now on.
    """

    prompt_tokens: int
    dropped: int
    reused: int = 0
    new_tokens: int = 0
    finish_reason: str | None = None
    kept: bool = False

    @property
    def context(self) -> int:
        """Positions in use: the dialog and the answer."""
        return self.prompt_tokens + self.new_tokens


class Conversation:
    """One user, one model, and what they have said.

    messages: the dialog so far, {"role": ..., "content": ...} of user and assistant in turn. system: the system
    message. Both may be edited or cut, in pairs, at any time: the next turn computes what comes after the first change.
    last: the last `Turn`.

    The settings are one value each, with the meanings of `chat_completion`; with a `seed` each answer draws from that
    stream. A quarter of max_seq_len, or max_gen_len where that is less, is kept free for the answer: when the dialog
    needs the room, the oldest turns are dropped whole, and the system message stays.

    Other calls of `llama` may come between turns; the next turn then computes the dialog again. Under torchrun every
    rank holds the conversation and makes the same calls.
    """

    def __init__(
        self,
        llama: Llama,
        system: str | None = None,
        *,
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int | None = None,
        repetition_penalty: float = 1.0,
        stop: Stop = None,
        seed: int | None = None,
    ):
        if max_gen_len is not None:
            check_int("max_gen_len", max_gen_len, 1)
        self.llama, self.system, self.stop = llama, system, stop
        self.settings: Settings = {
            "max_gen_len": max_gen_len,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
        # Mistakes are told now, not at the first question; so is a model without a chat format.
        self._format = llama.dialogs
        read_rows(llama.model.params, lambda: 0, (), [[0]], **self.settings)
        read_stops(stop, 1)
        self._room = llama.model.params.max_seq_len // 4 if max_gen_len is None else max_gen_len
        self.messages: list[Message] = []
        self.last: Turn | None = None
        self._open: Generator[str, None, None] | None = None

    def say(self, text: str) -> Generator[str, None, None]:
        """Say something and get the answer in pieces. With the first piece the turn joins `messages`, where the answer
        grows as it is read; whoever stops reading leaves what has come until then.

        Raises ValueError when the system message and `text` alone fill the context. What the dialog's format refuses
        is answered with the fixed refusal and joins nothing.
        """
        user: Message = {"role": "user", "content": text}
        limit = self.llama.model.params.max_seq_len
        free = min(limit // 4, self._room)
        start = 0  # messages before it are dropped
        needed = self._length(user, start)
        while needed + free > limit and start < len(self.messages):
            start += 2
            needed = self._length(user, start)
        if needed >= limit:
            raise ValueError(
                f"this message and the system message need {needed} positions, and max_seq_len is {limit}: "
                "say less, or use a larger max_seq_len"
            )
        messages = [*self.messages[start:], user]
        rows, texts = self.llama._chat_rows([[*self._system(), *messages]], self.stop, **self.settings)
        if self._open is not None:
            self._open.close()  # one answer at a time
        self.last = Turn(needed, start // 2)
        self._open = self._answer(messages, rows[0], texts[0], self.last)
        return self._open

    def dialog(self) -> list[Message]:
        """The system message, where there is one, and the messages: what `chat_completion` takes, but for the next
        question."""
        return [*self._system(), *self.messages]

    def _system(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _length(self, user: Message, start: int) -> int:
        return len(self._format.encode([*self._system(), *self.messages[start:], user]))

    def _answer(self, messages: list[Message], row: Row, text: TextStream, turn: Turn) -> Generator[str, None, None]:
        answer = self._format.answer("")
        dialog = [*messages, answer]
        for piece in self.llama._pieces([row], [text], reuse=True, is_read=True):
            turn.reused, turn.new_tokens, turn.finish_reason = row.reused, len(row.tokens), piece.finish_reason
            answer["content"] += piece.text
            accepted = self._format.refusal(dialog) is None
            if accepted and not turn.kept:
                self.messages, turn.kept = dialog, True
            elif turn.kept and not accepted:  # a tag in the answer would have every later turn refused
                turn.kept = False
                if self.messages and self.messages[-1] is answer:
                    del self.messages[-2:]
            if piece.text:
                yield piece.text
