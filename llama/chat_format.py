"""Dialogs to ids. Special ids are written as ids, never as text, so that a message cannot forge them.

A dialect lays a dialog out in parts, texts and specials. `ChatFormat` makes ids of them, `render` the text that a
published template would write.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from llama.sniff import as_path
from llama.tokenizer import Tokenizer, TokenizerError, check_size

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    role: Role
    content: str


Dialog = Sequence[Message]


@dataclass(frozen=True)
class Special:
    """A token by its name, which becomes an id without passing through the tokenizer as text."""

    name: str


BOS, EOS = Special("BOS"), Special("EOS")  # by what they do: each vocabulary has names of its own for them

Part = str | Special
Turns = list[tuple[str, str]]  # role and content


@dataclass(frozen=True)
class Dialect:
    """How one family of chat models writes a dialog.

    write: system message or None, and the turns of user and assistant -> parts up to where the answer begins. No two
    texts touch: SentencePiece puts a space before each text it is given, so where one begins is part of the dialect.
    needs: specials that it cannot do without. stops: those that end an answer beside EOS, as far as there are such.
    tags: marks that are plain text, so content that holds one could forge a turn.
    strips: contents lose the white space around them.
    """

    write: Callable[[str | None, Turns], list[Part]]
    needs: tuple[Special, ...]
    stops: tuple[Special, ...] = ()
    tags: tuple[str, ...] = ()
    strips: bool = False

    def parts(
        self, dialog: Dialog, default_system: str | None = None, system_prefix: str = "", dialog_bos: bool = False
    ) -> list[Part]:
        """default_system: the system message of a dialog without one. system_prefix: what goes before another one.
        dialog_bos: BOS goes first where the dialect has none. Raises TypeError and ValueError as `split_system` does.
        """
        system, messages = split_system(dialog)
        turns: Turns = [(message["role"], self._content(message["content"])) for message in messages]
        parts = self.write(default_system if system is None else system_prefix + self._content(system), turns)
        return [BOS, *parts] if dialog_bos and parts[0] != BOS else parts

    def _content(self, text: str) -> str:
        return text.strip() if self.strips else text


def _llama2(system: str | None, turns: Turns) -> list[Part]:
    texts = [content for _, content in turns]
    if system is not None:
        texts[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{texts[0]}"
    parts: list[Part] = []
    for user, answer in zip(texts[0:-1:2], texts[1::2], strict=True):
        parts += [BOS, f"[INST] {user.strip()} [/INST] {answer.strip()} ", EOS]
    return [*parts, BOS, f"[INST] {texts[-1].strip()} [/INST]"]


START_HEADER, END_HEADER, EOT = Special("<|start_header_id|>"), Special("<|end_header_id|>"), Special("<|eot_id|>")


def _llama3(system: str | None, turns: Turns) -> list[Part]:
    parts: list[Part] = [BOS]
    for role, content in _with_system(system, turns):
        parts += [START_HEADER, role, END_HEADER, f"\n\n{content}", EOT]
    return [*parts, START_HEADER, "assistant", END_HEADER, "\n\n"]


IM_START, IM_END = Special("<|im_start|>"), Special("<|im_end|>")


def _chatml(system: str | None, turns: Turns) -> list[Part]:
    parts: list[Part] = []
    for role, content in _with_system(system, turns):
        parts += [IM_START, f"{role}\n{content}", IM_END, "\n"]
    return [*parts, IM_START, "assistant\n"]


def _zephyr(system: str | None, turns: Turns) -> list[Part]:
    # No BOS, though these tokenizers put one before other texts: the models' templates have none, and a template
    # writes all that its model is to read.
    parts: list[Part] = []
    between = ""
    for role, content in _with_system(system, turns):
        parts += [f"{between}<|{role}|>\n{content}", EOS]
        between = "\n"
    return [*parts, "\n<|assistant|>\n"]


PHI3_ROLES = {role: Special(f"<|{role}|>") for role in ("system", "user", "assistant")}
END = Special("<|end|>")


def _phi3(system: str | None, turns: Turns) -> list[Part]:
    parts: list[Part] = []  # no BOS, as in zephyr
    for role, content in _with_system(system, turns):
        parts += [PHI3_ROLES[role], f"\n{content}", END, "\n"]
    return [*parts, PHI3_ROLES["assistant"], "\n"]


INST, END_INST = Special("[INST]"), Special("[/INST]")


def _mistral_v3(system: str | None, turns: Turns) -> list[Part]:
    """The vocabularies from v2 on: the tags are specials, and the system message goes into the last user message."""
    parts: list[Part] = [BOS]
    for at, (role, content) in enumerate(turns, 1):
        if role == "assistant":
            parts += [content.rstrip(" "), EOS]
        else:
            parts += [INST, f"{system}\n\n{content}" if system and at == len(turns) else content, END_INST]
    return parts


def _mistral_v1(system: str | None, turns: Turns) -> list[Part]:
    """The first vocabulary: the tags are plain text, and the system message goes into the first user message."""
    texts = [content for _, content in turns]
    if system:
        texts[0] = f"{system}\n\n{texts[0]}"
    parts: list[Part] = [BOS]
    for user, answer in zip(texts[0:-1:2], texts[1::2], strict=True):
        parts += [f"[INST] {user} [/INST] {answer}", EOS]
    return [*parts, f"[INST] {texts[-1]} [/INST]"]


def _with_system(system: str | None, turns: Turns) -> Turns:
    return turns if system is None else [("system", system), *turns]


# By name. Where there are several, the first that the vocabulary has the specials for is meant.
FORMATS: dict[str, tuple[Dialect, ...]] = {
    "llama2": (Dialect(_llama2, needs=(BOS, EOS), tags=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")),),
    "llama3": (
        Dialect(_llama3, needs=(BOS, START_HEADER, END_HEADER, EOT), stops=(EOT, Special("<|eom_id|>")), strips=True),
    ),
    "chatml": (Dialect(_chatml, needs=(IM_START, IM_END), stops=(IM_END,)),),
    "zephyr": (Dialect(_zephyr, needs=(EOS,), tags=("<|system|>", "<|user|>", "<|assistant|>")),),
    "phi3": (Dialect(_phi3, needs=(*PHI3_ROLES.values(), END), stops=(END, Special("<|endoftext|>"))),),
    "mistral": (
        Dialect(_mistral_v3, needs=(BOS, EOS, INST, END_INST)),
        Dialect(_mistral_v1, needs=(BOS, EOS), tags=("[INST]", "[/INST]")),
    ),
}


def find_dialect(name: str, specials: Collection[Special]) -> Dialect:
    """The named dialect, as a vocabulary with these specials has it. Raises ValueError where it has none."""
    if name not in FORMATS:
        raise ValueError(f"chat format {name!r}: expected {', '.join(FORMATS)}")
    for dialect in FORMATS[name]:
        missing = [special.name for special in dialect.needs if special not in specials]
        if not missing:
            return dialect
    raise ValueError(f"chat format {name!r} needs {', '.join(sorted(missing))}, which this tokenizer lacks")


def render(parts: Sequence[Part], names: Mapping[Special, str]) -> str:
    """Parts as one text, in which specials stand by name; `names` has those of BOS and EOS."""
    return "".join(part if isinstance(part, str) else names.get(part, part.name) for part in parts)


def _refusal(tags: Sequence[str]) -> str:
    return (
        "This dialog was not given to the model: a message contains one of the tags that mark turns "
        f"({', '.join(tags)})."
    )


REFUSAL = _refusal(FORMATS["llama2"][0].tags)


class ChatFormat:
    """A dialect in a tokenizer's ids. stop_tokens: ids that end an answer, beside the tokenizer's own.

    Raises ValueError where the name is unknown, or the tokenizer lacks what the dialect needs.
    """

    def __init__(self, name: str, tokenizer: Tokenizer):
        self.name, self.tokenizer = name, tokenizer
        self._ids = {Special(token): i for token, i in tokenizer.special_ids.items()}
        self._ids |= {special: i for special, i in ((BOS, tokenizer.bos_id), (EOS, tokenizer.eos_id)) if i >= 0}
        self.dialect = find_dialect(name, self._ids)
        self.stop_tokens = {self._ids[special] for special in self.dialect.stops if special in self._ids}

    def encode(self, dialog: Dialog) -> list[int]:
        """Ids up to where the assistant's answer begins. Raises ValueError for roles out of order."""
        ids: list[int] = []
        tokenizer = self.tokenizer
        for part in self.dialect.parts(
            dialog, tokenizer.default_system, tokenizer.system_prefix, tokenizer.dialog_bos and BOS in self._ids
        ):
            if isinstance(part, Special):
                ids.append(self._ids[part])
                continue
            # Texts do not touch, so what stands before this one is a special.
            text = part.lstrip() if ids and ids[-1] in tokenizer.rstrip_ids else part
            if text:
                ids += tokenizer.encode(text, bos=False, eos=False)
        return ids

    def refusal(self, dialog: Dialog) -> str | None:
        """The fixed answer to a dialog that must not reach the model, or None."""
        tags, read = self.dialect.tags, self.tokenizer.normalize
        contents = [message["content"] for message in dialog] if tags else []
        # As they are, and as the tokenizer reads them: to some, full-width brackets are brackets.
        forged = any(tag in text for content in contents for text in (content, read(content)) for tag in tags)
        return _refusal(tags) if forged else None


def for_tokenizer(tokenizer: Tokenizer, name: str | None = None) -> ChatFormat | None:
    """The named format, or the one that belongs to the tokenizer; None when neither is known.

    Raises ValueError where the tokenizer cannot write it, TokenizerError where its own files name it.
    """
    if name:
        return ChatFormat(name, tokenizer)
    try:
        return None if tokenizer.chat_format is None else ChatFormat(tokenizer.chat_format, tokenizer)
    except ValueError as error:
        raise TokenizerError(f"{tokenizer.config_path}: {error}: mend its chat_format, null is for none") from None


# What Meta calls its base models; the -hf are its own conversions.
BASE_NAMES = re.compile(r"((meta-)?llama-?[23](\.\d)?-\d+b|codellama-\d+b(-python)?)(-hf)?", re.IGNORECASE)


def base_model_note(ckpt_dir: str | Path) -> str | None:
    """A line for those who chat with a model that was never taught to, None where nothing says that it was not.

    Base models go by Meta's names, or have a tokenizer_config.json that records no chat format, for want of a template.
    """
    folder = Path(os.path.abspath(as_path(ckpt_dir)))  # a link is called as its user calls it
    name = folder.parent.name if folder.name == "original" else folder.name  # as the hub lays Meta's files out
    try:
        check_size(path := folder / "tokenizer_config.json")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    untaught = isinstance(config, dict) and config.get("chat_format", "") is None and not config.get("chat_template")
    if not untaught and not BASE_NAMES.fullmatch(name):
        return None
    return (
        f"note: {name} looks like a base model: it continues texts and was not taught to answer. "
        "Models that were are named -chat or -Instruct; `python -m llama complete` continues texts"
    )


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
