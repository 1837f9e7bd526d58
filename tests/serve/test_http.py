"""HTTP as clients may send it: pipelined, in chunks, after 100-continue, with other methods, and wrong."""

import json
import re
import socket
from typing import Any

import pytest

from helpers.servers import Server

BODY = json.dumps({"prompt": "The licence", "max_tokens": 3, "temperature": 0}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"


def post(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def exchange(server: Server, *parts: bytes) -> bytes:
    """Send the parts, each after the answer to the one before, and read until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        received = b""
        for i, part in enumerate(parts):
            received += sock.recv(65536) if i else b""
            sock.sendall(part)
        while data := sock.recv(65536):
            received += data
        return received


def chunked(*sizes: int) -> bytes:
    """BODY in chunks of these sizes; the last one has the rest."""
    encoded, at = b"", 0
    for size in (*sizes, len(BODY)):
        part = BODY[at : at + size]
        encoded += b"%x\r\n%s\r\n" % (len(part), part) if part else b""
        at += size
    return encoded + b"0\r\n\r\n"


def texts(received: bytes) -> list[Any]:
    return [json.loads(text) for text in re.findall(rb'"text":("(?:[^"\\]|\\.)*")', received)]


def test_requests_on_one_connection(server: Server) -> None:
    """One after the other, or all at once before the first answer."""
    expected = server.complete("The licence", max_tokens=3, temperature=0)["choices"][0]["text"]
    last, whole = HEALTH + b"Connection: close\r\n\r\n", post(BODY)
    for parts in ((whole * 4 + last,), (whole, whole, whole, whole, last)):
        received = exchange(server, *parts)
        assert received.count(b"HTTP/1.1 200") == 5 and texts(received) == [expected] * 4
    stream = post(json.dumps(json.loads(BODY) | {"stream": True}).encode())
    received = exchange(server, stream * 2 + last)
    assert received.count(b"[DONE]") == 2 and "".join(texts(received)) == expected * 2
    server.wait_until_idle()


@pytest.mark.parametrize("sizes", [(), (5, 7), (1,) * 30])
def test_bodies_in_chunks(sizes: tuple[int, ...], server: Server) -> None:
    head = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    received = exchange(server, head + chunked(*sizes))
    assert received.startswith(b"HTTP/1.1 200") and len(texts(received)) == 1


def test_100_continue(server: Server) -> None:
    head = HEAD + b"Connection: close\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    received = exchange(server, head, BODY)
    assert received.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200") and len(texts(received)) == 1
    refused = exchange(server, head.replace(b"application/json", b"text/plain"))  # without its body
    assert refused.startswith(b"HTTP/1.1 415")


@pytest.mark.parametrize(
    ("start", "status"),
    [
        (b"HEAD /health", 405),
        (b"OPTIONS /v1/completions", 405),
        (b"OPTIONS *", 404),
        (b"DELETE /v1/models", 405),
        (b"TRACE /", 405),
        (b"GET /../../etc/passwd", 404),
        (b"GET /v1/models/..%2f..%2fetc%2fpasswd", 404),
        (b"GET /v1/models/%ff%ed%a0%80%00%0d%0a", 404),
        (b"GET /%zz%1", 404),
        (b"GET //health", 404),
        (b"GET /" + b"a" * 30_000, 404),
        ("GET /é".encode(), 400),
        ("GÉT /".encode(), 400),
    ],
)
def test_other_methods_and_paths(start: bytes, status: int, server: Server) -> None:
    received = exchange(server, start + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 %d " % status) and len(received) < 5000
    assert b"root:" not in received


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: -5",
        b"Content-Length: " + b"9" * 5000,
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Transfer-Encoding: gzip",
        b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}",
        b"Host: evil.example",  # a second one
    ],
)
def test_wrong_headers(headers: bytes, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        sock.sendall(HEAD + headers + b"\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 400")
    assert not caplog.records
