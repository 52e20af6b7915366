"""What ranks say to each other, whatever carries it: the `Collective` protocol and its in-process forms.

`Solo` is a cluster of one. `ThreadGroup` runs ranks as threads of one process, for tests and for reading:
it is the whole of tensor parallelism with no socket in sight. `net.group` is the same over a network.

Every rank calls the same operations in the same order. Sums are made in rank order, so that every rank
holds the same bits and every run gives the same ones.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tpilite.arrays import Array
from tpilite.errors import PeerLost


@dataclass(frozen=True)
class Message:
    """A header of plain values (what msgpack can carry) and at most one array behind it."""

    header: Mapping[str, Any] = field(default_factory=dict)
    array: NDArray[Any] | None = None


class Collective(Protocol):
    """The operations that tensor parallelism needs. Each raises `PeerLost` when a rank is gone."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_reduce(self, x: Array) -> Array:
        """`x` itself, float32 and contiguous, now holding the sum over all ranks."""
        ...

    def broadcast(self, message: Message | None) -> Message:
        """Rank 0's message, on every rank. Rank 0 gives it, the others give None.

        The array of a received message is valid until the next call.
        """
        ...

    def gather(self, message: Message) -> list[Message] | None:
        """On rank 0, every rank's message in rank order; None on the others."""
        ...

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        ...


class Solo:
    """A cluster of one rank: every operation gives back what it was given."""

    rank = 0
    world_size = 1

    def all_reduce(self, x: Array) -> Array:
        return x

    def broadcast(self, message: Message | None) -> Message:
        assert message is not None, "rank 0 gives the message"
        return message

    def gather(self, message: Message) -> list[Message] | None:
        return [message]

    def barrier(self) -> None:
        return None


class ThreadGroup:
    """`world_size` collectives for threads of one process: `ThreadGroup(3).ranks[i]` is rank i's.

    `abort()` makes every waiting rank raise `PeerLost`, as a lost connection would.
    """

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size)
        self._slots: list[Any] = [None] * world_size
        self.ranks: list[Collective] = [_ThreadRank(self, rank, world_size) for rank in range(world_size)]

    def abort(self) -> None:
        self._barrier.abort()

    def _exchange(self, rank: int, value: Any) -> list[Any]:
        """Copies of what every rank gave, in rank order: as on a wire, each may overwrite what it holds.

        The second wait keeps a fast rank from the next round, and from what others are still copying.
        """
        try:
            self._slots[rank] = value
            self._barrier.wait()
            values = deepcopy(self._slots)
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise PeerLost("another rank of this process ended") from None
        return values


@dataclass(frozen=True)
class _ThreadRank:
    group: ThreadGroup
    rank: int
    world_size: int

    def all_reduce(self, x: Array) -> Array:
        parts = self.group._exchange(self.rank, x)
        np.copyto(x, parts[0])
        for part in parts[1:]:
            x += part
        return x

    def broadcast(self, message: Message | None) -> Message:
        received: Message = self.group._exchange(self.rank, message)[0]
        return received

    def gather(self, message: Message) -> list[Message] | None:
        messages = self.group._exchange(self.rank, message)
        return messages if self.rank == 0 else None

    def barrier(self) -> None:
        self.group._exchange(self.rank, None)


class Timed:
    """A collective that counts its caller's seconds in it: `reduced_s` in sums, `waited_s` in all."""

    def __init__(self, inner: Collective) -> None:
        self.inner = inner
        self.reduced_s = self.waited_s = 0.0

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def world_size(self) -> int:
        return self.inner.world_size

    def all_reduce(self, x: Array) -> Array:
        before_s = self.waited_s
        with self._clock():
            self.inner.all_reduce(x)
        self.reduced_s += self.waited_s - before_s
        return x

    def broadcast(self, message: Message | None) -> Message:
        with self._clock():
            return self.inner.broadcast(message)

    def gather(self, message: Message) -> list[Message] | None:
        with self._clock():
            return self.inner.gather(message)

    def barrier(self) -> None:
        with self._clock():
            self.inner.barrier()

    @contextmanager
    def _clock(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited_s += time.perf_counter() - start
