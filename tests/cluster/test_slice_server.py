"""The server of slices: who is let in, what is answered, and what others cost."""

import contextlib
import hashlib
import http.client
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slice_transfer import (
    FIRST,
    TOKEN,
    ask,
    assert_whole,
    fetch,
    log_in,
    make_slices,
    proof,
    raw_exchange,
    serving,
)

from tpilite.cluster import slice_server
from tpilite.cluster.slice_server import SliceServer
from tpilite.errors import PeerLost

# --- who is let in ----------------------------------------------------------------------------------------
from tpilite.net.listener import LOG_LINES

pytestmark = pytest.mark.usefixtures("no_thread_left")


def test_ranges(tmp_path: Path) -> None:
    content = make_slices(tmp_path / "split", size=1000)[FIRST]
    path, tag = f"/node_1/{FIRST}", f'"{hashlib.sha256(content).hexdigest()}"'
    with serving(tmp_path / "split") as server, contextlib.closing(log_in(server.port)) as connection:
        for asked, start, stop in (
            ("bytes=0-", 0, 1000),
            ("bytes=0-0", 0, 1),
            ("bytes=999-", 999, 1000),
            ("bytes=999-999", 999, 1000),
            ("bytes=10-5000", 10, 1000),
            ("bytes=0-999999999999999999", 0, 1000),
            ("bytes=-1", 999, 1000),
            ("bytes=-5000", 0, 1000),
        ):
            response, body = ask(connection, path, Range=asked)
            assert (response.status, body) == (206, content[start:stop]), asked
            assert response.headers["Content-Range"] == f"bytes {start}-{stop - 1}/1000"
            assert response.headers["ETag"] == tag
        for asked in ("bytes=1000-", "bytes=1000-1000", "bytes=999999999999999999-", "bytes=-0"):
            response, body = ask(connection, path, Range=asked)
            assert (response.status, body) == (416, b""), asked
            assert response.headers["Content-Range"] == "bytes */1000"
        for asked in (
            "bytes=-",
            "bytes=5-4",
            "bytes=0-1,5-6",
            "bytes=a-b",
            "items=0-1",
            "bytes=\xb2-",
            "bytes=" + "9" * 5000 + "-",
            "",
        ):
            response, body = ask(connection, path, Range=asked)
            assert (response.status, body) == (200, content), asked
            assert "Content-Range" not in response.headers
        response, body = ask(connection, path, Range="bytes=5-6", If_Range=tag)
        assert (response.status, body) == (206, content[5:7])
        response, body = ask(connection, path, Range="bytes=5-6", If_Range='"another"')
        assert (response.status, body) == (200, content)


def test_head(tmp_path: Path) -> None:
    make_slices(tmp_path / "split", size=1000)
    with serving(tmp_path / "split") as server, contextlib.closing(log_in(server.port)) as connection:
        response, body = ask(connection, f"/node_1/{FIRST}", "HEAD", Range="bytes=5-6")
        assert (response.status, body) == (200, b"")
        assert response.headers["Content-Length"] == "1000"
        response, _ = ask(connection, "/node_1/manifest.json", "HEAD")
        assert response.status == 200
        assert ask(connection, "/node_1/nothing", "HEAD")[0].status == 404


STRANGE_PATHS = (
    "/",
    "/../",
    "//",
    "/node_1/",
    "/node_1",
    "/node_2/manifest.json",
    "/node_1/../node_1/manifest.json",
    "/node_1/secret.txt",
    "/node_1/%6danifest.json",
    "/node_1/manifest.json?x",
    "/node_1/manifest.json%00",
    "/../../etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "//etc/passwd",
    "/node_1//etc/passwd",
    "/node_-1/manifest.json",
    "/node_01/manifest.json",
)


def test_nothing_but_what_the_manifest_names(tmp_path: Path) -> None:
    make_slices(tmp_path / "split", size=1000)
    (tmp_path / "split" / "node_1" / "secret.txt").write_text("secret")
    make_slices(tmp_path / "split", rank=2)
    with serving(tmp_path / "split") as server, contextlib.closing(log_in(server.port)) as connection:
        for path in STRANGE_PATHS:
            response, body = ask(connection, path)
            assert (response.status, body) == (404, b""), path


def without_what_varies(answer: bytes) -> bytes:
    return re.sub(rb"(nonce=|Date: )[^\r]*", b"", answer)


def test_without_a_proof_every_path_looks_the_same(tmp_path: Path) -> None:
    make_slices(tmp_path / "split", size=1000)
    with serving(tmp_path / "split") as server:
        answers = {
            without_what_varies(
                raw_exchange(server.port, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            )
            for path in (*STRANGE_PATHS, "/node_1/manifest.json", f"/node_1/{FIRST}")
            for method in ("GET", "HEAD")
        }
    (answer,) = answers
    assert answer == (
        b"HTTP/1.1 401 Unauthorized\r\nServer: tpilite\r\n\r\n"
        b"Content-Length: 0\r\nWWW-Authenticate: TPILITE version=2, \r\n\r\n"
    )


@pytest.mark.parametrize(
    "claim",
    [
        "",
        "Basic dTpw",
        f"TPILITE client_nonce={'0' * 64}, proof={'0' * 64}",
        f"TPILITE client_nonce={'0' * 64}, proof=",
        f"TPILITE proof={'0' * 64}",
        f"TPILITE client_nonce={'é' * 64}, proof={'0' * 64}",
        f"TPILITE client_nonce={'0' * 64}, proof={proof('slice client', bytes(32), bytes(32))}",
    ],
)
def test_wrong_proofs(tmp_path: Path, claim: str) -> None:
    make_slices(tmp_path / "split", size=1000)
    request = f"GET /node_1/manifest.json HTTP/1.1\r\nHost: x\r\nAuthorization: {claim}\r\n\r\n".encode(
        "latin-1"
    )
    with serving(tmp_path / "split") as server:
        answer = raw_exchange(server.port, request * 2)
    # The second request is not even read.
    assert answer.count(b"HTTP/1.1") == answer.count(b"HTTP/1.1 401") == 1
    assert b"Authentication-Info" not in answer


def test_recorded_exchange_is_worth_nothing(tmp_path: Path) -> None:
    make_slices(tmp_path / "split", size=1000)
    with serving(tmp_path / "split") as server:
        challenge = raw_exchange(server.port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        match = re.search(rb"nonce=([0-9a-f]{64})", challenge)
        assert match
        answer = proof("slice client", bytes.fromhex(match[1].decode()), bytes(32))
        claim = f"TPILITE client_nonce={'0' * 64}, proof={answer}"
        again = raw_exchange(
            server.port, f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: {claim}\r\n\r\n".encode()
        )
    assert b" 401 " in again


def test_wrong_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_slices(tmp_path / "split", size=1000)
    refusal = pytest.raises(PeerLost, match=r"127\.0\.0\.1:\d+ refuses our token; take the --token")
    with serving(tmp_path / "split") as server, refusal:
        fetch(server.port, tmp_path / "here", token="another-of-these", patience_s=0)
    assert list((tmp_path / "here" / "node_1").iterdir()) == []
    assert re.search(r"an unauthenticated connection: 127\.0\.0\.1:\d+: its proof is wrong", caplog.text)
    assert TOKEN not in caplog.text


# --- what those without a proof cost ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SliceServer]:
    root = tmp_path_factory.mktemp("open")
    make_slices(root, size=1000)
    with serving(root) as server:
        yield server


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200)
    | st.builds(
        lambda a, b, c: a + b + b" HTTP/1.1\r\n" + c + b"\r\n\r\n",
        st.sampled_from([b"GET ", b"HEAD ", b"POST ", b"", b"get /", b"GET  "]),
        st.binary(max_size=30),
        st.binary(max_size=60),
    )
)
def test_garbage_gets_nothing(open_server: SliceServer, request_bytes: bytes) -> None:
    answer = raw_exchange(open_server.port, request_bytes)
    assert not answer or re.fullmatch(rb"HTTP/1\.1 [45]\d\d [^\r]+\r\n(?s:.)*\r\n\r\n", answer)
    assert b"200 OK" not in answer


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"POST /node_1/manifest.json HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"DELETE / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"x: y\r\n" * 150 + b"\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"\x00" * 10_000,
    ],
)
def test_what_no_client_of_ours_sends_ends_the_connection(
    open_server: SliceServer, request_bytes: bytes
) -> None:
    answer = raw_exchange(open_server.port, request_bytes + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.count(b"HTTP/1.1") <= 1
    assert b"TPILITE" not in answer


def test_a_limited_number_of_refusals_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(tmp_path) as server:
        for _ in range(20):
            raw_exchange(server.port, b"more \x1b[31m garbage\x00\r\n\r\n")
    lines = [r.getMessage() for r in caplog.records if "unauthenticated connection" in r.getMessage()]
    assert len(lines) == LOG_LINES
    assert "the first line is not METHOD TARGET HTTP/1.1" in lines[0]
    assert "\x1b" not in caplog.text
    assert all(record.exc_info is None for record in caplog.records)


def test_a_slow_connection_without_a_proof_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_server, "_AUTHENTICATION_S", 0.3)
    contents = make_slices(tmp_path / "split")
    with serving(tmp_path / "split") as server, socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.settimeout(0.02)
        ended = False
        for _ in range(1000):
            with contextlib.suppress(TimeoutError):
                try:
                    slow.send(b"G")
                    ended = slow.recv(1) == b""
                except ConnectionError:
                    ended = True
            if ended:
                break
        assert ended
        assert_whole(fetch(server.port, tmp_path / "here"), contents)


def log_in_in_time(port: int) -> http.client.HTTPConnection:
    """A proved connection to a server that gives little time for it, which may take several tries."""
    for _ in range(100):
        with contextlib.suppress(ConnectionError):
            return log_in(port)
    pytest.fail("no proof came in time")


def test_a_proof_lifts_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_server, "_AUTHENTICATION_S", 0.2)
    make_slices(tmp_path / "split", size=1000)
    with serving(tmp_path / "split") as server, contextlib.closing(log_in_in_time(server.port)) as connection:
        with socket.create_connection(("127.0.0.1", server.port)) as unproven:
            unproven.settimeout(10)
            assert unproven.recv(1) == b""
        assert ask(connection, f"/node_1/{FIRST}")[0].status == 200


def n_serving() -> int:
    return sum(thread.name.startswith("127.0.0.1:") for thread in threading.enumerate())


def test_connections_without_a_proof_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_server, "_MAX_CONNECTIONS", 4)
    contents = make_slices(tmp_path / "split")
    with serving(tmp_path / "split") as server, contextlib.ExitStack() as stack:
        proven = stack.enter_context(contextlib.closing(log_in(server.port)))
        unproven = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            for _ in range(10)
        ]
        assert_whole(fetch(server.port, tmp_path / "here"), contents)
        assert unproven[0].recv(1) == b""
        assert ask(proven, f"/node_1/{FIRST}")[0].status == 200
        until_s = time.monotonic() + 30
        while n_serving() > 4:  # those of connections that were closed may be about to end
            assert time.monotonic() < until_s
            time.sleep(0.01)


def test_a_client_that_takes_nothing_disturbs_nobody(tmp_path: Path) -> None:
    contents = make_slices(tmp_path / "split", size=20_000_000)
    with serving(tmp_path / "split") as server, contextlib.closing(log_in(server.port)) as stalled:
        stalled.request("GET", f"/node_1/{FIRST}")
        assert_whole(fetch(server.port, tmp_path / "here"), contents)
