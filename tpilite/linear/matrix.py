"""Stored matrices, and what their values are in float32.

A stored dtype stays stored until it is inside the cache. Arrays of bfloat16, which NumPy does not know, are
uint16 holding its bits, or packed; float16 and float32 are themselves; GGML's low-bit types are `Blocks`.

A `Matrix` comes in parts, each some whole rows: one contiguous range of a file. A paged part is in memory
between entering and leaving it: entering waits for the disk, leaving releases the memory. For weights that
stay in memory both do nothing. Parts are entered in their order, each once per use.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tpilite.arrays import Array
from tpilite.linear.block_types import BlockType, Bytes
from tpilite.linear.packing import Packed

Stored = NDArray[Any]  # bfloat16 as uint16, float16, float32

# The biases of float32's and float16's exponents differ by this much.
FLOAT16_EXPONENT_GAP = 112
FLOAT16_LIFT = np.float32(2.0**FLOAT16_EXPONENT_GAP)
_THIRTEEN = np.uint32(13)
_SIGN_AND_VALUE = np.uint32(0x8FFFFFFF)


@dataclass(frozen=True)
class Blocks:
    """Rows [n, n_cols] of a block type: each a whole number of blocks that lie one behind the other."""

    type: BlockType
    bytes: Bytes  # [n, row_bytes]
    n_cols: int

    def __post_init__(self) -> None:
        assert self.bytes.shape[1] * self.type.n_weights == self.n_cols * self.type.n_bytes

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.bytes), self.n_cols

    @property
    def nbytes(self) -> int:
        return self.bytes.nbytes

    def __getitem__(self, rows: slice | NDArray[np.integer[Any]]) -> "Blocks":
        return Blocks(self.type, self.bytes[rows], self.n_cols)

    def as_blocks(self) -> Bytes:
        """All blocks of the rows, [n blocks, n_bytes]."""
        return self.bytes.reshape(-1, self.type.n_bytes)


Weights = Stored | Packed | Blocks


class Part(Protocol):
    """Some whole rows of a stored matrix."""

    @property
    def n_rows(self) -> int: ...

    @property
    def array(self) -> Weights | None:
        """The rows, where they are in memory for the whole of this pass; None where `open` brings them."""
        ...

    def open(self) -> AbstractContextManager[Weights]:
        """The rows [n_rows, n_cols], in memory until the context ends."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A part that is always there: an array, or a file's memory map that the kernel pages."""

    array: Weights

    @property
    def n_rows(self) -> int:
        return int(self.array.shape[0])

    def open(self) -> AbstractContextManager[Weights]:
        return nullcontext(self.array)


@dataclass(frozen=True)
class Matrix:
    """A stored matrix [n_rows, n_cols], in parts, with the bias [n_rows] that belongs to it.

    A rank's share of the columns need not end where blocks end. Then whole blocks are stored, and only the
    `n_inputs` columns from `first_col` on are multiplied; the rest meet zeros.
    """

    n_rows: int
    n_cols: int
    parts: tuple[Part, ...]
    bias: Array | None = None
    first_col: int = 0
    n_inputs: int | None = None  # None: all columns from first_col on

    @classmethod
    def of(cls, array: Weights, bias: Array | None = None) -> "Matrix":
        return cls(array.shape[0], array.shape[1], (InMemory(array),), bias)


def as_float32(stored: Stored | Blocks) -> Array:
    """The values of stored weights, exactly, in a new array."""
    if isinstance(stored, Blocks):
        return stored.type.dequantize(stored.as_blocks()).reshape(stored.shape)
    if stored.dtype == np.uint16:
        wide = stored.astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return stored.astype(np.float32)


def float16_bits(stored: Stored, out: Array) -> Array:
    """Finite float16 values in `out`, of the same shape, exactly but for the factor 1 / `FLOAT16_LIFT`.

    Three integer operations, four times as fast as NumPy's cast where that has no hardware.
    """
    bits = out.view(np.uint32)
    # The sign is extended over the exponent's three upper bits, which float16 does not have.
    np.copyto(out.view(np.int32), stored.view(np.int16))
    np.left_shift(bits, _THIRTEEN, out=bits)
    np.bitwise_and(bits, _SIGN_AND_VALUE, out=bits)
    return out
