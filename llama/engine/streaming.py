"""Ids to text as they come: what may still change, or may still become a stop text, is held back."""

from collections.abc import Sequence
from typing import NamedTuple

from llama.engine.requests import check_list, per_prompt
from llama.tokenizer import Tokenizer

Stop = str | Sequence[str] | Sequence[Sequence[str] | None] | None
UNDECODED = "\N{REPLACEMENT CHARACTER}"


class TextPiece(NamedTuple):
    """What a step brought to a row: text that will not change any more, its end, or both.

    row: its place in the results. finish_reason: "stop" or "length" at the row's end, else None.
    """

    row: int
    text: str
    finish_reason: str | None


class TextStream:
    """The text of one row. The pieces that `take` gives, joined, are the tokenizer's `decode` of all ids, up to the
    first stop text.

    prompt: ids whose text comes first and in which no stop text is looked for.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        self.text = ""  # what no later id changes
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._window, self._window_start = 0, 0  # the id from which we decode, and where its text starts
        self._given = 0
        self._from = 0  # where a stop text can begin at the earliest
        self._overhang = ""
        for token in prompt:
            self._add(token)
        self._prompt, self._from = len(self._ids), len(self.text)

    def push(self, token: int) -> None:
        """Add an id; `stopped` tells whether a stop text is complete with it, and nothing may be added then."""
        self._add(token)
        self._find_stop()

    def finish(self) -> None:
        """No more ids: what was held back becomes text, bytes that are no UTF-8 as U+FFFD."""
        if not self.stopped:
            self._settle(self._tokenizer.decode(self._ids[self._window :]))
            self._find_stop()
        self._stop = ()

    def take(self) -> str:
        """The text that has become certain since the last call."""
        end = len(self.text)
        for stop in () if self.stopped else self._stop:
            for n in range(min(len(stop) - 1, len(self.text) - self._from), 0, -1):
                if self.text.endswith(stop[:n]):
                    end = min(end, len(self.text) - n)
                    break
        piece = self.text[self._given : end]
        self._given += len(piece)
        return piece

    @property
    def tokens(self) -> list[int]:
        """The ids behind the text, without the prompt's; of one that a stop text cuts into, all counts."""
        return self._ids[self._prompt :]

    def pieces(self) -> list[str]:
        """The text of each id, the prompt's included, the last cut where the stop text begins."""
        pieces = [self._tokenizer.decode_token(token) for token in self._ids]
        if self._overhang and pieces[-1].endswith(self._overhang):
            pieces[-1] = pieces[-1].removesuffix(self._overhang)
        return pieces

    def _add(self, token: int) -> None:
        self._ids.append(token)
        if token in self._tokenizer.unsettled_ids:
            return
        decoded = self._tokenizer.decode(self._ids[self._window :])
        whole = decoded.rstrip(UNDECODED)  # the first bytes of a character, perhaps
        self._settle(whole)
        if whole == decoded:
            # Decode from this id next time, if it has a text of its own: the first id of a text may lose its leading
            # space, and then all of what it loses must be its own.
            alone = self._tokenizer.decode([token])
            if alone and self.text.endswith(alone):
                self._window, self._window_start = len(self._ids) - 1, len(self.text) - len(alone)

    def _settle(self, decoded: str) -> None:
        self.text += decoded[len(self.text) - self._window_start :]

    def _find_stop(self) -> None:
        begins = [self.text.find(stop, max(self._from, self._given)) for stop in self._stop]
        begin = min((begin for begin in begins if begin >= 0), default=None)
        if begin is None:
            return
        self.stopped = True
        self.text = self.text[:begin]
        decode, kept = self._tokenizer.decode, len(self._ids)
        while kept > self._prompt and decode(self._ids[: kept - 1]).startswith(self.text):
            kept -= 1
        del self._ids[kept:]
        self._overhang = decode(self._ids)[begin:]


def read_stops(stop: Stop, count: int) -> list[list[str]]:
    """Stop texts for each prompt, from one text or list for all ("\\n" or ["\\n", "User:"]) or a list for each
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
