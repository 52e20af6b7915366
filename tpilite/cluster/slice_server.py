"""The slices of every rank over HTTP, for those alone who know the cluster's token: see `slice_protocol`."""

import contextlib
import io
import logging
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from tpilite.closing import Closing
from tpilite.cluster.catalog import Catalog
from tpilite.cluster.slice_protocol import (
    CLIENT_ROLE,
    authentication_info,
    challenge,
    read_authorization,
    read_range,
    server_role,
)
from tpilite.errors import SliceError
from tpilite.net import auth
from tpilite.net.address import format_address, plain_host
from tpilite.net.listener import RefusalLog, listen, shut_down

_log = logging.getLogger(__name__)

# Our client's head is under 600 bytes; what http.client sends through a proxy stays under a few thousand.
_MAX_HEAD_BYTES = 8192
# One request without a proof is how every client begins; a second may be a HEAD before it.
_MAX_CHALLENGES = 3
# A home cluster has up to some tens of machines with one connection each, beside dead ones not yet noticed.
_MAX_CONNECTIONS = 64
# The proof is one round trip after connecting; TLS adds two and, on the slowest machine, half a second.
_AUTHENTICATION_S = 10.0
# A worker waits a few seconds between two requests; a peer that takes no byte for this long is gone.
_SILENCE_S = 60.0
_POLL_S = 0.1
_RETRY_AFTER_S = 2
# TLS has no sendfile; one copy of this size keeps the per-call cost below a percent.
_CHUNK_BYTES = 256 * 1024


class SliceServer(Closing):
    """Serves slice folders by rank until it is closed; a context manager.

    `folders` names the ranks that exist. A folder without a manifest is looked at again at each request;
    None stands for a rank whose slices will come with `publish`. Port 0 takes a free one: see `.port`.
    `host` "" listens on every address of the machine, IPv6 and IPv4.
    """

    def __init__(
        self,
        folders: Mapping[int, Path | None],
        token: str,
        port: int,
        tls: ssl.SSLContext | None = None,
        host: str = "",
    ) -> None:
        self._catalog = Catalog(folders)
        self._key, self._address, self._tls = auth.derive_key(token), (host, port), tls
        self._listener: _Listener | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        assert self._listener is not None, "start() comes first"
        return int(self._listener.socket.getsockname()[1])

    def publish(self, rank: int, folder: Path) -> None:
        """Serves `folder` as that rank's from now on, in place of what was. Raises `SliceError`."""
        self._catalog.publish(rank, folder)

    def start(self) -> None:
        """Listens. Raises `ConfigError` when the port cannot be had."""
        self._listener = _Listener(self._catalog, self._key, self._address, self._tls)
        self._thread = threading.Thread(
            target=self._listener.serve_forever, args=(_POLL_S,), name="slice-server", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Closes the port and every connection, also in the middle of a file, and joins all threads."""
        if self._listener is None or self._thread is None:
            return
        self._listener.shutdown()
        self._thread.join()
        self._listener.server_close()
        self._listener.end_all()
        self._listener = self._thread = None

    def __enter__(self) -> "SliceServer":
        self.start()
        return self


@dataclass
class _Connection:
    thread: threading.Thread
    since: float = field(default_factory=time.monotonic)
    authenticated: bool = False


class _Listener(socketserver.TCPServer):
    """Accepts connections, a bounded number of them, each with its thread.

    A connection that has not proved the token is ended after a fixed time, whatever it sends or does not
    send. Where the most connections are open, the oldest such one is ended for a new one.
    """

    def __init__(
        self, catalog: Catalog, key: bytes, address: tuple[str, int], tls: ssl.SSLContext | None
    ) -> None:
        super().__init__(address, _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listen(address, "--file_port", "serve slices")
        self.catalog, self.key, self._tls = catalog, key, tls
        self._connections: dict[socket.socket, _Connection] = {}
        self._changed = threading.Condition()
        self.refusals = RefusalLog()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        connection.settimeout(_SILENCE_S)
        if self._tls is None:
            return connection, address
        try:
            # The handshake waits for the peer: it belongs to the connection's thread.
            return self._tls.wrap_socket(connection, True, do_handshake_on_connect=False), address
        except OSError:
            connection.close()
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.exception("cannot serve %s on %s", _name(client_address), request)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            if not self._make_room():
                _log.warning(
                    "%s is refused: %d connections are open", _name(client_address), _MAX_CONNECTIONS
                )
                self.shutdown_request(request)
                return
            thread = threading.Thread(
                target=self._serve, args=(request, client_address), name="slice-connection", daemon=True
            )
            self._connections[request] = _Connection(thread)
        thread.start()

    def service_actions(self) -> None:
        with self._changed:
            now = time.monotonic()
            for connection, state in self._connections.items():
                if not state.authenticated and now - state.since > _AUTHENTICATION_S:
                    shut_down(connection)

    def set_authenticated(self, connection: socket.socket) -> None:
        """Lifts the deadline from a connection that has proved the token."""
        with self._changed:
            self._connections[connection].authenticated = True

    def end_all(self) -> None:
        """Ends every connection, and waits for their threads."""
        with self._changed:
            threads = [state.thread for state in self._connections.values()]
            for connection in self._connections:
                shut_down(connection)
        for thread in threads:
            thread.join()

    def _make_room(self) -> bool:
        if len(self._connections) < _MAX_CONNECTIONS:
            return True
        unproven = [c for c, state in self._connections.items() if not state.authenticated]
        if unproven:
            shut_down(unproven[0])  # they stand in the order in which they came
        return self._changed.wait_for(lambda: len(self._connections) < _MAX_CONNECTIONS, timeout=1.0)

    def _serve(self, request: socket.socket, address: Any) -> None:
        try:
            _Handler(request, address, self)
        finally:
            self.shutdown_request(request)
            with self._changed:
                del self._connections[request]
                self._changed.notify_all()


class _Handler(BaseHTTPRequestHandler):
    """One connection: the proof, then any number of requests."""

    protocol_version = "HTTP/1.1"
    server: _Listener

    def setup(self) -> None:
        self.connection = self.request
        self.rfile = io.BytesIO()
        self.wfile = self.connection.makefile("wb")
        self._received = b""
        self._server_nonce, self._client_nonce = auth.new_nonce(), b""
        self._n_challenges = 0
        self._authenticated = False
        self._refusal = "it closed the connection without a request"

    def handle(self) -> None:
        try:
            if isinstance(self.connection, ssl.SSLSocket):
                self._refusal = "no TLS handshake"
                self.connection.do_handshake()
            super().handle()
        except OSError as error:
            _log.debug("connection of %s ended: %s", _name(self.client_address), error)

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            self.wfile.close()
        if not self._authenticated:
            self.server.refusals.add(_name(self.client_address), self._refusal)

    def handle_one_request(self) -> None:
        self.close_connection = True
        head = self._receive_head()
        if head is None:
            return
        self._refusal = "no proof of the token"
        self.rfile = io.BytesIO(head)
        self.raw_requestline = self.rfile.readline()
        if not self.parse_request():
            return
        has_body = "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0"
        if self.request_version != "HTTP/1.1" or has_body:
            self.send_error(HTTPStatus.BAD_REQUEST)
        elif self.command not in ("GET", "HEAD"):
            self.send_error(HTTPStatus.NOT_IMPLEMENTED)
        elif self._authenticated or self._authenticate():
            self._answer()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """A refused request: its status, not a word of what it said, and the end of the connection."""
        self._refusal = f"not a request of ours: {self.raw_requestline[:40]!r}"
        self.close_connection = True
        _log.debug("%s: %d %s %s", _name(self.client_address), code, message, explain)
        self._send_empty(HTTPStatus(code))

    def version_string(self) -> str:
        return "tpilite"

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug("%s: %s", _name(self.client_address), format % args)

    def _receive_head(self) -> bytes | None:
        """The bytes up to and with the first empty line; None where there is no request."""
        while (end := self._received.find(b"\r\n\r\n")) < 0:
            if len(self._received) > _MAX_HEAD_BYTES:
                self._refusal = f"more than {_MAX_HEAD_BYTES} bytes of request head"
                return None
            packet = self.connection.recv(_MAX_HEAD_BYTES)
            if not packet:
                return None
            self._refusal = f"no whole request, but {(self._received + packet)[:16]!r}"
            self._received += packet
            if not self._received[:1].isalpha():  # a TLS client, for one, would wait for an answer
                return None
        head, self._received = self._received[: end + 4], self._received[end + 4 :]
        return head

    def _authenticate(self) -> bool:
        claim = self.headers.get("Authorization")
        if claim is None:
            self._n_challenges += 1
            self.close_connection = self._n_challenges >= _MAX_CHALLENGES
            asked = {"WWW-Authenticate": challenge(self._server_nonce)}
            self._send_empty(HTTPStatus.UNAUTHORIZED, asked)
            return False
        found = read_authorization(claim)
        if found:
            self._client_nonce, proof = found
            self._authenticated = auth.verify(
                self.server.key, CLIENT_ROLE, self._server_nonce, self._client_nonce, proof
            )
        if not self._authenticated:
            self._refusal = "its proof is wrong: it has another token" if found else "its proof is malformed"
            self.close_connection = True
            self._send_empty(HTTPStatus.UNAUTHORIZED)
            return False
        self.server.set_authenticated(self.connection)
        return True

    def _answer(self) -> None:
        found = self.server.catalog.find(self.path)
        if isinstance(found, HTTPStatus):
            waiting = found == HTTPStatus.SERVICE_UNAVAILABLE
            self._send_empty(found, {"Retry-After": str(_RETRY_AFTER_S)} if waiting else {})
            return
        status, start, stop = HTTPStatus.OK, 0, found.size
        headers = {"Accept-Ranges": "bytes", "ETag": found.etag}
        if self.command == "GET" and self.headers.get("If-Range", found.etag) == found.etag:
            asked = read_range(self.headers.get("Range", ""), found.size)
            if asked is not None:
                status, (start, stop) = HTTPStatus.PARTIAL_CONTENT, asked
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{found.size}"
                if start == stop:
                    none = {"Content-Range": f"bytes */{found.size}"}
                    self._send_empty(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, none)
                    return
        try:
            file = found.open()
        except (OSError, SliceError) as error:
            _log.error("cannot serve %s: %s", self.path, error)
            self._send_empty(HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        with file:
            self._send_head(status, headers | {"Content-Length": str(stop - start)})
            if self.command == "GET" and start < stop and not self._send_bytes(file, start, stop):
                _log.error("%s became shorter while it was sent", self.path)
                self.close_connection = True

    def _send_bytes(self, file: io.FileIO | io.BytesIO, start: int, stop: int) -> bool:
        """Whether the file still held all of the bytes from `start` to `stop`, which are sent."""
        if not isinstance(self.connection, ssl.SSLSocket):
            return bool(self.connection.sendfile(file, start, stop - start) == stop - start)
        view = memoryview(bytearray(min(_CHUNK_BYTES, stop - start)))
        file.seek(start)
        while start < stop:
            n = file.readinto(view[: stop - start])
            if not n:
                return False
            self.connection.sendall(view[:n])
            start += n
        return True

    def _send_empty(self, status: HTTPStatus, headers: Mapping[str, str] | None = None) -> None:
        self._send_head(status, {"Content-Length": "0", **(headers or {})})

    def _send_head(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self._authenticated:
            role = server_role(status, self.path, headers.get("ETag", ""))
            proof = auth.prove(self.server.key, role, self._server_nonce, self._client_nonce)
            self.send_header("Authentication-Info", authentication_info(proof))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.flush()


def _name(address: Any) -> str:
    return format_address((plain_host(address[0]), address[1]))
