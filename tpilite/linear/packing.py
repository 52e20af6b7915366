"""bfloat16 weights in twelve bits instead of sixteen, without loss: more of a model stays in memory.

The exponents of a trained matrix lie close together: a run of fifteen of them holds all but about one weight
in thousands. Such a weight takes twelve bits: its sign, the exponent's place in the run (1 to 15; 0 is the
weight zero), seven bits of the mantissa. The few others are noted beside, with their places.

Four rows share three. Rows 0 to 2 have their bits where bfloat16 has them, so that a mask brings them out:

    sign  (4 bits)  exponent:4  mantissa:7

The four bits between are row 3's: the exponent in row 0, the mantissa's upper four bits in row 1, both
inverted where the weight is negative, the sign and the mantissa's lower three bits in row 2. An arithmetic
shift of these three spreads the sign over the others' places, and so inverts them back: every operation
saved here counts, since each goes through the whole chunk once.

What comes out has the upper bits of its exponent missing, which is to say that it is too small by a power
of two, the same for all rows packed together: `gap` is its logarithm.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint16]  # bfloat16

ROWS = 4  # share three; a matrix that is packed has a multiple of them

# Packed rows with more exceptions would save too little; trained weights have about 1 in 1000.
_MOST_EXCEPTIONS = 1 / 256
_EXCEPTION_BYTES = 12

_N_EXPONENTS = 15
_INFINITE = 255
# An exception, too, must be an exact float32 behind the gap, of which the smallest is 2**-149.
_LOWEST_BEHIND_GAP = -15
# A power of two that float32 has, and that leaves room for the values that it multiplies.
_LARGEST_GAP = 120

_SAMPLED_ROWS = 32
_CHUNK_WEIGHTS = 1 << 17  # packed at a time: their temporaries stay in the cache

_SIGN, _MAGNITUDE = np.uint16(0x8000), np.uint16(0x7FFF)
_FIRST_FIELD, _N_FIELDS = np.uint16(1 << 7), np.uint16(_N_EXPONENTS << 7)
_OWN, _BETWEEN = np.uint16(0x87FF), np.uint16(0x7800)
_ONE, _FOUR, _EIGHT, _ELEVEN = np.uint16(1), np.uint16(4), np.uint16(8), np.uint16(11)
_INVERTED, _LOWER = np.uint16(0x07F8), np.uint16(0x3800)


@dataclass(frozen=True)
class Packed:
    """Rows [n, D] of bfloat16, packed."""

    words: Bits  # [n / 4, 3, D]
    gap: int
    places: NDArray[np.int64]  # of the exceptions in the rows laid end to end, ascending
    values: NDArray[np.float32]  # theirs, times 2**-gap
    firsts: NDArray[np.int64]  # how many exceptions come before each group of rows, and how many there are

    @property
    def shape(self) -> tuple[int, int]:
        n_groups, _, n_cols = self.words.shape
        return ROWS * n_groups, n_cols

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.places.nbytes + self.values.nbytes

    def unpack(self, start: int, stop: int, out: Bits, scratch: Bits) -> None:
        """The rows from `start` to `stop`, times 2**-`gap` and without the exceptions, in `out` [n, D].

        Both are multiples of four. `scratch` is three quarters as large as `out`.
        """
        words = self.words[start // ROWS : stop // ROWS]
        n, _, n_cols = words.shape
        rows = out.reshape(n, ROWS, n_cols)
        np.bitwise_and(words, _OWN, out=rows[:, :3])
        upper, middle, lower = scratch.reshape(3, n, n_cols)
        np.bitwise_and(words, _BETWEEN, out=scratch.reshape(3, n, n_cols).transpose(1, 0, 2))
        np.right_shift(upper, _FOUR, out=upper)
        np.right_shift(middle, _EIGHT, out=middle)
        np.left_shift(lower, _ONE, out=lower)
        np.right_shift(lower.view(np.int16), np.int16(12), out=lower.view(np.int16))
        np.bitwise_xor(upper, middle, out=upper)
        np.bitwise_xor(upper, lower, out=upper)
        np.bitwise_and(upper, _OWN, out=rows[:, 3])

    def exceptions(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Places and values of those in the rows from `start` to `stop`, places counted from the first."""
        these = slice(self.firsts[start // ROWS], self.firsts[stop // ROWS])
        return self.places[these] - start * self.words.shape[2], self.values[these]


def packed_bytes(n_rows: int, n_cols: int) -> int:
    """The most that rows take when they are packed."""
    n = n_rows * n_cols
    return 3 * n // 2 + int(n * _MOST_EXCEPTIONS) * _EXCEPTION_BYTES


def pack(rows: Bits, memory: Any) -> Packed | None:  # [n, D]
    """The rows packed into `memory`, a buffer of at least 1.5 bytes for each weight.

    None where that would lose something or save too little: where there are infinities or NaN, weights
    spread over many exponents, or some that are 2**30 times smaller than the largest.
    """
    n, n_cols = rows.shape
    words = np.frombuffer(memory, np.uint16, 3 * rows.size // ROWS).reshape(n // ROWS, 3, n_cols)
    gap = _gap(rows[:: max(1, n // _SAMPLED_ROWS)])
    found: list[tuple[NDArray[Any], Bits]] = []
    n_found = 0
    step = max(1, _CHUNK_WEIGHTS // (ROWS * n_cols)) * ROWS
    scratch = _Scratch(min(step, n) * n_cols)
    for start in range(0, n, step):
        group = start // ROWS
        places, exceptions = _pack(
            rows[start : start + step], gap, words[group : group + step // ROWS], scratch
        )
        found.append((places + start * n_cols, exceptions))
        n_found += places.size
        if n_found > _MOST_EXCEPTIONS * rows.size:
            return None
    places = np.concatenate([p for p, _ in found])
    exceptions = np.concatenate([e for _, e in found])
    exponents = (exceptions >> 7 & 0xFF).astype(np.int16)
    if np.any((exponents == _INFINITE) | (exponents - gap < _LOWEST_BEHIND_GAP)):
        return None
    values = (exceptions.astype(np.uint32) << np.uint32(16)).view(np.float32)
    firsts = np.searchsorted(places, np.arange(0, rows.size + 1, ROWS * n_cols))
    return Packed(words, gap, places, np.ldexp(values, -gap), firsts)


def _gap(sample: Bits) -> int:
    """One less than the lowest of the exponents in a row that most weights have."""
    counts = np.bincount((sample >> 7 & 0xFF).reshape(-1), minlength=256)
    in_a_row = np.convolve(counts[1:], np.ones(_N_EXPONENTS, int), "valid")  # zeros need no exponent
    return min(int(in_a_row.argmax()), _LARGEST_GAP)


class _Scratch:
    """Memory for one chunk: taking it anew for each would cost more than the packing."""

    def __init__(self, n_weights: int) -> None:
        self.fields, self.moved = np.empty((2, n_weights), np.uint16)
        self.other, self.fits = np.empty((2, n_weights), np.bool_)


def _pack(rows: Bits, gap: int, words: Bits, scratch: _Scratch) -> tuple[NDArray[Any], Bits]:
    """Fills the words; where in the rows the exceptions are, and what they are."""
    flat = rows.reshape(-1)
    fields, moved, other, fits = (
        memory[: flat.size] for memory in (scratch.fields, scratch.moved, scratch.other, scratch.fits)
    )
    np.bitwise_and(flat, _MAGNITUDE, out=fields)
    np.not_equal(fields, 0, out=other)
    np.subtract(fields, np.uint16(gap << 7), out=fields)
    # Unsigned: what is below the first exponent comes out as very large.
    np.subtract(fields, _FIRST_FIELD, out=moved)
    np.less(moved, _N_FIELDS, out=fits)
    np.greater(other, fits, out=other)
    np.multiply(fields, fits, out=fields)
    np.bitwise_and(flat, _SIGN, out=moved)
    np.bitwise_or(fields, moved, out=fields)

    n, _, n_cols = words.shape
    four = fields.reshape(n, ROWS, n_cols)
    last, piece = four[:, 3], moved[: n * n_cols].reshape(n, n_cols)
    np.right_shift(last.view(np.int16), np.int16(15), out=piece.view(np.int16))
    np.bitwise_and(piece, _INVERTED, out=piece)
    np.bitwise_xor(last, piece, out=last)
    words[...] = four[:, :3]
    for row, shift in enumerate((_FOUR, _EIGHT, _ELEVEN)):
        np.left_shift(last, shift, out=piece)
        np.bitwise_and(piece, _BETWEEN if row < 2 else _LOWER, out=piece)
        np.bitwise_or(words[:, row], piece, out=words[:, row])
    np.bitwise_and(last, _SIGN, out=piece)
    np.right_shift(piece, _ONE, out=piece)
    np.bitwise_or(words[:, 2], piece, out=words[:, 2])
    places = np.flatnonzero(other)
    return places, flat[places]
