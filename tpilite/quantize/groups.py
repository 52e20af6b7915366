"""Scales of groups of weights by least squares: what to divide by before rounding to integers.

Rounding after a division by (largest / highest code) leaves a larger error than it must. For given codes the
best scale follows from least squares; for a given scale the best codes follow from rounding. Both together
have many local optima, so several scales are tried, each is fitted to its codes, and the best one is kept.

Arrays of groups are [k, n]: k weights in each of n groups, so that every operation runs along all groups.
Errors are weighted sums of squares. A group of zeros has scale 0 and codes 0.
"""

from collections.abc import Iterable

import numpy as np

from tpilite.arrays import Array

# Whatever is smaller is nothing in float16, as which scales are stored; and 1 / it must be finite.
_NOTHING = np.float32(1e-30)
_ZERO, _ONE = np.float32(0), np.float32(1)


def inverse(values: Array) -> Array:
    """1 / values, and 0 where a value is next to nothing."""
    is_there = np.abs(values) > _NOTHING
    return np.where(is_there, _ONE / np.where(is_there, values, _ONE), _ZERO)


class Groups:
    """Groups of weights `x` [k, n], each value's squared error counting `importance` [k, n] times."""

    def __init__(self, x: Array, importance: Array) -> None:
        self.x, self._w = x, importance
        self._wx = importance * x
        self.w, self.wx = importance.sum(0), self._wx.sum(0)  # [n], of each group
        self._codes, self._weighted = np.empty_like(x), np.empty_like(x)

    def codes(self, scale: Array, offset: Array | None, lowest: int, highest: int) -> Array:
        """The nearest codes for x = scale * code - offset, as float32, there until others are asked for."""
        factor, codes = inverse(scale), self._codes
        np.multiply(self.x, factor, out=codes)
        if offset is not None:
            np.add(codes, offset * factor, out=codes)
        np.rint(codes, out=codes)
        return np.clip(codes, lowest, highest, out=codes)

    def sums(self) -> tuple[Array, Array, Array]:
        """Of the codes asked for last, the weighted sums [n] of code, code * code and code * x."""
        np.multiply(self._codes, self._w, out=self._weighted)
        squares = np.einsum("kn,kn->n", self._weighted, self._codes)
        return self._weighted.sum(0), squares, np.einsum("kn,kn->n", self._wx, self._codes)

    def error(self, scale: Array, offset: Array) -> Array:
        """The error [n] of the codes asked for last, less the sum of w * x * x, which is always in it."""
        code, square, product = self.sums()
        error = scale * (scale * square - 2 * (offset * code + product))
        error += offset * (offset * self.w + 2 * self.wx)
        return error


def fit_scale(groups: Groups, lowest: int, highest: int, tried: Iterable[float]) -> Array:  # [n]
    """The best scale of each group, of either sign, for x = scale * code.

    `tried` are the codes, with fractions, that a group's largest value is given in turn.
    """
    above, below = groups.x.max(0), groups.x.min(0)
    start = inverse(np.where(above > -below, above, below))
    scale, gain = np.zeros_like(start), np.zeros_like(start)

    def attempt(factor: Array) -> None:
        groups.codes(inverse(factor), None, lowest, highest)
        _, square, product = groups.sums()
        fitted = product * inverse(square)
        better = fitted * product > gain
        np.copyto(gain, fitted * product, where=better)
        np.copyto(scale, fitted, where=better)

    for code in tried:
        attempt(start * np.float32(code))
    attempt(inverse(scale))
    return scale


def fit_scale_and_offset(
    groups: Groups, highest: int, tried: Iterable[float], *, is_signed: bool
) -> tuple[Array, Array]:  # [n], [n]
    """The best scale and offset of each group for x = scale * code - offset, with codes from 0.

    `tried` are the codes, with fractions, that the distance of a group's largest value from its smallest is
    given in turn. Offsets are not negative, unless `is_signed`: not every type can store those.
    """
    below = groups.x.min(0)
    if not is_signed:
        below = np.minimum(below, _ZERO)
    start = inverse(groups.x.max(0) - below)
    scale, offset = np.zeros_like(start), -below
    least = offset * (offset * groups.w + 2 * groups.wx)

    def attempt(factor: Array, at: Array) -> None:
        groups.codes(inverse(factor), at, 0, highest)
        code, square, product = groups.sums()
        determinant = groups.w * square - code * code
        # Equal codes say nothing of scale and offset apart: what is left of the determinant is rounding.
        by_determinant = inverse(np.where(determinant > 1e-5 * groups.w * square, determinant, _ZERO))
        fitted = (groups.w * product - groups.wx * code) * by_determinant
        shift = (code * product - square * groups.wx) * by_determinant
        if not is_signed:
            alone = (shift < 0) | (by_determinant == 0)
            fitted = np.where(alone, product * inverse(square), fitted)
            shift = np.maximum(shift, _ZERO)
        error = fitted * (fitted * square - 2 * (shift * code + product))
        error += shift * (shift * groups.w + 2 * groups.wx)
        better = error < least
        np.copyto(least, error, where=better)
        np.copyto(scale, fitted, where=better)
        np.copyto(offset, shift, where=better)

    for code in tried:
        attempt(start * np.float32(code), -below)
    attempt(inverse(scale), offset)
    return scale, offset
