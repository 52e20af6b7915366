"""One GGUF file: its header checked, its metadata and its tensors as they lie.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3, little-endian:

    the bytes "GGUF", version:u32, n_tensors:u64, n_values:u64
    the metadata, n_values times:   key:string type:u32 value
    the table, n_tensors times:     name:string n_dims:u32 dims:u64 each, type:u32 offset:u64
    zeros up to a multiple of the alignment, which the metadata's general.alignment says, or 32
    the tensors, each at its offset from here, a multiple of the alignment

A string is length:u64 and so many bytes of UTF-8. The types of values, by number:

    0 u8   1 i8   2 u16   3 i16   4 u32   5 i32   6 f32   7 bool, 0 or 1
    8 string   9 array: type:u32 length:u64 and so many values   10 u64   11 i64   12 f64

An array of arrays is refused: no model has one. A tensor's dims begin with the length of its rows, so they
are a shape in reverse. Its type is one of GGML's: `TENSOR_TYPES`. A tensor of a type that is not supported is
an error only for who asks for it.

A large model may come in parts, files of their own that are named alike up to `-00001-of-00003.gguf`. The
first one has all metadata; each says of itself split.no, from 0, and split.count.
"""

import math
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tpilite.dtypes import BLOCK_SIZES, DTYPES, block_size, n_bytes_of
from tpilite.formats.stored import StoredFile, StoredTensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

STRING, ARRAY, BOOL = 8, 9, 7
VALUE_TYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_FIRST_TENSOR_TYPES = """
    F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S
    IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16
"""
TENSOR_TYPES = {**dict(enumerate(_FIRST_TENSOR_TYPES.split())), 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}

# The largest header known takes some 20 MB: a vocabulary of 262144 tokens with its merges.
_MAX_HEADER_BYTES = 256 << 20
# Llama 3.1 405B has 1138 tensors. So many can be looked at in well under a second; so can so many strings.
_MAX_ENTRIES = 1 << 16
_MAX_STRINGS = 1 << 22
_MAX_DIMENSIONS = 4
# Far above any tensor that a file can hold, and below where NumPy's sizes overflow.
_MAX_ELEMENTS = 1 << 48
_MAX_ALIGNMENT = 1 << 20

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class GgufMetadata(Mapping[str, Any]):
    """What a GGUF file says of its model, by key: numbers, text, arrays of numbers, lists of text.

    Text is decoded when it is first asked for, which raises `CheckpointError` where it is no UTF-8.
    """

    def __init__(self, file: StoredFile, values: dict[str, Any]) -> None:
        self._file, self._values = file, values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        try:
            if isinstance(value, bytes | _Strings):
                value = self._values[key] = value.decode()
        except UnicodeDecodeError as error:
            raise self._file.error(f"{key} is not valid UTF-8 ({error})") from error
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class GgufFile(StoredFile):
    """An open GGUF file, or a part of one. Raises `CheckpointError` when its header is not sound."""

    metadata: GgufMetadata

    def _read_tensors(self) -> dict[str, StoredTensor]:
        """The tensors by name; sets `metadata`."""
        prefix = self.first_bytes(24)
        if prefix[:4] != MAGIC or len(prefix) < 24:
            raise self.error(f"expected at least 24 bytes, the first {MAGIC!r}, found {prefix[:8]!r}")
        version = int.from_bytes(prefix[4:8], "little")
        if version not in VERSIONS:
            is_big = int.from_bytes(prefix[4:8], "big") in VERSIONS
            found = "one for big-endian machines" if is_big else f"version {version}"
            raise self.error(f"expected GGUF of version 2 or 3, found {found}")
        n_tensors, n_values = (int.from_bytes(prefix[at : at + 8], "little") for at in (8, 16))
        header = _Header(self, 24)
        values = self._read_values(header, n_values)
        alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.error(f"general.alignment is {alignment!r:.40}; expected a power of two")
        self.metadata = GgufMetadata(self, values)
        header.check_count("tensors", n_tensors, _MAX_ENTRIES, 32)
        entries = [self._read_entry(header) for _ in range(n_tensors)]
        data_offset = -(-header.at // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for entry in entries:
            if entry[0] in tensors:
                raise self.error(f"there are two tensors {entry[0]!r:.80}")
            tensors[entry[0]] = self._tensor(*entry, alignment, data_offset)
        self.check_overlaps(tensors.values(), header.at)
        return tensors

    def _read_values(self, header: "_Header", n_values: int) -> dict[str, Any]:
        """The metadata; text as bytes."""
        header.check_count("values in the metadata", n_values, _MAX_ENTRIES, 13)
        values: dict[str, Any] = {}
        for _ in range(n_values):
            key = header.name("key")
            if key in values:
                raise self.error(f"the key {key!r:.80} stands there twice")
            kind = header.u32()
            values[key] = header.array(key) if kind == ARRAY else header.value(key, kind)
        return values

    def _read_entry(self, header: "_Header") -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of the next tensor in the table."""
        name, n_dims = header.name("tensor"), header.u32()
        if not 1 <= n_dims <= _MAX_DIMENSIONS:
            raise self.error(f"{name!r:.80} has {n_dims} dimensions; expected 1 to {_MAX_DIMENSIONS}")
        shape = tuple(header.u64() for _ in range(n_dims))[::-1]
        if not 1 <= math.prod(shape) <= _MAX_ELEMENTS:
            raise self.error(f"{name!r:.80} has shape {list(shape)}; expected 1 to {_MAX_ELEMENTS} weights")
        return name, shape, header.u32(), header.u64()

    def _tensor(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, alignment: int, data_offset: int
    ) -> StoredTensor:
        """The tensor of an entry. Of one whose type is not supported nobody knows how long it is."""
        dtype, n_bytes = TENSOR_TYPES.get(kind, f"type {kind}"), 0
        if dtype in DTYPES or dtype in BLOCK_SIZES:
            if shape[-1] % block_size(dtype).n_weights:
                raise self.error(
                    f"{name!r:.80} is {dtype} with rows of {shape[-1]} weights; expected a multiple of "
                    f"{block_size(dtype).n_weights}"
                )
            n_bytes = n_bytes_of(dtype, shape)
        if offset % alignment:
            raise self.error(f"{name!r:.80} has offset {offset}; expected a multiple of {alignment}")
        if data_offset + offset + n_bytes > self.nbytes:
            raise self.error(
                f"{name!r:.80} ends at byte {data_offset + offset + n_bytes}, behind the file's end at "
                f"{self.nbytes}"
            )
        return StoredTensor(name, dtype, shape, self, data_offset + offset, n_bytes)


class _Strings:
    """An array of text as it is stored, lengths checked: most of a header, which not everybody needs."""

    def __init__(self, raw: bytes, n: int) -> None:
        self._raw, self._n = raw, n

    def decode(self) -> list[str]:
        raw, at, strings = self._raw, 0, []
        for _ in range(self._n):
            start = at + 8
            at = start + _U64.unpack_from(raw, at)[0]
            strings.append(raw[start:at].decode())
        return strings


class _Header:
    """The bytes of the header, read one after the other from `at`."""

    def __init__(self, file: StoredFile, at: int) -> None:
        self._file, self.at = file, at
        self._map = file.map()
        self._end = min(file.nbytes, _MAX_HEADER_BYTES)
        self._n_strings = 0

    def u32(self) -> int:
        return int(_U32.unpack_from(self._map, self._take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self._map, self._take(8))[0])

    def name(self, what: str) -> str:
        """A string that names a value or a tensor: printable, for messages that are one line."""
        raw = self._string()
        try:
            name = raw.decode()
        except UnicodeDecodeError as error:
            raise self._file.error(f"a {what}'s name is not valid UTF-8 ({error})") from error
        if not name.isprintable():
            raise self._file.error(f"a {what}'s name is not printable: {name!r:.80}")
        return name

    def value(self, key: str, kind: int) -> Any:
        """A number, a flag, or text as bytes."""
        if kind == STRING:
            return self._string()
        number = self._numbers(key, kind, 1)[0].item()
        return bool(number) if kind == BOOL else number

    def array(self, key: str) -> Any:
        """An array of numbers or flags, or of text that is not decoded yet."""
        kind, n = self.u32(), self.u64()
        if kind == STRING:
            self._n_strings += n
            self.check_count("strings", self._n_strings, _MAX_STRINGS, 0)
            self.check_count(f"strings in {key!r:.80}", n, _MAX_STRINGS, 8)
            return self._strings(n)
        numbers = self._numbers(key, kind, n)
        return numbers.astype(bool) if kind == BOOL else numbers

    def check_count(self, what: str, n: int, most: int, n_bytes: int) -> None:
        """Raises `CheckpointError` unless so many of at least `n_bytes` each can follow."""
        if n > most or n * n_bytes > self._end - self.at:
            raise self._file.error(
                f"the header claims {n} {what}; expected at most {most} and not more than fit the file"
            )

    def _take(self, n_bytes: int) -> int:
        """Where the next bytes begin."""
        at = self.at
        if n_bytes > self._end - at:
            raise self._file.error(
                f"the header goes on behind byte {self._end}, where the file or what is read of it ends"
            )
        self.at += n_bytes
        return at

    def _string(self) -> bytes:
        n_bytes = self.u64()
        at = self._take(n_bytes)
        return self._map[at : at + n_bytes]

    def _strings(self, n: int) -> _Strings:
        unpack, data, at, last = _U64.unpack_from, self._map, self.at, self._end - 8
        for _ in range(n):
            if at > last:
                self._take(at + 8 - self.at)  # which raises
            at += 8 + unpack(data, at)[0]
        start = self._take(at - self.at)
        return _Strings(data[start:at], n)

    def _numbers(self, key: str, kind: int, n: int) -> "np.ndarray[Any, np.dtype[Any]]":
        dtype = VALUE_TYPES.get(kind)
        if dtype is None:
            raise self._file.error(f"{key!r:.80} has a value of type {kind}, which is none for it")
        self.check_count(f"numbers in {key!r:.80}", n, self._end, dtype.itemsize)
        at = self._take(n * dtype.itemsize)
        numbers = np.frombuffer(self._map[at : self.at], dtype)
        if kind == BOOL and n and numbers.max() > 1:
            raise self._file.error(f"{key!r:.80} has a flag of {numbers.max()}; expected 0 or 1")
        return numbers


def is_gguf(path: "os.PathLike[str]") -> bool:
    """Whether a file begins as GGUF does; False where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False
