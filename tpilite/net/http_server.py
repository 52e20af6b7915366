"""An HTTP/1.1 server: connections within limits, requests read from them and answers written.

    server = HttpServer(listening_socket, make_application, max_connections=64)
    server.start()

Everything that a client may make the server hold has a limit here: connections, the time for a request's
head and body, and the time that a client may leave an answer unread. What is asked and answered is the
application's. Where the most connections are open, one that waits for its client is closed for a new one.
"""

import logging
import math
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from typing import Any, Protocol

from tpilite.closing import Closing
from tpilite.net.http import HttpError, Request, RequestReader
from tpilite.net.listener import Acceptor, RefusalLog, shut_down

_log = logging.getLogger(__name__)

# Request line and headers are one packet from anything but an attacker; a body may come over a slow link.
_HEAD_S, _BODY_S = 10.0, 60.0
# Who sends less of a body than this in a second makes room where others wait for its memory: half a megabit.
_SLOW_S, _SLOW_BYTES = 1.0, 64 << 10
# Connections that browsers, clients and workers keep for their next request.
_IDLE_S = 60.0
# A client that reads nothing for so long has its answer cut.
_SEND_S = 30.0
# Who reads nothing for so long is told apart from who was just sent something.
_STALLED_S = 1.0
# What is still on its way when an error is answered early is read and dropped, or the client would see a
# reset connection in place of the error.
_LINGER_S, _LINGER_BYTES = 2.0, 64 << 20
_PACKET_BYTES = 64 << 10
# TLS has no sendfile; one copy of this size keeps the cost of each call below a percent.
_FILE_PIECE_BYTES = 256 << 10
# That a client has closed its end is told even where it left bytes that nobody has read yet (not on a Mac).
_POLL_HANGUP = getattr(select, "POLLRDHUP", 0)


_NO_REQUEST = Request("GET", "/", "/", {}, is_http_1_0=True, length=0)


class Application(Protocol):
    """What answers the requests of one connection, or of all."""

    def respond(self, connection: "Connection") -> None:
        """Answers `connection.request`. What it raises, `HttpError` apart, ends the connection."""

    def refuse(self, connection: "Connection", error: HttpError) -> None:
        """Answers what is wrong as HTTP; the connection is closed then."""


class Connection:
    """One connection's requests, one after another, and the ways to answer the present one.

    Whatever reads or sends raises `OSError` where the client is gone or too slow.
    """

    def __init__(self, sock: socket.socket, peer: str, proof_s: float | None) -> None:
        self.peer = peer
        self.request = _NO_REQUEST
        self.common_headers: dict[str, str] = {}  # of the answer, whichever it will be
        self.has_begun = False  # whether a part of the answer is sent
        self.problem = "it closed the connection without a request"  # why it is not authenticated
        self.is_authenticated = False
        self._waits_since_s: float | None = time.monotonic()  # for its client to send or to read
        self._sock = sock
        self._until_s = float("inf") if proof_s is None else time.monotonic() + proof_s
        self._reader = RequestReader()
        self._body: bytearray | None = None  # what is read of the request's, where it is being read
        self._body_until_s = math.inf
        self._closing = False
        self._head_s = _HEAD_S  # for the first request; kept connections may be silent for longer

    def waits_since(self, now_s: float) -> float | None:
        """Since when nothing is being done for it, so that it may be closed for another; None while it is."""
        since_s = self._waits_since_s
        if since_s is None or since_s > now_s or (self.is_authenticated and not self._reader.is_idle):
            return None
        return since_s

    def authenticate(self) -> None:
        """Tells apart a client that has proved itself: it has no deadline, and others make room first."""
        self.is_authenticated, self._until_s = True, float("inf")

    def serve(self, application: Application, tls: ssl.SSLContext | None) -> None:
        """Answers requests until the connection ends."""
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            self.problem = "no TLS handshake"
            with self._waiting(_HEAD_S):
                self._sock = tls.wrap_socket(self._sock, server_side=True)
        while not self._closing:
            self.request, self.has_begun, self.common_headers = _NO_REQUEST, False, {}
            self._body = None
            try:
                self.request = self._next_request()
                self._closing = self.request.wants_close
                self.problem = "it sent no proof"
                application.respond(self)
            except HttpError as error:
                self.problem = str(error)
                self.refuse(application, error)
            self._closing |= self._reader.in_body
        self._linger()

    def refuse(self, application: Application, error: HttpError) -> None:
        """Has the application answer what is wrong as HTTP, and closes."""
        self._closing = True
        if not self.has_begun:
            application.refuse(self, error)

    # ---- reading

    def _next_request(self) -> Request:
        until_s = time.monotonic() + self._head_s
        self._head_s = _IDLE_S
        was_idle = True
        while (request := self._reader.next_request()) is None:
            if was_idle and not self._reader.is_idle:
                until_s, was_idle = time.monotonic() + _HEAD_S, False
            self._receive(until_s)
        return request

    def begin_body(self, n_bytes: int, max_bytes: int) -> bool:
        """Reads `n_bytes` of the request's body; whether that is all. Raises `HttpError` as `body` does."""
        if (self.request.length or 0) > max_bytes:
            raise HttpError(413, f"the body has {self.request.length} bytes; the most is {max_bytes}")
        if self.request.headers.get("expect", "").lower() == "100-continue" and self._reader.in_body:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._body, self._body_until_s = bytearray(), time.monotonic() + _BODY_S
        return self._read_body(n_bytes, max_bytes, lambda: False)

    def body(self, max_bytes: int, is_wanted: Callable[[], bool] = lambda: False) -> bytes:
        """The request's body, or the rest of what `begin_body` began.

        Raises `HttpError` where it is longer, or where it comes slowly while others want its memory.
        """
        if self._body is None:
            self.begin_body(0, max_bytes)
        self._read_body(max_bytes + 1, max_bytes, is_wanted)
        body, self._body = self._body, None
        return bytes(body or b"")

    def _read_body(self, n_bytes: int, max_bytes: int, is_wanted: Callable[[], bool]) -> bool:
        body = self._body
        assert body is not None
        n_before, slow_s = len(body), time.monotonic() + _SLOW_S
        while len(body) < n_bytes:
            piece = self._reader.next_piece()
            if piece == b"":
                return True
            if piece is not None:
                body += piece
                if len(body) > max_bytes:
                    raise HttpError(413, f"the body is longer than {max_bytes} bytes, which is the most")
                continue
            try:
                self._receive(min(self._body_until_s, slow_s))
            except TimeoutError:
                if time.monotonic() >= self._body_until_s:
                    raise
            if time.monotonic() >= slow_s:
                if len(body) < n_before + _SLOW_BYTES and is_wanted():
                    raise HttpError(503, "the body came too slowly for a busy server; try again later")
                n_before, slow_s = len(body), time.monotonic() + _SLOW_S
        return not self._reader.in_body

    def is_gone(self) -> bool:
        """Whether the client has closed its end: what it asked for is not wanted any more."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN | _POLL_HANGUP)
        try:
            events = poll.poll(0)
            if events and not events[0][1] & ~select.POLLIN:
                return not self._sock.recv(1, socket.MSG_PEEK)
        except OSError:
            return True
        return bool(events)

    def _receive(self, until_s: float) -> None:
        with self._waiting(until_s - time.monotonic()):
            data = self._sock.recv(_PACKET_BYTES)
        if not data:
            raise ConnectionAbortedError(self.problem if self._reader.is_idle else "it sent half a request")
        self._reader.feed(data)

    # ---- answering

    def send(
        self, body: bytes, content_type: str, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answers with a body, which HEAD leaves out."""
        length = {"Content-Type": content_type, "Content-Length": str(len(body))}
        head = self._head(status, {**length, **(headers or {})})
        self._send(head if self.request.method == "HEAD" else head + body)

    def send_empty(self, status: int, headers: Mapping[str, str]) -> None:
        """Answers with headers alone, by a status or for a method that has no body."""
        self._send(self._head(status, headers))

    def send_file(self, file: Any, start: int, stop: int, status: int, headers: Mapping[str, str]) -> bool:
        """Answers with bytes of a file; whether it had all of them, or else the connection is closed."""
        self.send_empty(status, {**headers, "Content-Length": str(stop - start)})
        at = start
        if self.request.method == "HEAD" or start == stop:
            return True
        with self._waiting(_SEND_S, _STALLED_S):
            if not isinstance(self._sock, ssl.SSLSocket):
                at += self._sock.sendfile(file, start, stop - start)
            else:
                file.seek(start)
                view = memoryview(bytearray(min(_FILE_PIECE_BYTES, stop - start)))
                while at < stop and (n := file.readinto(view[: stop - at])):
                    self._sock.sendall(view[:n])
                    at += n
        self._closing |= at < stop
        return at == stop

    def begin_stream(self, content_type: str, headers: Mapping[str, str]) -> None:
        """Begins an answer whose length is not known: in chunks, or up to the end of the connection."""
        how = {"Transfer-Encoding": "chunked"} if self._chunks else {}
        self.send_empty(200, {"Content-Type": content_type, **headers, **how})

    def write(self, data: bytes) -> None:
        """Sends a piece of a stream; none at all where it is empty, since an empty chunk ends the body."""
        if data:
            self._send(b"%x\r\n%s\r\n" % (len(data), data) if self._chunks else data)

    def end_stream(self) -> None:
        """Ends a stream, in chunks by an empty one: without it the client knows that it is not whole."""
        if self._chunks:
            self._send(b"0\r\n\r\n")

    @property
    def _chunks(self) -> bool:
        return not self.request.is_http_1_0

    def cut(self) -> None:
        """Has the connection end with this answer, complete or not."""
        self._closing = True

    def close(self) -> None:
        self._sock.close()

    def _head(self, status: int, headers: Mapping[str, str]) -> bytes:
        self.has_begun = True
        closing = {"Connection": "close"} if self._closing or self._reader.in_body else {}
        fields = {"Server": "tpilite", "Date": formatdate(usegmt=True)}
        fields |= {**self.common_headers, **closing, **headers}
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{k}: {v}" for k, v in fields.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def _send(self, data: bytes) -> None:
        with self._waiting(_SEND_S, _STALLED_S):
            self._sock.sendall(data)

    # ---- waiting and ending

    @contextmanager
    def _waiting(self, timeout_s: float, patience_s: float = 0.0) -> Iterator[None]:
        """What the client has so long for; after `patience_s` its place is another's that needs one."""
        now_s = time.monotonic()
        self._waits_since_s = now_s + patience_s
        timeout_s = min(timeout_s, self._until_s - now_s)
        if timeout_s <= 0:
            raise TimeoutError("it took too long")
        self._sock.settimeout(timeout_s)
        yield
        self._waits_since_s = None

    def _linger(self) -> None:
        """Reads and drops what the client is still sending, for a while."""
        until_s, n_left = time.monotonic() + _LINGER_S, _LINGER_BYTES
        self._sock.shutdown(socket.SHUT_WR)
        while n_left > 0:
            with self._waiting(until_s - time.monotonic()):
                n = len(self._sock.recv(_PACKET_BYTES))
            if not n:
                return
            n_left -= n


class HttpServer(Closing):
    """Serves HTTP on a listening socket, each connection in a thread and by an application of its own.

    With `proof_s`, a connection that the application does not `authenticate` in this time is closed and told
    of in the log, some of many.
    """

    def __init__(
        self,
        sock: socket.socket,
        make_application: Callable[[], Application],
        *,
        max_connections: int,
        tls: ssl.SSLContext | None = None,
        proof_s: float | None = None,
    ) -> None:
        self._make_application, self._max_connections = make_application, max_connections
        self._tls, self._proof_s = tls, proof_s
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, Connection] = {}  # by the handles that end them
        self._refusals = RefusalLog()
        self._acceptor = Acceptor(sock, self._admit, self._end, self._refusals)

    @property
    def port(self) -> int:
        return self._acceptor.port

    def start(self) -> None:
        """Accepts, from now on."""
        self._acceptor.start()

    def close(self) -> None:
        """Closes the port and every connection, also in the middle of an answer, and joins all threads."""
        self._acceptor.close()

    def _admit(self, sock: socket.socket, handle: socket.socket, peer: str) -> Callable[[], None] | None:
        connection = Connection(sock, peer, self._proof_s)
        with self._lock:
            if len(self._connections) < self._max_connections or self._make_room():
                self._connections[handle] = connection
                return partial(self._serve, connection, handle)
        text = f"{self._max_connections} connections are open, which is the most; try again later"
        self._refusals.add(peer, text)
        if self._tls is None:
            with suppress(OSError):
                connection.refuse(self._make_application(), HttpError(503, text))
        return None

    def _make_room(self) -> bool:
        """Ends the connection that has waited for its client the longest, if there is any."""
        now_s = time.monotonic()
        waiting = [
            (connection.is_authenticated, since_s, handle)
            for handle, connection in self._connections.items()
            if (since_s := connection.waits_since(now_s)) is not None
        ]
        if not waiting:
            return False
        handle = min(waiting, key=lambda entry: entry[:2])[2]
        self._connections.pop(handle).problem = "it made room for another one"
        shut_down(handle)
        return True

    def _serve(self, connection: Connection, handle: socket.socket) -> None:
        try:
            connection.serve(self._make_application(), self._tls)
        except OSError as error:
            _log.debug("the connection of %s ended: %s", connection.peer, error)
        # Nothing above this thread would hear of a mistake of ours.
        except Exception:
            _log.exception("a mistake of tpilite's own while serving %s", connection.peer)
        finally:
            connection.close()
            with self._lock:
                self._connections.pop(handle, None)
            if self._proof_s is not None and not connection.is_authenticated:
                self._refusals.add(connection.peer, connection.problem)

    def _end(self) -> None:
        with self._lock:
            for handle in self._connections:
                shut_down(handle)
