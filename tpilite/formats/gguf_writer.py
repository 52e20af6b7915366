"""Writes a GGUF file (version 3) piece by piece: the header at once, then the tensors' bytes in its order."""

import struct
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.formats.gguf import (
    ARRAY,
    BOOL,
    DEFAULT_ALIGNMENT,
    MAGIC,
    STRING,
    TENSOR_TYPES,
    VALUE_TYPES,
    VERSIONS,
)
from tpilite.formats.writing import FileWriter, TensorSpec

_TYPE_NUMBERS = {name: number for number, name in TENSOR_TYPES.items()}
_VALUE_NUMBERS = {dtype: number for number, dtype in VALUE_TYPES.items() if number != BOOL}


class GgufWriter(FileWriter):
    """A new GGUF file; `write` takes the tensors' bytes, whole or in pieces, in the order of `specs`.

    Values of the metadata become the narrowest usual type: whole numbers u32, or i32, u64, i64 where they do
    not fit; other numbers f32; NumPy's numbers and arrays keep theirs; lists are arrays.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, Any]) -> None:
        self._alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
        raw = bytearray(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(specs), len(metadata)))
        for key, value in metadata.items():
            raw += _string(key) + _typed(value)
        offset, ends = 0, []
        for spec in specs:
            dims = spec.shape[::-1]
            raw += _string(spec.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
            raw += struct.pack("<IQ", _TYPE_NUMBERS[spec.dtype], offset)
            ends.append(offset + spec.nbytes)
            offset = self._aligned(ends[-1])
        raw += bytes(self._aligned(len(raw)) - len(raw))
        super().__init__(path, len(raw) + offset)
        self._ends = deque(len(raw) + end for end in ends)
        try:
            super().write(bytes(raw))
        except BaseException:
            self.abandon()
            raise

    def write(self, data: "bytes | NDArray[Any]") -> None:
        """Appends bytes, or a C-contiguous array's, of one tensor."""
        super().write(data)
        while self._ends and self.nbytes >= self._ends[0]:
            assert self.nbytes == self._ends.popleft(), "bytes of two tensors at once"
            super().write(bytes(self._aligned(self.nbytes) - self.nbytes))

    def _aligned(self, offset: int) -> int:
        return -(-offset // self._alignment) * self._alignment


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any) -> bytes:
    """A value of the metadata, its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list) and value and isinstance(value[0], str):
        strings = b"".join(map(_string, value))
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + strings
    numbers = value if isinstance(value, np.ndarray | np.generic) else _narrowest(value)
    kind = BOOL if numbers.dtype == bool else _VALUE_NUMBERS[numbers.dtype.newbyteorder("<")]
    raw = numbers.astype(VALUE_TYPES[kind]).tobytes()
    if numbers.ndim:
        return struct.pack("<IIQ", ARRAY, kind, numbers.size) + raw
    return struct.pack("<I", kind) + raw


def _narrowest(value: Any) -> "NDArray[Any]":
    """A number, or a list of them, as the usual type that holds them."""
    found = np.asarray(value)
    if found.dtype.kind == "f":
        return found.astype(np.float32)
    kinds = (np.uint32, np.int32, np.uint64, np.int64)
    fitting = (k for k in kinds if found.size == 0 or np.array_equal(found.astype(k), found))
    return found if found.dtype == bool else found.astype(next(fitting))
