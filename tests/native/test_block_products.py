"""Compiled products of rows in GGML's blocks against float64 on the values that NumPy gives them."""

import platform
import shutil
from pathlib import Path

import numpy as np
import pytest
from block_rows import random_blocks
from c_programs import assert_prints, built
from compiled_code import PRODUCTS, needs_products
from hypothesis import given, settings
from hypothesis import strategies as st

from tpilite.linear.block_types import BLOCK_TYPES
from tpilite.linear.linear import Linear
from tpilite.linear.matrix import Blocks, Matrix, as_float32
from tpilite.linear.products import Product
from tpilite.native import products as compiled
from tpilite.native.products import CompiledProducts

_SOURCE = Path(compiled.__file__).with_name("products.c")
_WITHOUT = {"Q2_K", "Q3_K"}
_TYPES = [name for name in BLOCK_TYPES if name not in _WITHOUT]


def multiplied(x, *rows, allow_avx512=True):
    products = CompiledProducts(PRODUCTS, 1, allow_avx512)
    outs = [np.empty((len(x), len(r.bytes)), np.float32) for r in rows]
    products.multiply(x, [Product(r, out) for r, out in zip(rows, outs, strict=True)])
    products.close()
    return outs


def expected(x, rows):
    """The sums in double precision, and the natural unit of their rounding."""
    wide, x = as_float32(rows).astype(np.float64), x.astype(np.float64)
    return x @ wide.T, np.abs(x) @ np.abs(wide).T


@needs_products
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_products_of_blocks(data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    n_cols = 256 * draw(st.integers(1, 5) | st.sampled_from([16, 33]))
    x = rng.standard_normal((draw(st.sampled_from([1, 2, 3, 4, 5, 8, 119, 123, 250])), n_cols), np.float32)
    kinds = draw(st.lists(st.sampled_from(_TYPES), min_size=1, max_size=3))
    rows = [random_blocks(rng, kind, draw(st.integers(1, 40)), n_cols) for kind in kinds]
    for y, w in zip(multiplied(x, *rows, allow_avx512=draw(st.booleans())), rows, strict=True):
        sums, units = expected(x, w)
        assert (np.abs(y - sums) <= 1e-6 * units).all()


@needs_products
@pytest.mark.parametrize("kind", _TYPES)
@pytest.mark.parametrize("allow_avx512", [False, True])
def test_bits_depend_on_nothing_but_the_row_and_its_x(kind, allow_avx512):
    rng = np.random.default_rng(0)
    rows, x = random_blocks(rng, kind, 41, 1280), rng.standard_normal((125, 1280), np.float32)
    (all_at_once,) = multiplied(x, rows, allow_avx512=allow_avx512)
    for t in (0, 7, 124):
        for i, n in ((0, 41), (3, 1), (5, 6), (40, 1)):
            (y,) = multiplied(x[t : t + 1], rows[i : i + n], allow_avx512=allow_avx512)
            np.testing.assert_array_equal(y, all_at_once[t : t + 1, i : i + n])
    (y,) = multiplied(x[3:6], rows, allow_avx512=allow_avx512)
    np.testing.assert_array_equal(y, all_at_once[3:6])


@needs_products
@pytest.mark.parametrize("kind", _TYPES)
def test_every_single_weight_is_that_of_numpy(kind):
    rng = np.random.default_rng(1)
    rows = random_blocks(rng, kind, 30, 256)
    (y,) = multiplied(np.eye(256, dtype=np.float32), rows)
    exact = as_float32(rows)
    scale = np.abs(exact).max(axis=1, keepdims=True)
    assert (np.abs(y.T - exact) <= 1e-6 * scale).all()


@needs_products
def test_rows_may_lie_apart_and_begin_at_any_byte():
    rng = np.random.default_rng(2)
    rows, x = random_blocks(rng, "Q6_K", 9, 512), rng.standard_normal((3, 512), np.float32)
    file = np.zeros((9, 1 + rows.bytes.shape[1] + 6), np.uint8)
    file[:, 1:-6] = rows.bytes
    for t in (1, 3):
        (y,), (z,) = multiplied(x[:t], rows), multiplied(x[:t], Blocks(rows.type, file[:, 1:-6], 512))
        np.testing.assert_array_equal(y, z)


@needs_products
@pytest.mark.parametrize("kind", sorted(_WITHOUT))
def test_numpy_multiplies_the_types_that_have_no_kernel(kind):
    rng = np.random.default_rng(3)
    without, with_one = random_blocks(rng, kind, 30, 256), random_blocks(rng, "Q4_K", 30, 256)
    x = rng.standard_normal((2, 256), np.float32)
    products = CompiledProducts(PRODUCTS, 2)
    assert products.takes(with_one)
    assert not products.takes(without)
    with Linear(2, products) as linear:
        results = linear(x, Matrix.of(without), Matrix.of(with_one), Matrix.of(without))
    for y, w in zip(results, (without, with_one, without), strict=True):
        sums, units = expected(x, w)
        assert (np.abs(y - sums) <= 1e-6 * units).all()


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """A file with rows of each type, rows of x, and their products, for blocks_main.c."""
    rng = np.random.default_rng(4)
    path = tmp_path_factory.mktemp("blocks") / "cases"
    with path.open("wb") as file:
        for kind in _TYPES:
            rows, x = random_blocks(rng, kind, 17, 768), rng.standard_normal((7, 768), np.float32)
            header = [compiled.BLOCK_TYPES[kind], *rows.shape, rows.bytes.shape[1], len(x)]
            for array in (np.array(header, np.int64), rows.bytes, x, *expected(x, rows)):
                file.write(array.tobytes())
    return path


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_no_sanitizer_finds_anything_in_blocks(sanitizer, cases, tmp_path):
    wider = _SOURCE.with_name("blocks_avx512.c")
    program = built(tmp_path, _SOURCE, "blocks_main.c", "cc", wider, "-O1", "-g", f"-fsanitize={sanitizer}")
    assert_prints("all types agree\n", program, cases)


@pytest.mark.skipif(platform.machine() == "aarch64", reason="the other tests do this here")
def test_blocks_are_right_on_a_raspberry_pi(cases, tmp_path):
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("there is no qemu-aarch64")
    program = built(tmp_path, _SOURCE, "blocks_main.c", "aarch64-linux-gnu-gcc", "-O3", "-static")
    assert_prints("all types agree\n", "qemu-aarch64", program, cases)
