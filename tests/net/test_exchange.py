"""Exchanges and scattered sums over socket pairs, by Python and by exchange.c: failures and signals too."""

import contextlib
import itertools
import signal
import socket
import threading
import time

import numpy as np
import pytest
from compiled_code import EXCHANGE, by_both, needs_exchange

from tpilite.errors import PeerLost
from tpilite.native.exchange import CompiledExchange, sums_by
from tpilite.net import messages, wire
from tpilite.net.channel import Channel
from tpilite.net.exchange import Exchange, Frames
from tpilite.net.sums import new_sum, sum_in_rank_order


def by_compiled(*args):
    return CompiledExchange(EXCHANGE, *args)


both = pytest.mark.parametrize("new", by_both(Exchange, by_compiled, needs_exchange))

HEAD = wire.encode(messages.Reduce("f32"), 12)


@pytest.fixture
def ends():
    """A channel and the socket at its other end."""
    a, b = socket.socketpair()
    with contextlib.closing(Channel(a, "peer")) as channel, b:
        yield channel, b


def received(new, channel, head=HEAD, n=3):
    frames = Frames(head, 1, n, np.float32)
    new([], [(channel, frames[0])], head)()
    return frames.payloads[0]


def test_payloads_are_aligned_and_follow_their_heads():
    for n_head, n in itertools.product((1, 17, 63, 64, 65), (0, 1, 5)):
        head = bytes(range(n_head))
        frames = Frames(head, 3, n, np.float32)
        frames.payloads[:] = np.arange(3 * n, dtype=np.float32).reshape(3, n)
        assert frames.payloads[0].ctypes.data % 4 == 0
        for i in range(3):
            assert bytes(frames[i]) == head + frames.payloads[i].tobytes()


@both
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_frame_in_any_pieces(new, size, ends, pool):
    channel, b = ends
    expected = np.array([1, 2, 3], np.float32)
    stream = (HEAD + expected.tobytes()) * 2

    def send():
        for i in range(0, len(stream), size):
            b.sendall(stream[i : i + size])
            time.sleep(0.0005)

    sending = pool.submit(send)
    for _ in range(2):
        np.testing.assert_array_equal(received(new, channel), expected)
    sending.result()


@both
def test_a_frame_cut_at_every_offset(new):
    stream = HEAD + bytes(12)
    for cut in range(len(stream)):
        a, b = socket.socketpair()
        with contextlib.closing(Channel(a, "peer")) as channel:
            b.sendall(stream[:cut])
            b.close()
            with pytest.raises(
                PeerLost, match=f"(after {cut} of {len(stream)} bytes of a|between two) frame"
            ):
                received(new, channel)


@both
@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (wire.encode(messages.Reduce("f32"), 8) + bytes(8), r"found Reduce\(payload='f32'\) with 8 bytes"),
        (wire.encode(messages.Error("a reason as long as it takes to fill a head")), "found another frame"),
        (b"garbage " * 8, "found no frame"),
    ],
)
def test_another_frame_than_the_expected_one_does_not_hang(new, frame, text, ends):
    channel, b = ends
    b.sendall(frame)
    with pytest.raises(PeerLost, match=r"expected Reduce\(payload='f32'\) with 12 bytes .*" + text):
        received(new, channel)


@both
def test_another_frame_in_pieces_does_not_hang(new, ends, pool):
    channel, b = ends
    frame = wire.encode(messages.Reduce("f16"), 6)

    def send():
        for i in range(len(frame)):
            b.sendall(frame[i : i + 1])
            time.sleep(0.001)

    sending = pool.submit(send)
    with pytest.raises(PeerLost, match=r"found Reduce\(payload='f16'\) with 6 bytes"):
        received(new, channel)
    sending.result()


@both
def test_all_may_send_more_than_the_kernel_holds(new, pool):
    n, world_size = 500_000, 3
    head = wire.encode(messages.Reduce("f32"), 4 * n)
    with contextlib.ExitStack() as stack:
        channels = [[None] * world_size for _ in range(world_size)]
        for i, j in itertools.combinations(range(world_size), 2):
            for (one, other), sock in zip(((i, j), (j, i)), socket.socketpair(), strict=True):
                channels[one][other] = stack.enter_context(contextlib.closing(Channel(sock, f"rank {other}")))

        def exchange(rank):
            frames = Frames(head, world_size, n, np.float32)
            frames.payloads[rank] = rank + 1
            peers = [(channel, r) for r, channel in enumerate(channels[rank]) if channel]
            sends = [(channel, frames[rank]) for channel, _ in peers]
            run = new(sends, [(channel, frames[r]) for channel, r in peers], head)
            run()
            run()
            return frames.payloads

        for payloads in pool.map(exchange, range(world_size)):
            assert (payloads == np.arange(1, world_size + 1)[:, None]).all()


@both
def test_what_cannot_be_sent_tells_whose_fault_it_is(new, ends):
    channel, b = ends
    b.close()
    frames = Frames(HEAD, 1, 3, np.float32)
    with pytest.raises(PeerLost, match=r"the connection to peer broke between two frames: Broken pipe"):
        new([(channel, frames[0])], [], HEAD)()


@both
@pytest.mark.parametrize("unsent", [0, 2_000_000])
def test_a_shutdown_by_another_thread_is_noticed(new, unsent, ends, pool):
    channel, _ = ends
    frames, large = Frames(HEAD, 1, 3, np.float32), Frames(HEAD, 1, unsent, np.float32)
    sends = [(channel, large[0])] if unsent else []
    exchange = pool.submit(new(sends, [(channel, frames[0])], HEAD))
    time.sleep(0.05)
    assert not exchange.done()
    channel.shutdown("rank 2 was silent for 10 s")
    with pytest.raises(PeerLost, match=r"^rank 2 was silent for 10 s$"):
        exchange.result(timeout=10)


@both
def test_a_closed_channel_is_not_taken_for_what_has_its_number(new, ends):
    channel, _ = ends
    frames = Frames(HEAD, 1, 3, np.float32)
    check_closed(channel, new([(channel, frames[0])], [], HEAD))


def check_closed(channel, run):
    """Closes the channel; what runs on it then must not touch the sockets that get its number."""
    number = channel.fileno()
    channel.close()
    a, b = socket.socketpair()
    with a, b:
        assert number in (a.fileno(), b.fileno()), "the system gives the lowest free number"
        with pytest.raises(PeerLost, match="this node closed the connection"):
            run()
        for sock in (a, b):
            with pytest.raises(BlockingIOError):
                sock.recv(1, socket.MSG_DONTWAIT)


@contextlib.contextmanager
def at_a_signal(handle, first_s, then_s=0.0):
    old = signal.signal(signal.SIGALRM, lambda *_: handle())
    signal.setitimer(signal.ITIMER_REAL, first_s, then_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@both
@pytest.mark.parametrize("before", [0, 5, len(HEAD) + 6])
@pytest.mark.parametrize("meanwhile", [0, 3])
def test_a_signal_is_handled_while_it_waits(new, before, meanwhile, ends):
    """With nothing, a part of the head or of the payload there: the handler sends the rest."""
    channel, b = ends
    stream = HEAD + np.array([1, 2, 3], np.float32).tobytes()
    b.sendall(stream[:before])
    sender = threading.Timer(0.03, lambda: b.sendall(stream[before : before + meanwhile]))
    sender.start()
    with at_a_signal(lambda: b.sendall(stream[before + meanwhile :]), 0.1):
        assert received(new, channel).tolist() == [1, 2, 3]
    sender.join()


@both
@pytest.mark.parametrize("receives", [True, False])
def test_a_signal_is_handled_while_nobody_takes_what_is_sent(new, receives, ends, pool):
    channel, b = ends
    small, large = Frames(HEAD, 1, 3, np.float32), Frames(HEAD, 1, 2_000_000, np.float32)
    reading = []

    def handle():
        b.sendall(small[0])
        reading.append(pool.submit(b.recv, len(large[0]), socket.MSG_WAITALL))

    with at_a_signal(handle, 0.05):
        new([(channel, large[0])], [(channel, small[0])] * receives, HEAD)()
    assert len(reading[0].result(timeout=10)) == len(large[0])


@both
def test_an_interrupt_ends_it(new, ends):
    channel, _ = ends
    timer = threading.Timer(0.05, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        received(new, channel)
    timer.join()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_sum_in_rank_order_adds_no_pairs(n):
    """A one more makes no difference to 2^24, two at once do."""
    rows = np.ones((16, n + 3), np.float32)
    rows[0], total = 2**24, np.empty(n, np.float32)
    sum_in_rank_order(rows[:, 3:], total)
    assert (total == 2**24).all()


both_sums = pytest.mark.parametrize("sum_of", by_both(new_sum, sums_by(EXCHANGE), needs_exchange))


class Peer:
    """The socket of rank 1, in a sum of `n` numbers over two ranks of which rank 0 is ours."""

    def __init__(self, sock, n):
        self.sock = sock
        size = -(-n // 2)
        self.head = wire.encode(messages.Reduce("f32"), 4 * size)
        self.frame_bytes = len(self.head) + 4 * size
        self.part = np.arange(size, dtype=np.float32) / 3  # of our chunk
        self.chunk = np.append(self.part[: n - size] * 5, np.zeros(2 * size - n, np.float32))

    def send_part(self, factor=1):
        self.sock.sendall(self.head + (self.part * np.float32(factor)).tobytes())

    def send_chunk(self, factor=1):
        self.sock.sendall(self.head + (self.chunk * np.float32(factor)).tobytes())

    def sent_to_it(self):
        """Our part of its chunk and our chunk, which must be all that was sent."""
        frames = self.sock.recv(10 * self.frame_bytes, socket.MSG_DONTWAIT)
        assert len(frames) == 2 * self.frame_bytes
        return [
            np.frombuffer(frame[len(self.head) :], np.float32)
            for frame in (frames[: self.frame_bytes], frames[self.frame_bytes :])
        ]


@contextlib.contextmanager
def a_sum_over_two(n, sum_of):
    a, b = socket.socketpair()
    with contextlib.closing(Channel(a, "peer")) as channel, b:
        yield sum_of("scatter", 0, [None, channel], "f32", n), Peer(b, n)


def check_sum(x, given, peer, first, second):
    own, theirs = np.split(given, [len(peer.part)])
    np.testing.assert_array_equal(x[: len(own)], own + peer.part * np.float32(first))
    np.testing.assert_array_equal(x[len(own) :], (peer.chunk * np.float32(second))[: len(theirs)])
    part, chunk = peer.sent_to_it()
    np.testing.assert_array_equal(part[: len(theirs)], theirs)
    assert not part[len(theirs) :].any()
    np.testing.assert_array_equal(chunk, x[: len(own)])


@both_sums
@pytest.mark.parametrize("n", [1, 2, 5, 64, 1001])
def test_a_scattered_sum(sum_of, n):
    given = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    with a_sum_over_two(n, sum_of) as (sum_up, peer):
        for first, second in ((2, 3), (4, 5)):  # a second time, with the same frames
            peer.send_part(first)
            peer.send_chunk(second)
            x = given.copy()
            sum_up(x)
            check_sum(x, given, peer, first, second)


@both_sums
@pytest.mark.parametrize("which", [0, 1])
def test_a_scattered_sum_whose_peer_ends(sum_of, which):
    with a_sum_over_two(10, sum_of) as (sum_up, peer):
        for _ in range(which):
            peer.send_part()
        peer.sock.sendall(peer.head[:7])
        peer.sock.shutdown(socket.SHUT_WR)
        with pytest.raises(PeerLost, match="peer closed the connection after 7 of"):
            sum_up(np.ones(10, np.float32))


@both_sums
def test_a_scattered_sum_on_a_closed_channel(sum_of):
    with a_sum_over_two(10, sum_of) as (sum_up, _):
        check_closed(sum_up.peers[0][1], lambda: sum_up(np.ones(10, np.float32)))


@both_sums
def test_signals_in_both_exchanges_of_a_scattered_sum(sum_of):
    given = np.arange(9, dtype=np.float32)
    with a_sum_over_two(9, sum_of) as (sum_up, peer):
        for _ in range(2):
            x, handled = given.copy(), []

            def handle(handled=handled):
                handled.append(1)
                if len(handled) == 3:  # the first two come while nothing is there
                    peer.send_part(3)
                elif len(handled) == 6:
                    peer.send_chunk(6)

            with at_a_signal(handle, 0.02, 0.02):
                sum_up(x)
            check_sum(x, given, peer, 3, 6)
