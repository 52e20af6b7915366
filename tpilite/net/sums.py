"""The three algorithms that sum an array over ranks.

For n ranks' parts of S bytes, a latency a and an inverse bandwidth b:

    star     all parts to rank 0, the sum back                                2 a + 2 (n - 1) S b
    direct   every part to every rank, each sums for itself                     a + (n - 1) S b
    scatter  rank r sums the r-th chunk of all parts, then sends it to all    2 a + 2 (n - 1) / n S b

All three add up in rank order, so they give the same bits, on every rank. With a narrower payload (f16,
bf16, q8) the algorithms differ in their last bits, but all ranks still agree: who sends a rounded value also
keeps the rounded one.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from tpilite.arrays import Array
from tpilite.net import messages, wire
from tpilite.net.channel import Channel
from tpilite.net.codecs import CODECS
from tpilite.net.exchange import Exchange, Frames, NewExchange

STAR = "star"  # the one that needs no connections among workers
ALGORITHMS = (STAR, "direct", "scatter")

_Channels = Sequence[Channel | None]


class Sum:
    """Sums `n` numbers over the ranks, in place: frames and exchanges are made once for all calls.

    `channels[r]` leads to rank r, None at the own place and, for a worker in a star, at all but rank 0's.
    """

    def __init__(
        self, rank: int, channels: _Channels, payload: str, n: int, new_exchange: NewExchange
    ) -> None:
        self.n = n
        self.rank = rank
        self.world_size = len(channels)
        self.payload = payload
        self.new_exchange = new_exchange
        self.peers = [(r, channel) for r, channel in enumerate(channels) if channel is not None]
        # Rank r sends to r + 1 first and to r - 1 last, so that not all send to the same rank at a time. So
        # the frame of r - 1, which sent to r first, comes first: frames are received in the opposite order.
        self.targets = sorted(self.peers, key=lambda peer: peer[0] < rank)
        self.sources = self.targets[::-1]
        self.prepare()

    def prepare(self) -> None:
        """Makes the frames and exchanges of all calls."""
        raise NotImplementedError

    def __call__(self, x: Array) -> None:
        raise NotImplementedError

    def frames(self, n_frames: int, n: int) -> Frames:
        """Frames of `n` numbers, which `self.codec` narrows and widens, all of them at once too."""
        self.codec = CODECS[self.payload](n_frames, n)
        width, dtype = self.codec.width, self.codec.dtype
        head = wire.encode(messages.Reduce(self.payload), width * dtype.itemsize)
        return Frames(head, n_frames, width, dtype)


class _StarHub(Sum):
    """Rank 0 of the star. It receives in rank order; what comes early waits in the kernel's buffers."""

    def prepare(self) -> None:
        frames = self.frames(1, self.n)
        self.payload_row = frames.payloads[0]
        self.receives = [
            self.new_exchange([], [(channel, frames[0])], frames.head) for _, channel in self.peers
        ]
        self.send = self.new_exchange([(channel, frames[0]) for _, channel in self.peers], [], frames.head)

    def __call__(self, x: Array) -> None:
        codec, row = self.codec, self.payload_row
        for receive in self.receives:
            receive()
            x += codec.widen(row)
        codec.narrow(x, row)
        self.send()
        if not codec.exact:
            np.copyto(x, codec.widen(row))


class _StarLeaf(Sum):
    """A worker of the star."""

    def prepare(self) -> None:
        frames, (_, hub) = self.frames(2, self.n), self.peers[0]
        self.sent, self.received = frames.payloads
        self.exchange = self.new_exchange([(hub, frames[0])], [(hub, frames[1])], frames.head)

    def __call__(self, x: Array) -> None:
        self.codec.narrow(x, self.sent)
        self.exchange()
        np.copyto(x, self.codec.widen(self.received))


class _Direct(Sum):
    """Every rank sends its whole part to all others, and adds up all parts for itself."""

    def prepare(self) -> None:
        frames = self.frames(self.world_size, self.n)
        self.parts, self.mine = frames.payloads, frames.payloads[self.rank]
        self.exchange = self.new_exchange(
            [(channel, frames[self.rank]) for _, channel in self.targets],
            [(channel, frames[r]) for r, channel in self.sources],
            frames.head,
        )

    def __call__(self, x: Array) -> None:
        self.codec.narrow(x, self.mine)
        self.exchange()
        sum_in_rank_order(self.codec.widen(self.parts), x)


class ScatterSum(Sum):
    """Each rank sums one chunk of x for all, in two exchanges.

    First, scatter: every rank sends its r-th chunk to rank r, which so gets that chunk of all ranks and adds
    them up. Then, gather: rank r sends its sum to all others, and every rank has the sums of all chunks.
    Chunks are of one size: an x that cannot be cut so is copied to an array with zeros at its end.
    """

    def prepare(self) -> None:
        size = -(-self.n // self.world_size)
        parts, chunks = self.frames(self.world_size, size), self.frames(self.world_size, size)
        self.parts = parts.payloads  # [world_size, width]: this rank's chunk of every rank's x
        self.chunks = chunks.payloads  # [world_size, width]: all of this rank's x, then of the sum
        self.padded = np.zeros(size * self.world_size if self.n % self.world_size else 0, np.float32)
        self.scatter = self.new_exchange(
            [(channel, chunks[r]) for r, channel in self.targets],
            [(channel, parts[r]) for r, channel in self.sources],
            parts.head,
        )
        self.gather = self.new_exchange(
            [(channel, chunks[self.rank]) for _, channel in self.targets],
            [(channel, chunks[r]) for r, channel in self.sources],
            parts.head,
        )

    def __call__(self, x: Array) -> None:
        codec, rank = self.codec, self.rank
        if self.padded.size:
            self.padded[: x.size] = x
        rows = (self.padded if self.padded.size else x).reshape(self.world_size, -1)
        codec.narrow(rows, self.chunks)
        self.scatter()
        parts = codec.widen(self.parts)
        np.copyto(parts[rank], rows[rank])  # nobody else sums this chunk: its own part needs no rounding
        sum_in_rank_order(parts, rows[rank])
        codec.narrow(rows[rank], self.chunks[rank])
        self.gather()
        np.copyto(rows, codec.widen(self.chunks))
        if self.padded.size:
            np.copyto(x, self.padded[: x.size])


def sum_in_rank_order(parts: Array, total: Array) -> None:
    """Puts the sum of `parts` [n_ranks, n] into `total` [n]."""
    if parts.shape[1] > 1:
        np.add.reduce(parts, axis=0, out=total)  # adds row after row
    else:  # of a single column, `reduce` adds pairs first
        np.copyto(total, np.add.accumulate(parts)[-1])


def new_sum(
    algorithm: str,
    rank: int,
    channels: _Channels,
    payload: str,
    n: int,
    protect: bool = False,
    new_exchange: NewExchange = Exchange,
    scatter_sum: type[ScatterSum] = ScatterSum,
) -> Sum:
    """What sums `n` numbers by one of ALGORITHMS, of which all but the star need channels to all ranks.

    With `protect` each frame has its tag, which Python computes: the exchanges are its own, too.
    """
    if protect:
        new_exchange = functools.partial(Exchange, protect=True)
    star = _StarLeaf if rank else _StarHub
    cls: type[Sum] = {STAR: star, "direct": _Direct, "scatter": scatter_sum}[algorithm]
    return cls(rank, channels, payload, n, new_exchange)


# What makes a sum of the first six arguments of `new_sum`: itself, or what does the same by compiled code.
NewSum = Callable[[str, int, _Channels, str, int, bool], Sum]
