"""Notes the errors of ggml's own quantizers, which ours must not exceed, for tests/quantize.

    python tools/make_quantizer_fixtures.py LIBGGML_BASE.so

The library is ggml's, as llama-cpp-python (MIT) builds it. The weights are those of tests/quantize.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np

from tpilite.linear.block_types import BLOCK_TYPES

_TYPE_NUMBERS = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
_FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "fixtures"


def main() -> None:
    """Quantizes the tests' weights with and without importance and writes the relative errors."""
    library = ctypes.CDLL(sys.argv[1])
    rows = (0.02 * np.random.default_rng(0).standard_t(5, (64, 512))).astype(np.float32)
    importance = np.random.default_rng(1).chisquare(2, 512).astype(np.float32) + np.float32(0.01)
    mean = np.sqrt(np.mean(rows.reshape(64, -1, 32) ** 2, axis=2)).repeat(32, axis=1)
    weighing = {"even": 1, "half": mean + np.abs(rows), "square": rows**2, "importance": importance}
    found: dict[str, dict[str, float]] = {}
    for name in _TYPE_NUMBERS:
        found[name] = {}
        for how, weight in weighing.items():
            values = quantized(library, name, rows, importance if how == "importance" else None)
            error = values.astype(np.float64) - rows
            relative = np.sqrt((weight * error**2).sum() / (weight * rows**2).sum())
            found[name][how] = round(float(relative), 6)
    (_FIXTURES / "ggml_quantizers.json").write_text(json.dumps(found, indent=1) + "\n")


def quantized(library: ctypes.CDLL, name: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """The values of the rows after ggml's quantizer."""
    kind = BLOCK_TYPES[name]
    out = np.empty((len(rows), rows.shape[1] // kind.n_weights * kind.n_bytes), np.uint8)
    library.ggml_quantize_chunk(
        ctypes.c_int(_TYPE_NUMBERS[name]),
        ctypes.c_void_p(rows.ctypes.data),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_int64(0),
        ctypes.c_int64(len(rows)),
        ctypes.c_int64(rows.shape[1]),
        ctypes.c_void_p(None if importance is None else importance.ctypes.data),
    )
    return kind.dequantize(out.reshape(-1, kind.n_bytes)).reshape(rows.shape)


if __name__ == "__main__":
    main()
