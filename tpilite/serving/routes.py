"""Which path does what, and the answers."""

import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from urllib.parse import unquote

from tpilite.engine.sampling import SamplingParams
from tpilite.net.body_memory import SMALL_BYTES, BodyMemory
from tpilite.net.http import HttpError
from tpilite.net.http_server import Connection
from tpilite.serving import openai_requests, openai_responses
from tpilite.serving.access import Access
from tpilite.serving.answer import Completions
from tpilite.serving.config import ServerConfig
from tpilite.serving.errors import ApiError, Json, unknown_model
from tpilite.serving.figures import metrics
from tpilite.serving.page import PageFile
from tpilite.serving.service import Service

logger = logging.getLogger(__name__)

Parse = Callable[[Json, SamplingParams], openai_requests.Request]

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SECURITY = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_GRANTED = re.compile(r"(?!x-forwarded-)[a-z0-9-]{1,100}")
# Paths and addresses in a reason, which are nobody's business who has shown no key.
_PLACE = re.compile(
    r"(?<![\w.])(?:~|[A-Za-z]:)?[/\\][^\s,;()]+|\[?[0-9A-Fa-f]*:[0-9A-Fa-f:]*:[0-9A-Fa-f.]*(?:%\w+)?\]?(?::\d+)?"
    r"|\d+(?:\.\d+){3}(?::\d+)?|(?<![\w.-])[\w.-]+:\d+"
)
# A context of 128k tokens is half a megabyte of text, or one of token ids.
_MAX_BODY_BYTES = 4 << 20
# JSON may write one byte of a text in six, beside all else that a request says.
_BYTES_PER_ESCAPED, _MAX_FIELDS_BYTES = 6, 64 << 10


@dataclass(frozen=True)
class _Route:
    """What a path takes, and what answers it; an open one needs no key."""

    method: str
    answer: Callable[[Connection], None]
    is_open: bool = False


class Routes:
    """Answers every request by its path: the application of the HTTP server.

    `host_names` are those by which browsers reach this machine, in lower case, beside its addresses.
    """

    def __init__(
        self,
        service: Service,
        completions: Completions,
        config: ServerConfig,
        model_name: str,
        *,
        page: Mapping[str, PageFile],
        host_names: Collection[str],
    ) -> None:
        self._service, self._completions = service, completions
        self._config, self._model_name = config, model_name
        self._access = Access(config, host_names)
        self._created_s = int(time.time())
        self._memory = BodyMemory()
        self._table = {
            "/health": _Route("GET", self._health, is_open=True),
            "/metrics": _Route("GET", self._metrics),
            "/v1/cluster": _Route("GET", self._cluster),
            "/v1/models": _Route("GET", self._models),
            "/v1/chat/completions": _Route("POST", partial(self._complete, openai_requests.parse_chat)),
            "/v1/completions": _Route("POST", partial(self._complete, openai_requests.parse_completion)),
        }
        for path, file in page.items():
            self._table[path] = _Route("GET", partial(_send_file, file), is_open=True)

    def respond(self, connection: Connection) -> None:
        """Answers a request, with an error where it is wrong. Raises `OSError` where the client is gone."""
        request = connection.request
        connection.common_headers = self._common_headers()
        try:
            origin = self._access.check(connection)
            if origin is not None:
                connection.common_headers = self._common_headers(origin)
            self._route(connection, is_foreign=origin is not None)
        except ApiError as error:
            _send_error(connection, error)
        except (OSError, HttpError):
            raise
        # One request's mistake must not look to its client like a dead server.
        except Exception:
            logger.exception("a mistake of tpilite's own while answering %s %s", request.method, request.path)
            _send_error(
                connection, ApiError(500, "the server made a mistake; see its log", kind="server_error")
            )

    def refuse(self, connection: Connection, error: HttpError) -> None:
        """Answers what is wrong as HTTP."""
        connection.common_headers = connection.common_headers or self._common_headers()
        later = {"Retry-After": "5"} if error.status == 503 else {}
        _send_error(connection, ApiError(error.status, str(error), headers=later))

    def _route(self, connection: Connection, *, is_foreign: bool) -> None:
        method, path = connection.request.method, connection.request.path
        route = self._find(path)
        if route is None:
            raise ApiError(404, f"there is nothing at {path[:200]!r}", code="unknown_url")
        if method == "OPTIONS" and is_foreign:
            return _send_preflight(connection, route.method)
        if route.method != ("GET" if method == "HEAD" else method):
            raise ApiError(
                405,
                f"{path[:200]} takes {route.method}, not {method}",
                code="method_not_supported",
                headers={"Allow": route.method},
            )
        if not route.is_open:
            self._access.check_key(connection)
        return route.answer(connection)

    def _find(self, path: str) -> _Route | None:
        name = path.removeprefix("/v1/models/")
        if name and name != path:
            return _Route("GET", partial(self._model, unquote(name)))
        return self._table.get(path)

    def _common_headers(self, origin: str | None = None) -> dict[str, str]:
        """The headers of every answer, and those for a page of `origin`."""
        headers = {"Cache-Control": "no-store", **_SECURITY}
        if self._config.cors_origins:
            headers["Vary"] = "Origin"
        if origin is not None:
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = "x-request-id, retry-after"
            headers["Cross-Origin-Resource-Policy"] = "cross-origin"
        headers["X-Request-Id"] = f"req_{secrets.token_hex(12)}"
        return headers

    # ---- what is answered

    def _complete(self, parse: Parse, connection: Connection) -> None:
        size = self._body_size(connection, parse)
        # What everybody may send at once; so who sends nothing more holds nothing of what all share.
        is_whole = connection.begin_body(SMALL_BYTES, _MAX_BODY_BYTES)
        with self._memory.hold(0 if is_whole else size):
            body = openai_requests.parse_json(connection.body(_MAX_BODY_BYTES, self._memory.is_wanted))
            started = self._completions.start(parse(body, self._config.defaults))
            del body
        self._completions.answer(connection, started)

    def _body_size(self, connection: Connection, parse: Parse) -> int:
        """The bytes that the body may have. Raises `ApiError` where no request of so many can fit."""
        length = connection.request.length
        size = _MAX_BODY_BYTES if length is None else length
        limit = self._service.session.max_prompt_bytes
        if limit is not None and parse is openai_requests.parse_chat:
            most = _MAX_FIELDS_BYTES + _BYTES_PER_ESCAPED * limit
            if most < size <= _MAX_BODY_BYTES and length is not None:
                raise ApiError(
                    400,
                    f"the request has {size} bytes, and none of more than {most} can fit this model's "
                    f"context length of {self._service.session.engine.context} tokens",
                    param="messages",
                    code="context_length_exceeded",
                )
        return size

    def _models(self, connection: Connection) -> None:
        _send_json(connection, openai_responses.models(self._model_name, self._created_s))

    def _model(self, name: str, connection: Connection) -> None:
        if name != self._model_name:
            raise unknown_model(name, self._model_name)
        _send_json(connection, openai_responses.model(self._model_name, self._created_s))

    def _health(self, connection: Connection) -> None:
        health = self._service.health()
        if health["reason"] and not self._access.shows_key(connection):
            health["reason"] = _PLACE.sub("...", health["reason"])
        _send_json(connection, health, 200 if health["status"] == "ok" else 503)

    def _metrics(self, connection: Connection) -> None:
        figures = {**self._service.figures(), "up": float(self._service.health()["status"] == "ok")}
        connection.send(metrics(figures), "text/plain; version=0.0.4; charset=utf-8")

    def _cluster(self, connection: Connection) -> None:
        service, defaults = self._service, self._config.defaults
        context, can_chat = service.session.engine.context, service.session.chat_format is not None
        state = {
            **service.health(),
            "model": {
                "id": self._model_name,
                "context": context,
                "chat": can_chat,
            },
            "defaults": {
                "temperature": defaults.temperature,
                "top_p": defaults.p,
                "top_k": defaults.k,
                "min_p": defaults.min_p,
                "repetition_penalty": defaults.repetition_penalty,
                "max_tokens": defaults.length,
            },
            "figures": service.figures(),
            "ranks": service.ranks(),
        }
        _send_json(connection, state)


def _send_json(
    connection: Connection, value: Json, status: int = 200, headers: Mapping[str, str] | None = None
) -> None:
    connection.send(json.dumps(value).encode(), "application/json", status, headers)


def _send_error(connection: Connection, error: ApiError) -> None:
    """Answers with an error, or cuts an answer that has begun: nothing else would reach the client."""
    if connection.has_begun:
        connection.cut()
    else:
        _send_json(connection, error.body, error.status, error.headers)


def _send_file(file: PageFile, connection: Connection) -> None:
    headers = {"ETag": file.etag, "Cache-Control": "no-cache"}
    if connection.request.headers.get("if-none-match") == file.etag:
        connection.send_empty(304, headers)
    else:
        connection.send(file.content, file.content_type, headers=headers)


def _send_preflight(connection: Connection, method: str) -> None:
    """Answers a browser that asks what a page of an allowed origin may send: what it likes, nearly.

    Clients in JavaScript have headers of their own, which mean nothing here.
    """
    asked = connection.request.headers.get("access-control-request-headers", "").lower().split(",")
    wanted = {name.strip() for name in asked if _GRANTED.fullmatch(name.strip())}
    headers = {
        "Access-Control-Allow-Methods": method,
        "Access-Control-Allow-Headers": ", ".join(sorted(wanted | {"authorization", "content-type"})),
        "Access-Control-Max-Age": "600",
    }
    connection.send_empty(204, headers)
