"""A connection of two channels: exact reads, sends that end in time, ends from another thread."""

import contextlib
import socket
import ssl
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tpilite.errors import PeerLost
from tpilite.net import messages, wire
from tpilite.net.channel import Channel
from tpilite.net.handshake import accept, connect

FRAME = wire.encode(messages.Broadcast({}, "|u1", [9]), 9) + bytes(9)


def test_a_peer_that_closes_at_any_point(pair: tuple[Channel, Channel]) -> None:
    for cut in range(len(FRAME)):
        a, b = socket.socketpair()
        with contextlib.closing(Channel(a, "peer")) as receiver:
            b.sendall(FRAME[:cut])
            b.close()
            with pytest.raises(
                PeerLost, match=r"peer closed the connection (between|after \d+ of \d+ bytes)"
            ):
                receiver.receive()


def test_what_is_only_claimed_takes_no_memory() -> None:
    a, b = socket.socketpair()
    with contextlib.closing(Channel(a, "peer")) as receiver:
        b.sendall(wire.PREFIX.pack(wire.MAGIC, messages.VERSION, 4, 1 << 28) + b"head, and some of it")
        b.close()
        tracemalloc.start()
        try:
            with pytest.raises(PeerLost, match="of a frame"):
                receiver.receive()
            assert tracemalloc.get_traced_memory()[1] < 3 << 20
        finally:
            tracemalloc.stop()


def test_frames_of_any_size_come_whole_one_after_another(
    pair: tuple[Channel, Channel], pool: ThreadPoolExecutor
) -> None:
    for n in (0, 1, 1 << 20, (1 << 20) + 1, 3_000_000, 5, 7 << 20):
        sent = np.arange(n, dtype=np.uint32).astype(np.uint8)
        sending = pool.submit(pair[0].send, messages.Broadcast({"n": n}, "|u1", [n]), sent)
        header, payload = pair[1].receive()
        sending.result()
        assert header == messages.Broadcast({"n": n}, "|u1", [n])
        assert bytes(payload) == sent.tobytes()


def test_a_send_has_a_deadline(pair: tuple[Channel, Channel]) -> None:
    with pytest.raises(PeerLost, match="silent for too long: it takes no more bytes"):
        pair[0].send(messages.Reduce("f32"), np.zeros(2_000_000, np.float32), time.monotonic() + 0.1)


def test_shutdown_ends_a_read_in_another_thread(
    pair: tuple[Channel, Channel], pool: ThreadPoolExecutor
) -> None:
    reading = pool.submit(pair[0].receive)
    time.sleep(0.05)
    pair[0].shutdown("rank 2 was silent for 10 s")
    pair[0].shutdown("a later reason")
    with pytest.raises(PeerLost, match=r"^rank 2 was silent for 10 s$"):
        reading.result()
    with pytest.raises(PeerLost, match=r"^rank 2 was silent for 10 s$"):
        pair[0].send(messages.Barrier())


def test_a_tls_channel_that_is_shut_down_gives_no_bytes(
    tls: tuple[ssl.SSLContext, ssl.SSLContext], pool: ThreadPoolExecutor
) -> None:
    """What came encrypted must not pass for the rest of an array when another thread ends the channel."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted = pool.submit(lambda: accept(server.accept()[0], "client", b"key", timeout_s=10, tls=tls[0]))
        client = connect(server.getsockname(), b"key", timeout_s=10, tls=tls[1])
        with contextlib.closing(accepted.result()) as served, contextlib.closing(client):
            served.send(messages.Barrier())
            assert client.receive()[0] == messages.Barrier()
            reading = pool.submit(client.receive)
            time.sleep(0.05)
            client.shutdown("rank 1 is gone")
            with pytest.raises(PeerLost, match="rank 1 is gone"):
                reading.result()
            assert client._sock._sslobj is not None
