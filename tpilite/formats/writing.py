"""A new file of tensors, written piece by piece and hashed on the way, whatever its format."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.dtypes import n_bytes_of


@dataclass(frozen=True)
class TensorSpec:
    """What the header says about a tensor that is to be written."""

    name: str
    dtype: str  # as `dtypes` has it
    shape: tuple[int, ...]  # in weights

    @property
    def nbytes(self) -> int:
        return n_bytes_of(self.dtype, self.shape)


class FileWriter:
    """Writes a new file of `expected` bytes in all, from its first to its last.

    `close` is only for a file that is complete; a failure is left to the caller, who removes the file. OS
    errors pass through as they are.
    """

    def __init__(self, path: Path, expected: int) -> None:
        self._hash = hashlib.sha256()
        self.nbytes = 0
        self._expected = expected
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, data: "bytes | NDArray[Any]") -> None:
        """Appends bytes, or a C-contiguous array's."""
        view = data.data if isinstance(data, np.ndarray) else memoryview(data)
        if not view.nbytes:
            return
        view = view.cast("B")
        self._hash.update(view)
        self.nbytes += len(view)
        done = 0
        while done < len(view):
            done += os.write(self._fd, view[done:])

    def close(self) -> str:
        """Flushes the complete file to the disk and gives its sha256."""
        assert self.nbytes == self._expected, (self.nbytes, self._expected)
        os.fsync(self._fd)
        self.abandon()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Closes the file as it is, for a caller that gives it up."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
