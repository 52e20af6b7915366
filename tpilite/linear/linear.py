"""y = x W^T + b for a stored matrix of any dtype: the one place where stored weights become numbers.

A stored dtype stays stored until it is inside the cache. Arrays of bfloat16, which NumPy does not know,
are uint16 holding its bits, or packed; float16 and float32 are themselves. What leaves here is float32.

A `Matrix` comes in parts, each some whole rows, which is to say one contiguous range of a file. A part is
there between entering and leaving it: for weights in memory that is nothing; for paged ones it is the
wait for the disk and the release of the memory. Parts are entered in their order, each once per use.

`Linear` cuts the parts into blocks of rows. A thread takes a block, widens it to float32 in memory of its
own that stays in the cache, and multiplies; or `Products` that are handed in do all that. A sum's bits depend
neither on the threads nor on the blocks; nor on the parts, if each begins at a multiple of `block_rows`.
"""

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from tpilite.arrays import Array
from tpilite.closing import Closing
from tpilite.linear.packing import Packed
from tpilite.linear.plans import BLOCK_BYTES, FEW_ROWS_BLOCK_BYTES, WAYS, Notes, Plan
from tpilite.linear.products import Product, Products
from tpilite.linear.team import Team

logger = logging.getLogger(__name__)

Stored = NDArray[Any]  # bfloat16 as uint16, float16, float32
Weights = Stored | Packed

# Beside many rows, x is what is large: each product lays it out anew, which large blocks pay off.
_MANY_ROWS = 64
_BLOCK_BYTES_OF_MANY = 1 << 22

# Blocks per thread and call, at least: what one thread may wait for the other at the end of a call.
_BLOCKS_PER_THREAD = 4

# Products of up to so many multiplications take OpenBLAS's way for small matrices, which lays out nothing and
# is up to three times faster for few rows. A matrix goes all this way or all the other, since they differ
# in the last bits. Where there is no such way, the smaller products cost nothing.
_SMALL_PRODUCT = 1_000_000
_SMALL_ROWS = 16

# Whether many rows of x are left to NumPy even where products are handed in. macOS's BLAS multiplies on a
# unit of the processor that no loop of ours reaches. This is not measured at the start, as the ways of NumPy
# are: those give the same bits, these do not.
_BLAS_FOR_MANY = sys.platform == "darwin"

# The biases of float32's and float16's exponents differ by this much.
_FLOAT16_EXPONENT_GAP = 112
FLOAT16_LIFT = np.float32(2.0**_FLOAT16_EXPONENT_GAP)
_SIXTEEN, _THIRTEEN = np.uint32(16), np.uint32(13)
_SIGN_AND_VALUE = np.uint32(0x8FFFFFFF)

_BFLOAT16 = np.dtype(np.uint16)

# A call on fewer weights than this is over before it matters how it is done.
_MEASURED_FROM = 1 << 20
_MEASURED_COLS, _MEASURED_BYTES = 2048, 32 << 20
_MEASURE_S = 0.05  # per question, of which there are two per dtype


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


def block_rows(n_cols: int, n_bytes: int = BLOCK_BYTES) -> int:
    """How many rows make a block. The BLAS takes rows in groups of up to eight, which must not be cut."""
    return max(8, n_bytes // (4 * n_cols) // 8 * 8)


class Linear(Closing):
    """y = x W^T + b for each of the matrices, float32, by `n_threads` threads of which the caller is one.

    The threads live until `close`. One call at a time: the scratch memory belongs to the object. `products`
    for as many threads are made by other code, and closed with this. Without them NumPy makes them, in the
    `way` that is given, one of `WAYS`, or in the faster one for this machine: it is measured when a large
    matrix of a dtype first comes, in 0.1 to 0.3 s, and noted in `cache`, a file (default: in the user's cache
    directory).
    """

    def __init__(
        self,
        n_threads: int = 1,
        products: Products | None = None,
        *,
        way: str | None = None,
        cache: Path | None = None,
        blas_for_many: bool = _BLAS_FOR_MANY,
    ) -> None:
        assert way is None or way in WAYS
        self.n_threads = n_threads
        self.plans: dict[np.dtype[Any], Plan] = {}  # of NumPy's products, once decided
        self._way = way
        self._products = products
        self._blas_for_many = blas_for_many
        self._notes = Notes(cache, n_threads)
        self._team = Team(n_threads, products)
        self._scratch = [_Scratch() for _ in range(n_threads)]
        self._input = _Input()
        self._finite: WeakValueDictionary[int, Part] = WeakValueDictionary()

    def prepare(self, dtypes: Iterable[np.dtype[Any]]) -> None:
        """Measures now what large matrices of these dtypes would else have measured, and its memory."""
        if self._products is None or self._blas_for_many:
            for dtype in dtypes:
                self._plan(dtype, _MEASURED_FROM)

    def close(self) -> None:
        """Ends the threads."""
        self._team.close()
        if self._products is not None:
            self._products.close()
            self._products = None

    def __call__(self, x: Array, *matrices: Matrix) -> list[Array]:  # [T, D] -> [T, n_rows] each
        assert all(x.shape[1] == matrix.n_cols for matrix in matrices)
        results = [np.empty((x.shape[0], m.n_rows), np.float32) for m in matrices]
        if x.size:
            self._multiply(x, matrices, results)
        else:
            for y in results:
                y.fill(0)
        for y, matrix in zip(results, matrices, strict=True):
            if matrix.bias is not None:
                y += matrix.bias
        return results

    def share(self, n: int, work: Callable[[int, int], None]) -> None:
        """Calls `work(start, stop)` on ranges that make up 0 to n, each in a thread of its own."""
        size = -(-n // self.n_threads)
        self._team.run(lambda thread: work(min(thread * size, n), min((thread + 1) * size, n)))

    def _multiply(self, x: Array, matrices: tuple[Matrix, ...], results: list[Array]) -> None:
        """What is in memory goes first, all at once: meanwhile the disk brings the paged parts."""
        self._input.set(x)
        here: list[_Piece] = []
        paged: list[tuple[Part, Array]] = []
        for matrix, y in zip(matrices, results, strict=True):
            start = 0
            for part in matrix.parts:
                out = y[:, start : start + part.n_rows]
                start += part.n_rows
                if part.array is None:
                    paged.append((part, out))
                else:
                    here.append(_Piece(part, part.array, out))
        if here:
            self._run(self._input, here)
        for part, out in paged:
            with part.open() as rows:
                self._run(self._input, [_Piece(part, rows, out)])

    def _run(self, x: "_Input", pieces: list["_Piece"]) -> None:
        """Multiplies all pieces."""
        if self._products is not None and (x.n_rows == 1 or not self._blas_for_many):
            self._products.multiply(x.rows, [Product(piece.rows, piece.out) for piece in pieces])
        else:
            self._run_blocks(x, pieces)

    def _run_blocks(self, x: "_Input", pieces: list["_Piece"]) -> None:
        """Multiplies all pieces in NumPy, each thread taking the next block once it is done with one."""
        n_weights = sum(piece.rows.size for piece in pieces)
        blocks: deque[_Block] = deque()
        for part, rows, out in pieces:
            n_rows, n_cols = rows.shape
            plan = self._plan(_BFLOAT16 if isinstance(rows, Packed) else rows.dtype, n_weights)
            way, gap = self._how(part, rows, plan)
            columns, missing_bits = x.lifted(gap)
            most = plan.block_bytes if x.n_rows < _MANY_ROWS else _BLOCK_BYTES_OF_MANY
            n_bytes = min(most, 4 * n_weights // (self.n_threads * _BLOCKS_PER_THREAD))
            step = block_rows(n_cols, max(n_bytes, FEW_ROWS_BLOCK_BYTES[0]))
            room = max(min(step, n_rows), _SMALL_ROWS)
            for scratch in self._scratch:
                scratch.reserve(room * n_cols, room * x.n_rows, isinstance(rows, Packed))
            for start in range(0, n_rows, step):
                stop = min(start + step, n_rows)
                blocks.append(_Block(rows, start, stop, way, columns, missing_bits, out[:, start:stop]))

        def work(thread: int) -> None:
            scratch = self._scratch[thread]
            # Infinities in x or in the weights are the model's affair; they show in the result.
            with np.errstate(all="ignore"):
                while True:
                    try:
                        block = blocks.popleft()
                    except IndexError:
                        return
                    _multiply_block(block, scratch)

        self._team.run(work)

    def _how(self, part: Part, rows: Weights, plan: Plan) -> tuple[str, int]:
        """The way to widen the rows, and by what power of two they are then too small."""
        if isinstance(rows, Packed):
            return plan.way, rows.gap
        if rows.dtype == np.float16 and plan.way == "bits":
            return ("bits", _FLOAT16_EXPONENT_GAP) if self._is_finite(part, rows) else ("cast", 0)
        return plan.way, 0

    def _is_finite(self, part: Part, rows: Stored) -> bool:
        """Whether float16 rows have neither infinities nor NaN, which `bits` would take for numbers.

        They are looked at when they are first used, and noted for as long as the part lives.
        """
        if self._finite.get(id(part)) is part:
            return True
        step = block_rows(rows.shape[1])
        for start in range(0, rows.shape[0], step):
            bits = rows[start : start + step].view(np.int16)
            if (bits & np.int16(0x7C00)).max() == 0x7C00:
                return False
        self._finite[id(part)] = part
        return True

    def _plan(self, dtype: np.dtype[Any], n_weights: int) -> Plan:
        if (plan := self.plans.get(dtype)) is not None:
            return plan
        if self._way is not None:
            return Plan(self._way)
        if n_weights < _MEASURED_FROM:
            return Plan(WAYS[0])
        plan = self._notes.read(dtype.name)
        if plan is None:
            plan = self._measure(dtype)
            self._notes.write(dtype.name, plan)
        self.plans[dtype] = plan
        logger.debug("%s weights: %s", dtype.name, plan)
        return plan

    def _measure(self, dtype: np.dtype[Any]) -> Plan:
        """The fastest plan, on more weights than caches hold: the way, then the size of the blocks."""
        values = np.linspace(-0.1, 0.1, 4093, dtype=np.float32)
        few = values.view(np.uint16)[1::2] if dtype == np.uint16 else values.astype(dtype)
        stored = np.resize(few, (_MEASURED_BYTES // dtype.itemsize // _MEASURED_COLS, _MEASURED_COLS))
        part, x = InMemory(stored), _Input()
        x.set(values[None, :_MEASURED_COLS])
        out = np.empty((1, part.n_rows), np.float32)

        def fastest(plans: list[Plan]) -> Plan:
            seconds = dict.fromkeys(plans, math.inf)
            end = time.perf_counter() + _MEASURE_S
            while math.inf in seconds.values() or time.perf_counter() < end:
                for plan in plans:
                    self.plans[dtype] = plan
                    start = time.perf_counter()
                    self._run_blocks(x, [_Piece(part, stored, out)])
                    seconds[plan] = min(seconds[plan], time.perf_counter() - start)
            return min(plans, key=seconds.__getitem__)

        way = fastest([Plan(way) for way in WAYS]).way
        return fastest([Plan(way, n_bytes) for n_bytes in FEW_ROWS_BLOCK_BYTES])


class _Input:
    """The rows x of one call as the products take them, in memory that is kept between calls."""

    def __init__(self) -> None:
        self._memory: dict[int, Array] = {}  # by gap
        self._lifted: dict[int, tuple[Array, int]] = {}  # of this call
        self._exponent: int | None = None
        self.rows: Array  # [T, D]

    def set(self, x: Array) -> None:
        self.rows = np.ascontiguousarray(x)
        self._lifted.clear()
        self._exponent = None

    @property
    def n_rows(self) -> int:
        return self.rows.shape[0]

    def lifted(self, gap: int) -> tuple[Array, int]:
        """x times a power of two, 2**`gap` if there is room for it, as columns; and how many bits less it is.

        The sums alone could be lifted instead, but then products of small numbers would lose bits.
        """
        if 0 not in self._lifted:
            columns = self._room(0)
            _copy_transposed(self.rows, columns)
            self._lifted[0] = columns, 0
        if gap not in self._lifted:
            columns, lifted = self._lifted[0][0], self._room(gap)
            if self._exponent is None:
                _, self._exponent = math.frexp(max(columns.max(), -columns.min()))
            bits = min(gap, 126 - self._exponent)
            np.multiply(columns, np.float32(2.0**bits), out=lifted)
            self._lifted[gap] = lifted, gap - bits
        return self._lifted[gap]

    def _room(self, gap: int) -> Array:  # -> [D, T]
        if gap not in self._memory or self._memory[gap].size < self.rows.size:
            self._memory[gap] = np.empty(self.rows.size, np.float32)
        return self._memory[gap][: self.rows.size].reshape(self.rows.shape[::-1])


class _Scratch:
    """One thread's memory, as much as the largest block so far took."""

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


class _Piece(NamedTuple):
    """A part that is in memory, and where its products go."""

    part: Part
    rows: Weights
    out: Array  # [T, n_rows]


class _Block(NamedTuple):
    """What one thread multiplies at a time: some rows of a part, with x in columns."""

    rows: Weights
    start: int
    stop: int
    way: str
    columns: Array  # [D, T]
    missing_bits: int  # the sums' exponents are too small by so many
    out: Array  # [T, stop - start]


def _multiply_block(block: _Block, scratch: _Scratch) -> None:
    """out = x rows^T: [n, D] -> [T, n]."""
    n, columns, out = block.stop - block.start, block.columns, block.out
    n_cols, n_x = columns.shape
    small_rows = _SMALL_PRODUCT // (n_cols * n_x)
    small = small_rows >= _SMALL_ROWS
    enough = small or n_x == 1 or n >= _SMALL_ROWS
    if isinstance(block.rows, Packed):
        bits, spare = scratch.unpacked(n, n_cols)
        block.rows.unpack(block.start, block.stop, bits, spare)
        weights = _widen(bits, block.way, scratch)
        places, values = block.rows.exceptions(block.start, block.stop)
        if len(places):
            weights.reshape(-1)[places] = values
    else:
        weights = block.rows[block.start : block.stop]
        if weights.dtype != np.float32 or not weights.flags.aligned or not enough:
            weights = _widen(weights, block.way, scratch)
    if n_x == 1:
        np.dot(weights, columns[:, 0], out=out[0])
    elif small:
        # All products in one call: the interpreter is handed over once, not once for each.
        sums = scratch.sums(n, n_x)
        step = small_rows // 8 * 8
        whole = n // step * step
        shape = (n // step, step)
        np.matmul(weights[:whole].reshape(*shape, n_cols), columns, out=sums[:whole].reshape(*shape, n_x))
        np.matmul(weights[whole:], columns, out=sums[whole:])
        _copy_transposed(sums, out)
    else:
        if not enough:  # what is left in the scratch memory makes up the rows
            weights = scratch.wide(_SMALL_ROWS * n_cols).view(np.float32).reshape(_SMALL_ROWS, n_cols)
        sums = scratch.sums(len(weights), n_x)
        np.matmul(weights, columns, out=sums)
        _copy_transposed(sums[:n], out)
    if block.missing_bits:
        out *= np.float32(2.0**block.missing_bits)


def _copy_transposed(source: Array, target: Array) -> None:  # [n, m] -> [m, n]
    """In strips as wide as a cache line, which is three times as fast: each line is written once."""
    step = 16 if source.shape[1] > 16 else len(source)
    for start in range(0, len(source), max(1, step)):
        target[:, start : start + step] = source[start : start + step].T


def _widen(rows: Stored, way: str, scratch: _Scratch) -> Array:  # [n, D] -> [n, D]
    """The values of the rows, exactly; those of float16 by `bits` are too small by its exponent gap."""
    wide = scratch.wide(rows.size)
    flat = rows.reshape(-1)
    if rows.dtype == np.uint16 and way == "bits":
        # Each value is written as an integer of four bytes two bytes further on: there it is the upper half
        # of its float32, and its zeros are the lower half of the next. NumPy casts to odd addresses as fast.
        wide[0] = 0
        np.copyto(scratch.wide(rows.size, offset=2), flat)
    elif rows.dtype == np.uint16:
        np.copyto(wide, flat)
        np.left_shift(wide, _SIXTEEN, out=wide)
    elif rows.dtype == np.float16 and way == "bits":
        float16_bits(flat, wide.view(np.float32))
    else:
        np.copyto(wide.view(np.float32), flat)
    return wide.view(np.float32).reshape(rows.shape)
