"""Encode dialogs into ids. Special tokens are written as ids, never as text, so that a message cannot forge them.

A `Dialect` turns a dialog into parts, which are texts and special tokens. `ChatFormat` encodes the parts into ids.
`render` joins them into the text that a model's published template would write.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama.files import as_path
from llama.tokenizer import Dialog, Message, Tokenizer, TokenizerError
from llama.tokenizer import Role as Role
from llama.vocabulary.backend import STEP, check_size


class DialogError(ValueError, AssertionError):
    """Roles of a dialog are out of order. Also an AssertionError, because Meta's code raises one."""


@dataclass(frozen=True)
class Special:
    """A special token. Its name is not encoded as text, but looked up as an id."""

    name: str


BOS, EOS = Special("BOS"), Special("EOS")  # placeholder names, because vocabularies name these tokens differently

Part = str | Special
Turns = list[tuple[str, str]]  # role and content


@dataclass(frozen=True)
class Dialect:
    """How one family of chat models writes a dialog.

    write: (system message or None, turns of user and assistant) -> parts, up to where the answer begins. Two texts are
        never adjacent, because SentencePiece adds a space before each text that it encodes.
    needs: specials that the vocabulary must have.
    stops: specials that end an answer in addition to EOS. A vocabulary may lack them.
    tags: marks of turns that the dialect writes as plain text. A message that contains one could forge a turn, so it is
        refused.
    strips: whether white space around contents is removed.
    message: (role, content) -> parts of a single message, for dialects that accept roles in any order.
    destinations: whether messages may have a "destination", written on the line after the role. Answers are for "user".
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
        """The parts of a dialog, up to where the assistant's answer begins. Raises as `split` does.

        default_system: the system message of a dialog without one.
        system_prefix: a text before a dialog's own system message.
        dialog_bos: whether to begin with BOS even if the dialect writes none.
        """
        system, messages = self.split(dialog)
        turns: Turns = [(self._role(message), self.content(message["content"])) for message in messages]
        parts = self.write(default_system if system is None else system_prefix + self.content(system), turns)
        return [BOS, *parts] if dialog_bos and parts[0] != BOS else parts

    def split(self, dialog: Dialog) -> tuple[str | None, list[Message]]:
        """`split_system`, with roles in any order if the dialect accepts them."""
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
    """Code Llama 70B-Instruct. A dialog without a system message gets an empty one: the role without content."""
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
    # No BOS, as in the models' templates, although their tokenizers add one to other texts.
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
    """Vocabularies v2 and later. Tags are specials. The system message is written into the last user message."""
    parts: list[Part] = [BOS]
    for i, (role, content) in enumerate(turns, 1):
        if role == "assistant":
            parts += [content.rstrip(" "), EOS]
        else:
            parts += [INST, f"{system}\n\n{content}" if system and i == len(turns) else content, END_INST]
    return parts


def _mistral_v1(system: str | None, turns: Turns) -> list[Part]:
    """Vocabulary v1. Tags are plain text. The system message is written into the first user message."""
    texts = [content for _, content in turns]
    if system:
        texts[0] = f"{system}\n\n{texts[0]}"
    parts: list[Part] = [BOS]
    for user, answer in zip(texts[0:-1:2], texts[1::2], strict=True):
        parts += [f"[INST] {user} [/INST] {answer}", EOS]
    return [*parts, f"[INST] {texts[-1]} [/INST]"]


def _with_system(system: str | None, turns: Turns) -> Turns:
    return turns if system is None else [("system", system), *turns]


# Name -> dialects. The first dialect whose specials are all in the vocabulary is used.
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
    """The named dialect for a vocabulary with these specials. Raises ValueError if there is none."""
    if name not in FORMATS:
        raise ValueError(f"chat format {name!r}: expected {', '.join(FORMATS)}")
    for dialect in FORMATS[name]:
        missing = [special.name for special in dialect.needs if special not in specials]
        if not missing:
            return dialect
    raise ValueError(f"chat format {name!r} needs {', '.join(sorted(missing))}, which this tokenizer lacks")


def render(parts: Sequence[Part], names: Mapping[Special, str]) -> str:
    """Join parts into one text, with specials by name. names: what the vocabulary calls BOS and EOS."""
    return "".join(part if isinstance(part, str) else names.get(part, part.name) for part in parts)


def _refusal(tags: Sequence[str]) -> str:
    return (
        "This dialog was not given to the model: a message contains one of the tags that mark turns "
        f"({', '.join(tags)})."
    )


REFUSAL = UNSAFE_ERROR = _refusal(LLAMA2_TAGS)
# Meta's name for the tags of Llama 2 and Code Llama.
SPECIAL_TAGS = [*LLAMA2_TAGS, STEP]


class ChatFormat:
    """Encodes dialogs with a tokenizer.

    name: a key of FORMATS. The default is the tokenizer's own format.

    stop_tokens: ids that end an answer, in addition to the tokenizer's own.

    Raises ValueError if the name is unknown, or if the tokenizer lacks special tokens that the format needs.
    """

    def __init__(self, tokenizer: Tokenizer, name: str | None = None):
        name = name or tokenizer.chat_format
        if name is None:
            raise ValueError(f"no chat format is recorded for this tokenizer: choose one of {', '.join(FORMATS)}")
        self.name, self.tokenizer = name, tokenizer
        self._ids = {Special(token): i for token, i in tokenizer.special_ids.items()}
        if tokenizer.step_id is not None:  # an ordinary piece in some vocabularies, so not in special_ids
            self._ids[CODELLAMA_STEP] = tokenizer.step_id
        self._ids |= {special: i for special, i in ((BOS, tokenizer.bos_id), (EOS, tokenizer.eos_id)) if i >= 0}
        self.dialect = find_dialect(name, self._ids)
        self.stop_tokens = {self._ids[special] for special in self.dialect.stops if special in self._ids}

    def encode(self, dialog: Dialog) -> list[int]:
        """The ids of a dialog, up to where the assistant's answer begins.

        Raises TypeError for a value that is not a dialog, and DialogError, a ValueError, for roles out of order.
        Llama 3's format accepts any order.
        """
        tokenizer = self.tokenizer
        add_bos = tokenizer.dialog_bos and BOS in self._ids
        return self._encode(self.dialect.parts(dialog, tokenizer.default_system, tokenizer.system_prefix, add_bos))

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """Meta's name for `encode`."""
        return self.encode(dialog)

    def encode_message(self, message: Message) -> list[int]:
        """The ids of one message, for Llama 3's format, in which they do not depend on other messages.

        Raises ValueError for other formats.
        """
        split_system([message], any_order=True)
        return self._encode(self._message(message, self.dialect.content(message["content"])))

    def encode_header(self, message: Message) -> list[int]:
        """The ids of a message up to where its content begins. Raises as `encode_message` does."""
        return self._encode(self._message(message, "")[:-1])

    def answer(self, content: str) -> Message:
        """An assistant message with this content."""
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
            # Texts are never adjacent, so the previous id is a special's.
            text = part.lstrip() if ids and ids[-1] in self.tokenizer.rstrip_ids else part
            if text:
                ids += self.tokenizer.encode(text, bos=False, eos=False)
        return ids

    def refusal(self, dialog: Dialog) -> str | None:
        """The fixed answer to a dialog that contains tags, which is not given to the model, or None."""
        tags, normalize = self.dialect.tags, self.tokenizer.normalize
        contents = [message["content"] for message in dialog] if tags else []
        # Search the normalized texts too: some tokenizers turn full-width brackets into ASCII brackets.
        forged = any(tag in text for content in contents for text in (content, normalize(content)) for tag in tags)
        return _refusal(tags) if forged else None


def find_chat_format(tokenizer: Tokenizer, name: str | None = None) -> ChatFormat | None:
    """The named format, or by default the tokenizer's own, or None if that is unknown.

    Raises ValueError if the tokenizer lacks special tokens of the named format, and TokenizerError if it lacks those of
    its own format.
    """
    if name:
        return ChatFormat(tokenizer, name)
    try:
        return None if tokenizer.chat_format is None else ChatFormat(tokenizer)
    except ValueError as error:
        raise TokenizerError(
            f"{tokenizer.config_path}: {error}: correct its chat_format, or set it to null for none"
        ) from None


# Names of Meta's base models. -hf is the suffix of Meta's conversions to Hugging Face's layout.
BASE_NAMES = re.compile(r"((meta-)?llama-?[23](\.\d)?-\d+b|codellama-\d+b(-python)?)(-hf)?", re.IGNORECASE)


def base_model_note(ckpt_dir: str | Path) -> str | None:
    """A note for users who chat with a base model, or None if nothing shows that it is one.

    Base models are recognized by Meta's names, or by a tokenizer_config.json with neither chat format nor template.
    """
    folder = Path(os.path.abspath(as_path(ckpt_dir)))  # links are not resolved: users know the link's name
    name = folder.parent.name if folder.name == "original" else folder.name  # the hub has Meta's files in this folder
    try:
        check_size(path := folder / "tokenizer_config.json")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    has_none = isinstance(config, dict) and config.get("chat_format", "") is None and not config.get("chat_template")
    if not has_none and not BASE_NAMES.fullmatch(name):
        return None
    return (
        f"note: {name} looks like a base model: it continues texts and was not trained to answer. "
        "Models that answer are named -chat or -Instruct; `python -m llama complete` continues texts"
    )


def split_system(dialog: Dialog, any_order: bool = False) -> tuple[str | None, list[Message]]:
    """Check a dialog and split it into (system message or None, messages of user and assistant).

    A dialog is a list of {"role": ..., "content": ...}. It may begin with a system message. Then user and assistant
    alternate, with the user first and last. Raises TypeError for other values, and DialogError, a ValueError, for roles
    out of order.

    any_order: whether roles may be any strings, in any order.
    """
    if not isinstance(dialog, Sequence) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in dialog
    ):
        raise TypeError('a dialog is a list of {"role": ..., "content": ...} messages with strings in both')
    messages = list(dialog)
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
    roles = [message["role"] for message in messages]
    if any_order:
        return system, messages
    if not roles or len(roles) % 2 == 0 or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise DialogError(
            "roles of a dialog: an optional system message, then user and assistant alternating, user last; "
            f"got {', '.join(message['role'] for message in dialog) or 'nothing'}"
        )
    return system, messages
