"""Turns ids into text while they are generated. Text that later ids may change, or that may become a stop text, is held
back."""

from collections.abc import Sequence
from typing import NamedTuple

from llama.engine.requests import Token, check_list, per_prompt
from llama.tokenizer import Tokenizer

Stop = str | Sequence[str] | Sequence[Sequence[str] | None] | None
UNDECODED = "\N{REPLACEMENT CHARACTER}"


class TextPiece(NamedTuple):
    """New final text of a row, the row's end, or both.

    row: index in the results. finish_reason: "stop" or "length" at the row's end, else None.
    """

    row: int
    text: str
    finish_reason: str | None


class TextStream:
    """The text of one row. Joined, the pieces that `take` returns equal `Tokenizer.decode` of all ids, cut where the
    first stop text begins.

    prompt: ids whose text precedes the generated text. It is not searched for stop texts.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        self.text = ""  # final: later ids do not change it
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._window, self._window_start = 0, 0  # index of the first id that is decoded, and where its text starts
        self._taken = 0  # length of the text that `take` has returned
        self._from = 0  # the earliest position at which a stop text can begin
        self._overhang = ""  # the part of the last id's text that belongs to the stop text
        for token in prompt:
            self._add(token)
        self._prompt, self._from = len(self._ids), len(self.text)

    def add(self, token: Token) -> str | None:
        """Add what a step has added to the row. Returns why the row ends, or None."""
        if token.id is not None:
            self.push(token.id)
        if token.finish_reason:
            self.finish()
        return "stop" if self.stopped else token.finish_reason

    def push(self, token: int) -> None:
        """Add an id. Sets `stopped` if it completes a stop text; no id may be added after that."""
        self._add(token)
        self._find_stop()

    def finish(self) -> None:
        """Call this after the last id. Text that was held back becomes final, with invalid UTF-8 as U+FFFD."""
        if not self.stopped:
            self._settle(self._tokenizer.decode(self._ids[self._window :]))
            self._find_stop()
        self._stop = ()

    def take(self) -> str:
        """The text that has become final since the last call."""
        end = len(self.text)
        for stop in () if self.stopped else self._stop:
            for n in range(min(len(stop) - 1, len(self.text) - self._from), 0, -1):
                if self.text.endswith(stop[:n]):
                    end = min(end, len(self.text) - n)
                    break
        piece = self.text[self._taken : end]
        self._taken += len(piece)
        return piece

    @property
    def tokens(self) -> list[int]:
        """The generated ids of the text. The last id is included even if the stop text begins within its text."""
        return self._ids[self._prompt :]

    def pieces(self) -> list[str]:
        """The text of each id, including the prompt's. The last one is cut where the stop text begins."""
        pieces = [self._tokenizer.decode_token(token) for token in self._ids]
        if self._overhang and pieces[-1].endswith(self._overhang):
            pieces[-1] = pieces[-1].removesuffix(self._overhang)
        return pieces

    def _add(self, token: int) -> None:
        self._ids.append(token)
        if token in self._tokenizer.unsettled_ids:
            return
        decoded = self._tokenizer.decode(self._ids[self._window :])
        complete = decoded.rstrip(UNDECODED)  # the rest may be the first bytes of a character
        self._settle(complete)
        if complete == decoded:
            # Start decoding at this id next time, so that the window stays short. This is possible only if the text so
            # far ends with the id's own text: a tokenizer may strip the leading space of the first id that it decodes.
            alone = self._tokenizer.decode([token])
            if alone and self.text.endswith(alone):
                self._window, self._window_start = len(self._ids) - 1, len(self.text) - len(alone)

    def _settle(self, decoded: str) -> None:
        self.text += decoded[len(self.text) - self._window_start :]

    def _find_stop(self) -> None:
        begins = [self.text.find(stop, max(self._from, self._taken)) for stop in self._stop]
        begin = min((begin for begin in begins if begin >= 0), default=None)
        if begin is None:
            return
        self.stopped = True
        self.text = self.text[:begin]
        # Remove the ids that the text before the stop text does not need.
        decode, n = self._tokenizer.decode, len(self._ids)
        while n > self._prompt and decode(self._ids[: n - 1]).startswith(self.text):
            n -= 1
        del self._ids[n:]
        self._overhang = decode(self._ids)[begin:]


def read_stops(stop: Stop, count: int) -> list[list[str]]:
    """Stop texts for each prompt, from one text or one list for all ("\\n" or ["\\n", "User:"]) or a list for each
    ([["\\n"], None, ["User:"]]). Raises TypeError or ValueError."""
    if stop is not None and not isinstance(stop, str):
        check_list("stop texts", "texts", stop)
    shared = stop is None or all(isinstance(item, str) for item in stop)
    stops = []
    for item in [stop] * count if shared else per_prompt("stop", stop, count):
        texts = [item] if isinstance(item, str) else list(item) if isinstance(item, Sequence) else []
        if not (item is None or isinstance(item, Sequence)) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"stop is {stop!r}, expected a list of texts, or one for each prompt")
        if "" in texts:
            raise ValueError("stop holds an empty text, which would end every answer at once")
        stops.append(texts)
    return stops
