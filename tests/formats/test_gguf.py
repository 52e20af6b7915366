import contextlib
import os
import struct
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from tpilite.dtypes import BLOCK_SIZES
from tpilite.errors import CheckpointError
from tpilite.formats.gguf import TENSOR_TYPES, GgufFile, is_gguf

FUZZ = settings(deadline=None, max_examples=300)

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "a.negative": -3,
    "a.large": 1 << 40,
    "a.float": 0.5,
    "a.double": np.float64(0.1),
    "a.byte": np.uint8(7),
    "a.flag": True,
    "a.text": "é\n",
    "tokens": ["a", "", "▁b"],
    "scores": [0.0, -1.0, -2.5],
    "kinds": np.array([1, 6, 3], np.int32),
    "flags": np.array([True, False]),
}
VECTOR = np.arange(5, dtype=np.float32)
HALVES = np.arange(6, dtype=np.float16).reshape(2, 3)
BLOCKS = np.arange(3 * 2 * 18, dtype=np.uint8).reshape(3, 36)  # [3, 64] in Q4_0
TENSORS = {
    "v": ("F32", (5,), VECTOR),
    "h": ("F16", (2, 3), HALVES),
    "b": ("BF16", (2, 1), np.array([[0x3F80], [0xC000]], np.uint16)),
    "q": ("Q4_0", (3, 64), BLOCKS),
}


def sample(path: Path, **changes: Any) -> Path:
    return write_gguf(path, TENSORS, METADATA | changes)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = sample(tmp_path / "x.gguf")
    assert is_gguf(path)
    with GgufFile(path) as file:
        found = dict(file.metadata)
        assert list(found) == list(METADATA)
        for key, value in METADATA.items():
            if isinstance(found[key], np.ndarray):
                np.testing.assert_array_equal(found[key], value)
            else:
                assert (type(found[key]), found[key]) == (type(np.array(value).tolist()), value), key
        assert found["kinds"].dtype == np.int32
        assert found["flags"].dtype == bool
        for name, (dtype, shape, values) in TENSORS.items():
            tensor = file.tensors[name]
            assert (tensor.dtype, tensor.shape, tensor.offset % 32) == (dtype, shape, 0)
            np.testing.assert_array_equal(tensor.array(), values)
            assert not tensor.array().flags.writeable
        np.testing.assert_array_equal(file.tensors["q"].rows(1, 3).array(), BLOCKS[1:])
        assert file.tensors["q"].row_bytes == 36


def test_the_gguf_package_reads_what_is_written(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(sample(tmp_path / "x.gguf", **{"general.alignment": 64}))
    for key, value in METADATA.items():
        np.testing.assert_array_equal(reader.fields[key].contents(), value)
    for tensor in reader.tensors:
        dtype, shape, values = TENSORS[tensor.name]
        assert (tensor.tensor_type.name, tuple(tensor.shape[::-1])) == (dtype, shape)
        assert tensor.data.tobytes() == values.tobytes()


def test_what_the_gguf_package_wrote_is_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "b"])
    writer.add_token_scores([0.5, -0.5])
    writer.add_custom_alignment(64)
    writer.add_tensor("v", VECTOR)
    writer.add_tensor("q", BLOCKS, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile(tmp_path / "x.gguf") as file:
        assert file.metadata["general.architecture"] == "llama"
        assert file.metadata["llama.block_count"] == 3
        assert file.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
        np.testing.assert_array_equal(file.metadata["tokenizer.ggml.scores"], [0.5, -0.5])
        np.testing.assert_array_equal(file.tensors["v"].array(), VECTOR)
        np.testing.assert_array_equal(file.tensors["q"].array(), BLOCKS)
        assert file.tensors["q"].shape == (3, 64)
        assert file.tensors["q"].offset % 64 == 0


def test_the_sizes_of_blocks_are_ggmls() -> None:
    gguf = pytest.importorskip("gguf")
    for name, size in BLOCK_SIZES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == tuple(size)


def test_the_numbers_of_tensor_types_are_ggmls() -> None:
    gguf = pytest.importorskip("gguf")
    names = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    for number in names.keys() & TENSOR_TYPES.keys():
        assert TENSOR_TYPES[number] == names[number]
    assert {"BF16", "IQ4_XS", "Q6_K"} < set(names.values())


# A header by hand: what the writer would never write.


def text(value: "str | bytes") -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value_of(key: "str | bytes", kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def tensor(name: "str | bytes", dims: Iterable[int], kind: int = 0, offset: int = 0) -> bytes:
    dims = list(dims)
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(
    values: Iterable[bytes] = (), tensors: Iterable[bytes] = (), version: int = 3, **counts: int
) -> bytes:
    values, tensors = list(values), list(tensors)
    n_tensors, n_values = counts.get("n_tensors", len(tensors)), counts.get("n_values", len(values))
    raw = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_values) + b"".join([*values, *tensors])
    return raw + bytes(-len(raw) % 32)


def write_new(path: Path, raw: bytes) -> Path:
    """Not over the old file: some file systems wait for the disk there, hundreds of times in a fuzz."""
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_versions_two_and_three_are_read(version: int, tmp_path: Path) -> None:
    raw = header([value_of("a", 4, b"\7\0\0\0")], [tensor("w", [2])], version) + bytes(8)
    with GgufFile(write_new(tmp_path / "x", raw)) as file:
        assert dict(file.metadata) == {"a": 7}
        assert file.tensors["w"].array().shape == (2,)


U64_MAX = (1 << 64) - 1
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "expected at least 24 bytes, the first b'GGUF', found b''"),
    "other magic": (b"GGML" + bytes(40), "the first b'GGUF', found b'GGML"),
    "short": (b"GGUF\3\0\0\0", "expected at least 24 bytes"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "version 1": (header(version=1), "expected GGUF of version 2 or 3, found version 1"),
    "big-endian": (header(version=3 << 24), "found one for big-endian machines"),
    "values": (header(n_values=U64_MAX), f"claims {U64_MAX} values in the metadata; expected at most"),
    "values beyond the end": (header(n_values=9), "claims 9 values .* not more than fit the file"),
    "tensors": (header(n_tensors=1 << 60), "the header claims 1152921504606846976 tensors"),
    "tensors beyond the end": (header([], [tensor("w", [1])], n_tensors=3), "claims 3 tensors"),
    "key too long": (header([struct.pack("<Q", U64_MAX) + bytes(20)]), "goes on behind byte"),
    "key twice": (header([value_of("a", 7, b"\1")] * 2), "the key 'a' stands there twice"),
    "key no UTF-8": (header([value_of(b"\xff", 7, b"\1")]), "a key's name is not valid UTF-8"),
    "key of two lines": (header([value_of("a\n", 7, b"\1")]), "a key's name is not printable: 'a.n'"),
    "kind": (header([value_of("a", 13, bytes(8))]), "'a' has a value of type 13, which is none"),
    "flag": (header([value_of("a", 7, b"\2")]), "'a' has a flag of 2; expected 0 or 1"),
    "text too long": (header([value_of("a", 8, struct.pack("<Q", 1 << 62))]), "goes on behind byte"),
    "array too long": (
        header([value_of("a", 9, struct.pack("<IQ", 4, 1 << 62))]),
        "claims 4611686018427387904 numbers in 'a'",
    ),
    "strings too many": (
        header([value_of("a", 9, struct.pack("<IQ", 8, 1 << 62))]),
        "claims 4611686018427387904 strings",
    ),
    "strings beyond the end": (
        header([value_of("a", 9, struct.pack("<IQQ", 8, 2, 64) + bytes(60))]),
        "goes on behind byte",
    ),
    "a string beyond the end": (
        header([value_of("a", 9, struct.pack("<IQQ", 8, 2, U64_MAX) + bytes(60))]),
        "goes on behind byte",
    ),
    "nested": (header([value_of("a", 9, struct.pack("<IQ", 9, 1) + bytes(24))]), "a value of type 9"),
    "alignment": (
        header([value_of("general.alignment", 4, struct.pack("<I", 12))]),
        "general.alignment is 12; expected a power of two",
    ),
    "no alignment": (
        header([value_of("general.alignment", 4, struct.pack("<I", 0))]),
        "general.alignment is 0; expected a power of two",
    ),
    "alignment as text": (
        header([value_of("general.alignment", 8, text("32"))]),
        "general.alignment is b'32'; expected",
    ),
    "no dimensions": (header([], [tensor("w", [])]), "'w' has 0 dimensions; expected 1 to 4"),
    "dimensions": (header([], [tensor("w", [1] * 5)]), "'w' has 5 dimensions; expected 1 to 4"),
    "many dimensions": (
        header([], [text("w") + struct.pack("<I", (1 << 32) - 1) + bytes(40)]),
        "'w' has 4294967295 dimensions",
    ),
    "shape of nothing": (header([], [tensor("w", [4, 0])]), r"'w' has shape \[0, 4\]; expected 1 to"),
    "shape overflows": (header([], [tensor("w", [1 << 32, 1 << 32])]), "'w' has shape .*; expected 1 to"),
    "row of part of a block": (
        header([], [tensor("w", [48, 2], 2)]) + bytes(99),
        "'w' is Q4_0 with rows of 48 weights; expected a multiple of 32",
    ),
    "offset": (
        header([], [tensor("w", [1], 0, 4)]) + bytes(64),
        "'w' has offset 4; expected a multiple of 32",
    ),
    "behind the end": (header([], [tensor("w", [9])]) + bytes(32), "'w' ends at byte .*, behind the file's"),
    "far behind": (header([], [tensor("w", [1], 0, U64_MAX - 31)]), "'w' ends at byte"),
    "overlap": (
        header([], [tensor("v", [9]), tensor("w", [9], 0, 32)]) + bytes(99),
        "tensors 'v' and 'w' overlap",
    ),
    "tensor twice": (header([], [tensor("w", [1])] * 2) + bytes(32), "there are two tensors 'w'"),
    "name of two lines": (header([], [tensor("a\rb", [1])]) + bytes(32), "a tensor's name is not printable"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_an_unsound_file_is_one_line(what: str, tmp_path: Path) -> None:
    raw, expected = BAD_FILES[what]
    tracemalloc.start()
    try:
        refuse(write_new(tmp_path / "x", raw), expected)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "none", "does not exist; download or copy it")
    refuse(tmp_path, "cannot be read: Is a directory")
    assert not is_gguf(tmp_path)


def test_text_that_is_no_utf_8_is_an_error_for_who_asks_for_it(tmp_path: Path) -> None:
    strings = struct.pack("<IQ", 8, 2) + text("a") + text(b"\xff")
    values = [value_of("a", 8, text(b"\xff")), value_of("b", 9, strings), value_of("c", 8, text("x"))]
    with GgufFile(write_new(tmp_path / "x", header(values))) as file:
        assert file.metadata["c"] == "x"
        for key in ("a", "b"):
            with pytest.raises(CheckpointError, match=f"{key} is not valid UTF-8"):
                file.metadata[key]


def test_an_unknown_type_is_an_error_only_for_who_asks_for_it(tmp_path: Path) -> None:
    raw = header([], [tensor("i", [256], 19), tensor("n", [256], 99, 32), tensor("v", [32], 8, 64)])
    with GgufFile(write_new(tmp_path / "x", raw + bytes(99))) as file:
        with pytest.raises(CheckpointError, match=r"'i' is stored as IQ1_S, .* not supported"):
            file.tensors["i"].array()
        with pytest.raises(CheckpointError, match="'n' is stored as type 99"):
            file.tensors["n"].array()
        # A vector of blocks is none that any model has.
        with pytest.raises(CheckpointError, match=r"'v' is stored as Q8_0, .* F32, F16 or BF16"):
            file.tensors["v"].array()


def refuse(path: Path, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected) as caught:
        GgufFile(path)
    assert "\n" not in str(caught.value)


def use(path: Path) -> None:
    """Opens a file and touches all that it promises: nothing but `CheckpointError` may come of it."""
    with contextlib.suppress(CheckpointError), GgufFile(path) as file:
        for key in file.metadata:
            with contextlib.suppress(CheckpointError):
                file.metadata[key]
        for found in file.tensors.values():
            with contextlib.suppress(CheckpointError):
                assert len(found.array().tobytes()) == found.nbytes
                found.read_into(bytearray(found.nbytes))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    raw = sample(tmp_path / "x").read_bytes()
    with GgufFile(tmp_path / "x") as file:
        end = max(found.end for found in file.tensors.values())
    for length in reversed(range(end)):
        os.truncate(tmp_path / "x", length)
        with pytest.raises(CheckpointError):
            GgufFile(tmp_path / "x")
    use(write_new(tmp_path / "x", raw + b"more"))


@given(raw=st.binary(max_size=200))
@FUZZ
def test_random_bytes(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    use(write_new(path, b"GGUF\3\0\0\0" + raw))


small = st.integers(0, 40) | st.sampled_from([1 << 31, 1 << 32, 1 << 62, U64_MAX])
keys = st.text(max_size=3) | st.just("general.alignment") | st.binary(max_size=2)
near_values = st.builds(value_of, keys, st.integers(0, 13), st.binary(max_size=24))
near_tensors = st.builds(
    tensor, keys, st.lists(small, max_size=5), st.integers(0, 40), small.map(lambda n: n * 32 & U64_MAX)
)


@given(
    values=st.lists(near_values, max_size=3),
    tensors=st.lists(near_tensors, max_size=3),
    counts=st.dictionaries(st.sampled_from(["n_tensors", "n_values"]), small),
    version=st.sampled_from([2, 3]),
)
@FUZZ
def test_random_headers(
    values: list[bytes],
    tensors: list[bytes],
    counts: Mapping[str, int],
    version: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    raw = header(values, tensors, version, **counts)
    use(write_new(tmp_path_factory.getbasetemp() / "headers.gguf", raw + bytes(300)))


@pytest.fixture(scope="module")
def sample_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return sample(tmp_path_factory.mktemp("sample") / "x").read_bytes()


@given(at=st.integers(0, 10_000), byte=st.integers(0, 255))
@FUZZ
def test_one_wrong_byte(
    sample_bytes: bytes, at: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(sample_bytes)
    raw[at % len(raw)] = byte
    use(write_new(tmp_path_factory.getbasetemp() / "mutated.gguf", bytes(raw)))


scalars: Callable[..., Any] = st.one_of(
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(width=32, allow_nan=False),
    st.text(max_size=10),
    st.lists(st.text(max_size=5), min_size=1, max_size=5),
    st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=5),
)


@given(values=st.dictionaries(st.text("abc._", min_size=1), scalars, max_size=5))
@FUZZ
def test_any_metadata_comes_back(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "metadata.gguf"
    path.unlink(missing_ok=True)
    with GgufFile(write_gguf(path, {}, values)) as file:
        found = {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in file.metadata.items()
        }
        assert found == values
