"""What packed rows hold."""

import numpy as np

from tpilite.linear.matrix import as_float32


def widened(found, start, stop):
    """The rows, as `linear` makes float32 of them, with the gap closed."""
    n_rows, n_cols = stop - start, found.shape[1]
    bits = np.full((n_rows, n_cols), 0x7FC0, np.uint16)
    found.unpack(start, stop, bits, np.empty(bits.size * 3 // 4, np.uint16))
    wide = as_float32(bits)
    places, values = found.exceptions(start, stop)
    wide.reshape(-1)[places] = values
    return np.ldexp(wide, found.gap)
