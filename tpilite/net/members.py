"""The workers that have joined and wait for a group: who has which rank, who is ready, who is refused."""

import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpilite.errors import ProtocolError
from tpilite.net import messages
from tpilite.net.channel import Channel
from tpilite.net.control import Control


@dataclass(eq=False)
class Member:
    """A worker from its Join to the end of its control connection."""

    rank: int
    host: str
    control: Control | None = None
    ready: messages.Ready | None = None
    data: Channel | None = None

    @property
    def alive(self) -> bool:
        return self.control is None or self.control.alive

    def send_last(self, last_message: messages.Header) -> None:
        """Ends the control connection, where there is one, with this message."""
        if self.control is not None:
            self.control.send_last(last_message)

    def close(self, deadline_s: float) -> None:
        """Closes its connections, the control connection as `Control.close` does."""
        if self.control is not None:
            self.control.close(deadline_s)
        if self.data is not None:
            self.data.close()


class Members:
    """The members by rank. Any thread may ask; `changed` guards them and tells of every change."""

    def __init__(self, world_size: int, terms: Mapping[str, Any], advice: Mapping[str, str]) -> None:
        self.world_size = world_size
        self.changed = threading.Condition()
        self._terms, self._advice = messages.plain(dict(terms)), dict(advice)
        self._by_rank: dict[int, Member] = {}
        self._gone: list[Member] = []
        self._epoch = 0  # of the group that they form

    @property
    def states(self) -> dict[int, str]:
        """Of every rank above 0: "missing", "preparing" or "ready"."""
        with self.changed:
            return {
                rank: "missing" if member is None else "preparing" if member.ready is None else "ready"
                for rank in range(1, self.world_size)
                for member in [self._by_rank.get(rank)]
            }

    def check(self, join: messages.Join) -> messages.Refused | None:
        """Why this node can never be a member, if it cannot."""
        difference = self._difference(join.terms, only_common=True)
        if not difference and join.rank is not None and not 0 < join.rank < self.world_size:
            difference = (
                f"expected a rank of 1 to {self.world_size - 1} in a cluster of {self.world_size}, "
                f"found {join.rank}; ask for one of these or for none"
            )
        return messages.Refused(difference) if difference else None

    def admit(self, join: messages.Join, host: str, kept: int | None) -> Member | messages.Refused:
        """The new member, or why there is no place. Without a wish it gets the `kept` rank, if any."""
        with self.changed:
            taken = {rank: member for rank, member in self._by_rank.items() if member.alive}
            if join.rank in taken:
                return messages.Refused(
                    f"rank {join.rank} is taken by a node at {taken[join.rank].host}", retry=True
                )
            wanted = join.rank if join.rank is not None else kept
            ranks = range(1, self.world_size) if wanted is None else [wanted]
            free = [rank for rank in ranks if rank not in taken]
            if not free:
                return messages.Refused(f"no rank of {self.world_size} is free", retry=True)
            member = self._by_rank[free[0]] = Member(free[0], host)
            return member

    def make_ready(self, member: Member, ready: messages.Ready) -> str:
        """Notes that the member can compute; if not under rank 0's terms, what differs."""
        difference = self._difference(ready.terms, only_common=False)
        if not difference:
            with self.changed:
                member.ready = ready
                self.changed.notify_all()
        return difference

    def begin(self) -> tuple[int, dict[int, Member]]:
        """A new epoch, and who is to open data connections in it."""
        with self.changed:
            self._epoch = secrets.randbits(62)
            return self._epoch, dict(self._by_rank)

    def attach(self, attach: messages.Attach, channel: Channel) -> None:
        """Gives a member its data connection. Raises `ProtocolError` if nobody waits for it."""
        with self.changed:
            member = self._by_rank.get(attach.rank)
            if attach.epoch != self._epoch or member is None or member.data is not None:
                raise ProtocolError(f"rank {attach.rank} of a group that is not being formed")
            channel.peer = f"rank {attach.rank} at {channel.peer}"
            member.data = channel
            self.changed.notify_all()

    def forget(self, members: Mapping[int, Member]) -> None:
        """Takes these out, not those who joined in their place."""
        with self.changed:
            for rank, member in members.items():
                if self._by_rank.get(rank) is member:
                    del self._by_rank[rank]

    def drop(self, member: Member) -> None:
        """Takes out a member whose control connection ends; its thread, which may call this, ends later."""
        with self.changed:
            if self._by_rank.get(member.rank) is member:
                del self._by_rank[member.rank]
                self._gone.append(member)
            self.changed.notify_all()

    def take_gone(self) -> list[Member]:
        """Who was dropped since the last call, to be closed."""
        with self.changed:
            gone, self._gone = self._gone, []
            return gone

    def take_all(self) -> list[Member]:
        """All members, which are none any more."""
        with self.changed:
            members, self._by_rank = list(self._by_rank.values()), {}
            return members

    def _difference(self, theirs: Mapping[str, Any], *, only_common: bool) -> str:
        """What a joining node has other than rank 0, and what to do about it; empty if nothing."""
        names = [name for name in self._terms if name in theirs or not only_common]
        if not only_common:
            names += [name for name in theirs if name not in self._terms]
        parts = []
        for name in names:
            texts = [
                f"{terms[name]!r:.100}" if name in terms else "nothing" for terms in (self._terms, theirs)
            ]
            if name not in self._terms or name not in theirs or self._terms[name] != theirs[name]:
                what_to_do = self._advice.get(name, "start both with the same")
                parts.append(
                    f"{name} is {texts[0]} on rank 0 and {texts[1]} on the joining node ({what_to_do})"
                )
        return "; ".join(parts)
