"""GGML's block types: weights in a few bits each, in blocks that share scales, and their values in float32.

A block holds 32 or 256 weights that lie side by side in a row. A weight is a small integer, its code. With
its group, 16 or 32 weights of the block, it shares a scale and, in some types, an offset:

    weight = scale * code - offset

each operation rounded to float32. In blocks of 256 the scale of a group is itself a product of a small
integer and the block's float16. Values are those of the Python package `gguf`, bit for bit (NaN is NaN).

    type     bits   block: fields in their order, with their sizes in bytes
    Q4_0      4.5   scale:2 codes:16, each byte two codes: of weight j and of weight j + 16; code - 8
    Q4_1      5     scale:2 -offset:2 codes:16
    Q5_0      5.5   scale:2 fifth bits:4 codes:16; code - 16
    Q5_1      6     scale:2 -offset:2 fifth bits:4 codes:16
    Q8_0      8.5   scale:2 codes:32, signed
    IQ4_NL    4.5   scale:2 codes:16, which are places in a table
    Q2_K      2.6   group scales and offsets:16 codes:64 scale:2 offset:2
    Q3_K      3.4   third bits:32 codes:64 group scales:12 scale:2
    Q4_K      4.5   scale:2 offset:2 group scales and offsets:12 codes:128
    Q5_K      5.5   scale:2 offset:2 group scales and offsets:12 fifth bits:32 codes:128
    Q6_K      6.6   lower four bits:128 upper two bits:64 group scales:16, signed, scale:2; code - 32
    IQ4_XS    4.3   scale:2 group scales, upper bits:2 lower bits:4 codes:128, which are places in a table
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.arrays import Array
from tpilite.dtypes import BLOCK_SIZES

Bytes = NDArray[np.uint8]
Codes = NDArray[Any]  # integers

# Of each group of a block, [n, groups]: what its codes are multiplied by, and what is taken away then.
Scales = tuple[Array, Array | None]

_TABLE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_LOWER, _UPPER = np.tile(_TABLE, 16), np.repeat(_TABLE, 16)  # of a byte's halves

_ONE, _THREE = np.uint8(1), np.uint8(3)
_BIT = np.arange(8, dtype=np.uint8)[:, None]
_PAIR_OF_BITS = np.arange(0, 8, 2, dtype=np.uint8)[:, None]


@dataclass(frozen=True)
class BlockType:
    """How its blocks become numbers; `codes` writes their codes, as float32, into its second argument."""

    name: str
    n_weights: int  # in a block
    n_bytes: int
    codes: Callable[[Bytes, Array], None]  # [n, n_bytes], [n, n_weights]
    scales: Callable[[Bytes], Scales]

    def dequantize(self, blocks: Bytes) -> Array:  # [n, n_bytes] -> [n, n_weights]
        """The weights of the blocks, in a new array."""
        out = np.empty((len(blocks), self.n_weights), np.float32)
        with np.errstate(all="ignore"):  # infinite scales, NaN: they show in the result
            self.widen(blocks, out)
        return out

    def widen(self, blocks: Bytes, out: Array) -> None:  # [n, n_bytes], [n, n_weights]
        """Writes the weights of the blocks into `out`. NumPy may warn of infinities and NaN."""
        self.codes(blocks, out)
        scale, offset = self.scales(blocks)
        groups = out.reshape(*scale.shape, self.n_weights // scale.shape[1])
        np.multiply(groups, scale[:, :, None], out=groups)
        if offset is not None:
            np.subtract(groups, offset[:, :, None], out=groups)


def _float16(blocks: Bytes, at: int) -> Array:  # [n, 1]
    return blocks[:, at : at + 2].view(np.float16).astype(np.float32)


def _scale(blocks: Bytes) -> Scales:
    return _float16(blocks, 0), None


def _scale_and_minimum(blocks: Bytes) -> Scales:
    return _float16(blocks, 0), -_float16(blocks, 2)


def _halves(codes: Bytes, width: int) -> Bytes:  # [n, m] -> [n, m / width, 2, width]
    """Of each `width` bytes the lower halves, then the upper ones."""
    codes = codes.reshape(len(codes), codes.shape[1] // width, width)
    found = np.empty((*codes.shape[:2], 2, width), np.uint8)
    np.bitwise_and(codes, 15, out=found[:, :, 0])
    np.right_shift(codes, 4, out=found[:, :, 1])
    return found


def _put(codes: Codes, out: Array) -> None:
    np.copyto(out.reshape(codes.shape), codes)


def _put_halves(codes: Bytes, width: int, out: Array) -> None:
    """As `_halves`, but without holding all of them at once."""
    codes = codes.reshape(len(codes), codes.shape[1] // width, width)
    halves = out.reshape(*codes.shape[:2], 2, width)
    np.copyto(halves[:, :, 0], codes & 15)
    np.copyto(halves[:, :, 1], codes >> 4)


def _put_from_table(codes: Bytes, width: int, out: Array) -> None:
    codes = codes.reshape(len(codes), codes.shape[1] // width, width)
    halves = out.reshape(*codes.shape[:2], 2, width)
    halves[:, :, 0] = _LOWER[codes]
    halves[:, :, 1] = _UPPER[codes]


# ---- blocks of 32 ----


def _q8_0(blocks: Bytes, out: Array) -> None:
    _put(blocks[:, 2:].view(np.int8), out)


def _q4_0(blocks: Bytes, out: Array) -> None:
    _put_halves(blocks[:, 2:], 16, out)
    np.subtract(out, 8, out=out)


def _q4_1(blocks: Bytes, out: Array) -> None:
    _put_halves(blocks[:, 4:], 16, out)


def _five_bits(blocks: Bytes, at: int) -> Bytes:  # [n, 32]
    codes = _halves(blocks[:, at + 4 :], 16).reshape(-1, 32)
    codes |= np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4
    return codes


def _q5_0(blocks: Bytes, out: Array) -> None:
    _put(_five_bits(blocks, 2).view(np.int8) - np.int8(16), out)


def _q5_1(blocks: Bytes, out: Array) -> None:
    _put(_five_bits(blocks, 4), out)


def _iq4_nl(blocks: Bytes, out: Array) -> None:
    _put_from_table(blocks[:, 2:], 16, out)


# ---- blocks of 256 ----


def _two_bits(codes: Bytes) -> Bytes:  # [n, 64] -> [n, 2, 4, 32]
    """Of each 32 bytes the lowest two bits, then the next ones, and so on."""
    bits: Bytes = codes.reshape(-1, 2, 1, 32) >> _PAIR_OF_BITS & _THREE
    return bits


def _one_bit(codes: Bytes) -> Bytes:  # [n, 32] -> [n, 8, 32]
    """The lowest bits of the bytes, then the next ones, and so on."""
    bits: Bytes = codes[:, None] >> _BIT & _ONE
    return bits


def _q2_k(blocks: Bytes, out: Array) -> None:
    _put(_two_bits(blocks[:, 16:80]), out)


def _q2_k_scales(blocks: Bytes) -> Scales:
    both = blocks[:, :16]
    return _float16(blocks, 80) * (both & 15), _float16(blocks, 82) * (both >> 4)


def _q3_k(blocks: Bytes, out: Array) -> None:
    codes = _two_bits(blocks[:, 32:96]).reshape(-1, 8, 32)
    codes += _one_bit(blocks[:, :32]) << 2
    _put(codes.view(np.int8) - np.int8(4), out)


def _q3_k_scales(blocks: Bytes) -> Scales:
    lower = _halves(blocks[:, 96:104], 8).reshape(-1, 16)
    upper = blocks[:, None, 104:108] >> _PAIR_OF_BITS & 3
    codes = lower | upper.reshape(-1, 16) << 4
    return _float16(blocks, 108) * (codes.view(np.int8) - np.int8(32)), None


def _q4_k(blocks: Bytes, out: Array) -> None:
    _put_halves(blocks[:, 16:], 32, out)


def _q5_k(blocks: Bytes, out: Array) -> None:
    codes = _halves(blocks[:, 48:], 32).reshape(-1, 8, 32)
    codes |= _one_bit(blocks[:, 16:48]) << 4
    _put(codes, out)


def _q4_k_scales(blocks: Bytes) -> Scales:
    """From twelve bytes, six bits for each scale and offset: those of groups 4 to 7 lie in two places."""
    scale, offset, both = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = np.hstack((scale & 63, both & 15 | scale >> 2 & 48))
    offsets = np.hstack((offset & 63, both >> 4 | offset >> 2 & 48))
    return _float16(blocks, 0) * scales, _float16(blocks, 2) * offsets


def _q6_k(blocks: Bytes, out: Array) -> None:
    codes = _halves(blocks[:, :128], 64).reshape(-1, 2, 4, 32)
    codes |= _two_bits(blocks[:, 128:192]) << 4
    _put(codes.view(np.int8) - np.int8(32), out)


def _q6_k_scales(blocks: Bytes) -> Scales:
    return _float16(blocks, 208) * blocks[:, 192:208].view(np.int8), None


def _iq4_xs(blocks: Bytes, out: Array) -> None:
    _put_from_table(blocks[:, 8:], 16, out)


def _iq4_xs_scales(blocks: Bytes) -> Scales:
    codes = blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15
    codes = codes.reshape(-1, 8) | (blocks[:, 2:4, None] >> _PAIR_OF_BITS[:, 0] & 3).reshape(-1, 8) << 4
    return _float16(blocks, 0) * (codes.view(np.int8) - np.int8(32)), None


BLOCK_TYPES = {
    name: BlockType(name, *BLOCK_SIZES[name], codes, scales)
    for name, (codes, scales) in {
        "Q4_0": (_q4_0, _scale),
        "Q4_1": (_q4_1, _scale_and_minimum),
        "Q5_0": (_q5_0, _scale),
        "Q5_1": (_q5_1, _scale_and_minimum),
        "Q8_0": (_q8_0, _scale),
        "IQ4_NL": (_iq4_nl, _scale),
        "Q2_K": (_q2_k, _q2_k_scales),
        "Q3_K": (_q3_k, _q3_k_scales),
        "Q4_K": (_q4_k, _q4_k_scales),
        "Q5_K": (_q5_k, _q4_k_scales),
        "Q6_K": (_q6_k, _q6_k_scales),
        "IQ4_XS": (_iq4_xs, _iq4_xs_scales),
    }.items()
}
