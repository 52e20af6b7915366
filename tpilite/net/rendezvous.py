"""How a group forms, as rank 0 sees it: workers join, prepare and are ready, then the group starts.

A worker joins with a rank or without, and is told its rank and what it needs to prepare: that may take
minutes, in which heartbeats keep its place. When all have said that they are ready, rank 0 starts the
group: every worker opens a data connection to rank 0 and, for the algorithms of summing that need them, to
the other workers. Where those cannot be made (a firewall, addresses of another network), the group is a star.

    with Rendezvous(("", port), security, world_size=3, terms=terms, ...) as rendezvous:
        with rendezvous.wait_for_group() as group: ...        # again after PeerLost: it waits for the next

`membership` is the same for a worker. `terms` are what must be equal on all nodes: which model, how it is
partitioned. A joining node may know only some of them; to be ready it must know them all.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

from tpilite.closing import Closing
from tpilite.errors import PeerLost, ProtocolError, TpiliteError
from tpilite.net import messages
from tpilite.net.address import Address
from tpilite.net.auth import Security
from tpilite.net.channel import Channel
from tpilite.net.control import GRACE_S, Control
from tpilite.net.group import RankLost, RootGroup, check_options
from tpilite.net.handshake import HANDSHAKE_S
from tpilite.net.listener import Listener
from tpilite.net.members import Member, Members
from tpilite.net.sums import STAR, NewSum, new_sum

log = logging.getLogger(__name__)


class Rendezvous(Closing):
    """Where workers join and wait until the group is complete; it goes on listening while a group runs.

    `info` is given to every worker that joins. `timeout_s` is how long a rank may be silent. `advice` says
    for a term what its user should change when it differs. `with` opens it and closes it.
    """

    def __init__(
        self,
        address: Address,
        security: Security,
        *,
        world_size: int,
        terms: Mapping[str, Any],
        timeout_s: float,
        allreduce: str,
        payload: str,
        protect: bool = False,
        info: Mapping[str, Any] | None = None,
        advice: Mapping[str, str] | None = None,
        new_sum: NewSum = new_sum,
    ) -> None:
        check_options(allreduce, payload)
        self.world_size = world_size
        self._info = dict(info or {})
        self._timeout_s, self._allreduce, self._payload = timeout_s, allreduce, payload
        self._protect = protect
        self._new_sum = new_sum
        self._members = Members(world_size, terms, advice or {})
        self._group: RootGroup | None = None  # the last one; set while `_members.changed` is held
        self._listener = Listener(address, security, self._receive)

    def __enter__(self) -> "Rendezvous":
        self.open()
        return self

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def states(self) -> dict[int, str]:
        """Of every rank above 0: "missing", "preparing" or "ready"."""
        return self._members.states

    def open(self) -> None:
        """Listens: workers can join from now on. Raises `ConfigError` where the address cannot be had."""
        self._listener.open()

    def wait_for_group(self, timeout_s: float | None = None) -> RootGroup:
        """The group of all ranks, once all are ready.

        Raises `PeerLost` after `timeout_s`, naming who is missing. The last group must have failed or ended.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        if self._group is not None:
            self._group.close()
        while True:
            self._wait_until_ready(deadline_s)
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
        self._listener.close()
        if self._group is not None:
            self._group.close()
        _close([*self._members.take_all(), *self._members.take_gone()], messages.Goodbye())

    def _wait_until_ready(self, deadline_s: float | None) -> None:
        while True:
            _close(self._members.take_gone())
            states = self.states
            if all(state == "ready" for state in states.values()):
                return
            remaining_s = None if deadline_s is None else deadline_s - time.monotonic()
            if remaining_s is not None and remaining_s <= 0:
                raise PeerLost(f"gave up waiting: {_describe(states)}; start what is missing with its rank")
            with self._members.changed:
                if self.states == states:
                    self._members.changed.wait(remaining_s)

    # Forming

    def _form(self) -> RootGroup:
        """The group of all members; if it fails, all of them have been told and are gone."""
        epoch, members = self._members.begin()
        group: RootGroup | None = None
        try:
            self._start(members, epoch)
            channels = [members[rank].data for rank in range(1, self.world_size)]
            controls = {
                rank: member.control for rank, member in members.items() if member.control is not None
            }
            group = RootGroup(
                0,
                [None, *channels],
                controls,
                payload=self._payload,
                protect=self._protect,
                new_sum=self._new_sum,
            )
            with self._members.changed:
                self._group = group
                self._members.forget(members)
                for rank, member in members.items():
                    if not member.alive:
                        raise RankLost(rank, f"rank {rank} left while the group formed")
            self._agree(group, members)
        except (PeerLost, ProtocolError) as error:
            if group is not None:
                group.fail(error)
                group.close()
            self._members.forget(members)
            _close(list(members.values()), messages.Error(str(error)))
            raise
        return group

    def _start(self, members: dict[int, Member], epoch: int) -> None:
        """Has every worker open its data connection."""
        peers: list[Any] = [[]]
        for rank in range(1, self.world_size):
            ready = members[rank].ready
            assert ready is not None
            peers.append([members[rank].host, ready.port])
        start = messages.Start(epoch, peers, self._allreduce, self._payload, self._protect)
        for member in members.values():
            assert member.control is not None
            member.control.send(start)
        with self._members.changed:
            self._members.changed.wait_for(
                lambda: all(m.data is not None or not m.alive for m in members.values()), self._timeout_s
            )
            for rank, member in members.items():
                if member.data is None:
                    raise RankLost(rank, f"rank {rank} did not open its data connection")

    def _agree(self, group: RootGroup, members: dict[int, Member]) -> None:
        """Finds out which connections stand, and how sums are made over them."""
        reasons = []
        for rank in members:
            formed, _ = group.channel(rank).expect(messages.Formed)  # ends by the heartbeats if never
            if not formed.mesh:
                reasons.append(f"rank {rank}: {formed.reason:.200}")
        mesh, reason = not reasons, "; ".join(reasons)
        for rank in members:
            group.channel(rank).send(messages.Formed(mesh, reason))
        if not mesh and self._allreduce != STAR:
            log.warning("all-reduce %s needs connections among workers: %s", self._allreduce, reason)
        group.settle(self._allreduce if mesh else STAR)

    # What peers say, each in its thread

    def _receive(self, channel: Channel, header: messages.Header) -> None:
        if isinstance(header, messages.Join):
            self._admit(channel, header)
        elif isinstance(header, messages.Attach):
            self._members.attach(header, channel)
        else:
            raise ProtocolError(f"expected Join or Attach, found {type(header).__name__}")

    def _admit(self, channel: Channel, join: messages.Join) -> None:
        with self._members.changed:
            member = self._members.check(join) or self._place(join, channel.peer_host)
        deadline_s = time.monotonic() + HANDSHAKE_S
        if isinstance(member, messages.Refused):
            level = logging.INFO if member.retry else logging.WARNING
            log.log(level, "refused %s: %s", channel.peer, member.reason)
            channel.send(member, deadline_s=deadline_s)
            channel.close()
            return
        log.info("%s joined as rank %d", channel.peer, member.rank)
        channel.peer = f"rank {member.rank} at {channel.peer}"
        welcome = messages.Welcome(member.rank, self.world_size, self._timeout_s, self._info)
        try:
            channel.send(welcome, deadline_s=deadline_s)
        except PeerLost:
            self._members.drop(member)
            raise
        with self._members.changed:
            member.control = Control(
                channel,
                self._timeout_s,
                lambda header: self._on_message(member, header),
                lambda error: self._on_end(member, error),
            )
            self._members.changed.notify_all()
        member.control.start()

    def _place(self, join: messages.Join, host: str) -> Member | messages.Refused:
        """The new member, or why there is no place for it now."""
        group, kept = self._group, None
        if group is not None:
            if group.failure is None:
                return messages.Refused(f"all {self.world_size} ranks are taken", retry=True)
            if isinstance(group.failure, RankLost) and time.monotonic() - group.failed_s < self._timeout_s:
                # The others come back in a moment, each with the slices of its rank.
                kept = group.failure.rank
        return self._members.admit(join, host, kept)

    def _on_message(self, member: Member, header: messages.Header) -> None:
        with self._members.changed:
            group = self._group_of(member)
            difference = ""
            if group is None and isinstance(header, messages.Ready) and member.ready is None:
                difference = self._members.make_ready(member, header)
                if not difference:
                    return
        if group is not None:
            group.on_control_message(member.rank, header)
            return
        assert member.control is not None
        if difference:
            log.warning("refused rank %d at %s: %s", member.rank, member.host, difference)
            member.control.send_last(messages.Refused(difference))
        elif isinstance(header, messages.Goodbye):
            log.info("rank %d at %s left", member.rank, member.host)
        elif isinstance(header, messages.Error):
            log.warning("rank %d at %s gave up: %.500s", member.rank, member.host, header.reason)
        else:
            raise ProtocolError(f"expected Ready from {member.host}, found {type(header).__name__}")
        member.control.shutdown()
        self._members.drop(member)

    def _on_end(self, member: Member, error: TpiliteError) -> None:
        with self._members.changed:
            group = self._group_of(member)
        if group is not None:
            group.on_control_end(member.rank, error)
        else:
            log.warning("%s", error)
            self._members.drop(member)

    def _group_of(self, member: Member) -> RootGroup | None:
        group = self._group
        return group if group is not None and member.control in group.controls else None


def _close(members: list[Member], last_message: messages.Header | None = None) -> None:
    """Ends these members' connections together, each after this last word."""
    for member in members:
        if last_message is not None:
            member.send_last(last_message)
    deadline_s = time.monotonic() + GRACE_S
    for member in members:
        member.close(deadline_s)


def _describe(states: Mapping[int, str]) -> str:
    """ "rank 1 is preparing, rank 2 is missing" """
    return ", ".join(f"rank {rank} is {state}" for rank, state in states.items() if state != "ready")
