"""What can go wrong while a request is served, and how OpenAI's API says it."""

from typing import Any

from tpilite.checks import short
from tpilite.engine.engine import TooLong
from tpilite.errors import ConfigError, NotFinite, TpiliteError

Json = dict[str, Any]


class Busy(TpiliteError):
    """The waiting line is full; a place may be free after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Stopping(TpiliteError):
    """The service is ending and takes or finishes no more requests."""


class Broken(TpiliteError):
    """A mistake of our own ended the engine's thread; the log has its traceback."""


class ApiError(TpiliteError):
    """An answer that is an error, as OpenAI writes it: a status, an object in JSON, and headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = headers or {}

    @property
    def body(self) -> Json:
        """The object that is its JSON."""
        return {
            "error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code},
        }


def api_error(error: TpiliteError, *, is_chat: bool) -> ApiError:
    """How OpenAI would say what went wrong while answering a chat or a completion."""
    if isinstance(error, ApiError):
        return error
    param = "messages" if is_chat else "prompt"
    if isinstance(error, TooLong):
        return too_long(error.n_prompt, error.n_new, error.context, param)
    if isinstance(error, Busy):
        later = {"Retry-After": str(error.retry_after_s)}
        return ApiError(429, str(error), kind="requests", code="rate_limit_exceeded", headers=later)
    if isinstance(error, ConfigError):
        return ApiError(400, str(error), param=param, code="invalid_value")
    if isinstance(error, Broken | NotFinite):
        return ApiError(500, str(error), kind="server_error", code="internal_error")
    code = "stopping" if isinstance(error, Stopping) else "unavailable"
    return ApiError(503, str(error), kind="server_error", code=code, headers={"Retry-After": "5"})


def too_long(n_prompt: int, n_new: int | None, limit: int, param: str) -> ApiError:
    """The error for a prompt that leaves no room, or not that for the new tokens that are asked for."""
    asked = f" and {n_new} new ones" if n_new else ""
    return ApiError(
        400,
        f"this model's maximum context length is {limit} tokens, and the prompt has {n_prompt}{asked}; "
        "shorten the prompt or ask for fewer new tokens",
        param=param,
        code="context_length_exceeded",
    )


def unknown_model(name: str, served: str) -> ApiError:
    """The error for a request that names another model than the one that is served."""
    message = f"the model {short(name)} does not exist here; this server has {served!r}"
    return ApiError(404, message, param="model", code="model_not_found")
