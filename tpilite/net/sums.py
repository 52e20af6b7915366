"""The three ways of summing an array over ranks, and the types in which its numbers travel.

For n ranks' parts of S bytes, a latency a and an inverse bandwidth b:

    star     all parts to rank 0, the sum back                                2 a + 2 (n - 1) S b
    direct   every part to every rank, each sums for itself                     a + (n - 1) S b
    scatter  rank r sums the r-th chunk of all parts, then sends it to all    2 a + 2 (n - 1) / n S b

All three add up in rank order, so they give the same bits, on every rank. With a narrower payload (f16,
bf16) they do not agree with each other, but still all ranks agree: who sends a rounded value also keeps
the rounded one.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.collective import Array
from tpilite.net import wire
from tpilite.net.channel import Channel, Rest, finish_sends

WAYS = ("star", "direct", "scatter")


class _Codec:
    """float32 as it travels: itself."""

    dtype: Any = np.dtype("<f4")
    exact = True

    def __init__(self, n: int) -> None:
        pass

    def narrow(self, x: Array) -> NDArray[Any]:
        """`x` as it is sent, in a buffer of the codec's own unless it is `x` itself."""
        return x

    def widen(self, stored: NDArray[Any]) -> Array:
        """The values of what was sent, likewise."""
        return stored


class _HalfCodec(_Codec):
    """float16: 11 bits of precision, up to 65504."""

    dtype = np.dtype("<f2")
    exact = False

    def __init__(self, n: int) -> None:
        self._narrow = np.empty(n, self.dtype)
        self._wide = np.empty(n, np.float32)

    def narrow(self, x: Array) -> NDArray[Any]:
        out = self._narrow[: len(x)]
        with np.errstate(over="ignore"):  # becomes infinite
            np.copyto(out, x, casting="same_kind")
        return out

    def widen(self, stored: NDArray[Any]) -> Array:
        out = self._wide[: len(stored)]
        np.copyto(out, stored)
        return out


class _BrainCodec(_Codec):
    """bfloat16: 8 bits of precision, float32's range. Rounds to nearest, ties to even.

    A NaN whose bits are all ones would become a zero; processors make NaNs of other bits.
    """

    dtype = np.dtype("<u2")
    exact = False

    def __init__(self, n: int) -> None:
        self._narrow = np.empty(n, self.dtype)
        self._bits = np.empty(n, np.uint32)

    def narrow(self, x: Array) -> NDArray[Any]:
        bits, out = self._bits[: len(x)], self._narrow[: len(x)]
        source = x.view(np.uint32)
        np.right_shift(source, 16, out=bits)
        bits &= 1
        bits += 0x7FFF
        bits += source
        bits >>= 16
        np.copyto(out, bits, casting="same_kind")
        return out

    def widen(self, stored: NDArray[Any]) -> Array:
        bits = self._bits[: len(stored)]
        np.copyto(bits, stored)
        bits <<= 16
        return bits.view(np.float32)


CODECS: dict[str, type[_Codec]] = {"f32": _Codec, "f16": _HalfCodec, "bf16": _BrainCodec}


class Sum:
    """Sums `n` numbers over the ranks, in place: heads and buffers are made once for all calls.

    `channels[r]` leads to rank r, None at the own place and, for a worker in a star, at all but rank 0's.
    """

    def __init__(self, rank: int, channels: Sequence[Channel | None], payload: str, n: int) -> None:
        self.n = n
        self.rank = rank
        self.channels = channels
        self.peers = [channel for channel in channels if channel is not None]
        # Ranks begin with their successors, so that not all of them send to rank 0 at the same time.
        after = sum(channel is not None for channel in self.channels[: self.rank])
        self.successors = self.peers[after:] + self.peers[:after]
        self.payload = payload
        self.codec = CODECS[payload](n)
        self.head = self._head(n)
        self.found = bytearray(len(self.head))
        self.part = np.empty(n, self.codec.dtype)

    def __call__(self, x: Array) -> None:
        raise NotImplementedError

    def _head(self, n: int) -> bytes:
        return wire.encode(wire.Reduce(self.payload), n * self.codec.dtype.itemsize)

    def _start(self, sends: list[Rest], channel: Channel, head: bytes, stored: NDArray[Any]) -> None:
        rest = channel.start_send(head, stored)
        if rest is not None:
            sends.append((channel, rest))


class _StarHub(Sum):
    """Rank 0 of the star. Ranks are received in their order: those that come early wait in the kernel.

    Receiving whoever is ready first, by a selector, was no faster for 4 ranks and slower for 8.
    """

    def __call__(self, x: Array) -> None:
        codec = self.codec
        for channel in self.peers:
            channel.receive_frame(self.head, self.found, self.part, [])
            x += codec.widen(self.part)
        stored = codec.narrow(x)
        sends: list[Rest] = []
        for channel in self.peers:
            self._start(sends, channel, self.head, stored)
        if sends:
            finish_sends(sends)
        if not codec.exact:
            np.copyto(x, codec.widen(stored))


class _StarLeaf(Sum):
    """A worker of the star."""

    def __call__(self, x: Array) -> None:
        codec, hub = self.codec, self.peers[0]
        sends: list[Rest] = []
        self._start(sends, hub, self.head, codec.narrow(x))
        if sends:
            finish_sends(sends)
        if codec.exact:
            hub.receive_frame(self.head, self.found, x, [])
        else:
            hub.receive_frame(self.head, self.found, self.part, [])
            np.copyto(x, codec.widen(self.part))


class _Direct(Sum):
    def __init__(self, rank: int, channels: Sequence[Channel | None], payload: str, n: int) -> None:
        super().__init__(rank, channels, payload, n)
        self.total = np.empty(n if rank else 0, np.float32)

    def __call__(self, x: Array) -> None:
        codec = self.codec
        stored = codec.narrow(x)
        sends: list[Rest] = []
        for channel in self.successors:
            self._start(sends, channel, self.head, stored)
        if not codec.exact:
            np.copyto(x, codec.widen(stored))
        self._add_others(x, sends)
        finish_sends(sends)

    def _add_others(self, mine: Array, sends: list[Rest]) -> None:
        """Makes `mine`, which an exact codec is sending, the sum of all ranks' parts, in rank order."""
        part, total, mine_is_sent = self.part, self.total, self.codec.exact
        for rank, channel in enumerate(self.channels):
            if channel is not None:
                channel.receive_frame(self.head, self.found, part, sends)
                values = self.codec.widen(part)
                if rank == 0:
                    np.copyto(total, values)
                elif rank < self.rank:
                    total += values
                else:
                    mine += values
            elif rank:
                if mine_is_sent:
                    finish_sends(sends)
                np.add(total, mine, out=mine)
            elif mine_is_sent:
                finish_sends(sends)


class _Scatter(Sum):
    """Receives in the order in which the parts come, as all ranks begin with their successors.

    So what came first is in its place when the last comes, which takes two thirds of the time above the bound
    that receiving in rank order takes, or the last one first (8 ranks, 1 ms); the sum is made in rank order.
    """

    def __init__(self, rank: int, channels: Sequence[Channel | None], payload: str, n: int) -> None:
        super().__init__(rank, channels, payload, n)
        bounds = [n * r // len(channels) for r in range(len(channels) + 1)]
        self.chunks = [slice(*pair) for pair in itertools.pairwise(bounds)]
        self.heads = [self._head(chunk.stop - chunk.start) for chunk in self.chunks]
        # In rank order, and each by itself.
        self.stack = np.empty((len(channels), bounds[rank + 1] - bounds[rank]), self.codec.dtype)
        self.parts = list(self.stack)
        by_channel = {channel: r for r, channel in enumerate(channels)}
        self.targets = [(by_channel[channel], channel) for channel in self.successors]
        self.sources = self.targets[::-1]

    def __call__(self, x: Array) -> None:
        codec, chunks, heads = self.codec, self.chunks, self.heads
        stored = codec.narrow(x)
        mine, my_head = x[chunks[self.rank]], heads[self.rank]
        sends: list[Rest] = []
        for rank, channel in self.targets:
            self._start(sends, channel, heads[rank], stored[chunks[rank]])
        np.copyto(self.parts[self.rank], stored[chunks[self.rank]])
        for rank, channel in self.sources:
            channel.receive_frame(my_head, self.found, self.parts[rank], sends)
        if codec.exact:
            np.add.reduce(self.stack, axis=0, out=mine)  # row by row: in rank order
        else:
            np.copyto(mine, codec.widen(self.parts[0]))
            for part in self.parts[1:]:
                mine += codec.widen(part)
        if sends:  # before the other chunks, which are being sent, are overwritten
            finish_sends(sends)
        summed = codec.narrow(mine)
        for _, channel in self.targets:
            self._start(sends, channel, my_head, summed)
        if not codec.exact:
            np.copyto(mine, codec.widen(summed))
        for rank, channel in self.sources:
            chunk = x[chunks[rank]]
            if codec.exact:
                channel.receive_frame(heads[rank], self.found, chunk, sends)
            else:
                part = self.part[: len(chunk)]
                channel.receive_frame(heads[rank], self.found, part, sends)
                np.copyto(chunk, codec.widen(part))
        if sends:
            finish_sends(sends)


def new_sum(way: str, rank: int, channels: Sequence[Channel | None], payload: str, n: int) -> Sum:
    """What sums `n` numbers in this way: one of WAYS, where all but the star need channels to all ranks."""
    cls: type[Sum] = {"star": _StarLeaf if rank else _StarHub, "direct": _Direct, "scatter": _Scatter}[way]
    return cls(rank, channels, payload, n)
