"""Numbers as they travel: what a frame holds byte by byte, and what comes out of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpilite.net.codecs import CODECS

EIGHT_BITS = CODECS["q8"]
LARGEST = float(np.finfo(np.float32).max)


def sent(x):
    """The frames of the rows of `x` [n_frames, n], and the codec that made them."""
    codec = EIGHT_BITS(*x.shape)
    out = np.full((len(x), codec.width), 0xEE, codec.dtype)
    codec.narrow(x, out)
    return out, codec


def by_the_specification(frame, n):
    """The numbers of a frame: codes, then scales as the upper halves of float32."""
    n_blocks = len(frame) // 34
    codes = frame[: 32 * n_blocks].view(np.int8).astype(np.float32).reshape(n_blocks, 32)
    upper = frame[32 * n_blocks :].reshape(n_blocks, 2)
    scales = np.concatenate([np.zeros_like(upper), upper], axis=1).reshape(-1).view("<f4")
    return (codes * scales[:, None]).reshape(-1)[:n], scales


@pytest.mark.parametrize(("payload", "n_bytes"), [("f32", 400), ("f16", 200), ("bf16", 200), ("q8", 4 * 34)])
def test_a_frame_of_100_numbers_has_so_many_bytes(payload, n_bytes):
    codec = CODECS[payload](1, 100)
    assert codec.width * codec.dtype.itemsize == n_bytes


@settings(deadline=None, max_examples=150)
@given(
    n=st.integers(1, 130),
    n_frames=st.integers(1, 3),
    seed=st.integers(0, 99),
    exponent=st.integers(-42, 36),
    outliers=st.booleans(),
)
def test_errors_are_at_most_half_a_step(n, n_frames, seed, exponent, outliers):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_frames, n)) * (1 + 1e3 * outliers * (rng.random((n_frames, n)) > 0.95))
    x = (x * 10.0 ** min(exponent, 34)).astype(np.float32)
    frames, codec = sent(x)
    found = codec.widen(frames)
    assert found.shape == x.shape
    assert found.dtype == np.float32
    for row, frame, values in zip(x, frames, found, strict=True):
        expected, scales = by_the_specification(frame, n)
        np.testing.assert_array_equal(values, expected)
        for i, scale in enumerate(scales.astype(np.float64)):
            block = slice(32 * i, 32 * i + 32)
            largest = np.abs(row[block].astype(np.float64)).max()
            assert scale <= max(largest / 127 * (1 + 2**-7) * (1 + 2**-22), 2.0**-126)
            assert np.abs(values[block].astype(np.float64) - row[block]).max() <= scale * (0.5 + 1e-5)


def test_the_largest_number_of_a_block_has_a_code_and_keeps_its_sign():
    x = np.zeros((1, 64), np.float32)
    x[0, [3, 40]] = 5, -7
    frames, _ = sent(x)
    codes = frames[0, :64].view(np.int8)
    assert codes[3] in (126, 127)
    assert codes[40] in (-126, -127)
    assert np.count_nonzero(codes) == 2


@pytest.mark.parametrize("value", [0.0, 2.0**-149, -(2.0**-130), 2.0**-120, LARGEST, -LARGEST])
def test_no_finite_number_becomes_another_kind(value):
    x = np.zeros((1, 33), np.float32)
    x[0, [0, 32]] = value
    frames, codec = sent(x)
    found = codec.widen(frames)
    assert not np.isnan(found).any()
    np.testing.assert_allclose(found, x, rtol=2**-7, atol=2.0**-127)
    np.testing.assert_array_equal(found[0, 1:32], 0)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 31, 32, 69])
def test_what_is_not_finite_makes_its_block_nan_and_no_other(value, at):
    x = np.random.default_rng(1).standard_normal((2, 70)).astype(np.float32)
    x[0, at] = value
    if np.isnan(value):
        x[0, at] = np.array(0xFFFFFFFF, np.uint32).view(np.float32)
    frames, codec = sent(x)
    found = codec.widen(frames)
    hidden = np.zeros(x.shape, bool)
    hidden[0, at // 32 * 32 : at // 32 * 32 + 32] = True
    np.testing.assert_array_equal(np.isnan(found), hidden)


def test_frames_do_not_depend_on_each_other_or_on_what_was_sent_before():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 45)).astype(np.float32)
    together, codec = sent(x)
    codec.narrow(np.full((3, 45), np.nan, np.float32), np.empty_like(together))
    alone = np.empty_like(together)
    for row, out in zip(x, alone, strict=True):
        codec.narrow(row, out)
    np.testing.assert_array_equal(alone, together)
    expected = codec.widen(together).copy()
    np.testing.assert_array_equal([codec.widen(frame).copy() for frame in alone], expected)
