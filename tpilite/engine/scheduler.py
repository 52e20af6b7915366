"""Which rows go into the next pass: first come, first served.

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
