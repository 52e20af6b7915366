"""The memory that large bodies of requests share while they are read, decoded and made tokens."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tpilite.net.http import HttpError

# Requests of people are below this, and so small that all connections may have one at once.
_SMALL_BYTES = 64 << 10
# Decoding takes several times as much: two of the largest bodies at once.
_SHARED_BYTES = 8 << 20
# Decoding and encoding the largest takes a few seconds; who sends it slowly makes others wait.
_WAIT_S = 20.0


class BodyMemory:
    """A number of bytes, for any thread to hold a part of."""

    def __init__(self) -> None:
        self._n_free = _SHARED_BYTES
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Holds `size` bytes for the context, once others leave so many. Raises `HttpError` 503."""
        size = 0 if size <= _SMALL_BYTES else min(size, _SHARED_BYTES)
        with self._changed:
            if not self._changed.wait_for(lambda: self._n_free >= size, _WAIT_S):
                raise HttpError(503, "too many large requests are being read; try again later")
            self._n_free -= size
        try:
            yield
        finally:
            with self._changed:
                self._n_free += size
                self._changed.notify_all()
