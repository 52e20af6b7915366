"""Requests of HTTP/1.1 out of bytes, as strictly as RFC 9112 has them. No sockets here.

    reader = RequestReader()
    reader.feed(data)                  # whatever has come
    request = reader.next_request()    # None: more bytes are needed
    piece = reader.next_piece()        # of its body; None: more bytes are needed, b"": that was all

Everything else raises `HttpError`, and then nothing that follows on the connection can be understood: it is
answered and closed. A server that guesses may take for a request what others take for a body.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Addresses of pages stay below 2000; a key and a search beside them are still far below.
_MAX_LINE_BYTES = 8 << 10
# Browsers with many cookies send 8 KiB.
_MAX_HEAD_BYTES = 32 << 10
_MAX_FIELDS = 100

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(%s) ([!-\"$-~]+) HTTP/(\d)\.(\d)" % _TOKEN)
_TARGET = re.compile(r"(?:[Hh][Tt][Tt][Pp]://([^/?@]+))?(/.*)|\*")
_FIELD = re.compile(rb"(%s):([^\x00-\x08\x0a-\x1f\x7f]*)" % _TOKEN)
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[\t -~\x80-\xff]*)?")
_FIRST_BYTE = re.compile(rb"[\r!#$%&'*+.^_`|~0-9A-Za-z-]")
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
# Of these, two are one too many: who reads the first and who reads the last would disagree.
_ONCE = {"authorization", "content-length", "content-type", "host", "origin", "transfer-encoding"}
# Some proxies make one of two.
_JOINED = re.compile(r"[\s,]")


class HttpError(Exception):
    """A request that is wrong as HTTP, whatever it asks for: the status, and a sentence for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Request:
    """What stands before the body. Names of `headers` are in lower case, repeated ones joined by commas."""

    method: str
    target: str
    path: str  # the target without its scheme and host, and without its query
    headers: Mapping[str, str]
    is_http_1_0: bool
    length: int | None  # of the body; None where it comes in chunks

    @property
    def wants_close(self) -> bool:
        """Whether the client asks for no other request on its connection."""
        options = {option.strip().lower() for option in self.headers.get("connection", "").split(",")}
        return self.is_http_1_0 or "close" in options

    @property
    def has_body(self) -> bool:
        return self.length != 0


class RequestReader:
    """Requests and their bodies from the bytes of a connection, in whatever pieces they come."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._lines: list[bytes] = []  # of a head, or of the trailers behind a body in chunks
        self._n_bytes = 0  # of these lines
        self._n_left = 0  # of the body, or of its chunk
        self._is_chunked = False
        self._chunk_line = "size"  # which line comes next: a chunk's "size" or "end", or a "trailer"
        self.in_body = False

    @property
    def is_idle(self) -> bool:
        """Whether nothing of another request has come."""
        return not (self._buffer or self._lines or self.in_body)

    def feed(self, data: bytes) -> None:
        """Adds bytes that came."""
        self._buffer += data

    def next_request(self) -> Request | None:
        """The next request, whose body follows; None as long as its head is not whole."""
        while True:
            if self._buffer and not self._lines and not _FIRST_BYTE.match(self._buffer):
                # At once: a TLS client, for one, would wait for an answer.
                raise HttpError(400, "this is no request of HTTP/1.1")
            line = self._next_line()
            if line is None:
                return None
            if line:
                self._lines.append(line)
            elif self._lines:  # empty lines before a request are nothing, as the RFC has it
                request = _parse(self._lines)
                self._end_lines()
                self._is_chunked, self._chunk_line = request.length is None, "size"
                self._n_left = request.length or 0
                self.in_body = request.has_body
                return request

    def next_piece(self) -> bytes | None:
        """The next bytes of the body, b"" behind its last; None as long as there are none."""
        while self.in_body:
            if self._n_left:
                piece = bytes(self._buffer[: self._n_left])
                del self._buffer[: len(piece)]
                self._n_left -= len(piece)
                self.in_body = self._is_chunked or self._n_left > 0
                return piece or None
            line = self._next_line()
            if line is None:
                return None
            self._take_chunk_line(line)
        return b""

    def _take_chunk_line(self, line: bytes) -> None:
        """Takes what stands between two chunks: the end of the one, the size of the other, or trailers."""
        if self._chunk_line == "trailer" and line:
            _parse_field(line)  # and dropped: nothing here means anything
            self._lines.append(line)
            return
        self._end_lines()
        if self._chunk_line == "trailer":
            self.in_body = False
        elif self._chunk_line == "end":
            if line:
                raise HttpError(400, "a chunk of the body is longer than it says")
            self._chunk_line = "size"
        else:
            found = _CHUNK_SIZE.fullmatch(line)
            if not found:
                raise HttpError(400, "a chunk of the body begins with no size")
            self._n_left = int(found[1], 16)
            self._chunk_line = "end" if self._n_left else "trailer"

    def _end_lines(self) -> None:
        self._lines, self._n_bytes = [], 0

    def _next_line(self) -> bytes | None:
        """The next line without its end; None as long as it is not whole."""
        end = self._buffer.find(b"\n")
        n = len(self._buffer) if end < 0 else end + 1
        if n > _MAX_LINE_BYTES and not self._lines:
            raise HttpError(414, f"the first line must be at most {_MAX_LINE_BYTES} bytes")
        if self._n_bytes + n > _MAX_HEAD_BYTES or len(self._lines) > _MAX_FIELDS:
            raise HttpError(
                431, f"a request's head must be at most {_MAX_HEAD_BYTES} bytes in {_MAX_FIELDS} fields"
            )
        if end < 0:
            return None
        line = bytes(self._buffer[:n])
        del self._buffer[:n]
        self._n_bytes += n
        if not line.endswith(b"\r\n"):
            raise HttpError(400, "a line must end with CR and LF")
        return line[:-2]


def _parse(lines: list[bytes]) -> Request:
    """The request of a head's lines."""
    first = _REQUEST_LINE.fullmatch(lines[0])
    if not first:
        raise HttpError(400, "the first line is not METHOD TARGET HTTP/1.1")
    method, target, major, minor = (group.decode() for group in first.groups())
    if major != "1":
        raise HttpError(505, f"this server speaks HTTP/1.1, not HTTP/{major}.{minor}")
    if method not in _METHODS:
        raise HttpError(501, f"{method[:20]} is no method of this server")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, value = _parse_field(line)
        is_joined = name in ("host", "origin") and _JOINED.search(value)
        if is_joined or (name in headers and name in _ONCE):
            raise HttpError(400, f"there must be one {name.title()}, found two")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    is_http_1_0 = minor == "0"
    where = _TARGET.fullmatch(target)
    if not where:
        raise HttpError(400, "the target must be a path, or http:// with a host and a path")
    if "host" not in headers and not is_http_1_0:
        raise HttpError(400, "a request needs a Host")
    if where[1] is not None and where[1].lower() != headers.get("host", "").lower():
        raise HttpError(400, "the target and the Host header name different hosts")
    path = (where[2] or target).partition("?")[0]
    return Request(method, target, path, headers, is_http_1_0, _body_length(headers, is_http_1_0))


def _parse_field(line: bytes) -> tuple[str, str]:
    """The name, in lower case, and the value of a header's line."""
    found = _FIELD.fullmatch(line)
    if not found:
        raise HttpError(400, "a header must be NAME: VALUE on one line, without control characters")
    return found[1].decode().lower(), found[2].decode("latin-1").strip(" \t")


def _body_length(headers: Mapping[str, str], is_http_1_0: bool) -> int | None:
    length, encoding = headers.get("content-length"), headers.get("transfer-encoding")
    if encoding is not None:
        if length is not None or is_http_1_0:
            raise HttpError(400, "Transfer-Encoding stands alone, in HTTP/1.1, without a Content-Length")
        if encoding.lower() != "chunked":
            raise HttpError(501, "of the transfer encodings, only 'chunked' is understood")
        return None
    if length is None:
        return 0
    if not re.fullmatch("[0-9]{1,15}", length):
        raise HttpError(400, "the Content-Length is not one whole number")
    return int(length)
