"""Ranges read past the page cache, by each method of this system, against what was written."""

import errno
import mmap
import os
import sys

import numpy as np
import pytest
from checkpoints import write_tensor_file

from tpilite.errors import CheckpointError
from tpilite.formats import uncached
from tpilite.formats.safetensors import TensorFile
from tpilite.formats.uncached import BLOCK_BYTES, READ_METHODS, UncachedFile, allocate, buffer_bytes, empty
from tpilite.machine import keep_freed_memory, rss_bytes

_SIZE = 5 * BLOCK_BYTES + 1234


@pytest.fixture(params=READ_METHODS)
def method(request):
    return request.param


@pytest.fixture
def file(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, _SIZE // 4 * 4, np.uint8)
    write_tensor_file(tmp_path / "x.safetensors", [("x", "F32", (_SIZE // 4,), [data])], {})
    with TensorFile(tmp_path / "x.safetensors") as opened:
        yield opened


def _open(file, method):
    try:
        return UncachedFile(file, method)
    except CheckpointError as error:
        pytest.skip(str(error))


def test_every_range_at_every_alignment(file, method):
    content = file.path.read_bytes()
    reader = _open(file, method)
    edges = [0, 1, 2, 511, 4095, 4096, 4097, 8192, 12289]
    for offset in edges:
        for n_bytes in (1, 2, 4095, 4096, 4097, 8192, len(content) - offset):
            buffer = memoryview(allocate(buffer_bytes(n_bytes)))
            place = reader.read(buffer, offset, n_bytes)
            assert buffer[place : place + n_bytes] == content[offset : offset + n_bytes]
    reader.close()


def test_a_short_read_goes_on(file, method, monkeypatch):
    content = file.path.read_bytes()
    reader, preadv = _open(file, method), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:BLOCK_BYTES]], at))
    buffer = memoryview(allocate(buffer_bytes(_SIZE)))
    place = reader.read(buffer, 100, len(content) - 100)
    assert buffer[place : place + len(content) - 100] == content[100:]
    reader.close()


@pytest.mark.parametrize("kept", [0, 100, BLOCK_BYTES, 2 * BLOCK_BYTES, 2 * BLOCK_BYTES + 7])
def test_a_truncated_file_is_an_error(file, method, kept):
    reader = _open(file, method)
    os.truncate(file.path, kept)
    with pytest.raises(CheckpointError, match="was truncated while it was in use: expected 9000 bytes at 50"):
        reader.read(memoryview(allocate(buffer_bytes(9000))), 50, 9000)
    reader.close()


def test_a_disk_error_names_the_file(file, method, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    reader = _open(file, method)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read: Input/output error"):
        reader.read(memoryview(allocate(buffer_bytes(10))), 0, 10)
    reader.close()


def test_the_best_way_that_there_is(file, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    monkeypatch.setattr(uncached, "_F_NOCACHE", None)
    without = UncachedFile(file)
    assert without.read_method == ("advise" if hasattr(os, "posix_fadvise") else "plain")
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    plain = UncachedFile(file)
    assert plain.read_method == "plain"
    without.close()
    plain.close()


def test_a_file_system_that_refuses_direct_reads(file, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "preadv", refuse)
    reader = UncachedFile(file)
    assert reader.read_method != "direct"
    reader.close()


def test_a_path_that_leads_to_another_file_is_not_opened(file, method):
    os.replace(_copy(file.path), file.path)
    if method in ("direct", "nocache"):
        with pytest.raises(CheckpointError, match=f"'{method}'"):
            UncachedFile(file, method)
    reader = UncachedFile(file)
    assert reader.read_method not in ("direct", "nocache")
    reader.close()


def test_memory_begins_at_a_page_without_huge_pages_too(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert np.frombuffer(allocate(5000), np.uint8).ctypes.data % mmap.PAGESIZE == 0


def _copy(path):
    other = path.with_suffix(".other")
    other.write_bytes(b"\0" * path.stat().st_size)
    return other


@pytest.mark.parametrize("n", [3, 1 << 16])
@pytest.mark.parametrize("dtype", [(np.float32, (5,)), [("scales", "<f2", (2,)), ("codes", "i1", (7,))]])
def test_arrays_of_rows_and_of_records_are_what_numpy_makes_of_them(n, dtype):
    found, expected = empty((2, n), np.dtype(dtype)), np.empty((2, n), dtype)
    assert (found.shape, found.dtype, found.nbytes) == (expected.shape, expected.dtype, expected.nbytes)
    assert found.flags.writeable


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")
def test_large_arrays_go_back_to_the_kernel_at_once():
    size = 24 << 20  # below what glibc keeps once it is told to
    keep_freed_memory()
    small = empty((16, 16), np.dtype(np.float16))
    assert (small.shape, small.dtype) == ((16, 16), np.float16)
    before = rss_bytes()
    arrays = [empty((2, size // 8), np.dtype(np.float32)) for _ in range(2)]
    for array in arrays:
        array.fill(1)
    assert rss_bytes() - before > 1.5 * size
    arrays.clear()
    del array
    assert rss_bytes() - before < size // 2
