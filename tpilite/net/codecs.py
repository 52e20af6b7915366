"""The types in which the numbers of a sum travel."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.arrays import Array


class Codec:
    """float32 as it travels: itself. At most `n` numbers at a time."""

    dtype: Any = np.dtype("<f4")
    exact = True

    def __init__(self, n: int) -> None:
        pass

    def narrow(self, x: Array, out: NDArray[Any]) -> None:
        """Puts `x` as it is sent into `out`, of the same shape."""
        np.copyto(out, x)

    def widen(self, stored: NDArray[Any]) -> Array:
        """The values of what was sent, until the next call."""
        return stored


class _Float16Codec(Codec):
    """float16: 11 bits of precision, up to 65504."""

    dtype = np.dtype("<f2")
    exact = False

    def __init__(self, n: int) -> None:
        self._wide = np.empty(n, np.float32)

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

    def __init__(self, n: int) -> None:
        self._bits = np.empty(n, np.uint32)

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


CODECS: dict[str, type[Codec]] = {"f32": Codec, "f16": _Float16Codec, "bf16": _Bfloat16Codec}
