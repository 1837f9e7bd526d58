"""A server for download.sh with Meta's files, which misbehaves as a test specifies.

`Server.faults[path]` is a list of answers, one for each request for that path. Later requests get the correct answer.
"""

import random
import re
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Callable
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

QUERY = "Policy=eyJTdGF0_SECRET~__&Signature=Gt7-SECRET~k_&Key-Pair-Id=K15SECRET&Download-Request-ID=42SECRET"
HTML = b"<!DOCTYPE html>\n<html><body>Please log in</body></html>\n"
XML = b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>\n'
WEIGHTS = 100_000  # approximate bytes of a shard


def checklist(files: dict[str, bytes]) -> bytes:
    return "".join(f"{md5(data).hexdigest()}  {name}\n" for name, data in files.items()).encode()


def metas_files() -> dict[str, bytes]:
    """Path below the link -> content, for Llama 2 and Llama 3. All files differ."""
    draw = random.Random(7)
    files = {
        "LICENSE": b"LLAMA COMMUNITY LICENSE AGREEMENT\n",
        "USE_POLICY.md": b"# Llama 2 Acceptable Use Policy\n",
        "USE_POLICY": b"Llama 3 Acceptable Use Policy\n",
        "tokenizer.model": b"\n" + draw.randbytes(3000),
    }
    files["tokenizer_checklist.chk"] = checklist({"tokenizer.model": files["tokenizer.model"]})
    sizes, kinds = [("7b", 1), ("13b", 2), ("70b", 8)], ("pre_trained", "instruction_tuned")
    llama2 = {f"llama-2-{size}{chat}": shards for size, shards in sizes for chat in ("", "-chat")}
    llama3 = {f"{size}_{kind}": shards for size, shards in [("8b", 1), ("70b", 8)] for kind in kinds}
    for folder, shards in (llama2 | llama3).items():
        inside = {f"consolidated.{i:02d}.pth": b"PK\3\4" + draw.randbytes(WEIGHTS + i) for i in range(shards)}
        inside["params.json"] = b'{"dim": %d}' % len(files)
        if folder in llama3:
            inside["tokenizer.model"] = b"IQ== 0\n" + folder.encode()
        inside["checklist.chk"] = checklist(inside)
        files |= {f"{folder}/{name}": data for name, data in inside.items()}
    return files


FILES = metas_files()


class Request(BaseHTTPRequestHandler):
    server: "Server"
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_CONNECT(self) -> None:  # we are also the proxy: after this answer the client talks to the server
        self.server.connected += 1
        self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        path = re.sub("^(http://[^/]*)?/(elsewhere/)*", "", path)
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.start = int(start[1]) if start else None
        self.server.saw(path, self.start)
        if query != QUERY:
            return self.answer(XML, 403, "application/xml")
        waiting = self.server.faults[path]
        (waiting.pop(0) if waiting else whole)(self, self.server.files.get(path, b""))

    def answer(
        self, body: bytes, status: int = 200, type: str = "binary/octet-stream", /, send: int | None = None, **more: str
    ) -> None:
        """Send the headers and the first `send` bytes of the body, by default all of it."""
        self.send_response(status)
        headers = {"Content-Type": type, "Content-Length": str(len(body))} | {
            name.replace("_", "-"): value for name, value in more.items()
        }
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:send])
        self.wfile.flush()
        if send is not None or not headers["Content-Length"]:
            self.close_connection = True


Answer = Callable[[Request, bytes], None]


def whole(request: Request, data: bytes, send: int | None = None) -> None:
    """The correct answer, or its first `send` bytes."""
    start = request.start
    if start is None:
        request.answer(data, send=send)
    elif start < len(data):
        request.answer(
            data[start:], 206, send=send, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}", ETag='"x*?[a-z]"'
        )
    else:
        request.answer(b"<Error/>", 416, "application/xml", Content_Range=f"bytes */{len(data)}")


def cut(send: int, reset: bool = False) -> Answer:
    """Closes the connection after `send` bytes, by a TCP reset if `reset`."""

    def answer(request: Request, data: bytes) -> None:
        whole(request, data, send)
        request.server.was_cut()
        if reset:
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()

    return answer


def hold(send: int) -> Answer:
    """Pauses after `send` bytes, until the test sets `released` or kills the client."""

    def answer(request: Request, data: bytes) -> None:
        whole(request, data, send)
        request.server.was_cut()
        request.server.held.set()
        if request.server.released.wait(30):
            request.wfile.write(data[(request.start or 0) + send :])

    return answer


def says(status: int, body: bytes = XML, type: str = "application/xml") -> Answer:
    return lambda request, data: request.answer(body, status, type)


def sends(body: bytes, type: str = "binary/octet-stream") -> Answer:
    """Sends `body` instead of the file, with status 206 if a range was requested."""

    def answer(request: Request, data: bytes) -> None:
        if request.start is None:
            return request.answer(body, 200, type)
        end = request.start + len(body)
        request.answer(body, 206, type, Content_Range=f"bytes {request.start}-{end - 1}/{end}")

    return answer


def flips(request: Request, data: bytes) -> None:
    """The file with its last bit flipped."""
    whole(request, data[:-1] + bytes([data[-1] ^ 1]))


def ignores_range(request: Request, data: bytes) -> None:
    request.answer(data)


def from_elsewhere(request: Request, data: bytes) -> None:
    """Sends the range that starts one byte too late."""
    if request.start is None:
        return whole(request, data)
    start = request.start + 1
    request.answer(data[start:], 206, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")


def without_length(request: Request, data: bytes) -> None:
    request.start = None
    request.answer(data, Content_Length="")


def chunked(send: int) -> Answer:
    """Sends the first `send` bytes as one chunk, so that their number is unknown, and omits the final empty chunk."""

    def answer(request: Request, data: bytes) -> None:
        request.answer(b"", Content_Length="", Transfer_Encoding="chunked")
        request.wfile.write(b"%x\r\n%s\r\n" % (send, data[:send]))

    return answer


def mute_416(request: Request, data: bytes) -> None:
    """Answers every request with 416, without the length of the file."""
    request.answer(b"", 416)


def redirects(request: Request, data: bytes) -> None:
    request.answer(b"<html>moved</html>", 302, "text/html", Location=f"/elsewhere{request.path}")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.files = FILES
        self.reset(None)

    def reset(self, target: Path | None) -> None:
        """Prepare for the next test. target: the client's folder, which is checked at each request.

        asked: (path, start of the range or None) of each request. early: see `look`. cuts: how many answers were cut or
        held. connected: how many CONNECT requests came. seen: command lines of all processes, if `look_at_processes`.
        held is set when an answer pauses, and setting released continues it.
        """
        self.target = target
        self.faults: defaultdict[str, list[Answer]] = defaultdict(list)
        self.asked: list[tuple[str, int | None]] = []
        self.seen: list[str] = []
        self.early: list[str] = []
        self.cuts = self.connected = 0
        self.look_at_processes = False
        self.held, self.released = threading.Event(), threading.Event()

    @property
    def link(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/*?{QUERY}"

    def saw(self, path: str, start: int | None) -> None:
        self.asked.append((path, start))
        self.look(path)
        if self.look_at_processes:
            for line in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.seen.append(line.read_text("utf-8", "replace"))
                except OSError:  # the process has exited
                    continue

    def was_cut(self) -> None:
        self.cuts += 1
        self.look(self.asked[-1][0])

    def look(self, path: str) -> None:
        """Record in `early` a weight file that already has its final name while it is still requested."""
        if self.target and path.endswith(".pth") and (self.target / path).exists():
            self.early.append(path)

    def starts(self, path: str) -> list[int | None]:
        """The start of the range in each request for this path, None for the whole file."""
        return [start for asked, start in self.asked if asked == path]

    def handle_error(self, *_: object) -> None:  # tests kill clients
        pass
