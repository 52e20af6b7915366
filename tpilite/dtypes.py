"""How weights are stored, by the names that files give ("F32", "Q4_K"), and how many bytes they take."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# NumPy does not know bfloat16: it comes as uint16 holding its bits.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


class BlockSize(NamedTuple):
    """How many weights lie together in a block, and the bytes that it takes. Rows are whole blocks."""

    n_weights: int
    n_bytes: int


# GGML's block types, by its names. `linear.block_types` says what is in a block.
BLOCK_SIZES: dict[str, BlockSize] = {
    "Q4_0": BlockSize(32, 18),
    "Q4_1": BlockSize(32, 20),
    "Q5_0": BlockSize(32, 22),
    "Q5_1": BlockSize(32, 24),
    "Q8_0": BlockSize(32, 34),
    "IQ4_NL": BlockSize(32, 18),
    "Q2_K": BlockSize(256, 84),
    "Q3_K": BlockSize(256, 110),
    "Q4_K": BlockSize(256, 144),
    "Q5_K": BlockSize(256, 176),
    "Q6_K": BlockSize(256, 210),
    "IQ4_XS": BlockSize(256, 136),
}


def block_size(dtype: str) -> BlockSize:
    """The smallest piece of a row that has bytes of its own: a block, or one number. Raises `KeyError`."""
    return BLOCK_SIZES.get(dtype) or BlockSize(1, DTYPES[dtype].itemsize)


def n_bytes_of(dtype: str, shape: Sequence[int]) -> int:
    """The bytes of weights of a shape whose rows are whole blocks. Raises `KeyError`."""
    n_weights, n_bytes = block_size(dtype)
    return math.prod(shape) // n_weights * n_bytes
