"""The cache of keys and values: what is put in comes out, and memory follows the text."""

import numpy as np
import pytest

from tpilite.model.kept import KV_DTYPES, keep, kept_dtype
from tpilite.model.kv_cache import KVCache

every_dtype = pytest.mark.parametrize("dtype", KV_DTYPES)


def _kept(x, dtype):
    """`x` [T, K, d] as it is kept, [K, T]."""
    out = np.zeros((x.shape[1], x.shape[0]), kept_dtype(dtype, x.shape[2]))
    keep(x.transpose(1, 0, 2), out)
    return out


def _fill(cache, n_layers, keys, values, sizes, dtype="f32"):
    """Appends `keys` and `values` [L, T, K, d] in passes of the given sizes."""
    start = 0
    for size in sizes:
        stop = start + size
        cache.reserve(stop)
        for layer in range(n_layers):
            got = cache.append(layer, keys[layer, start:stop], values[layer, start:stop])
            for view, given in zip(got, (keys, values), strict=True):
                np.testing.assert_array_equal(view, _kept(given[layer, :stop], dtype))
        cache.advance(size)
        start = stop


def _random(*shape):
    return np.random.RandomState(5).random_sample(shape).astype(np.float32)


@pytest.mark.parametrize("sizes", [[200], [1] * 200, [63, 1, 1, 100, 35], [64, 1, 15, 1, 119]])
@every_dtype
def test_every_position_comes_back_however_it_was_put_in(sizes, dtype):
    keys, values = _random(2, 3, 200, 2, 4)
    cache = KVCache(n_layers=3, n_kv_heads=2, head_dim=4, max_length=300, dtype=dtype)
    _fill(cache, 3, keys, values, sizes, dtype)
    assert cache.length == 200


@pytest.mark.parametrize(("dtype", "head_bytes"), [("f32", 256), ("f16", 128), ("q8_0", 68)])
def test_memory_grows_with_the_text_and_never_beyond_the_context(dtype, head_bytes):
    cache = KVCache(n_layers=2, n_kv_heads=3, head_dim=64, max_length=1000, dtype=dtype)
    bytes_per_position = 2 * 2 * 3 * head_bytes
    assert cache.position_bytes == bytes_per_position
    assert cache.nbytes == 0
    steps = []
    for length in range(1, 1001):
        before, expected = cache.nbytes, cache.bytes_for(length)
        cache.reserve(length)
        assert cache.nbytes == expected
        cache.advance(1)
        capacity = cache.nbytes // bytes_per_position
        assert length <= capacity <= min(1000, max(64, length * 1.25))
        if cache.nbytes != before:
            steps.append(capacity)
    assert steps[0] == 64
    assert len(steps) < 15  # a copy of the whole cache each
    assert cache.nbytes == 1000 * bytes_per_position


@every_dtype
def test_truncated_positions_are_written_anew(dtype):
    keys, values = _random(2, 1, 100, 2, 4)
    cache = KVCache(n_layers=1, n_kv_heads=2, head_dim=4, max_length=100, dtype=dtype)
    _fill(cache, 1, -keys, -values, [90], dtype)
    cache.truncate(0)
    _fill(cache, 1, keys, values, [30], dtype)
    cache.truncate(20)
    cache.reserve(100)
    got, _ = cache.append(0, keys[0, 20:], values[0, 20:])
    np.testing.assert_array_equal(got, _kept(keys[0], dtype))


@every_dtype
def test_a_rank_without_heads_keeps_a_length_and_no_bytes(dtype):
    cache = KVCache(n_layers=2, n_kv_heads=0, head_dim=4, max_length=100, dtype=dtype)
    empty = np.empty((1, 2, 70, 0, 4), np.float32)
    _fill(cache, 2, empty[0], empty[0], [65, 5], dtype)
    assert (cache.length, cache.nbytes) == (70, 0)


def test_the_cache_is_float32_unless_it_is_told():
    cache = KVCache(n_layers=1, n_kv_heads=1, head_dim=2, max_length=10)
    cache.reserve(1)
    keys, values = cache.append(0, np.ones((1, 1, 2), np.float32), np.ones((1, 1, 2), np.float32))
    assert keys.dtype == values.dtype == np.float32
