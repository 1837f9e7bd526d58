"""The page at `/`: chat with the model, and look at its probabilities. Static files that use the endpoints as any other
client does."""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request, Response

# Path -> file of this folder, media type. Links between them are relative, so a proxy may serve them below a prefix.
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/tokens.js": ("tokens.js", "text/javascript"),
}
# Should a text of the model ever be read as HTML, nothing in it runs or is sent anywhere.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Cache-Control": "no-cache",  # asked for again each time, answered 304 by its ETag
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    for path, (name, media_type) in FILES.items():
        content = (Path(__file__).parent / name).read_bytes()
        app.add_api_route(path, _endpoint(content, media_type), methods=["GET", "HEAD"])


def _endpoint(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag}

    async def endpoint(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):  # a list, or W/"..." from a proxy that compresses
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return endpoint
