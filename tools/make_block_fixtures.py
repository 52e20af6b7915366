"""Makes tests/fixtures/block_types.npz: blocks of GGML's types and their values, by the `gguf` package.

    PYTHONPATH=tests python tools/make_block_fixtures.py

Development only: needs gguf. For each type, NAME holds blocks [n, n_bytes] and NAME.values the weights of all
[n, n_weights]: random blocks, blocks of equal bytes, and random codes with float16 scales that are zeros,
infinities, NaN, the largest and the smallest.
"""

from pathlib import Path

import gguf
import numpy as np
from block_rows import FLOAT16_PLACES

_OUT = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "block_types.npz"

_SPECIAL = [0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0x7BFF, 0xFBFF, 0x0001, 0x8001, 0x3C00]


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for name, places in FLOAT16_PLACES.items():
        kind = gguf.GGMLQuantizationType[name]
        n_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        n_special = len(places) * len(_SPECIAL)
        blocks = rng.integers(0, 256, (6 + n_special, n_bytes), np.uint8)
        for i, byte in enumerate((0x00, 0xFF, 0x55)):
            blocks[i] = byte
        for place in places:  # mostly scales as they are in models
            blocks[3:, place : place + 2] = _float16_bytes(rng.integers(0x1000, 0x2C00, len(blocks) - 3))
        for i in range(n_special):
            place = places[i // len(_SPECIAL)]
            blocks[6 + i, place : place + 2] = _float16_bytes(np.array([_SPECIAL[i % len(_SPECIAL)]]))
        with np.errstate(all="ignore"):
            values = gguf.dequantize(blocks, kind)
        arrays |= {name: blocks, f"{name}.values": values}
    np.savez_compressed(_OUT, **arrays)


def _float16_bytes(bits: np.ndarray) -> np.ndarray:
    return bits.astype("<u2")[:, None].view(np.uint8)


if __name__ == "__main__":
    main()
