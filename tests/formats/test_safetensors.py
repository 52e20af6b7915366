import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from checkpoints import write_tensor_file
from hypothesis import given, settings
from hypothesis import strategies as st

from tpilite.errors import CheckpointError
from tpilite.formats.safetensors import DATA_ALIGNMENT, TensorFile

FUZZ = settings(deadline=None, max_examples=300)


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return write_new(path, len(raw).to_bytes(8, "little") + raw + data)


def write_new(path: Path, raw: bytes) -> Path:
    """Not over the old file: some file systems wait for the disk there, hundreds of times in a fuzz."""
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    return path


def entry(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def test_reads_what_the_safetensors_library_wrote(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.arange(7, dtype=np.float16),
        "empty": np.zeros((0, 5), np.float32),
    }
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    with TensorFile(path) as file:
        assert set(file.tensors) == set(tensors)
        for name, values in tensors.items():
            found = file.tensors[name].array()
            assert found.dtype == values.dtype
            np.testing.assert_array_equal(found, values)
            assert not found.flags.writeable or not found.size


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    f32 = np.arange(12, dtype=np.float32).reshape(3, 4)
    f16 = np.arange(6, dtype=np.float16).reshape(2, 3)
    bf16 = np.array([[0x3F80, 0xC000]], np.uint16)  # 1.0, -2.0
    written = write_tensor_file(
        path,
        [
            ("f32", "F32", f32.shape, (f32[i : i + 1] for i in range(3))),
            ("none", "F16", (0, 3), []),
            ("f16", "F16", f16.shape, [f16.tobytes()]),
            ("bf16", "BF16", bf16.shape, [bf16]),
        ],
        {"made": "by a test"},
    )
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"made": "by a test"}
        np.testing.assert_array_equal(file.get_tensor("f32"), f32)
        np.testing.assert_array_equal(file.get_tensor("f16"), f16)
        assert file.get_tensor("none").shape == (0, 3)
        assert file.get_slice("bf16").get_dtype() == "BF16"
    raw = path.read_bytes()
    assert raw.endswith(bytes.fromhex("803f00c0"))
    assert written == hashlib.sha256(raw).hexdigest()
    with TensorFile(path) as file:
        assert file.tensors["f32"].offset % DATA_ALIGNMENT == 0
        np.testing.assert_array_equal(file.tensors["bf16"].array(), bf16)


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        write_tensor_file(tmp_path / "x", [], {})


@pytest.mark.parametrize("pad", range(4))
def test_rows_and_reads_at_any_alignment(pad: int, tmp_path: Path) -> None:
    values = np.arange(40, dtype="<u2").reshape(10, 4)
    header = json.dumps({"w": entry("BF16", [10, 4], 0, 80)}).encode() + b" " * pad
    with TensorFile(write_raw(tmp_path / "x", header, values.tobytes())) as file:
        part = file.tensors["w"].rows(3, 7)
        assert (part.shape, part.nbytes) == ((4, 4), 32)
        np.testing.assert_array_equal(part.array(), values[3:7])
        buffer = bytearray(32)
        part.read_into(buffer)
        assert bytes(buffer) == values[3:7].tobytes()
        into = np.empty((4, 4), np.uint16)
        part.read_into(into)
        np.testing.assert_array_equal(into, values[3:7])
        np.testing.assert_array_equal(part.rows(1, 2).array(), values[4:5])
        part.rows(2, 2).read_into(bytearray())
        assert part.bytes_at(8, 4) == values[4:5].tobytes()[:4]


def test_arrays_outlive_the_file(tmp_path: Path) -> None:
    with TensorFile(write_raw(tmp_path / "x", {"w": entry("F32", [2], 0, 8)}, bytes(8))) as file:
        array = file.tensors["w"].array()
    file.close()
    np.testing.assert_array_equal(array, [0, 0])


def test_truncation_under_an_open_file_is_an_error(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x", {"w": entry("F32", [4], 0, 16)}, bytes(16))
    with TensorFile(path) as file:
        file.check()
        os.truncate(path, file.nbytes - 6)
        with pytest.raises(CheckpointError, match="truncated while it was in use: expected"):
            file.check()
        with pytest.raises(CheckpointError, match=r"truncated: expected 16 bytes at .*, found 10"):
            file.tensors["w"].read_into(bytearray(16))


def test_an_unknown_dtype_is_an_error_only_for_who_asks_for_it(tmp_path: Path) -> None:
    header = {"q": entry("I64", [1], 0, 8), "w": entry("F32", [1], 8, 12)}
    with TensorFile(write_raw(tmp_path / "x", header, bytes(12))) as file:
        assert file.tensors["w"].array().shape == (1,)
        with pytest.raises(CheckpointError, match=r"'q' is stored as I64, .* expected F32, F16 or BF16"):
            file.tensors["q"].array()


HUGE = (1 << 63).to_bytes(8, "little")
BAD_FILES = [
    (b"", "expected at least 8 bytes, found 0"),
    (b"1234567", "expected at least 8 bytes, found 7"),
    (HUGE + b"{}", "the header claims 9223372036854775808 bytes; expected at most 100000000"),
    ((3).to_bytes(8, "little") + b"{}", "claims 3 bytes; .* not more than the file's 10"),
    (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer .* run `git lfs pull`"),
]


@pytest.mark.parametrize(("raw", "text"), BAD_FILES)
def test_what_is_not_such_a_file_is_refused(raw: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(raw)
    refuse(tmp_path / "x", text)


BAD_HEADERS = [
    (b"{", "not valid JSON"),
    (b"\xff\xff", "not valid JSON"),
    ("{}".encode("utf-16"), "not valid JSON"),
    (b"[" * 100_000 + b"]" * 100_000, "not valid JSON"),
    (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON|must be an object"),
    (b'{"a": 1, "a": 2}', "a key stands there twice"),
    ([], "must be a JSON object, found a list"),
    ({"__metadata__": {"a": 1}}, "__metadata__ in the header must map strings to strings"),
    ({"__metadata__": None}, "__metadata__"),
    ({"w": None}, "the header entry of 'w' must be an object, found None"),
    ({"w": entry(4, [4], 0, 16)}, "'w' has dtype 4; expected a string"),
    ({"w": entry("F32", 4, 0, 16)}, "'w' has shape 4; expected a list"),
    ({"w": entry("F32", [-1, -4], 0, 16)}, r"'w' has shape \[-1, -4\]"),
    ({"w": entry("F32", [4.0], 0, 16)}, r"'w' has shape \[4.0\]"),
    ({"w": entry("F32", [True, 4], 0, 16)}, r"'w' has shape \[True, 4\]"),
    ({"w": entry("F32", [0, 1 << 62], 0, 0)}, "'w' has shape .* expected at most 8 dimensions"),
    ({"w": entry("F32", [1] * 65, 0, 4)}, "'w' has shape .* expected at most 8 dimensions"),
    ({"w": entry("F32", [4], 0)}, r"'w' has data_offsets \[0\]; expected two"),
    ({"w": entry("F32", [4], 16, 0)}, "'w' has data_offsets .* ascending order"),
    ({"w": entry("F32", [4], -16, 0)}, "'w' has data_offsets"),
    ({"w": entry("F32", [5], 0, 16)}, r"'w' is F32 of shape \[5\], which does not make the 16 bytes"),
    ({"w": entry("BF16", [1 << 40], 0, 16)}, "does not make the 16 bytes"),
    ({"w": entry("F32", [8], 0, 32)}, "'w' ends at byte .*, behind the file's end at"),
    ({"v": entry("F32", [3], 0, 12), "w": entry("F32", [2], 8, 16)}, "tensors 'v' and 'w' overlap"),
]


@pytest.mark.parametrize(("header", "text"), BAD_HEADERS)
def test_an_unsound_header_is_refused(header: Any, text: str, tmp_path: Path) -> None:
    refuse(write_raw(tmp_path / "x", header, bytes(16)), text)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "none", "does not exist; download or copy it")
    refuse(tmp_path, "cannot be read: Is a directory")


def refuse(path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        TensorFile(path)
    assert "\n" not in str(caught.value)


def use(path: Path) -> None:
    """Opens a file and touches all that it promises: nothing but `CheckpointError` may come of it."""
    with contextlib.suppress(CheckpointError), TensorFile(path) as file:
        for tensor in file.tensors.values():
            assert len(tensor.array().tobytes()) == tensor.nbytes
            tensor.read_into(bytearray(tensor.nbytes))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    header = {"v": entry("F32", [3], 0, 12), "w": entry("BF16", [2, 1], 12, 16)}
    raw = write_raw(tmp_path / "x", header, bytes(16)).read_bytes()
    for length in reversed(range(len(raw))):
        os.truncate(tmp_path / "x", length)
        with pytest.raises(CheckpointError):
            TensorFile(tmp_path / "x")


@given(raw=st.binary(max_size=200))
@FUZZ
def test_random_bytes(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    use(write_new(path, raw))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
small = st.integers(-1, 20)
near_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "", "f32"]) | json_values,
        "shape": st.lists(small | st.integers(), max_size=4) | json_values,
        "data_offsets": st.lists(small | st.integers(), min_size=1, max_size=3) | json_values,
    }
)


@given(header=st.dictionaries(st.text(max_size=12), near_entries | json_values, max_size=4) | json_values)
@FUZZ
def test_random_headers(header: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    use(write_raw(tmp_path_factory.getbasetemp() / "headers.safetensors", header, bytes(24)))


@given(at=st.integers(0, 200), byte=st.integers(0, 255))
@FUZZ
def test_one_wrong_byte(at: int, byte: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    header = {"v": entry("F32", [3], 0, 12), "w": entry("BF16", [2, 1], 12, 16)}
    raw = bytearray(write_raw(path, header, bytes(16)).read_bytes())
    raw[at % len(raw)] = byte
    use(write_new(path, bytes(raw)))
