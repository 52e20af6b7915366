"""Float32 weights made into blocks of GGML's types, whose layouts `linear.block_types` describes.

Scales come from least squares (`groups`), and codes are rounded with the scales as they are stored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tpilite.arrays import Array
from tpilite.errors import CheckpointError
from tpilite.linear.block_types import BlockType, Bytes
from tpilite.quantize.groups import Groups, fit_scale, fit_scale_and_offset, inverse

# Weights that are worked on at a time. All arrays of so many stay in a cache of 1 MiB; with half of them,
# Python's share of the time doubles.
_CHUNK = 1 << 15

# The largest that float16 holds: no scale and no offset may be larger, so no weight may be.
_LARGEST = 65504.0
_SMALLEST = np.float32(2.0**-24)

# Searches for better scales of groups. Of normally distributed weights the first one makes the error of Q4_K
# smaller by 1.3 %, the second by 0.2 %, a third by 0.06 %.
_ROUNDS = 2

# Which codes the largest weight is given in turn (see `groups`). Beyond the highest code, the largest are
# cut off, which pays where the others gain more. Codes with a sign have one more on one side: both are tried.
_FOUR_BITS = (*np.arange(-10.0, -7.0, 0.25), *np.arange(6.75, 9.0, 0.25))
_FIVE_BITS = (*np.arange(-17.5, -14.9, 0.25), *np.arange(14.5, 17.0, 0.25))
_SIX_BITS = (*np.arange(-36.0, -29.0, 0.5), *np.arange(29.0, 35.0, 0.5))
_EIGHT_BITS = (127.0, 127.4, -127.4)
_FROM_ZERO = {4: np.arange(14.0, 17.1, 0.2), 5: np.arange(30.0, 33.6, 0.25)}


def quantize_rows(name: str, rows: Array, kind: BlockType, importance: Array | None = None) -> Bytes:
    """The weights [n, n_cols] of the tensor `name` as rows of blocks, [n, bytes of a row].

    `importance` [n_cols] says how much a column's squared errors count. Without it they count more with a
    weight's own size, halfway between evenly and by its square, which does well by both. Raises
    `CheckpointError` for weights that no block can hold.
    """
    assert rows.shape[1] % kind.n_weights == 0, (rows.shape, kind.name)
    _check(name, rows)
    shape = rows.size // kind.n_weights, kind.n_weights
    x = np.ascontiguousarray(rows, np.float32).reshape(shape)
    w = None if importance is None else _even_out(importance).reshape(-1, kind.n_weights)
    out = np.empty((len(x), kind.n_bytes), np.uint8)
    n_blocks = _CHUNK // kind.n_weights
    quantize = QUANTIZERS[kind.name]
    for start in range(0, len(x), n_blocks):
        part = x[start : start + n_blocks]
        places = np.arange(start, start + len(part))
        out[start : start + n_blocks] = quantize(part, _by_size(part) if w is None else w[places % len(w)])
    return out.reshape(len(rows), rows.shape[1] // kind.n_weights * kind.n_bytes)


def _check(name: str, rows: Array) -> None:
    largest, smallest = rows.max(initial=0), rows.min(initial=0)  # NaN, if there is one
    if not (np.isfinite(largest) and np.isfinite(smallest)):
        raise CheckpointError(
            f"{name} holds weights that are not finite numbers, which cannot be quantized; download it again"
        )
    if max(largest, -smallest) > _LARGEST:
        raise CheckpointError(
            f"{name} holds the weight {max(largest, -smallest):.6g}; to be quantized, none may be beyond "
            f"{_LARGEST:.0f}: leave out --quantize for this model"
        )


def _by_size(x: Array) -> Array:
    """1 + |x| / (the root of the block's mean square)."""
    mean_square = np.einsum("nk,nk->n", x, x) / np.float32(x.shape[1])
    importance = np.abs(x)
    importance *= inverse(np.sqrt(mean_square))[:, None]
    importance += np.float32(1)
    return importance


def _even_out(importance: Array) -> Array:
    """About 1 on average, and nowhere next to nothing: what one text never used still holds weights."""
    mean = importance.mean(dtype=np.float64)
    if not mean > 0:
        return np.ones_like(importance)
    return np.maximum(importance / np.float32(mean), np.float32(1e-2))


def _groups(x: Array, importance: Array, width: int) -> Groups:
    by_group = (np.ascontiguousarray(array.reshape(-1, width).T) for array in (x, importance))
    return Groups(*by_group)


def _rounded(values: Array) -> Array:
    """The values as float16 holds them."""
    return np.clip(values, -_LARGEST, _LARGEST).astype(np.float16).astype(np.float32)


def _as_scale(values: Array) -> Array:
    """The values as float16 holds them, none of them 0 unless it was: then its weights would all be lost."""
    rounded = _rounded(values)
    return np.where((rounded == 0) & (values != 0), np.copysign(_SMALLEST, values), rounded)


def _float16(values: Array) -> Bytes:  # [n] -> [n, 2]
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _in_order(codes: Array, n_blocks: int, lowest: int = 0) -> Bytes:  # [k, groups] -> [n, n_weights]
    """The codes of each block in the order of its weights, counted from `lowest`."""
    return np.ascontiguousarray((codes - np.float32(lowest)).astype(np.uint8).T).reshape(n_blocks, -1)


def _pairs(codes: Bytes, width: int) -> Bytes:  # [n, m] -> [n, m / 2]
    """Of each 2 * `width` codes, the lower four bits of the first `width` in the lower halves of bytes."""
    codes = codes.reshape(len(codes), -1, 2, width)
    lower, upper = codes[:, :, 0] & np.uint8(15), codes[:, :, 1] << np.uint8(4)
    return (lower | upper).reshape(len(codes), -1)


# ---- blocks of 32 ----


def _q8_0(x: Array, importance: Array) -> Bytes:
    groups = _groups(x, importance, 32)
    scale = _as_scale(fit_scale(groups, -127, 127, _EIGHT_BITS))
    codes = groups.codes(scale, None, -127, 127).astype(np.int8)
    return np.hstack((_float16(scale), codes.T.view(np.uint8)))


def _with_sign(bits: int, tried: Sequence[float]) -> Callable[[Array, Array], Bytes]:
    """Q4_0 and Q5_0."""
    lowest, highest = -1 << bits - 1, (1 << bits - 1) - 1

    def quantize(x: Array, importance: Array) -> Bytes:
        groups = _groups(x, importance, 32)
        scale = _as_scale(fit_scale(groups, lowest, highest, tried))
        codes = _in_order(groups.codes(scale, None, lowest, highest), len(x), lowest)
        return np.hstack((_float16(scale), *_fifth_bits(codes, bits), _pairs(codes, 16)))

    return quantize


def _with_minimum(bits: int) -> Callable[[Array, Array], Bytes]:
    """Q4_1 and Q5_1."""
    highest = (1 << bits) - 1

    def quantize(x: Array, importance: Array) -> Bytes:
        below = x.min(1)
        groups = _groups(x - below[:, None], importance, 32)  # beside a large minimum the rest would drown
        scale, offset = fit_scale_and_offset(groups, highest, _FROM_ZERO[bits], is_signed=True)
        minimum = _rounded(below - offset)
        offset = below - minimum
        groups.codes(scale, offset, 0, highest)
        code, square, product = groups.sums()
        scale = _as_scale((product + offset * code) * inverse(square))
        codes = _in_order(groups.codes(scale, offset, 0, highest), len(x))
        return np.hstack((_float16(scale), _float16(minimum), *_fifth_bits(codes, bits), _pairs(codes, 16)))

    return quantize


def _fifth_bits(codes: Bytes, bits: int) -> tuple[Bytes, ...]:  # [n, 32] -> [n, 4], if there are any
    return (np.packbits(codes >> 4, axis=1, bitorder="little"),) if bits == 5 else ()


# ---- blocks of 256 ----


@dataclass
class _Scales:
    """The scales and offsets of the groups of many blocks: small integers, times their block's own.

    `search` finds better integers and better multiples of them in turn; all errors are those of the stored
    values.
    """

    groups: Groups
    n_groups: int  # in a block
    lowest: int  # code
    highest: int
    range: tuple[int, int]  # of the integers
    unit: Array  # [blocks]
    scales: Array  # [groups]
    offset_unit: Array
    offsets: Array

    def search(self) -> None:
        """Tries each group's integers one up and one down, then fits the block's own scale and offset."""
        for _ in range(_ROUNDS):
            self._try_neighbours()
            self._fit_units()

    def codes(self) -> Array:
        """The codes that the stored scales and offsets lead to."""
        return self._codes(*self._values(self.unit, self.scales, self.offset_unit, self.offsets))

    def _codes(self, scale: Array, offset: Array) -> Array:
        return self.groups.codes(scale, offset if self.offsets.any() else None, self.lowest, self.highest)

    def _error(self, *numbers: Array) -> Array:
        scale, offset = self._values(*numbers)
        self._codes(scale, offset)
        return self.groups.error(scale, offset)

    def _values(self, unit: Array, scales: Array, offset_unit: Array, offsets: Array) -> tuple[Array, Array]:
        return self._spread(unit) * scales, self._spread(offset_unit) * offsets

    def _spread(self, of_blocks: Array) -> Array:  # [blocks] -> [groups]
        return np.repeat(of_blocks, self.n_groups)

    def _total(self, of_groups: Array) -> Array:  # [groups] -> [blocks]
        return of_groups.reshape(-1, self.n_groups).sum(1)

    def _try_neighbours(self) -> None:
        steps = (-1, 0, 1)
        least = np.full_like(self.scales, np.inf)
        best, best_offsets = self.scales.copy(), self.offsets.copy()
        for step in steps:
            scales = np.clip(self.scales + np.float32(step), *self.range)
            for offset_step in steps if self.offset_unit.any() else (0,):
                offsets = np.clip(self.offsets + np.float32(offset_step), *self.range)
                error = self._error(self.unit, scales, self.offset_unit, offsets)
                better = error < least
                np.copyto(least, error, where=better)
                np.copyto(best, scales, where=better)
                np.copyto(best_offsets, offsets, where=better)
        self.scales, self.offsets = best, best_offsets

    def _fit_units(self) -> None:
        """Least squares for x = unit * (integer * code) - offset_unit * integer, over each block."""
        before = self._total(self._error(self.unit, self.scales, self.offset_unit, self.offsets))
        code, square, product = self.groups.sums()
        aa, ab = self._total(self.scales**2 * square), self._total(self.scales * self.offsets * code)
        bb = self._total(self.offsets**2 * self.groups.w)
        ax, bx = self._total(self.scales * product), self._total(self.offsets * self.groups.wx)
        by_determinant = inverse(aa * bb - ab * ab)
        unit = _as_scale(np.where(by_determinant > 0, (bb * ax - ab * bx) * by_determinant, ax * inverse(aa)))
        offset_unit = _rounded((ab * ax - aa * bx) * by_determinant)
        better = self._total(self._error(unit, self.scales, offset_unit, self.offsets)) < before
        self.unit = np.where(better, unit, self.unit)
        self.offset_unit = np.where(better, offset_unit, self.offset_unit)


def _small(values: Array, n_groups: int, lowest: int, highest: int) -> tuple[Array, Array]:
    """Values of groups as a unit for each block and an integer for each group."""
    by_block = values.reshape(-1, n_groups)
    largest = np.take_along_axis(by_block, np.abs(by_block).argmax(1)[:, None], 1)[:, 0]
    unit = _as_scale(largest / np.float32(lowest or highest))
    return unit, np.clip(np.rint(values * np.repeat(inverse(unit), n_groups)), lowest, highest)


def _q4_k_or_q5_k(bits: int) -> Callable[[Array, Array], Bytes]:
    highest = (1 << bits) - 1

    def quantize(x: Array, importance: Array) -> Bytes:
        groups = _groups(x, importance, 32)
        scale, offset = fit_scale_and_offset(groups, highest, _FROM_ZERO[bits], is_signed=False)
        small, small_offsets = _small(scale, 8, 0, 63), _small(offset, 8, 0, 63)
        scales = _Scales(groups, 8, 0, highest, (0, 63), *small, *small_offsets)
        scales.search()
        codes = _in_order(scales.codes(), len(x))
        upper = np.packbits(codes.reshape(-1, 8, 32) >> 4, axis=1, bitorder="little")
        fifth = (upper.reshape(-1, 32),) if bits == 5 else ()
        units = _float16(scales.unit), _float16(scales.offset_unit)
        return np.hstack((*units, _twelve_bytes(scales.scales, scales.offsets), *fifth, _pairs(codes, 32)))

    return quantize


def _twelve_bytes(scales: Array, offsets: Array) -> Bytes:  # [groups], [groups] -> [n, 12]
    """Six bits for each scale and offset: those of groups 4 to 7 lie in two places."""
    s, o = (values.astype(np.uint8).reshape(-1, 8) for values in (scales, offsets))
    first = s[:, :4] | s[:, 4:] >> 4 << 6
    second = o[:, :4] | o[:, 4:] >> 4 << 6
    return np.hstack((first, second, s[:, 4:] & 15 | o[:, 4:] << 4))


def _q6_k(x: Array, importance: Array) -> Bytes:
    groups = _groups(x, importance, 16)
    small = _small(fit_scale(groups, -32, 31, _SIX_BITS), 16, -128, 127)
    none = np.zeros(len(x), np.float32), np.zeros(16 * len(x), np.float32)
    scales = _Scales(groups, 16, -32, 31, (-128, 127), *small, *none)
    scales.search()
    codes = _in_order(scales.codes(), len(x), -32)
    upper = (codes >> 4).reshape(-1, 2, 4, 32) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    upper = np.bitwise_or.reduce(upper, axis=2).reshape(-1, 64)
    small_scales = scales.scales.astype(np.int8).view(np.uint8).reshape(-1, 16)
    return np.hstack((_pairs(codes, 64), upper, small_scales, _float16(scales.unit)))


# By the type's name: what makes its blocks of weights [n, n_weights] and the importance of each.
QUANTIZERS: dict[str, Callable[[Array, Array], Bytes]] = {
    "Q8_0": _q8_0,
    "Q6_K": _q6_k,
    "Q5_K": _q4_k_or_q5_k(5),
    "Q4_K": _q4_k_or_q5_k(4),
    "Q5_1": _with_minimum(5),
    "Q5_0": _with_sign(5, _FIVE_BITS),
    "Q4_1": _with_minimum(4),
    "Q4_0": _with_sign(4, _FOUR_BITS),
}
