"""How products are cut into calls, and what the BLAS of this machine is trusted with."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpilite.linear import calls
from tpilite.linear.calls import blas_repeats, call_rows, part_rows


@given(n_cols=st.integers(1, 30_000), n_x=st.integers(1, 600))
def test_parts_are_whole_calls(n_cols, n_x):
    assert part_rows(n_cols) % call_rows(n_cols, n_x) == 0
    assert call_rows(n_cols, n_x) % 24 == 0


def test_a_blas_that_does_not_repeat_its_bits_is_found_out(monkeypatch):
    assert blas_repeats()
    multiply, n_calls = calls.multiply_in_calls, []

    def other_from_the_third_on(weights, columns, out, rows_per_call):
        multiply(weights, columns, out, rows_per_call)
        n_calls.append(1)
        if len(n_calls) >= 3:
            np.nextafter(out, np.float32(np.inf), out=out)

    monkeypatch.setattr(calls, "multiply_in_calls", other_from_the_third_on)
    assert not blas_repeats()


@pytest.mark.parametrize("n_rows", [1, 23, 24, 48, 73])
@pytest.mark.parametrize("n_x", [1, 3])
def test_calls_make_up_the_product(n_rows, n_x):
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((n_rows, 50), np.float32), rng.standard_normal((50, n_x), np.float32)
    out = np.full((n_x, n_rows), np.nan, np.float32)
    calls.multiply_in_calls(w, x, out.T, 24)
    np.testing.assert_allclose(out.T, w.astype(float) @ x, atol=1e-5)
