"""An HTTP server whose application knows nothing of any API: connections, limits, and who makes room."""

import logging
import math
import re
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from tpilite.net import http_server
from tpilite.net.http import HttpError
from tpilite.net.http_server import Connection, HttpServer


class Echo:
    """Says back what it was asked."""

    def respond(self, connection: Connection) -> None:
        request = connection.request
        connection.common_headers = {"X-Common": "1"}
        if request.headers.get("authorization") == "me":
            connection.authenticate()
        if request.path == "/mistake":
            raise ZeroDivisionError
        body = connection.body(1000) if request.method == "POST" else b""
        if request.path != "/stream":
            said = b"%s %s" % (request.target.encode(), body)
            return connection.send(said, "text/plain", headers={"X-Own": "2"})
        connection.begin_stream("text/plain", {})
        for piece in (b"one", b"", b"two"):
            connection.write(piece)
        return connection.end_stream()

    def refuse(self, connection: Connection, error: HttpError) -> None:
        connection.send(str(error).encode(), "text/plain", error.status)


@contextmanager
def serving(application: Any = Echo, max_connections: int = 8, **options: Any) -> Iterator[HttpServer]:
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    with HttpServer(sock, application, max_connections=max_connections, **options) as server:
        server.start()
        yield server


def connect(server: HttpServer, *pieces: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for piece in pieces:
        connection.sendall(piece)
    return connection


def rest(connection: socket.socket) -> bytes:
    answer = b""
    with connection, suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            answer += piece
    return answer


def answer_to(server: HttpServer, *pieces: bytes) -> bytes:
    """What a connection is answered to these pieces, sent one after another, and then no more."""
    connection = connect(server, *pieces)
    connection.shutdown(socket.SHUT_WR)
    return re.sub(rb"Date: [^\r]*", b"Date: now", rest(connection))


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with serving() as server:
        yield server


def test_an_answer_does_not_depend_on_the_packets(server: HttpServer) -> None:
    one = b"POST /a?b HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody"
    two = b"HEAD /c HTTP/1.1\r\nHost: a\r\n\r\n"
    whole = answer_to(server, one + two)
    assert whole == answer_to(server, *(bytes([byte]) for byte in one + two))
    first, _, second = whole.partition(b"/a?b body")
    assert b"X-Common: 1\r\nContent-Type: text/plain\r\nContent-Length: 9\r\nX-Own: 2\r\n\r\n" in first
    assert second.startswith(b"HTTP/1.1 200 OK\r\n")
    assert second.endswith(b"Content-Length: 3\r\nX-Own: 2\r\n\r\n")  # and no body


def test_what_is_cut_off_is_not_answered(server: HttpServer) -> None:
    for whole in (
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    ):
        assert answer_to(server, whole).startswith(b"HTTP/1.1 200 ")
        for cut in range(len(whole)):
            assert answer_to(server, whole[:cut]) == b"", whole[:cut]


def test_a_body_comes_by_its_length_or_in_chunks(server: HttpServer) -> None:
    head = b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"2\r\nbo\r\n2;x=y\r\ndy\r\n0\r\nT: x\r\n\r\n"
    answer = answer_to(server, head + chunks + b"GET /b HTTP/1.1\r\nHost: a\r\n\r\n")
    assert b"/a body" in answer
    assert answer.endswith(b"/b ")
    expecting = b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
    assert answer_to(server, expecting, b"body").startswith(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n"
    )


@pytest.mark.parametrize("is_wanted", [True, False])
def test_a_slow_body_makes_room_where_its_memory_is_wanted(
    is_wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_SLOW_S", 0.05)

    class Slow(Echo):
        def respond(self, connection: Connection) -> None:
            began = connection.begin_body(3, 1000)
            connection.send(b"%d %s" % (began, connection.body(1000, lambda: is_wanted)), "text/plain")

    with serving(Slow) as server:
        connection = connect(server, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\r\nbod")
        time.sleep(0.2)
        with suppress(ConnectionError):
            connection.sendall(b"ies")
            connection.shutdown(socket.SHUT_WR)
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 503 ") == is_wanted
    assert answer.endswith(b"0 bodies") != is_wanted


def test_a_stream_comes_in_chunks_or_to_the_end(server: HttpServer) -> None:
    headers, _, body = answer_to(server, b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n").partition(b"\r\n\r\n")
    assert body == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
    assert b"Transfer-Encoding: chunked" in headers
    headers, _, body = answer_to(server, b"GET /stream HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert body == b"onetwo"
    assert b"Transfer-Encoding" not in headers


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"BREW / HTTP/1.1\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length : 44\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nnonsense\r\nContent-Length: 44\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n", 413),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3E9\r\n%s\r\n" % (b"a" * 1001),
            413,
        ),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"b" * 40_000 + b"\r\n\r\n", 431),
    ],
)
def test_what_is_wrong_as_http_is_told_by_the_application_and_ends_the_connection(
    server: HttpServer, request_bytes: bytes, status: int
) -> None:
    answer = answer_to(server, request_bytes + b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nConnection: close\r\n" in answer
    assert answer.count(b"HTTP/1.1 ") == 1


def test_an_answer_before_the_body_was_read_ends_the_connection(server: HttpServer) -> None:
    body = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    answer = answer_to(
        server, b"GET /a HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    assert answer.count(b"HTTP/1.1") == 1
    assert b"\r\nConnection: close\r\n" in answer


def test_a_mistake_of_our_own_is_told(server: HttpServer, caplog: pytest.LogCaptureFixture) -> None:
    assert answer_to(server, b"GET /mistake HTTP/1.1\r\nHost: a\r\n\r\n") == b""
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    "start", [b"", b"GET / HT", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{"]
)
def test_slow_clients_are_cut(monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    monkeypatch.setattr(http_server, "_HEAD_S", 0.3)
    monkeypatch.setattr(http_server, "_BODY_S", 0.3)
    with serving() as server, connect(server, start) as connection:
        began_s = time.monotonic()
        connection.settimeout(0.02)
        ended = False
        while not ended and time.monotonic() - began_s < 10:
            with suppress(TimeoutError, BrokenPipeError):
                if start:
                    connection.sendall(b"X")
                ended = connection.recv(1) == b""
        assert ended


def waits(server: HttpServer, n: int, within: int = 0) -> None:
    """Until so many connections wait for their clients, `within` of them with a part of a request read."""
    for _ in range(1000):
        found = list(server._connections.values())
        waiting = [c for c in found if (c._waits_since_s or math.inf) <= time.monotonic()]
        if len(waiting) == len(found) == n and sum(not c._reader.is_idle for c in found) == within:
            return
        time.sleep(0.01)
    pytest.fail(f"{len(found)} connections, of which {len(waiting)} wait")


def answered(connection: socket.socket, end: bytes) -> socket.socket:
    """The connection, once the server's answer has come up to its end."""
    answer = b""
    while not answer.endswith(end):
        piece = connection.recv(65536)
        assert piece, answer
        answer += piece
    return connection


@pytest.mark.parametrize(
    ("start", "end", "is_within"),
    [
        (b"", b"", False),
        (b"GET / HTTP/1.1\r\nHost", b"", True),
        (b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n", b"/a ", False),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n1234", b"", True),
    ],
)
def test_connections_that_wait_for_their_clients_keep_nobody_out(
    start: bytes, end: bytes, is_within: bool
) -> None:
    with serving(max_connections=3) as server:
        held = []
        for n in (1, 2, 3):
            held.append(answered(connect(server, start), end))
            waits(server, n, within=n * is_within)
        first, *others = held
        assert answer_to(server, b"GET /new HTTP/1.1\r\nHost: a\r\n\r\n").endswith(b"/new ")
        assert rest(first) == b""
        for other in others:
            other.settimeout(0.05)
            with other, pytest.raises(TimeoutError):
                other.recv(65536)


def test_who_has_proved_himself_makes_room_last_and_not_within_a_request() -> None:
    known = b"GET /known HTTP/1.1\r\nHost: a\r\nAuthorization: me\r\n\r\n"
    with serving(max_connections=3) as server:
        first = answered(connect(server, known), b"/known ")
        waits(server, 1)
        stranger = connect(server)
        within = answered(connect(server, known), b"/known ")
        within.sendall(b"GET /half")
        waits(server, 3, within=1)
        for _ in range(2):
            assert answer_to(server, b"GET /new HTTP/1.1\r\nHost: a\r\n\r\n").endswith(b"/new ")
        assert rest(stranger) == b""
        held = [answered(connect(server, known), b"/known ") for _ in range(2)]
        assert rest(first) == b""
        within.sendall(b" HTTP/1.1\r\nHost: a\r\n\r\n")
        within.shutdown(socket.SHUT_WR)
        assert rest(within).endswith(b"/half ")
        for connection in held:
            connection.close()


class Slow:
    """Answers once the test lets it."""

    def __init__(self) -> None:
        self.begun, self.go, self.seen_gone = threading.Semaphore(0), threading.Event(), threading.Event()

    def respond(self, connection: Connection) -> None:
        self.begun.release()
        while not self.go.wait(0.01):
            if connection.is_gone():
                self.seen_gone.set()
                return
        connection.send(b"done", "text/plain")

    refuse = Echo.refuse


def test_connections_that_are_worked_for_stay_and_new_ones_are_told(caplog: pytest.LogCaptureFixture) -> None:
    slow = Slow()
    with serving(lambda: slow, max_connections=2) as server:
        held = [connect(server, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") for _ in range(2)]
        for _ in held:
            assert slow.begun.acquire(timeout=10)
        for _ in range(20):
            answer = rest(connect(server))
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"2 connections are open" in answer
        slow.go.set()
        for connection in held:
            connection.shutdown(socket.SHUT_WR)
            assert rest(connection).endswith(b"done")
    assert len(caplog.records) <= 5


@pytest.mark.parametrize("unread", [b"", b"\r\n", b"G", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 1000])
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "later"])
def test_a_client_that_is_gone_is_noticed_whatever_it_left_unread(unread: bytes, at_once: bool) -> None:
    """At once, it is read with the request; later, it stays in the kernel until the next one."""
    if unread and not at_once and not hasattr(select, "POLLRDHUP"):
        pytest.skip("needs a system that tells an end behind unread bytes")
    slow = Slow()
    with serving(lambda: slow) as server:
        connection = connect(server, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", unread if at_once else b"")
        assert slow.begun.acquire(timeout=10)
        if not at_once:
            connection.sendall(unread)
        assert not slow.seen_gone.wait(0.1)
        connection.close()
        assert slow.seen_gone.wait(10)


def test_a_client_that_does_not_read_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_SEND_S", 0.2)
    ended: list[OSError] = []

    class Endless(Echo):
        def respond(self, connection: Connection) -> None:
            connection.begin_stream("text/plain", {})
            try:
                while True:
                    connection.write(bytes(100_000))
            except OSError as error:
                ended.append(error)
                raise

    with serving(Endless) as server, connect(server, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"):
        for _ in range(1000):
            if ended:
                break
            time.sleep(0.01)
    assert isinstance(ended[0], TimeoutError)


def test_who_sends_no_proof_is_cut_and_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with serving(proof_s=1.0) as server:
        known = connect(server, b"GET /known HTTP/1.1\r\nHost: a\r\nAuthorization: me\r\n\r\n")
        stranger = connect(server, b"GET /stranger HTTP/1.1\r\nHost: a\r\n\r\n")
        assert rest(stranger).endswith(b"/stranger ")  # after which the older one would be late, too
        rest(connect(server, b"\x16\x03"))
        known.sendall(b"GET /again HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert rest(known).endswith(b"/again ")
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert ["it sent no proof" in line for line in told] == [True, False]
    assert "no request of HTTP/1.1" in told[1]


def test_closing_ends_what_is_open() -> None:
    before = set(threading.enumerate())
    slow = Slow()
    with serving(lambda: slow) as server:
        waiting, working = connect(server), connect(server, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert slow.begun.acquire(timeout=10)
    assert rest(waiting) == rest(working) == b""
    assert set(threading.enumerate()) <= before
