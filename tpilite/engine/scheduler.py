"""Which rows go into the next pass, first come, first served, and which caches the ranks keep for later ones.

A pass costs the same disk and network for one row as for many, so a prompt goes through in chunks of
rows. Requests are served one after another; the rows of a pass already name their sequences, so serving
several together changes this file alone.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tpilite.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """The next `n_rows` positions of one sequence, from `start` on."""

    sequence: Sequence
    start: int
    n_rows: int

    @property
    def reaches_end(self) -> bool:
        """Whether the last row is the newest token, whose scores give the next one."""
        return self.start + self.n_rows == self.sequence.n_tokens


class Scheduler:
    """The queue of requests and the one being served; `on_start` hears of each before its first rows."""

    def __init__(self, max_rows: int, on_start: Callable[[Sequence], None]) -> None:
        self.max_rows = max_rows
        self._on_start = on_start
        self._waiting: deque[Sequence] = deque()
        self._running: Sequence | None = None

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    @property
    def unfinished(self) -> list[Sequence]:
        """Everything that is being served or waits, in order."""
        return [*self.running, *self._waiting]

    @property
    def running(self) -> list[Sequence]:
        """What the passes are made for now."""
        return [self._running] if self._running else []

    def next(self) -> list[Chunk]:
        """The rows of the next pass; empty when there is nothing to do."""
        if self._running is None and self._waiting:
            self._running = self._waiting.popleft()
            self._on_start(self._running)
        sequence = self._running
        if sequence is None:
            return []
        n_rows = min(self.max_rows, sequence.n_tokens - sequence.n_cached)
        return [Chunk(sequence, sequence.n_cached, n_rows)]

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence that is finished or no longer wanted."""
        if self._running is sequence:
            self._running = None
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def restart(self) -> None:
        """All caches are gone: what was being served is computed again from its tokens."""
        if self._running is not None:
            self._running.n_cached = 0


class CachedPrefix:
    """The caches of the sequence served last, kept for a prompt that begins the same: a chat's next turn."""

    def __init__(self) -> None:
        self._sequence_id = 0
        self._ids: list[int] = []  # none, where nothing is kept
        self._free: list[int] = []

    def give_to(self, sequence: Sequence) -> None:
        """Starts a sequence on the kept caches where its prompt begins as they do; else they are freed."""
        # The last row is always computed: it gives scores.
        limit = min(len(self._ids), sequence.n_tokens - 1)
        ids = sequence.ids(0, limit)
        shared = next((i for i in range(limit) if self._ids[i] != ids[i]), limit)
        if shared:
            sequence.sequence_id, sequence.n_cached = self._sequence_id, shared
        elif self._ids:
            self._free.append(self._sequence_id)
        self._ids = []

    def keep(self, sequence: Sequence) -> None:
        """Keeps the caches of a sequence that has ended, in the place of those kept before."""
        if self._ids:
            self._free.append(self._sequence_id)
        self._sequence_id, self._ids = sequence.sequence_id, sequence.ids(0, sequence.n_cached)

    def free(self, sequence_id: int) -> None:
        """Lets the ranks forget a sequence with the next step."""
        self._free.append(sequence_id)

    def take_free(self) -> tuple[int, ...]:
        """The sequences for the next step to forget."""
        free, self._free = tuple(self._free), []
        return free

    def clear(self) -> None:
        """All caches are gone."""
        self._ids, self._free = [], []
