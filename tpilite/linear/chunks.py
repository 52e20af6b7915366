"""What a thread multiplies at a time: some rows of a matrix, widened to float32 in memory of its own."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tpilite.arrays import Array
from tpilite.linear.block_types import Spare
from tpilite.linear.calls import multiply_in_calls
from tpilite.linear.matrix import Blocks, Part, Stored, Weights, float16_bits
from tpilite.linear.packing import Packed

_SIXTEEN = np.uint32(16)

# Beside so many rows of x, sums of codes are scaled and not the codes themselves: a weight takes 0.1 ns
# instead of 0.2, or instead of 0.4 where there are offsets.
_FEW = 4

# Unused floats behind each row that was in blocks, so that a group's codes of all rows lie in different sets
# of the cache.
_GAP = 16


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

    def reserve(self, rows: Weights, n_rows: int, n_x: int) -> None:
        """Memory for the products of so many of the rows with so many of x."""
        n_weights, n_sums = n_rows * rows.shape[1], n_rows * n_x
        n_bytes = 4 * n_weights + 4  # the last few for `wide` with an offset
        if isinstance(rows, Packed):
            n_bytes += 4 * n_weights
        elif isinstance(rows, Blocks):
            n_bytes += 4 * n_rows * _GAP + Spare.BYTES_PER_WEIGHT * n_weights
            n_sums *= rows.shape[1] // rows.type.group
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

    def for_blocks(self, n_rows: int, n_cols: int) -> tuple[Array, Spare]:
        """Memory for float32 [n_rows, n_cols], and for what making them of blocks takes."""
        n = n_rows * (n_cols + _GAP)
        rows = self.wide(n).view(np.float32).reshape(n_rows, n_cols + _GAP)
        return rows[:, :n_cols], Spare(self._wide[4 * n :])

    def sums(self, n_rows: int, n_x: int, n_groups: int = 1) -> Array:
        return self._sums[: n_rows * n_groups * n_x].reshape(n_rows, n_groups, n_x)


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
    n, n_x = chunk.stop - chunk.start, chunk.columns.shape[1]
    if isinstance(chunk.rows, Blocks) and n_x <= _FEW:
        _multiply_codes(chunk.rows[chunk.start : chunk.stop], chunk, scratch)
        return
    weights = _widened(chunk, scratch)
    if n_x == 1:
        multiply_in_calls(weights, chunk.columns, chunk.out.T, chunk.rows_per_call)
    else:
        sums = scratch.sums(n, n_x)[:, 0]
        multiply_in_calls(weights, chunk.columns, sums, chunk.rows_per_call)
        _copy_transposed(sums, chunk.out)
    if chunk.missing_bits:
        np.multiply(chunk.out, np.float32(2.0**chunk.missing_bits), out=chunk.out)


def _widened(chunk: Chunk, scratch: Scratch) -> Array:  # [n, D]
    n, n_cols = chunk.stop - chunk.start, chunk.rows.shape[1]
    if isinstance(chunk.rows, Packed):
        bits, spare = scratch.unpacked(n, n_cols)
        chunk.rows.unpack(chunk.start, chunk.stop, bits, spare)
        weights = _widen(bits, chunk.kernel, scratch)
        places, values = chunk.rows.exceptions(chunk.start, chunk.stop)
        if len(places):
            weights.reshape(-1)[places] = values
        return weights
    rows = chunk.rows[chunk.start : chunk.stop]
    if isinstance(rows, Blocks):
        weights, memory = scratch.for_blocks(*rows.shape)
        rows.type.widen(rows.as_blocks(), weights, memory)
        return weights
    if rows.dtype != np.float32 or not rows.flags.aligned:
        return _widen(rows, chunk.kernel, scratch)
    return rows


def _multiply_codes(rows: Blocks, chunk: Chunk, scratch: Scratch) -> None:
    """The same product, group by group: scale * (codes x) - offset * (the sum of x)."""
    kind, (n, n_cols), n_x = rows.type, rows.shape, chunk.columns.shape[1]
    n_groups, blocks = n_cols // kind.group, rows.as_blocks()
    codes, spare = scratch.for_blocks(n, n_cols)
    kind.widen_codes(blocks, codes, spare)
    codes = codes.reshape(n, n_groups, kind.group).transpose(1, 0, 2)
    columns = chunk.columns.reshape(n_groups, kind.group, n_x)
    sums = scratch.sums(n, n_x, n_groups)
    multiply_in_calls(codes, columns, sums.transpose(1, 0, 2), chunk.rows_per_call)
    scale, offset = kind.scales(blocks)
    np.multiply(sums, scale.reshape(n, n_groups, 1), out=sums)
    np.add.reduce(sums, axis=1, out=chunk.out.T)
    if offset is not None:
        offset, of_x = offset.reshape(n, n_groups), columns.sum(axis=1)
        multiply_in_calls(offset, of_x, sums[:, 0], chunk.rows_per_call)
        np.subtract(chunk.out, sums[:, 0].T, out=chunk.out)


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
