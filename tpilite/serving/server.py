"""OpenAI's API and the page over HTTP/1.1, on the standard library.

    serve(session, ServerConfig(port=8080))

Every connection has a thread, and everything that a client may make the server hold has a limit: its
connections, the time for a request's head and body, their sizes, and the time that it may leave an answer
unread. Answers in a stream are server-sent events; a comment keeps them alive while there is nothing to say.
"""

import errno
import hmac
import importlib.resources
import io
import ipaddress
import json
import logging
import os
import re
import secrets
import select
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType, TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from tpilite.closing import Closing
from tpilite.engine.session import Session
from tpilite.engine.stats import Usage
from tpilite.errors import ConfigError, TpiliteError
from tpilite.serving import openai_requests as openai
from tpilite.serving.config import ServerConfig
from tpilite.serving.openai_requests import ApiError, Head
from tpilite.serving.service import Broken, Busy, Delta, Job, Recovery, Service, Stopping, TooLong
from tpilite.version import __version__

logger = logging.getLogger(__name__)

Json = dict[str, Any]

# A thread each, of some tens of kilobytes: a household and its programs need a tenth of it.
_MAX_CONNECTIONS = 256
# Browsers with many cookies send 8 KiB.
_MAX_HEAD_BYTES = 32 << 10
# A context of 128k tokens is half a megabyte of text, or one of token ids.
_MAX_BODY_BYTES = 4 << 20
# A head is one packet from anything but an attacker; a body may come over a slow link.
_HEAD_S, _BODY_S = 10.0, 60.0
# Connections that browsers and clients keep for their next request.
_IDLE_S = 60.0
# A client that reads nothing for so long has its answer cut.
_SEND_S = 30.0
# What is still on its way when an error is answered early is read and dropped, or the client would see a
# reset connection in place of the error.
_LINGER_S, _LINGER_BYTES = 2.0, 64 << 20
# How often a thread that waits for a token looks whether its client is still there.
_POLL_S = 0.25
# Below the 15 to 60 s after which proxies and clients give a silent connection up.
_KEEP_ALIVE_S = 10.0

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
_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}
_ROUTES = {
    "/health": ("GET",),
    "/metrics": ("GET",),
    "/v1/cluster": ("GET",),
    "/v1/models": ("GET",),
    "/v1/chat/completions": ("POST",),
    "/v1/completions": ("POST",),
}
_COUNTERS = (
    "requests_finished",
    "requests_cancelled",
    "requests_failed",
    "requests_refused",
    "prompt_tokens",
    "new_tokens",
    "compute_seconds",
    "load_wait_seconds",
    "network_wait_seconds",
    "rest_seconds",
    "read_bytes",
)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/@\s]+)(?::\d{1,5})?")


def serve(
    session: Session,
    config: ServerConfig,
    *,
    ready: Callable[[str], None] | None = None,
    usage: Callable[[], Usage] = Usage,
    recovery: Recovery | None = None,
    cluster_state: Callable[[], list[dict[str, Any]]] | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then lets open requests finish within the grace; a second one ends it.

    `ready` is told the address of the page. The rest is as in `Service`. For the main thread.
    """
    service = Service(
        session,
        max_waiting=config.max_waiting,
        usage=usage,
        recovery=recovery,
        cluster_state=cluster_state,
    )
    with _Signals() as signals, service, Server(service, config, session.folder.name) as server:
        if ready is not None:
            ready(server.url)
        signals.wait()
        until_s = time.monotonic() + config.grace_s
        logger.info("stopping; open requests have %g s to finish", config.grace_s)
        while not service.drain(0.1) and time.monotonic() < until_s and signals.n_heard < 2:
            pass
        # Before the connections are closed, so that those who still wait are told why.
        service.close()
        server.finish_answers()


class Server(Closing):
    """The HTTP server of a service, listening from its making on; closed by `with`."""

    def __init__(self, service: Service, config: ServerConfig, model_name: str = "") -> None:
        self._http = _HttpServer(service, config, config.model_name or model_name or "tpilite")
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, name="tpilite-http"
        )
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the page."""
        host = self._http.config.host
        if host in ("", "0.0.0.0", "::"):
            host = "127.0.0.1"
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def finish_answers(self, timeout_s: float = 5.0) -> None:
        """Waits until no answer is being sent any more."""
        until_s = time.monotonic() + timeout_s
        while self._http.n_busy and time.monotonic() < until_s:
            time.sleep(0.01)

    def close(self) -> None:
        """Ends every connection and thread."""
        self._http.shutdown()
        self._thread.join()
        self._http.hang_up()
        self._http.server_close()


class _Signals:
    """SIGTERM and SIGINT, counted and waited for in the main thread."""

    def __init__(self) -> None:
        self.n_heard = 0

    def wait(self) -> None:
        # A lock that the handler set could be one that the waiting thread holds just then; a pipe cannot.
        os.read(self._pipe[0], 1)

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self.n_heard += 1
        os.write(self._pipe[1], b"!")

    def __enter__(self) -> "_Signals":
        self._pipe = os.pipe()
        self._before = {n: signal.signal(n, self._hear) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for end in self._pipe:
            os.close(end)


@dataclass(frozen=True)
class _File:
    """A file of the page."""

    content: bytes
    content_type: str
    etag: str


def _page() -> dict[str, _File]:
    """The page's files by their paths: nothing a client sends ever becomes a file's name."""
    files = {}
    for entry in importlib.resources.files("tpilite.serving").joinpath("web").iterdir():
        kind = _CONTENT_TYPES.get(os.path.splitext(entry.name)[1])
        if kind is not None:
            content = entry.read_bytes()
            files["/" + entry.name] = _File(content, kind, f'"{sha256(content).hexdigest()[:20]}"')
    files["/"] = files.pop("/index.html")
    return files


class _HttpServer(ThreadingHTTPServer):
    """The listening socket and the threads of its connections."""

    daemon_threads = False  # they are joined
    request_queue_size = 128

    def __init__(self, service: Service, config: ServerConfig, model_name: str) -> None:
        self.service, self.config, self.model_name = service, config, model_name
        self.created_s = int(time.time())
        self.page = _page()
        own = socket.gethostname().lower()
        self.host_names = {"localhost", own, f"{own}.local", *(n.lower() for n in config.host_names)}
        self.n_busy = 0
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        try:
            found = socket.getaddrinfo(
                config.host or None, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            self.address_family = found[0][0]
            super().__init__((str(found[0][4][0]), config.port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.host or 'every address'}, port {config.port}: {error.strerror}; "
                "choose others with --api_host and --api_port"
            ) from error

    def server_bind(self) -> None:
        # HTTPServer's asks the name service for this machine's name, which may take seconds or for ever.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.config.host, int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.1)  # the connection stays in the queue, and accepting it fails until others end
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            is_full = len(self._connections) >= _MAX_CONNECTIONS
            if not is_full:
                self._connections.add(request)
        if not is_full:
            super().process_request(request, client_address)
            return
        error = ApiError(503, f"{_MAX_CONNECTIONS} connections are open, which is the most; try again later")
        body = json.dumps(error.body).encode()
        with suppress(OSError):
            request.settimeout(1)
            request.sendall(
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\n"
                b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Makes every thread that reads from or writes to its client come to an end."""
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Counts the context among the answers on their way."""
        with self._lock:
            self.n_busy += 1
        try:
            yield
        finally:
            with self._lock:
                self.n_busy -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.exception("a mistake of tpilite's own while serving %s, %s", client_address, request)


class _HeadTooLarge(Exception):
    """A client sent more than a request's head may have."""


class _Reader(io.RawIOBase):
    """A socket's bytes, until a deadline for all of them and, in a request's head, up to a number of them."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._until_s = 0.0
        self._after_first_s: float | None = None
        self._n_left: int | None = None

    def readable(self) -> bool:
        return True

    def head_follows(self, idle_s: float) -> None:
        """A head may begin within `idle_s` and has its own time from then on."""
        self._until_s = time.monotonic() + idle_s
        self._after_first_s, self._n_left = _HEAD_S, _MAX_HEAD_BYTES

    def body_follows(self) -> None:
        self._until_s = time.monotonic() + _BODY_S
        self._after_first_s = self._n_left = None

    def readinto(self, buffer: Any) -> int:
        if self._n_left is not None and self._n_left <= 0:
            raise _HeadTooLarge
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the client took too long")
        self._connection.settimeout(left_s)
        n = self._connection.recv_into(buffer)
        if self._after_first_s is not None:
            self._until_s, self._after_first_s = time.monotonic() + self._after_first_s, None
        if self._n_left is not None:
            self._n_left -= n
        return n


class _Handler(BaseHTTPRequestHandler):
    """One connection's requests, one after another."""

    server: _HttpServer
    protocol_version = "HTTP/1.1"
    default_request_version = (
        "HTTP/1.0"  # for what names none; the default, 0.9, has no headers to answer with
    )
    server_version = f"tpilite/{__version__}"
    sys_version = ""
    disable_nagle_algorithm = True

    # ---- the connection

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._reader = _Reader(self.connection)
        self.rfile = io.BufferedReader(self._reader)
        self._idle_s = _HEAD_S  # for the first request; kept connections may be silent for longer
        self._n_unread = 0

    def handle_one_request(self) -> None:
        self._reader.head_follows(self._idle_s)
        self._idle_s = _IDLE_S
        self._n_unread, self._has_begun = 0, False
        self._origin: str | None = None  # the page's, where it is another site's and allowed
        self.command, self.requestline, self.request_version = "", "", "HTTP/1.1"
        try:
            super().handle_one_request()
        except _HeadTooLarge:
            self.send_error(431, f"a request's head must be at most {_MAX_HEAD_BYTES} bytes")
        except OSError as error:
            logger.debug("%s went away: %s", self.client_address, error)
            self.close_connection = True
        if self._n_unread:
            self.close_connection = True

    def finish(self) -> None:
        if self._n_unread:
            self._linger()
        super().finish()

    def _linger(self) -> None:
        """Reads and drops what the client is still sending, for a while."""
        until_s, n_left = time.monotonic() + _LINGER_S, _LINGER_BYTES
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while n_left > 0 and (left_s := until_s - time.monotonic()) > 0:
                self.connection.settimeout(left_s)
                n = len(self.connection.recv(1 << 16))
                if not n:
                    break
                n_left -= n

    def _is_gone(self) -> bool:
        """Whether the client has closed its end: what it asked for is not wanted any more."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        try:
            return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    # ---- requests

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def _serve(self) -> None:
        try:
            self._n_unread = self._body_length()
            self._check_host()
            self._check_origin()
            self._route(urlsplit(self.path).path)
        except ApiError as error:
            self._refuse(error)
        except OSError:
            raise
        # One request's mistake must not look to its client like a dead server.
        except Exception:
            logger.exception("a mistake of tpilite's own while answering %s", self.requestline)
            self._refuse(ApiError(500, "the server made a mistake; see its log", kind="server_error"))

    def _route(self, path: str) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        name = path.removeprefix("/v1/models/") if path.startswith("/v1/models/") else None
        file = self.server.page.get(path)
        allowed = ("GET",) if file is not None or name else _ROUTES.get(path)
        if allowed is None:
            raise ApiError(404, f"there is nothing at {path[:200]!r}", code="unknown_url")
        if method == "OPTIONS" and self._origin is not None:
            return self._preflight(allowed)
        if method not in allowed:
            raise ApiError(
                405,
                f"{path} takes {' and '.join(allowed)}, not {self.command}",
                code="method_not_supported",
            )
        if file is not None:
            return self._send_file(file)
        if path == "/health":
            health = self.server.service.health()
            return self._send_json(health, 200 if health["status"] == "ok" else 503)
        self._check_key()
        if path == "/metrics":
            return self._send(_metrics(self.server.service), "text/plain; version=0.0.4; charset=utf-8")
        if path == "/v1/cluster":
            return self._send_json(self._cluster())
        if path == "/v1/models":
            return self._send_json(openai.models(self.server.model_name, self.server.created_s))
        if name is not None:
            if unquote(name) != self.server.model_name:
                raise openai.unknown_model(unquote(name), self.server.model_name)
            return self._send_json(openai.model(self.server.model_name, self.server.created_s))
        body, defaults = openai.parse_json(self._body()), self.server.config.defaults
        parse = openai.parse_chat if path == "/v1/chat/completions" else openai.parse_completion
        return self._complete(parse(body, defaults))

    def _body_length(self) -> int:
        """The length of the request's body. Raises `ApiError` where it is not said in the one way served."""
        if "Transfer-Encoding" in self.headers:
            self._n_unread = 1
            raise ApiError(411, "the body's length must be given by Content-Length, not in chunks")
        lengths = set(self.headers.get_all("Content-Length", ()))
        if not lengths:
            return 0
        length = lengths.pop().strip()
        if lengths or not (length.isascii() and length.isdigit() and len(length) < 16):
            self._n_unread = 1
            raise ApiError(400, "the Content-Length is not one whole number")
        return int(length)

    def _body(self) -> bytes:
        if "Content-Length" not in self.headers:
            raise ApiError(411, "a body is needed, and its length by Content-Length")
        if self._n_unread > _MAX_BODY_BYTES:
            raise ApiError(413, f"the body has {self._n_unread} bytes; the most is {_MAX_BODY_BYTES}")
        self._reader.body_follows()
        body = self.rfile.read(self._n_unread)
        if len(body) < self._n_unread:
            raise ConnectionAbortedError("the client hung up inside of a request's body")
        self._n_unread = 0
        return body

    def _check_host(self) -> None:
        """Refuses names that are not this machine's: a page elsewhere could point its own name here.

        By an address nobody else's page can be reached, so addresses are right whatever they are.
        """
        hosts = self.headers.get_all("Host", ())
        if len(hosts) != 1 or not (match := _HOST.fullmatch(hosts[0].strip())):
            raise ApiError(400, "a request needs one Host header with a name or an address")
        name = match[1].strip("[]").rstrip(".").lower()
        if name in self.server.host_names or name.endswith(".localhost"):
            return
        try:
            ipaddress.ip_address(name)
        except ValueError:
            raise ApiError(
                403,
                f"{name[:100]!r} is not a name of this server: use its address, or start it with --api_name",
                code="host_not_allowed",
            ) from None

    def _check_origin(self) -> None:
        """Refuses pages of other sites: they could make the server work without reading its answers."""
        origin = self.headers.get("Origin")
        if origin is None or urlsplit(origin).netloc.lower() == self.headers["Host"].strip().lower():
            return
        if not {origin, "*"} & set(self.server.config.cors_origins):
            raise ApiError(
                403,
                f"pages of {origin[:100]!r} may not use this server; --cors_origin allows them",
                code="origin_not_allowed",
            )
        self._origin = origin

    def _check_key(self) -> None:
        key = self.server.config.api_key
        if key is None:
            return
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not given:
            raise ApiError(401, "an API key is needed: send it as 'Authorization: Bearer KEY'")
        if not hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode()):
            raise ApiError(401, "the API key is not the right one", code="invalid_api_key")

    # ---- answers

    def _complete(self, request: openai.Request) -> None:
        service = self.server.service
        if request.model != self.server.model_name:
            raise openai.unknown_model(request.model, self.server.model_name)
        try:
            if request.messages is not None:
                job = service.chat(request.messages, request.params, request.n)
            else:
                job = service.complete(request.prompts, request.params, request.n)
        except TpiliteError as error:
            raise _api_error(error, is_chat=request.is_chat) from error
        prefix = "chatcmpl" if request.is_chat else "cmpl"
        head = Head(
            f"{prefix}-{secrets.token_hex(12)}", int(time.time()), self.server.model_name, request.is_chat
        )
        answer = _Answer(service, request, head)
        try:
            with self.server.busy():
                if request.stream:
                    self._stream(job, answer)
                else:
                    self._collect(job, answer)
        finally:
            job.cancel()

    def _collect(self, job: Job, answer: "_Answer") -> None:
        try:
            for delta in self._deltas(job, lambda: None):
                answer.add(delta)
        except TpiliteError as error:
            raise _api_error(error, is_chat=answer.request.is_chat) from error
        self._send_json(answer.response(job))

    def _stream(self, job: Job, answer: "_Answer") -> None:
        chunked = self.request_version >= "HTTP/1.1"
        self._begin(200, {"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"})
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
        self.end_headers()

        def send(events: bytes) -> None:
            if not events:  # which would end a body in chunks
                return
            self.connection.settimeout(_SEND_S)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(events), events) if chunked else events)

        def keep_alive() -> None:
            send(b": still working\n\n" if self.server.service.waiting_for is None else b": waiting\n\n")

        send(_events(answer.opening()))
        try:
            for delta in self._deltas(job, keep_alive):
                if chunks := answer.chunks(delta):
                    send(_events(chunks))
            send(_events(answer.closing(job)) + b"data: [DONE]\n\n")
        except TpiliteError as error:
            send(_events([_api_error(error, is_chat=answer.request.is_chat).body]))
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _deltas(self, job: Job, keep_alive: Callable[[], None]) -> Iterator[Delta]:
        """The job's deltas, as long as the client is there. Raises the error that ended the job."""
        said_s = time.monotonic()
        while job.n_unfinished:
            delta = job.next(_POLL_S)
            if self._is_gone():
                raise ConnectionAbortedError("the client hung up before its answer was complete")
            if delta is not None:
                said_s = time.monotonic()
                yield delta
            elif time.monotonic() - said_s >= _KEEP_ALIVE_S:
                said_s = time.monotonic()
                keep_alive()

    def _cluster(self) -> Json:
        server, defaults = self.server, self.server.config.defaults
        return {
            **server.service.health(),
            "model": {
                "id": server.model_name,
                "context": server.service.context,
                "chat": server.service.can_chat,
            },
            "defaults": {
                "temperature": defaults.temperature,
                "top_p": defaults.p,
                "top_k": defaults.k,
                "min_p": defaults.min_p,
                "repetition_penalty": defaults.repetition_penalty,
                "max_tokens": defaults.length,
            },
            "figures": server.service.figures(),
            "ranks": server.service.ranks(),
        }

    def _send_json(self, value: Json, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), "application/json", status)

    def _send_file(self, file: _File) -> None:
        headers = {"ETag": file.etag, "Cache-Control": "no-cache"}
        if self.headers.get("If-None-Match") == file.etag:
            self._begin(304, headers)
            self.end_headers()
        else:
            self._send(file.content, file.content_type, headers=headers)

    def _preflight(self, allowed: tuple[str, ...]) -> None:
        self._begin(204, {"Access-Control-Allow-Methods": ", ".join(allowed)})
        self.send_header("Access-Control-Allow-Headers", "authorization, content-type")
        self.send_header("Access-Control-Max-Age", "600")
        self.end_headers()

    def _refuse(self, error: ApiError) -> None:
        if self._has_begun:
            self.close_connection = True
            return
        headers = {}
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(error.retry_after_s)
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if error.status == 405:
            headers["Allow"] = ", ".join(_ROUTES.get(urlsplit(self.path).path, ("GET",)))
        self._send(json.dumps(error.body).encode(), "application/json", error.status, headers)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers what http.server finds wrong by itself, and closes."""
        self.close_connection, self._n_unread = True, 1
        self._has_begun, self._origin = False, None
        self._refuse(ApiError(code, message or explain or self.responses[code][0]))

    def _send(
        self, body: bytes, content_type: str, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        self._begin(
            status, {"Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}
        )
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        """The status and the headers that every answer has, and these."""
        self.connection.settimeout(_SEND_S)
        self._has_begun = True
        self.send_response(status)
        everywhere = {"Cache-Control": "no-store", **_SECURITY}
        if self.server.config.cors_origins:
            everywhere["Vary"] = "Origin"
        if self._origin is not None:
            everywhere["Access-Control-Allow-Origin"] = self._origin
            everywhere["Cross-Origin-Resource-Policy"] = "cross-origin"
        if self.close_connection or self._n_unread:
            everywhere["Connection"] = "close"
        everywhere["X-Request-Id"] = f"req_{secrets.token_hex(12)}"
        for name, value in {**everywhere, **headers}.items():
            self.send_header(name, value)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("%s: %s", self.client_address[0], format % args)


class _Answer:
    """A request's deltas as OpenAI's chunks or as one response."""

    def __init__(self, service: Service, request: openai.Request, head: Head) -> None:
        self.request = request
        self._service, self._head = service, head
        n_choices = request.n * max(1, len(request.prompts))
        prompts = [service.decode(p) for p in request.prompts] if request.echo else []
        self._echoes = [prompts[i // request.n] if prompts else "" for i in range(n_choices)]
        self._texts: list[list[str]] = [[echo] for echo in self._echoes]
        self._logprobs: list[list[Any]] = [[] for _ in range(n_choices)]
        self._reasons = [""] * n_choices
        self._offsets = [len(echo) for echo in self._echoes]

    def add(self, delta: Delta) -> None:
        self._texts[delta.index].append(delta.text)
        self._logprobs[delta.index] += delta.logprobs
        self._reasons[delta.index] = _reason(delta.finish_reason)

    def response(self, job: Job) -> Json:
        choices = [
            openai.choice(self._head, i, "".join(text), self._tell(i, logprobs), reason)
            for i, (text, logprobs, reason) in enumerate(
                zip(self._texts, self._logprobs, self._reasons, strict=True)
            )
        ]
        return openai.response(self._head, choices, job.n_prompt, job.n_new)

    def opening(self) -> list[Json]:
        usage = self.request.include_usage
        chunks = openai.opening(self._head, self.request.n, include_usage=usage)
        echoes = [(i, echo) for i, echo in enumerate(self._echoes) if echo]
        return chunks + [openai.chunk(self._head, i, echo, include_usage=usage) for i, echo in echoes]

    def chunks(self, delta: Delta) -> list[Json]:
        usage, chunks = self.request.include_usage, []
        if delta.text or delta.logprobs:
            logprobs = self._tell(delta.index, delta.logprobs)
            chunks.append(
                openai.chunk(self._head, delta.index, delta.text, logprobs=logprobs, include_usage=usage)
            )
        if delta.finish_reason is not None:
            reason = _reason(delta.finish_reason)
            chunks.append(
                openai.chunk(self._head, delta.index, "", finish_reason=reason, include_usage=usage)
            )
        return chunks

    def closing(self, job: Job) -> list[Json]:
        return [openai.closing(self._head, job.n_prompt, job.n_new)] if self.request.include_usage else []

    def _tell(self, index: int, logprobs: Any) -> Json | None:
        if self.request.params.logprobs is None:
            return None
        if self.request.is_chat:
            return openai.chat_logprobs(logprobs, self._service.token)
        found, self._offsets[index] = openai.text_logprobs(
            logprobs, self._service.token, self._offsets[index]
        )
        return found


def _reason(reason: str | None) -> str:
    return "length" if reason == "length" else "stop"


def _events(values: list[Json]) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(value).encode() for value in values)


def _api_error(error: TpiliteError, *, is_chat: bool) -> ApiError:
    """How OpenAI would say it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TooLong):
        return openai.too_long(error.n_prompt, error.n_new, error.limit, is_chat=is_chat)
    if isinstance(error, Busy):
        return ApiError(
            429,
            str(error),
            kind="requests",
            code="rate_limit_exceeded",
            retry_after_s=error.retry_after_s,
        )
    if isinstance(error, ConfigError):
        return ApiError(400, str(error), param="messages" if is_chat else "prompt", code="invalid_value")
    if isinstance(error, Broken):
        return ApiError(500, str(error), kind="server_error", code="internal_error")
    code = "stopping" if isinstance(error, Stopping) else "unavailable"
    return ApiError(503, str(error), kind="server_error", code=code, retry_after_s=5)


def _metrics(service: Service) -> bytes:
    """The figures as Prometheus reads them."""
    figures = {**service.figures(), "up": float(service.health()["status"] == "ok")}
    lines = []
    for name, value in figures.items():
        is_counter = name in _COUNTERS
        full = f"tpilite_{name}{'_total' if is_counter else ''}"
        lines.append(f"# TYPE {full} {'counter' if is_counter else 'gauge'}\n{full} {value}\n")
    return "".join(lines).encode()
