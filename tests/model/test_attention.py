"""Attention against float64, in tiles, by threads, over what fewer bits keep; the memory of its scores."""

import numpy as np
import pytest
from tiny_model import SMALL, Tiny, assert_close, ids_of

from tpilite.linear.linear import Linear
from tpilite.model import kept as kept_module
from tpilite.model import llama as model_module
from tpilite.model.kept import KV_DTYPES, keep, kept_dtype, widened
from tpilite.model.llama import attend


@pytest.mark.parametrize("tile", [1, 3, 16, 40, 41])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_attention_is_that_of_float64_for_any_tile(monkeypatch, tile, n_heads, n_kv_heads):
    n_rows, n_cached, d = 40, 301, 6
    monkeypatch.setattr(model_module, "_SCORE_BYTES", tile * 4 * n_heads * n_cached)
    scores_seen = []
    softmax = model_module.softmax
    monkeypatch.setattr(model_module, "softmax", lambda s: scores_seen.append(s.nbytes) or softmax(s))
    rng = np.random.RandomState(6)
    q = rng.standard_normal((n_rows, n_heads, d)).astype(np.float32) * 3
    keys, values = rng.standard_normal((2, n_kv_heads, n_cached, d)).astype(np.float32)
    out = np.full_like(q, np.nan)
    attend(q, keys, values, out)
    for row in range(n_rows):
        seen = n_cached - n_rows + row + 1
        for head in range(n_heads):
            group = head // (n_heads // n_kv_heads)
            scores = keys[group, :seen].astype(np.float64) @ q[row, head] / np.sqrt(d)
            weights = np.exp(scores - scores.max())
            expected = weights / weights.sum() @ values[group, :seen]
            np.testing.assert_allclose(out[row, head], expected, atol=2e-5)
    assert len(scores_seen) == -(-n_rows // tile)
    assert max(scores_seen) <= tile * 4 * n_heads * n_cached


@pytest.mark.parametrize("n_cached", [1, 15, 16, 300])
def test_attention_over_float16_is_that_over_what_was_kept(monkeypatch, n_cached):
    monkeypatch.setattr(kept_module, "_WIDENED_BYTES", 4 * 2 * 6 * 64)
    rng = np.random.RandomState(7)
    q = rng.standard_normal((1, 4, 6)).astype(np.float32) * 3
    kept = rng.standard_normal((2, 2, n_cached, 6)).astype(np.float16)
    kept[0, 0, 0] = [
        65504,
        -65504,
        0,
        -0.0,
        6e-8,
        -6e-5,
    ]  # the largest, zeros, and what has no full precision
    expected, found = np.empty_like(q), np.empty_like(q)
    attend(q, *kept.astype(np.float32), expected)
    attend(q, *kept, found)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("n_rows", [1, 40])
@pytest.mark.parametrize("n_cached", [40, 300])
def test_attention_over_eight_bits_is_that_over_what_was_kept(monkeypatch, n_cached, n_rows):
    """Also for the rows of the pass itself: what is attended to does not depend on where a chunk ends."""
    monkeypatch.setattr(kept_module, "_WIDENED_BYTES", 4 * 2 * 64 * 48)
    rng = np.random.RandomState(7)
    q = rng.standard_normal((n_rows, 4, 64)).astype(np.float32)
    kept = np.zeros((2, 2, n_cached), kept_dtype("q8_0", 64))
    keep(rng.standard_normal((4, n_cached, 64)).astype(np.float32), kept.reshape(4, n_cached))
    plain = np.empty((2, 2, n_cached, 64), np.float32)
    for given, out in zip(kept, plain, strict=True):
        for part, lift, values in widened(given, 64, 2):
            out[:, part] = values * lift
    expected, found = np.empty_like(q), np.empty_like(q)
    attend(q, *plain, expected)
    attend(q, *kept, found)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (6, 3), (8, 2), (3, 1)])
def test_threads_share_the_heads_of_attention(monkeypatch, n_heads, n_kv_heads):
    monkeypatch.setattr(model_module, "_SHARED_FROM", 0)
    config = dict(SMALL, num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, head_dim=4)
    tiny, ids = Tiny(config), ids_of(30)
    with Linear(3) as linear:
        assert_close(tiny.logits(tiny.llama(linear), ids, chunk=7), tiny.reference(ids))


@pytest.mark.parametrize("name", KV_DTYPES)
def test_a_kept_prefix_is_as_good_as_a_new_one_and_what_followed_it_leaves_no_trace(name):
    tiny, ids, others = Tiny(SMALL), ids_of(40), ids_of(25, seed=1)
    llama = tiny.llama()
    llama.kv_dtype = name
    alone, kept = llama.new_cache(), llama.new_cache()
    tiny.logits(llama, ids[:30], cache=alone)
    tiny.logits(llama, ids[:30], cache=kept)
    tiny.logits(llama, others, cache=kept, chunk=5)
    kept.truncate(30)
    found, expected = (tiny.logits(llama, ids[30:], cache=cache) for cache in (kept, alone))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("name", "n_bytes", "most"), [("f16", 8, 2e-3), ("q8_0", 6, 3e-2)])
def test_fewer_bits_take_and_cost_what_is_said(name, n_bytes, most):
    tiny, ids = Tiny(SMALL), ids_of(40)
    caches, logits = [], []
    for dtype in ("f32", name):
        llama = tiny.llama()
        llama.kv_dtype = dtype
        caches.append(llama.new_cache())
        logits.append(tiny.logits(llama, ids, cache=caches[-1], chunk=7))
    assert caches[1].nbytes * 4 * 4 == caches[0].nbytes * n_bytes
    error = np.abs(logits[1] - logits[0]).max() / np.abs(logits[0]).max()
    assert 0 < error < most


@pytest.mark.parametrize(("name", "most"), [("f16", 1e-5), ("q8_0", 1e-2)])
def test_fewer_bits_leave_the_choice_of_tokens_as_it_was(stories, name, most):
    """The mean KL divergence from float32's, of a trained model, whatever the chunks."""
    ids, logits = ids_of(200, 512), []
    for dtype, chunk in (("f32", 200), (name, 200), (name, 1)):
        llama = stories.llama()
        llama.kv_dtype = dtype
        scores = stories.logits(llama, ids, chunk=chunk).astype(np.float64)
        logits.append(scores - np.log(np.exp(scores).sum(1, keepdims=True)))
    for found in logits[1:]:
        divergence = (np.exp(logits[0]) * (logits[0] - found)).sum(1).mean()
        assert 0 < divergence < most


def test_scores_of_a_long_prompt_stay_within_their_memory(monkeypatch):
    scores_seen = []
    softmax = model_module.softmax
    monkeypatch.setattr(model_module, "softmax", lambda s: scores_seen.append(s.nbytes) or softmax(s))
    q = np.zeros((256, 8, 4), np.float32)
    keys = np.zeros((2, 4000, 4), np.float32)
    attend(q, keys, keys, np.empty_like(q))
    assert max(scores_seen) <= 8 << 20 < sum(scores_seen)
