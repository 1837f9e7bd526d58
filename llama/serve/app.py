"""The endpoints, and what every request passes first: its key, its Host, and the count of requests by status."""

import asyncio
import hashlib
import hmac
import ipaddress
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.serve.answers import Answer, to_json
from llama.serve.chat import ChatCompletion
from llama.serve.completions import Completion
from llama.serve.connections import EventStream, cancelled_by_disconnect, read_body
from llama.serve.errors import RequestError
from llama.serve.page import FILES, add_page
from llama.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    read_request,
)
from llama.serve.service import Service

PUBLIC = {"/health", *FILES}  # paths that need no key
MAX_HEADERS = 2**14  # bytes; h11 refuses larger ones only if they arrive in pieces
SMALL_BODY = 2**16  # bytes; larger ones are parsed in a worker thread


def create_app(service: Service) -> ASGIApp:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    # No pages about the API: FastAPI's load scripts from other hosts.
    app.exception_handler(RequestError)(_on_error)
    app.exception_handler(HTTPException)(_on_http_error)
    app.exception_handler(Exception)(_on_bug)
    _add_endpoints(app, service)
    _add_tools(app, service)
    add_page(app)
    return Guard(app, service)


def _add_endpoints(app: FastAPI, service: Service) -> None:
    """OpenAI's endpoints."""

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return _json(_model(service))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, request, CompletionRequest, Completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(service, request, ChatRequest, ChatCompletion)


def _add_tools(app: FastAPI, service: Service) -> None:
    """Endpoints that OpenAI does not have."""

    @app.get("/health")
    async def health() -> Response:
        service.accepting_llama()
        return _json({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        tokenizer = service.llama.tokenizer
        given: TokenizeRequest = await _read(request, TokenizeRequest)
        bos = given.add_special and tokenizer.adds_bos
        try:
            ids = await asyncio.to_thread(tokenizer.encode, given.content, bos=bos, eos=False)
        except ValueError as error:
            raise RequestError(error, param="content") from None
        return _json({"tokens": ids})

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        tokenizer = service.llama.tokenizer
        given: DetokenizeRequest = await _read(request, DetokenizeRequest)
        try:
            return _json({"content": await asyncio.to_thread(tokenizer.decode, given.tokens)})
        except ValueError as error:
            raise RequestError(error, param="tokens") from None


async def _answer(service: Service, request: Request, kind: type[Any], form: type[Answer]) -> Response:
    llama = service.accepting_llama()
    given = await _read(request, kind)
    service.check_model(given.model)
    job = service.admit()
    try:
        answer = await asyncio.to_thread(form, llama, service.name, given, job)
        job.submit([choice.row for choice in answer.choices], given.priority)
    except BaseException:
        job.close()
        raise
    service.metrics.prompt_tokens.inc(answer.prompt_tokens)
    if given.stream:
        return EventStream(answer.events(), job)
    async with cancelled_by_disconnect(request.receive, job):
        async for tokens in job.steps():
            answer.add(tokens)
    body = answer.body() if given.k is None else await asyncio.to_thread(answer.body)  # log-probabilities may be many
    return _json(body)


async def _read(request: Request, kind: type[Any]) -> Any:
    body = await read_body(request)
    if len(body) <= SMALL_BODY:
        return read_request(kind, body)
    return await asyncio.to_thread(read_request, kind, body)


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "llama-runner"}


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _json(error.body, error.status, error.headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """FastAPI's own errors: an unknown path, or a method that a path does not have."""
    assert isinstance(error, HTTPException)
    what = "there is no endpoint" if error.status_code == 404 else error.detail
    problem = RequestError(f"{what}: {request.method} {request.url.path}", error.status_code)
    return _json(problem.body, problem.status, dict(error.headers or {}))


async def _on_bug(request: Request, error: Exception) -> Response:
    """Any other exception. It is raised again after this response, and uvicorn logs its traceback."""
    problem = RequestError("internal error, which the server has logged", 500)
    return _json(problem.body, problem.status)


class Guard:
    """What every request passes before its endpoint."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service
        self._key = None if service.api_key is None else _digest(service.api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 500

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._service.responding += 1
        try:
            problem = self._problem(scope)
            if problem is not None:
                await _json(problem.body, problem.status, problem.headers)(scope, receive, counting_send)
            else:
                await self._app(scope, receive, counting_send)
        finally:
            endpoint = getattr(scope.get("route"), "path", "other")
            self._service.metrics.requests.labels(endpoint, status).inc()
            self._service.responding -= 1

    def _problem(self, scope: Scope) -> RequestError | None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
            return RequestError(f"the headers have more than {MAX_HEADERS:,} bytes", 431)
        headers = {name: value for name, value in scope["headers"] if name in (b"authorization", b"host")}
        if self._key is None:
            host = headers.get(b"host", b"").decode("latin-1")
            if self._service.is_loopback and not _is_local(host):
                # A web page could have its own name resolved to this machine, and so read answers (DNS rebinding).
                return RequestError(
                    f"Host is {host!r}, expected localhost or an address: a server without --api_key answers only this "
                    "machine; behind a proxy, give --api_key",
                    403,
                )
        elif scope["path"] not in PUBLIC:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            # Digests have equal lengths, so the time of the comparison does not depend on the key.
            if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(key.strip()), self._key):
                return RequestError(
                    "the API key is wrong or missing: send the header Authorization: Bearer KEY",
                    401,
                    code="invalid_api_key",
                )
        return None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_local(host: str) -> bool:
    """Whether a Host header is localhost or an IP address, with or without a port."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if name.lower() in ("localhost", ""):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
