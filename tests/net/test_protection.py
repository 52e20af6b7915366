"""What somebody on the way can do to frames without the token: end connections, and nothing else."""

import contextlib
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from frame_relay import FrameRelay
from hypothesis import given, settings
from hypothesis import strategies as st
from pieces import Kept, Pieces
from test_rendezvous import SECURITY, TERMS, rendezvous_of

from tpilite.collective import Message
from tpilite.errors import PeerLost
from tpilite.net import messages
from tpilite.net.group import Group
from tpilite.net.membership import join

SEND, RECEIVE = b"s" * 32, b"r" * 32


def sent_frames(payloads: list[bytes]) -> list[bytes]:
    """Frames as they travel, each with its tag."""
    with Kept() as sender:
        sender.protect(SEND, RECEIVE)
        for i, payload in enumerate(payloads):
            sender.send(messages.Gather({"i": i}, "|u1", [len(payload)]), np.frombuffer(payload, np.uint8))
        return sender.sent


def received_frames(stream: bytes, send: bytes = RECEIVE, receive: bytes = SEND) -> tuple[list[bytes], str]:
    """What is taken of a stream up to the error that ends it, and that error."""
    found: list[bytes] = []
    with Pieces(stream) as receiver:
        receiver.protect(send, receive)
        try:
            while True:
                found.append(bytes(receiver.receive()[1]))
        except PeerLost as error:
            return found, str(error)


PAYLOADS = [b"first", b"second", b"", b"fourth", b"fifth"]


def test_frames_that_nobody_touched_are_taken() -> None:
    found, error = received_frames(b"".join(sent_frames(PAYLOADS)))
    assert found == PAYLOADS
    assert "closed the connection between two frames" in error


@settings(deadline=None, max_examples=200)
@given(payloads=st.lists(st.binary(max_size=40), min_size=1, max_size=4), bit=st.integers(0, 1 << 20))
def test_one_changed_bit_anywhere_ends_the_connection_before_its_frame(
    payloads: list[bytes], bit: int
) -> None:
    frames = sent_frames(payloads)
    stream = bytearray(b"".join(frames))
    place = bit // 8 % len(stream)
    stream[place] ^= 1 << bit % 8
    n_whole = next(i for i in range(len(frames)) if place < sum(map(len, frames[: i + 1])))
    found, error = received_frames(bytes(stream))
    assert found == payloads[:n_whole]
    # A length that became longer waits for bytes that do not come.
    assert "cannot be trusted" in error or "closed the connection after" in error


@settings(deadline=None, max_examples=200)
@given(order=st.lists(st.integers(0, 4), max_size=7))
def test_frames_in_any_other_order_are_taken_only_as_far_as_they_were_sent_so(order: list[int]) -> None:
    frames = sent_frames(PAYLOADS)
    found, error = received_frames(b"".join(frames[i] for i in order))
    n_right = next((n for n, i in enumerate(order) if i != n), len(order))
    assert found == PAYLOADS[:n_right]
    assert ("changed, repeated, moved or left out" in error) == (n_right < len(order))


def test_what_a_side_sent_is_not_taken_from_the_other() -> None:
    found, error = received_frames(sent_frames(PAYLOADS)[0], send=SEND, receive=RECEIVE)
    assert found == []
    assert "cannot be trusted" in error


# Groups through a relay


def worker_sums(port: int, n: int) -> list[float]:
    """What a worker behind the relay sums, from the beginning again after each loss."""
    while True:
        with contextlib.suppress(PeerLost):
            with join(("127.0.0.1", port), SECURITY, timeout_s=20) as membership:
                with membership.wait_for_group(TERMS) as group:
                    return rounds(group, n)


def rounds(group: Group, n: int) -> list[float]:
    results = []
    for i in range(n):
        step = group.broadcast(None if group.rank else messages_of(i)).header["i"]
        total = group.all_reduce(np.full(4, group.rank + step, np.float32))
        group.gather(messages_of(int(total[0])))
        results.append(float(total.sum()))
        time.sleep(0.01)
    return results


def messages_of(i: int) -> Any:
    return Message({"i": i}, np.full(3, i, np.float32))


@pytest.mark.parametrize(
    ("kind", "harm"),
    [("reduce", "flip"), ("reduce", "repeat"), ("broadcast", "flip"), ("broadcast", "repeat"),
     ("gather", "flip"), ("gather", "repeat"), ("heartbeat", "flip"), ("heartbeat", "drop"),
     ("heartbeat", "swap"), ("ready", "flip"), ("start", "flip"), ("attach", "flip"), ("welcome", "flip"),
     ("join", "flip")],
)  # fmt: skip
def test_harm_done_between_nodes_ends_the_group_and_never_changes_a_result(
    kind: str, harm: str, pool: ThreadPoolExecutor
) -> None:
    n = 60
    nth = 1 if kind in ("ready", "start", "attach", "welcome", "join") else 3
    with rendezvous_of(2, timeout_s=0.4, protect=True) as rendezvous:
        with FrameRelay(rendezvous.port, kind, harm, nth) as relay:
            working = pool.submit(worker_sums, relay.port, n)
            while True:
                with contextlib.suppress(PeerLost):
                    with rendezvous.wait_for_group(20) as group:
                        mine = rounds(group, n)
                        break
            theirs = working.result(30)
            assert relay.harmed.is_set()
    assert mine == theirs == [4.0 * (2 * i + 1) for i in range(n)]


def test_sums_alone_are_as_they_come_unless_they_are_protected(pool: ThreadPoolExecutor) -> None:
    """What the documentation says of a group without --protect."""
    with rendezvous_of(2) as rendezvous:
        joining = pool.submit(functools.partial(join, ("127.0.0.1", rendezvous.port), SECURITY))
        with joining.result() as membership:
            forming = pool.submit(rendezvous.wait_for_group, 20)
            with membership.wait_for_group(TERMS) as worker, forming.result() as hub:
                assert not worker.protect
                assert not hub.protect
