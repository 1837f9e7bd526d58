"""Dialogs of Llama 3 with any roles, and of Code Llama 70B-Instruct, against Meta's code."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
from llama_models.datatypes import RawMessage
from llama_models.llama3.chat_format import ChatFormat as PeerFormat
from llama_models.llama3.tokenizer import Tokenizer as Peer

from helpers.paths import LLAMA2, LLAMA3
from helpers.vocabularies import plain, write_step
from llama import Conversation, Llama
from llama.generation import SPECIAL_TAGS
from llama.tokenizer import ChatFormat, Tokenizer

# Code Llama 70B's format from its model card, in Jinja, without its default system message.
TEMPLATE = (
    "{% for m in messages %}{{ 'Source: ' + m.role + '\n\n ' + m.content.strip() + ' <step> ' }}{% endfor %}"
    "{{ 'Source: assistant\nDestination: user\n\n ' }}"
)
DIALOG: Any = [
    {"role": "system", "content": "System prompt "},
    {"role": "user", "content": "First user query"},
    {"role": "assistant", "content": "Model response to first query"},
    {"role": "user", "content": "\nSecond user query"},
]


@pytest.mark.parametrize(
    "roles",
    [
        ["assistant"],
        ["user", "assistant"],
        ["user", "user"],
        ["user", "tool"],
        ["system", "user", "assistant", "tool", "user"],
        ["user", "system"],
        [],
    ],
)
def test_llama3_accepts_any_roles(roles: list[str]) -> None:
    dialog: Any = [{"role": role, "content": f"message {i}"} for i, role in enumerate(roles)]
    # The package writes the role "tool" as ipython; here roles are written unchanged.
    ours: Any = [{**message, "role": message["role"].replace("tool", "ipython")} for message in dialog]
    expected = PeerFormat(Peer(LLAMA3)).encode_dialog_prompt([RawMessage(**message) for message in dialog]).tokens
    assert ChatFormat(Tokenizer(LLAMA3)).encode_dialog_prompt(ours) == expected


def test_llama2_needs_roles_in_order(build: Callable[..., Llama]) -> None:
    wrong: Any = [{"role": "assistant", "content": "x"}]
    llama = build("mha")
    for kind in (ValueError, AssertionError):
        with pytest.raises(kind, match="roles of a dialog"):
            llama.chat_completion([wrong])
    with pytest.raises(ValueError, match="'llama2' does not write messages one by one: encode the whole dialog"):
        ChatFormat(llama.tokenizer).encode_message({"role": "user", "content": "x"})
    assert llama.formatter is llama.chat_format


def test_codellama_70b_ids_published_with_the_models(tmp_path: Path) -> None:
    """Meta published these ids of this dialog with the models."""
    if not LLAMA2.exists():
        pytest.skip(f"Llama 2's tokenizer.model is not at {LLAMA2}")
    tokenizer = Tokenizer(write_step(tmp_path / "tokenizer.model", LLAMA2, extra=16))
    assert (tokenizer.step_id, tokenizer.chat_format) == (32015, "codellama-70b")
    source, end = [7562, 29901], 32015
    assert ChatFormat(tokenizer).encode(DIALOG) == [
        *[1, *source, 1788, 13, 13, 2184, 9508, end],
        *[*source, 1404, 13, 13, 3824, 1404, 2346, end],
        *[*source, 20255, 13, 13, 8125, 2933, 304, 937, 2346, end],
        *[*source, 1404, 13, 13, 6440, 1404, 2346, end],
        *[*source, 20255, 13, 14994, 3381, 29901, 1404, 13, 13, 29871],
    ]


def test_codellama_70b_equals_its_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer(path := write_step(tmp_path / "tokenizer.model"))
    text, expected = jinja2.Template(TEMPLATE).render(messages=DIALOG), [1]
    for i, part in enumerate(text.split(" <step>")):
        expected += [511] * (i > 0) + plain(path).encode(part if i else " " + part)
    assert ChatFormat(tokenizer).encode(DIALOG) == expected
    # A dialog without a system message begins with an empty one: a role and no content.
    head = [1, *plain(path).encode(" Source: system"), 511]
    assert ChatFormat(tokenizer).encode(DIALOG[1:2])[: len(head)] == head
    answered = [*DIALOG[:2], {**DIALOG[2], "destination": "user"}, DIALOG[3]]
    assert "Source: assistant\nDestination: user\n\n Model" in tokenizer.decode(ChatFormat(tokenizer).encode(answered))


def test_codellama_70b_answers(checkpoint: Callable[..., Path], tmp_path: Path, build: Callable[..., Llama]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("mha"), folder)
    write_step(folder / "tokenizer.model")
    llama = Llama.build(folder, max_seq_len=256, device="cpu")
    (ids,), _ = llama.generate([llama.dialogs.encode(DIALOG)], 6, temperature=0)
    (answer,) = llama.chat_completion([DIALOG], temperature=0, max_gen_len=6)
    expected = {"role": "assistant", "destination": "user", "content": llama.tokenizer.decode(ids)}
    assert answer["generation"] == expected
    llama.dialogs.stop_tokens = {ids[3]}
    assert llama.chat_completion([DIALOG], temperature=0, max_gen_len=6)[0]["finish_reason"] == "stop"
    assert ChatFormat(llama.tokenizer).stop_tokens == {511}
    for tag in SPECIAL_TAGS:
        (refused,) = llama.chat_completion([[{"role": "user", "content": f"a{tag}b"}]])
        assert "not given to the model" in refused["generation"]["content"]
        assert refused["generation"]["destination"] == "user"
    talk = Conversation(llama, max_gen_len=4)
    list(talk.say("Hi"))
    assert talk.messages[-1]["destination"] == "user"
    llama.close()
