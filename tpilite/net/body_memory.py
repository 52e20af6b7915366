"""The memory that large bodies of requests share while they are read, decoded and made tokens."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from tpilite.net.http import HttpError

# Requests of people are below this, and so small that all connections may have one at once.
SMALL_BYTES = 64 << 10
# Decoding takes several times as much: two of the largest bodies at once.
_SHARED_BYTES = 8 << 20
# Decoding and encoding the largest takes a few seconds.
_WAIT_S = 20.0


class BodyMemory:
    """A number of bytes, for any thread to hold a part of, in the order in which they come for it."""

    def __init__(self) -> None:
        self._n_free = _SHARED_BYTES
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Holds `size` bytes for the context, once others leave so many. Raises `HttpError` 503."""
        if size <= SMALL_BYTES:
            yield
            return
        size, own = min(size, _SHARED_BYTES), object()
        with self._changed:
            self._line.append(own)
            try:
                is_there = self._changed.wait_for(
                    lambda: self._line[0] is own and self._n_free >= size, _WAIT_S
                )
            finally:
                self._line.remove(own)
                self._changed.notify_all()
            if not is_there:
                raise HttpError(503, "too many large requests are being read; try again later")
            self._n_free -= size
        try:
            yield
        finally:
            with self._changed:
                self._n_free += size
                self._changed.notify_all()

    def is_wanted(self) -> bool:
        """Whether somebody waits for memory."""
        return bool(self._line)
