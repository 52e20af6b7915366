"""Packing loses nothing, or is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from packed_rows import widened

from tpilite.linear.matrix import as_float32
from tpilite.linear.packing import ROWS, pack, packed_bytes


def bfloat16(values):
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def normal(n_rows=64, n_cols=1000, scale=0.02):
    return bfloat16(np.random.default_rng(0).standard_normal((n_rows, n_cols), np.float32) * scale)


def packed(rows):
    return pack(rows, bytearray(rows.nbytes * 3 // 4))


def assert_same_bits(found, rows, start=0, stop=None):
    stop = len(rows) if stop is None else stop
    expected = as_float32(rows[start:stop])
    np.testing.assert_array_equal(widened(found, start, stop).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 0.02, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(4, 1000), (64, 2048), (1028, 17)])
def test_normal_weights_take_three_quarters(scale, shape):
    rows = normal(*shape, scale)
    found = packed(rows)
    assert found.shape == rows.shape
    assert 0.75 * rows.nbytes <= found.nbytes <= packed_bytes(*shape) <= 0.78 * rows.nbytes
    assert_same_bits(found, rows)


def test_any_rows_in_groups_can_be_taken_out():
    rows = normal(32, 3000)
    found = packed(rows)
    assert found.exceptions(0, 32)[0].size > 4, "the test needs some"
    for start in range(0, 32, ROWS):
        for stop in range(start, 33, ROWS):
            assert_same_bits(found, rows, start, stop)


@settings(max_examples=200, deadline=None)
@given(
    rows=arrays.arrays(np.uint16, st.tuples(st.sampled_from([4, 8, 64]), st.integers(1, 40))),
    n_others=st.integers(0, 10),
    data=st.data(),
)
def test_whatever_is_packed_comes_out_as_it_was(rows, n_others, data):
    """Any bits at all, mostly refused, and normal weights with a few of them strewn in."""
    mixed = normal(len(rows) * 8, rows.shape[1] * 8)
    for value in data.draw(st.lists(st.integers(0, 0xFFFF), min_size=n_others, max_size=n_others)):
        mixed[data.draw(st.integers(0, len(mixed) - 1)), data.draw(st.integers(0, mixed.shape[1] - 1))] = (
            value
        )
    for values in (rows, mixed):
        found = packed(values)
        if found is not None:
            assert_same_bits(found, values)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-6, 2.0**-20, 300.0, -1e9])
def test_a_few_other_weights_are_kept_exactly(value):
    rows = normal()
    rows[5, 7] = rows[63, 999] = bfloat16(value)
    assert_same_bits(packed(rows), rows)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e-12, 1e-40])
def test_what_would_be_lost_is_refused(value):
    rows = normal()
    rows[5, 7] = bfloat16(value)
    assert packed(rows) is None


def test_weights_over_many_exponents_are_refused():
    rng = np.random.default_rng(0)
    assert packed(bfloat16(2.0 ** rng.uniform(-20, 0, (64, 1000)))) is None


def test_zeros_need_no_exponent():
    rows = normal()
    rows[:, ::3] = rows[:, 1::3] = 0
    assert_same_bits(packed(rows), rows)
    assert packed(rows).exceptions(0, len(rows))[0].size < rows.size / 1000


def test_nothing_but_zeros():
    rows = np.zeros((8, 16), np.uint16)
    rows[3] = 0x8000
    assert_same_bits(packed(rows), rows)
