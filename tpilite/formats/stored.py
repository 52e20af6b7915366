"""An open file of tensors, whatever its format: mapped or read, never past its end."""

import mmap
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.closing import Closing
from tpilite.dtypes import BLOCK_SIZES, DTYPES, n_bytes_of
from tpilite.errors import CheckpointError

_BYTES = np.dtype(np.uint8)

_DAMAGED = "the file is damaged: download or copy it again"


class StoredFile(Closing):
    """An open file and its `tensors` by name. Raises `CheckpointError` when its header is not sound.

    Nothing but the header is read when it is opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; download or copy it into its folder") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            self.nbytes = os.fstat(self._fd).st_size
            self.tensors = self._read_tensors()
        except OSError as error:
            self.close()
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _read_tensors(self) -> "Mapping[str, StoredTensor]":
        """What the header says. Raises `CheckpointError` where it is not sound."""

    def close(self) -> None:
        """Closes the file. Arrays that were handed out stay valid: each holds the map."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._map = -1, None

    def fileno(self) -> int:
        """The descriptor, for advice to the kernel about the file's pages."""
        return self._fd

    def check(self) -> None:
        """Raises `CheckpointError` when the file is now smaller than it was when it was opened.

        Touching a mapped page behind the end of a file kills the process, so this comes first.
        """
        try:
            found = os.fstat(self._fd).st_size
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
        if found < self.nbytes:
            raise CheckpointError(
                f"{self.path} was truncated while it was in use: expected {self.nbytes} bytes, "
                f"found {found}; download or copy it again"
            )

    def map(self) -> mmap.mmap:
        """The whole file, mapped once, read only."""
        if self._map is None:
            try:
                self._map = mmap.mmap(self._fd, self.nbytes, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: the file is shorter by now
                raise CheckpointError(f"{self.path} cannot be mapped: {error}") from error
        return self._map

    def first_bytes(self, n_bytes: int) -> bytes:
        """As many of the file's first bytes as there are. Raises `CheckpointError` for a Git LFS pointer."""
        found = os.pread(self._fd, n_bytes, 0)
        if found.startswith(b"version "):
            raise CheckpointError(
                f"{self.path} is a Git LFS pointer and not the file itself; run `git lfs pull` in its folder"
            )
        return found

    def check_overlaps(self, tensors: "Iterable[StoredTensor]", end: int) -> None:
        """Raises `CheckpointError` where tensors overlap, or begin before the header's `end`."""
        before = ""
        for tensor in sorted(tensors, key=lambda t: (t.offset, t.end)):
            if tensor.offset < end:
                raise self.error(f"tensors {before!r:.80} and {tensor.name!r:.80} overlap")
            end, before = tensor.end, tensor.name

    def error(self, text: str) -> CheckpointError:
        """What to raise for a header that is not sound."""
        return CheckpointError(f"{self.path}: {text}; {_DAMAGED}")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor where it lies: a contiguous range of a file, row after row.

    `shape` counts weights, whatever the dtype; where that is a block type, each row is a whole number of
    blocks. A tensor can hold more columns than are wanted, since blocks are not cut: `columns` are those.
    """

    name: str
    dtype: str  # as `dtypes` has it: "BF16", "F16", "F32" or a block type; or one that is not supported
    shape: tuple[int, ...]
    file: StoredFile
    offset: int  # of the first byte, in the file
    nbytes: int
    columns: range | None = None  # None: all of them

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    @property
    def row_bytes(self) -> int:
        """What a row takes, or a number where there is one axis. Raises as `stored_dtype` does."""
        self.check_supported()
        return n_bytes_of(self.dtype, self.shape[1:])

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """NumPy's dtype of `array`. Raises `CheckpointError` for a dtype that is not supported."""
        self.check_supported()
        return DTYPES.get(self.dtype, _BYTES)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of `array`: of block types rows of bytes."""
        return (self.shape[0], self.row_bytes) if self.dtype in BLOCK_SIZES else self.shape

    def check_supported(self) -> None:
        """Raises `CheckpointError` for a dtype that is not supported; a vector must not be one of blocks."""
        if self.dtype not in DTYPES and (self.dtype not in BLOCK_SIZES or len(self.shape) != 2):
            known = [*DTYPES, *(BLOCK_SIZES if len(self.shape) == 2 else ())]
            raise CheckpointError(
                f"{self.file.path}: {self.name!r} is stored as {self.dtype}, which is not supported; "
                f"expected {', '.join(known[:-1])} or {known[-1]}: get the model in another version"
            )

    def array(self) -> NDArray[Any]:
        """The memory-mapped values, read only; bfloat16 as uint16, blocks as rows of their bytes.

        Nothing is read before it is touched.
        """
        dtype = self.stored_dtype
        if not self.nbytes:
            return np.zeros(self.stored_shape, dtype)
        flat = np.frombuffer(self.file.map(), dtype, self.nbytes // dtype.itemsize, self.offset)
        return flat.reshape(self.stored_shape)

    def rows(self, start: int, stop: int) -> "StoredTensor":
        """The rows from `start` up to `stop`, which lie together in the file as well."""
        assert 0 <= start <= stop <= self.shape[0], (start, stop, self.shape)
        offset, nbytes = self.offset + start * self.row_bytes, (stop - start) * self.row_bytes
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=offset, nbytes=nbytes)

    def bytes_at(self, start: int, n_bytes: int) -> bytearray:
        """A few of the stored bytes, from the file and not through the map."""
        assert 0 <= start <= start + n_bytes <= self.nbytes, (start, n_bytes, self.nbytes)
        found = bytearray(n_bytes)
        read_exactly(self.file, memoryview(found), self.offset + start)
        return found

    def read_into(self, buffer: "memoryview | bytearray | mmap.mmap | NDArray[Any]") -> None:
        """Fills `buffer`, of exactly `nbytes` contiguous bytes, from the file and not through the map."""
        view = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
        assert view.nbytes == self.nbytes, (view.nbytes, self.nbytes)
        if self.nbytes:  # a view without bytes cannot be cast
            read_exactly(self.file, view.cast("B"), self.offset)


def read_exactly(file: StoredFile, view: memoryview, offset: int) -> None:
    """Fills `view` from the file's bytes at `offset`. Raises `CheckpointError` when they end early."""
    done = 0
    while done < len(view):
        try:
            n_read = os.preadv(file.fileno(), [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{file.path} cannot be read: {error.strerror}") from error
        if n_read == 0:
            raise CheckpointError(
                f"{file.path} was truncated: expected {len(view)} bytes at {offset}, found {done}; "
                "download or copy it again"
            )
        done += n_read
