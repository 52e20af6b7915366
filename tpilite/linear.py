"""y = x W^T + b for a stored matrix of any dtype: the one place where stored weights become numbers.

A stored dtype stays stored until it is inside the cache. Arrays of bfloat16, which NumPy does not know,
are uint16 holding its bits; float16 and float32 are themselves. Everything that leaves here is float32.

A `Matrix` comes in parts, each some whole rows, which is to say one contiguous range of a file. A part is
there between entering and leaving it: for weights in memory that is nothing; for paged ones it is the
wait for the disk and the release of the memory. Parts are entered in their order, each once per use.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Stored = NDArray[Any]  # bfloat16 as uint16, float16, float32


class Part(Protocol):
    """Some whole rows of a stored matrix."""

    @property
    def n_rows(self) -> int: ...

    def open(self) -> AbstractContextManager[Stored]:
        """The rows [n_rows, n_cols], in memory until the context ends."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A part that is always there: an array, or a file's memory map that the kernel pages."""

    array: Stored

    @property
    def n_rows(self) -> int:
        return int(self.array.shape[0])

    def open(self) -> AbstractContextManager[Stored]:
        return nullcontext(self.array)


@dataclass(frozen=True)
class Matrix:
    """A stored matrix [n_rows, n_cols], in parts, with the bias [n_rows] that belongs to it."""

    n_rows: int
    n_cols: int
    parts: tuple[Part, ...]
    bias: Array | None = None

    @classmethod
    def of(cls, array: Stored, bias: Array | None = None) -> "Matrix":
        return cls(array.shape[0], array.shape[1], (InMemory(array),), bias)


def as_float32(stored: Stored) -> Array:
    """The values of stored weights, exactly, in a new array."""
    if stored.dtype == np.uint16:
        wide = stored.astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return stored.astype(np.float32)
