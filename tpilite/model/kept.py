"""How keys and values are kept: the d numbers of a head's position as float32, as float16 or in eight bits.

    f32    [K, S, d], and nothing is lost
    f16    [K, S, d]: 11 bits of precision, up to 65504
    q8_0   [K, S] records of int8 codes and float16 scales, in blocks as large as divide a head, at most 32:
           for heads of 64 or 128, 8.5 bits a number. A number is its code times its block's scale

A head has whole blocks, as most heads' sizes are multiples of 32, and others (80, 100) of something little
smaller: no padding, and one rule for all. Errors are half a scale, 0.4 % of a block's largest number as long
as that is above 1e-2. What is beyond 8e6 or not finite makes its block NaN.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.arrays import Array
from tpilite.linear.matrix import FLOAT16_LIFT, float16_bits

KV_DTYPES = ("f32", "f16", "q8_0")

Kept = NDArray[Any]

# What is not float32 is widened in pieces that stay in any second-level cache.
_WIDENED_BYTES = 256 << 10

_LARGEST_BLOCK = 32
_HIGHEST = 127  # the code of a block's largest number, of either sign
_LEAST = np.float32(2.0**-24)  # as float16; its numbers below 6e-5 are so far apart


def kept_dtype(name: str, head_dim: int) -> np.dtype[Any]:
    """The dtype of one head's position, by its name in KV_DTYPES: an array of it is [K, S] of these."""
    if name == "f32":
        return np.dtype((np.float32, (head_dim,)))
    if name == "f16":
        return np.dtype((np.float16, (head_dim,)))
    block = max(n for n in range(1, _LARGEST_BLOCK + 1) if head_dim % n == 0)
    return np.dtype([("scales", "<f2", (head_dim // block,)), ("codes", "i1", (head_dim,))])


def keep(x: Array, out: Kept) -> None:  # [K, T, d], [K, T]
    """Puts `x` into `out` as that keeps numbers."""
    with np.errstate(over="ignore", invalid="ignore"):  # what float16 or a code cannot hold
        if out.dtype.names is None:
            out[...] = x
        else:
            _round(x, out["codes"], out["scales"])


def _round(x: Array, codes: NDArray[Any], scales: NDArray[Any]) -> None:
    blocks = _in_blocks(x, scales)
    wanted = np.abs(blocks).max(-1) / np.float32(_HIGHEST)
    scales[...] = np.maximum(wanted + _LEAST / 2, _LEAST)  # rounded up where that counts: no code above 127
    scales[~np.isfinite(scales)] = np.nan
    codes[...] = np.rint(blocks / scales.astype(np.float32)[..., None]).reshape(x.shape)


def _in_blocks(x: Array, scales: NDArray[Any]) -> Array:  # [K, S, d], [K, S, n] -> [K, S, n, d / n]
    return x.reshape(*scales.shape, x.shape[-1] // scales.shape[-1])


def widened(
    kept: Kept, d: int, n_tiled: int
) -> Iterator[tuple[slice, np.float32, Array]]:  # [K, S] -> slice, [K, s, d]
    """What was kept, as float32, in parts by position that fit the cache; each times `lift` is the value.

    The parts do not depend on how many of `n_tiled` heads these are. One is there until the next.
    """
    n_heads, n_cached = kept.shape[:2]
    if kept.dtype == np.float32:
        yield slice(0, n_cached), np.float32(1), kept
        return
    size = max(16, _WIDENED_BYTES // (4 * n_tiled * d))
    scratch = np.empty((n_heads, min(size, n_cached), d), np.float32)
    for start in range(0, n_cached, size):
        part = slice(start, min(start + size, n_cached))
        some, out = kept[:, part], scratch[:, : part.stop - start]
        if kept.dtype == np.float16:
            yield part, FLOAT16_LIFT, float16_bits(some, out)
        else:
            yield part, np.float32(1), _widen(some["codes"], some["scales"], out)


def _widen(codes: NDArray[Any], scales: NDArray[Any], out: Array) -> Array:
    np.copyto(out, codes)
    blocks = _in_blocks(out, scales)
    blocks *= scales.astype(np.float32)[..., None]
    return out
