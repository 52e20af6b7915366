"""One safetensors file: its header checked, its tensors mapped or read, and new files written.

The format (https://github.com/huggingface/safetensors): eight bytes of little-endian length, a JSON header
of that length, then the tensors' bytes. The header maps each name to `dtype`, `shape` and `data_offsets`,
the first and the last byte (excluded) counted from the end of the header; `__metadata__` maps strings to
strings. The safetensors library cannot give BF16 to NumPy, so the header is read here: BF16 comes as
uint16 holding its bits.

Nothing but the header is read when a file is opened. A header can name dtypes that are not known here, as
long as nobody asks for those tensors: checkpoints hold unused buffers.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from tpilite.dtypes import DTYPES
from tpilite.errors import CheckpointError
from tpilite.formats.stored import StoredFile, StoredTensor, read_exactly

# The limit of the safetensors library itself; a header takes some 150 bytes per tensor.
MAX_HEADER_BYTES = 100_000_000

# The data of a written file begins at a multiple of this, for direct I/O and so that its pages can be
# released without touching a neighbour's.
DATA_ALIGNMENT = 4096

# Far above any tensor that a file can hold, and below where NumPy's sizes overflow; a tensor without
# elements can claim such a shape. NumPy's own limit is 64 dimensions; no model has more than a few.
_MAX_ELEMENTS = 1 << 48
_MAX_DIMENSIONS = 8


class TensorFile(StoredFile):
    """An open safetensors file. Raises `CheckpointError` when its header is not sound."""

    def _read_tensors(self) -> dict[str, StoredTensor]:
        """The tensors by name."""
        prefix = os.pread(self._fd, 8, 0)
        if prefix == b"version ":
            raise CheckpointError(
                f"{self.path} is a Git LFS pointer and not the file itself; run `git lfs pull` in its folder"
            )
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
        end, before = 8 + n_header, ""
        for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.end)):
            if tensor.offset < end:
                raise self.error(f"tensors {before!r} and {tensor.name!r} overlap")
            end, before = tensor.end, tensor.name
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


@dataclass(frozen=True)
class TensorSpec:
    """What the header says about a tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class TensorFileWriter:
    """Writes a safetensors file piece by piece: the header at once, then the tensors' bytes in its order.

    The data begins at a multiple of `DATA_ALIGNMENT`; the tensors follow each other without gaps, as the
    safetensors library demands. `close` is only for a file that is complete; a failure is left to the
    caller, who removes the file. OS errors pass through as they are.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for spec in specs:
            assert spec.name not in header, spec.name
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-(8 + len(raw)) % DATA_ALIGNMENT)
        self._hash = hashlib.sha256()
        self.nbytes = 0
        self._expected = 8 + len(raw) + offset
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self.write(len(raw).to_bytes(8, "little") + raw)
        except BaseException:
            self.abandon()
            raise

    def write(self, data: "bytes | NDArray[Any]") -> None:
        """Appends bytes, or a C-contiguous array's."""
        view = data.data if isinstance(data, np.ndarray) else memoryview(data)
        if not view.nbytes:
            return
        view = view.cast("B")
        self._hash.update(view)
        self.nbytes += len(view)
        done = 0
        while done < len(view):
            done += os.write(self._fd, view[done:])

    def close(self) -> str:
        """Flushes the complete file to the disk and gives its sha256."""
        assert self.nbytes == self._expected, (self.nbytes, self._expected)
        os.fsync(self._fd)
        self.abandon()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Closes the file as it is, for a caller that gives it up."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key stands there twice")
    return entries


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
