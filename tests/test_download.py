"""download.sh against a server that misbehaves on purpose: with curl and wget, with md5sum, md5 and Python, and with
every bash in the environment variable BASHES (paths with colons between), `bash3.2` on PATH, and `bash`."""

import ctypes
import fcntl
import os
import pty
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from helpers.hostile_server import (
    FILES,
    HTML,
    QUERY,
    WEIGHTS,
    XML,
    Answer,
    Server,
    checklist,
    chunked,
    cut,
    flips,
    from_elsewhere,
    hold,
    ignores_range,
    mute_416,
    redirects,
    says,
    sends,
    without_length,
)
from helpers.paths import ROOT

SCRIPT = ROOT / "download.sh"
BASHES = [path for path in os.environ.get("BASHES", "").split(":") if path]
BASHES += [found for name in ("bash3.2", "bash") if (found := shutil.which(name))]
CLIENTS = [name for name in ("curl", "wget") if shutil.which(name)]
DIGESTS = [*["md5sum"] * bool(shutil.which("md5sum")), "md5", "Python"]
# All that download.sh may use besides a client and a tool for md5 sums.
TOOLS = ["bash", "cat", "dd", "dirname", "mkdir", "mktemp", "mv", "rm", "sed", "sh", "stty", "tr", "wc"]
LOCK = ".download.lock"
SHARD = "llama-2-7b/consolidated.00.pth"
WEIGHT = FILES[SHARD]
TOP = ["LICENSE", "USE_POLICY.md", "tokenizer_checklist.chk", "tokenizer.model"]

# macOS's md5: -q is for the sum alone.
MACOS_MD5 = """import hashlib, sys
*quiet, name = sys.argv[1:]
sum = hashlib.md5(open(name, "rb").read()).hexdigest()
print(sum if quiet == ["-q"] else f"MD5 ({name}) = {sum}")
"""

pytestmark = pytest.mark.skipif(not BASHES or not CLIENTS, reason="needs bash, and curl or wget")


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tools(client, digest): a folder for PATH with these programs and TOOLS only. Its sleep is short, its df reports
    1 TB on every disk."""
    made: dict[tuple[str, str], Path] = {}

    def make(client: str, digest: str) -> Path:
        if (client, digest) not in made:
            made[client, digest] = folder = tmp_path_factory.mktemp("bin")
            for name in [*TOOLS, *{client, digest}.intersection([*CLIENTS, "md5sum"])]:
                found = shutil.which(name)
                assert found, f"no {name} here"
                (folder / name).symlink_to(found)
            sleep = shutil.which("sleep")
            executable(folder / "sleep", f"#!/bin/sh\nexec {sleep} 0.02\n")
            executable(folder / "df", "#!/bin/sh\necho H\necho '/dev/a b 1000000000 1 1000000000 1% /mnt/c d'\n")
            if digest == "md5":
                executable(folder / "md5", f"#!{sys.executable}\n{MACOS_MD5}")
        return made[client, digest]

    return make


@pytest.fixture(scope="module")
def only_server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class Ended(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of stderr, else of stdout."""
        return (self.err or self.out).splitlines()[-1]


class Bench:
    """A folder for the models, and runs of download.sh. `promises` is checked after each run."""

    def __init__(self, folder: Path, server: Server, path: Path, bash: str, python: str) -> None:
        self.target = folder / "my models"
        self.server = server
        self.script = folder / "download.sh"
        self.script.write_bytes(SCRIPT.read_bytes())
        self.bash = bash
        self.environment = {
            "PATH": str(path),
            "HOME": str(folder),
            "TARGET_FOLDER": str(self.target),
            "PRESIGNED_URL": server.link,
            "PYTHON": python,
        }
        self.damage_may_stay = False  # after a test damaged a file
        self.wrong = 0
        server.reset(self.target)

    def put(self, path: str, data: bytes | None = None) -> Path:
        file = self.target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(FILES[path] if data is None else data)
        return file

    def all_but_weights(self) -> None:
        """Write every file of Llama-2-7B except its shard."""
        for path in [*TOP, "llama-2-7b/params.json", "llama-2-7b/checklist.chk"]:
            self.put(path)

    def start(self, *args: str, **more: Any) -> "subprocess.Popen[str]":
        environment = self.environment | more.pop("env", {})
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
        return subprocess.Popen(
            [self.bash, str(self.script), *args], env=environment, start_new_session=True, text=True, **streams
        )

    def finish(self, process: "subprocess.Popen[str]", stdin: str | None = None) -> Ended:
        out, err = process.communicate(stdin, timeout=60)
        ended = Ended(process.returncode, out, err)
        self.promises(ended)
        return ended

    def run(self, *args: str, stdin: str | None = None, env: dict[str, str] | None = None) -> Ended:
        stream = subprocess.DEVNULL if stdin is None else subprocess.PIPE
        return self.finish(self.start(*args, env=env or {}, stdin=stream), stdin)

    def promises(self, ended: Ended) -> None:
        """Check what holds after every run, however it ended."""
        assert "SECRET" not in ended.out + ended.err, "the link is shown"
        assert not self.server.early, "a file had its final name before it was complete"
        for file in self.target.rglob("*"):
            if file.is_file() and file.suffix != ".part" and file.name != LOCK and not self.damage_may_stay:
                path = self.path_of(file)
                if file.read_bytes() != FILES[path]:
                    self.wrong += 1
                    pytest.fail(f"{file} has its final name and wrong content\n{ended.out}{ended.err}")
        if ended.status == 0 and ended.out.startswith(("model ", "./download.sh demo ")):
            return  # of --list and --help
        how = {0: "ready: ", 1: "failed: ", 130: "stopped by Ctrl-C"}
        if ended.status >= 0:  # not killed
            assert ended.last.startswith(f"download.sh: {how[ended.status]}"), ended
            assert len(ended.err.splitlines()) <= 2, ended  # one line, after what Ctrl-C left on the screen

    def path_of(self, file: Path) -> str:
        path = str(file.relative_to(self.target))
        for ours, theirs in META_LLAMA_3.items():
            if path.startswith(f"{ours}/"):
                path = path.replace(ours, theirs)
                return file.name if file.name in ("LICENSE", "USE_POLICY") else path
        return path


META_LLAMA_3 = {
    "Meta-Llama-3-8B": "8b_pre_trained",
    "Meta-Llama-3-8B-Instruct": "8b_instruction_tuned",
    "Meta-Llama-3-70B": "70b_pre_trained",
    "Meta-Llama-3-70B-Instruct": "70b_instruction_tuned",
}


@pytest.fixture(params=BASHES)
def bench(
    request: pytest.FixtureRequest, tmp_path: Path, only_server: Server, tools: Callable[..., Path]
) -> Iterator[Callable[..., Bench]]:
    """bench(client, digest)"""

    def make(client: str = CLIENTS[0], digest: str = DIGESTS[0]) -> Bench:
        python = sys.executable if digest == "Python" else "/no/python"
        return Bench(tmp_path, only_server, tools(client, digest), request.param, python)

    yield make
    only_server.released.set()


@pytest.fixture(params=CLIENTS)
def fetching(request: pytest.FixtureRequest, bench: Callable[..., Bench]) -> Bench:
    """With curl, and with wget."""
    return bench(request.param)


# ---- what is fetched


@pytest.mark.parametrize("digest", DIGESTS)
def test_a_model_of_llama_2(bench: Callable[..., Bench], digest: str) -> None:
    first = bench(digest=digest)
    ended = first.run("13B-chat")
    assert ended.status == 0, ended
    asked = [path for path, _ in first.server.asked]
    folder = "llama-2-13b-chat"
    inside = ["checklist.chk", "params.json", "consolidated.00.pth", "consolidated.01.pth"]
    assert asked == [*TOP, *(f"{folder}/{name}" for name in inside)], "each list comes before the files that it lists"
    assert all((first.target / path).read_bytes() == FILES[path] for path in asked)
    assert ended.last == f"download.sh: ready: {first.target}/{folder}"
    assert not list(first.target.rglob("*.part"))

    again = first.run("13b-CHAT", env={"PRESIGNED_URL": ""})
    assert again.status == 0, again
    assert again.last == ended.last
    assert len(first.server.asked) == len(asked), "complete files are not fetched again, and need no link"


def test_models_of_both_generations(fetching: Bench) -> None:
    assert fetching.run("70b-CHAT").status == 0
    assert fetching.run("8B-Instruct", "Meta-Llama-3-70B").status == 0
    there = {str(file.relative_to(fetching.target)) for file in fetching.target.rglob("*") if file.is_file()}
    shards = [f"consolidated.0{i}.pth" for i in range(8)]
    expected = {*TOP, *(f"llama-2-70b-chat/{name}" for name in ["checklist.chk", "params.json", *shards])}
    small = ["LICENSE", "USE_POLICY", "checklist.chk", "params.json", "tokenizer.model"]
    expected |= {f"Meta-Llama-3-8B-Instruct/{name}" for name in [*small, shards[0]]}
    expected |= {f"Meta-Llama-3-70B/{name}" for name in [*small, *shards]}
    assert there == expected  # their bytes were compared by Bench.promises


FOLDERS = {
    "7b": ["llama-2-7b"],
    "7B-Chat,13b": ["llama-2-7b-chat", "llama-2-13b"],
    "13B-chat llama-2-13b-CHAT": ["llama-2-13b-chat"],
    "LLAMA-2-70B, 70b-chat": ["llama-2-70b", "llama-2-70b-chat"],
    "8B": ["Meta-Llama-3-8B"],
    "8b-Instruct": ["Meta-Llama-3-8B-Instruct"],
    "llama-3-70b,70B-INSTRUCT": ["Meta-Llama-3-70B", "Meta-Llama-3-70B-Instruct"],
    "Meta-Llama-3-8B": ["Meta-Llama-3-8B"],
    "Meta-Llama-2-7B,meta-13b,META-8B": ["llama-2-7b", "llama-2-13b", "Meta-Llama-3-8B"],
    "7B\r": ["llama-2-7b"],
    "llama-2": [f"llama-2-{size}{chat}" for size in ("7b", "13b", "70b") for chat in ("", "-chat")],
    "Llama-3": [f"Meta-Llama-3-{size}{tuned}" for size in ("8B", "70B") for tuned in ("", "-Instruct")],
}
REFUSED = {
    "70B": "say llama-2-70b or llama-3-70b",
    "all": "one generation",
    "7B,8B": "one generation",
    "llama-3 13b": "one generation",
    "demo,7B": "fetch it alone",
    "8B-chat": "no model '8b-chat'",
    "7B;ls": "no model '7B;ls'",
    "*": "no model '*'",
    "$(id)": "no model '$(id)'",
    ",": "no models",
    "--force": "unknown option --force",
    f"-url=https://a.b/*?{QUERY}": "unknown option -url;",
    f"--presigned-url=https://a.b/*?{QUERY}": "unknown option --presigned-url;",
    f"-uhttps://a.b/*?{QUERY}": "unknown option -uhttps;",
    f"7B,{QUERY}": "that is a link, not models",
    "--url": "--url needs the link",
}


def test_names(bench: Callable[..., Bench]) -> None:
    with_curl = bench()
    for args, folders in FOLDERS.items():
        for ended in [with_curl.run("--verify-only", args), with_curl.run("--verify-only", *args.split())]:
            named = re.findall(rf"^Comparing md5 sums in {with_curl.target}/(.*)$", ended.out, re.MULTILINE)
            assert (ended.status, named) == (1, folders), args
    ended = with_curl.run("--verify-only", "all")
    assert ended.out.count("Comparing md5 sums in") == 10 and "link" not in ended.last, ended
    ended = with_curl.run("--list", "nonsense")
    assert ended.status == 1 and "--list shows every model" in ended.last, ended
    for args, message in REFUSED.items():
        ended = with_curl.run(args)
        assert ended.status == 1 and message in ended.last, ended
    ended = with_curl.run(stdin=with_curl.server.link)
    assert ended.status == 1 and "that is a link, not models" in ended.last, ended
    assert not with_curl.server.asked
    assert not with_curl.target.exists()


# ---- the link


def test_links_as_users_copy_them(fetching: Bench) -> None:
    link = fetching.server.link
    escaped = link.replace("&", "&amp;")
    fetching.all_but_weights()

    def is_good(*args: str, url: str = "", stdin: str | None = None) -> None:
        (fetching.target / SHARD).unlink(missing_ok=True)
        ended = fetching.run(*args, env={"PRESIGNED_URL": url}, stdin=stdin)
        assert ended.status == 0, (args, url, stdin, ended)

    for copied in [f'"{link}"', f"'{escaped}'", f" \t{link} \r\n", f"<{link}>", f"{link[:90]}\r\n{link[90:]}"]:
        is_good("7B", url=copied)
    is_good("7B", "--url", f" {escaped}\r", url="https://not.this.one/*")
    is_good(f"--url={link}", "7B")
    is_good(link, "7B")
    is_good(stdin=f"7B\r\n'{escaped}' \r\n")
    is_good("7B", stdin=link)  # without a newline at its end


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("", "no link"),
        ("https://a.b/?Signature=SECRET", "holds a '*'"),
        ("*?Signature=SECRET", "starts with https://"),
        ("file:///etc/*", "starts with https://"),
        ("https://a.b/* ?Signature=SECRET", "holds a character"),
        ('https://a.b/*?Signature=SECRET"\noutput = "/tmp/x', "holds a character"),
        ("https://a.b/*?Signature=SECR\u00e9T\\", "holds a character"),
    ],
)
def test_invalid_links(bench: Callable[..., Bench], link: str, message: str) -> None:
    ended = bench().run("7B", env={"PRESIGNED_URL": link})
    assert ended.status == 1 and message in ended.last, ended


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc here")
def test_the_link_is_in_no_command_line(fetching: Bench) -> None:
    fetching.server.look_at_processes = True
    fetching.all_but_weights()
    assert fetching.run("7B").status == 0
    assert any("download.sh" in line for line in fetching.server.seen), "processes were looked at"
    assert not [line for line in fetching.server.seen if "SECRET" in line]


# ---- faults of the server in its answer for the weights, after nothing or the first half of them was fetched

HALF = WEIGHTS // 2
FAULTS_OF_FULL_ANSWERS = ["a page as bytes", "a page without a type", "XML as bytes", "empty"]
FAULTS: dict[str, tuple[list[Answer], int, str]] = {
    # answers, exit status, what the last line says
    "expired": ([says(403)], 1, "HTTP 403.*expired.*https://www.llama.com/llama-downloads/"),
    "expired after a cut": ([cut(900), says(403)], 1, "HTTP 403.*expired"),
    "not found": ([says(404)], 1, "HTTP 404"),
    "busy once": ([says(503)], 0, ""),
    "busy": ([says(503)] * 5, 1, "HTTP 503.*fifth time.*check the network"),
    "too many requests, then well": ([says(429)] * 4, 0, ""),
    "a page": ([says(200, HTML, "text/html; charset=utf-8")], 1, "web page"),
    "a page as bytes": ([says(200, HTML, "binary/octet-stream")], 1, "web page"),
    "a page without a type": ([says(200, b"\xef\xbb\xbf\r\n  " + HTML, "")], 1, "web page"),
    "a long page": ([says(200, HTML * 5000, "TEXT/HTML")], 1, "web page"),
    "XML": ([says(200, XML, "application/xml")], 1, "XML"),
    "XML as bytes": ([says(200, XML, "binary/octet-stream")], 1, "XML"),
    "a page in the way asked for": ([sends(HTML, "text/html")], 1, "web page"),
    "a page in the way asked for, as bytes": ([sends(HTML)], 1, "web page"),
    "XML after a cut": ([cut(900), sends(XML, "text/xml")], 1, "XML"),
    "nothing": ([cut(0)] * 5, 1, "fifth time.*check the network"),
    "cut thrice": ([cut(5), cut(1000), cut(30000, reset=True)], 0, ""),
    "a wrong sum once": ([flips], 0, ""),
    "a wrong sum twice": ([flips, flips], 1, f"{SHARD} came twice with another md5 sum"),
    "a wrong sum, then cuts": ([flips, cut(70), cut(700)], 0, ""),
    "other weights": ([sends(b"PK" * 9)] * 2, 1, "came twice"),
    "ranges ignored": ([ignores_range], 0, ""),
    "ranges ignored after cuts": ([cut(900), ignores_range, cut(800), ignores_range], 0, ""),
    "ranges ignored for good": ([cut(900), *[ignores_range] * 9], 0, ""),
    "from elsewhere": ([cut(100), from_elsewhere], 0, ""),
    "from elsewhere for good": ([cut(100), *[from_elsewhere] * 9], 0, ""),
    "no length": ([without_length], 0, ""),
    "no length, cut": ([chunked(4000)], 0, ""),
    "a redirect": ([redirects], 0, ""),
    "a redirect to bytes without a type": ([redirects, says(200, WEIGHT, "")], 0, ""),
    "redirects without end": ([redirects] * 200, 1, "HTTP 302"),
    "empty": ([says(200, b"", "")], 1, "empty"),
}


@pytest.mark.parametrize("half", [False, True], ids=["from nothing", "from half"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fetching: Bench, fault: str, half: bool) -> None:
    answers, status, message = FAULTS[fault]
    if (
        half and fault in FAULTS_OF_FULL_ANSWERS
    ):  # this cannot be the answer to a range, so the client fetches from the start
        status, message = 0, ""
    fetching.all_but_weights()
    part = fetching.target / f"{SHARD}.part"
    if half:
        part.write_bytes(WEIGHT[:HALF])
    fetching.server.faults[SHARD] = list(answers)
    ended = fetching.run("7B")
    assert ended.status == status, ended
    assert re.search(message, ended.last), ended
    if not re.search("for good|without end|ignored after cuts", fault):
        assert not fetching.server.faults[SHARD], "each fault was used"
    if status and len(answers) == 1:
        assert len(fetching.server.starts(SHARD)) == 1, "it stops at once"
    if part.exists():
        assert WEIGHT.startswith(part.read_bytes()), "the partial file is a beginning of the file"
    if half and status and "twice" not in message:
        assert part.stat().st_size >= HALF, "the first half is kept"
    if "fifth time" in ended.last:
        assert ("the bytes so far are kept" in ended.last) == (part.stat().st_size > 0)

    if status:
        fetching.server.faults.clear()
        assert fetching.run("7B").status == 0
    assert (fetching.target / SHARD).read_bytes() == WEIGHT


# Files of earlier runs


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        (WEIGHT, [WEIGHTS + 4]),  # whole, only the name is missing: 416
        (WEIGHT[:-1] + b"?", [WEIGHTS + 4, None]),  # whole, with another sum
        (WEIGHT + b"?", [WEIGHTS + 5, None]),  # longer than the file
        (WEIGHT[:HALF] + b"?" * HALF, [2 * HALF, None]),
        (HTML + WEIGHT[:HALF], [None]),  # a page, saved as weights by another program
        (XML, [None]),
        (b"", [None]),
    ],
)
@pytest.mark.parametrize("mute", [False, True], ids=["416 with the length", "416 without"])
def test_partial_files(fetching: Bench, there: bytes, asked: list[int | None], mute: bool) -> None:
    fetching.all_but_weights()
    fetching.put(f"{SHARD}.part", there)
    if mute and len(there) >= len(WEIGHT):
        fetching.server.faults[SHARD] = [mute_416]
    ended = fetching.run("7B")
    assert ended.status == 0, ended
    assert fetching.server.starts(SHARD) == asked


def test_damaged_files_with_final_names(fetching: Bench) -> None:
    """As other programs leave it: cut off, a page, or with a flipped bit."""
    fetching.all_but_weights()
    for damaged, asked in [(WEIGHT[:HALF], [HALF]), (HTML, [None]), (WEIGHT[:-1] + b"?", [len(WEIGHT), None])]:
        fetching.put(SHARD, damaged)
        fetching.server.asked.clear()
        ended = fetching.run("7B")
        assert ended.status == 0, ended
        assert f"{SHARD} does not have" in ended.out or f"{SHARD} is a web page" in ended.out
        assert fetching.server.starts(SHARD) == asked

    fetching.put("llama-2-7b/checklist.chk", checklist({"consolidated.00.pth": b"?"}))
    fetching.put("LICENSE", HTML)
    fetching.put("tokenizer.model", b"")
    fetching.server.asked.clear()
    assert fetching.run("7B").status == 0
    assert fetching.server.starts("LICENSE") == fetching.server.starts("tokenizer.model") == [None]
    assert not fetching.server.starts(SHARD), "the list was wrong, not the weights"


@pytest.mark.parametrize("name", ["LICENSE", "llama-2-7b/checklist.chk"])
def test_files_without_a_sum(fetching: Bench, name: str) -> None:
    """Only their length can be checked, so they are always fetched from the start."""
    fetching.all_but_weights()
    fetching.put(SHARD)
    clumsy: list[list[Answer]] = [[cut(7), cut(9, reset=True)], [chunked(7)], [without_length], [redirects]]
    for answers in clumsy:
        (fetching.target / name).unlink()
        fetching.put(f"{name}.part", b"what another run left")
        fetching.server.asked.clear()
        fetching.server.faults[name] = list(answers)
        ended = fetching.run("7B")
        assert ended.status == 0, ended
        assert set(fetching.server.starts(name)) == {None}
        assert not fetching.server.faults[name]
    for answer, message in [
        (says(200, HTML, "text/html"), "web page"),
        (says(200, XML, "text/plain"), "XML"),
        (says(200, b"", "text/plain"), "is empty"),
        (says(403), "HTTP 403"),
    ]:
        (fetching.target / name).unlink(missing_ok=True)
        fetching.server.faults[name] = [answer]
        ended = fetching.run("7B")
        assert ended.status == 1 and message in ended.last and name in ended.last, ended
        assert not (fetching.target / name).exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"Not Found\n", "not a list of md5 sums"),
        (b"\n\n", "not a list of md5 sums"),
        (b"d41d8cd98f00b204e9800998ecf8427  consolidated.00.pth\n", "not a list of md5 sums"),
        (b"d41d8cd98f00b204e9800998ecf8427e  ../consolidated.00.pth\n", "not a list of md5 sums"),
        (b"d41d8cd98f00b204e9800998ecf8427e\n", "not a list of md5 sums"),
        (checklist({"params.json": FILES["llama-2-7b/params.json"]}), "does not name consolidated.00.pth"),
    ],
)
def test_useless_lists(bench: Callable[..., Bench], text: bytes, message: str) -> None:
    with_curl = bench()
    with_curl.all_but_weights()
    (with_curl.target / "llama-2-7b/checklist.chk").unlink()
    with_curl.damage_may_stay = True  # a valid list that lacks a name
    with_curl.server.faults["llama-2-7b/checklist.chk"] = [says(200, text, "text/plain")]
    ended = with_curl.run("7B")
    assert ended.status == 1 and message in ended.last, ended
    assert not with_curl.server.starts(SHARD)
    with_curl.damage_may_stay = False
    assert with_curl.run("7B").status == 0


def test_a_list_of_the_weights_alone(fetching: Bench) -> None:
    """A file that it does not name is complete if its length is right."""
    metas = "8b_pre_trained/checklist.chk"
    fetching.damage_may_stay = True  # the list differs from the one in FILES
    short = checklist({"consolidated.00.pth": FILES["8b_pre_trained/consolidated.00.pth"]})
    fetching.server.faults[metas] = [says(200, short, "text/plain")] * 2
    fetching.server.faults["8b_pre_trained/tokenizer.model"] = [cut(4), sends(HTML)]
    ended = fetching.run("8B")
    assert ended.status == 1 and "web page" in ended.last, ended
    fetching.server.faults["8b_pre_trained/tokenizer.model"] = [cut(4)]
    assert fetching.run("8B").status == 0
    for name in ("tokenizer.model", "params.json", "consolidated.00.pth"):
        assert (fetching.target / "Meta-Llama-3-8B" / name).read_bytes() == FILES[f"8b_pre_trained/{name}"]


def test_lists_in_other_layouts(bench: Callable[..., Bench]) -> None:
    with_curl = bench()
    name = "llama-2-7b/checklist.chk"
    metas = FILES[name]
    for text in [
        metas.replace(b"\n", b"\r\n"),
        metas.replace(b"  ", b" *"),
        metas.replace(b"  ", b" ./"),
        metas.replace(b"\n", b"\n\n"),
        metas[:-1],
    ]:
        with_curl.all_but_weights()
        (with_curl.target / SHARD).unlink(missing_ok=True)
        (with_curl.target / name).unlink()
        with_curl.damage_may_stay = True  # the list differs from the one in FILES
        with_curl.server.faults[name] = [says(200, text, "text/plain")]
        ended = with_curl.run("7B")
        assert ended.status == 0, ended
        assert (with_curl.target / SHARD).read_bytes() == WEIGHT


# ---- cuts


@pytest.mark.slow
def test_a_hundred_cuts(fetching: Bench, measured: Callable[[str, object], None]) -> None:
    """Cuts at random bytes: the server closes or resets the connection, or the test sends SIGKILL or Ctrl-C. The next
    run continues. In the end the file is correct, and it never has its final name before.
    """
    draw = random.Random(2026)
    fetching.all_but_weights()
    server, final = fetching.server, fetching.target / SHARD
    ways = ["close"] * 50 + ["reset"] * 30 + ["kill"] * 10 + ["Ctrl-C"] * 10
    draw.shuffle(ways)
    lengths = [draw.randrange(1, WEIGHTS // 60) for _ in ways]
    assert sum(lengths) < WEIGHTS
    runs = 0
    faults = server.faults[SHARD] = [
        hold(length) if way in ("kill", "Ctrl-C") else cut(length, reset=way == "reset")
        for way, length in zip(ways, lengths, strict=True)
    ]
    while not final.exists():
        runs += 1
        assert runs <= 60, "it never finishes"
        process = fetching.start("7B")
        while process.poll() is None:
            if server.held.wait(0.02):
                server.held.clear()
                time.sleep(0.02)  # until the client has written it
                way = ways[len(ways) - len(faults) - 1]
                os.killpg(process.pid, signal.SIGKILL if way == "kill" else signal.SIGINT)
                break
        ended = fetching.finish(process)
        assert ended.status in (0, 1, 130, -signal.SIGKILL), ended
        part = fetching.target / f"{SHARD}.part"
        assert not part.exists() or WEIGHT.startswith(part.read_bytes())
    assert server.cuts == 100 and not faults
    assert final.read_bytes() == WEIGHT
    client = "curl" if (Path(fetching.environment["PATH"]) / "curl").exists() else "wget"
    measured(f"download.sh with {client}: cuts survived", f"{server.cuts} in {runs} runs")
    measured(f"download.sh with {client}: bytes wrongly accepted", fetching.wrong)


def test_two_at_once(fetching: Bench) -> None:
    fetching.all_but_weights()
    fetching.server.faults[SHARD] = [hold(HALF)]
    first = fetching.start("7B")
    assert fetching.server.held.wait(30)
    second = fetching.run("7B")
    assert second.status == 1 and f"process {first.pid} is fetching into" in second.last, second
    fetching.server.released.set()
    assert fetching.finish(first).status == 0
    assert not os.path.lexists(fetching.target / LOCK)


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_script_alone_is_killed(fetching: Bench, how: signal.Signals) -> None:
    """Without the script, its client would continue to write to a file that another run appends to."""
    fetching.all_but_weights()
    fetching.put(f"{SHARD}.part", WEIGHT[:HALF])
    fetching.server.faults[SHARD] = [hold(1000)]
    first = fetching.start("7B", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert fetching.server.held.wait(30)
    first.send_signal(how)
    assert first.wait(30) == -how
    if how == signal.SIGKILL:
        second = fetching.run("7B")
        assert second.status == 1 and "is fetching into" in second.last, second
        assert len(fetching.server.starts(SHARD)) == 1
        fetching.server.released.set()  # now the client continues
    limit = time.monotonic() + 20
    while not group_is_gone(first.pid) and time.monotonic() < limit:
        time.sleep(0.01)
    assert fetching.run("7B").status == 0, "a lock without a living process does not hold"
    assert (fetching.target / SHARD).read_bytes() == WEIGHT
    assert not (fetching.target / LOCK).exists()


def with_lock(bench: Bench, text: str, **more: Any) -> Ended:
    """A run that finds this lock. In `text`, $$ is the process of the run itself."""
    bench.all_but_weights()
    (bench.target / SHARD).unlink(missing_ok=True)
    lock = bench.target / LOCK
    command = f'echo "{text}" > "{lock}"; exec "{bench.bash}" "{bench.script}" 7B'
    run = subprocess.run(
        [bench.bash, "-c", command], env=bench.environment, capture_output=True, text=True, timeout=60, **more
    )
    ended = Ended(run.returncode, run.stdout, run.stderr)
    assert lock.exists() == (ended.status != 0), "a lock that holds is kept"
    lock.unlink(missing_ok=True)
    bench.promises(ended)
    return ended


def test_locks_that_were_left(bench: Callable[..., Bench]) -> None:
    with_curl = bench()
    with subprocess.Popen(["true"]) as gone:
        pass
    for text in ["$$ $HOSTNAME", f"{gone.pid} $HOSTNAME\n{gone.pid}", "$$ $HOSTNAME\n$$"]:
        ended = with_lock(with_curl, text)
        assert ended.status == 0, (text, ended)
    for text, message in [
        ("$$ another.host", "on the machine another.host fetches"),
        ("", "remove "),
        (f"{gone.pid} $HOSTNAME\n{os.getpid()}", f"process {os.getpid()} is fetching"),
    ]:
        ended = with_lock(with_curl, text)
        assert ended.status == 1 and message in ended.last and LOCK in ended.last, (text, ended)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux to drop a capability")
def test_the_lock_of_another_user(bench: Callable[..., Bench]) -> None:
    """We may not send signals to that user's processes, but they run."""
    if os.geteuid():
        ended = with_lock(bench(), "1 $HOSTNAME")
        assert ended.status == 1 and "process 1 is fetching" in ended.last, ended
        return
    cap_kill, drop = 5, 24  # CAP_KILL, PR_CAPBSET_DROP
    libc = ctypes.CDLL(None)
    with subprocess.Popen(["sleep", "60"], user=65534) as other:
        ended = with_lock(bench(), f"{other.pid} $HOSTNAME", preexec_fn=lambda: libc.prctl(drop, cap_kill, 0, 0, 0))
        other.kill()
    assert ended.status == 1 and f"process {other.pid} is fetching" in ended.last, ended


# Fetches and converts nothing; waits at the download while there is a file "hold".
DEMOS_PYTHON = """import hashlib, os, sys, time
here, args = os.path.dirname(sys.argv[0]), sys.argv[1:]
if args[:2] == ["-m", "pip"]:
    open(args[args.index("-d") + 1] + "/a.whl", "w").close()
    while os.path.exists(here + "/hold"):
        time.sleep(0.01)
elif args[:2] == ["-m", "llama"]:
    os.mkdir(args[4])
    sums = ""
    for name in ["params.json", "tokenizer.json", "tokenizer_config.json", "consolidated.00.pth"]:
        open(f"{args[4]}/{name}", "w").write(name)
        sums += f"{hashlib.md5(name.encode()).hexdigest()}  {name}\\n"
    open(args[4] + "/checklist.chk", "w").write(sums)
elif "zipfile" in args[1]:
    open(args[4], "w").close()
elif "hashlib" in args[1]:
    print("WHEEL" if args[3].endswith(".whl") else "GGUF")
"""


def test_two_demos_at_once(bench: Callable[..., Bench], tmp_path: Path) -> None:
    """Two at once, one on a full disk, and one after another that was killed."""
    with_curl = bench()
    wheel, gguf = re.findall("_sum=([0-9a-f]{64})", SCRIPT.read_text())
    text = DEMOS_PYTHON.replace("WHEEL", wheel).replace("GGUF", gguf)
    python, path, checkpoints = tmp_path / "python", with_curl.environment["PATH"], tmp_path / "checkpoints"
    executable(python, f"#!{sys.executable}\n{text}")
    with_curl.environment["PYTHON"] = str(python)
    (tmp_path / "full").mkdir()
    executable(tmp_path / "full/df", "#!/bin/sh\necho H\necho '/dev/a 9 1 300000 99% /'\n")
    ended = with_curl.run("demo", env={"PATH": f"{tmp_path}/full:{path}"})
    assert ended.status == 1 and "0.4 GB are still needed, 0.3 GB are free in checkpoints" in ended.last, ended

    (checkpoints / ".demo.killed").mkdir()
    hold_it = tmp_path / "hold"
    hold_it.touch()
    first = with_curl.start("demo")
    limit = time.monotonic() + 30
    while not list(checkpoints.glob(".demo.*/a.whl")) and time.monotonic() < limit:
        time.sleep(0.01)
    ended = with_curl.run("demo")
    assert ended.status == 1 and f"process {first.pid} is fetching into checkpoints" in ended.last, ended
    hold_it.unlink()
    ended = with_curl.finish(first)
    assert ended.status == 0, ended
    ended = with_curl.run("demo")
    assert ended.status == 0 and ended.last.endswith("is complete"), ended
    there = {"smollm2-135m-instruct", "smollm2-135m-instruct.gguf"}
    assert {file.name for file in checkpoints.iterdir()} == there, "nothing is left over"


def test_ctrl_c(fetching: Bench) -> None:
    fetching.all_but_weights()
    fetching.server.faults[SHARD] = [hold(HALF)]
    process = fetching.start("7B")
    assert fetching.server.held.wait(30)
    part = fetching.target / f"{SHARD}.part"
    while not part.stat().st_size:  # until the client has written it
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    ended = fetching.finish(process)
    assert ended.status == 130 and ended.last.startswith("download.sh: stopped by Ctrl-C"), ended
    assert group_is_gone(process.pid), "no client is left"
    assert not (fetching.target / SHARD).exists()
    assert fetching.run("7B").status == 0
    assert fetching.server.starts(SHARD) != [None, None], "it continued where it stopped"


def on_a_terminal(
    bench: Bench, steps: list[tuple[str, bytes | Callable[[], None]]], *args: str, sigint_ignored: bool = False
) -> tuple[int, str]:
    """Run download.sh on a terminal. Returns its status and its output.

    Each step waits for a text after that of the previous step, and then types bytes or calls a function. At the end
    the terminal must echo again.
    """
    ours, theirs = pty.openpty()

    def prepare() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        if sigint_ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def shows() -> str:
        ready = select.select([ours], [], [], 0.05)[0]
        return os.read(ours, 65536).decode("utf-8", "replace") if ready else ""

    process = bench.start(
        *args,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=prepare,
    )
    shown, new, limit = "", "", time.monotonic() + 30
    while process.poll() is None and time.monotonic() < limit:
        more = shows()
        shown, new = shown + more, new + more
        if steps and steps[0][0] in new:
            new = new.partition(steps[0][0])[2]
            _, then = steps.pop(0)
            time.sleep(0.5)  # like a user: between a question and its `read`, bash ignores Ctrl-C
            if callable(then):
                then()
            else:
                os.write(ours, then)
    status = process.wait(5)
    while more := shows():
        shown += more
    assert termios.tcgetattr(theirs)[3] & termios.ECHO, "echo is still off"
    os.close(ours)
    os.close(theirs)
    assert not steps, shown
    assert "SECRET" not in shown
    return status, shown


def test_on_a_terminal(fetching: Bench) -> None:
    fetching.environment["PRESIGNED_URL"] = ""
    fetching.all_but_weights()
    server = fetching.server
    question = ("Models, such as", b"7b\r")
    link = ("Link from Meta's e-mail (it will not show): ", f"'{server.link}' \r".encode())

    status, shown = on_a_terminal(fetching, [question, (link[0], b"\x03")])
    assert status == 130 and shown.splitlines()[-1].startswith("download.sh: stopped"), shown

    status, shown = on_a_terminal(fetching, [question, (link[0], b"\x04")])
    assert status == 1 and "no link" in shown.splitlines()[-1], shown

    server.faults[SHARD] = [hold(HALF)]
    status, shown = on_a_terminal(fetching, [question, link, ("0.0 of 13.5 GB", b"\x03")])
    assert status == 130 and shown.splitlines()[-1].startswith("download.sh: stopped"), shown

    server.faults[SHARD] = [hold(100)]
    status, shown = on_a_terminal(fetching, [question, link, ("0.0 of 13.5 GB", server.released.set)])
    assert status == 0 and shown.splitlines()[-1].startswith("\x1b[Kdownload.sh: ready"), shown


@pytest.mark.parametrize("tool", ["env", "perl", "python3"])
def test_ctrl_c_where_sigint_was_ignored(bench: Callable[..., Bench], tmp_path: Path, tool: str) -> None:
    """On a terminal the script resets it with whichever tool is installed, and keeps its arguments and process."""
    with_tool = bench()
    found = sys.executable if tool == "python3" else shutil.which(tool)
    probe = [str(found), "--default-signal=INT", "true"]
    if not found or (tool == "env" and subprocess.run(probe, capture_output=True).returncode):
        pytest.skip(f"no {tool} that can do it")
    executable_path = tmp_path / "reset"
    executable_path.mkdir()
    executable(executable_path / tool, f'#!/bin/sh\nexec {found} "$@"\n')
    (executable_path / "true").symlink_to(shutil.which("true") or "true")
    with_tool.environment["PATH"] = f"{executable_path}:{with_tool.environment['PATH']}"
    with_tool.all_but_weights()
    with_tool.server.faults[SHARD] = [hold(HALF)]
    steps: list[tuple[str, bytes | Callable[[], None]]] = [("0.0 of 13.5 GB", b"\x03")]
    status, shown = on_a_terminal(with_tool, steps, "7B", sigint_ignored=True)
    assert status == 130 and shown.splitlines()[-1].startswith("download.sh: stopped"), shown
    assert not os.path.lexists(with_tool.target / LOCK)


def test_ctrl_c_stays_ignored_without_a_terminal(fetching: Bench, tmp_path: Path) -> None:
    fetching.all_but_weights()
    fetching.server.faults[SHARD] = [hold(HALF)]
    process = fetching.start("7B", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert fetching.server.held.wait(30)
    os.killpg(process.pid, signal.SIGINT)
    fetching.server.released.set()
    assert fetching.finish(process).status == 0


# ---- disks


def test_too_little_space_is_reported_first(bench: Callable[..., Bench], tmp_path: Path) -> None:
    with_curl = bench()
    df = tmp_path / "bin"
    df.mkdir()
    with_curl.environment["PATH"] = f"{df}:{with_curl.environment['PATH']}"
    # as macOS and Linux write it, with names of several words
    executable(df / "df", "#!/bin/sh\necho Filesystem\necho '//me@nas/My Disk 99999999 7 20000000 50% /My Disk 2'\n")
    ended = with_curl.run("7B", "13B")
    assert ended.status == 1 and len(ended.err.splitlines()) == 1, ended
    assert "39.5 GB are still needed, 20.5 GB are free in" in ended.last and "TARGET_FOLDER=" in ended.last
    assert not with_curl.server.asked

    (with_curl.put("llama-2-7b/consolidated.00.pth.part", b"")).open("r+b").truncate(10 * 10**9)
    with_curl.put("llama-2-13b/consolidated.00.pth.part", b"").open("r+b").truncate(10 * 10**9)
    ended = with_curl.run("7B,13B", env={"PRESIGNED_URL": "no link"})
    assert "19.5 GB needed, 20.5 GB free" in ended.out, "partial files count"

    executable(df / "df", "#!/bin/sh\necho nothing that anyone understands\n")
    ended = with_curl.run("7B")
    assert ended.status == 1 and "df does not report" in ended.last, ended


def test_the_disk_of_this_machine(bench: Callable[..., Bench]) -> None:
    with_curl = bench()
    path, df = with_curl.script.parent / "bin", shutil.which("df")
    assert df
    path.mkdir()
    (path / "df").symlink_to(df)
    with_curl.environment["PATH"] = f"{path}:{with_curl.environment['PATH']}"
    ended = with_curl.run("7B", env={"PRESIGNED_URL": "no link"})
    free = re.search(r"([0-9.]+) GB (are )?free in", ended.out + ended.err)
    assert free and abs(float(free[1]) * 1e9 - shutil.disk_usage(path).free) < 2e9, ended


def test_a_full_disk(fetching: Bench) -> None:
    """df reported enough space, then something else filled the disk."""
    fetching.target.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(fetching.target)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        fetching.all_but_weights()
        for _ in range(2):
            ended = fetching.run("7B")
            assert ended.status == 1 and "is the disk full?" in ended.last, ended
            part = (fetching.target / f"{SHARD}.part").read_bytes()
            assert part and WEIGHT.startswith(part)
        subprocess.run(["mount", "-o", "remount,size=1m", str(fetching.target)], check=True)
        fetching.server.asked.clear()
        assert fetching.run("7B").status == 0
        assert fetching.server.starts(SHARD) == [len(part)]
    finally:
        subprocess.run(["umount", str(fetching.target)], check=True)


def test_places_that_cannot_be_written(bench: Callable[..., Bench]) -> None:
    with_curl = bench()
    (with_curl.target / SHARD).mkdir(parents=True)
    ended = with_curl.run("7B")
    assert ended.status == 1 and f"{SHARD} is a folder" in ended.last, ended
    shutil.rmtree(with_curl.target)
    with_curl.target.write_text("a file")
    ended = with_curl.run("7B")
    assert ended.status == 1 and "name another" in ended.last, ended
    with_curl.target.unlink()


# ---- networks and machines


def test_nobody_answers(fetching: Bench) -> None:
    fetching.all_but_weights()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        link = f"http://127.0.0.1:{closed.getsockname()[1]}/*?{QUERY}"
        ended = fetching.run("7B", env={"PRESIGNED_URL": link})
    assert ended.status == 1 and re.search("no answer from the server.*fifth time.*check the network", ended.last), (
        ended
    )


@pytest.mark.skipif("curl" not in CLIENTS, reason="needs curl")
def test_no_secure_connection(bench: Callable[..., Bench]) -> None:
    with_curl = bench("curl")
    ended = with_curl.run("7B", env={"PRESIGNED_URL": with_curl.server.link.replace("http:", "https:")})
    assert ended.status == 1 and "LICENSE: no secure connection" in ended.last, ended


def test_a_server_that_stalls(fetching: Bench) -> None:
    """The clients' limit of 60 s, shortened to 1."""
    client = "curl" if (Path(fetching.environment["PATH"]) / "curl").exists() else "wget"
    shorter = fetching.script.parent / "shorter"
    shorter.mkdir()
    executable(
        shorter / client,
        f'#!{fetching.bash}\nset -- "${{@/#60/1}}"\nexec {shutil.which(client)} "${{@/#--timeout=60/--timeout=1}}"\n',
    )
    fetching.environment["PATH"] = f"{shorter}:{fetching.environment['PATH']}"
    fetching.all_but_weights()
    fetching.server.faults[SHARD] = [hold(HALF)]
    ended = fetching.run("7B")
    assert ended.status == 0, ended
    assert len(fetching.server.starts(SHARD)) == 2, "it did not wait forever"


@pytest.mark.skipif("curl" not in CLIENTS, reason="needs curl")
def test_behind_a_proxy(bench: Callable[..., Bench]) -> None:
    """The proxy's answer to CONNECT comes before the server's."""
    with_curl = bench("curl")
    with_curl.all_but_weights()
    proxy = f"http://127.0.0.1:{with_curl.server.server_port}"
    (with_curl.script.parent / ".curlrc").write_text(f'proxytunnel\nproxy = "{proxy}"\nnoproxy = ""\n')
    with_curl.server.faults[SHARD] = [cut(HALF), says(403)]
    assert "HTTP 403" in with_curl.run("7B").last
    assert with_curl.run("7B").status == 0
    assert with_curl.server.connected == len(with_curl.server.asked)
    assert with_curl.server.starts(SHARD) == [None, HALF, HALF]


def test_without_a_client(bench: Callable[..., Bench]) -> None:
    without = bench("neither")
    asks_too_much = "#!/bin/sh\necho 'BusyBox v1.35.0 multi-call binary: wget [-cqS] [-O FILE] URL'\n"
    for wget in ["", asks_too_much]:
        if wget:
            executable(without.script.parent / "wget", wget)
            without.environment["PATH"] += f":{without.script.parent}"
        ended = without.run("7B")
        assert ended.status == 1 and "neither curl nor GNU wget" in ended.last, ended


def test_busybox(bench: Callable[..., Bench]) -> None:
    """Its dd lacks conv=lcase; web pages are detected all the same."""
    with_curl = bench()
    folder = with_curl.script.parent / "busybox"
    folder.mkdir()
    dd = shutil.which("dd")
    executable(folder / "dd", f'#!{with_curl.bash}\n[[ "$*" != *conv=* ]] && exec {dd} "$@"\n')
    with_curl.environment["PATH"] = f"{folder}:{with_curl.environment['PATH']}"
    with_curl.all_but_weights()
    with_curl.server.faults[SHARD] = [sends(HTML)]
    ended = with_curl.run("7B")
    assert ended.status == 1 and "web page" in ended.last, ended


@pytest.mark.skipif(not shutil.which("dash"), reason="needs dash")
def test_another_shell(bench: Callable[..., Bench]) -> None:
    with_curl = bench()
    with_curl.bash = shutil.which("dash") or ""
    ended = with_curl.run("--help")
    assert ended.status == 1 and "it needs bash: bash " in ended.last, ended


def test_folders_are_relative_to_the_caller(bench: Callable[..., Bench], tmp_path: Path) -> None:
    """Also a folder with the default's name, PYTHON, and with CDPATH, which changes where cd goes."""
    with_python = bench(digest="Python")
    with_python.all_but_weights()
    caller = tmp_path / "caller"
    (caller / "bin").mkdir(parents=True)
    (tmp_path / "elsewhere" / tmp_path.name).mkdir(parents=True)
    executable(caller / "bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    environment = {"PYTHON": "bin/python", "CDPATH": str(tmp_path / "elsewhere")}
    for given in ["checkpoints", "./models", "../caller/models"]:
        with_python.target = (caller / given).resolve()
        with_python.all_but_weights()
        with_python.put(SHARD)
        process = with_python.start("--verify-only", "7B", cwd=caller, env=environment | {"TARGET_FOLDER": given})
        ended = with_python.finish(process)
        assert ended.status == 0, ended
    with_python.script = Path(os.path.relpath(with_python.script, tmp_path.parent))
    process = with_python.start("--list", cwd=tmp_path.parent, env=environment | {"TARGET_FOLDER": ""})
    ended = with_python.finish(process)
    assert ended.status == 0 and " checkpoints/llama-2-7b " in ended.out and "there" not in ended.out, ended


def test_without_any_tool_for_sums(bench: Callable[..., Bench]) -> None:
    without = bench(digest="none")
    ended = without.run("7B")
    assert ended.status == 1 and "none of md5sum, md5 and /no/python works here" in ended.err, ended


# ---- --list and --verify-only


def test_list(bench: Callable[..., Bench]) -> None:
    with_curl = bench()
    with_curl.all_but_weights()
    with_curl.put(f"{SHARD}.part", b"").open("r+b").truncate(5 * 10**9)
    for path in FILES:
        if path.startswith("llama-2-13b/"):
            with_curl.put(path)
    ended = with_curl.run("--list")
    assert ended.status == 0 and not ended.err
    rows = {line.split()[0]: re.split("  +", line) for line in ended.out.splitlines()[1:]}
    sizes = {name: float(row[1]) for name, row in rows.items()}
    published = {"7b": 13.5, "13b": 26.0, "70b": 138}
    for size, gigabytes in published.items():
        assert sizes[f"llama-2-{size}"] == sizes[f"llama-2-{size}-chat"] == pytest.approx(gigabytes, abs=0.05)
    for size, gigabytes in {"8b": 16.1, "70b": 141}.items():
        assert sizes[f"llama-3-{size}"] == sizes[f"llama-3-{size}-instruct"] == pytest.approx(gigabytes, abs=0.15)
    assert rows["demo"][2] == "checkpoints/smollm2-135m-instruct"
    assert rows["llama-3-8b-instruct"][2:] == [f"{with_curl.target}/Meta-Llama-3-8B-Instruct", "-"]
    assert rows["llama-2-7b"][3] == "5.0 GB are there"
    assert rows["llama-2-13b"][3].startswith("there")
    assert len(rows) == 11 and not with_curl.server.asked


def test_verify_only(bench: Callable[..., Bench]) -> None:
    with_curl = bench()
    ended = with_curl.run("--verify-only")
    assert ended.status == 1 and "no model is in" in ended.last
    folder = "llama-2-13b"
    paths = [*TOP, *(path for path in FILES if path.startswith(f"{folder}/"))]
    for path in paths:
        with_curl.put(path)
    ended = with_curl.run("--verify-only")
    assert ended.status == 0 and ended.last.endswith(folder), ended

    shard = f"{folder}/consolidated.01.pth"
    with_curl.damage_may_stay = True
    damages: dict[str, tuple[bytes | None, str]] = {
        shard: (FILES[shard][:-1] + b"?", "does not have the md5 sum in"),
        f"{folder}/consolidated.00.pth": (None, "is incomplete: 5 bytes are in"),
        f"{folder}/params.json": (b"", "is empty"),
        "LICENSE": (HTML, "is a web page"),
        "USE_POLICY.md": (None, "is missing"),
        "tokenizer.model": (FILES["tokenizer.model"][1:], "does not have the md5 sum in"),
        "tokenizer_checklist.chk": (b"404", "is not a list of md5 sums"),
    }
    with_curl.put(f"{folder}/consolidated.00.pth.part", b"PK\3\4.")
    faults = 0
    for path, (damaged, message) in damages.items():
        if damaged is None:
            (with_curl.target / path).unlink()
        else:
            with_curl.put(path, damaged)
        faults += (
            path != "tokenizer_checklist.chk"
        )  # its fault replaces the tokenizer's: without a list there is no sum
        ended = with_curl.run("--verify-only", "13B")
        lines = ended.out.splitlines()[1:]
        assert ended.status == 1 and len(lines) == faults, ended
        assert [line for line in lines if line.startswith(f"{with_curl.target / path} {message}")], (path, lines)
        assert ended.last.endswith("./download.sh llama-2-13b")
    assert not with_curl.server.asked

    with_curl.damage_may_stay = False
    assert with_curl.run("13B").status == 0
    assert with_curl.run("--verify-only", "13b").status == 0


def test_help(bench: Callable[..., Bench]) -> None:
    with_curl = bench()
    for word in ("--help", "-h"):
        ended = with_curl.run(word)
        assert ended.status == 0 and not ended.err
        for expected in ["demo", "--url", "--list", "--verify-only", "PRESIGNED_URL", "TARGET_FOLDER", "130"]:
            assert expected in ended.out
        for name in {name for names in FOLDERS for name in re.split(r"[\s,]+", names.lower())}:
            if "ama" in name or "meta" in name:
                continue
            assert re.search(rf"\b{name}\b", ended.out, re.IGNORECASE), name


# ---- the script


def test_bash_3_2_is_tested() -> None:
    versions = [
        subprocess.run([bash, "-c", "echo $BASH_VERSION"], capture_output=True, text=True).stdout for bash in BASHES
    ]
    if not any(version.startswith("3.2") for version in versions):
        pytest.skip(
            f"all of this ran with bash {', '.join(versions).strip()} only: put bash3.2 on PATH or name it in BASHES"
        )
