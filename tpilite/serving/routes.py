"""Which path does what, for whom: names of this machine, origins of pages, the API key, and the answers."""

import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from email.message import Message
from functools import partial
from urllib.parse import unquote, urlsplit

from tpilite.engine.sampling import SamplingParams
from tpilite.serving import openai_requests, openai_responses
from tpilite.serving.answer import Completions
from tpilite.serving.config import ServerConfig
from tpilite.serving.errors import ApiError, Json, unknown_model
from tpilite.serving.figures import metrics
from tpilite.serving.http import Exchange, HttpError
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
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/@\s]+)(?::\d{1,5})?")


@dataclass(frozen=True)
class _Route:
    """What a path takes, and what answers it; an open one needs no key."""

    method: str
    answer: Callable[[Exchange], None]
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
        self._host_names = host_names
        self._created_s = int(time.time())
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

    def respond(self, exchange: Exchange) -> None:
        """Answers a request, with an error where it is wrong. Raises `OSError` where the client is gone."""
        exchange.common_headers = self._common_headers()
        try:
            self._check_host(exchange.headers)
            origin = self._foreign_origin(exchange.headers)
            if origin is not None:
                exchange.common_headers = self._common_headers(origin)
            self._route(exchange, urlsplit(exchange.path).path, is_foreign=origin is not None)
        except HttpError as error:
            _send_error(exchange, ApiError(error.status, str(error)))
        except ApiError as error:
            _send_error(exchange, error)
        except OSError:
            raise
        # One request's mistake must not look to its client like a dead server.
        except Exception:
            logger.exception(
                "a mistake of tpilite's own while answering %s %s", exchange.method, exchange.path
            )
            _send_error(
                exchange, ApiError(500, "the server made a mistake; see its log", kind="server_error")
            )

    def refuse(self, exchange: Exchange, error: HttpError) -> None:
        """Answers what is wrong as HTTP."""
        exchange.common_headers = self._common_headers()
        _send_error(exchange, ApiError(error.status, str(error)))

    def _route(self, exchange: Exchange, path: str, *, is_foreign: bool) -> None:
        route = self._find(path)
        if route is None:
            raise ApiError(404, f"there is nothing at {path[:200]!r}", code="unknown_url")
        if exchange.method == "OPTIONS" and is_foreign:
            return _send_preflight(exchange, route.method)
        if route.method != ("GET" if exchange.method == "HEAD" else exchange.method):
            raise ApiError(
                405,
                f"{path} takes {route.method}, not {exchange.method}",
                code="method_not_supported",
                headers={"Allow": route.method},
            )
        if not route.is_open:
            self._check_key(exchange.headers)
        return route.answer(exchange)

    def _find(self, path: str) -> _Route | None:
        name = path.removeprefix("/v1/models/")
        if name and name != path:
            return _Route("GET", partial(self._model, unquote(name)))
        return self._table.get(path)

    # ---- who may ask

    def _check_host(self, headers: Message) -> None:
        """Refuses names that are not this machine's: a page elsewhere could point its own name here.

        By an address nobody else's page can be reached, so addresses are right whatever they are.
        """
        hosts = headers.get_all("Host", ())
        if len(hosts) != 1 or not (match := _HOST.fullmatch(hosts[0].strip())):
            raise ApiError(400, "a request needs one Host header with a name or an address")
        name = match[1].strip("[]").rstrip(".").lower()
        if name in self._host_names or name.endswith(".localhost"):
            return
        try:
            ipaddress.ip_address(name)
        except ValueError:
            raise ApiError(
                403,
                f"{name[:100]!r} is not a name of this server: use its address, or start it with --api_name",
                code="host_not_allowed",
            ) from None

    def _foreign_origin(self, headers: Message) -> str | None:
        """The origin of the page that asks, where it is an allowed one of another site.

        Pages of other sites are refused: they could make the server work without reading its answers.
        """
        origin: str | None = headers.get("Origin")
        if origin is None or urlsplit(origin).netloc.lower() == headers["Host"].strip().lower():
            return None
        if not {origin, "*"} & set(self._config.cors_origins):
            raise ApiError(
                403,
                f"pages of {origin[:100]!r} may not use this server; --cors_origin allows them",
                code="origin_not_allowed",
            )
        return origin

    def _check_key(self, headers: Message) -> None:
        key = self._config.api_key
        if key is None:
            return
        how = {"WWW-Authenticate": "Bearer"}
        kind, _, given = headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not given:
            raise ApiError(401, "an API key is needed: send it as 'Authorization: Bearer KEY'", headers=how)
        if not hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode()):
            raise ApiError(401, "the API key is not the right one", code="invalid_api_key", headers=how)

    def _common_headers(self, origin: str | None = None) -> dict[str, str]:
        """The headers of every answer, and those for a page of `origin`."""
        headers = {"Cache-Control": "no-store", **_SECURITY}
        if self._config.cors_origins:
            headers["Vary"] = "Origin"
        if origin is not None:
            headers["Access-Control-Allow-Origin"] = origin
            headers["Cross-Origin-Resource-Policy"] = "cross-origin"
        headers["X-Request-Id"] = f"req_{secrets.token_hex(12)}"
        return headers

    # ---- what is answered

    def _complete(self, parse: Parse, exchange: Exchange) -> None:
        body = openai_requests.parse_json(exchange.body())
        self._completions.answer(exchange, parse(body, self._config.defaults))

    def _models(self, exchange: Exchange) -> None:
        _send_json(exchange, openai_responses.models(self._model_name, self._created_s))

    def _model(self, name: str, exchange: Exchange) -> None:
        if name != self._model_name:
            raise unknown_model(name, self._model_name)
        _send_json(exchange, openai_responses.model(self._model_name, self._created_s))

    def _health(self, exchange: Exchange) -> None:
        health = self._service.health()
        _send_json(exchange, health, 200 if health["status"] == "ok" else 503)

    def _metrics(self, exchange: Exchange) -> None:
        figures = {**self._service.figures(), "up": float(self._service.health()["status"] == "ok")}
        exchange.send(metrics(figures), "text/plain; version=0.0.4; charset=utf-8")

    def _cluster(self, exchange: Exchange) -> None:
        service, defaults = self._service, self._config.defaults
        state = {
            **service.health(),
            "model": {"id": self._model_name, "context": service.context, "chat": service.can_chat},
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
        _send_json(exchange, state)


def _send_json(
    exchange: Exchange, value: Json, status: int = 200, headers: Mapping[str, str] | None = None
) -> None:
    exchange.send(json.dumps(value).encode(), "application/json", status, headers)


def _send_error(exchange: Exchange, error: ApiError) -> None:
    """Answers with an error, or cuts an answer that has begun: nothing else would reach the client."""
    if exchange.has_begun:
        exchange.cut()
    else:
        _send_json(exchange, error.body, error.status, error.headers)


def _send_file(file: PageFile, exchange: Exchange) -> None:
    headers = {"ETag": file.etag, "Cache-Control": "no-cache"}
    if exchange.headers.get("If-None-Match") == file.etag:
        exchange.send_empty(304, headers)
    else:
        exchange.send(file.content, file.content_type, headers=headers)


def _send_preflight(exchange: Exchange, method: str) -> None:
    """Answers a browser that asks what a page of an allowed origin may send."""
    headers = {
        "Access-Control-Allow-Methods": method,
        "Access-Control-Allow-Headers": "authorization, content-type",
        "Access-Control-Max-Age": "600",
    }
    exchange.send_empty(204, headers)
