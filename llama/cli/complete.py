"""`python -m llama complete`: continue one text, or a file of millions."""

import contextlib
import json
import logging
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import click
from click.core import ParameterSource

from llama.chat.formats import Message
from llama.cli.command import Command, build_arguments, model_options, sampling_arguments, sampling_options, stop_option
from llama.cli.output import show
from llama.console import in_one_line
from llama.engine.requests import Row
from llama.engine.streaming import TextStream
from llama.files import as_path, read_pipe, run_on_rank_0
from llama.generation import Llama
from llama.parallel.groups import is_main_rank, raise_on_all_ranks

log = logging.getLogger(__name__)

LINE_LIMIT = 2**22  # characters of a line; a prompt of a million tokens has about as many
LINES_LIMIT = 2**24  # of a file; each costs 8 bytes of memory
ANSWER_LIMIT = 8 * LINE_LIMIT  # bytes of a line of the answers
# Limits of what is sorted and computed in one call.
WINDOW_JOBS = 4096
WINDOW_CHARACTERS = LINE_LIMIT


@click.command(cls=Command)
@click.argument("text", required=False)
@click.option(
    "--file",
    help='JSON lines, {"prompt": "..."} or {"messages": [...]}; other keys are ignored. The file may have any size. It '
    "is read twice: first to check every line, then a few thousand lines at a time, whose longest prompts go first",
)
@click.option(
    "--out",
    help='file for the answers, {"line": 7, "prompt": ..., "generation": ..., "finish_reason": ...}, written each time '
    "that --max_batch_size more are complete. If it exists, only the missing answers are computed and appended",
)
@click.option("--keep_going/--no_keep_going", help="with --file: skip lines that cannot be read or do not fit")
@stop_option
@sampling_options(max_gen_len=128)
@model_options(max_batch_size=16)
def complete(
    text: str | None,
    file: str | None,
    out: str | None,
    keep_going: bool,
    stop: list[str] | None,
    **options: Any,
) -> None:
    """Continue TEXT, or text from a pipe, or each line of --file.

    Line N of a file is sampled with the seed --seed + N, whatever runs beside it. Without --file there is one row, and
    --max_batch_size has no effect.
    """
    if (file is None) != (out is None):
        raise ValueError("--file and --out go together")
    if file is not None and text is not None:
        raise ValueError("give a text or --file, not both")
    if file is None and text is None and sys.stdin.isatty():
        raise ValueError('nothing to continue: give a text ("..."), pipe one in, or --file prompts.jsonl --out FILE')
    if file is None:
        if click.get_current_context().get_parameter_source("keep_going") is ParameterSource.COMMANDLINE:
            raise ValueError("--keep_going has no effect on one text: leave it out, or give --file and --out")
        options["max_batch_size"] = 1
    llama = Llama.build(**build_arguments(options))
    settings, seed = sampling_arguments(options) | {"stop": stop}, options["seed"]
    if file is None or out is None:
        if text is None:
            text = read_pipe()
        show(llama.stream_text([text], seed=seed, **settings), [""], "\n")
    else:
        _complete_file(llama, as_path(file), as_path(out), keep_going, seed, settings)
    llama.close()


# A file of prompts --------------------------------------------------------------------------------
# The file may be larger than memory. For each unanswered line only 8 bytes are kept, a digest of its prompt. The texts
# are read again to answer them, a window of lines at a time.

# An answer, computed token by token, takes about as long as this many prompt tokens, computed together.
WORK_OF_AN_ANSWER = 500


@dataclass(frozen=True)
class Job:
    """A line of the file. given: a text or a dialog. length: in tokens."""

    line: int
    given: str | list[Message]
    length: int

    @property
    def key(self) -> str:
        return "prompt" if isinstance(self.given, str) else "messages"

    @property
    def work(self) -> int:
        return self.length + WORK_OF_AN_ANSWER


def _complete_file(llama: Llama, file: Path, out: Path, keep_going: bool, seed: int, settings: dict[str, Any]) -> None:
    todo = array("Q")  # used on rank 0: for each line the digest of its prompt, or 0 if there is nothing to do
    with contextlib.ExitStack() as held:

        def begin() -> tuple[int, int, int]:
            if file.resolve() == out.resolve():
                raise ValueError("--file and --out name the same file")
            jobs, work = _read_todo(llama, file, keep_going, todo)
            held.enter_context(_lock(out))
            return jobs, work, _remove_answered(out, file, todo)

        jobs, work, done = run_on_rank_0(begin)
        if done:
            log.info(f"{out} already has {done} of {jobs} answers")
        # The work left is estimated from the share of jobs left.
        progress = Progress(jobs - done, work * (jobs - done) // max(1, jobs))
        held.callback(progress.clear)
        windows = _windows(llama, file, todo)
        while window := run_on_rank_0(lambda: next(windows, [])):
            # The longest come first: if memory does not suffice, this shows at once, and the estimate of the time left
            # is good.
            window.sort(key=lambda job: -job.length)
            _complete_window(llama, window, out, seed, settings, progress)
    progress.report(out)


def _complete_window(
    llama: Llama, jobs: list[Job], out: Path, seed: int, settings: dict[str, Any], progress: "Progress"
) -> None:
    """Answer all jobs in one call. Append max_batch_size answers at a time to `out`, in the order in which they end."""
    rows, texts = list[Row](), list[TextStream]()
    for key, group in groupby(jobs, key=lambda job: job.key):
        batch = list(group)
        make: Any = llama._text_rows if key == "prompt" else llama._chat_rows
        more = make([job.given for job in batch], seed=[seed + job.line for job in batch], **settings)
        rows += more[0]
        texts += more[1]
    for i, row in enumerate(rows):
        row.index = i
    unwritten = set(range(len(rows)))
    ended: list[int] = []
    for piece in llama._pieces(rows, texts):
        progress.show(lambda: sum(len(rows[i].tokens) for i in unwritten))
        if piece.finish_reason is None:
            continue
        ended.append(piece.row)
        # Every rank counts the same, so all enter raise_on_all_ranks together.
        if len(ended) == min(llama.model.params.max_batch_size, len(unwritten)):
            answers = [(jobs[i], texts[i].text, rows[i].finish_reason) for i in ended]
            with raise_on_all_ranks():
                if is_main_rank():
                    _append(out, answers)
            progress.add([jobs[i] for i in ended], sum(len(rows[i].tokens) for i in ended))
            unwritten.difference_update(ended)
            ended = []


def _lock(out: Path) -> IO[bytes]:
    """Keep a second run from writing to the same file, as long as the returned file is open."""
    file = out.open("ab")
    with contextlib.suppress(ImportError):  # Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing {out}: wait for it, or name another --out") from None
    return file


def _lines(file: Path) -> Iterator[str]:
    """The lines of a file. Lines longer than LINE_LIMIT are cut to LINE_LIMIT + 1 characters."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as stream:
        while line := stream.readline(LINE_LIMIT + 1):
            yield line.removesuffix("\n")
            while line and not line.endswith("\n"):
                line = stream.readline(LINE_LIMIT)


def _read_todo(llama: Llama, file: Path, keep_going: bool, todo: "array[int]") -> tuple[int, int]:
    """Check every line, and put the digests of those that can be answered into `todo`.

    Returns their number and their work in total (`Job.work`).
    """
    if file.exists() and not file.is_file():
        raise ValueError(f"--file {file} is not a regular file, and it must be read twice")
    todo.append(0)  # lines count from 1
    first, jobs, work = "", 0, 0
    bad = 0
    for number, line in enumerate(_lines(file), 1):
        if number > LINES_LIMIT:
            raise ValueError(f"{file} has more than {LINES_LIMIT:,} lines: divide it")
        todo.append(0)
        if not line.strip() and len(line) <= LINE_LIMIT:
            continue
        try:
            job = _read_job(llama, number, line)
        except (ValueError, TypeError, RecursionError) as error:
            problem = in_one_line(f"{file.name}, line {number}: {error}")
            first, bad = first or problem, bad + 1
            if keep_going:
                log.info(f"skipped {problem}")
            continue
        todo[number] = _digest(_head(job))
        jobs, work = jobs + 1, work + job.work
    if bad and not keep_going:
        more = f"; {bad - 1} more lines are bad" if bad > 1 else ""
        raise ValueError(f"{first}{more}: fix the file, or skip such lines with --keep_going")
    return jobs, work


def _read_job(llama: Llama, number: int, line: str) -> Job:
    key, given = _read_given(line)
    limit = llama.model.params.max_seq_len
    if key == "prompt":
        ids = llama.tokenizer.encode(given, bos=llama.tokenizer.adds_bos, eos=False)
        if not ids:
            raise ValueError("the prompt is empty: the model needs a text to continue")
    else:
        ids = llama.dialogs.encode(given)
    if len(ids) > limit:
        raise ValueError(f"{len(ids)} tokens, but max_seq_len is {limit}")
    return Job(number, given, len(ids))


def _read_given(line: str) -> tuple[str, Any]:
    if len(line) > LINE_LIMIT:
        raise ValueError(f"longer than {LINE_LIMIT:,} characters")
    try:
        line.encode()
        value = json.loads(line)
    except UnicodeEncodeError:
        raise ValueError("not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise ValueError('expected {"prompt": "..."} or {"messages": [...]}')
    return ("prompt", value["prompt"]) if "prompt" in value else ("messages", value["messages"])


def _remove_answered(out: Path, file: Path, todo: "array[int]") -> int:
    """Remove from `todo` the lines that an earlier run answered, and return their number. If that run was killed while
    it wrote an answer, cut the incomplete line off the end of `out`."""
    done = whole = 0
    rest = b""
    with out.open("rb") as stream:
        while line := stream.readline(ANSWER_LIMIT):
            if not line.endswith(b"\n") and not stream.peek(1):
                rest = line
                break
            try:
                answer = json.loads(line)
                number, key = answer["line"], "prompt" if "prompt" in answer else "messages"
                if todo[number] != _digest({"line": number, key: answer[key]}):
                    raise ValueError
            except (ValueError, TypeError, LookupError, RecursionError):
                raise ValueError(
                    f"{out}, line {done + 1}, does not answer a line of the file: name another --out, or remove it"
                ) from None
            todo[number] = 0
            done, whole = done + 1, whole + len(line)
    if rest:
        left = ((n, line) for n, line in enumerate(_lines(file), 1) if n < len(todo) and todo[n])
        heads = (_encoded(dict([("line", n), _read_given(line)]))[:-1] for n, line in left)
        if not any(rest[: len(head)] == head[: len(rest)] for head in heads):
            raise ValueError(f"{out} does not end with an answer: name another --out, or remove it")
        os.truncate(out, whole)
    return done


def _windows(llama: Llama, file: Path, todo: "array[int]") -> Iterator[list[Job]]:
    """The jobs that are left, in the order of the file, in lists of limited size."""
    window: list[Job] = []
    characters = 0
    left = sum(map(bool, todo))
    for number, line in enumerate(_lines(file), 1):
        if number >= len(todo) or not todo[number]:
            continue
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            job = _read_job(llama, number, line)
            if _digest(_head(job)) == todo[number]:
                window.append(job)
                characters, left = characters + len(line), left - 1
                if len(window) == WINDOW_JOBS or characters >= WINDOW_CHARACTERS:
                    yield window
                    window, characters = [], 0
                continue
        break
    if left:
        raise ValueError(f"{file} was changed while it was read: start again when it is complete")
    if window:
        yield window


def _head(job: Job) -> dict[str, Any]:
    return {"line": job.line, job.key: job.given}


def _digest(head: dict[str, Any]) -> int:
    return int.from_bytes(blake2b(_encoded(head), digest_size=8).digest(), "little") or 1


def _encoded(answer: dict[str, Any]) -> bytes:
    # A lone surrogate, which may be in ignored keys of a message, becomes a JSON escape.
    return json.dumps(answer, ensure_ascii=False).encode(errors="backslashreplace")


def _append(out: Path, answers: list[tuple[Job, str, str | None]]) -> None:
    lines = []
    for job, text, finish_reason in answers:
        generation = text if job.key == "prompt" else {"role": "assistant", "content": text}
        lines.append(_encoded({**_head(job), "generation": generation, "finish_reason": finish_reason}) + b"\n")
    with out.open("ab") as file:
        file.write(b"".join(lines))
        file.flush()
        os.fsync(file.fileno())


class Progress:
    """One line on the terminal: prompts done, tokens per second, time left."""

    def __init__(self, jobs: int, work: int):
        self.started = self.shown = time.perf_counter()
        self.jobs, self.work = jobs, work
        self.done = self.done_work = self.tokens = 0
        self.visible = is_main_rank() and sys.stderr.isatty()

    def show(self, new_tokens: Callable[[], int], at_least: float = 0.5) -> None:
        now = time.perf_counter()
        if not self.visible or now - self.shown < at_least:
            return
        self.shown, seconds = now, now - self.started
        line = f"{self.done}/{self.jobs} prompts, {(self.tokens + new_tokens()) / seconds:.1f} tokens/s"
        if self.done_work:
            left = round(seconds / self.done_work * (self.work - self.done_work))
            line += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    def add(self, jobs: list[Job], tokens: int) -> None:
        self.done += len(jobs)
        self.done_work += sum(job.work for job in jobs)
        self.tokens += tokens
        self.show(lambda: 0, 0)

    def clear(self) -> None:
        if self.visible:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def report(self, out: Path) -> None:
        seconds = time.perf_counter() - self.started
        rate = f", {self.tokens / seconds:.1f} tokens/s" if self.tokens else ""
        log.info(f"{out}: {self.done} answers in {seconds:.0f} s{rate}")
