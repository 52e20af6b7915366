"""Ranges of a file read past the page cache, into memory that the kernel does not have to copy to.

A file that is larger than memory and read in a circle never finds its pages in the cache, but pushes out
those of everybody else. So it is read by the first of these methods that the file and the system offer:

    direct   O_DIRECT: the disk writes into the buffer itself. Whole blocks are read, so the range that was
             asked for lies somewhere inside the buffer
    nocache  F_NOCACHE (macOS): the same without its rules
    advise   through the cache, and posix_fadvise to drop the pages right after
    plain    through the cache
"""

import contextlib
import fcntl
import math
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.errors import CheckpointError
from tpilite.formats.stored import StoredFile

READ_METHODS = ("direct", "nocache", "advise", "plain")

# No disk has larger blocks; pages are larger on some machines, but direct I/O asks for blocks only.
BLOCK_BYTES = 4096

# Smaller arrays would waste more of their last page than the C library keeps of them.
_OWN_MEMORY_BYTES = 64 << 10

_F_NOCACHE: int | None = getattr(fcntl, "F_NOCACHE", None)


def buffer_bytes(n_bytes: int) -> int:
    """The size of a buffer that any range of `n_bytes` can be read into."""
    return -(-n_bytes // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES


def allocate(n_bytes: int) -> mmap.mmap:
    """Private memory at a page's start, in huge pages where there are any.

    They matter for direct I/O: a disk takes few segments per request, so scattered pages make small
    requests (0.5 MiB instead of 4, and half the rate, on one machine). `mmap`'s default is shared
    memory, which gets no huge pages.
    """
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array whose memory the kernel has back as soon as nobody uses it; small ones are the C library's."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes < _OWN_MEMORY_BYTES:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, allocate(n_bytes))


class UncachedFile:
    """A tensor file opened once more, for reading by one of `READ_METHODS`; None is the best there is."""

    def __init__(self, file: StoredFile, read_method: str | None = None) -> None:
        self._file = file
        for self.read_method in READ_METHODS if read_method is None else (read_method,):
            try:
                self._fd = _OPEN[self.read_method](file)
                return
            except (OSError, AttributeError):  # the file's system, or Python's, does not have it
                continue
        raise CheckpointError(f"{file.path} cannot be read by the method {read_method!r} on this system")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def read(self, buffer: memoryview, offset: int, n_bytes: int) -> int:
        """Where in `buffer` the file's bytes at `offset` now begin. Raises `CheckpointError`.

        The buffer must begin at a page's start and hold `buffer_bytes(n_bytes)`.
        """
        before = offset % BLOCK_BYTES if self.read_method == "direct" else 0
        needed, length = before + n_bytes, n_bytes
        if self.read_method == "direct":
            length = -(-needed // BLOCK_BYTES) * BLOCK_BYTES
        done = 0
        while done < needed:
            try:
                n_read = os.preadv(self._fd, [buffer[done:length]], offset - before + done)
            except OSError as error:
                raise CheckpointError(f"{self._file.path} cannot be read: {error.strerror}") from error
            done += n_read
            # Direct reads come in whole blocks but at the file's end.
            if n_read == 0 or (self.read_method == "direct" and n_read % BLOCK_BYTES and done < needed):
                raise CheckpointError(
                    f"{self._file.path} was truncated while it was in use: expected {n_bytes} bytes at "
                    f"{offset}, found {max(0, done - before)}; download or copy it again"
                )
        if self.read_method == "advise":
            os.posix_fadvise(self._fd, offset, n_bytes, os.POSIX_FADV_DONTNEED)
        return before


def _open_again(file: StoredFile, flags: int = 0) -> int:
    """A descriptor of its own for the same file. Raises OSError when its path leads elsewhere by now."""
    fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | flags)
    if os.path.samestat(os.fstat(fd), os.fstat(file.fileno())):
        return fd
    os.close(fd)
    raise FileNotFoundError(file.path)


def _open_direct(file: StoredFile) -> int:
    fd = _open_again(file, os.O_DIRECT)
    try:  # some file systems allow to open and refuse to read
        os.preadv(fd, [allocate(BLOCK_BYTES)], 0)
    except OSError:
        os.close(fd)
        raise
    return fd


def _open_nocache(file: StoredFile) -> int:
    if _F_NOCACHE is None:
        raise OSError("this system has no F_NOCACHE")
    fd = _open_again(file)
    fcntl.fcntl(fd, _F_NOCACHE, 1)
    return fd


def _open_advise(file: StoredFile) -> int:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_NORMAL)
    return os.dup(file.fileno())


_OPEN: dict[str, Callable[[StoredFile], int]] = {
    "direct": _open_direct,
    "nocache": _open_nocache,
    "advise": _open_advise,
    "plain": lambda file: os.dup(file.fileno()),
}
