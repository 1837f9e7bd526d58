"""Detect the chat format of a Jinja chat template from what it renders.

A template is untrusted code. It runs in a child process, in Jinja's sandbox, with limits on time and memory, and cannot
open files. The child returns texts only.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NoReturn

# The child runs this file by its path and must not import the package, which would load torch. So these imports are for
# type checkers only, and functions of the parent process import what they need.
if TYPE_CHECKING:
    from llama.chat.formats import Dialect, Dialog, Special

CPU_SECONDS = 2
SECONDS = 30  # wall-clock time, long enough for busy machines; on Windows the only limit of time
MEMORY = 2**29  # bytes of address space
MAX_CHARACTERS = 100_000  # in one rendered dialog; known templates write a few thousand at most

# Chat format -> template, for Meta's own folders, which have none.
TEMPLATES = {
    "llama2": (
        "{% if messages[0].role == 'system' %}"
        "{% set system, turns = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n', messages[1:] %}"
        "{% else %}{% set system, turns = '', messages %}{% endif %}"
        "{% for turn in turns %}{% if turn.role == 'user' %}"
        "{{ bos_token + '[INST] ' + ((system if loop.first else '') + turn.content) | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + turn.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for turn in messages %}"
        "{{ '<|start_header_id|>' + turn.role + '<|end_header_id|>\n\n' + turn.content | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
}

QUESTION: "Dialog" = [{"role": "user", "content": "Name a fruit."}]
TURNS: "Dialog" = [
    *QUESTION,
    {"role": "assistant", "content": "An apple."},
    {"role": "user", "content": "And another?"},
]
SYSTEM: "Dialog" = [{"role": "system", "content": "Be kind."}]
# Contents without leading or trailing white space, because releases of one model differ in whether they strip it.
DIALOGS: "tuple[Dialog, ...]" = (QUESTION, TURNS, [*SYSTEM, *QUESTION], [*SYSTEM, *TURNS])
PLACEHOLDER = "\0"


def chat_keys(template: Any, config: dict[str, Any], specials: Collection[str]) -> dict[str, Any]:
    """The keys that describe a chat template in this package's tokenizer_config.json.

    template: a text, or a list of {"name": ..., "template": ...}, whose "default" is used. config: has "bos_token" and
    "eos_token". specials: names of the vocabulary's special tokens.

    Keys of the result:
    chat_format: a name of `FORMATS`, or None for an unknown format or a template that fails or exceeds a limit.
    default_system: the system message that the template adds to a dialog without one, if any.
    system_prefix: the text that the template puts before every system message, if any.
    dialog_bos: True if the template begins with BOS and the format does not.
    """
    from llama.chat.formats import BOS, EOS, FORMATS, Special, find_dialect

    if isinstance(template, list):
        template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), "")
    names = {key: name for key in ("bos_token", "eos_token") if (name := _content(config.get(key)))}
    texts = _rendered(template, names) if isinstance(template, str) else []
    if not texts:
        return {"chat_format": None}
    special_names = {special: names[key] for special, key in ((BOS, "bos_token"), (EOS, "eos_token")) if key in names}
    for name in FORMATS:
        try:
            dialect = find_dialect(name, {*special_names, *map(Special, specials)})
        except ValueError:  # the format needs special tokens that the vocabulary lacks
            continue
        keys = _match(
            texts, dialect, special_names, {*specials, *special_names.values()}, spaces_matter=name != "mistral"
        )
        if keys is not None:
            return {"chat_format": name, **keys}
    return {"chat_format": None}


def _content(token: Any) -> str:
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else ""


def _match(
    texts: "list[str | None]",
    dialect: "Dialect",
    special_names: "dict[Special, str]",
    marks: set[str],
    spaces_matter: bool,
) -> dict[str, Any] | None:
    """The keys (see chat_keys) with which a format renders DIALOGS as these texts, or None if there are none.

    spaces_matter: False for Mistral's format, whose releases differ in the spaces around tags. Its ids follow
    mistral-common and not the template.
    """
    from llama.chat.formats import BOS, render

    def rendered(dialog: "Dialog", **keys: Any) -> str:
        text = render(dialect.parts(dialog, **keys), special_names)
        return text if spaces_matter else "".join(text.split())

    if not spaces_matter:
        texts = [None if text is None else "".join(text.split()) for text in texts]
    keys: dict[str, Any] = {}
    starts = [text.startswith(special_names.get(BOS, PLACEHOLDER)) for text in (texts[0] or "", rendered(QUESTION))]
    if starts == [True, False]:  # not for SmolLM2, whose BOS is also its format's first tag
        keys["dialog_bos"] = True
    # The template may add a default system message, or a prefix to a system message. Render a placeholder where the
    # format puts it, and take the text that the template has there. If the template has it elsewhere, the comparison
    # below fails.
    for key, text, dialog in (("default_system", texts[0], QUESTION), ("system_prefix", texts[2], DIALOGS[2])):
        if text is None or text == rendered(dialog, **keys):
            continue
        if not spaces_matter:  # the spaces of the addition are lost
            return None
        before, _, after = rendered(dialog, **{**keys, key: PLACEHOLDER}).partition(PLACEHOLDER)
        keys[key] = text.removeprefix(before).removesuffix(after)
        if any(mark in keys[key] for mark in (*marks, *dialect.tags)):  # it contains tags
            return None
    is_same = [text is None or text == rendered(dialog, **keys) for text, dialog in zip(texts, DIALOGS, strict=True)]
    return keys if all(is_same) else None


def _rendered(template: str, tokens: dict[str, str]) -> "list[str | None]":
    """Render DIALOGS with the template. Returns an empty list if it fails or exceeds a limit.

    A text is None if the template refuses or omits the system message, because its model was trained without one. The
    other dialogs suffice to detect the format. System messages are then written as for other models of that format.
    """
    request = {"path": sys.path, "template": template, "dialogs": DIALOGS, "tokens": tokens}
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", __file__],
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return []
    if child.returncode != 0:
        return []
    texts: list[str | None] = json.loads(child.stdout)
    if None in texts[:2]:
        return []
    return texts[:2] + [text if text and SYSTEM[0]["content"] in text else None for text in texts[2:]]


# In the child process -----------------------------------------------------------------------------


class _Refused(Exception):
    """The template called raise_exception."""


def _child() -> None:
    """Read a request from stdin and print a list of texts. Any failure ends the process with a nonzero status."""
    request = json.load(sys.stdin)
    sys.path = request["path"]  # -I and -S hide the installed packages: use the parent's
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which marks answers for training."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 requires it)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    # As in transformers, with fewer functions. Without strftime_now, templates use a fixed date, so default_system does
    # not contain the day of the conversion.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.globals = {name: environment.globals[name] for name in ("namespace", "range")}
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    with contextlib.suppress(_Refused):  # run all lazy imports now: no file can be opened later
        environment.from_string(r"{{ '\n' }}{{ raise_exception('') }}").render()
    _limit()
    compiled = environment.from_string(request["template"])
    texts: list[str | None] = []
    for dialog in request["dialogs"]:
        try:
            text = compiled.render(
                messages=dialog, tools=None, documents=None, add_generation_prompt=True, **request["tokens"]
            )
        except _Refused:
            texts.append(None)
            continue
        if len(text) > MAX_CHARACTERS:
            sys.exit(1)
        text.encode()  # raises for lone surrogates
        texts.append(text)
    print(json.dumps(texts))


def _refuse(message: object = "") -> NoReturn:
    raise _Refused


def _limit() -> None:
    """Limit this process. Windows lacks these limits and macOS some; there the parent's timeout ends the child."""
    with contextlib.suppress(ImportError):
        import resource

        for resource_id, limit in (
            (resource.RLIMIT_CPU, CPU_SECONDS),
            (resource.RLIMIT_AS, MEMORY),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NOFILE, 0),
        ):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource_id, (limit, limit))


if __name__ == "__main__":
    _child()
