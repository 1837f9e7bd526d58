"""Which dialect a Jinja chat template writes, told by what it writes.

A template is somebody else's program. It runs in a child process, in Jinja's sandbox, with little time and memory and
without the right to open a file; only texts come back.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NoReturn

# The child runs this file by its path, and the package would load torch: the functions of the parent import from it.
if TYPE_CHECKING:
    from llama.chat.formats import Dialect, Dialog, Special

CPU_SECONDS = 2
SECONDS = 30  # on a busy machine, and where there are no limits but this
MEMORY = 2**29
LONGEST = 100_000  # characters of one dialog; the longest templates of these dialects write a few thousand

# For Meta's own models, whose folders have no template.
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

ASKED: "Dialog" = [{"role": "user", "content": "Name a fruit."}]
TURNS: "Dialog" = [*ASKED, {"role": "assistant", "content": "An apple."}, {"role": "user", "content": "And another?"}]
SYSTEM: "Dialog" = [{"role": "system", "content": "Be kind."}]
# No white space around the contents: releases of one model differ in whether they strip it.
DIALOGS: "tuple[Dialog, ...]" = (ASKED, TURNS, [*SYSTEM, *ASKED], [*SYSTEM, *TURNS])
HOLE = "\0"


def chat_keys(template: Any, config: dict[str, Any], specials: Collection[str]) -> dict[str, Any]:
    """What a tokenizer_config.json is to say of its chat template: "chat_format", a name of `FORMATS` or None.

    template: a text, or a list of {"name": ..., "template": ...}, of which "default" counts. config: has "bos_token"
    and "eos_token". specials: names of the vocabulary's special tokens.

    "default_system" comes with it where the template gives a system message to a dialog without one, "system_prefix"
    where it puts a text before every system message, "dialog_bos" where BOS goes first though the dialect has none.
    None for templates of other dialects, and for those that fail, take too long or write too much.
    """
    from llama.chat.formats import BOS, EOS, FORMATS, Special, find_dialect

    if isinstance(template, list):
        template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), "")
    names = {key: name for key in ("bos_token", "eos_token") if (name := _content(config.get(key)))}
    texts = _rendered(template, names) if isinstance(template, str) else []
    if not texts:
        return {"chat_format": None}
    roles = {role: names[key] for role, key in ((BOS, "bos_token"), (EOS, "eos_token")) if key in names}
    for name in FORMATS:
        try:
            dialect = find_dialect(name, {*roles, *map(Special, specials)})
        except ValueError:  # it needs specials that the vocabulary lacks
            continue
        keys = _match(texts, dialect, roles, {*specials, *roles.values()}, spaces_count=name != "mistral")
        if keys is not None:
            return {"chat_format": name, **keys}
    return {"chat_format": None}


def _content(token: Any) -> str:
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else ""


def _match(
    texts: "list[str | None]", dialect: "Dialect", roles: "dict[Special, str]", marks: set[str], spaces_count: bool
) -> dict[str, Any] | None:
    """The keys (see chat_keys) with which a dialect writes DIALOGS as these texts, None where it does not.

    spaces_count: False for Mistral's, where releases differ in the spaces around the tags; the ids are
    mistral-common's anyway.
    """
    from llama.chat.formats import BOS, render

    def written(dialog: "Dialog", **keys: Any) -> str:
        text = render(dialect.parts(dialog, **keys), roles)
        return text if spaces_count else "".join(text.split())

    if not spaces_count:
        texts = [None if text is None else "".join(text.split()) for text in texts]
    keys: dict[str, Any] = {}
    starts = [text.startswith(roles.get(BOS, HOLE)) for text in (texts[0] or "", written(ASKED))]
    if starts == [True, False]:  # not where the dialect's own first mark serves as BOS, as SmolLM2's does
        keys["dialog_bos"] = True
    # What a template adds stands where the dialect would put it. If it is something else, the texts will not be equal.
    for key, text, dialog in (("default_system", texts[0], ASKED), ("system_prefix", texts[2], DIALOGS[2])):
        if text is None or text == written(dialog, **keys):
            continue
        if not spaces_count:  # what was added has lost its spaces
            return None
        before, _, after = written(dialog, **{**keys, key: HOLE}).partition(HOLE)
        keys[key] = text.removeprefix(before).removesuffix(after)
        if any(mark in keys[key] for mark in (*marks, *dialect.tags)):  # more than a text
            return None
    same = [text is None or text == written(dialog, **keys) for text, dialog in zip(texts, DIALOGS, strict=True)]
    return keys if all(same) else None


def _rendered(template: str, tokens: dict[str, str]) -> "list[str | None]":
    """The texts of DIALOGS, None where a template takes no system message; no texts at all where it will not do.

    Some templates refuse a system message, as their models were trained without, and some leave it out. How turns are
    written tells such a dialect too; a system message then goes where others of its family have it.
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


# In the child ---------------------------------------------------------------------------------------


class _Refused(Exception):
    """The template called raise_exception."""


def _child() -> None:
    """A request on stdin, a list of texts on stdout. Whatever goes wrong ends the process with another status."""
    request = json.load(sys.stdin)
    sys.path = request["path"]  # the parent's packages; -I and -S have left none of its own
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, with which templates mark answers for training."""

        tags = {"generation"}  # noqa: RUF012  (what jinja2 asks for)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    # As transformers sets it up, with fewer functions. There is no strftime_now: templates that ask for the date have
    # a fixed one for those who cannot tell it, and a default_system should not hold the day of the conversion.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.globals = {name: environment.globals[name] for name in ("namespace", "range")}
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    with contextlib.suppress(_Refused):  # loads what Jinja and Python load at the first literal and the first error
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
        if len(text) > LONGEST:
            sys.exit(1)
        text.encode()  # half of a surrogate pair is no text
        texts.append(text)
    print(json.dumps(texts))


def _refuse(message: object = "") -> NoReturn:
    raise _Refused


def _limit() -> None:
    """Windows has no such limits, macOS not all: there the parent's patience alone ends a child."""
    with contextlib.suppress(ImportError):
        import resource

        for what, limit in (
            (resource.RLIMIT_CPU, CPU_SECONDS),
            (resource.RLIMIT_AS, MEMORY),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NOFILE, 0),
        ):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(what, (limit, limit))


if __name__ == "__main__":
    _child()
