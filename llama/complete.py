"""`python -m llama complete`: continue one text, or a file of thousands."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llama.chat_format import Message
from llama.completion import Llama
from llama.distributed import is_main_rank, raising_together, say, told_by_rank_0
from llama.params import ModelArgs
from llama.request import check_whole
from llama.terminal import show, visible
from llama.textfile import read_on_rank_0


def complete(
    text: str | None = None,
    *,
    ckpt_dir: str,
    file: str | None = None,
    out: str | None = None,
    keep_going: bool = False,
    batch_tokens: int = 8192,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int | None = None,
    repetition_penalty: float = 1.0,
    stop: list[str] | None = None,
    max_gen_len: int | None = 128,
    max_seq_len: int = 512,
    max_batch_size: int = 16,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    compile: bool = False,
    plain: bool = False,
    chat_format: str | None = None,
    seed: int = 1,
) -> None:
    """Continue a text, or each line of a file.

    text: what to continue, the one word that needs no flag; without it, what comes through a pipe.
    ckpt_dir: folder with consolidated.NN.pth and params.json; the tokenizer is looked for in it and beside it.
    file: JSON lines, {"prompt": "..."} or {"messages": [...]} for a dialog; other keys are left alone.
    out: where the answers go, a line as soon as its batch ends, in the order of the work: {"line": 7, "prompt": ...,
        "generation": ..., "finish_reason": ...}. If it is there, the lines it lacks are done.
    keep_going: skip lines of the file that cannot be read or do not fit, instead of refusing the file.
    batch_tokens: rows of a batch times their longest prompt and answer are at most this, or one row.
    stop: a text that ends the answer ("\\n" is a line break), or a JSON list of them: '["\\n\\n", "User:"]'.
    seed: line N of a file draws with seed + N, whatever stands beside it.
    """
    if (file is None) != (out is None):
        raise ValueError("--file and --out go together")
    if file is not None and text is not None:
        raise ValueError("give a text or --file, not both")
    if file is None and text is None and sys.stdin.isatty():
        raise ValueError('nothing to continue: give a text ("..."), pipe one in, or --file prompts.jsonl --out FILE')
    check_whole("batch_tokens", batch_tokens, 1)
    llama = Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        max_batch_size if file else 1,
        seed=seed,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compile=compile,
        plain=plain,
        chat_format=chat_format,
    )
    settings: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "max_gen_len": max_gen_len,
        "stop": stop,
    }
    if file is None or out is None:
        if text is None:
            text = told_by_rank_0(sys.stdin.read() if is_main_rank() else None).removesuffix("\n")
        show(llama.stream_text([text], seed=seed, **settings), [""], "\n")
    else:
        _complete_file(llama, Path(file), Path(out), keep_going, batch_tokens, seed, settings)
    llama.close()


# A file of prompts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A line of the file: a text or a dialog, and its length in tokens."""

    line: int
    given: str | list[Message]
    length: int

    @property
    def key(self) -> str:
        return "prompt" if isinstance(self.given, str) else "messages"


def _complete_file(
    llama: Llama, file: Path, out: Path, keep_going: bool, batch_tokens: int, seed: int, settings: dict[str, Any]
) -> None:
    text = read_on_rank_0(file)
    with raising_together():
        if file.resolve() == out.resolve():
            raise ValueError("--file and --out name the same file")
        jobs = _read_jobs(llama, text, file.name, keep_going)
        done: set[int] = set()
        lock: IO[bytes] | None = None
        if is_main_rank():
            lock = _lock(out)
            done = _read_done(out, {job.line: job for job in jobs})
    done = set(told_by_rank_0(sorted(done)))
    if done:
        say(f"{out}: {len(done)} of {len(jobs)} answers are there already")
    jobs = [job for job in jobs if job.line not in done]
    progress = Progress(jobs)
    try:
        for batch in batches(jobs, batch_tokens, settings["max_gen_len"], llama.model.params):
            make: Any = llama._text_rows if batch[0].key == "prompt" else llama._chat_rows
            rows, texts = make([job.given for job in batch], seed=[seed + job.line for job in batch], **settings)
            for _ in llama._pieces(rows, texts):
                progress.show(sum(len(row.tokens) for row in rows))
            with raising_together():
                if is_main_rank():
                    _append(out, batch, [(text.text, row.finish_reason) for row, text in zip(rows, texts, strict=True)])
            progress.add(batch, sum(len(row.tokens) for row in rows))
    finally:
        progress.clear()
        if lock is not None:
            lock.close()
    progress.tell(out)


def _lock(out: Path) -> IO[bytes]:
    """Keep a second run from writing the same file, as long as what this returns is open."""
    file = out.open("ab")
    with contextlib.suppress(ImportError):  # Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing {out}: wait for it, or name another --out") from None
    return file


def _read_jobs(llama: Llama, text: str, name: str, keep_going: bool) -> list[Job]:
    jobs, bad = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            line.encode()
            jobs.append(_read_job(llama, number, line))
        except UnicodeEncodeError:
            bad.append(f"{name}, line {number}: not UTF-8")
        except (ValueError, TypeError, RecursionError) as error:
            bad.append(visible(f"{name}, line {number}: {error}"))
    if bad and not keep_going:
        more = f"; {len(bad) - 1} more lines are bad" if len(bad) > 1 else ""
        raise ValueError(f"{bad[0]}{more}: mend the file, or --keep_going skips them")
    for line in bad:
        say(f"skipped {line}")
    return jobs


def _read_job(llama: Llama, number: int, line: str) -> Job:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise ValueError('expected {"prompt": "..."} or {"messages": [...]}')
    limit = llama.model.params.max_seq_len
    if "prompt" in value:
        given = value["prompt"]
        ids = llama.tokenizer.encode(given, bos=llama.tokenizer.adds_bos, eos=False)
        if not ids:
            raise ValueError("the prompt is empty, and the model needs something to continue")
    else:
        given = value["messages"]
        ids = llama.dialogs.encode(given)
    if len(ids) > limit:
        raise ValueError(f"{len(ids)} tokens, but max_seq_len is {limit}")
    return Job(number, given, len(ids))


def _read_done(out: Path, jobs: dict[int, Job]) -> set[int]:
    """The lines that an earlier run has answered; what it was writing when it was killed is cut off."""
    content = out.read_bytes()
    *lines, rest = content.split(b"\n")
    done = set()
    for number, line in enumerate(lines, 1):
        try:
            answer = json.loads(line)
            job = jobs[answer["line"]]
            if answer[job.key] != job.given or job.line in done:
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(
                f"{out}, line {number}, is no answer to a line of the file: name another --out, or remove it"
            ) from None
        done.add(job.line)
    heads = (_encoded(_head(job))[:-1] for job in jobs.values())
    if rest and not any(rest[: len(head)] == head[: len(rest)] for head in heads):
        raise ValueError(f"{out} ends with what is no answer: name another --out, or remove it")
    if rest:
        os.truncate(out, len(content) - len(rest))
    return done


def batches(jobs: list[Job], batch_tokens: int, max_gen_len: int | None, args: ModelArgs) -> Iterator[list[Job]]:
    """Batches of one kind, the longest prompts first, so that memory and the time left are known early."""
    answer = args.max_seq_len if max_gen_len is None else max_gen_len
    batch: list[Job] = []
    width = 0  # the longest prompt of the batch and its answer
    for job in sorted(jobs, key=lambda job: (job.key, -job.length)):
        full = len(batch) == args.max_batch_size or (len(batch) + 1) * width > batch_tokens
        if batch and (full or job.key != batch[0].key):
            yield batch
            batch = []
        if not batch:
            width = min(job.length + answer, args.max_seq_len)
        batch.append(job)
    if batch:
        yield batch


def _head(job: Job) -> dict[str, Any]:
    return {"line": job.line, job.key: job.given}


def _encoded(answer: dict[str, Any]) -> bytes:
    # Half a surrogate pair, which may stand in keys that nobody reads, becomes JSON's own escape.
    return json.dumps(answer, ensure_ascii=False).encode(errors="backslashreplace")


def _append(out: Path, batch: list[Job], answers: list[tuple[str, str | None]]) -> None:
    lines = []
    for job, (text, finish_reason) in zip(batch, answers, strict=True):
        generation = text if job.key == "prompt" else {"role": "assistant", "content": text}
        lines.append(_encoded({**_head(job), "generation": generation, "finish_reason": finish_reason}) + b"\n")
    with out.open("ab") as file:
        file.write(b"".join(lines))
        file.flush()
        os.fsync(file.fileno())


# Of a prompt's tokens, computed together, so many take as long as an answer, whose tokens come one by one.
WORK_OF_AN_ANSWER = 500


class Progress:
    """One line on the terminal: prompts done, tokens a second, time left."""

    def __init__(self, jobs: list[Job]):
        self.started = self.shown = time.perf_counter()
        self.jobs, self.work = len(jobs), sum(job.length + WORK_OF_AN_ANSWER for job in jobs)
        self.done = self.done_work = self.tokens = 0
        self.visible = is_main_rank() and sys.stderr.isatty()

    def show(self, new_tokens: int, at_least: float = 0.5) -> None:
        now = time.perf_counter()
        if not self.visible or now - self.shown < at_least:
            return
        self.shown, seconds = now, now - self.started
        line = f"{self.done}/{self.jobs} prompts, {(self.tokens + new_tokens) / seconds:.1f} tokens/s"
        if self.done_work:
            left = round(seconds / self.done_work * (self.work - self.done_work))
            line += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    def add(self, batch: list[Job], tokens: int) -> None:
        self.done += len(batch)
        self.done_work += sum(job.length + WORK_OF_AN_ANSWER for job in batch)
        self.tokens += tokens
        self.show(0, 0)

    def clear(self) -> None:
        if self.visible:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def tell(self, out: Path) -> None:
        seconds = time.perf_counter() - self.started
        rate = f", {self.tokens / seconds:.1f} tokens/s" if self.tokens else ""
        say(f"{out}: {self.done} answers in {seconds:.0f} s{rate}")
