"""`RequestError`: what a client gets instead of an answer."""

from typing import Any

from llama.console import in_one_line

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """An HTTP status and OpenAI's error object.

    param: the field of the request that is wrong. code: a name of the kind of error, for programs.
    retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        message: object,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(in_one_line(message))
        self.param = None if param is None else in_one_line(param)  # an unknown field may have any name
        self.status, self.code = status, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def disconnected() -> RequestError:
    """For a client that has gone away. Nobody gets it, but the metrics count its status, which is nginx's."""
    return RequestError("the client has disconnected", 499)
