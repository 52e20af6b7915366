"""y = x W^T + b for a stored matrix of any dtype: the one place where stored weights become numbers.

What leaves here is float32. `Linear` cuts the parts of matrices into chunks of rows. A thread takes a chunk,
widens it to float32 in memory of its own that stays in the cache, and multiplies; or `Products` that are
handed in do all that. A sum's bits depend neither on the threads nor on the chunks; nor on the parts, if each
begins at a multiple of `part_rows`.
"""

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from tpilite.arrays import Array
from tpilite.closing import Closing
from tpilite.linear.calls import blas_repeats, call_rows, part_rows
from tpilite.linear.chunks import Chunk, Input, Piece, Scratch, multiply
from tpilite.linear.matrix import FLOAT16_EXPONENT_GAP, Blocks, InMemory, Matrix, Part, Stored, Weights
from tpilite.linear.packing import Packed
from tpilite.linear.plans import FEW_ROWS_CHUNK_BYTES, KERNELS, Notes, Plan
from tpilite.linear.products import Product, Products
from tpilite.linear.thread_pool import ThreadPool

logger = logging.getLogger(__name__)

# Chunks per thread and call, at least: what one thread may wait for the other at the end of a call.
_CHUNKS_PER_THREAD = 4

# Whether many rows of x are left to NumPy even where products are handed in. macOS's BLAS multiplies on a
# unit of the processor that no loop of ours reaches. This is not measured at the start, as NumPy's kernels
# are: those give the same bits, these do not.
_BLAS_FOR_MANY = sys.platform == "darwin"

_BFLOAT16 = np.dtype(np.uint16)

# There is one kernel for blocks only, of a dozen of NumPy's calls: with chunks of 2 MiB it takes a tenth less
# than with 1 MiB, and a quarter less than with 256 KiB.
_PLAN_FOR_BLOCKS = Plan(KERNELS[0], 1 << 21)

# A call on fewer weights than this is over before it matters how it is done.
_MEASURED_FROM = 1 << 20
_MEASURED_COLS, _MEASURED_BYTES = 2048, 32 << 20
_MEASURE_S = 0.05  # per question, of which there are two per dtype


class Linear(Closing):
    """y = x W^T + b for each of the matrices, float32, by `n_threads` threads of which the caller is one.

    The threads live until `close`. One call at a time: the scratch memory belongs to the object.

    Where `products` are given, which must be for as many threads, they do the work and are closed with this.
    Else NumPy does it by `kernel`, one of `KERNELS`, or by the faster one for this machine: that is measured
    when a large matrix of a dtype first comes, in 0.1 to 0.3 s, and noted in the file `cache` (default: one
    in the user's cache directory).
    """

    def __init__(
        self,
        n_threads: int = 1,
        products: Products | None = None,
        *,
        kernel: str | None = None,
        cache: Path | None = None,
        blas_for_many: bool = _BLAS_FOR_MANY,
    ) -> None:
        assert kernel is None or kernel in KERNELS
        self.n_threads = n_threads
        self.plans: dict[np.dtype[Any], Plan] = {}  # of NumPy's products, once decided
        self._kernel = kernel
        self._products = products
        self._blas_for_many = blas_for_many
        self._notes = Notes(cache, n_threads)
        self._pool = ThreadPool(n_threads, products)
        self._scratch = [Scratch() for _ in range(n_threads)]
        self._finite: WeakValueDictionary[int, Part] = WeakValueDictionary()

    def prepare(self, dtypes: Iterable[np.dtype[Any]]) -> None:
        """Measures now what large matrices of these dtypes would else have measured, and its memory."""
        if self._products is None or self._blas_for_many:
            if not blas_repeats():
                logger.debug("bits may depend on threads and paging: this BLAS does not repeat its own")
            for dtype in dtypes:
                self._plan(dtype, _MEASURED_FROM)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.close()
        if self._products is not None:
            self._products.close()
            self._products = None

    def __call__(self, x: Array, *matrices: Matrix) -> list[Array]:  # [T, n_inputs] -> [T, n_rows] each
        x = _placed(x, matrices)
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
        self._pool.run(lambda thread: work(min(thread * size, n), min((thread + 1) * size, n)))

    def _multiply(self, x: Array, matrices: tuple[Matrix, ...], results: list[Array]) -> None:
        """What is in memory goes first, all at once: meanwhile the disk brings the paged parts."""
        given = Input(x)
        here: list[Piece] = []
        paged: list[tuple[Part, Array]] = []
        for matrix, y in zip(matrices, results, strict=True):
            start = 0
            for part in matrix.parts:
                out = y[:, start : start + part.n_rows]
                start += part.n_rows
                if part.array is None:
                    paged.append((part, out))
                else:
                    here.append(Piece(part, part.array, out))
        if here:
            self._run(given, here)
        for part, out in paged:
            with part.open() as rows:
                self._run(given, [Piece(part, rows, out)])

    def _run(self, x: Input, pieces: list[Piece]) -> None:
        """Multiplies all pieces."""
        if self._products is not None and (len(x.rows) == 1 or not self._blas_for_many):
            takes = self._products.takes
            products = [Product(rows, out) for _, rows, out in pieces if takes(rows)]
            pieces = [piece for piece in pieces if not takes(piece.rows)]
            if products:
                self._products.multiply(x.rows, products)
        if pieces:
            self._run_chunks(x, pieces)

    def _run_chunks(self, x: Input, pieces: list[Piece]) -> None:
        """Multiplies all pieces in NumPy, each thread taking the next chunk once it is done with one."""
        n_weights = sum(math.prod(piece.rows.shape) for piece in pieces)
        chunks: deque[Chunk] = deque()
        for part, rows, out in pieces:
            n_rows, n_cols = rows.shape
            plan = self._plan_for(rows, n_weights)
            kernel, gap = self._kernel_for(part, rows, plan)
            columns, missing_bits = x.scaled(gap)
            n_bytes = min(plan.chunk_bytes, 4 * n_weights // (self.n_threads * _CHUNKS_PER_THREAD))
            per_call = call_rows(n_cols, len(x.rows))
            step = -(-max(n_bytes, FEW_ROWS_CHUNK_BYTES[0]) // (4 * n_cols * per_call)) * per_call
            room = min(step, n_rows)
            for scratch in self._scratch:
                scratch.reserve(rows, room, len(x.rows))
            for start in range(0, n_rows, step):
                stop = min(start + step, n_rows)
                chunks.append(
                    Chunk(rows, start, stop, kernel, columns, missing_bits, per_call, out[:, start:stop])
                )

        def work(thread: int) -> None:
            scratch = self._scratch[thread]
            # Infinities in x or in the weights are the model's affair; they show in the result.
            with np.errstate(all="ignore"):
                while True:
                    try:
                        chunk = chunks.popleft()
                    except IndexError:
                        return
                    multiply(chunk, scratch)

        self._pool.run(work)

    def _kernel_for(self, part: Part, rows: Weights, plan: Plan) -> tuple[str, int]:
        """The kernel that widens the rows, and `gap`: it leaves them too small by the factor 2**gap."""
        if isinstance(rows, Packed):
            return plan.kernel, rows.gap
        if isinstance(rows, Blocks):
            return plan.kernel, 0
        if rows.dtype == np.float16 and plan.kernel == "bits":
            return ("bits", FLOAT16_EXPONENT_GAP) if self._is_finite(part, rows) else ("cast", 0)
        return plan.kernel, 0

    def _is_finite(self, part: Part, rows: Stored) -> bool:
        """Whether float16 rows have neither infinities nor NaN, which `bits` would take for numbers.

        They are looked at when they are first used, and noted for as long as the part lives.
        """
        if self._finite.get(id(part)) is part:
            return True
        step = part_rows(rows.shape[1])
        for start in range(0, rows.shape[0], step):
            bits = rows[start : start + step].view(np.int16)
            if (bits & np.int16(0x7C00)).max() == 0x7C00:
                return False
        self._finite[id(part)] = part
        return True

    def _plan_for(self, rows: Weights, n_weights: int) -> Plan:
        if isinstance(rows, Blocks):
            return _PLAN_FOR_BLOCKS
        return self._plan(_BFLOAT16 if isinstance(rows, Packed) else rows.dtype, n_weights)

    def _plan(self, dtype: np.dtype[Any], n_weights: int) -> Plan:
        if (plan := self.plans.get(dtype)) is not None:
            return plan
        if self._kernel is not None:
            return Plan(self._kernel)
        if n_weights < _MEASURED_FROM:
            return Plan(KERNELS[0])
        plan = self._notes.read(dtype.name)
        if plan is None:
            plan = self._measure(dtype)
            self._notes.write(dtype.name, plan)
        self.plans[dtype] = plan
        logger.debug("%s weights: %s", dtype.name, plan)
        return plan

    def _measure(self, dtype: np.dtype[Any]) -> Plan:
        """The fastest plan, on more weights than caches hold: the kernel, then the size of the chunks."""
        values = np.linspace(-0.1, 0.1, 4093, dtype=np.float32)
        few = values.view(np.uint16)[1::2] if dtype == np.uint16 else values.astype(dtype)
        stored = np.resize(few, (_MEASURED_BYTES // dtype.itemsize // _MEASURED_COLS, _MEASURED_COLS))
        part, x = InMemory(stored), Input(values[None, :_MEASURED_COLS])
        out = np.empty((1, part.n_rows), np.float32)

        def fastest(plans: list[Plan]) -> Plan:
            seconds = dict.fromkeys(plans, math.inf)
            end = time.perf_counter() + _MEASURE_S
            while math.inf in seconds.values() or time.perf_counter() < end:
                for plan in plans:
                    self.plans[dtype] = plan
                    start = time.perf_counter()
                    self._run_chunks(x, [Piece(part, stored, out)])
                    seconds[plan] = min(seconds[plan], time.perf_counter() - start)
            return min(plans, key=seconds.__getitem__)

        kernel = fastest([Plan(kernel) for kernel in KERNELS]).kernel
        return fastest([Plan(kernel, n_bytes) for n_bytes in FEW_ROWS_CHUNK_BYTES])


def _placed(x: Array, matrices: Iterable[Matrix]) -> Array:  # [T, n_inputs] -> [T, n_cols]
    """x where the matrices, which all have the same columns, want it."""
    ((n_inputs, first_col, n_cols),) = {(m.n_inputs, m.first_col, m.n_cols) for m in matrices}
    assert x.shape[1] == (n_cols - first_col if n_inputs is None else n_inputs)
    if x.shape[1] == n_cols:
        return x
    placed = np.zeros((len(x), n_cols), np.float32)
    placed[:, first_col : first_col + x.shape[1]] = x
    return placed
