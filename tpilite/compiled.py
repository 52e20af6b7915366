"""Products with one row of x as machine code, by Numba where that is installed (the `fast` extra).

NumPy widens a block into the cache in one call and multiplies it in the next, and while it multiplies, the
memory idles. These loops do both at once, at the rate at which the memory can be read: 16 billion weights a
second with two threads where `linear` alone makes 9, in bfloat16; in float16, 16 instead of 4.

The functions are plain Python, in the part of it that Numba compiles. The casts say where 32 bits are
enough: Numba would take 64, and half as many at a time.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from numpy import float32, int16, int32, uint32

from tpilite.packing import ROWS

logger = logging.getLogger(__name__)

# What Numba and its compiler take, in memory that this process then lacks for weights.
MEMORY_BYTES = 150 << 20


@dataclass(frozen=True)
class Kernels:
    """Each takes stored rows [n, D], one row x [D], and writes to out [n]."""

    bfloat16: Callable[..., None]
    float16: Callable[..., None]
    packed: Callable[..., None]


def load() -> Kernels | None:
    """The functions below, compiled or from Numba's cache on the disk; None where there is no Numba."""
    try:
        from numba import njit, types
    except ImportError as error:  # also where it does not know this NumPy
        logger.debug("no compiled products: %s", error)
        return None
    rows = types.Array(types.uint16, 2, "C", readonly=True)
    row, places = types.float32[::1], types.int64[::1]
    signature = types.void(rows, row, row)
    # Sums may be taken in any order: only so are several made at once.
    compiled = partial(njit, nogil=True, fastmath=True, error_model="numpy")
    for cache in (True, False):
        try:
            return Kernels(
                compiled(signature, cache=cache)(_bfloat16),
                compiled(signature, cache=cache)(_float16),
                compiled(types.void(rows, row, row, places, row), cache=cache)(_packed),
            )
        except RuntimeError as error:  # there is no folder that a cache may be written to
            logger.debug("compiling without a cache: %s", error)
    return None


def _bfloat16(rows: Any, x: Any, out: Any) -> None:
    for i in range(out.size):
        row = rows[i]
        y = float32(0)
        for j in range(x.size):
            y += uint32(uint32(row[j]) << uint32(16)).view(float32) * x[j]
        out[i] = y


def _float16(rows: Any, x: Any, out: Any) -> None:
    """Finite values, times 2**-112: see `linear.float16_bits`."""
    for i in range(out.size):
        row = rows[i]
        y = float32(0)
        for j in range(x.size):
            bits = uint32(uint32(int32(int16(row[j])) << int32(13)) & uint32(0x8FFFFFFF))
            y += bits.view(float32) * x[j]
        out[i] = y


def _packed(words: Any, x: Any, out: Any, places: Any, values: Any) -> None:
    """Packed rows times 2**-gap, of which three are stored for each four: see `packing.Packed.unpack`.

    `places` are those of the exceptions, counted from the first of these rows.
    """
    for group in range(out.size // ROWS):
        first, second, third = words[3 * group], words[3 * group + 1], words[3 * group + 2]
        y0, y1, y2, y3 = float32(0), float32(0), float32(0), float32(0)
        for j in range(x.size):
            a = uint32(uint32(first[j]) << uint32(16))
            b = uint32(uint32(second[j]) << uint32(16))
            c = uint32(uint32(third[j]) << uint32(16))
            y0 += uint32(a & uint32(0x87FF0000)).view(float32) * x[j]
            y1 += uint32(b & uint32(0x87FF0000)).view(float32) * x[j]
            y2 += uint32(c & uint32(0x87FF0000)).view(float32) * x[j]
            upper = uint32(uint32(a & uint32(0x78000000)) >> uint32(4))
            middle = uint32(uint32(b & uint32(0x78000000)) >> uint32(8))
            lower = uint32(int32(uint32(c << uint32(1))) >> int32(12))
            y3 += uint32((upper ^ middle ^ lower) & uint32(0x87FF0000)).view(float32) * x[j]
        out[ROWS * group] = y0
        out[ROWS * group + 1] = y1
        out[ROWS * group + 2] = y2
        out[ROWS * group + 3] = y3
    for k in range(places.size):
        out[places[k] // x.size] += values[k] * x[places[k] % x.size]
