"""Compiled products against float64 on the same stored values, and what happens where there are none."""

import os
import platform
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest
from c_programs import assert_prints, built
from compiled_code import PRODUCTS, needs_products
from hypothesis import given, settings
from hypothesis import strategies as st

from tpilite.linear.linear import Linear
from tpilite.linear.matrix import InMemory, Matrix, as_float32
from tpilite.linear.packing import pack
from tpilite.linear.products import Product
from tpilite.native import products as compiled
from tpilite.native.bindings import Unavailable
from tpilite.native.products import CompiledProducts

_SOURCE = Path(compiled.__file__).with_name("products.c")
_WIDER = _SOURCE.with_name("blocks_avx512.c")


@contextmanager
def products(n_threads=1):
    """Closed at the end, with threads that help."""
    found = CompiledProducts(PRODUCTS, n_threads)
    helpers = [threading.Thread(target=found.serve, args=(0,), daemon=True) for _ in range(n_threads - 1)]
    for helper in helpers:
        helper.start()
    try:
        yield found
    finally:
        found.recall()
        for helper in helpers:
            helper.join()
        found.close()


def stored(rng, dtype, shape, n_small=0):
    w = rng.standard_normal(shape).astype(np.float32)
    w.reshape(-1)[rng.integers(0, w.size, n_small)] *= 1e-6  # they do not pack
    if dtype == "bf16":
        return (w.view(np.uint32) >> 16).astype(np.uint16)
    return w.astype({"f16": np.float16, "f32": np.float32}[dtype])


def check(y, x, w):
    wide, x = as_float32(w).astype(np.float64), x.astype(np.float64)
    assert (np.abs(y - x @ wide.T) <= 1e-6 * (np.abs(x) @ np.abs(wide).T)).all()


def multiplied(found, x, *rows):
    """All in one call, each result between numbers that must stay."""
    wholes = [np.full((len(x), r.shape[0] + 2), 7.0, np.float32) for r in rows]
    found.multiply(x, [Product(r, whole[:, 1:-1]) for r, whole in zip(rows, wholes, strict=True)])
    for whole in wholes:
        assert (whole[:, [0, -1]] == 7).all()
    return [whole[:, 1:-1] for whole in wholes]


@needs_products
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_products_of_stored_rows(data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    n_cols = draw(
        st.integers(1, 70) | st.integers(1, 1200) | st.sampled_from([511, 512, 513, 2048, 4097, 8200])
    )
    x = rng.standard_normal((draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 17, 255, 300])), n_cols), np.float32)
    rows = [
        stored(rng, dtype, (draw(st.integers(1, 100)), n_cols))
        for dtype in draw(st.lists(st.sampled_from(["bf16", "f16", "f32"]), min_size=1, max_size=4))
    ]
    with products(draw(st.sampled_from([1, 2, 3]))) as found:
        for y, w in zip(multiplied(found, x, *rows), rows, strict=True):
            check(y, x, w)


@needs_products
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 9),
    shape=st.tuples(
        st.integers(1, 30).map(lambda n: 4 * n), st.integers(1, 1200) | st.sampled_from([4096, 4097, 8200])
    ),
    t=st.sampled_from([1, 2, 3, 4, 9, 300]),
    n_small=st.integers(0, 20),
)
def test_packed_rows_give_the_same_bits(seed, shape, t, n_small):
    rng = np.random.default_rng(seed)
    w, x = stored(rng, "bf16", shape, n_small), rng.standard_normal((t, shape[1]), np.float32)
    packed = pack(w, bytearray(w.nbytes * 3 // 4))
    if packed is not None:  # too many of its few weights may be small
        with products(2) as found:
            plain, same = multiplied(found, x, w, packed)
        np.testing.assert_array_equal(same, plain)


@needs_products
def test_weights_that_are_stored_apart_stand_in_every_row_and_column():
    rng = np.random.default_rng(0)
    w = stored(rng, "bf16", (16, 2061))
    for i in range(16):
        w[i, (97 * i + np.array([0, 511, 512, 2060])) % 2061] = 0x3380 + i
    packed = pack(w, bytearray(w.nbytes * 3 // 4))
    assert len(packed.places) >= 16 * 4
    with products() as found:
        for t in (1, 2, 5):
            x = np.zeros((t, 2061), np.float32)
            for column in range(2061):  # each column by itself
                x[:, column - 1], x[:, column] = 0, 1
                (y,) = multiplied(found, x, packed)
                np.testing.assert_array_equal(y, np.tile(as_float32(w)[:, column], (t, 1)))


@needs_products
@pytest.mark.parametrize("t", [1, 3, 5])
@pytest.mark.parametrize("n_cols", [777, 5007])
def test_what_else_is_computed_changes_no_bit(t, n_cols):
    rng = np.random.default_rng(1)
    rows = [stored(rng, dtype, (101, n_cols)) for dtype in ("bf16", "f16", "f32")]
    x = rng.standard_normal((t, n_cols), np.float32)
    with products() as alone, products(4) as together:
        expected = [multiplied(alone, x, w)[0] for w in rows]
        for _ in range(20):
            for y, z in zip(
                multiplied(together, x, *rows, *rows[::-1]), expected + expected[::-1], strict=True
            ):
                np.testing.assert_array_equal(y, z)
        parts = [multiplied(together, x, w[:23], w[23:])[i] for w in rows for i in (0, 1)]
        for z, first, second in zip(expected, parts[::2], parts[1::2], strict=True):
            np.testing.assert_array_equal(np.hstack([first, second]), z)


@needs_products
def test_helpers_are_called_back_however_often_they_are_needed():
    x, w = np.ones((1, 64), np.float32), np.ones((256, 64), np.float32)
    found, counts = CompiledProducts(PRODUCTS, 2), []

    def help_out():
        while not counts or counts[-1] < 300:
            counts.append(found.serve(counts[-1] if counts else 0))

    helper = threading.Thread(target=help_out, daemon=True)
    helper.start()
    for _ in range(300):
        (y,) = multiplied(found, x, w)
        assert (y == 64).all()
        found.recall()
    helper.join()
    found.close()
    assert counts == sorted(set(counts))


@needs_products
@pytest.mark.parametrize("blas_for_many", [False, True])
def test_linear_takes_them_but_for_many_rows_where_the_blas_has_more(monkeypatch, blas_for_many):
    rng = np.random.default_rng(2)
    w, x = stored(rng, "bf16", (64, 100)), rng.standard_normal((3, 100), np.float32)
    taken, found = [], CompiledProducts(PRODUCTS, 2)
    with Linear(2, found, blas_for_many=blas_for_many) as linear:
        multiply = found.multiply
        monkeypatch.setattr(found, "multiply", lambda *args: taken.append(1) or multiply(*args))
        for rows, expected in ((x[:1], True), (x, not blas_for_many)):
            taken.clear()
            (y,) = linear(rows, Matrix(64, 100, (InMemory(w),)))
            check(y, rows, w)
            assert taken == [1] * expected


def test_a_library_that_is_not_there(tmp_path):
    with pytest.raises(Unavailable, match="there is no _products: the package was installed without a comp"):
        compiled.load(tmp_path)


def test_a_library_that_cannot_be_used_is_told_of(tmp_path, caplog):
    path = tmp_path / f"_products{EXTENSION_SUFFIXES[0]}"
    path.write_bytes(b"not a library")
    with pytest.raises(Unavailable, match="cannot be used"):
        compiled.load(tmp_path)
    assert "cannot be used" in caplog.text


def library_of(source, folder):
    """The C source as a library in the folder."""
    compiler = os.environ.get("CC", "cc")
    if shutil.which(compiler) is None:
        pytest.skip("there is no compiler now")
    (folder / "products.c").write_text(source)
    path = folder / f"_products{EXTENSION_SUFFIXES[0]}"
    command = [compiler, "-shared", "-fPIC", f"-I{_SOURCE.parent}", "-o", path, folder / "products.c", _WIDER]
    subprocess.run(command, check=True)


def test_a_library_of_another_version_says_what_to_do(tmp_path, caplog):
    caplog.set_level("INFO")
    library_of("int products_run_here(void) { return 1; }", tmp_path)
    with pytest.raises(Unavailable, match="was built for another version; run pip install again"):
        compiled.load(tmp_path)
    assert [(record.levelname, record.name) for record in caplog.records] == [
        ("INFO", "tpilite.native.bindings")
    ]


_X86 = platform.machine() == "x86_64"
_CHECKS = {
    "avx2": '__builtin_cpu_supports("avx2")',
    "fma": '__builtin_cpu_supports("fma")',
    "f16c": "c & bit_F16C",
}


@pytest.mark.skipif(not _X86, reason="NEON is in every processor of this kind")
@pytest.mark.parametrize("missing", _CHECKS)
def test_a_processor_without_the_instructions_is_left_to_numpy(missing, tmp_path):
    """The same source, asked by a processor that lacks one of those that it is compiled for."""
    source = _SOURCE.read_text()
    assert set(re.findall(r'target\("(.*?)"\)', source)) == {",".join(_CHECKS)}
    assert source.count(_CHECKS[missing]) == 1
    library_of(source.replace(_CHECKS[missing], "0"), tmp_path)
    with pytest.raises(Unavailable, match="need a processor with AVX2, FMA and F16C"):
        compiled.load(tmp_path)


def assert_right(*command):
    assert_prints("3 threads agree with one\n", *command)


_NARROW_AND_WIDE = pytest.mark.parametrize("n_cols", [1037, 4111])


@_NARROW_AND_WIDE
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_no_sanitizer_finds_anything(sanitizer, n_cols, tmp_path):
    assert_right(
        built(
            tmp_path,
            _SOURCE,
            "products_main.c",
            "cc",
            _WIDER,
            "-O1",
            "-g",
            f"-DN_COLUMNS={n_cols}",
            f"-fsanitize={sanitizer}",
        )
    )


@_NARROW_AND_WIDE
def test_they_are_right_on_a_raspberry_pi(n_cols, tmp_path):
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("there is no qemu-aarch64")
    program = built(
        tmp_path,
        _SOURCE,
        "products_main.c",
        "aarch64-linux-gnu-gcc",
        "-O3",
        "-static",
        f"-DN_COLUMNS={n_cols}",
    )
    assert_right("qemu-aarch64", program)
