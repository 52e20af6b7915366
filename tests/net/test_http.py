"""Requests out of bytes: whole, byte by byte, cut at every offset, with others behind them, and wrong."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tpilite.net.http import HttpError, Request, RequestReader

HEAD = b"Host: a\r\n"
REQUESTS = [
    b"GET /a?b=c HTTP/1.1\r\nHost: a\r\nAccept: x\r\naccept: \t y \r\nEmpty:\r\n\r\n",
    b"POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody",
    b"POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n"
    b"3;name=value\r\none\r\n0002\r\n\r\n\r\nA\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n",
    b"\r\n\r\nHEAD http://A/d HTTP/1.0\r\nHost: a\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
]


def read(*pieces: bytes) -> list[tuple[Request, bytes, bool] | int]:
    """The requests in these pieces, each with its body and whether that is all, or an error's status."""
    reader = RequestReader()
    found: list[tuple[Request, bytes, bool] | int] = []
    body: bytearray | None = None
    try:
        for piece in pieces:
            reader.feed(piece)
            while True:
                if body is None:
                    request = reader.next_request()
                    if request is None:
                        break
                    body = bytearray()
                    found.append((request, b"", False))
                part = reader.next_piece()
                request, so_far, _ = found[-1]  # type: ignore[misc]
                found[-1] = (request, so_far + (part or b""), part == b"")
                if part is None:
                    break
                if not part:
                    body = None
    except HttpError as error:
        found.append(error.status)
    return found


def one_by_one(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]


def test_requests_and_their_bodies() -> None:
    first, second, third, fourth, fifth = read(b"".join(REQUESTS))
    assert first == (
        Request("GET", "/a?b=c", "/a", {"host": "a", "accept": "x, y", "empty": ""}, False, 0),
        b"",
        True,
    )
    assert second == (
        Request("POST", "/b", "/b", {"host": "a", "content-length": "4"}, False, 4),
        b"body",
        True,
    )
    headers = {"host": "a", "transfer-encoding": "Chunked"}
    assert third == (Request("POST", "/c", "/c", headers, False, None), b"one\r\n0123456789", True)
    assert fourth == (Request("HEAD", "http://A/d", "/d", {"host": "a"}, True, 0), b"", True)
    assert fifth == (Request("OPTIONS", "*", "*", {"host": "a", "content-length": "0"}, False, 0), b"", True)


def test_requests_do_not_depend_on_the_packets() -> None:
    whole = b"".join(REQUESTS)
    expected = read(whole)
    assert read(*one_by_one(whole)) == expected
    for cut in range(len(whole)):
        assert read(whole[:cut], whole[cut:]) == expected


@pytest.mark.parametrize("request_bytes", REQUESTS)
def test_a_request_that_is_cut_off_is_none(request_bytes: bytes) -> None:
    head = request_bytes.index(b"\r\n\r\n", 4) + 4
    for cut in range(len(request_bytes)):
        found = read(request_bytes[:cut])
        assert [whole for *_, whole in found] == ([] if cut < head else [False]), cut  # type: ignore[misc]


@pytest.mark.parametrize("separator", [b"close", b"Close, x", b"keep-alive , CLOSE"])
def test_who_wants_the_connection_closed(separator: bytes) -> None:
    ((request, *_),) = read(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: %s\r\n\r\n" % separator)  # type: ignore[misc]
    assert request.wants_close
    ((request, *_),) = read(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")  # type: ignore[misc]
    assert not request.wants_close
    ((request, *_),) = read(b"GET / HTTP/1.0\r\n\r\n")  # type: ignore[misc]
    assert request.wants_close


WRONG_LINES = [
    (b"GET /\r\n", 400),
    (b"get / HTTP/1.1\r\n", 501),
    (b"BREW / HTTP/1.1\r\n", 501),
    (b"GET / HTTP/2.0\r\n", 505),
    (b"GET / HTTP/1.10\r\n", 400),
    (b"GET / http/1.1\r\n", 400),
    (b"GET  / HTTP/1.1\r\n", 400),
    (b" GET / HTTP/1.1\r\n", 400),
    (b"GET / HTTP/1.1 \r\n", 400),
    (b"GET\t/ HTTP/1.1\r\n", 400),
    (b"GET / HTTP/1.1\n", 400),
    (b"GET /\xe9 HTTP/1.1\r\n", 400),
    (b"GET /\x00 HTTP/1.1\r\n", 400),
    (b"GET /#x HTTP/1.1\r\n", 400),
    (b"GET a HTTP/1.1\r\n", 400),
    (b"GET http://[ HTTP/1.1\r\n", 400),
    (b"GET http://[/ HTTP/1.1\r\n", 400),
    (b"GET http://b/ HTTP/1.1\r\n", 400),
    (b"GET https://a/ HTTP/1.1\r\n", 400),
    (b"GET http://u@a/ HTTP/1.1\r\n", 400),
    (b"CONNECT a:80 HTTP/1.1\r\n", 501),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01", 400),
    (b"GET /%s HTTP/1.1\r\n" % (b"a" * 9000), 414),
]
WRONG_FIELDS = [
    (b"Content-Length : 44\r\n", 400),
    (b"Content-Length: 44\r\nContent-Length: 44\r\n", 400),
    (b"Content-Length: 4\r\ncontent-length: 5\r\n", 400),
    (b"Content-Length: 44, 44\r\n", 400),
    (b"Content-Length: +4\r\n", 400),
    (b"Content-Length: -4\r\n", 400),
    (b"Content-Length: 4 4\r\n", 400),
    (b"Content-Length: 1_0\r\n", 400),
    (b"Content-Length: 0x4\r\n", 400),
    (b"Content-Length: \xb2\r\n", 400),
    (b"Content-Length: \xd9\xa4\r\n", 400),
    (b"Content-Length:\r\n", 400),
    (b"Content-Length: 1234567890123456\r\n", 400),
    (b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", 400),
    (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400),
    (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", 400),
    (b"Transfer-Encoding: gzip, chunked\r\n", 501),
    (b"Transfer-Encoding: identity\r\n", 501),
    (b"Transfer-Encoding: \x0bchunked\r\n", 400),
    (b"Host: a\r\n", 400),
    (b"Host: b\r\n", 400),
    (b"Origin: http://a\r\nOrigin: http://b\r\n", 400),
    (b"Origin: http://a, http://b\r\n", 400),
    (b"Origin: http://a http://b\r\n", 400),
    (b"Authorization: a\r\nAuthorization: b\r\n", 400),
    (b"No colon\r\n", 400),
    (b": no name\r\n", 400),
    (b"Na me: x\r\n", 400),
    (b"N\xe9: x\r\n", 400),
    (b" X: folded\r\n", 400),
    (b"A: b\r\n folded\r\n", 400),
    (b"A: b\r\n\tfolded\r\n", 400),
    (b"A: b\n", 400),
    (b"A: b\rC: d\r\n", 400),
    (b"A: b\x00\r\n", 400),
    (b"A: \x1b[31m\r\n", 400),
    (b"A: \x7f\r\n", 400),
    (b"\nA: b\r\n", 400),
    (b"A: b\r\n" * 101, 431),
    (b"A: %s\r\n" % (b"b" * 40_000), 431),
    (b"A: %s" % (b"b" * 40_000), 431),
]
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [(line + HEAD + b"\r\n", status) for line, status in WRONG_LINES]
    + [(b"POST / HTTP/1.1\r\n" + HEAD + field + b"\r\n", status) for field, status in WRONG_FIELDS]
    + [(b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % host, 400) for host in (b"a, b", b"a,a", b"a b")]
    + [(b"GET / HTTP/1.1\r\n\r\n", 400), (b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400)],
)
def test_a_wrong_head_is_refused_and_nothing_behind_it_read(request_bytes: bytes, status: int) -> None:
    assert read(request_bytes + SMUGGLED) == [status]
    assert read(*one_by_one(request_bytes + SMUGGLED)) == [status]


@pytest.mark.parametrize(
    "body",
    [
        b"x\r\n",
        b"\r\n",
        b"-1\r\n",
        b"+1\r\n",
        b"0x1\r\n",
        b"1_0\r\n",
        b" 1\r\n",
        b"123456789\r\n",
        b"1\na\r\n",
        b"1\r\nab\r\n",
        b"1\r\na\n",
        b"1;\x00\r\na\r\n",
        b"1;" + b"a" * 9000 + b"\r\n",
        b"0\r\nno colon\r\n\r\n",
        b"0\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    ],
)
def test_a_wrong_chunk_ends_the_body(body: bytes) -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    for pieces in ([head + body + SMUGGLED], one_by_one(head + body + SMUGGLED)):
        (_, _, whole), status = read(*pieces)  # type: ignore[misc]
        assert not whole
        assert status in (400, 414, 431)


fragments = st.sampled_from(
    [
        *(
            part + end
            for part in (b"GET / HTTP/1.1", b"Host: a", b"Content-Length: 3", b"")
            for end in (b"\r\n", b"\n")
        ),
        *(
            b"Transfer-Encoding: chunked\r\n",
            b"3\r\nabc\r\n",
            b"0\r\n\r\n",
            b"abc",
            b"\r",
            b" ",
            b":",
            b"\0",
            b"\xff",
        ),
    ]
)


@settings(deadline=None, max_examples=300)
@given(st.lists(fragments | st.binary(max_size=5), max_size=12).map(b"".join), st.data())
@example(b"".join(REQUESTS), None)
def test_whatever_comes_means_the_same_in_any_pieces(data: bytes, draw: st.DataObject | None) -> None:
    whole = read(data)
    n = len(data) // 2 if draw is None else draw.draw(st.integers(0, len(data)))
    assert read(data[:n], data[n:]) == whole
    assert read(*one_by_one(data)) == whole
    for request in (entry[0] for entry in whole if not isinstance(entry, int)):
        assert re.fullmatch("[A-Z]+", request.method)
        assert not any(c in value for value in request.headers.values() for c in "\r\n\0")
