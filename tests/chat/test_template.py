"""Chat templates: the dialect is recognized, and malicious templates do no harm."""

import copy
import json
import os  # noqa: F401  (a malicious template looks for it)
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llama.chat.formats import BOS, EOS, Special, find_dialect, render
from llama.convert import template as template_module
from llama.convert.template import DIALOGS, _rendered, chat_keys

NAMES = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML = ("<|im_start|>", "<|im_end|>")
PHI3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
INST = ("[INST]", "[/INST]")
EVERY = {"<s>", "</s>", *LLAMA3, *CHATML, *PHI3, *INST}
# All but [INST] and [/INST], which are plain text in Mistral's first vocabulary.
MOST = EVERY - {*INST}

# Templates written for these tests, with the output of the published ones --------------------------

IN_TURN = "(m.role == 'user') == (loop.index0 % 2 == 0)"
ALTERNATE = f"{{% if not ({IN_TURN}) %}}{{{{ raise_exception('user and assistant in turn') }}}}{{% endif %}}"


def chatml(default: str | None = None, end: str = "\n", bos: str = "", separator: str = "\n") -> str:
    """The template of SmolLM2, Qwen 2.5 and others, with other default system messages."""
    opening = f"<|im_start|>system{separator}{default}<|im_end|>{end}" if default is not None else ""
    return (
        bos
        + f"{{% if messages[0].role != 'system' %}}{{{{ {opening!r} }}}}{{% endif %}}"
        + f"{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + {separator!r} + m.content"
        + f" + '<|im_end|>' + {end!r} }}}}{{% endfor %}}"
        + f"{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant' + {separator!r} }}}}{{% endif %}}"
    )


QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- else %}"
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou were made in a test.<|im_end|>\\n' }}{%- endif %}{%- endif %}\n"
    "{%- for m in messages %}\n    {%- if m.role == 'user' or (m.role == 'system' and not loop.first)"
    " or (m.role == 'assistant' and not m.tool_calls) %}\n"
    "        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)


def llama2(default: str = "false", system: bool = True) -> str:
    taken = f"{{% set system = messages[0].content if messages[0].role == 'system' else {default} %}}"
    rest = "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
    return (
        (taken + rest if system else "{% set turns = messages %}{% set system = false %}")
        + "{% for m in turns %}"
        + ALTERNATE
        + "{% set head = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system else '' %}"
        + "{% set text = head + m.content %}"
        + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
        + "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    )


def llama3(preamble: str = "''", always: bool = False) -> str:
    """The template of Llama 3, or, with a preamble, of 3.1 and 3.2, which always have a system message."""
    head = "'<|start_header_id|>' + %s + '<|end_header_id|>\\n\\n'"
    return (
        "{{- bos_token }}{% set system = messages[0].content | trim if messages[0].role == 'system' else '' %}"
        "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
        f"{{% if {'true' if always else 'system'} %}}"
        f"{{{{- {head % repr('system')} + {preamble} + system + '<|eot_id|>' }}}}{{% endif %}}"
        f"{{% for m in turns %}}{{{{- {head % 'm.role'} + m.content | trim + '<|eot_id|>' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{- {head % repr('assistant')} }}}}{{% endif %}}"
    )


LLAMA31 = llama3(
    "'Cutting Knowledge Date: December 2023\\nToday Date: ' + (date_string or '26 Jul 2024') + '\\n\\n'", always=True
)
LLAMA32 = llama3(
    "'Cutting Knowledge Date: December 2023\\nToday Date: '"
    " + (strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024') + '\\n\\n'",
    always=True,
)
PREAMBLE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

ZEPHYR = """\
{% for m in messages %}
{% if m.role in ['system', 'user', 'assistant'] %}
{{ '<|' + m.role + '|>\\n' + m.content + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""
PHI3_MINI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# A question is followed by the header of its answer, and system messages are ignored.
PHI3_MEDIUM = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\\n' + m.content + '<|end|>\\n<|assistant|>\\n' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '<|end|>\\n' }}{% endif %}{% endfor %}"
)


def mistral(user: str, answer: str, system: str | None = None) -> str:
    """user, answer: how each is written. system: the user message it goes into, "first" or "last". None: refused."""
    place = f"loop.{system} and messages[0].role == 'system'" if system else "false"
    turns = "(messages[1:] if messages[0].role == 'system' else messages)" if system else "messages"
    return (
        f"{{{{ bos_token }}}}{{% for m in {turns} %}}"
        + ALTERNATE
        + f"{{% set text = messages[0].content + '\\n\\n' + m.content if {place} else m.content %}}"
        + f"{{% if m.role == 'user' %}}{user}{{% else %}}{answer}{{% endif %}}{{% endfor %}}"
    )


MISTRAL_V01 = mistral("{{ '[INST] ' + text + ' [/INST]' }}", "{{ text + eos_token + ' ' }}")
MISTRAL_V02 = mistral("{{ ' [INST] ' + text + ' [/INST]' }}", "{{ ' ' + text + eos_token }}", "first")
MISTRAL_V03 = mistral("{{ '[INST] ' + text + '[/INST]' }}", "{{ ' ' + text + eos_token }}", "last")

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\\n\\n' }}"
    "{% elif m.role == 'user' %}{{ '### Instruction:\\n' + m.content + '\\n\\n' }}"
    "{% else %}{{ '### Response:\\n' + m.content + '\\n\\n' }}{% endif %}{% endfor %}{{ '### Response:\\n' }}"
)

KNOWN: dict[str, tuple[str, set[str], dict[str, Any]]] = {
    "llama-2-chat": (llama2(), MOST, {"chat_format": "llama2"}),
    "llama-2-chat default": (llama2("'Be safe.'"), MOST, {"chat_format": "llama2", "default_system": "Be safe."}),
    "llama-2 without system": (llama2(system=False), MOST, {"chat_format": "llama2"}),
    "llama-3": (llama3(), EVERY, {"chat_format": "llama3"}),
    "llama-3.1": (LLAMA31, EVERY, {"chat_format": "llama3", "default_system": PREAMBLE, "system_prefix": PREAMBLE}),
    "llama-3.2": (LLAMA32, EVERY, {"chat_format": "llama3", "default_system": PREAMBLE, "system_prefix": PREAMBLE}),
    "chatml": (chatml(), EVERY, {"chat_format": "chatml"}),
    "chatml after BOS": (chatml(bos="{{ bos_token }}"), EVERY, {"chat_format": "chatml", "dialog_bos": True}),
    "chatml after BOS, default": (
        chatml("Be safe.", bos="{{ bos_token }}"),
        EVERY,
        {"chat_format": "chatml", "dialog_bos": True, "default_system": "Be safe."},
    ),
    "chatml empty default": (chatml(""), EVERY, {"chat_format": "chatml", "default_system": ""}),
    "qwen-2.5": (QWEN, EVERY, {"chat_format": "chatml", "default_system": "You were made in a test."}),
    "zephyr": (ZEPHYR, EVERY, {"chat_format": "zephyr"}),
    "phi-3-mini": (PHI3_MINI, EVERY, {"chat_format": "phi3"}),
    "phi-3-mini at first": ("{{ bos_token }}" + PHI3_MINI, EVERY, {"chat_format": "phi3", "dialog_bos": True}),
    "phi-3-medium": (PHI3_MEDIUM, EVERY, {"chat_format": "phi3"}),
    "mistral-v0.1": (MISTRAL_V01, MOST, {"chat_format": "mistral"}),
    "mistral-v0.2": (MISTRAL_V02, MOST, {"chat_format": "mistral"}),
    "mistral-v0.3": (MISTRAL_V03, EVERY, {"chat_format": "mistral"}),
    "mistral-v0.3 at first": (MISTRAL_V01, EVERY, {"chat_format": "mistral"}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known(name: str) -> None:
    template, specials, expected = KNOWN[name]
    assert chat_keys(template, NAMES, specials) == expected


def test_the_template_of_the_demo_model(demo: Path) -> None:
    config = json.loads((demo / "tokenizer_config.json").read_text())
    recorded = {key: config.pop(key) for key in ("chat_format", "default_system")}
    assert chat_keys(config["chat_template"], config, CHATML) == recorded


UNKNOWN = {
    "phi-4": chatml(end="", separator="<|im_sep|>"),
    "chatml without line breaks": chatml(end=""),
    "chatml with two system messages": chatml("a<|im_end|>\n<|im_start|>system\nb"),
    "chatml with more before the answer": chatml() + "<think>\n",
    "chatml that counts": chatml() + "{{ messages | length if messages | length > 2 else '' }}",
    "chatml, system elsewhere": "{{ messages[0].content if messages[0].role == 'system' else '' }}"
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
    + chatml().replace("in messages", "in turns"),
    "llama-3 with a footer": llama3() + "{% if messages[0].role == 'system' %}.{% endif %}",
    "mistral, system first in a v3 vocabulary": MISTRAL_V02,
    "mistral v7": "{{ bos_token }}{% if messages[0].role == 'system' %}[SYSTEM_PROMPT] {{ messages[0].content }}"
    "[/SYSTEM_PROMPT]{% endif %}" + MISTRAL_V03.removeprefix("{{ bos_token }}").replace("loop.last and", "false and"),
    "mistral with a default": mistral(
        "{{ '[INST] ' + ('Be brief.\n\n' if loop.last else '') + text + '[/INST]' }}", "{{ text + eos_token }}"
    ),
    "gemma": GEMMA,
    "alpaca": ALPACA,
    "nothing": "",
}
BROKEN = {
    "no template": "{% for m in messages %}" + chatml(),
    "an unknown filter": chatml() + "{{ 1 | nothing }}",
    "asks for the date": chatml() + "{{ strftime_now('%Y') }}",
    "refuses everything": "{{ raise_exception('') }}" + chatml(),
    "only one turn": chatml() + "{{ raise_exception('') if messages | length > 2 }}",
    "only several turns": chatml() + "{{ raise_exception('') if messages | length < 3 }}",
    "fails at a system message": chatml() + "{{ 1 // 0 if messages[0].role == 'system' }}",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name: str) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert len(_rendered(UNKNOWN[name], tokens)) == len(DIALOGS)  # it renders
    assert chat_keys(UNKNOWN[name], NAMES, EVERY) == {"chat_format": None}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str) -> None:
    assert chat_keys(BROKEN[name], NAMES, EVERY) == {"chat_format": None}


@pytest.mark.parametrize("template", [None, 5, {}, [], ["x"], [{"name": "tool_use", "template": chatml()}], [{}]])
def test_values_that_are_not_templates(template: Any) -> None:
    assert chat_keys(template, NAMES, EVERY) == {"chat_format": None}


def test_the_default_of_several_templates_is_used() -> None:
    templates = [{"name": "tool_use", "template": GEMMA}, {"name": "default", "template": chatml()}]
    assert chat_keys(templates, NAMES, EVERY) == {"chat_format": "chatml"}


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("llama-3", "<|eot_id|>"),
        ("chatml", "<|im_end|>"),
        ("phi-3-mini", "<|system|>"),
        # If the tags are not special, the system message goes into the first question.
        ("mistral-v0.3", "[INST]"),
    ],
)
def test_marks_that_are_not_special_tokens_give_no_dialect(name: str, lacking: str) -> None:
    template, specials, _ = KNOWN[name]
    assert chat_keys(template, NAMES, specials - {lacking}) == {"chat_format": None}


@pytest.mark.parametrize("config", [{}, {"bos_token": None, "eos_token": {"id": 2}}])
def test_without_bos_and_eos(config: dict[str, Any]) -> None:
    """Dialects that need BOS and EOS are not recognized without them. ChatML needs neither."""
    for name in ("llama-2-chat", "zephyr", "llama-3"):
        assert chat_keys("{% set bos_token = '' %}" + KNOWN[name][0], config, MOST) == {"chat_format": None}
    assert chat_keys(chatml(), config, CHATML) == {"chat_format": "chatml"}


def test_statements_of_chat_templates() -> None:
    """What transformers adds to Jinja: break, {% generation %}, trimmed blocks."""
    template = (
        "{% for i in range(3) %}{% break %}{{ i }}{% endfor %}{% set ns = namespace(n=0) %}\n"
        "{% for m in messages %}\n    {% set ns.n = ns.n + 1 %}\n    {% if m.role == 'assistant' %}\n"
        "{% generation %}{{- '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}{% endgeneration %}\n"
        "    {% else %}\n{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}\n    {%- endif %}\n"
        "{%- endfor %}{% if add_generation_prompt and documents is none %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    assert chat_keys(template, NAMES, EVERY) == {"chat_format": "chatml"}


@pytest.mark.parametrize(
    "name", [name for name in KNOWN if name != "llama-3.2"]
)  # there transformers inserts the current date
def test_a_found_dialect_writes_what_transformers_writes(name: str) -> None:
    """Compares other dialogs than those that the dialect is recognized by. For Mistral, white space is not compared."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template, specials, keys = KNOWN[name]
    dialect = find_dialect(keys["chat_format"], {BOS, EOS, *map(Special, specials)})
    system: Any = {key: value for key, value in keys.items() if key != "chat_format"}
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"This is {i}."} for i in range(7)]
    for count in (1, 3, 7):
        for head in ([], [{"role": "system", "content": "Rhyme."}]):
            dialog: Any = [*head, *turns[:count]]
            try:
                result: Any = render_jinja_template(
                    conversations=[dialog],
                    chat_template=template,
                    add_generation_prompt=True,
                    bos_token="<s>",
                    eos_token="</s>",
                )
            except TemplateError:
                assert head
                continue
            expected = result[0][0]
            if head and "Rhyme." not in expected:
                continue
            written = render(dialect.parts(dialog, **system), {BOS: "<s>", EOS: "</s>"})
            if keys["chat_format"] == "mistral":
                written, expected = (re.sub(r"\s", "", text) for text in (written, expected))
            assert written == expected


# Malicious templates -------------------------------------------------------------------------------

# Each would be recognized as ChatML if it ran to its end.
HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursion that branches": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
    "a long string": "{% set x = 'x' * 10 ** 9 %}",
    "a string that grows": "{% set n = namespace(s='x') %}{% for i in range(40) %}{% set n.s = n.s * 2 %}{% endfor %}",
    "a long list": "{% set x = [0] * 10 ** 9 %}",
    "a wide format": "{% set x = '%1000000000d' | format(1) %}",
    "a large number": "{% set x = 9 ** (9 ** 9) %}",
    "a giant range": "{% for i in range(10 ** 12) %}{% endfor %}",
    "deep brackets": "{% set x = " + "(" * 50000 + "1" + ")" * 50000 + " %}",
    "deep nots": "{% set x = " + "not " * 50000 + "1 %}",
    "a long indent": "{% set x = messages | tojson(indent=10 ** 9) %}",
    "a wide center": "{% set x = 'x' | center(10 ** 9) %}",
    "a replacement that grows": "{% set x = ('a' * 10 ** 5).replace('', 'a' * 10 ** 5) %}",
    "a loop in itself": "{% for a in [[[]]] recursive %}{{ loop([a]) }}{% endfor %}",
    "a long refusal": "{{ raise_exception('x' * 10 ** 7) }}",
    "a long error": "{{ ('x' * 10 ** 7)() }}",
    "an output of a gigabyte": "{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
    "no character": chatml("HALF").partition("{% for")[0].replace("HALF", "\\ud800"),
    "a file included": "{% include '/etc/passwd' %}",
    "a file imported": "{% from '/etc/passwd' import x %}",
    "a file extended": "{% extends '/etc/passwd' %}",
    "a long system message": chatml("LONG").partition("{% for")[0].replace("LONG", "' ~ 'x' * 200000 ~ '"),
}


def test_hostile_templates_are_stopped() -> None:
    with ThreadPoolExecutor(4) as pool:  # some run until their time limit
        found = pool.map(lambda attack: chat_keys(attack + chatml(), NAMES, EVERY), HOSTILE.values())
        assert dict(zip(HOSTILE, found, strict=True)) == {name: {"chat_format": None} for name in HOSTILE}


ESCAPES = [
    "('{0.__class__.__mro__}' | attr('format'))('')",
    "(['{0.__class__.__mro__}'] | map('attr', 'format') | first)('')",
    "('{0.__class__.__mro__}' | string).format('')",
    "'{0.__globals__[os].sep}'.format(raise_exception)",
    "raise_exception.__code__.co_consts",
    "namespace.__dict__ ~ namespace(x=1).__class__.__mro__",
    "(''.join)['__self__'].__class__.__mro__",
    "messages[0].update({'role': 'x'}) ~ 'x'",
    "(messages | list | attr('__iadd__'))([1])",
    "''.__class__.__mro__",
    "''['__class__']['__mro__'][1]['__subclasses__']()",
    "(''|attr('__class__')).__mro__",
    "'{0.__class__.__mro__}'.format('')",
    "'{x.__class__.__base__}'.format_map({'x': 1})",
    "raise_exception.__globals__['os'].system('touch PATH')",
    "namespace.__init__.__globals__['os'].system('touch PATH')",
    "range.__base__.__subclasses__()",
    "self.__init__.__globals__",
    "self._TemplateReference__context.environment.overlay()",
    "messages.append.__self__",
    "messages.append({'role': 'user', 'content': 'x'})",
    "cycler.__init__.__globals__.os.popen('touch PATH').read()",
    "lipsum.__globals__['os'].popen('touch PATH').read()",
    "dict.__base__.__subclasses__()",
    "[].__reduce_ex__(2)",
    "(messages | map(attribute='__class__') | first).__mro__",
]


def touch(*_: object) -> None:
    """Replaces raise_exception in plain Jinja: a function whose module has imported os."""


@pytest.mark.parametrize("expression", ESCAPES)
def test_the_sandbox_holds(expression: str, tmp_path: Path) -> None:
    """Each expression succeeds in plain Jinja and fails here."""
    from jinja2 import Environment

    path = tmp_path / "touched"
    attempt = "{{ " + expression.replace("PATH", str(path)) + " }}"
    free = Environment()
    free.globals["raise_exception"] = touch
    assert free.from_string(attempt).render(messages=copy.deepcopy(DIALOGS[0])) or path.exists()
    assert path.exists() == ("PATH" in expression)
    path.unlink(missing_ok=True)
    assert not _rendered(attempt, {})
    assert not path.exists()


def child(template: str, path: list[str]) -> subprocess.CompletedProcess[str]:
    request = {"path": path, "template": template, "dialogs": DIALOGS, "tokens": {}}
    command = [sys.executable, "-I", "-S", template_module.__file__]
    return subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=30)


def run_with_limits(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code with the resource limits that the child process sets."""
    load = f"import resource, runpy; m = runpy.run_path({template_module.__file__!r}); m['_limit']()\n"
    return subprocess.run([sys.executable, "-I", "-S", "-c", load + code], capture_output=True, text=True, timeout=30)


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
def test_the_child_process_sets_limits() -> None:
    assert "MemoryError" in child(HOSTILE["a long string"], sys.path).stderr  # the limits are set
    assert "MemoryError" in run_with_limits("b'x' * 2**30").stderr
    assert "Too many open files" in run_with_limits("open('/etc/hostname')").stderr
    assert "Too many open files" in run_with_limits("import os; os.pipe()").stderr
    done = run_with_limits("print(resource.getrlimit(resource.RLIMIT_CPU), resource.getrlimit(resource.RLIMIT_CORE))")
    assert done.stdout == f"{(template_module.CPU_SECONDS,) * 2} (0, 0)\n"


def test_the_child_process_loads_only_jinja(tmp_path: Path) -> None:
    import jinja2
    import markupsafe

    for package in (jinja2, markupsafe):
        folder = Path(package.__file__ or "").parent
        (tmp_path / folder.name).symlink_to(folder)
    library = [part for part in sys.path if part.startswith(sys.base_prefix) and "site-packages" not in part]
    done = child(chatml(), [*library, str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == len(DIALOGS)


def test_a_slow_child_process_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "SECONDS", 0.001)
    assert chat_keys(chatml(), NAMES, EVERY) == {"chat_format": None}
