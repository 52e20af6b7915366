"""`Collective` over channels: the operations of rank 0 and of the workers, and what ends them.

Every rank has a data connection to rank 0, and where they could be made also to every other rank (the
mesh). Only frames of the operations travel there, in the order in which all ranks call them, so that no
operation has to look what came. Beside it each worker has a control connection to rank 0, on which a
thread of each side tells the other that its process lives. A slow rank is waited for without end; a silent
one ends the group: its thread shuts the data connections down, and whoever waits on them gets `RankLost`.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.arrays import Array
from tpilite.closing import Closing
from tpilite.collective import Message
from tpilite.errors import ConfigError, PeerLost, ProtocolError, TpiliteError
from tpilite.net import messages, wire
from tpilite.net.channel import Channel
from tpilite.net.codecs import CODECS
from tpilite.net.control import GRACE_S, Control
from tpilite.net.exchange import Exchange
from tpilite.net.measure import Costs, cheapest, measure
from tpilite.net.sums import ALGORITHMS, STAR, NewSum, Sum, new_sum

log = logging.getLogger(__name__)

_DTYPES = frozenset(["|b1", "|u1", "|i1", "<u2", "<i2", "<f2", "<u4", "<i4", "<f4", "<u8", "<i8", "<f8"])


class RankLost(PeerLost):
    """A rank is gone, and the group with it."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(reason)
        self.rank = rank


class GroupEnded(PeerLost):
    """The other side ended the session; nothing failed."""


class Group(Closing):
    """What `RootGroup` and `MemberGroup` have in common, made when a group forms.

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
        payload: str = "f32",
        protect: bool = False,
        new_sum: NewSum = new_sum,
    ) -> None:
        self.rank = rank
        self.world_size = len(channels)
        self.allreduce = STAR  # until `settle`
        self.payload = payload
        self.protect = protect
        self._new_sum = new_sum
        self._channels = tuple(channels)
        for channel in self._channels:
            if channel is not None:
                channel.limit_frames(wire.MAX_HEADER_BYTES, wire.MAX_PAYLOAD_BYTES)
        self._controls = dict(controls or {})
        self._failure: TpiliteError | None = None
        self.failed_s = 0.0  # by time.monotonic
        self._settled = threading.Event()  # why it failed is known
        self._noticed = threading.Event()  # by the thread that calls the operations
        self._lock = threading.Lock()
        self._notifying = threading.Lock()  # held until all ranks know why the group failed
        self._costs: Costs = {}  # where they were measured
        self._sum: Sum | None = None

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
            self._sum = self._new_sum(
                self.algorithm(x.size), self.rank, self._channels, self.payload, x.size, self.protect
            )
        try:
            self._sum(x.reshape(-1))
        except (PeerLost, ProtocolError) as error:
            raise self._failed(error) from error
        return x

    def settle(self, allreduce: str) -> None:
        """Decides how sums are made: the last step of forming, which every rank calls with the same."""
        if allreduce == "auto":
            self._costs = measure(self, self._use)
        self._use(allreduce)

    def algorithm(self, n: int) -> str:
        """How `n` numbers are summed."""
        return self.allreduce if self.allreduce != "auto" else cheapest(self._costs, 4 * n)

    def _use(self, allreduce: str) -> None:
        self.allreduce, self._sum = allreduce, None

    def broadcast(self, message: Message | None) -> Message:
        raise NotImplementedError

    def gather(self, message: Message) -> list[Message] | None:
        raise NotImplementedError

    def barrier(self) -> None:
        raise NotImplementedError

    def fail(self, error: TpiliteError) -> None:
        """Ends the group for all ranks, from any thread; the first error stays; all are told on return."""
        with self._notifying:
            if self._set_failure(error):
                rank = error.rank if isinstance(error, RankLost) else None
                for control in self.controls:
                    control.send_last(messages.Error(str(error), rank))
                self._cut(str(error))

    def close(self) -> None:
        """Ends the session cleanly, where it has not ended yet; the other ranks get `GroupEnded`."""
        self._noticed.set()
        with self._notifying:
            clean = self._set_failure(GroupEnded("this node ended the session"))
        if clean:
            for control in self.controls:
                control.send_last(messages.Goodbye())
            for channel in self._channels:
                if channel is not None:
                    channel.end_sends()  # behind what was sent, which is still to be received
        deadline_s = time.monotonic() + (GRACE_S if clean else 0)
        for control in self.controls:
            control.close(deadline_s)
        for channel in self._channels:
            if channel is not None:
                channel.close()

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
            self._settled.wait(GRACE_S)
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


class RootGroup(Group):
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
        Exchange([(self.channel(r), frame) for r in range(1, self.world_size)], [], head, protect=True)()


class MemberGroup(Group):
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
                self._noticed.wait(GRACE_S)
            self._cut("rank 0 ended the session")
        elif isinstance(header, messages.Error):
            reason = f"rank 0 says: {header.reason:.500}"
            self.fail(PeerLost(reason) if header.rank is None else RankLost(header.rank, reason))
        else:
            self.fail(ProtocolError(f"expected no {type(header).__name__} from rank 0 in a running group"))


def check_options(allreduce: str, payload: str) -> None:
    """Raises `ConfigError` for algorithms and payloads that do not exist."""
    if allreduce not in (*ALGORITHMS, "auto"):
        raise ConfigError(f"expected --allreduce to be {', '.join(ALGORITHMS)} or auto, found {allreduce!r}")
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
