"""One safetensors file: its header checked, its tensors mapped or read, and new files written.

The format (https://github.com/huggingface/safetensors): eight bytes of little-endian length, a JSON header
of that length, then the tensors' bytes. The header maps each name to `dtype`, `shape` and `data_offsets`,
the first and the last byte (excluded) counted from the end of the header; `__metadata__` maps strings to
strings. The safetensors library cannot give BF16 to NumPy, so the header is read here: BF16 comes as
uint16 holding its bits.

Blocks of weights are none of its dtypes. They are kept as bytes: the tensor has dtype `U8` and shape [rows,
bytes of a row], and `__metadata__` has under the tensor's name the block type and how many weights a row
holds, as in "Q4_K 2048". Here such a tensor has the block type as its dtype and its shape in weights.

Nothing but the header is read when a file is opened. A header can name dtypes that are not known here, as
long as nobody asks for those tensors: checkpoints hold unused buffers.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from tpilite.dtypes import BLOCK_SIZES, DTYPES, n_bytes_of
from tpilite.formats.stored import StoredFile, StoredTensor, read_exactly
from tpilite.formats.writing import FileWriter, TensorSpec

# The limit of the safetensors library itself; a header takes some 150 bytes per tensor.
MAX_HEADER_BYTES = 100_000_000

# The data of a written file begins at a multiple of this, for direct I/O and so that its pages can be
# released without touching a neighbour's.
DATA_ALIGNMENT = 4096

# Far above any tensor that a file can hold, and below where NumPy's sizes overflow; a tensor without
# elements can claim such a shape. NumPy's own limit is 64 dimensions; no model has more than a few.
_MAX_ELEMENTS = 1 << 48
_MAX_DIMENSIONS = 8

_BYTES = "U8"


class TensorFile(StoredFile):
    """An open safetensors file. Raises `CheckpointError` when its header is not sound."""

    def _read_tensors(self) -> dict[str, StoredTensor]:
        """The tensors by name."""
        prefix = self.first_bytes(8)
        if len(prefix) < 8:
            raise self.error(f"expected at least 8 bytes, found {self.nbytes}")
        n_header = int.from_bytes(prefix, "little")
        if n_header > min(MAX_HEADER_BYTES, self.nbytes - 8):
            raise self.error(
                f"the header claims {n_header} bytes; expected at most {MAX_HEADER_BYTES} "
                f"and not more than the file's {self.nbytes}"
            )
        raw = bytearray(n_header)
        read_exactly(self, memoryview(raw), 8)
        try:
            header = json.loads(raw.decode(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self.error(f"the header is not valid JSON ({error})") from error
        if not isinstance(header, dict):
            raise self.error(f"the header must be a JSON object, found a {type(header).__name__}")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self.error("__metadata__ in the header must map strings to strings")
        tensors = {name: self._entry(name, entry, 8 + n_header) for name, entry in header.items()}
        for name in tensors.keys() & metadata.keys():
            tensors[name] = self._of_blocks(tensors[name], metadata[name])
        self.check_overlaps(tensors.values(), 8 + n_header)
        return tensors

    def _entry(self, name: str, entry: Any, data_offset: int) -> StoredTensor:
        """The tensor that an entry of the header describes; `data_offset` is where the header ends."""
        if not isinstance(entry, dict):
            raise self.error(f"the header entry of {name!r} must be an object, found {entry!r:.60}")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str):
            raise self.error(f"{name!r} has dtype {dtype!r:.60}; expected a string")
        if not _is_counts(shape):
            raise self.error(f"{name!r} has shape {shape!r:.60}; expected a list of whole numbers >= 0")
        if len(shape) > _MAX_DIMENSIONS or math.prod(size or 1 for size in shape) > _MAX_ELEMENTS:
            raise self.error(
                f"{name!r} has shape {shape!r:.60}; expected at most {_MAX_DIMENSIONS} dimensions "
                f"and {_MAX_ELEMENTS} elements"
            )
        if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self.error(f"{name!r} has data_offsets {offsets!r:.60}; expected two, in ascending order")
        start, stop = offsets
        if data_offset + stop > self.nbytes:
            raise self.error(
                f"{name!r} ends at byte {data_offset + stop}, behind the file's end at {self.nbytes}"
            )
        if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != stop - start:
            raise self.error(
                f"{name!r} is {dtype} of shape {shape!r:.60}, "
                f"which does not make the {stop - start} bytes that its data_offsets span"
            )
        return StoredTensor(name, dtype, tuple(shape), self, data_offset + start, stop - start)

    def _of_blocks(self, tensor: StoredTensor, described: str) -> StoredTensor:
        """A tensor of bytes as the blocks that the metadata says it is."""
        dtype, _, width = described.partition(" ")
        n_cols = int(width) if width.isascii() and width.isdecimal() and len(width) < 16 else -1
        if dtype not in BLOCK_SIZES or n_cols < 0 or n_cols % BLOCK_SIZES[dtype].n_weights:
            raise self.error(f"the metadata of {tensor.name!r} is {described!r:.60}; expected a block type's")
        shape = (tensor.shape[0], n_cols) if len(tensor.shape) == 2 else (0, 0)
        expected = (shape[0], n_bytes_of(dtype, shape[1:]))
        if tensor.dtype != _BYTES or tensor.shape != expected or tensor.nbytes != math.prod(expected):
            raise self.error(
                f"{tensor.name!r} is {tensor.dtype} of shape {list(tensor.shape)} in {tensor.nbytes} bytes, "
                f"which does not make rows of {described}"
            )
        return replace(tensor, dtype=dtype, shape=shape)


class TensorFileWriter(FileWriter):
    """Writes a safetensors file piece by piece: the header at once, then the tensors' bytes in its order.

    The data begins at a multiple of `DATA_ALIGNMENT`; the tensors follow each other without gaps, as the
    safetensors library demands. Tensors of block types are written as this module's docstring says.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        blocks = {spec.name: _described(spec) for spec in specs if spec.dtype in BLOCK_SIZES}
        metadata = {**metadata, **blocks}
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for spec in specs:
            assert spec.name not in header, spec.name
            is_blocks = spec.dtype in BLOCK_SIZES
            shape = [spec.shape[0], n_bytes_of(spec.dtype, spec.shape[1:])] if is_blocks else [*spec.shape]
            header[spec.name] = {
                "dtype": _BYTES if is_blocks else spec.dtype,
                "shape": shape,
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-(8 + len(raw)) % DATA_ALIGNMENT)
        super().__init__(path, 8 + len(raw) + offset)
        try:
            self.write(len(raw).to_bytes(8, "little") + raw)
        except BaseException:
            self.abandon()
            raise


def _described(spec: TensorSpec) -> str:
    """What the metadata says of a tensor of blocks."""
    return f"{spec.dtype} {spec.shape[1]}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key stands there twice")
    return entries


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
