"""How a group forms: the lobby of rank 0, the seat of a worker, and the door that keeps strangers out.

A worker joins with a rank or without, and is told its rank and what it needs to prepare: that may take
minutes, in which heartbeats keep its place. When all have said that they are ready, rank 0 starts the
group: every worker opens a data connection to rank 0 and, for the ways of summing that need them, to the
other workers. Where those cannot be made (a firewall, addresses of another network), the group is a star.

    with Lobby(("", 29700), security, world_size=3, terms=terms, info=info) as lobby:
        with lobby.wait_for_group() as group: ...             # again after PeerLost: the same lobby waits

    with join(address, security, terms=known) as seat:        # after PeerLost: join again, for the same rank
        ...                                                   # prepare, with seat.rank and seat.info
        with seat.wait_for_group(terms) as group: ...

`terms` are what must be equal on all nodes (the fingerprint of the config, the partition, the dtype). A
joining node may know only some of them; to be ready it must know them all.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tpilite.closing import Closing
from tpilite.errors import PeerLost, ProtocolError, TpiliteError
from tpilite.net import messages
from tpilite.net.address import Address
from tpilite.net.auth import Security
from tpilite.net.channel import Channel
from tpilite.net.group import VERDICT_S, Control, RankLost, RankZero, check_options
from tpilite.net.listener import HANDSHAKE_S, Door
from tpilite.net.sums import NewSum, new_sum

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Member:
    """A worker in the lobby, from its Join to the end of its control connection."""

    rank: int
    host: str
    control: Control | None = None
    ready: messages.Ready | None = None
    data: Channel | None = None

    @property
    def alive(self) -> bool:
        return self.control is None or self.control.alive


class Lobby(Closing):
    """Rank 0's door, where workers wait until the group is complete; it stays open while a group runs.

    `info` is given to every worker that joins. `timeout_s` is how long a rank may be silent. `advice` says
    for a term what its user should change when it differs.
    """

    def __init__(
        self,
        address: Address,
        security: Security,
        *,
        world_size: int,
        terms: Mapping[str, Any],
        info: Mapping[str, Any] | None = None,
        advice: Mapping[str, str] | None = None,
        timeout_s: float = 10.0,
        allreduce: str = "auto",
        payload: str = "f32",
        new_sum: NewSum = new_sum,
    ) -> None:
        check_options(allreduce, payload)
        self.world_size = world_size
        self._terms, self._info = messages.plain(dict(terms)), dict(info or {})
        self._advice = dict(advice or {})
        self._timeout_s, self._allreduce, self._payload = timeout_s, allreduce, payload
        self._new_sum = new_sum
        self._changed = threading.Condition()
        self._members: dict[int, _Member] = {}
        self._gone: list[_Member] = []  # whose threads are still to be joined
        self._group: RankZero | None = None
        self._epoch = 0
        self._door = Door(address, security, self._receive_guest)
        self.port = self._door.port

    @property
    def states(self) -> dict[int, str]:
        """Of every rank above 0: "missing", "preparing" or "ready"."""
        with self._changed:
            return {
                rank: "missing" if member is None else "preparing" if member.ready is None else "ready"
                for rank in range(1, self.world_size)
                for member in [self._members.get(rank)]
            }

    def wait_for_group(
        self, timeout_s: float | None = None, on_change: Callable[[dict[int, str]], None] | None = None
    ) -> RankZero:
        """The group of all ranks, once all are ready. `on_change` is told the states whenever they change.

        Raises `PeerLost` after `timeout_s`, naming who is missing. The last group must have failed or ended.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        if self._group is not None:
            self._group.close()
        while True:
            self._wait_until_ready(deadline_s, on_change)
            try:
                group = self._form()
            except (PeerLost, ProtocolError) as error:
                log.warning("the group did not form (%s); waiting for the workers to join again", error)
            else:
                log.info(
                    "the group of %d ranks is complete; all-reduce: %s", self.world_size, group.allreduce
                )
                return group

    def close(self) -> None:
        """Ends the group, tells waiting workers goodbye and closes the port."""
        self._door.close()
        if self._group is not None:
            self._group.close()
        with self._changed:
            members, self._members = list(self._members.values()), {}
        for member in members:
            if member.control is not None:
                member.control.say(messages.Goodbye())
        self._close_members([*members, *self._gone])

    def _wait_until_ready(
        self, deadline_s: float | None, on_change: Callable[[dict[int, str]], None] | None
    ) -> None:
        told: dict[int, str] = {}
        while True:
            with self._changed:
                gone, self._gone = self._gone, []
                states = self.states
            self._close_members(gone)
            if states != told:
                if on_change is not None:
                    on_change(states)
                elif any(state != "ready" for state in states.values()):
                    log.info("waiting: %s", _describe(states))
            told = states
            if all(state == "ready" for state in states.values()):
                return
            remaining_s = None if deadline_s is None else deadline_s - time.monotonic()
            if remaining_s is not None and remaining_s <= 0:
                raise PeerLost(f"gave up waiting: {_describe(states)}; start what is missing with its rank")
            with self._changed:
                if self.states == states:
                    self._changed.wait(remaining_s)

    # Forming

    def _form(self) -> RankZero:
        """The group of all members; if it fails, all of them have been told and are gone."""
        with self._changed:
            members = dict(self._members)
            epoch = self._epoch = secrets.randbits(62)
        group: RankZero | None = None
        try:
            self._start(members, epoch)
            channels = [members[rank].data for rank in range(1, self.world_size)]
            controls = {
                rank: member.control for rank, member in members.items() if member.control is not None
            }
            group = RankZero(0, [None, *channels], controls, payload=self._payload, new_sum=self._new_sum)
            with self._changed:
                self._group = group
                self._forget(members)
                for rank, member in members.items():
                    if not member.alive:
                        raise RankLost(rank, f"rank {rank} left while the group formed")
            self._agree(group, members)
        except (PeerLost, ProtocolError) as error:
            if group is not None:
                group.fail(error)
                group.close()
            with self._changed:
                self._forget(members)
            for member in members.values():
                if member.control is not None:
                    member.control.say(messages.Error(str(error)))
            self._close_members(list(members.values()))
            raise
        return group

    def _forget(self, members: dict[int, _Member]) -> None:
        """Takes these out of the lobby, not those who joined in their place."""
        for rank, member in members.items():
            if self._members.get(rank) is member:
                del self._members[rank]

    def _start(self, members: dict[int, _Member], epoch: int) -> None:
        """Has every worker open its data connection."""
        peers: list[Any] = [[]]
        for rank in range(1, self.world_size):
            ready = members[rank].ready
            assert ready is not None
            peers.append([members[rank].host, ready.port])
        start = messages.Start(epoch, peers, self._allreduce, self._payload)
        for member in members.values():
            assert member.control is not None
            member.control.send(start)
        with self._changed:
            self._changed.wait_for(
                lambda: all(m.data is not None or not m.alive for m in members.values()), self._timeout_s
            )
            for rank, member in members.items():
                if member.data is None:
                    raise RankLost(rank, f"rank {rank} did not open its data connection")

    def _agree(self, group: RankZero, members: dict[int, _Member]) -> None:
        """Finds out which connections stand, and how sums are made over them."""
        reasons = []
        for rank in members:
            formed, _ = group.channel(rank).expect(messages.Formed)  # ends by the heartbeats if never
            if not formed.mesh:
                reasons.append(f"rank {rank}: {formed.reason:.200}")
        mesh = not reasons
        for rank in members:
            group.channel(rank).send(messages.Formed(mesh, "; ".join(reasons)))
        if not mesh and self._allreduce != "star":
            log.warning(
                "all-reduce %s needs connections among workers: %s", self._allreduce, "; ".join(reasons)
            )
        group.settle(self._allreduce if mesh else "star")

    # What guests say, each in its thread

    def _receive_guest(self, channel: Channel, header: messages.Header) -> None:
        if isinstance(header, messages.Join):
            self._admit(channel, header)
        elif isinstance(header, messages.Attach):
            self._attach(channel, header)
        else:
            raise ProtocolError(f"expected Join or Attach, found {type(header).__name__}")

    def _admit(self, channel: Channel, join: messages.Join) -> None:
        with self._changed:
            rank, refusal = self._place(join)
            member = _Member(rank, channel.peer_host)
            if refusal is None:
                self._members[rank] = member
        deadline_s = time.monotonic() + HANDSHAKE_S
        if refusal is not None:
            log.log(
                logging.INFO if refusal.retry else logging.WARNING,
                "refused %s: %s",
                channel.peer,
                refusal.reason,
            )
            channel.send(refusal, deadline_s=deadline_s)
            channel.close()
            return
        log.info("%s joined as rank %d", channel.peer, rank)
        channel.peer = f"rank {rank} at {channel.peer}"
        try:
            channel.send(
                messages.Welcome(rank, self.world_size, self._timeout_s, self._info), deadline_s=deadline_s
            )
        except PeerLost:
            self._drop(member)
            raise
        with self._changed:
            member.control = Control(
                channel,
                self._timeout_s,
                lambda header: self._on_message(member, header),
                lambda error: self._on_end(member, error),
            )
            self._changed.notify_all()
        member.control.start()

    def _place(self, join: messages.Join) -> tuple[int, messages.Refused | None]:
        """A rank for the joiner, or why there is none."""
        difference = _difference(self._terms, join.terms, self._advice, only_common=True)
        if difference:
            return 0, messages.Refused(difference)
        if join.rank is not None and not 0 < join.rank < self.world_size:
            return 0, messages.Refused(
                f"expected a rank of 1 to {self.world_size - 1} in a cluster of {self.world_size}, "
                f"found {join.rank}; ask for one of these or for none"
            )
        group = self._group
        if group is not None and group.failure is None:
            return 0, messages.Refused(f"all {self.world_size} ranks are taken", retry=True)
        free = [r for r in range(1, self.world_size) if r not in self._members or not self._members[r].alive]
        if join.rank is None:
            lost = group.failure if group is not None else None
            recent = group is not None and time.monotonic() - group.failed_s < self._timeout_s
            if recent and isinstance(lost, RankLost):
                # The others come back in a moment, each with the slices of its rank.
                free = [rank for rank in free if rank == lost.rank]
            if not free:
                return 0, messages.Refused(f"no rank of {self.world_size} is free", retry=True)
            return free[0], None
        if join.rank not in free:
            host = self._members[join.rank].host
            return 0, messages.Refused(f"rank {join.rank} is taken by a node at {host}", retry=True)
        return join.rank, None

    def _attach(self, channel: Channel, attach: messages.Attach) -> None:
        with self._changed:
            member = self._members.get(attach.rank)
            if attach.epoch != self._epoch or member is None or member.data is not None:
                raise ProtocolError(f"rank {attach.rank} of a group that is not being formed")
            channel.peer = f"rank {attach.rank} at {channel.peer}"
            member.data = channel
            self._changed.notify_all()

    def _on_message(self, member: _Member, header: messages.Header) -> None:
        with self._changed:
            group = self._group_of(member)
            if group is None and isinstance(header, messages.Ready) and member.ready is None:
                difference = _difference(self._terms, header.terms, self._advice, only_common=False)
                if not difference:
                    member.ready = header
                    self._changed.notify_all()
                    return
        if group is not None:
            group.on_control_message(member.rank, header)
            return
        assert member.control is not None
        if isinstance(header, messages.Ready) and member.ready is None:
            log.warning("refused rank %d at %s: %s", member.rank, member.host, difference)
            member.control.say(messages.Refused(difference))
        elif isinstance(header, messages.Goodbye):
            log.info("rank %d at %s left", member.rank, member.host)
        elif isinstance(header, messages.Error):
            log.warning("rank %d at %s gave up: %.500s", member.rank, member.host, header.reason)
        else:
            raise ProtocolError(f"expected Ready from {member.host}, found {type(header).__name__}")
        member.control.shutdown()
        self._drop(member)

    def _on_end(self, member: _Member, error: TpiliteError) -> None:
        with self._changed:
            group = self._group_of(member)
        if group is not None:
            group.on_control_end(member.rank, error)
        else:
            log.warning("%s", error)
            self._drop(member)

    def _group_of(self, member: _Member) -> RankZero | None:
        group = self._group
        return group if group is not None and member.control in group.controls else None

    def _drop(self, member: _Member) -> None:
        with self._changed:
            if self._members.get(member.rank) is member:
                del self._members[member.rank]
                self._gone.append(member)
            self._changed.notify_all()

    def _close_members(self, members: list[_Member]) -> None:
        deadline_s = time.monotonic() + VERDICT_S
        for member in members:
            if member.control is not None:
                member.control.close(deadline_s)
            if member.data is not None:
                member.data.close()


def _difference(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], advice: Mapping[str, str], *, only_common: bool
) -> str:
    """What a joining node has other than rank 0, and what to do about it; empty if nothing."""
    keys = (
        [key for key in mine if key in theirs]
        if only_common
        else [*mine, *(k for k in theirs if k not in mine)]
    )
    nothing = object()
    parts = []
    for key in keys:
        a, b = mine.get(key, nothing), theirs.get(key, nothing)
        if a != b:
            texts = ["nothing" if value is nothing else f"{value!r:.100}" for value in (a, b)]
            what_to_do = advice.get(key, "start both with the same")
            parts.append(f"{key} is {texts[0]} on rank 0 and {texts[1]} on the joining node ({what_to_do})")
    return "; ".join(parts)


def _describe(states: Mapping[int, str]) -> str:
    """ "rank 1 is preparing, rank 2 is missing" """
    return ", ".join(f"rank {rank} is {state}" for rank, state in states.items() if state != "ready")
