"""One connection: requests that are none, several on one connection, and limits."""

import json
import socket
import threading
from contextlib import suppress

import pytest
from servers import (
    CONFIG,
    JSON,
    eventually,
    exchange,
    figures,
    health,
    served,
    split,
)

from tpilite import LLM
from tpilite.serving import http
from tpilite.serving.http import Connection, Exchange, HttpError
from tpilite.serving.server import Server


class Echo:
    """Says back what it was asked: an application that knows nothing of any API."""

    def respond(self, exchange: Exchange) -> None:
        exchange.common_headers = {"X-Common": "1"}
        try:
            body = exchange.body() if exchange.method == "POST" else b""
        except HttpError as error:
            return self.refuse(exchange, error)
        if exchange.path != "/stream":
            said = b"%s %s" % (exchange.path.encode(), body)
            return exchange.send(said, "text/plain", headers={"X-Own": "2"})
        stream = exchange.stream("text/plain", {})
        for piece in (b"one", b"", b"two"):
            stream.write(piece)
        return stream.end()

    def refuse(self, exchange: Exchange, error: HttpError) -> None:
        exchange.send(str(error).encode(), "text/plain", error.status)


def answer_to(*pieces: bytes) -> bytes:
    """What a connection of `Echo` answers to these pieces, sent one after another."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname(), 10)
        theirs, _ = listener.accept()

    def serve() -> None:
        with theirs:
            Connection(Echo(), theirs, ("somewhere", 0), None)

    thread = threading.Thread(target=serve)
    thread.start()
    with ours:
        for piece in pieces:
            ours.sendall(piece)
        ours.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := ours.recv(65536):
            answer += piece
    thread.join()
    return answer


def test_an_answer_does_not_depend_on_the_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "date_time_string", lambda *_: "now")
    one = b"POST /a?b HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody"
    two = b"HEAD /c HTTP/1.1\r\n\r\n"
    whole = answer_to(one + two)
    assert whole == answer_to(*(bytes([byte]) for byte in one + two))
    first, _, second = whole.partition(b"/a?b body")
    assert b"X-Common: 1\r\nContent-Type: text/plain\r\nContent-Length: 9\r\nX-Own: 2\r\n\r\n" in first
    assert second.startswith(b"HTTP/1.1 200 OK\r\n")
    assert second.endswith(b"Content-Length: 3\r\nX-Own: 2\r\n\r\n")  # and no body
    for cut in range(one.index(b"body"), len(one)):
        assert answer_to(one[:cut]) == b""


def test_a_stream_comes_in_chunks_or_to_the_end() -> None:
    headers, _, body = answer_to(b"GET /stream HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")
    assert body == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
    assert b"Transfer-Encoding: chunked" in headers
    headers, _, body = answer_to(b"GET /stream HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert body == b"onetwo"
    assert b"Transfer-Encoding" not in headers


def test_what_is_wrong_as_http_is_told_by_the_application_and_ends_the_connection() -> None:
    for request, status in [
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"BREW / HTTP/1.1\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nA: " + b"b" * 40_000 + b"\r\n\r\n", 431),
    ]:
        answer = answer_to(request + b"GET /next HTTP/1.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 %d " % status), request[:40]
        assert b"\r\nConnection: close\r\n" in answer
        assert answer.count(b"HTTP/1.1") == 1


def test_requests_that_are_none_get_an_error_each(shared: Server) -> None:
    def status(request: bytes) -> int:
        code, headers, body = split(exchange(shared.port, request))
        assert headers["content-type"] == "application/json"
        assert headers["connection"] == "close"
        assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}
        return code

    to = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    assert status(b"\x16\x03\x01\x02\x00 garbage of a TLS client\r\n\r\n") == 400
    assert status(b"GET / HTTP/9.9\r\n\r\n") == 505
    assert status(b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n") == 501
    assert status(b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n") in (414, 431)
    assert status(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000 + b"\r\n") == 431
    assert status(b"GET / HTTP/1.1\r\nA: " + b"b" * 50_000 + b"\r\n\r\n") == 431
    assert status(to + b"Connection: close\r\n\r\n") == 411
    assert status(to + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n") == 411
    assert status(to + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef") == 400
    assert status(to + b"Content-Length: -5\r\n\r\n") == 400
    assert status(to + b"Content-Length: 1_0\r\n\r\n") == 400
    assert status(to + b"Content-Length: 99999999\r\n\r\n" + b"x" * 100_000) == 413
    assert status(to + b"Content-Length: 99999999999999999999999\r\n\r\n") == 400


def test_a_connection_serves_requests_one_after_another(shared: Server) -> None:
    body = json.dumps({"model": "tiny", "prompt": "Once", "stream": True, "max_tokens": 2}).encode()
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    two = b"POST /v1/completions HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s" % (JSON, len(body), body)
    last = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = exchange(shared.port, one + two + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert b"data: [DONE]\n\n\r\n0\r\n\r\nHTTP/1.1 200 OK" in answer
    assert answer.endswith(b"}]}")


def test_slow_clients_are_cut_and_hold_nobody_up(session: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_HEADERS_S", 0.3)
    monkeypatch.setattr(http, "_BODY_S", 0.3)
    with served(session, CONFIG) as server:
        starts = [
            b"",
            b"GET / HT",
            b"POST /v1/completions HTTP/1.1\r\n%sContent-Length: 50\r\n\r\n{" % JSON,
        ]
        connections = [socket.create_connection(("127.0.0.1", server.port), 10) for _ in starts]
        for connection, start in zip(connections, starts, strict=True):
            connection.sendall(start)
        assert health(server)["status"] == "ok"
        for connection in connections:
            while connection.recv(65536):
                pass
            connection.close()


def test_a_byte_at_a_time_is_too_slow_a_head(session: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_HEADERS_S", 0.3)
    with served(session, CONFIG) as server:
        with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
            connection.settimeout(0.02)
            for _ in range(500):
                with suppress(TimeoutError, BrokenPipeError):
                    connection.sendall(b"X")
                    assert connection.recv(1) == b""
                    return
            pytest.fail("10 s were not too long")


def test_a_client_that_does_not_read_is_cut(session: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_SEND_S", 0.2)
    with served(session, CONFIG) as server:
        server._listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        body = json.dumps(
            {"model": "tiny", "prompt": ["Once"] * 100, "max_tokens": 200, "stream": True, "logprobs": 5}
        )
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s"
                % (JSON, len(body), body.encode())
            )
            eventually(lambda: figures(server)["requests_cancelled"] == 1)
