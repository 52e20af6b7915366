"""How NumPy's products are cut into calls of the BLAS, so that neither threads nor paging change bits.

A BLAS gives a row of W other last bits when it is multiplied beside other rows: its kernels take rows in
groups (of 4, 8, 12 or 24), and choose other code for other shapes. But equal calls give equal bits, at
whatever addresses and in whatever thread. So the shape of the call that a row is in depends on nothing but
the shape of its matrix and the number of rows of x: counted from the matrix's first row, every call takes
`call_rows` of them, and the last call what is left. Chunks are whole calls, and parts of a matrix begin at
multiples of `part_rows`.
"""

import threading

import numpy as np

from tpilite.arrays import Array

# Kernels like multiples of 24 rows. Here they take 24, 48, 96 or more, up to limits in rows and bytes. Beside
# few rows of x, small calls share small matrices out to all threads. Beside many, x is what is large, and
# each call lays it out anew.
_FEWEST_ROWS, _MOST_ROWS = 24, 384
_FEW_BYTES, _MANY_BYTES = 1 << 19, 11 << 19
MANY_ROWS = 64

# Calls of up to so many multiplications take OpenBLAS's way for small matrices, which lays out nothing and is
# up to three times faster for few rows. Where there is no such way, smaller calls cost little.
_SMALL_PRODUCT = 1_000_000


def call_rows(n_cols: int, n_x: int) -> int:
    """How many rows of a matrix of `n_cols` columns are multiplied in one call, beside `n_x` rows of x."""
    if n_x >= MANY_ROWS:
        return part_rows(n_cols)
    rows = _fitting(_FEW_BYTES // (4 * n_cols))
    small = _SMALL_PRODUCT // (n_cols * n_x)
    return rows if small < _FEWEST_ROWS else min(rows, _fitting(small))


def part_rows(n_cols: int) -> int:
    """The multiple at which parts of a matrix must begin: whole calls, for any number of rows of x."""
    return _fitting(_MANY_BYTES // (4 * n_cols))


def _fitting(limit: int) -> int:
    rows = _FEWEST_ROWS
    while 2 * rows <= min(limit, _MOST_ROWS):
        rows *= 2
    return rows


def multiply_in_calls(
    weights: Array, columns: Array, out: Array, rows_per_call: int
) -> None:  # [..., n, D], [..., D, T] -> [..., n, T]
    """out = W x, for rows that begin where a call begins and end where one ends.

    All whole calls are one of NumPy's: the interpreter is handed over once, not once for each.
    """
    *others, n, n_cols = weights.shape
    n_whole = n - n % rows_per_call
    if n_whole < n:
        np.matmul(weights[..., n_whole:, :], columns, out=out[..., n_whole:, :])
    if n_whole:
        shape = *others, n_whole // rows_per_call, rows_per_call
        calls = weights[..., :n_whole, :].reshape(*shape, n_cols)
        sums = out[..., :n_whole, :].reshape(*shape, out.shape[-1])
        np.matmul(calls, columns[..., None, :, :], out=sums)


def blas_repeats() -> bool:
    """Whether equal calls give equal bits here, wherever their numbers lie and with others at the same time.

    No BLAS that was tried does otherwise, with one thread of its own. This tries the one that is here, in
    some milliseconds.
    """
    rng = np.random.default_rng(0)
    for n_rows, n_cols, n_x in ((24, 601, 1), (7, 601, 4), (48, 601, 50), (96, 256, 120)):
        w = rng.standard_normal((n_rows, n_cols), np.float32)
        x = rng.standard_normal((n_cols, n_x), np.float32)
        found: set[bytes] = set()
        threads = [threading.Thread(target=_try, args=(w, x, offset, found)) for offset in (0, 4, 16, 36)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(found) != 1:
            return False
    return True


def _try(w: Array, x: Array, offset: int, found: set[bytes]) -> None:
    """Adds the bits of a product of numbers that begin `offset` bytes behind a cache line's beginning."""
    out = np.empty((len(w), x.shape[1]), np.float32)
    multiply_in_calls(_moved(w, offset), _moved(x, offset), out, len(w))
    found.add(out.tobytes())


def _moved(numbers: Array, offset: int) -> Array:
    memory = np.empty(numbers.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    copy: Array = memory[start : start + numbers.nbytes].view(np.float32).reshape(numbers.shape)
    copy[...] = numbers
    return copy
