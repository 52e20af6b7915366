"""HTTP/1.1 on one connection: requests read within limits and answers written, whatever they mean.

    Connection(application, socket, address, server)

Everything that a client may make the server hold has a limit here: the time for a request's headers and
body, their sizes, and the time that a client may leave an answer unread. An `Application` sees of all this
an `Exchange`: one request, and the ways to answer it.
"""

import io
import logging
import select
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler
from typing import Any, Protocol

from tpilite.version import __version__

logger = logging.getLogger(__name__)

# Browsers with many cookies send 8 KiB.
_MAX_HEADERS_BYTES = 32 << 10
# A context of 128k tokens is half a megabyte of text, or one of token ids.
_MAX_BODY_BYTES = 4 << 20
# Request line and headers are one packet from anything but an attacker; a body may come over a slow link.
_HEADERS_S, _BODY_S = 10.0, 60.0
# Connections that browsers and clients keep for their next request.
_IDLE_S = 60.0
# A client that reads nothing for so long has its answer cut.
_SEND_S = 30.0
# What is still on its way when an error is answered early is read and dropped, or the client would see a
# reset connection in place of the error.
_LINGER_S, _LINGER_BYTES = 2.0, 64 << 20


class HttpError(Exception):
    """A request that is wrong as HTTP, whatever it asks for: the status, and a sentence for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class BodyStream:
    """A body in chunks or, for clients of HTTP/1.0, up to the end of the connection."""

    def __init__(self, connection: socket.socket, file: Any, *, chunked: bool) -> None:
        self._connection, self._file, self._chunked = connection, file, chunked

    def write(self, data: bytes) -> None:
        """Sends a piece; none at all where it is empty, since an empty chunk ends the body."""
        if data:
            self._connection.settimeout(_SEND_S)
            self._file.write(b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data)

    def end(self) -> None:
        """Ends the body, in chunks by an empty one: without it the client knows that it is not whole."""
        if self._chunked:
            self._file.write(b"0\r\n\r\n")


class Exchange(Protocol):
    """One request and its answer: all that an application sees of a connection.

    Whatever reads or sends raises `OSError` where the client is gone or too slow.
    """

    path: str  # with its query
    headers: Message
    common_headers: dict[str, str]  # those of the answer, whichever it will be
    has_begun: bool  # whether a part of the answer is sent

    @property
    def method(self) -> str: ...

    def body(self) -> bytes:
        """The request's body. Raises `HttpError` where there is none or too much of it."""

    def send(
        self, body: bytes, content_type: str, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answers with a body, which HEAD leaves out."""

    def send_empty(self, status: int, headers: Mapping[str, str]) -> None:
        """Answers with headers alone, by a status that has no body."""

    def stream(self, content_type: str, headers: Mapping[str, str]) -> BodyStream:
        """Begins an answer whose length is not known."""

    def cut(self) -> None:
        """Closes the connection after this answer, complete or not."""

    def is_gone(self) -> bool:
        """Whether the client has closed its end: what it asked for is not wanted any more."""


class Application(Protocol):
    """Whatever answers requests."""

    def respond(self, exchange: Exchange) -> None:
        """Answers a request; what goes wrong is an answer too. Raises `OSError` alone."""

    def refuse(self, exchange: Exchange, error: HttpError) -> None:
        """Answers a request that is wrong as HTTP, in the form of the application's errors."""


class _HeadersTooLarge(Exception):
    """A client sent more than the headers of a request may have."""


class _Reader(io.RawIOBase):
    """A socket's bytes, until a deadline for all of them and, in headers, up to a number of them."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._until_s = 0.0
        self._after_first_s: float | None = None
        self._n_left: int | None = None

    def readable(self) -> bool:
        """True: a raw stream says so before it is read."""
        return True

    def headers_follow(self, idle_s: float) -> None:
        """Lets a request begin within `idle_s`; its headers have their own time from then on."""
        self._until_s = time.monotonic() + idle_s
        self._after_first_s, self._n_left = _HEADERS_S, _MAX_HEADERS_BYTES

    def body_follows(self) -> None:
        """Lets a body come, of any length, within its time."""
        self._until_s = time.monotonic() + _BODY_S
        self._after_first_s = self._n_left = None

    def readinto(self, buffer: Any) -> int:
        """How many bytes came into `buffer`, 0 at the end. Raises `OSError` and `_HeadersTooLarge`."""
        if self._n_left is not None and self._n_left <= 0:
            raise _HeadersTooLarge
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


class Connection(BaseHTTPRequestHandler):
    """One connection's requests, one after another; each is an `Exchange`."""

    protocol_version = "HTTP/1.1"
    # For a request that names no version; 0.9, the library's, has no headers to answer with.
    default_request_version = "HTTP/1.0"
    server_version = f"tpilite/{__version__}"
    sys_version = ""
    disable_nagle_algorithm = True

    def __init__(self, application: Application, *args: Any) -> None:
        self._application = application
        super().__init__(*args)

    # ---- the connection

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._reader = _Reader(self.connection)
        self.rfile = io.BufferedReader(self._reader)
        self._idle_s = _HEADERS_S  # for the first request; kept connections may be silent for longer
        self._n_unread = 0

    def handle_one_request(self) -> None:
        self._reader.headers_follow(self._idle_s)
        self._idle_s = _IDLE_S
        self._n_unread, self.has_begun = 0, False
        self.common_headers: dict[str, str] = {}
        self.command, self.requestline, self.request_version = "", "", "HTTP/1.1"
        try:
            super().handle_one_request()
        except _HeadersTooLarge:
            self.send_error(431, f"a request's head must be at most {_MAX_HEADERS_BYTES} bytes")
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

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("%s: %s", self.client_address[0], format % args)

    # ---- requests

    def do_GET(self) -> None:
        try:
            self._n_unread = self._body_length()
        except HttpError as error:
            self._application.refuse(self, error)
        else:
            self._application.respond(self)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    @property
    def method(self) -> str:
        """GET and the like."""
        return self.command

    def _body_length(self) -> int:
        """The length of the request's body. Raises `HttpError` where it is not said in the one way served."""
        if "Transfer-Encoding" in self.headers:
            self._n_unread = 1
            raise HttpError(411, "the body's length must be given by Content-Length, not in chunks")
        lengths = set(self.headers.get_all("Content-Length", ()))
        if not lengths:
            return 0
        length = lengths.pop().strip()
        if lengths or not (length.isascii() and length.isdigit() and len(length) < 16):
            self._n_unread = 1
            raise HttpError(400, "the Content-Length is not one whole number")
        return int(length)

    def body(self) -> bytes:
        if "Content-Length" not in self.headers:
            raise HttpError(411, "a body is needed, and its length by Content-Length")
        if self._n_unread > _MAX_BODY_BYTES:
            raise HttpError(413, f"the body has {self._n_unread} bytes; the most is {_MAX_BODY_BYTES}")
        self._reader.body_follows()
        body = self.rfile.read(self._n_unread)
        if len(body) < self._n_unread:
            raise ConnectionAbortedError("the client hung up inside of a request's body")
        self._n_unread = 0
        return body

    def is_gone(self) -> bool:
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        try:
            return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    # ---- answers

    def send(
        self, body: bytes, content_type: str, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        length = {"Content-Type": content_type, "Content-Length": str(len(body))}
        self.send_empty(status, {**length, **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_empty(self, status: int, headers: Mapping[str, str]) -> None:
        self._begin(status, headers)
        self.end_headers()

    def stream(self, content_type: str, headers: Mapping[str, str]) -> BodyStream:
        chunked = self.request_version >= "HTTP/1.1"
        self._begin(200, {"Content-Type": content_type, **headers})
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
        self.end_headers()
        return BodyStream(self.connection, self.wfile, chunked=chunked)

    def cut(self) -> None:
        self.close_connection = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers what http.server finds wrong by itself, and closes."""
        self.close_connection, self._n_unread, self.has_begun = True, 1, False
        self._application.refuse(self, HttpError(code, message or explain or self.responses[code][0]))

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Writes the status and the headers that every answer has, and these."""
        self.connection.settimeout(_SEND_S)
        self.has_begun = True
        self.send_response(status)
        closing = {"Connection": "close"} if self.close_connection or self._n_unread else {}
        for name, value in {**self.common_headers, **closing, **headers}.items():
            self.send_header(name, value)
