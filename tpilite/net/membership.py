"""How a group forms, as a worker sees it: join, prepare, be ready. Its program runs a loop of these pieces:

while True:
    try:
        with join(address, security, terms=known, rank=rank) as membership:
            rank = membership.rank                          # the next time, for the same place
            ...                                             # prepare, by membership.rank and .info
            with membership.wait_for_group(terms) as group: ...
    except GroupEnded: ...                                  # a clean end: wait for the next, or leave
    except PeerLost: ...                                    # somebody was lost: join again
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tpilite.errors import ConfigError, PeerLost, ProtocolError, TpiliteError
from tpilite.net import messages
from tpilite.net.address import Address
from tpilite.net.auth import Security
from tpilite.net.channel import Channel
from tpilite.net.control import GRACE_S, Control
from tpilite.net.group import GroupEnded, MemberGroup, check_options
from tpilite.net.handshake import HANDSHAKE_S, connect, connect_until
from tpilite.net.listener import Listener
from tpilite.net.sums import STAR, NewSum, new_sum

log = logging.getLogger(__name__)

# Between two requests for a rank that is taken: soon enough after a loss, easy on rank 0 otherwise.
_RETRY_S = 1.0


def join(
    address: Address,
    security: Security,
    *,
    terms: Mapping[str, Any] | None = None,
    rank: int | None = None,
    timeout_s: float | None = None,
    patience_s: float | None = None,
) -> "Membership":
    """An open membership in the cluster of rank 0 at `address`; waits until that answers and has a place.

    Raises `PeerLost` after `timeout_s` (None: never), and where a rank 0 that answers has had no place for
    `patience_s`; `ConfigError` for what waiting does not change.
    """
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    patient_until_s = math.inf
    reported = ""
    while True:
        channel = connect_until(address, security.key, deadline_s=deadline_s, tls=security.client_tls)
        try:
            answer_s = time.monotonic() + HANDSHAKE_S
            channel.send(messages.Join(rank, dict(terms or {})), deadline_s=answer_s)
            reply, _ = channel.receive(answer_s)
            if isinstance(reply, messages.Welcome):
                membership = Membership(address, security, channel, reply)
                membership.open()
                return membership
            channel.close()
            if not isinstance(reply, messages.Refused):
                raise ProtocolError(f"expected Welcome or Refused, found {type(reply).__name__}")
            if not reply.retry:
                raise ConfigError(f"rank 0 at {channel.peer} refuses this node: {reply.reason}")
            reason = reply.reason
            if patience_s is not None:
                patient_until_s = min(patient_until_s, time.monotonic() + patience_s)
        except PeerLost as error:
            channel.close()
            reason = str(error)
        except BaseException:
            channel.close()
            raise
        retry_s = time.monotonic() + _RETRY_S
        if retry_s > patient_until_s or (deadline_s is not None and retry_s > deadline_s):
            raise PeerLost(f"rank 0 at {channel.peer} has no place for this node: {reason}")
        if reason != reported:
            log.info("waiting for a place at %s: %s", channel.peer, reason)
            reported = reason
        time.sleep(_RETRY_S)


class Membership:
    """A worker that rank 0 has given a rank, while it prepares. The group then takes over its connection."""

    def __init__(
        self, address: Address, security: Security, channel: Channel, welcome: messages.Welcome
    ) -> None:
        self.rank, self.world_size, self.info = welcome.rank, welcome.world_size, welcome.info
        if not (0 < self.rank < self.world_size <= 4096 and 0 < welcome.timeout_s <= 86400):
            raise ProtocolError(
                f"expected a rank, a world size and a timeout from rank 0, found {welcome!r:.200}"
            )
        self._address, self._security = address, security
        self._timeout_s = welcome.timeout_s
        self._changed = threading.Condition()
        self._failure: TpiliteError | None = None
        self._begin: messages.Start | None = None
        self._group: MemberGroup | None = None
        self._attached: dict[tuple[int, int], Channel] = {}
        self._listener: Listener | None = None
        channel.peer = f"rank 0 at {channel.peer}"
        self._control = Control(channel, self._timeout_s, self._on_message, self._fail)

    def open(self) -> None:
        """Begins to send heartbeats, and listens for other workers where they can prove themselves to it."""
        if self._security.client_tls is None or self._security.server_tls is not None:
            listener = Listener((self._control.channel.local_host, 0), self._security, self._receive)
            with contextlib.suppress(ConfigError):  # nobody can connect then: the group will be a star
                listener.open()
                self._listener = listener
        self._control.start()

    def __enter__(self) -> "Membership":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        # Its own failures: rank 0 knows all others.
        if self._group is None and isinstance(error, TpiliteError) and self._failure is None:
            self._control.send_last(messages.Error(str(error)))
        self.close()

    def check(self) -> None:
        """Raises what has ended the membership, if anything has: for use while preparing takes long."""
        if self._failure is not None:
            raise self._failure

    def wait_for_group(
        self, terms: Mapping[str, Any], timeout_s: float | None = None, *, new_sum: NewSum = new_sum
    ) -> MemberGroup:
        """Says that this node is ready under `terms`; the group, once all are.

        Raises `ConfigError` where the terms differ from those of rank 0, `GroupEnded` when rank 0 ends,
        and `PeerLost`.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self.check()
        try:
            self._control.send(messages.Ready(dict(terms), self._listener.port if self._listener else 0))
        except PeerLost:
            with self._changed:  # the control thread has read why, or is about to
                self._changed.wait_for(lambda: self._failure is not None, GRACE_S)
            self.check()
            raise
        with self._changed:
            self._changed.wait_for(
                lambda: self._begin is not None or self._failure is not None,
                None if deadline_s is None else max(0.0, deadline_s - time.monotonic()),
            )
            self.check()
            start = self._begin
        if start is None:
            raise PeerLost(f"the group did not start within {timeout_s:g} s: other ranks are missing")
        with self._closed_on_error() as channels:
            return self._form(start, channels, new_sum)

    def close(self) -> None:
        """Leaves, if no group has formed, and frees what is held."""
        if self._listener is not None:
            self._listener.close()
        if self._group is None:
            self._control.send_last(messages.Goodbye())
            self._control.close(time.monotonic() + GRACE_S)
        for channel in self._attached.values():
            channel.close()
        self._attached.clear()

    def _form(self, start: messages.Start, channels: list[Channel | None], new_sum: NewSum) -> MemberGroup:
        check_options(start.allreduce, start.payload)
        deadline_s = time.monotonic() + 2 * HANDSHAKE_S
        data = channels[0] = self._attach(self._address, start.epoch)
        data.peer = f"rank 0 at {data.peer}"
        reason = ""
        if start.allreduce != STAR:
            try:
                self._connect_workers(start, channels, deadline_s)
            except (PeerLost, ProtocolError, ConfigError) as error:
                reason = str(error)
        data.send(messages.Formed(not reason, reason), deadline_s=time.monotonic() + self._timeout_s)
        # Rank 0 hears from the other ranks first, which may begin later and take as long as this one may.
        formed, _ = data.expect(messages.Formed, deadline_s + self._timeout_s)
        if not formed.mesh:
            for rank in range(1, self.world_size):
                channel, channels[rank] = channels[rank], None
                if channel is not None:
                    channel.close()
        group = MemberGroup(
            self.rank,
            channels,
            {0: self._control},
            payload=start.payload,
            protect=start.protect,
            new_sum=new_sum,
        )
        with self._changed:
            self._group = group
        if self._failure is not None:
            group.fail(self._failure)
        group.settle(start.allreduce if formed.mesh else STAR)
        return group

    def _attach(self, address: Address, epoch: int) -> Channel:
        channel = connect(
            address,
            self._security.key,
            timeout_s=min(HANDSHAKE_S, self._timeout_s),
            tls=self._security.client_tls,
        )
        channel.send(messages.Attach(epoch, self.rank), deadline_s=time.monotonic() + self._timeout_s)
        return channel

    def _connect_workers(
        self, start: messages.Start, channels: list[Channel | None], deadline_s: float
    ) -> None:
        """Connects to the workers below this rank, and waits for those above."""
        addresses = [_peer_address(start, rank) for rank in range(1, self.world_size)]
        for rank, address in enumerate(addresses[: self.rank - 1], 1):
            channels[rank] = channel = self._attach(address, start.epoch)
            channel.peer = f"rank {rank} at {channel.peer}"
        above = [(start.epoch, rank) for rank in range(self.rank + 1, self.world_size)]
        with self._changed:
            self._changed.wait_for(
                lambda: all(key in self._attached for key in above) or self._failure is not None,
                max(0.0, deadline_s - time.monotonic()),
            )
            self.check()
            for key in above:
                channels[key[1]] = self._attached.pop(key, None)
        missing = [rank for _, rank in above if channels[rank] is None]
        if missing:
            raise PeerLost(f"rank {missing[0]} did not connect to rank {self.rank}")

    def _receive(self, channel: Channel, header: messages.Header) -> None:
        if not isinstance(header, messages.Attach) or not self.rank < header.rank < self.world_size:
            raise ProtocolError(f"expected Attach from a rank above {self.rank}, found {header!r:.100}")
        channel.peer = f"rank {header.rank} at {channel.peer}"
        with self._changed:
            # Of another epoch there can be one per rank, from a group that did not form.
            for key in [key for key in self._attached if key[1] == header.rank]:
                self._attached.pop(key).close()
            self._attached[header.epoch, header.rank] = channel
            self._changed.notify_all()

    def _on_message(self, header: messages.Header) -> None:
        with self._changed:
            group = self._group
            if group is None and isinstance(header, messages.Start) and self._begin is None:
                if len(header.peers) != self.world_size:
                    raise ProtocolError(f"expected {self.world_size} peers, found {len(header.peers)}")
                self._begin = header
                self._changed.notify_all()
                return
        if group is not None:
            group.on_control_message(header)
        elif isinstance(header, messages.Goodbye):
            self._fail(GroupEnded("rank 0 ended the session"))
        elif isinstance(header, messages.Refused):
            self._fail(ConfigError(f"rank 0 refuses this node: {header.reason}"))
        elif isinstance(header, messages.Error):
            self._fail(PeerLost(f"rank 0 says: {header.reason:.500}"))
        else:
            raise ProtocolError(f"expected Start from rank 0, found {type(header).__name__}")

    def _fail(self, error: TpiliteError) -> None:
        """The end of the control connection; a control thread's."""
        with self._changed:
            self._failure = self._failure or error
            group = self._group
            self._changed.notify_all()
        if group is not None:
            group.on_control_end(0, error)
        else:
            self._control.shutdown()

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[list[Channel | None]]:
        """The list of a group's channels, which are closed if no group comes of them."""
        channels: list[Channel | None] = [None] * self.world_size
        try:
            yield channels
        except BaseException as error:
            group, self._group = self._group, None
            if group is not None and isinstance(error, TpiliteError):
                group.fail(error)
            for channel in channels:
                if channel is not None:
                    channel.close()
            if isinstance(error, PeerLost) and self._failure is not None:
                raise self._failure from error
            raise


def _peer_address(start: messages.Start, rank: int) -> Address:
    peer = start.peers[rank]
    if not isinstance(peer, list) or [type(value) for value in peer] != [str, int]:
        raise ProtocolError(f"expected the host and port of rank {rank}, found {peer!r:.60}")
    host, port = peer
    if not 0 < port < 65536:
        raise PeerLost(f"rank {rank} takes no connections")
    return host, port
