"""Keys and values as they are kept: the bytes of a position, what rounding costs, what comes back."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpilite.model import kept as kept_module
from tpilite.model.kept import keep, kept_dtype, widened
from tpilite.model.llama import attend


def kept_of(name, x):
    """`x` [K, S, d] as it is kept."""
    out = np.zeros(x.shape[:2], kept_dtype(name, x.shape[2]))
    keep(x, out)
    return out


def by_the_specification(kept, d):
    """The numbers [K, S, d] of a q8_0 array and the scale of each, from its bytes: scales, then codes."""
    n_heads, n_cached = kept.shape
    raw = kept.view(np.uint8).reshape(n_heads, n_cached, -1)
    n_scales = (raw.shape[2] - d) // 2
    scales = raw[:, :, : 2 * n_scales].copy().view("<f2").astype(np.float32)
    scales = np.repeat(scales, d // n_scales, axis=2)
    return raw[:, :, 2 * n_scales :].view(np.int8) * scales, scales


@pytest.mark.parametrize(
    ("name", "head_dim", "n_bytes"),
    [
        ("f32", 64, 256),
        ("f16", 64, 128),
        ("q8_0", 64, 64 + 2 * 2),
        ("q8_0", 128, 128 + 2 * 4),
        ("q8_0", 96, 96 + 2 * 3),
        ("q8_0", 80, 80 + 2 * 4),  # blocks of 20
        ("q8_0", 100, 100 + 2 * 4),  # of 25
        ("q8_0", 6, 6 + 2),
    ],
)
def test_a_heads_position_takes_so_many_bytes(name, head_dim, n_bytes):
    assert kept_dtype(name, head_dim).itemsize == n_bytes
    assert np.zeros((3, 5), kept_dtype(name, head_dim)).nbytes == 15 * n_bytes


@settings(deadline=None, max_examples=150)
@given(
    n_heads=st.integers(1, 3),
    n_cached=st.integers(1, 5),
    head_dim=st.sampled_from([2, 6, 32, 64, 80, 100, 128]),
    seed=st.integers(0, 99),
    exponent=st.integers(-10, 6),
)
def test_errors_of_eight_bits_are_at_most_half_a_step(n_heads, n_cached, head_dim, seed, exponent):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((n_heads, n_cached, head_dim)) * 10.0**exponent).astype(np.float32)
    kept = kept_of("q8_0", x)
    found, scales = by_the_specification(kept, head_dim)
    assert (np.abs(found - x) <= scales * np.float32(0.5 + 1e-5)).all()
    block = kept["codes"].shape[2] // kept["scales"].shape[2]
    largest = np.repeat(np.abs(x.reshape(n_heads, n_cached, -1, block)).max(-1), block, axis=2)
    assert (scales <= largest / 127 * (1 + 2.0**-9) + 2.0**-23).all()


@pytest.mark.parametrize("name", ["f16", "q8_0"])
def test_positions_are_kept_by_themselves(name):
    x = np.random.default_rng(3).standard_normal((2, 9, 64)).astype(np.float32)
    together = kept_of(name, x)
    alone = np.concatenate([kept_of(name, x[:, i : i + 1]) for i in range(9)], axis=1)
    assert alone.tobytes() == together.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 8.4e6, -3e38])
def test_what_eight_bits_cannot_hold_makes_its_block_nan(value):
    x = np.random.default_rng(4).standard_normal((2, 3, 64)).astype(np.float32)
    x[1, 2, 40] = value
    ((_, lift, found),) = widened(kept_of("q8_0", x), 64, 2)
    lost = np.zeros(x.shape, bool)
    lost[1, 2, 32:] = True
    np.testing.assert_array_equal(np.isnan(found * lift), lost)


def test_what_eight_bits_hold_at_most_and_at_least():
    x = np.zeros((1, 1, 96), np.float32)
    x[0, 0, [0, 32]] = 8.3e6, 6e-8
    ((_, _, found),) = widened(kept_of("q8_0", x), 96, 1)
    np.testing.assert_allclose(found, x, rtol=0.01)


@pytest.mark.parametrize("n_cached", [1, 15, 16, 17, 300])
@pytest.mark.parametrize("name", ["f32", "f16", "q8_0"])
def test_parts_give_back_all_positions(monkeypatch, name, n_cached):
    monkeypatch.setattr(kept_module, "_WIDENED_BYTES", 4 * 4 * 80 * 32)
    x = np.random.default_rng(5).standard_normal((2, n_cached, 80)).astype(np.float32)
    kept = kept_of(name, x)
    expected = by_the_specification(kept, 80)[0] if name == "q8_0" else kept.astype(np.float32)
    found = np.full_like(x, np.nan)
    for part, lift, values in widened(kept, 80, 4):
        assert name == "f32" or part.stop - part.start <= 32
        found[:, part] = values * lift
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["f16", "q8_0"])
def test_attention_makes_no_float32_copy_of_what_is_kept(name):
    n_cached, d = 30_000, 64
    kept = np.zeros((2, n_cached), kept_dtype(name, d))
    q = np.zeros((1, 2, d), np.float32)
    attend(q, kept, kept, np.empty_like(q))
    tracemalloc.start()
    try:
        attend(q, kept, kept, np.empty_like(q))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * n_cached * d * 4 / 10
