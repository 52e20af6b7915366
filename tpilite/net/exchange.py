"""Frames that lie in one piece of memory, sent to some peers while others' come in.

Ranks that all send first would block each other as soon as the kernel's buffers are full; so what it does not
take at once goes on while the frames of the others are received. Compiled code may do the same, faster: it is
handed in as a `NewExchange`.
"""

import select
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.errors import PeerLost, ProtocolError
from tpilite.net import wire
from tpilite.net.channel import Channel

Transfer = tuple[Channel, memoryview]  # a frame, or what is left of it, and who it goes to or comes from

_ALIGNMENT = 64  # of a payload in its row, so that its numbers lie where numbers of their type should


class Frames:
    """`n_frames` frames of `n` numbers each, all with the same head."""

    def __init__(self, head: bytes, n_frames: int, n: int, dtype: Any) -> None:
        self.head = head
        begin = -(-len(head) // _ALIGNMENT) * _ALIGNMENT
        rows = np.zeros((n_frames, begin + n * np.dtype(dtype).itemsize), np.uint8)
        rows[:, begin - len(head) : begin] = np.frombuffer(head, np.uint8)
        self.payloads: NDArray[Any] = rows[:, begin:].view(dtype)  # [n_frames, n]
        self._views = [memoryview(row[begin - len(head) :]) for row in rows]

    def __getitem__(self, i: int) -> memoryview:
        return self._views[i]


class Exchange:
    """Sends frames and receives others, whose heads must be `head`, each of them from its peer in this order.

    With `protect` each has its tag behind it, which is computed while the frames are on their way.
    Raises `PeerLost`, also for another frame than the expected one.
    """

    def __init__(
        self, sends: Sequence[Transfer], receives: Sequence[Transfer], head: bytes, *, protect: bool = False
    ) -> None:
        self.sends = sends
        self.receives = receives
        self.head = head
        self.protect = protect

    def __call__(self) -> None:
        rest = list(self.sends)
        _hand_over(rest)
        if self.protect:
            rest += [(channel, memoryview(channel.tag(frame))) for channel, frame in self.sends]
            _hand_over(rest)
        for channel, frame in self.receives:
            self._receive(channel, frame, self.head, rest)
            if self.protect:
                tag = memoryview(bytearray(channel.n_tag_bytes))
                self._receive(channel, tag, b"", rest)
                channel.check(tag, frame)
        while rest:
            _push(rest, None)

    def _receive(self, channel: Channel, frame: memoryview, head: bytes, rest: list[Transfer]) -> None:
        n_bytes, n_head, total = 0, len(head), len(frame)
        while n_bytes < total:
            while rest and not _push(rest, channel):
                pass
            # Behind a head that is right there are as many bytes as it says: one call waits for all.
            n_bytes += channel.receive_some(
                frame[n_bytes:], None, (n_bytes, total), whole=n_bytes >= n_head and not rest
            )
            if n_bytes >= n_head and frame[:n_head] != head:
                raise self.out_of_step(channel, frame)

    def out_of_step(self, channel: Channel, frame: memoryview) -> PeerLost:
        found = _describe(frame[: len(self.head)])
        return channel.altered(f"expected {_describe(self.head)} from {channel.peer}, found {found}")


# What makes an exchange of what is sent, what is received and the head of all these frames.
NewExchange = Callable[[Sequence[Transfer], Sequence[Transfer], bytes], Exchange]


def _push(sends: list[Transfer], receiver: Channel | None) -> bool:
    """Waits until one of the peers takes something or `receiver` can be read, and sends what is taken.

    Whether `receiver` can be read; `sends` keeps what is left.
    """
    readable = receiver is not None and receiver.wait_readable(0)
    poll = select.poll()
    for channel, _ in sends:
        poll.register(channel, select.POLLOUT)
    if receiver is not None and not readable:
        both = any(channel is receiver for channel, _ in sends)
        poll.register(receiver, select.POLLIN | select.POLLOUT if both else select.POLLIN)
    poll.poll(0 if readable else None)
    _hand_over(sends)
    return readable


def _hand_over(sends: list[Transfer]) -> None:
    """Gives the kernel what it takes at once, to each peer in order; only the rest stays in `sends`."""
    rest: list[Transfer] = []
    for channel, view in sends:
        if all(channel is not waiting for waiting, _ in rest):
            view = view[channel.send_now(view) :]
        if view:
            rest.append((channel, view))
    sends[:] = rest


def _describe(head: bytes | memoryview) -> str:
    """A frame's start for an error's text."""
    head, n_prefix = memoryview(head), wire.PREFIX.size
    try:
        wire.check_start(head)
        n_header_bytes, n_payload_bytes = wire.decode_prefix(
            head[:n_prefix], wire.MAX_HEADER_BYTES, wire.MAX_PAYLOAD_BYTES
        )
        if n_header_bytes > len(head) - n_prefix:
            return "another frame"
        header = wire.decode_header(head[n_prefix : n_prefix + n_header_bytes], n_payload_bytes)
    except ProtocolError as error:
        return f"no frame ({error})"
    return f"{header} with {n_payload_bytes} bytes"
