"""The types in which the numbers of a sum travel."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.arrays import Array

_BLOCK = 32
_HIGHEST = 127  # the code of a block's largest number, of either sign
_SMALLEST = np.float32(2.0**-126)  # dividing by a smaller scale could overflow


class Codec:
    """float32 as it travels: itself. At most `n_frames` frames at a time, of `n` numbers each."""

    dtype: Any = np.dtype("<f4")
    exact = True

    def __init__(self, n_frames: int, n: int) -> None:
        self.width = n  # elements of `dtype` in a frame
        self._n_all = n_frames * n

    def narrow(self, x: Array, out: NDArray[Any]) -> None:  # [..., n], [..., width]
        """Puts `x` as it is sent into `out`."""
        np.copyto(out, x)

    def widen(self, stored: NDArray[Any]) -> Array:  # [..., width] -> [..., n]
        """The values of what was sent, until the next call."""
        return stored


class _Float16Codec(Codec):
    """float16: 11 bits of precision, up to 65504."""

    dtype = np.dtype("<f2")
    exact = False

    def __init__(self, n_frames: int, n: int) -> None:
        super().__init__(n_frames, n)
        self._wide = np.empty(self._n_all, np.float32)

    def narrow(self, x: Array, out: NDArray[Any]) -> None:
        with np.errstate(over="ignore"):  # becomes infinite
            np.copyto(out, x, casting="same_kind")

    def widen(self, stored: NDArray[Any]) -> Array:
        out = self._wide[: stored.size].reshape(stored.shape)
        np.copyto(out, stored)
        return out


class _Bfloat16Codec(Codec):
    """bfloat16: 8 bits of precision, float32's range. Rounds to nearest, ties to even.

    A NaN whose bits are all ones would become a zero; processors make NaNs of other bits.
    """

    dtype = np.dtype("<u2")
    exact = False

    def __init__(self, n_frames: int, n: int) -> None:
        super().__init__(n_frames, n)
        self._bits = np.empty(self._n_all, np.uint32)

    def narrow(self, x: Array, out: NDArray[Any]) -> None:
        bits, source = self._bits[: x.size].reshape(x.shape), x.view(np.uint32)
        np.right_shift(source, 16, out=bits)
        bits &= 1
        bits += 0x7FFF
        bits += source
        bits >>= 16
        np.copyto(out, bits, casting="same_kind")

    def widen(self, stored: NDArray[Any]) -> Array:
        bits = self._bits[: stored.size].reshape(stored.shape)
        np.copyto(bits, stored)
        bits <<= 16
        return bits.view(np.float32)


class _EightBitCodec(Codec):
    """Blocks of 32 int8 codes with one scale: 8.5 bits a number. A number is its code times the scale.

    A frame has the codes of all blocks, the last one filled up with zeros, then the scales as bfloat16. That
    has float32's range: with float16, blocks beyond 8e6 would be lost, and those below 1e-2 be coarse. Scales
    are rounded up, so that a block's largest number has a code. Errors are at most half a step, 0.4 % of that
    number. A block with something that is not finite is all NaN.
    """

    dtype = np.dtype("<u1")
    exact = False

    def __init__(self, n_frames: int, n: int) -> None:
        super().__init__(n_frames, n)
        self._n, n_blocks = n, -(-n // _BLOCK)
        self._n_codes = n_blocks * _BLOCK
        self.width = self._n_codes + 2 * n_blocks
        self._wide, self._spare = np.empty((2, n_frames * self._n_codes), np.float32)
        self._starts = np.arange(0, self._wide.size, _BLOCK)

    def narrow(self, x: Array, out: NDArray[Any]) -> None:
        wide = self._rows(x.shape[:-1], x.size // self._n)
        wide[..., : self._n] = x
        wide[..., self._n :] = 0
        # `reduceat` takes a quarter of the time of `max` along so short an axis.
        absolute = np.abs(wide.reshape(-1), out=self._spare[: wide.size])
        scales = np.maximum.reduceat(absolute, self._starts[: wide.size // _BLOCK])
        scales *= np.float32(1 / _HIGHEST)
        np.maximum(scales, _SMALLEST, out=scales)  # of zeros
        scales[~np.isfinite(scales)] = np.nan
        bits = scales.view(np.uint32)
        bits += 0xFFFF
        bits &= 0xFFFF0000
        stored = self._scales(out)
        np.right_shift(bits.reshape(stored.shape), 16, out=stored, casting="same_kind")
        blocks = wide.reshape(-1, _BLOCK)
        blocks /= scales[:, None]
        np.rint(wide, out=wide)
        with np.errstate(invalid="ignore"):  # NaN has no code, and its scale says so
            np.copyto(self._codes(out), wide, casting="unsafe")

    def widen(self, stored: NDArray[Any]) -> Array:
        wide = self._rows(stored.shape[:-1], stored.size // self.width)
        np.copyto(wide, self._codes(stored))
        scales = self._scales(stored).astype(np.uint32)
        scales <<= 16
        blocks = wide.reshape(*scales.shape, _BLOCK)
        blocks *= scales.view(np.float32)[..., None]
        return wide[..., : self._n]

    def _rows(self, shape: tuple[int, ...], n_rows: int) -> Array:  # [*shape, n_codes]
        return self._wide[: n_rows * self._n_codes].reshape(*shape, self._n_codes)

    def _codes(self, stored: NDArray[Any]) -> NDArray[Any]:
        return stored[..., : self._n_codes].view(np.int8)

    def _scales(self, stored: NDArray[Any]) -> NDArray[Any]:
        return stored[..., self._n_codes :].view("<u2")


CODECS: dict[str, type[Codec]] = {
    "f32": Codec,
    "f16": _Float16Codec,
    "bf16": _Bfloat16Codec,
    "q8": _EightBitCodec,
}
