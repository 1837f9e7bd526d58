"""Dialogs to ids. Special ids are written as ids, never as text, so that a message cannot forge them."""

from collections.abc import Sequence
from typing import Literal, Protocol, TypedDict

from llama.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    role: Role
    content: str


Dialog = Sequence[Message]

# Llama 2's tags are plain text, so content that holds one could forge a turn.
LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
REFUSAL = (
    "This dialog was not given to the model: a message contains one of the tags that mark turns "
    "([INST], [/INST], <<SYS>>, <</SYS>>)."
)


class ChatFormat(Protocol):
    """How one family of chat models writes a dialog."""

    name: str
    stop_tokens: set[int]  # ids that end an answer, beside the tokenizer's own

    def encode(self, dialog: Dialog) -> list[int]:
        """Ids up to where the assistant's answer begins. Raises ValueError for roles out of order."""
        ...

    def refusal(self, dialog: Dialog) -> str | None:
        """The fixed answer to a dialog that must not reach the model, or None."""
        ...


class Llama2Format:
    """[INST] <<SYS>> system <</SYS>> user [/INST] answer, with BOS and EOS around each completed turn."""

    name = "llama2"

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.stop_tokens: set[int] = set()

    def encode(self, dialog: Dialog) -> list[int]:
        system, turns = split_system(dialog)
        texts = [message["content"] for message in turns]
        if system is not None:
            texts[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{texts[0]}"
        ids: list[int] = []
        for user, answer in zip(texts[0:-1:2], texts[1::2], strict=True):
            ids += self.tokenizer.encode(f"[INST] {user.strip()} [/INST] {answer.strip()} ", bos=True, eos=True)
        return ids + self.tokenizer.encode(f"[INST] {texts[-1].strip()} [/INST]", bos=True, eos=False)

    def refusal(self, dialog: Dialog) -> str | None:
        forged = any(tag in message["content"] for message in dialog for tag in LLAMA2_TAGS)
        return REFUSAL if forged else None


class ChatMLFormat:
    """<|im_start|>role, a line break, content, <|im_end|>, a line break; then the head of the assistant's answer."""

    name = "chatml"

    def __init__(self, tokenizer: Tokenizer):
        missing = {"<|im_start|>", "<|im_end|>"} - tokenizer.special_ids.keys()
        if missing:
            raise ValueError(f"chat format 'chatml' needs {', '.join(sorted(missing))}, which this tokenizer lacks")
        self.tokenizer = tokenizer
        self.start, self.end = tokenizer.special_ids["<|im_start|>"], tokenizer.special_ids["<|im_end|>"]
        self.stop_tokens = {self.end}

    def encode(self, dialog: Dialog) -> list[int]:
        system, turns = split_system(dialog)
        system = self.tokenizer.default_system if system is None else system
        messages = [("system", system)] if system is not None else []
        messages += [(message["role"], message["content"]) for message in turns]
        ids: list[int] = []
        for role, content in messages:
            ids += [self.start, *self._text(f"{role}\n{content}"), self.end, *self._text("\n")]
        return [*ids, self.start, *self._text("assistant\n")]

    def refusal(self, dialog: Dialog) -> str | None:
        return None

    def _text(self, s: str) -> list[int]:
        return self.tokenizer.encode(s, bos=False, eos=False)


FORMATS: dict[str, type[Llama2Format] | type[ChatMLFormat]] = {"llama2": Llama2Format, "chatml": ChatMLFormat}


def for_tokenizer(tokenizer: Tokenizer, name: str | None = None) -> ChatFormat | None:
    """The named format, or the one that belongs to the tokenizer; None when neither is known."""
    name = name or tokenizer.chat_format
    if name is None:
        return None
    if name not in FORMATS:
        raise ValueError(f"chat format {name!r}: expected {', '.join(FORMATS)}")
    return FORMATS[name](tokenizer)


def split_system(dialog: Dialog) -> tuple[str | None, list[Message]]:
    """Check a dialog and take its system message off: (system or None, user and assistant messages in turn).

    A dialog is a list of {"role": ..., "content": ...}: at most one system message, first; then user and assistant
    in turn, with the user last. Raises TypeError or ValueError otherwise.
    """
    if not isinstance(dialog, Sequence) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in dialog
    ):
        raise TypeError('a dialog is a list of {"role": ..., "content": ...} messages with texts in both')
    messages = list(dialog)
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
    roles = [message["role"] for message in messages]
    if not roles or len(roles) % 2 == 0 or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise ValueError(
            "roles of a dialog: an optional system message, then user and assistant in turn, user last; "
            f"got {', '.join(message['role'] for message in dialog) or 'nothing'}"
        )
    return system, messages
