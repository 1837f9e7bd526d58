"""`python -m llama complete`: a text, or a file of prompts whose run can be interrupted and continued."""

import json
import os
import pty
import random
import re
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import Ended, Keyboard
from helpers.paths import ROOT
from helpers.ranks import CONTEXT
from llama import Llama
from llama.cli import main as cli
from llama.cli.complete import (
    WORK_OF_AN_ANSWER,
    Job,
    Progress,
    _append,
    _digest,
    _head,
    _lock,
    _read_todo,
    _remove_answered,
)
from llama.console import visible
from llama.engine.plan import Plan
from llama.engine.requests import Row
from llama.engine.scheduler import Scheduler
from llama.engine.streaming import TextPiece
from llama.engine.worker import Worker

# The settings of all runs here. Flags, text_completion and chat_completion have the same names for them.
SETTINGS: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "max_gen_len": 16}
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def complete(command: Callable[..., Ended]) -> Callable[..., Ended]:
    """complete(*args, stdin=""): the command in this process, on a seeded model."""
    return partial(command, "complete")


def forbid(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"Llama.{name} ran")

    monkeypatch.setattr(Llama, name, forbidden)


# One text -----------------------------------------------------------------------------------------


def test_a_text_from_a_pipe_is_continued_on_stdout(
    checkpoint: Callable[..., Path], build: Callable[..., Llama]
) -> None:
    command = [sys.executable, "-m", "llama", "complete", "--ckpt_dir", str(checkpoint("mha")), *FLAGS, "--seed", "5"]
    done = subprocess.run(
        command, input="The licence\n\nof it\n", capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    (result,) = build("mha").text_completion(["The licence\n\nof it"], seed=5, **SETTINGS)
    assert done.stdout == result["generation"] + "\n"
    assert re.fullmatch(r"llama: .*\n", done.stderr)  # the line that `build` prints


@pytest.mark.parametrize(
    "text",
    ["The licence", "[1, 2]", "1e3", "-5", "None", "True", "'quoted'", '"quoted"', "{'a': 1}", "(1,)", " 07 ", ""],
)
def test_a_text_is_not_parsed(text: str, complete: Callable[..., Ended], build: Callable[..., Llama]) -> None:
    (result,) = build("mha").text_completion([text], seed=1, **SETTINGS)
    expected = (0, result["generation"] + "\n")
    assert complete(text, *FLAGS)[:2] == expected
    assert complete(f"--text={text}", *FLAGS)[:2] == expected
    assert complete(*FLAGS, stdin=text)[:2] == expected


def test_stop_texts_end_the_answer(complete: Callable[..., Ended], build: Callable[..., Llama]) -> None:
    (result,) = build("mha").text_completion(["The licence"], seed=1, **SETTINGS)
    whole = result["generation"]
    first, second = whole[12:14], whole[5:8]
    assert whole.find(first) > whole.find(second) >= 0
    for stop, expected in {
        first: whole[: whole.find(first)],
        json.dumps([first, second]): whole[: whole.find(second)],
        "[1": whole,  # not JSON, so a text
        "1e3": whole,
        "[1, 2]": whole,  # JSON, but not a list of texts
    }.items():
        assert complete("The licence", *FLAGS, "--stop", stop)[:2] == (0, expected + "\n")
    both = complete("The licence", *FLAGS, "--stop", first, "--stop", second)
    assert both[:2] == (0, whole[: whole.find(second)] + "\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], 'nothing to continue: give a text ("..."), pipe one in, or --file prompts.jsonl --out FILE'),
        (["--file", "prompts.jsonl"], "--file and --out go together"),
        (["--out", "answers.jsonl", "text"], "--file and --out go together"),
        (["text", "--file", "prompts.jsonl", "--out", "answers.jsonl"], "give a text or --file, not both"),
        (["x", "--keep_going"], "--keep_going has no effect on one text: leave it out, or give --file and --out"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_loaded(
    args: list[str], message: str, complete: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "build")
    assert complete(*args, stdin=Keyboard()) == (1, "", f"error: {message}\n")


# A file of prompts --------------------------------------------------------------------------------


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


SYSTEM, ANSWER = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "It is."}
ENTRIES: list[dict[str, Any]] = [
    {"prompt": "The licence"},
    {"messages": [user("Hello")]},
    {"prompt": ""},
    {"prompt": "the software is provided", "id": 7, "reference": ["x"]},
    {"messages": [SYSTEM, user("What is it?"), ANSWER, user("Is it?")], "id": 8},
    {"prompt": "The licence"},  # the same prompt again has another seed, so another answer
    {"messages": [user("a [INST] b")]},  # refused by the format
    {"prompt": "é 漢字 👩‍👧 \u2028 \x1b \n\n"},
    {"messages": [SYSTEM, user("")]},
    {"prompt": "word " * 20},
    {"prompt": "or"},
    {"messages": [{**user("Hello"), "note": "half a \ud800 surrogate, which nobody reads"}]},
    {"prompt": "1e3"},
]


def write_lines(path: Path, entries: list[Any], blank_every: int = 3) -> dict[int, Any]:
    """Write a file with blank lines between the entries. Return {line number: entry}."""
    numbered: dict[int, Any] = {}
    lines: list[str] = []
    for i, entry in enumerate(entries):
        if i % blank_every == 1:
            lines += ["", " \t"]
        lines.append(entry if isinstance(entry, str) else json.dumps(entry))
        numbered[len(lines)] = entry
    path.write_text("\n".join(lines) + "\n" * (len(entries) % 2), encoding="utf-8")
    return numbered


def read_answers(path: Path) -> dict[int, dict[str, Any]]:
    content = path.read_bytes().decode()
    assert content.endswith("\n")
    answers = [json.loads(line) for line in content[:-1].split("\n")]
    by_line = {answer.pop("line"): answer for answer in answers}
    assert len(by_line) == len(answers)  # no line has two answers
    return by_line


def alone(llama: Llama, number: int, entry: dict[str, Any], seed: int = 1, **settings: Any) -> dict[str, Any]:
    """The answer to one line, computed without the other lines."""
    arguments: dict[str, Any] = SETTINGS | settings | {"seed": seed + number}
    if "prompt" in entry:
        return {"prompt": entry["prompt"], **llama.text_completion([entry["prompt"]], **arguments)[0]}
    return {"messages": entry["messages"], **llama.chat_completion([entry["messages"]], **arguments)[0]}


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (["--max_batch_size", "4"], {}),
        (["--max_batch_size", "3", "--prefill_chunk", "9"], {"temperature": 0}),
        (
            ["--max_batch_size", "32", "--seed", "40", "--repetition_penalty", "1.2", "--top_k", "40"],
            {"repetition_penalty": 1.2, "top_k": 40, "stop": ["e", "\n"], "temperature": 1.5, "max_gen_len": 30},
        ),
        ([], {"frequency_penalty": 0.7, "presence_penalty": -0.5, "logit_bias": {9: 5, 300: -100}}),
    ],
)
def test_each_answer_equals_that_to_its_line_alone(
    flags: list[str],
    settings: dict[str, Any],
    complete: Callable[..., Ended],
    build: Callable[..., Llama],
    tmp_path: Path,
) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    entries = write_lines(file, ENTRIES)
    values = {name: json.dumps(value) if isinstance(value, list | dict) else value for name, value in settings.items()}
    more = [f"--{name}={value}" for name, value in values.items()]
    flags = [*FLAGS, *flags, *more]
    ended = complete("--file", str(file), "--out", str(out), "--max_seq_len", "128", *flags)
    assert ended.status == 0 and not ended.out, ended.err
    answers = read_answers(out)
    assert answers.keys() == entries.keys()
    llama, seed = build("mha", max_seq_len=128, max_batch_size=1), 40 if "--seed" in flags else 1
    for number, entry in entries.items():
        assert answers[number] == alone(llama, number, entry, seed, **settings), entry
    reasons = {answer["finish_reason"] for answer in answers.values()}
    assert reasons == {"stop", "length"}
    if settings.get("temperature") != 0:
        assert len({answer["generation"] for answer in answers.values() if answer.get("prompt") == "The licence"}) == 2
    assert re.fullmatch(
        rf"llama: .*\n{re.escape(str(out))}: {len(ENTRIES)} answers in \d+ s, [\d.]+ tokens/s\n", ended.err
    )


def test_a_file_is_one_call_and_its_answers_are_written_as_rows_end(
    complete: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that ends makes room for the next one at once, also where a stop text ends it."""
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    write_lines(file, ENTRIES)
    submitted, written, steps = list[int](), list[int](), list[int]()
    submit, append, run = Scheduler.submit, _append, Worker.run

    def watched_submit(self: Scheduler, rows: list[Row], **options: Any) -> Any:
        submitted.append(len(rows))
        return submit(self, rows, **options)

    def watched_append(out: Path, answers: list[Any]) -> None:
        written.append(len(answers))
        append(out, answers)

    def watched_run(self: Worker, plan: Plan, *rest: Any) -> Any:
        steps.append(len({chunk.slot for chunk in plan.chunks}))
        return run(self, plan, *rest)

    monkeypatch.setattr(Scheduler, "submit", watched_submit)
    monkeypatch.setattr("llama.cli.complete._append", watched_append)
    monkeypatch.setattr(Worker, "run", watched_run)
    monkeypatch.setattr("llama.engine.planner.find_prefix", lambda *_: None)  # rows that wait for one skip a step
    args = ["--file", str(file), "--out", str(out), "--max_seq_len", "128", "--max_batch_size", "4"]
    assert complete(*args, *FLAGS, "--stop", "e", "--max_gen_len", "60").status == 0
    assert submitted == [13] and written == [4, 4, 4, 1]
    # All four slots are busy until fewer than four rows are left.
    last_full = len(steps) - steps[::-1].index(4)
    assert set(steps[:last_full]) == {4}
    reasons = [answer["finish_reason"] for answer in read_answers(out).values()]
    assert "stop" in reasons


# Bad lines ----------------------------------------------------------------------------------------

BAD = {
    "The licence": r"not JSON \(Expecting value.*\)",
    '{"prompt": "x"': r"not JSON \(.*\)",
    "[" * 100_000: "maximum recursion depth exceeded.*",
    '{"prompt": "x", "extra": ' + "[" * 100_000: "maximum recursion depth exceeded.*",
    '"The licence"': r'expected {"prompt": "..."} or {"messages": \[...\]}',
    "[]": r'expected {"prompt": "..."} or {"messages": \[...\]}',
    "{}": r'expected {"prompt": "..."} or {"messages": \[...\]}',
    '{"prompt": "x", "messages": []}': r'expected {"prompt": "..."} or {"messages": \[...\]}',
    '{"prompt": null}': "a text to encode must be a string, not NoneType",
    '{"prompt": ["x"]}': "a text to encode must be a string, not list",
    json.dumps({"prompt": "word " * 99}): "[0-9]+ tokens, but max_seq_len is 128",
    json.dumps({"messages": [user("word " * 99)]}): "[0-9]+ tokens, but max_seq_len is 128",
    '{"prompt": "\\ud800"}': "the text holds a lone surrogate, which is not a character",
    '{"messages": [{"role": "user", "content": "\\ud800"}]}': "the text holds a lone surrogate.*",
    '{"messages": []}': "roles of a dialog: .*; got nothing",
    '{"messages": null}': "a dialog is a list of .*",
    '{"messages": {"role": "user", "content": "x"}}': "a dialog is a list of .*",
    '{"messages": [{"role": "user"}]}': "a dialog is a list of .*",
    json.dumps({"messages": [user("a"), user("b")]}): "roles of a dialog: .*; got user, user",
    json.dumps({"messages": [user("a"), ANSWER]}): "roles of a dialog: .*; got user, assistant",
    json.dumps({"messages": [{"role": "\x1b[31m", "content": "x"}]}): r"roles of a dialog: .*; got ␛\[31m",
}


@pytest.mark.parametrize(("line", "message"), BAD.items(), ids=[line[:40] for line in BAD])
def test_a_bad_line_is_reported_before_anything_is_generated(
    line: str, message: str, complete: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text(f'{{"prompt": "good"}}\n\n{line}\n{{"prompt": "good"}}\n', encoding="utf-8")
    forbid(monkeypatch, "_pieces")
    ended = complete("--file", str(file), "--out", str(out), "--max_seq_len", "128")
    assert ended.status == 1 and not out.exists()
    assert re.fullmatch(
        rf"llama: .*\nerror: prompts.jsonl, line 3: {message}: fix the file, or skip such lines with --keep_going\n",
        ended.err,
    )


def test_keep_going_skips_the_bad_lines_and_no_others(
    complete: Callable[..., Ended], build: Callable[..., Llama], tmp_path: Path
) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    entries = write_lines(file, [entry for pair in zip(BAD, ENTRIES * 2, strict=False) for entry in pair])
    args = ["--file", str(file), "--out", str(out), "--max_seq_len", "128", *FLAGS]
    ended = complete(*args)
    assert ended.status == 1 and not out.exists()
    assert f"; {len(BAD) - 1} more lines are bad: fix the file" in ended.err
    for _ in range(2):  # the second run has nothing left to do
        ended = complete(*args, "--keep_going")
        assert ended.status == 0, ended.err
        skipped = dict(re.findall(r"^skipped prompts\.jsonl, line (\d+): (.*)$", ended.err, re.M))
        assert len(skipped) == ended.err.count("skipped")
        assert list(map(int, skipped)) == [number for number, entry in entries.items() if isinstance(entry, str)]
        for number, message in skipped.items():
            assert re.fullmatch(BAD[entries[int(number)]], message)
        answers = read_answers(out)
        assert answers.keys() == {number for number, entry in entries.items() if isinstance(entry, dict)}
    llama = build("mha", max_seq_len=128)
    for number, answer in answers.items():
        assert answer == alone(llama, number, entries[number])


def test_an_empty_prompt_is_an_error_without_bos(build: Callable[..., Llama], tmp_path: Path) -> None:
    llama, file = build("mha", max_seq_len=64), tmp_path / "prompts.jsonl"
    file.write_text('\n{"prompt": ""}')
    assert _read_todo(llama, file, False, array("Q")) == (1, 1 + WORK_OF_AN_ANSWER)
    llama.tokenizer.adds_bos = False
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 2: the prompt is empty: the model needs a text"):
        _read_todo(llama, file, False, array("Q"))


def test_a_file_that_cannot_be_read_is_named(complete: Callable[..., Ended], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    ended = complete("--file", str(file), "--out", str(tmp_path / "answers.jsonl"))
    assert ended.status == 1
    assert ended.err.splitlines()[-1].startswith("error: ") and str(file) in ended.err
    assert ended.err.count("\n") == 2 and not (tmp_path / "answers.jsonl").exists()


def test_invalid_utf8_is_a_bad_line_and_a_byte_order_mark_is_skipped(
    complete: Callable[..., Ended], tmp_path: Path
) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\r\n{"prompt": "caf\xe9"}\r\n{"prompt": "three"}\r\n')
    args = ["--file", str(file), "--out", str(out), *FLAGS]
    ended = complete(*args)
    assert ended.status == 1 and "prompts.jsonl, line 2: not UTF-8" in ended.err and not out.exists()
    assert complete(*args, "--keep_going").status == 0
    assert sorted(json.loads(line)["line"] for line in out.read_text().splitlines()) == [1, 3]


def test_two_runs_do_not_write_one_file(complete: Callable[..., Ended], tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text('{"prompt": "one"}\n')
    with _lock(out):
        ended = complete("--file", str(file), "--out", str(out), *FLAGS)
        assert ended.status == 1 and "another run is writing" in ended.err and out.read_bytes() == b""
    assert complete("--file", str(file), "--out", str(out), *FLAGS).status == 0


# Interrupted runs ---------------------------------------------------------------------------------


def run_command_line(args: list[str], stderr: str) -> None:
    with open(stderr, "w") as sys.stderr:
        sys.argv = args
        cli.main()


@pytest.mark.slow
def test_a_run_killed_repeatedly_answers_each_line_once(
    complete: Callable[..., Ended], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    rng = random.Random(11)
    file, out, whole, log = (tmp_path / name for name in ("prompts.jsonl", "answers.jsonl", "whole.jsonl", "log"))
    texts = [
        " ".join(rng.choices(["The", "licence", "copy", "é", "of", "it"], k=rng.randint(1, 12))) for _ in range(60)
    ]
    entries = write_lines(file, [{"prompt": t} if rng.random() < 0.7 else {"messages": [user(t)]} for t in texts])
    args = ["--max_batch_size", "3", "--max_seq_len", "128", *FLAGS]
    assert complete("--file", str(file), "--out", str(whole), *args).status == 0
    command = [
        "llama",
        "complete",
        "--ckpt_dir",
        str(checkpoint("mha")),
        "--file",
        str(file),
        "--out",
        str(out),
        *args,
    ]
    deaths, status = 0, None
    while status is None:
        size = out.stat().st_size if out.exists() else 0
        process = CONTEXT.Process(target=run_command_line, args=(command, str(log)), daemon=True)
        process.start()
        if deaths < 8:
            while process.is_alive() and (not out.exists() or out.stat().st_size <= size):
                time.sleep(0.001)
            process.join(rng.random() * 0.04)
        else:
            process.join(60)
        status = process.exitcode
        if status is None:
            process.kill()
            process.join()
            deaths += 1
            if deaths % 2:  # as if it had been killed while it wrote a line
                os.truncate(out, out.stat().st_size - rng.randint(1, 30))
    assert status == 0, log.read_text()
    assert deaths >= 5
    assert re.search(rf"^{re.escape(str(out))} already has \d+ of 60 answers$", log.read_text(), re.M)
    answers = read_answers(out)
    assert answers.keys() == entries.keys()
    assert answers == read_answers(whole)


def jobs_of(entries: list[dict[str, Any]]) -> dict[int, Job]:
    return {i: Job(i, entry["prompt" if "prompt" in entry else "messages"], 1) for i, entry in enumerate(entries, 1)}


def answer_to(job: Job, generation: str = "é\u2028.") -> bytes:
    answer = {"line": job.line, job.key: job.given, "generation": generation, "finish_reason": "stop"}
    return (json.dumps(answer, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def struck_off(out: Path) -> set[int]:
    """Write ENTRIES to a file. Return the numbers of the lines that `_strike_off` finds answered in `out`."""
    file = out.with_name("entries.jsonl")
    file.write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES))
    todo = array("Q", [0, *(_digest(_head(job)) for job in jobs_of(ENTRIES).values())])
    done = _remove_answered(out, file, todo)
    found = {number for number, digest in enumerate(todo) if number and not digest}
    assert done == len(found)
    return found


def test_a_line_cut_anywhere_is_written_again(tmp_path: Path) -> None:
    out, jobs = tmp_path / "answers.jsonl", jobs_of(ENTRIES)
    out.touch()
    assert struck_off(out) == set()
    first, second = answer_to(jobs[5]), answer_to(jobs[2])
    for last in (jobs[8], jobs[12]):
        line = answer_to(last)
        for cut in range(len(line) + 1):
            out.write_bytes(first + second + line[:cut])
            whole = cut == len(line)
            assert struck_off(out) == {5, 2} | ({last.line} if whole else set())
            assert out.read_bytes() == first + second + (line if whole else b"")


OTHERS = [Job(job.line, "another text", 1) for job in jobs_of(ENTRIES).values()]
OURS = [answer_to(job) for job in jobs_of(ENTRIES).values()]


@pytest.mark.parametrize(
    "content",
    [
        *(text + end for text in (b"hello", b"7", b"[]", b"{}", b"\xff\xfe", b"\0") for end in (b"\n", b"")),
        b"\n",
        b"[" * 100_000 + b"\n",
        b'{"line": 1}\n',
        b'{"line": [1]}\n',
        b'{"line": 99, "prompt": "The licence", "generation": "x", "finish_reason": "stop"}\n',
        b'{"line": 1, "messages": "The licence", "generation": "x", "finish_reason": "stop"}\n',
        answer_to(OTHERS[0]) + answer_to(OTHERS[1]),
        answer_to(OTHERS[0]) + answer_to(OTHERS[1])[:-1],
        answer_to(OTHERS[0])[:-1],
        answer_to(OTHERS[0])[:26],
        OURS[0] + answer_to(OTHERS[1]),
        OURS[0] + answer_to(OTHERS[1])[:-1],
        OURS[0] + OURS[3] + OURS[0],  # twice
        OURS[0] + OURS[0][:-1],
        b'{"line": -1, "prompt": "1e3", "generation": "x", "finish_reason": "stop"}\n',  # counted from the end
        b'{"line": true, "prompt": "The licence", "generation": "x", "finish_reason": "stop"}\n',
        OURS[0] + b"my notes",
        OURS[0] + b"\n",
    ],
    ids=lambda content: repr(content[:40]),
)
def test_an_out_file_with_other_content_is_refused_and_unchanged(
    content: bytes, tmp_path: Path, built: list[Llama]
) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_bytes(content)
    with pytest.raises(ValueError, match=r"name another --out, or remove it") as refused:
        struck_off(out)
    assert str(out) in str(refused.value)
    assert out.read_bytes() == content


def test_an_out_file_of_other_prompts_is_refused_in_one_line(
    complete: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    args = ["--file", str(file), "--out", str(out), "--max_seq_len", "128", *FLAGS]
    write_lines(file, ENTRIES[:4])
    assert complete(*args).status == 0
    before = out.read_bytes()
    forbid(monkeypatch, "_pieces")
    write_lines(file, list(reversed(ENTRIES[:4])))
    ended = complete(*args)
    assert ended.status == 1 and out.read_bytes() == before
    assert ended.err.splitlines()[1:] == [
        f"error: {out}, line 1, does not answer a line of the file: name another --out, or remove it"
    ]


@pytest.mark.parametrize("name", ["prompts.jsonl", "link.jsonl", "folder/../prompts.jsonl"])
def test_the_prompts_are_never_written_over(name: str, complete: Callable[..., Ended], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    write_lines(file, ENTRIES)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.jsonl").symlink_to(file)
    before = file.read_bytes()
    ended = complete("--file", str(file), "--out", str(tmp_path / name))
    assert ended.status == 1 and file.read_bytes() == before
    assert ended.err.splitlines()[1:] == ["error: --file and --out name the same file"]


def test_an_out_file_that_cannot_be_written_is_reported_first(
    complete: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.jsonl"
    write_lines(file, ENTRIES)
    forbid(monkeypatch, "_pieces")
    for out in (tmp_path / "no folder" / "answers.jsonl", tmp_path):
        ended = complete("--file", str(file), "--out", str(out))
        assert ended.status == 1 and str(out) in ended.err.splitlines()[-1]


def test_two_ranks_answer_each_line_once(
    complete: Callable[..., Ended], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    file, out, whole = (tmp_path / name for name in ("prompts.jsonl", "answers.jsonl", "whole.jsonl"))
    entries = write_lines(file, [*ENTRIES, "bad"])
    args = ["--max_seq_len", "128", "--max_batch_size", "5", *FLAGS, "--keep_going"]
    assert complete("--file", str(file), "--out", str(whole), *args).status == 0
    begun = whole.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(begun[:2]) + begun[2][:-9])  # an earlier run was killed
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", "-m", "llama", "complete"]
    command += ["--ckpt_dir", str(checkpoint("mha", 2)), "--file", str(file), "--out", str(out), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    assert read_answers(out) == read_answers(whole)
    assert read_answers(out).keys() == {number for number, entry in entries.items() if entry != "bad"}
    assert done.stderr.count(f"{out} already has 2 of 13 answers\n") == 1
    assert done.stderr.count(f"{out}: 11 answers in ") == 1
    assert done.stderr.count("skipped ") == 1


# What a terminal shows ----------------------------------------------------------------------------


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Callable[[], str]]]:
    """screen("stderr") replaces a stream by a terminal and returns a function that reads what the terminal shows."""
    master, device = pty.openpty()
    with open(device, "w", encoding="utf-8") as stream:

        def attach(name: str) -> Callable[[], str]:
            monkeypatch.setattr(sys, name, stream)
            return lambda: os.read(master, 65536).decode()

        yield attach
        monkeypatch.undo()
    os.close(master)


def test_a_terminal_shows_the_progress_of_a_file(
    complete: Callable[..., Ended], screen: Callable[[str], Callable[[], str]], tmp_path: Path
) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    write_lines(file, ENTRIES)
    args = ["--file", str(file), "--out", str(out), "--max_seq_len", "128", "--max_batch_size", "4", *FLAGS]
    quiet = complete(*args)
    assert "\r" not in quiet.err and " prompts, " not in quiet.err and " left" not in quiet.err
    out.unlink()
    read = screen("stderr")
    assert complete(*args).status == 0
    *lines, last = read().split("\r\x1b[K")
    # On a busy machine a line also shows the tokens of unfinished rows. The time left is unknown at first.
    lines = [line for line in lines[1:] if not re.fullmatch(r"0/13 prompts, [\d.]+ tokens/s", line)]
    shown = [re.fullmatch(r"(\d+)/13 prompts, [\d.]+ tokens/s, \d+:\d\d:\d\d left", line) for line in lines]
    assert all(shown) and list(dict.fromkeys(int(match[1]) for match in shown if match)) == [4, 8, 12, 13]
    assert last.startswith(f"{out}: 13 answers in ")


def test_progress_counts_tokens_and_estimates_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 50.0
    monkeypatch.setattr("llama.cli.complete.time.perf_counter", lambda: now)
    jobs = [Job(i, "text", length) for i, length in enumerate([300, 300, 100, 100])]
    progress = Progress(len(jobs), sum(job.work for job in jobs))
    progress.visible = True

    def shown() -> str:
        return capsys.readouterr().err.replace("\r\x1b[K", "")

    now += 0.4
    progress.show(lambda: 20)
    assert shown() == ""  # shown at most twice a second
    now += 0.1
    progress.show(lambda: 20)
    assert shown() == "0/4 prompts, 40.0 tokens/s"  # no prompt is complete, so the time left is unknown
    progress.show(lambda: 21)
    assert shown() == ""
    now += 1999.5
    progress.add(jobs[:2], 5000)
    first, rest = 2 * (300 + WORK_OF_AN_ANSWER), 2 * (100 + WORK_OF_AN_ANSWER)
    left = round(2000 * rest / first)
    assert shown() == f"2/4 prompts, 2.5 tokens/s, 0:{left // 60}:{left % 60:02} left"
    now += 4000
    progress.show(lambda: 1000)
    assert " 1.0 tokens/s, 1:15:00 left" in shown()


def test_a_text_on_a_terminal_is_made_visible_and_through_a_pipe_left_alone(
    complete: Callable[..., Ended],
    screen: Callable[[str], Callable[[], str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces = ["a\x1b[31m", "b\a", "é\n"]
    monkeypatch.setattr(
        Llama, "_pieces", lambda *_, **__: (TextPiece(0, p, "stop" if p == pieces[-1] else None) for p in pieces)
    )
    assert complete("text").out == "a\x1b[31mb\aé\n\n"
    read = screen("stdout")
    assert complete("text").status == 0
    assert read() == visible("a\x1b[31mb\aé") + "\r\n\r\n"
