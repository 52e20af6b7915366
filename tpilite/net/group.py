"""`Collective` over channels: the operations of rank 0 and of the workers, and what ends them.

Every rank has a data connection to rank 0, and where they could be made also to every other rank (the
mesh). Only frames of the operations travel there, in the order in which all ranks call them, so that no
operation has to look what came. Beside it each worker has a control connection to rank 0, on which a
thread of each side tells the other that its process lives. A slow rank is waited for without end; a silent
one ends the group: its thread shuts the data connections down, and whoever waits on them gets `RankLost`.
"""

import bisect
import contextlib
import logging
import math
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.arrays import Array
from tpilite.closing import Closing
from tpilite.collective import Message
from tpilite.errors import ConfigError, PeerLost, ProtocolError, TpiliteError
from tpilite.net import messages, wire
from tpilite.net.channel import Channel
from tpilite.net.exchange import Exchange
from tpilite.net.sums import CODECS, WAYS, NewSum, Sum, new_sum

log = logging.getLogger(__name__)

_DTYPES = frozenset(["|b1", "|u1", "|i1", "<u2", "<i2", "<f2", "<u4", "<i4", "<f4", "<u8", "<i8", "<f8"])

# Heartbeats per timeout: three may get lost in a stall of the sender before it counts as silent.
_BEATS = 4
# Both connections of a dead process end in the same moment; the control connection knows the reason.
VERDICT_S = 1.0
# The sums of a decoding step have 8 to 32 KiB, a prompt's have megabytes, which the last two foretell. From
# 16 and 128 KiB alone, one of 32 KiB was foretold by up to a fifth too much, for some ways more than others.
_MEASURED_BYTES = (1 << 14, 1 << 15, 1 << 16)
_MEASURED_S = 0.15


class RankLost(PeerLost):
    """A rank is gone, and the group with it."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(reason)
        self.rank = rank


class GroupEnded(PeerLost):
    """The other side ended the session; nothing failed."""


class Control:
    """A connection kept alive by a thread of its own, which hands on whatever else comes on it.

    `on_message` and `on_end` are called from that thread; `on_end` once, and not after a last word of ours.
    """

    def __init__(
        self,
        channel: Channel,
        timeout_s: float,
        on_message: Callable[[messages.Header], None],
        on_end: Callable[[TpiliteError], None],
    ) -> None:
        self.channel = channel
        self.alive = True
        self._timeout_s = timeout_s
        self._on_message, self._on_end = on_message, on_end
        self._sending = threading.Lock()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name=f"control {channel.peer}", daemon=True)

    def start(self) -> None:
        """Begins to listen and to send heartbeats."""
        self._thread.start()

    def send(self, header: messages.Header) -> None:
        # Even a frozen peer's kernel takes these few bytes; the deadline is for one that took many.
        with self._sending:
            self.channel.send(header, deadline_s=time.monotonic() + VERDICT_S)

    def say(self, last_word: messages.Header | None) -> None:
        """Sends what ends the connection, if the peer still takes it; its end is then no failure."""
        if not self._ending:
            self._ending = True
            if last_word is not None:
                with contextlib.suppress(PeerLost):
                    self.send(last_word)

    def shutdown(self) -> None:
        """Ends the connection without waiting, from any thread."""
        self._ending = True
        self.channel.shutdown("this node ended the connection")

    def close(self, deadline_s: float) -> None:
        """Gives the peer until the deadline to end the connection first, then ends it and the thread."""
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        self.shutdown()
        self._thread.join()
        self.channel.close()

    def _run(self) -> None:
        interval_s = self._timeout_s / _BEATS
        heard_s = sent_s = time.monotonic()
        try:
            while True:
                now_s = time.monotonic()
                if self.channel.wait_readable(sent_s + interval_s - now_s):
                    header, _ = self.channel.receive(time.monotonic() + self._timeout_s)
                    heard_s = time.monotonic()
                    if not isinstance(header, messages.Heartbeat):
                        self._on_message(header)
                elif now_s - heard_s > self._timeout_s and not self.channel.wait_readable(0):
                    raise PeerLost(f"{self.channel.peer} was silent for {self._timeout_s:g} s")
                if time.monotonic() - sent_s >= interval_s:
                    self.send(messages.Heartbeat())
                    sent_s = time.monotonic()
        except (PeerLost, ProtocolError) as error:
            self.alive = False
            if not self._ending:
                self._ending = True
                self._on_end(error)


class Group(Closing):
    """What the groups of rank 0 and of the workers have in common. Made by `lobby` or `local_groups`.

    `channels[r]` is the data connection to rank r, None for the own rank and for those not connected.
    `new_sum` makes the sums: in NumPy, unless something faster is handed in.
    After the first failure every operation raises it again.
    """

    def __init__(
        self,
        rank: int,
        channels: Sequence[Channel | None],
        controls: Mapping[int, Control] | None = None,
        *,
        allreduce: str = "star",
        payload: str = "f32",
        new_sum: NewSum = new_sum,
    ) -> None:
        self.rank = rank
        self.world_size = len(channels)
        self.allreduce = allreduce
        self.payload = payload
        self._new_sum = new_sum
        self._channels = tuple(channels)
        self._controls = dict(controls or {})
        self._failure: TpiliteError | None = None
        self.failed_s = 0.0  # by time.monotonic
        self._settled = threading.Event()  # why it failed is known
        self._noticed = threading.Event()  # by the thread that calls the operations
        self._lock = threading.Lock()
        self._telling = threading.Lock()  # held until all ranks are told why the group failed
        # Seconds of a sum of each of _MEASURED_BYTES in each way, where they were measured.
        self._costs: dict[str, list[float]] = {}
        self._sum: Sum | None = None

    @property
    def has_mesh(self) -> bool:
        return all(c is not None for r, c in enumerate(self._channels) if r != self.rank)

    @property
    def controls(self) -> list[Control]:
        return list(self._controls.values())

    @property
    def failure(self) -> TpiliteError | None:
        return self._failure

    def all_reduce(self, x: Array) -> Array:
        """`x` itself, float32 and contiguous, now holding the sum over all ranks."""
        assert x.dtype == np.float32, "sums are made in float32"
        assert x.flags.c_contiguous, "the result comes in place"
        if x.size == 0:
            return x
        if self._sum is None or self._sum.n != x.size:
            self._sum = self._new_sum(self.way(x.size), self.rank, self._channels, self.payload, x.size)
        try:
            self._sum(x.reshape(-1))
        except (PeerLost, ProtocolError) as error:
            raise self._failed(error) from error
        return x

    def _measure(self) -> None:
        """Finds out what each way takes here, for sums of each size."""
        costs: dict[str, list[float]] = {way: [] for way in WAYS}
        for way in WAYS:
            for n_bytes in reversed(_MEASURED_BYTES):  # the largest opens TCP's windows for all
                self.allreduce, self._sum = way, None
                costs[way].insert(0, self._time_one(np.zeros(n_bytes // 4, np.float32)))
        # All ranks choose by what rank 0 found.
        self._costs = dict(self.broadcast(None if self.rank else Message(costs)).header)

    def settle(self, allreduce: str) -> None:
        """Decides how sums are made: the last step of forming, which every rank calls with the same."""
        if allreduce == "auto":
            self._measure()
        self.allreduce, self._sum = allreduce, None

    def way(self, n: int) -> str:
        """How `n` numbers are summed."""
        if self.allreduce != "auto":
            return self.allreduce
        return min(WAYS, key=lambda way: _foretell(self._costs[way], 4 * n))

    def broadcast(self, message: Message | None) -> Message:
        raise NotImplementedError

    def fail(self, error: TpiliteError) -> None:
        """Ends the group for all ranks, from any thread; the first error stays; all are told on return."""
        with self._telling:
            if self._set_failure(error):
                rank = error.rank if isinstance(error, RankLost) else None
                for control in self.controls:
                    control.say(messages.Error(str(error), rank))
                self._cut(str(error))

    def close(self) -> None:
        """Ends the session cleanly, where it has not ended yet; the other ranks get `GroupEnded`."""
        self._noticed.set()
        with self._telling:
            clean = self._set_failure(GroupEnded("this node ended the session"))
        if clean:
            for control in self.controls:
                control.say(messages.Goodbye())
            for channel in self._channels:
                if channel is not None:
                    channel.end_sends()  # behind what was sent, which is still to be received
        deadline_s = time.monotonic() + (VERDICT_S if clean else 0)
        for control in self.controls:
            control.close(deadline_s)
        for channel in self._channels:
            if channel is not None:
                channel.close()

    def _time_one(self, x: Array) -> float:
        """Seconds for one sum, the median of as many pairs as rank 0 finds right.

        Pairs, as a rank that begins late finds the others' parts there already, ends early and so waits for
        them in the next sum: one of the two takes up to twice the time, the other next to none.
        """

        def timed() -> float:
            started_s = time.perf_counter()
            self.all_reduce(x)
            self.all_reduce(x)
            return (time.perf_counter() - started_s) / 2

        timed()
        guess_s = timed()
        if self.rank:
            n_pairs = int(self.broadcast(None).header["n"])
        else:
            n_pairs = min(15, max(3, int(_MEASURED_S / guess_s / 2)))
            self.broadcast(Message({"n": n_pairs}))
        return statistics.median(timed() for _ in range(n_pairs))

    def _set_failure(self, error: TpiliteError) -> bool:
        """Whether this is the first one."""
        with self._lock:
            if self._failure is not None:
                return False
            self._failure = error
            self.failed_s = time.monotonic()
        self._settled.set()
        # At once, as its user may be about to ask for something; a worker is told as it joins again.
        if self.rank == 0 and not isinstance(error, GroupEnded):
            log.warning("%s", error)
        return True

    def _cut(self, reason: str) -> None:
        for control in self.controls:
            control.shutdown()
        for channel in self._channels:
            if channel is not None:
                channel.shutdown(reason)

    def _failed(self, error: PeerLost | ProtocolError) -> TpiliteError:
        """The failure of the group that a connection's failure is part of, by the best known reason."""
        if isinstance(error, PeerLost) and self._controls:
            self._settled.wait(VERDICT_S)
        self._noticed.set()
        self.fail(self._blame(error))
        assert self._failure is not None
        return self._failure

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """What all_reduce, which is called too often for this, writes out."""
        try:
            yield
        except (PeerLost, ProtocolError) as error:
            raise self._failed(error) from error

    def _blame(self, error: TpiliteError) -> TpiliteError:
        broken = [r for r, channel in enumerate(self._channels) if channel is not None and channel.broken]
        return RankLost(broken[0], str(error)) if broken and isinstance(error, PeerLost) else error

    def on_control_end(self, rank: int, error: TpiliteError) -> None:
        self.fail(RankLost(rank, str(error)))

    def channel(self, rank: int) -> Channel:
        channel = self._channels[rank]
        assert channel is not None
        return channel


class RankZero(Group):
    """The group as rank 0 sees it."""

    def broadcast(self, message: Message | None) -> Message:
        assert message is not None, "rank 0 gives the message"
        array, dtype, shape = _portable(message.array)
        head = wire.encode(
            messages.Broadcast(dict(message.header), dtype, shape), 0 if array is None else array.nbytes
        )
        with self._failing():
            self._to_all(head, array)
        return message

    def gather(self, message: Message) -> list[Message] | None:
        """Every rank's message in rank order. The arrays are valid until the next call."""
        gathered = [message]
        with self._failing():
            for rank in range(1, self.world_size):
                header, payload = self.channel(rank).expect(messages.Gather)
                gathered.append(_message(header, payload))
        return gathered

    def barrier(self) -> None:
        with self._failing():
            for rank in range(1, self.world_size):
                self.channel(rank).expect(messages.Barrier)
            self._to_all(wire.encode(messages.Barrier()), None)

    def on_control_message(self, rank: int, header: messages.Header) -> None:
        peer = self._controls[rank].channel.peer
        if isinstance(header, messages.Goodbye):
            self.fail(RankLost(rank, f"{peer} left the group"))
        elif isinstance(header, messages.Error):
            lost = header.rank if header.rank in range(1, self.world_size) else None
            self.fail(RankLost(rank if lost is None else lost, f"{peer} says: {header.reason:.500}"))
        else:
            self.fail(ProtocolError(f"expected no {type(header).__name__} from {peer} in a running group"))

    def _to_all(self, head: bytes, array: NDArray[Any] | None) -> None:
        frame = memoryview(head if array is None else b"".join((head, array.data)))
        Exchange([(self.channel(r), frame) for r in range(1, self.world_size)], [], head)()


class Worker(Group):
    """The group as a rank above 0 sees it."""

    def broadcast(self, message: Message | None) -> Message:
        """Rank 0's message. Its array is valid until the next call."""
        assert message is None, "rank 0 gives the message"
        with self._failing():
            return _message(*self.channel(0).expect(messages.Broadcast))

    def gather(self, message: Message) -> list[Message] | None:
        array, dtype, shape = _portable(message.array)
        with self._failing():
            self.channel(0).send(messages.Gather(dict(message.header), dtype, shape), array)
        return None

    def barrier(self) -> None:
        with self._failing():
            self.channel(0).send(messages.Barrier())
            self.channel(0).expect(messages.Barrier)

    def on_control_message(self, header: messages.Header) -> None:
        if isinstance(header, messages.Goodbye):
            # This may come before the last of the data, whose end it is.
            if self._set_failure(GroupEnded("rank 0 ended the session")):
                self._noticed.wait(VERDICT_S)
            self._cut("rank 0 ended the session")
        elif isinstance(header, messages.Error):
            reason = f"rank 0 says: {header.reason:.500}"
            self.fail(PeerLost(reason) if header.rank is None else RankLost(header.rank, reason))
        else:
            self.fail(ProtocolError(f"expected no {type(header).__name__} from rank 0 in a running group"))


def local_groups(
    world_size: int, *, allreduce: str = "star", payload: str = "f32", new_sum: NewSum = new_sum
) -> list[Group]:
    """The groups of all ranks over socket pairs within this process, one per thread that uses them."""
    channels: list[list[Channel | None]] = [[None] * world_size for _ in range(world_size)]
    for low in range(world_size):
        for high in range(low + 1, world_size):
            a, b = socket.socketpair()
            channels[low][high] = Channel(a, f"rank {high}")
            channels[high][low] = Channel(b, f"rank {low}")
    classes = [RankZero] + [Worker] * (world_size - 1)
    return [
        cls(rank, channels[rank], allreduce=allreduce, payload=payload, new_sum=new_sum)
        for rank, cls in enumerate(classes)
    ]


def _foretell(measured_s: Sequence[float], n_bytes: int) -> float:
    """Seconds of a sum: on the line through the two measured ones that it lies between or beyond."""
    i = bisect.bisect(_MEASURED_BYTES[1:-1], n_bytes)
    (x0, x1), (y0, y1) = _MEASURED_BYTES[i : i + 2], measured_s[i : i + 2]
    return y0 + max(0.0, y1 - y0) * (n_bytes - x0) / (x1 - x0)


def check_options(allreduce: str, payload: str) -> None:
    """Raises `ConfigError` for ways and payloads that do not exist."""
    if allreduce not in (*WAYS, "auto"):
        raise ConfigError(f"expected --allreduce to be {', '.join(WAYS)} or auto, found {allreduce!r}")
    if payload not in CODECS:
        raise ConfigError(f"expected the payload to be one of {', '.join(CODECS)}, found {payload!r}")


def _portable(array: NDArray[Any] | None) -> tuple[NDArray[Any] | None, str, list[int]]:
    """The array as it travels, its dtype and its shape."""
    if array is None:
        return None, "", []
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    assert array.dtype.str in _DTYPES
    return array, array.dtype.str, list(array.shape)


def _message(header: messages.Broadcast | messages.Gather, payload: memoryview) -> Message:
    if not header.dtype and not header.shape and not payload:
        return Message(header.header)
    valid = header.dtype in _DTYPES and len(header.shape) <= 8
    if not valid or not all(type(n) is int and n >= 0 for n in header.shape):
        raise ProtocolError(
            f"expected an array's dtype and shape, found {header.dtype!r:.20}, {header.shape!r:.60}"
        )
    dtype = np.dtype(header.dtype)
    n_bytes = math.prod(header.shape) * dtype.itemsize
    if n_bytes != len(payload):
        raise ProtocolError(
            f"expected {n_bytes} bytes for {header.dtype} of shape {header.shape}, found {len(payload)}"
        )
    return Message(header.header, np.frombuffer(payload, dtype).reshape(header.shape))
