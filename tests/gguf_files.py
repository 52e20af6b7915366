"""GGUF files for the tests of whatever reads one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.formats.gguf_writer import GgufWriter
from tpilite.formats.writing import TensorSpec


def write_gguf(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...], NDArray[Any]]],
    metadata: Mapping[str, Any],
) -> Path:
    """Writes a new GGUF file of tensors (dtype, shape in weights, what is stored) by name."""
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape, _) in tensors.items()]
    writer = GgufWriter(path, specs, metadata)
    try:
        for _, _, stored in tensors.values():
            writer.write(np.ascontiguousarray(stored))
        writer.close()
    finally:
        writer.abandon()
    return path
