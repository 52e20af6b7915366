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

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.arrays import Array
from tpilite.dtypes import BLOCK_SIZES

Bytes = NDArray[np.uint8]
Codes = NDArray[Any]  # integers, or the values that a table has for them

# Of each group of a block, [n, groups]: what its codes are multiplied by, and what is taken away then.
Scales = tuple[Array, Array | None]

_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_BIT = np.arange(8, dtype=np.uint8)[:, None, None]
_PAIR_OF_BITS = np.arange(0, 8, 2, dtype=np.uint8)[:, None, None]

# NumPy copies numbers of 16 bytes ten times as fast as rows of 16 numbers of one byte.
_SIXTEEN_BYTES = "V16"


class Spare:
    """Memory for what is needed for a moment. Taking it anew each time costs more than what is done in it."""

    BYTES_PER_WEIGHT = 3  # the most that a type takes

    def __init__(self, memory: Bytes) -> None:
        self._left = memory

    @classmethod
    def new(cls, n_weights: int) -> "Spare":
        return cls(np.empty(n_weights * cls.BYTES_PER_WEIGHT, np.uint8))

    def take(self, *shape: int) -> Bytes:
        n = math.prod(shape)
        taken, self._left = self._left[:n], self._left[n:]
        return taken.reshape(shape)


@dataclass(frozen=True)
class BlockType:
    """How blocks of one type become numbers."""

    name: str
    n_weights: int  # in a block
    n_bytes: int
    group: int  # weights that share a scale
    codes: Callable[[Bytes, Spare], Codes]  # [n, n_bytes] -> [n, ...], whose numbers are [n, n_weights]
    scales: Callable[[Bytes], Scales]

    def dequantize(self, blocks: Bytes) -> Array:  # [n, n_bytes] -> [n, n_weights]
        """The weights of the blocks, in a new array."""
        out = np.empty((len(blocks), self.n_weights), np.float32)
        if out.size:
            with np.errstate(all="ignore"):  # infinite scales, NaN: they show in the result
                self.widen(blocks, out, Spare.new(out.size))
        return out

    def widen(self, blocks: Bytes, out: Array, spare: Spare) -> None:  # [n, n_bytes], [rows, n_cols]
        """Writes the weights of the blocks into `out`. NumPy may warn of infinities and NaN."""
        self.widen_codes(blocks, out, spare)
        groups = out.reshape(len(out), -1, self.group)
        scale, offset = self.scales(blocks)
        np.multiply(groups, scale.reshape(*groups.shape[:2], 1), out=groups)
        if offset is not None:
            np.subtract(groups, offset.reshape(*groups.shape[:2], 1), out=groups)

    def widen_codes(self, blocks: Bytes, out: Array, spare: Spare) -> None:  # [n, n_bytes], [rows, n_cols]
        """Writes the codes of the blocks into `out`."""
        codes = self.codes(blocks, spare)
        shape = len(out), len(blocks) // len(out), *codes.shape[1:]
        np.copyto(out.reshape(shape), codes.reshape(shape))


def _float16(blocks: Bytes, at: int) -> Array:  # [n, 1]
    return blocks[:, at : at + 2].view(np.float16).astype(np.float32)


def _scale(blocks: Bytes) -> Scales:
    return _float16(blocks, 0), None


def _scale_and_minimum(blocks: Bytes) -> Scales:
    return _float16(blocks, 0), -_float16(blocks, 2)


def _runs(field: Bytes, width: int, spare: Spare) -> Bytes:  # [n, m] -> [m / width, n, width]
    """The field in runs of `width` bytes, each run of all blocks together: NumPy likes long rows."""
    n, m = field.shape
    runs = spare.take(m // width, n, width)
    if width == 16:
        np.copyto(runs.view(_SIXTEEN_BYTES)[:, :, 0], field.view(_SIXTEEN_BYTES).T)
    else:
        np.copyto(runs, field.reshape(n, m // width, width).transpose(1, 0, 2))
    return runs


def _in_order(runs: Bytes, spare: Spare) -> Bytes:  # [groups, n, width] -> [n, groups, width]
    if runs.shape[2] != 16:
        return runs.transpose(1, 0, 2)
    groups = spare.take(runs.shape[1], len(runs), 16)
    np.copyto(groups.view(_SIXTEEN_BYTES)[:, :, 0], runs.view(_SIXTEEN_BYTES)[:, :, 0].T)
    return groups


def _halves(field: Bytes, width: int, spare: Spare) -> Bytes:  # [n, m] -> [2 m / width, n, width]
    """Of each run of `width` bytes the lower halves, then the upper ones."""
    runs = _runs(field, width, spare)
    halves = spare.take(len(runs), 2, *runs.shape[1:])
    np.bitwise_and(runs, 15, out=halves[:, 0])
    np.right_shift(runs, 4, out=halves[:, 1])
    return halves.reshape(-1, *runs.shape[1:])


def _bits(field: Bytes, shifts: Bytes, mask: int, spare: Spare) -> Bytes:  # [n, 32 k] -> [k * shifts, n, 32]
    """Of each run of 32 bytes the bits under the mask after each of the shifts."""
    runs = _runs(field, 32, spare)
    bits = spare.take(len(runs), len(shifts), *runs.shape[1:])
    np.right_shift(runs[:, None], shifts, out=bits)
    np.bitwise_and(bits, mask, out=bits)
    return bits.reshape(-1, *runs.shape[1:])


def _add_upper(codes: Bytes, upper: Bytes, place: int) -> None:
    """Bits above those of the codes. NumPy multiplies bytes faster than it shifts them to the left."""
    np.multiply(upper, place, out=upper)
    np.bitwise_or(codes, upper, out=codes)


def _signed(codes: Bytes, offset: int) -> Codes:
    np.subtract(codes, offset, out=codes)  # modulo 256
    return codes.view(np.int8)


# ---- blocks of 32 ----


def _q8_0(blocks: Bytes, _: Spare) -> Codes:
    return blocks[:, 2:].view(np.int8)


def _q4_0(blocks: Bytes, spare: Spare) -> Codes:
    return _signed(_in_order(_halves(blocks[:, 2:], 16, spare), spare), 8)


def _q4_1(blocks: Bytes, spare: Spare) -> Codes:
    return _in_order(_halves(blocks[:, 4:], 16, spare), spare)


def _five_bits(blocks: Bytes, at: int, spare: Spare) -> Bytes:  # [n, 2, 16]
    codes = _in_order(_halves(blocks[:, at + 4 :], 16, spare), spare)
    fifth = np.unpackbits(blocks[:, at : at + 4].reshape(-1), bitorder="little").reshape(codes.shape)
    _add_upper(codes, fifth, 16)
    return codes


def _q5_0(blocks: Bytes, spare: Spare) -> Codes:
    return _signed(_five_bits(blocks, 2, spare), 16)


def _q5_1(blocks: Bytes, spare: Spare) -> Codes:
    return _five_bits(blocks, 4, spare)


@cache
def _pairs_in_table() -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """What the table has for the lower and for the upper halves of two bytes, as two bytes."""
    pairs = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    table = np.array(_TABLE, np.int8)
    return table[pairs & 15].view(np.uint16), table[pairs >> 4].view(np.uint16)


def _from_table(field: Bytes, spare: Spare) -> Codes:  # [n, m] -> [n, m / 8, 16]
    runs = _runs(field, 16, spare).view(np.uint16)
    halves = spare.take(len(runs), 2, runs.shape[1], 16)
    for half, table in enumerate(_pairs_in_table()):
        halves[:, half].view(np.uint16)[...] = np.take(table, runs, mode="clip")
    return _in_order(halves.reshape(-1, runs.shape[1], 16), spare).view(np.int8)


def _iq4_nl(blocks: Bytes, spare: Spare) -> Codes:
    return _from_table(blocks[:, 2:], spare)


# ---- blocks of 256 ----


def _q2_k(blocks: Bytes, spare: Spare) -> Codes:
    return _in_order(_bits(blocks[:, 16:80], _PAIR_OF_BITS, 3, spare), spare)


def _q2_k_scales(blocks: Bytes) -> Scales:
    both = blocks[:, :16]
    return _float16(blocks, 80) * (both & 15), _float16(blocks, 82) * (both >> 4)


def _q3_k(blocks: Bytes, spare: Spare) -> Codes:
    codes = _bits(blocks[:, 32:96], _PAIR_OF_BITS, 3, spare)
    _add_upper(codes, _bits(blocks[:, :32], _BIT, 1, spare), 4)
    return _signed(_in_order(codes, spare), 4)


def _q3_k_scales(blocks: Bytes) -> Scales:
    lower = blocks[:, None, 96:104] >> _PAIR_OF_BITS[:3:2, 0] & 15
    upper = blocks[:, None, 104:108] >> _PAIR_OF_BITS[:, 0] & 3
    codes = lower.reshape(-1, 16) | upper.reshape(-1, 16) << 4
    return _float16(blocks, 108) * (codes.view(np.int8) - np.int8(32)), None


def _q4_k(blocks: Bytes, spare: Spare) -> Codes:
    return _in_order(_halves(blocks[:, 16:], 32, spare), spare)


def _q5_k(blocks: Bytes, spare: Spare) -> Codes:
    codes = _halves(blocks[:, 48:], 32, spare)
    _add_upper(codes, _bits(blocks[:, 16:48], _BIT, 1, spare), 16)
    return _in_order(codes, spare)


def _q4_k_scales(blocks: Bytes) -> Scales:
    """From twelve bytes, six bits for each scale and offset: those of groups 4 to 7 lie in two places."""
    # Four groups at a time, in numbers of 32 bits.
    scale, offset, both = np.ascontiguousarray(blocks[:, 4:16].view(np.uint32).T)
    codes = np.empty((2, len(blocks), 2), np.uint32)
    codes[0, :, 0] = scale & 0x3F3F3F3F
    codes[0, :, 1] = both & 0x0F0F0F0F | scale >> 2 & 0x30303030
    codes[1, :, 0] = offset & 0x3F3F3F3F
    codes[1, :, 1] = both >> 4 & 0x0F0F0F0F | offset >> 2 & 0x30303030
    scales = codes.view(np.uint8).astype(np.float32)
    scales *= blocks[:, :4].view(np.float16).T.astype(np.float32)[:, :, None]
    return scales[0], scales[1]


def _q6_k(blocks: Bytes, spare: Spare) -> Codes:
    upper = _bits(blocks[:, 128:192], _PAIR_OF_BITS, 3, spare)
    # The lower halves of 64 bytes come first, then their upper ones: two runs of each.
    runs = _halves(blocks[:, :128], 32, spare).reshape(2, 2, 2, -1, 32).transpose(0, 2, 1, 3, 4)
    _add_upper(runs, upper.reshape(runs.shape), 16)
    return np.moveaxis(_signed(runs, 32), 3, 0)


def _q6_k_scales(blocks: Bytes) -> Scales:
    return _float16(blocks, 208) * blocks[:, 192:208].view(np.int8), None


def _iq4_xs(blocks: Bytes, spare: Spare) -> Codes:
    return _from_table(blocks[:, 8:], spare)


def _iq4_xs_scales(blocks: Bytes) -> Scales:
    lower = blocks[:, 4:8, None] >> _PAIR_OF_BITS[:3:2, 0, 0] & 15
    upper = blocks[:, 2:4, None] >> _PAIR_OF_BITS[:, 0, 0] & 3
    codes = lower.reshape(-1, 8) | upper.reshape(-1, 8) << 4
    return _float16(blocks, 0) * (codes.view(np.int8) - np.int8(32)), None


BLOCK_TYPES = {
    name: BlockType(name, *BLOCK_SIZES[name], group, codes, scales)
    for name, (group, codes, scales) in {
        "Q4_0": (32, _q4_0, _scale),
        "Q4_1": (32, _q4_1, _scale_and_minimum),
        "Q5_0": (32, _q5_0, _scale),
        "Q5_1": (32, _q5_1, _scale_and_minimum),
        "Q8_0": (32, _q8_0, _scale),
        "IQ4_NL": (32, _iq4_nl, _scale),
        "Q2_K": (16, _q2_k, _q2_k_scales),
        "Q3_K": (16, _q3_k, _q3_k_scales),
        "Q4_K": (32, _q4_k, _q4_k_scales),
        "Q5_K": (32, _q5_k, _q4_k_scales),
        "Q6_K": (16, _q6_k, _q6_k_scales),
        "IQ4_XS": (32, _iq4_xs, _iq4_xs_scales),
    }.items()
}
