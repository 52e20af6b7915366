"""What a thread multiplies at a time: some rows of a matrix, widened to float32 in memory of its own."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tpilite.arrays import Array
from tpilite.linear.calls import multiply_in_calls
from tpilite.linear.matrix import Blocks, Part, Stored, Weights, float16_bits
from tpilite.linear.packing import Packed

_SIXTEEN = np.uint32(16)


class Input:
    """The rows x of one call, as the products take them."""

    def __init__(self, x: Array) -> None:
        self.rows = np.ascontiguousarray(x)  # [T, D]
        self._scaled: dict[int, tuple[Array, int]] = {}  # by gap

    def scaled(self, gap: int) -> tuple[Array, int]:
        """Columns [D, T] of x for weights that are too small by 2**gap, and how much the sums still lack.

        The columns are x * 2**gap. Where that would overflow, they are x * 2**n for the largest n that fits,
        and the second value is gap - n: the sums must be multiplied by two to that power. To multiply the
        sums by all of 2**gap would be simpler, but products of small numbers would have lost bits before.
        """
        if gap not in self._scaled:
            out, missing = np.empty(self.rows.shape[::-1], np.float32), 0
            if gap == 0:
                _copy_transposed(self.rows, out)
            else:
                columns, _ = self.scaled(0)
                _, exponent = math.frexp(max(columns.max(), -columns.min()))
                missing = max(0, gap - (126 - exponent))
                np.multiply(columns, np.float32(2.0 ** (gap - missing)), out=out)
            self._scaled[gap] = out, missing
        return self._scaled[gap]


class Scratch:
    """One thread's memory, as much as the largest chunk so far took."""

    def __init__(self) -> None:
        self._wide = np.empty(0, np.uint8)
        self._sums = np.empty(0, np.float32)

    def reserve(self, n_weights: int, n_sums: int, packed: bool) -> None:
        n_bytes = (8 if packed else 4) * n_weights + 4  # the last few for `wide` with an offset
        if self._wide.size < n_bytes:
            memory = np.empty(n_bytes + 63, np.uint8)
            self._wide = memory[-memory.ctypes.data % 64 :][:n_bytes]
        if self._sums.size < n_sums:
            self._sums = np.empty(n_sums, np.float32)

    def wide(self, n_weights: int, offset: int = 0) -> NDArray[np.uint32]:
        """So many numbers of four bytes, `offset` bytes behind the beginning, which is a cache line's."""
        return self._wide[offset : offset + 4 * n_weights].view(np.uint32)

    def unpacked(self, n_rows: int, n_cols: int) -> tuple[Stored, Stored]:
        """Memory for bfloat16 [n_rows, n_cols], and for three quarters of it: behind what `wide` gives."""
        n = n_rows * n_cols
        memory = self._wide[4 * n + 4 :].view(np.uint16)
        return memory[:n].reshape(n_rows, n_cols), memory[n : n + 3 * n // 4]

    def sums(self, n_rows: int, n_cols: int) -> Array:
        return self._sums[: n_rows * n_cols].reshape(n_rows, n_cols)


class Piece(NamedTuple):
    """A part that is in memory, and where its products go."""

    part: Part
    rows: Weights
    out: Array  # [T, n_rows]


class Chunk(NamedTuple):
    """What one thread multiplies at a time: some rows of a part, with x in columns."""

    rows: Weights
    start: int
    stop: int
    kernel: str
    columns: Array  # [D, T]
    missing_bits: int  # the sums' exponents are too small by so many
    rows_per_call: int
    out: Array  # [T, stop - start]


def multiply(chunk: Chunk, scratch: Scratch) -> None:
    """out = x rows^T: [n, D] -> [T, n]."""
    n, columns, out = chunk.stop - chunk.start, chunk.columns, chunk.out
    n_cols, n_x = columns.shape
    if isinstance(chunk.rows, Packed):
        bits, spare = scratch.unpacked(n, n_cols)
        chunk.rows.unpack(chunk.start, chunk.stop, bits, spare)
        weights = _widen(bits, chunk.kernel, scratch)
        places, values = chunk.rows.exceptions(chunk.start, chunk.stop)
        if len(places):
            weights.reshape(-1)[places] = values
    elif isinstance(chunk.rows, Blocks):
        rows = chunk.rows[chunk.start : chunk.stop]
        weights = scratch.wide(n * n_cols).view(np.float32).reshape(n, n_cols)
        rows.type.widen(rows.as_blocks(), weights.reshape(-1, rows.type.n_weights))
    else:
        weights = chunk.rows[chunk.start : chunk.stop]
        if weights.dtype != np.float32 or not weights.flags.aligned:
            weights = _widen(weights, chunk.kernel, scratch)
    if n_x == 1:
        multiply_in_calls(weights, columns, out.T, chunk.rows_per_call)
    else:
        sums = scratch.sums(n, n_x)
        multiply_in_calls(weights, columns, sums, chunk.rows_per_call)
        _copy_transposed(sums, out)
    if chunk.missing_bits:
        out *= np.float32(2.0**chunk.missing_bits)


def _copy_transposed(source: Array, target: Array) -> None:  # [n, m] -> [m, n]
    """In strips as wide as a cache line, which is three times as fast: each line is written once."""
    step = 16 if source.shape[1] > 16 else len(source)
    for start in range(0, len(source), max(1, step)):
        target[:, start : start + step] = source[start : start + step].T


def _widen(rows: Stored, kernel: str, scratch: Scratch) -> Array:  # [n, D] -> [n, D]
    """The values of the rows, exactly; the kernel `bits` leaves float16 too small, as `float16_bits` does."""
    wide = scratch.wide(rows.size)
    flat = rows.reshape(-1)
    if rows.dtype == np.uint16 and kernel == "bits":
        # Each value is written as an integer of four bytes two bytes further on: there it is the upper half
        # of its float32, and its zeros are the lower half of the next. NumPy casts to odd addresses as fast.
        wide[0] = 0
        np.copyto(scratch.wide(rows.size, offset=2), flat)
    elif rows.dtype == np.uint16:
        np.copyto(wide, flat)
        np.left_shift(wide, _SIXTEEN, out=wide)
    elif rows.dtype == np.float16 and kernel == "bits":
        float16_bits(flat, wide.view(np.float32))
    else:
        np.copyto(wide.view(np.float32), flat)
    return wide.view(np.float32).reshape(rows.shape)
