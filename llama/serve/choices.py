"""`Choice`: the answer of one row while it is generated. It turns the scheduler's tokens into final text, and keeps
each id's log-probability and place in the text."""

import codecs
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from llama.engine.requests import Alternatives, Row, Token
from llama.engine.streaming import TextStream
from llama.tokenizer import Tokenizer


class OffsetStream(TextStream):
    """A `TextStream` that knows where in the text each id begins.

    starts: for each id an index into `text`. An id that begins inside a character has the index of that character.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        self.starts: list[int] = []
        self._length = 0  # characters of the ids so far, without an incomplete one at the end
        self._complete = 0  # number of ids when all characters were complete last
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        super().__init__(tokenizer, stop, prompt)

    def _add(self, token: int) -> None:
        data = self._tokenizer.token_bytes(token)
        start, is_after_broken = self._length, False
        if self._decoder.getstate()[0] and data:
            # A character is incomplete. Either the first byte continues it, or it has become U+FFFD.
            decoded = self._decoder.decode(data[:1])
            begins = bool(self._decoder.getstate()[0])  # whether the first byte itself is not in `decoded`
            start += len(decoded) if begins else max(len(decoded) - 1, 0)
            is_after_broken = start > self._length
            self._length += len(decoded) + len(self._decoder.decode(data[1:]))
        else:
            self._length += len(self._decoder.decode(data))
        self.starts.append(start)
        super()._add(token)
        if self.is_complete:
            # Tokenizers may drop a space before the first id, or write more than one U+FFFD for a broken character.
            dropped = max(0, self._length - len(self.text))
            for i in range(self._complete, len(self.starts)):
                self.starts[i] = max(self.starts[self._complete], self.starts[i] - dropped)
            self._length, self._complete = len(self.text), len(self.starts)
            self._decoder.reset()
            if is_after_broken and self.text.endswith(own := data.decode(errors="replace")):
                self.starts[-1] = self._length - len(own)


@dataclass(frozen=True)
class Scored:
    """One id with its log-probability.

    logprob: None for the first id of a prompt, which nothing predicts. top: the alternatives. start: where its text
    begins in the text of the choice. text: what the answer has of its text, if a stop text cut off the rest.
    """

    id: int
    logprob: float | None
    top: Alternatives
    start: int = 0
    text: str | None = None


class Choice:
    """The answer of one row.

    text: a stream without generated ids. If log-probabilities are wanted it is an `OffsetStream`.
    prompt: whether the text of the prompt, which `text` has, is part of the answer.
    hidden: the number of ids at the beginning of the prompt that are not in `text`, such as BOS.
    stop_ids: ids that end the answer and are reported with their log-probabilities. The row must not stop at them.
    cut: is called with a row and a number of generated ids to end the row after these.
    """

    def __init__(
        self,
        row: Row,
        text: TextStream,
        cut: Callable[[Row, int], None],
        *,
        prompt: bool = False,
        hidden: int = 0,
        stop_ids: Collection[int] = (),
    ):
        self.row, self.index, self.finish_reason = row, row.index, row.finish_reason
        self.scored: deque[Scored] = deque()  # ids whose text `take` has not returned yet
        self._text, self._cut, self._stop_ids = text, cut, stop_ids
        self._base = 0 if prompt else len(text.text)
        self._taken = 0 if prompt else len(text.take())
        self._prompt, self._hidden = prompt, hidden
        self._needed: deque[int] = deque()  # for the first of `scored`: the length of text with which they are final
        self._taken_ids = 0
        self._has_started = False

    @property
    def completion_tokens(self) -> int:
        return len(self._text.tokens)

    def add(self, token: Token) -> bool:
        """Add what one step has generated. Returns False for what comes after the end, because `cut` came later."""
        if self.finish_reason is not None:
            return False
        self._start()
        if token.id is not None and token.id in self._stop_ids:
            self._cut(self.row, len(self._text.tokens))
            self._finish("stop", token)
        elif token.id is not None:
            self._text.push(token.id)
            self._score(token)
            if self._text.stopped:
                self._finish("stop")
        if token.finish_reason is not None and self.finish_reason is None:
            self._finish(token.finish_reason)
        return True

    def take(self) -> tuple[str, list[Scored]]:
        """The text that has become final since the last call, and the ids whose text it completes."""
        piece = self._text.take()
        self._taken += len(piece)
        count = len(self.scored)
        if self.finish_reason is None:
            count = 0
            while self._needed and self._needed[0] <= self._taken:
                self._needed.popleft()
                count += 1
        self._taken_ids += count
        return piece, [self.scored.popleft() for _ in range(count)]

    def _start(self) -> None:
        """Add the ids of the prompt, whose log-probabilities are known before the first id is generated."""
        if self._has_started:
            return
        self._has_started = True
        if not self._prompt or not isinstance(self._text, OffsetStream):
            return
        starts = [0] * self._hidden + self._text.starts
        logprobs = [None, *self.row.prompt_logprobs[1:]]
        for i, token in enumerate(self.row.prompt):
            self.scored.append(Scored(token, logprobs[i], self.row.prompt_top[i], starts[i]))
        self._settle()

    def _score(self, token: Token) -> None:
        if isinstance(self._text, OffsetStream) and token.id is not None:
            start = self._text.starts[-1] - self._base
            self.scored.append(Scored(token.id, token.logprob, list(token.top), start))
            self._settle()

    def _settle(self) -> None:
        """An id is final once its text is sent. Until then a stop text may drop it. One without text waits for more
        text, as a stop text may begin right after it."""
        if self._text.is_complete:
            end = len(self._text.text)
            new = list(self.scored)[len(self._needed) :]
            self._needed += [end + (self._base + scored.start == end) for scored in new]

    def _finish(self, reason: str, stop: Token | None = None) -> None:
        self._text.finish()
        if self._text.stopped:  # by the last id, or in text that was held back until now
            self._cut(self.row, len(self._text.tokens))
            reason = "stop"
        self.finish_reason = reason
        if not isinstance(self._text, OffsetStream):
            return
        if self._text.stopped:
            kept = len(self.row.prompt) * self._prompt + len(self._text.tokens) - self._taken_ids
            while len(self.scored) > kept:
                self.scored.pop()
            if self._text.tokens and self.scored and self._text.overhang:
                self.scored[-1] = replace(self.scored[-1], text=self._text.pieces()[-1])
        if stop is not None and stop.id is not None:
            end = len(self._text.text) - self._base
            self.scored.append(Scored(stop.id, stop.logprob, list(stop.top), end))
