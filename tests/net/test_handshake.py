"""The handshake over loopback: what it refuses, in what time, with TLS and without."""

import contextlib
import functools
import hashlib
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from compiled_code import EXCHANGE, by_both, needs_exchange

from tpilite.errors import ConfigError, PeerLost, ProtocolError
from tpilite.native.exchange import CompiledExchange
from tpilite.net import auth, handshake, messages, wire
from tpilite.net.address import format_address
from tpilite.net.channel import Channel
from tpilite.net.exchange import Exchange, Frames, NewExchange
from tpilite.net.handshake import accept, connect

TOKEN = b"a key"
HELLO = wire.encode(messages.Hello(bytes(32)))
_compiled = functools.partial(CompiledExchange, EXCHANGE)


@contextlib.contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[socket.socket]:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        yield sock


def accept_one(server: socket.socket, token: bytes = TOKEN, timeout_s: float = 10, **more: Any) -> Channel:
    return accept(server.accept()[0], "the client", token, timeout_s=timeout_s, **more)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_both_sides_prove_the_token_and_talk(host: str, pool: ThreadPoolExecutor) -> None:
    try:
        context = listening(host)
        server = context.__enter__()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with contextlib.closing(server):
        accepted = pool.submit(accept_one, server)
        client = connect(server.getsockname()[:2], TOKEN, timeout_s=10)
        with contextlib.closing(client), contextlib.closing(accepted.result()) as served:
            array = np.arange(6, dtype=np.float32).reshape(2, 3)
            served.limit_frames(wire.MAX_HEADER_BYTES, array.nbytes)
            client.send(messages.Gather({"n": 1}, "<f4", [2, 3]), array)
            header, payload = served.expect(messages.Gather)
            assert header == messages.Gather({"n": 1}, "<f4", [2, 3])
            assert bytes(payload) == array.tobytes()
            served.send(messages.Barrier())
            assert client.receive(time.monotonic() + 10) == (messages.Barrier(), b"")
            assert client.peer == format_address(server.getsockname())
            assert client.local_host == served.peer_host == host


def test_outside_of_a_group_no_frame_has_a_payload(pool: ThreadPoolExecutor) -> None:
    with listening() as server:
        accepted = pool.submit(accept_one, server)
        client = connect(server.getsockname()[:2], TOKEN, timeout_s=10)
        with contextlib.closing(client), contextlib.closing(accepted.result()) as served:
            for one, other in ((client, served), (served, client)):
                one.send(messages.Gather({}, "|u1", [1]), np.zeros(1, np.uint8))
                with pytest.raises(PeerLost, match="expected at most 0 bytes of payload, found 1"):
                    other.receive()


def test_another_token_is_told_on_both_sides(pool: ThreadPoolExecutor) -> None:
    with listening() as server:
        accepted = pool.submit(accept_one, server)
        with pytest.raises(PeerLost, match="did not accept the token; start this node with that of rank 0"):
            connect(server.getsockname(), b"another", timeout_s=10)
        with pytest.raises(ProtocolError, match="the client does not know the token; start it with that of"):
            accepted.result()


def test_the_key_is_that_of_scrypt_and_costs_time_once() -> None:
    token = "a token for tests"
    expected = hashlib.scrypt(token.encode(), salt=b"tpilite cluster token", n=1 << 14, r=8, p=1, dklen=32)
    assert auth.derive_key(token) == expected
    assert auth.derive_key(token) is auth.derive_key(token)


def test_short_tokens_and_a_python_without_scrypt_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="has 15 characters; expected at least 16"):
        auth.derive_key("fifteen-letters")
    monkeypatch.delattr(hashlib, "scrypt")
    with pytest.raises(ConfigError, match=r"no hashlib\.scrypt; use one that was built with OpenSSL"):
        auth.derive_key("a token that nobody has derived")


def test_another_version_is_told_on_both_sides(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def old_client(address: tuple[str, int]) -> bytes:
        with socket.create_connection(address) as sock:
            old = bytearray(wire.encode(messages.Hello(auth.new_nonce())))
            old[3] = 0
            sock.sendall(old)
            return b"".join(iter(lambda: sock.recv(100), b""))

    with listening() as server:
        answer = pool.submit(old_client, server.getsockname())
        with pytest.raises(
            ProtocolError, match="the client: this node speaks protocol version 2, the other 0"
        ):
            accept_one(server)
        assert answer.result()[:4] == b"TPI\x02"

    def new_server(server: socket.socket) -> None:
        with server.accept()[0] as sock:
            sock.recv(100)
            sock.sendall(b"TPI\x03")

    with listening() as server:
        served = pool.submit(new_server, server)
        with pytest.raises(PeerLost, match="version 2, the other 3; install the same tpilite on both"):
            connect(server.getsockname(), TOKEN, timeout_s=10)
        served.result()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", r"expected a tpilite node.* found b'HTTP' \(an HTTP server\)"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", r"found b'SSH-' \(an SSH server\)"),
        (b"\x15\x03\x01\x00\x02", "TLS: start both sides with it or without"),
        (b"TPI\x07", "the other 7; install the same tpilite on both"),
        (wire.encode(messages.Hello(b"short")), "expected a nonce of 32 bytes"),
        (wire.encode(messages.Barrier()), "expected Hello from"),
        (
            wire.encode(messages.Hello(bytes(32))) + wire.encode(messages.Proof(b"")),
            "does not know the token",
        ),
        (
            wire.encode(messages.Hello(bytes(32))) + wire.encode(messages.Refused("go")),
            "not accept the token",
        ),
        (bytes(300), "expected a tpilite node"),
    ],
)
def test_who_has_not_proved_the_token_is_waited_out(
    answer: bytes, text: str, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """What answers where rank 0 will be is named, and does not end the one who waits."""
    caplog.set_level(logging.INFO)
    with listening() as server:
        waiting = pool.submit(handshake.connect_until, server.getsockname(), TOKEN)
        for _ in range(2):
            with server.accept()[0] as sock:
                sock.sendall(answer)
                while sock.recv(1000):
                    pass
        accept_one(server).close()
        waiting.result().close()
    assert re.search(f"waiting for rank 0: .*{text}", caplog.text)


def test_a_line_of_its_own_for_each_answer_has_an_end(
    pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "_LAST_DELAY_S", 0.01)
    monkeypatch.setattr(handshake, "_FIRST_DELAY_S", 0.01)
    caplog.set_level(logging.INFO)
    with listening() as server:
        waiting = pool.submit(handshake.connect_until, server.getsockname(), TOKEN)
        for i in range(20):
            with server.accept()[0] as sock:
                sock.sendall(b"no%c" % (65 + i))
                while sock.recv(1000):
                    pass
        accept_one(server).close()
        waiting.result().close()
    assert len(caplog.records) == 8


def hello(sock: socket.socket) -> None:
    sock.sendall(wire.encode(messages.Hello(auth.new_nonce())))


@pytest.mark.parametrize(
    ("client", "error", "text"),
    [
        (lambda s: s.sendall(b"GET / HTTP/1.1\r\n\r\n"), ProtocolError, "expected a tpilite node"),
        (lambda s: s.sendall(b"\x16\x03\x01\x02\x00"), ProtocolError, "expected a tpilite node"),
        (lambda s: s.close(), PeerLost, "closed the connection between two frames"),
        (lambda s: (s.sendall(b"TPI"), s.close()), PeerLost, "closed the connection after 3 of 16 bytes"),
        (lambda s: s.sendall(b"TPI"), PeerLost, "was silent for too long, after 3 of 16 bytes of a frame"),
        (
            lambda s: s.sendall(wire.encode(messages.Join(1, {}))),
            ProtocolError,
            "expected Hello from the client",
        ),
        (
            lambda s: s.sendall(wire.encode(messages.Hello(b"x"))),
            ProtocolError,
            "expected a nonce of 32 bytes",
        ),
        (
            lambda s: s.sendall(wire.encode(messages.Hello(bytes(300)))),
            ProtocolError,
            "1 to 256 bytes, found 321",
        ),
        (
            lambda s: s.sendall(wire.encode(messages.Gather({}, "", []), 9)),
            ProtocolError,
            "at most 0 bytes of payl",
        ),
        (
            lambda s: (hello(s), s.sendall(wire.encode(messages.Join(1, {})))),
            ProtocolError,
            "expected Proof from",
        ),
        (
            lambda s: (hello(s), s.sendall(wire.encode(messages.Proof(b"")))),
            ProtocolError,
            "does not know the tok",
        ),
    ],
)
def test_a_client_without_proof_is_closed(
    client: Callable[[socket.socket], Any], error: type[Exception], text: str
) -> None:
    with listening() as server, socket.create_connection(server.getsockname()) as sock:
        client(sock)
        with pytest.raises(error, match=text):
            accept_one(server, timeout_s=0.3 if "silent" in text else 10)


def test_a_slow_loris_has_the_time_of_one_handshake(pool: ThreadPoolExecutor) -> None:
    """A byte now and then does not extend the deadline."""
    stop = threading.Event()

    def drip(sock: socket.socket) -> None:
        for byte in wire.encode(messages.Hello(auth.new_nonce())):
            with contextlib.suppress(OSError):
                sock.sendall(bytes([byte]))
            if stop.wait(0.05):
                return

    with listening() as server, socket.create_connection(server.getsockname()) as sock:
        dripping = pool.submit(drip, sock)
        with pytest.raises(PeerLost, match="was silent for too long, after"):
            accept_one(server, timeout_s=0.4)
        stop.set()
        dripping.result()


def test_a_server_cannot_pass_with_the_clients_own_proof(pool: ThreadPoolExecutor) -> None:
    def reflect(server: socket.socket) -> None:
        with server.accept()[0] as sock, contextlib.closing(Channel(sock, "client")) as mirror:
            for _ in range(2):
                mirror.send(mirror.receive()[0])

    with listening() as server:
        served = pool.submit(reflect, server)
        with pytest.raises(PeerLost, match="does not know the token: it is not the cluster's rank 0"):
            connect(server.getsockname(), TOKEN, timeout_s=10)
        served.result()


def test_a_recorded_handshake_is_worth_nothing(pool: ThreadPoolExecutor) -> None:
    recorded = b""

    def relay(front: socket.socket, address: tuple[str, int]) -> None:
        nonlocal recorded
        with front.accept()[0] as sock, socket.create_connection(address) as onward:
            for _ in range(2):
                data = sock.recv(200)
                recorded += data
                onward.sendall(data)
                sock.sendall(onward.recv(200))

    with listening() as server, listening() as front:
        relayed = pool.submit(relay, front, server.getsockname())
        accepted = pool.submit(accept_one, server)
        connect(front.getsockname(), TOKEN, timeout_s=10).close()
        relayed.result()
        accepted.result().close()
        with socket.create_connection(server.getsockname()) as sock:
            sock.sendall(recorded)
            with pytest.raises(ProtocolError, match="does not know the token"):
                accept_one(server)


def test_waiting_for_a_peer_is_told_and_ends(
    pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    with listening() as server:
        address = server.getsockname()
    caplog.set_level(logging.INFO)
    with pytest.raises(PeerLost, match="cannot be reached: Connection refused; gave up waiting for it"):
        handshake.connect_until(address, TOKEN, deadline_s=time.monotonic() + 0.3)
    assert [r.message for r in caplog.records] == [
        f"waiting for rank 0: 127.0.0.1:{address[1]} cannot be reached: Connection refused; "
        "trying again until it answers"
    ]
    waiting = pool.submit(handshake.connect_until, address, TOKEN)
    time.sleep(0.2)
    with socket.create_server(address) as server:
        accept_one(server).close()
        waiting.result().close()


@pytest.mark.parametrize("new_exchange", by_both(Exchange, _compiled, needs_exchange))
def test_the_same_over_tls(
    new_exchange: NewExchange, tls: tuple[ssl.SSLContext, ssl.SSLContext], pool: ThreadPoolExecutor
) -> None:
    with listening() as server:
        accepted = pool.submit(accept_one, server, tls=tls[0])
        client = connect(server.getsockname(), TOKEN, timeout_s=10, tls=tls[1])
        served = accepted.result()
        n = 1_000_000
        head = wire.encode(messages.Reduce("f32"), 4 * n)

        def exchange(mine: Channel, value: float) -> Any:
            frames = Frames(head, 2, n, np.float32)
            frames.payloads[0] = value
            new_exchange([(mine, frames[0])], [(mine, frames[1])], head)()
            mine.send(messages.Barrier())
            assert mine.receive()[0] == messages.Barrier()
            return frames.payloads[1]

        results = list(pool.map(exchange, (client, served), (1.0, 2.0)))
        assert (results[0] == 2).all()
        assert (results[1] == 1).all()
        assert not client.wait_readable(0.01)
        served.close()
        with pytest.raises(PeerLost, match=r"closed the connection|broke"):
            client.receive()
        client.close()


needs_psk = pytest.mark.skipif(not getattr(ssl, "HAS_PSK", False), reason="needs Python 3.13")


def test_a_python_that_cannot_encrypt_by_the_token_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssl, "HAS_PSK", False, raising=False)
    with pytest.raises(ConfigError, match=r"--encrypt needs Python 3\.13 or newer; --tls_cert"):
        auth.token_tls(TOKEN)


@needs_psk
def test_encrypted_by_the_token(pool: ThreadPoolExecutor) -> None:
    server_tls, client_tls = auth.token_tls(TOKEN)
    with listening() as server:
        accepted = pool.submit(accept_one, server, tls=server_tls)
        client = connect(server.getsockname(), TOKEN, timeout_s=10, tls=client_tls)
        with contextlib.closing(client), contextlib.closing(accepted.result()) as served:
            assert client._sock.version() == "TLSv1.3"  # type: ignore[attr-defined]
            served.send(messages.Barrier())
            assert client.receive()[0] == messages.Barrier()


@needs_psk
def test_another_token_gets_no_tls(pool: ThreadPoolExecutor) -> None:
    with listening() as server:
        accepted = pool.submit(accept_one, server, tls=auth.token_tls(b"another key")[0])
        with pytest.raises(PeerLost):
            connect(server.getsockname(), TOKEN, timeout_s=10, tls=auth.token_tls(TOKEN)[1])
        with pytest.raises((PeerLost, ProtocolError)):
            accepted.result()


def test_without_tls_a_tls_port_gives_nothing(
    tls: tuple[ssl.SSLContext, ssl.SSLContext], pool: ThreadPoolExecutor
) -> None:
    with listening() as server:
        accepted = pool.submit(accept_one, server, tls=tls[0])
        with pytest.raises(PeerLost, match="TLS"):
            connect(server.getsockname(), TOKEN, timeout_s=10)
        with pytest.raises(
            ProtocolError, match=r"TLS with the client failed: .*start both sides with --encrypt"
        ):
            accepted.result()
        silent = socket.create_connection(server.getsockname())
        with silent, pytest.raises(PeerLost, match="silent for too long, during TLS"):
            accept_one(server, tls=tls[0], timeout_s=0.2)
