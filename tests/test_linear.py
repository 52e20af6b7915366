"""Stored matrices times vectors, against float64 on the same stored values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpilite.linear import Linear, Matrix, as_float32


def stored(rng, dtype, shape):
    w = rng.standard_normal(shape).astype(np.float32)
    if dtype == "bf16":
        return (w.view(np.uint32) >> 16).astype(np.uint16)
    return w.astype(np.float16 if dtype == "f16" else np.float32)


def check(y, x, w, bias=None):
    """Within 1e-6 of sum |w||x|, the natural unit of a dot product's rounding."""
    wide, x = as_float32(w).astype(np.float64), x.astype(np.float64)
    expected = x @ wide.T
    unit = np.abs(x) @ np.abs(wide).T
    if bias is not None:
        expected += bias
        unit += np.abs(bias)
    assert y.dtype == np.float32
    assert y.shape == expected.shape
    assert (np.abs(y - expected) <= 1e-6 * unit).all()


@given(
    dtype=st.sampled_from(["bf16", "f16", "f32"]),
    t=st.sampled_from([1, 2, 3, 16, 65]),
    n_rows=st.integers(0, 700),
    n_cols=st.integers(0, 300),
    n_threads=st.sampled_from([1, 2]),
)
def test_is_the_product_of_the_stored_values(dtype, t, n_rows, n_cols, n_threads):
    rng = np.random.default_rng(7)
    x = rng.standard_normal((t, n_cols)).astype(np.float32)
    w = [stored(rng, dtype, (n, n_cols)) for n in (n_rows, n_rows // 3)]
    bias = rng.standard_normal(n_rows).astype(np.float32)
    with Linear(n_threads) as linear:
        a, b = linear(x, Matrix.of(w[0], bias), Matrix.of(w[1]))
    check(a, x, w[0], bias)
    check(b, x, w[1])


@pytest.mark.parametrize("n_threads", [1, 2])
def test_an_error_in_any_thread_reaches_the_caller(n_threads):
    w = np.zeros((64, 8), np.float32)
    with Linear(n_threads) as linear:
        with pytest.raises(ValueError, match="mismatch"):
            linear(np.zeros((1, 7), np.float32), Matrix.of(w))
        (y,) = linear(np.zeros((1, 8), np.float32), Matrix.of(w))
    assert not y.any()
