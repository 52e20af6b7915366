"""Random rows of GGML's block types."""

import numpy as np

from tpilite.linear.block_types import BLOCK_TYPES
from tpilite.linear.matrix import Blocks

# Where the float16 of a block are: its scale, and its offset where it has one.
FLOAT16_PLACES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "IQ4_NL": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_XS": [0],
}


def random_blocks(rng, name, n_rows, n_cols):
    """Rows with any codes, and scales of either sign that are as large as those of models."""
    kind = BLOCK_TYPES[name]
    n_blocks = n_cols // kind.n_weights
    rows = rng.integers(0, 256, (n_rows * n_blocks, kind.n_bytes), np.uint8)
    for place in FLOAT16_PLACES[name]:
        scales = rng.uniform(-1, 1, (len(rows), 1)) * 0.01
        rows[:, place : place + 2] = scales.astype("<f2").view(np.uint8)
    return Blocks(kind, rows.reshape(n_rows, n_blocks * kind.n_bytes), n_cols)
