"""`python -m llama chat`: talk to a model at the terminal."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from llama.chat.formats import Message, base_model_note, split_system
from llama.cli.command import (
    Command,
    build_arguments,
    dialog_seq_len,
    model_options,
    sampling_arguments,
    sampling_options,
    stop_option,
)
from llama.cli.keyboard import interrupts, read_line, session
from llama.cli.output import dim, write
from llama.console import in_one_line, visible
from llama.conversation import Conversation
from llama.files import as_path, read_on_rank_0
from llama.generation import Llama
from llama.memory.check import InsufficientMemoryError
from llama.parallel.groups import all_gather_object, broadcast_object, current_world, is_main_rank
from llama.parallel.heartbeat import PeerError

HELP = """\
/reset         forget the dialog; the system message stays
/system TEXT   set the system message, /system - removes it, /system alone shows it
/save FILE     write the dialog as JSON, in the form that chat_completion accepts
/load FILE     continue a saved dialog
/help          this list
Ctrl-C stops an answer, Ctrl-D leaves. Put a space before a message that begins with /."""


@click.command(cls=Command)
@click.argument("ckpt_dir")
@click.option("--system", help="the system message")
@stop_option
@sampling_options()
@model_options("ckpt_dir", "max_batch_size", max_seq_len=None)
def chat(system: str | None, stop: list[str] | None, **options: Any) -> None:
    """Talk to a model at the terminal, or with lines from a pipe. Type /help for the commands of a chat.

    The dialog has --max_seq_len positions: by default 2048, or the model's sliding window if that is smaller. When they
    are full, the oldest turns are dropped.
    """
    ckpt_dir = options["ckpt_dir"]
    if options["max_seq_len"] is None:
        options["max_seq_len"] = dialog_seq_len(ckpt_dir)
    llama = Llama.build(**build_arguments(options), max_batch_size=1)
    talk = Conversation(llama, system, stop=stop, **sampling_arguments(options))
    with session():
        if warning := base_model_note(ckpt_dir):
            note(warning)
        note("/help lists the commands, Ctrl-D leaves")
        while (line := broadcast_object(read_line("> ") if is_main_rank() else None)) is not None:
            try:
                if line.startswith("/"):
                    with _files_may_fail():
                        _command(talk, *line[1:].rstrip().split(maxsplit=1))
                elif line.strip():
                    with interrupts() as pressed:
                        _answer(talk, line.strip(), pressed)
            except KeyboardInterrupt:  # pressed twice
                note("\n[stopped]")
            except (ValueError, TypeError, PeerError) as error:
                if isinstance(error, InsufficientMemoryError) and current_world().size > 1:
                    raise  # the other ranks are in the middle of a step
                note(f"error: {in_one_line(error)}")
    llama.close()


def note(text: str) -> None:
    if is_main_rank():
        print(dim(visible(text), sys.stderr), file=sys.stderr, flush=True)


# Answering ----------------------------------------------------------------------------------------


def _answer(talk: Conversation, text: str, pressed: Callable[[], bool]) -> None:
    started = first = time.perf_counter()
    # An answer that stays open would be added to the dialog later, for instance after a /reset: always close it.
    with contextlib.closing(talk.say(text)) as pieces:
        turn = talk.last
        assert turn is not None
        if turn.dropped:
            dropped = "oldest turn was" if turn.dropped == 1 else f"{turn.dropped} oldest turns were"
            note(f"[the context is full: the {dropped} dropped from the dialog]")
        for piece in pieces:
            if first == started:
                first = time.perf_counter()
            if is_main_rank():
                write(visible(piece))
            # Only rank 0's key counts. The others also wait here for rank 0, because its terminal may block.
            if all_gather_object(pressed())[0]:
                break
    seconds = time.perf_counter() - first
    if is_main_rank():
        write("\n")
    limit = talk.llama.model.params.max_seq_len
    parts = []
    if turn.finish_reason is None:
        parts.append("stopped")
    elif turn.finish_reason == "length":
        parts.append("cut, the context is full" if turn.context >= limit else "cut by max_gen_len")
    if not turn.kept:
        parts.append("not kept")
    if turn.new_tokens > 1:
        parts.append(f"{(turn.new_tokens - 1) / seconds:.1f} tokens/s")
    note(f"[{', '.join([*parts, f'context {turn.context} of {limit}'])}]")


# Commands -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _files_may_fail() -> Iterator[None]:
    """A file that cannot be read or written ends only the command. A closed terminal or pipe ends the session."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        note(f"error: {in_one_line(error)}")


def _command(talk: Conversation, name: str = "", argument: str = "") -> None:
    if name == "help":
        note(HELP)
    elif name == "reset":
        talk.messages = []
        note("[the dialog is empty]")
    elif name == "system":
        if argument:
            talk.system = None if argument == "-" else argument
        note(_system(talk))
    elif name in ("save", "load") and not argument:
        note(f"error: /{name} needs a file name")
    elif name == "save":
        if is_main_rank():
            as_path(argument).write_text(
                json.dumps(talk.dialog(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        note(f"[saved to {argument}]")
    elif name == "load":
        _load(talk, argument)
        turns = len(talk.messages) // 2
        note(f"[{turns} turn{'s' * (turns != 1)} loaded]\n{_system(talk)}")
    else:
        note(f"error: there is no /{name}; /help lists the commands, Ctrl-D leaves")


def _system(talk: Conversation) -> str:
    if talk.system is not None:
        return f"[system message: {talk.system}]"
    own = talk.llama.tokenizer.default_system
    return "[no system message]" if own is None else f"[the model's own system message: {own}]"


def _load(talk: Conversation, path: str) -> None:
    try:
        dialog = json.loads(read_on_rank_0(as_path(path)))
        whole: list[Message] = [*dialog, {"role": "user", "content": ""}]
        system, turns = split_system(whole)
        talk.llama.dialogs.encode(whole)  # raises for a dialog with which every later turn would fail
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a dialog that ends with an answer: {error}") from None
    if talk.llama.dialogs.refusal(dialog):
        raise ValueError(f"{path} contains tags that mark turns, which this model's format refuses")
    talk.system, talk.messages = system, turns[:-1]
