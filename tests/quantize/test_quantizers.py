"""Blocks made of weights: no worse than ggml's own, within what their codes allow, and never out of range."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tpilite.errors import CheckpointError
from tpilite.linear.block_types import BLOCK_TYPES
from tpilite.quantize.quantizers import QUANTIZERS, quantize_rows

GGML = json.loads((Path(__file__).parents[1] / "fixtures" / "ggml_quantizers.json").read_text())

# Of the largest weight of a block: the most that a weight may move. A step of the codes, since the largest
# may be cut off; and in blocks of 256 the scales' own steps.
_MOST = {
    "Q8_0": 0.008,
    "Q6_K": 0.04,
    "Q5_K": 0.12,
    "Q4_K": 0.22,
    "Q5_1": 0.1,
    "Q5_0": 0.1,
    "Q4_1": 0.2,
    "Q4_0": 0.2,
}

of_each_type = pytest.mark.parametrize("kind", [BLOCK_TYPES[name] for name in QUANTIZERS], ids=QUANTIZERS)


def there_and_back(kind, rows, importance=None):
    blocks = quantize_rows("w", rows, kind, importance)
    assert blocks.shape == (len(rows), rows.shape[1] // kind.n_weights * kind.n_bytes)
    return kind.dequantize(blocks.reshape(-1, kind.n_bytes)).reshape(rows.shape)


def weights(shape, seed=0):
    """Weights with a few large ones among them, as models have them."""
    return (0.02 * np.random.default_rng(seed).standard_t(5, shape)).astype(np.float32)


@of_each_type
@pytest.mark.parametrize("weighing", ["even", "half", "square", "importance"])
def test_errors_are_not_above_those_of_ggml(kind, weighing):
    rows = weights((64, 512))
    importance = np.random.default_rng(1).chisquare(2, 512).astype(np.float32) + np.float32(0.01)
    given_importance = importance if weighing == "importance" else None
    error = there_and_back(kind, rows, given_importance).astype(np.float64) - rows
    size = np.abs(rows)
    weight = {
        "even": 1,
        "half": np.sqrt(np.mean(rows.reshape(64, -1, 32) ** 2, axis=2)).repeat(32, axis=1) + size,
        "square": size**2,
        "importance": importance,
    }[weighing]
    assert np.sqrt((weight * error**2).sum() / (weight * rows**2).sum()) <= GGML[kind.name][weighing]


@of_each_type
def test_importance_moves_the_error_to_other_columns(kind):
    rows, importance = weights((16, 512)), np.ones(512, np.float32)
    importance[::2] = 100
    plain, weighed = (there_and_back(kind, rows, given) - rows for given in (None, importance))
    assert np.square(weighed[:, ::2]).sum() < np.square(plain[:, ::2]).sum()
    assert np.square(weighed[:, 1::2]).sum() > np.square(plain[:, 1::2]).sum()


@of_each_type
def test_no_weight_moves_far(kind):
    rows = weights((64, 512), seed=2)
    largest = np.abs(rows).reshape(-1, kind.n_weights).max(1, keepdims=True)
    moved = np.abs(there_and_back(kind, rows) - rows).reshape(-1, kind.n_weights)
    assert (moved <= _MOST[kind.name] * largest).all()


@of_each_type
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 3e-3, 60000.0, -65504.0])
def test_equal_weights_stay_nearly_equal(kind, value):
    rows = np.full((2, 256), value, np.float32)
    np.testing.assert_allclose(there_and_back(kind, rows), rows, rtol=2e-2)


@of_each_type
@pytest.mark.parametrize("sign", [1, -1])
def test_one_large_weight_among_zeros(kind, sign):
    rows = np.zeros((1, 256), np.float32)
    rows[0, 37] = sign * 3.0
    found = there_and_back(kind, rows)
    np.testing.assert_allclose(found[0, 37], rows[0, 37], rtol=1e-2)
    found[0, 37] = 0  # the others are 0 but for how float16 rounds the smallest weight
    assert np.abs(found).max() <= 2e-3


@of_each_type
@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1e-12, 1e-8, 3e-7])
def test_weights_near_nothing_stay_there(kind, size):
    rows = (size * np.random.default_rng(0).standard_normal((2, 256))).astype(np.float32)
    assert np.abs(there_and_back(kind, rows) - rows).max() <= max(4 * size, 1e-7)


@of_each_type
def test_scales_that_float16_would_round_to_nothing_do_not_lose_their_weights(kind):
    rows = np.full((1, 256), 3e-6, np.float32)
    np.testing.assert_allclose(there_and_back(kind, rows), rows, rtol=0.05)


@of_each_type
def test_no_rows(kind):
    assert there_and_back(kind, np.zeros((0, 512), np.float32)).shape == (0, 512)


@of_each_type
def test_many_rows_give_what_a_few_give(kind):
    rows = weights((150, 512))
    together = quantize_rows("w", rows, kind)
    apart = [quantize_rows("w", rows[start : start + 37], kind) for start in range(0, 150, 37)]
    np.testing.assert_array_equal(together, np.vstack(apart))


@of_each_type
def test_columns_of_no_importance_are_not_given_up(kind):
    rows, importance = weights((4, 512)), np.zeros(512, np.float32)
    np.testing.assert_allclose(there_and_back(kind, rows, importance), rows, atol=0.6 * np.abs(rows).max())
    importance[::8] = 1
    np.testing.assert_allclose(there_and_back(kind, rows, importance), rows, atol=0.6 * np.abs(rows).max())


@of_each_type
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_name(kind, bad):
    rows = weights((2, 256))
    rows[1, 200] = bad
    with pytest.raises(CheckpointError, match=r"blk\.weight holds weights that are not finite"):
        quantize_rows("blk.weight", rows, kind)


@of_each_type
def test_what_float16_cannot_scale_is_refused(kind):
    rows = weights((2, 256))
    rows[0, 3] = -1e5
    with pytest.raises(CheckpointError, match=r"w holds the weight 100000; .* beyond 65504"):
        quantize_rows("w", rows, kind)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_values_that_a_block_can_hold_stay_as_they_are(name):
    kind, rng = BLOCK_TYPES[name], np.random.default_rng(3)
    codes = rng.integers(0, 1 << int(name[1]), (200, 32))
    codes[:, 0], codes[:, 1] = 0, (1 << int(name[1])) - 1
    if name == "Q8_0":
        codes = np.maximum(codes, 1)
    middle = 0 if name.endswith("_1") else 1 << (int(name[1]) - 1)
    scale = rng.uniform(0.01, 1, (200, 1)).astype(np.float16).astype(np.float32)
    rows = (scale * (codes - middle)).astype(np.float32)
    np.testing.assert_allclose(there_and_back(kind, rows), rows, rtol=2e-3, atol=1e-3)


@of_each_type
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_whatever_is_finite_comes_back_near(kind, data):
    elements = st.floats(-60000, 60000, width=32)
    rows = data.draw(arrays(np.float32, (2, 256), elements=elements, fill=elements))
    importance = data.draw(st.none() | arrays(np.float32, 256, elements=st.floats(0, 1e6, width=32)))
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        found = there_and_back(kind, rows, importance)
    largest = np.abs(rows).reshape(-1, kind.n_weights).max(1, keepdims=True)
    moved = np.abs(found - rows).reshape(-1, kind.n_weights)
    # With importance, what counts little may move by more; never out of the block's range.
    assert (moved <= (2 * _MOST[kind.name] if importance is None else 1.2) * largest + 1e-6).all()
