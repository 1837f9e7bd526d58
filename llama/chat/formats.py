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

from llama.files import as_path
from llama.tokenizer import STEP, Dialog, Message, Tokenizer, TokenizerError, check_size
from llama.tokenizer import Role as Role


class DialogError(ValueError, AssertionError):
    """Roles of a dialog are out of order. Meta's code raises AssertionError for it."""


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
    message: how it writes a message by itself, in dialects that take roles in any order.
    destinations: messages may have a "destination", which is a line of its own behind the role; answers are for "user".
    """

    write: Callable[[str | None, Turns], list[Part]]
    needs: tuple[Special, ...]
    stops: tuple[Special, ...] = ()
    tags: tuple[str, ...] = ()
    strips: bool = False
    message: Callable[[str, str], list[Part]] | None = None
    destinations: bool = False

    def parts(
        self, dialog: Dialog, default_system: str | None = None, system_prefix: str = "", dialog_bos: bool = False
    ) -> list[Part]:
        """default_system: the system message of a dialog without one. system_prefix: what goes before another one.
        dialog_bos: BOS goes first where the dialect has none. Raises as `split` does.
        """
        system, messages = self.split(dialog)
        turns: Turns = [(self._role(message), self.content(message["content"])) for message in messages]
        parts = self.write(default_system if system is None else system_prefix + self.content(system), turns)
        return [BOS, *parts] if dialog_bos and parts[0] != BOS else parts

    def split(self, dialog: Dialog) -> tuple[str | None, list[Message]]:
        """`split_system`, with roles in any order where the dialect takes them so."""
        return split_system(dialog, any_order=self.message is not None)

    def content(self, text: str) -> str:
        return text.strip() if self.strips else text

    def _role(self, message: Message) -> str:
        destination = message.get("destination") if self.destinations else None
        return message["role"] if destination is None else f"{message['role']}\nDestination: {destination.strip()}"


B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
LLAMA2_TAGS = (B_INST, E_INST, B_SYS.strip(), E_SYS.strip())


def _llama2(system: str | None, turns: Turns) -> list[Part]:
    texts = [content for _, content in turns]
    if system is not None:
        texts[0] = f"{B_SYS}{system}{E_SYS}{texts[0]}"
    parts: list[Part] = []
    for user, answer in zip(texts[0:-1:2], texts[1::2], strict=True):
        parts += [BOS, f"{B_INST} {user.strip()} {E_INST} {answer.strip()} ", EOS]
    return [*parts, BOS, f"{B_INST} {texts[-1].strip()} {E_INST}"]


CODELLAMA_STEP = Special(STEP)


def _codellama_70b(system: str | None, turns: Turns) -> list[Part]:
    """Code Llama 70B-Instruct. A dialog without a system message gets an empty one, which is a role without content."""
    parts: list[Part] = [BOS]
    for role, content in [("system", system or ""), *turns]:
        parts += [f" Source: {role}" + (f"\n\n {content.strip()}" if content else ""), CODELLAMA_STEP]
    return [*parts, " Source: assistant\nDestination: user\n\n "]


START_HEADER, END_HEADER, EOT = Special("<|start_header_id|>"), Special("<|end_header_id|>"), Special("<|eot_id|>")


def _llama3(system: str | None, turns: Turns) -> list[Part]:
    parts: list[Part] = [BOS]
    for role, content in _with_system(system, turns):
        parts += _llama3_message(role, content)
    return [*parts, *_llama3_message("assistant", "")[:-1]]


def _llama3_message(role: str, content: str) -> list[Part]:
    return [START_HEADER, role, END_HEADER, f"\n\n{content}", EOT]


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
    "llama2": (Dialect(_llama2, needs=(BOS, EOS), tags=LLAMA2_TAGS),),
    "llama3": (
        Dialect(
            _llama3,
            needs=(BOS, START_HEADER, END_HEADER, EOT),
            stops=(EOT, Special("<|eom_id|>")),
            strips=True,
            message=_llama3_message,
        ),
    ),
    "chatml": (Dialect(_chatml, needs=(IM_START, IM_END), stops=(IM_END,)),),
    "zephyr": (Dialect(_zephyr, needs=(EOS,), tags=("<|system|>", "<|user|>", "<|assistant|>")),),
    "phi3": (Dialect(_phi3, needs=(*PHI3_ROLES.values(), END), stops=(END, Special("<|endoftext|>"))),),
    "mistral": (
        Dialect(_mistral_v3, needs=(BOS, EOS, INST, END_INST)),
        Dialect(_mistral_v1, needs=(BOS, EOS), tags=("[INST]", "[/INST]")),
    ),
    "codellama-70b": (
        Dialect(
            _codellama_70b,
            needs=(BOS, CODELLAMA_STEP),
            stops=(CODELLAMA_STEP,),
            tags=(*LLAMA2_TAGS, STEP),
            destinations=True,
        ),
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


REFUSAL = UNSAFE_ERROR = _refusal(LLAMA2_TAGS)
# As Meta names them for its dialects with tags that are text, Llama 2's and Code Llama's.
SPECIAL_TAGS = [*LLAMA2_TAGS, STEP]


class ChatFormat:
    """A dialect in a tokenizer's ids. stop_tokens: ids that end an answer, beside the tokenizer's own.

    name: one of FORMATS; default is the format that belongs to the tokenizer.

    Raises ValueError where the name is unknown, or the tokenizer lacks what the dialect needs.
    """

    def __init__(self, tokenizer: Tokenizer, name: str | None = None):
        name = name or tokenizer.chat_format
        if name is None:
            raise ValueError(f"no chat format is recorded for this tokenizer: name one, {', '.join(FORMATS)}")
        self.name, self.tokenizer = name, tokenizer
        self._ids = {Special(token): i for token, i in tokenizer.special_ids.items()}
        if tokenizer.step_id is not None:  # an ordinary piece in some vocabularies
            self._ids[CODELLAMA_STEP] = tokenizer.step_id
        self._ids |= {special: i for special, i in ((BOS, tokenizer.bos_id), (EOS, tokenizer.eos_id)) if i >= 0}
        self.dialect = find_dialect(name, self._ids)
        self.stop_tokens = {self._ids[special] for special in self.dialect.stops if special in self._ids}

    def encode(self, dialog: Dialog) -> list[int]:
        """Ids up to where the assistant's answer begins. Raises TypeError for what is no dialog and DialogError, a
        ValueError, for roles out of order; Llama 3 takes them in any order."""
        tokenizer = self.tokenizer
        with_bos = tokenizer.dialog_bos and BOS in self._ids
        return self._encode(self.dialect.parts(dialog, tokenizer.default_system, tokenizer.system_prefix, with_bos))

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """`encode`, by the name that it has in Meta's code."""
        return self.encode(dialog)

    def encode_message(self, message: Message) -> list[int]:
        """Ids of one message, where they do not depend on those around it: Llama 3's. Raises ValueError for others."""
        split_system([message], any_order=True)
        return self._encode(self._message(message, self.dialect.content(message["content"])))

    def encode_header(self, message: Message) -> list[int]:
        """Ids of a message up to where its content begins. Raises as `encode_message` does."""
        return self._encode(self._message(message, "")[:-1])

    def answer(self, content: str) -> Message:
        """The message that an answer is."""
        if self.dialect.destinations:
            return {"role": "assistant", "destination": "user", "content": content}
        return {"role": "assistant", "content": content}

    def _message(self, message: Message, content: str) -> list[Part]:
        if self.dialect.message is None:
            raise ValueError(f"chat format {self.name!r} does not write messages one by one: encode the whole dialog")
        return self.dialect.message(message["role"], content)

    def _encode(self, parts: Sequence[Part]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, Special):
                ids.append(self._ids[part])
                continue
            # Texts do not touch, so what stands before this one is a special.
            text = part.lstrip() if ids and ids[-1] in self.tokenizer.rstrip_ids else part
            if text:
                ids += self.tokenizer.encode(text, bos=False, eos=False)
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
        return ChatFormat(tokenizer, name)
    try:
        return None if tokenizer.chat_format is None else ChatFormat(tokenizer)
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


def split_system(dialog: Dialog, any_order: bool = False) -> tuple[str | None, list[Message]]:
    """Check a dialog and take its system message off: (system or None, user and assistant messages in turn).

    A dialog is a list of {"role": ..., "content": ...}: at most one system message, first; then user and assistant
    in turn, with the user last. Raises TypeError or DialogError otherwise, which is a ValueError.

    any_order: roles may be any texts, in any order.
    """
    if not isinstance(dialog, Sequence) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in dialog
    ):
        raise TypeError('a dialog is a list of {"role": ..., "content": ...} messages with texts in both')
    messages = list(dialog)
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
    roles = [message["role"] for message in messages]
    if any_order:
        return system, messages
    if not roles or len(roles) % 2 == 0 or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise DialogError(
            "roles of a dialog: an optional system message, then user and assistant in turn, user last; "
            f"got {', '.join(message['role'] for message in dialog) or 'nothing'}"
        )
    return system, messages
