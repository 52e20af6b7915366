"""The small operations against float64, and the rotary tables against those of transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import reference

from tpilite.config.hugging_face import config_from_hf
from tpilite.model.ops import rms_norm, rope_frequencies, rope_table, rotate, silu, softmax, swiglu

_ROPE = Path(__file__).parents[1] / "fixtures" / "golden" / "rope.npz"


def _random(*shape, scale=1.0):
    return (np.random.RandomState(3).standard_normal(shape) * scale).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rms_norm_is_that_of_float64(scale):
    x, weight = _random(5, 333, scale=scale), _random(333)
    y = rms_norm(x, weight, 1e-5)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_silu_is_that_of_float64_and_never_overflows():
    x = np.concatenate([np.linspace(-30, 30, 1001), [-1e38, -1e4, 1e4, 1e38]]).astype(np.float32)
    wide = x.astype(np.float64)
    y = silu(x)
    assert y.dtype == np.float32
    # Half of the tanh form cancels for negative x: its error is that of 1, times x.
    np.testing.assert_allclose(y, wide / (1 + np.exp(np.minimum(-wide, 700))), rtol=1e-6, atol=2e-6)


def test_swiglu_is_silu_times_the_other_in_place():
    gate, up = _random(40, 3000), _random(40, 3000)
    expected = silu(gate) * up
    y = swiglu(gate, up)
    assert y is gate
    np.testing.assert_array_equal(y, expected)
    assert swiglu(gate[:0], up[:0]).size == swiglu(gate[:, :0], up[:, :0]).size == 0


def test_softmax_is_that_of_float64_in_place_with_masked_scores():
    scores = _random(3, 4, 50, scale=40)
    scores[1, :, 10:] = -np.inf
    wide = scores.astype(np.float64)
    expected = np.exp(wide - wide.max(axis=-1, keepdims=True))
    expected /= expected.sum(axis=-1, keepdims=True)
    y = softmax(scores)
    assert y is scores
    assert y.dtype == np.float32
    # An exponent of size 100 is itself rounded to 100 * 2**-24.
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=1e-30)
    assert not y[1, :, 10:].any()


@pytest.mark.parametrize("name", ["llama2", "yi", "llama3.1", "llama3.2", "linear", "qwen2.5", "yarn"])
def test_rope_tables_are_those_of_transformers_at_positions_to_131071(name):
    golden = np.load(_ROPE)
    published = json.loads(str(golden[f"{name}.config"]))
    config = config_from_hf(published)
    frequencies = rope_frequencies(config)
    cos, sin = rope_table(frequencies, golden["positions"], config.attention_factor)
    assert frequencies.dtype == cos.dtype == sin.dtype == np.float32
    assert cos.shape == sin.shape == (golden["positions"].size, 1, frequencies.size)
    exact = reference.frequencies(published, 2 * frequencies.size)
    # Of a stretch by 40, the float32 blend of the two loses two bits near its end, in transformers too.
    np.testing.assert_allclose(frequencies, exact, rtol=3e-6 if name == "yarn" else 5e-7)
    # Two float32 frequencies may differ in the last place, which the position multiplies.
    allowed = 1e-6 + 4e-7 * golden["positions"][:, None] * exact
    assert (np.abs(cos[:, 0] - golden[f"{name}.cos"]) <= allowed).all()
    assert (np.abs(sin[:, 0] - golden[f"{name}.sin"]) <= allowed).all()


def test_rotation_turns_dimension_i_with_i_plus_half():
    x = _random(4, 3, 10)
    angles = np.random.RandomState(4).uniform(-3, 3, (4, 1, 5)).astype(np.float32)
    y = rotate(x, (np.cos(angles), np.sin(angles)))
    turned = (x[..., :5] + 1j * x[..., 5:]) * np.exp(1j * angles.astype(np.float64))
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-6)


def test_rotation_of_interleaved_pairs_is_that_of_the_same_pairs_half_a_head_apart():
    x = _random(4, 3, 10)
    table = rope_table(np.array([1, 0.3, 0.1, 0.03, 0.01], np.float32), np.array([0, 5, 9, 400]))
    neighbours = np.stack(np.split(x, 2, axis=-1), axis=-1).reshape(x.shape)
    np.testing.assert_array_equal(rotate(neighbours, table, interleaved=True), rotate(x, table))


def test_rows_of_any_position_keep_the_product_of_query_and_key_to_their_distance():
    """The point of rotary embedding: only the distance of two positions counts."""
    table = rope_table(np.array([1.0, 0.1, 0.01], np.float32), np.array([3, 10, 503, 510]))
    q, k = (np.broadcast_to(_random(1, 6)[None], (4, 1, 6)), np.broadcast_to(_random(2, 6)[1:], (4, 1, 6)))
    q, k = rotate(q, table)[:, 0], rotate(k, table)[:, 0]
    np.testing.assert_allclose(q[1] @ k[0], q[3] @ k[2], rtol=1e-3)
