"""Which sequences the ranks keep caches of: those being served, and the last one for a prompt like it."""

from tpilite.engine.sequence import Sequence


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
