"""The forward pass against transformers and float64, whole and in chunks, alone and in company."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import GOLDEN, SMALL, Tiny, assert_close, ids_of, plain_linear

from tpilite.collective import Solo
from tpilite.linear.linear import Linear
from tpilite.model import llama as model_module
from tpilite.model.llama import Segment

_CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


@pytest.mark.parametrize("linear", ["plain", "threads"])
@pytest.mark.parametrize("case", _CASES)
def test_logits_are_those_of_transformers_and_of_float64(case, linear):
    config = json.loads((GOLDEN / case / "config.json").read_text())
    golden = np.load(GOLDEN / case / "golden.npz")
    tiny, ids = Tiny(config, int(golden["seed"]), str(golden["stored"])), golden["ids"]
    with Linear(2) as threads:
        llama = tiny.llama(plain_linear if linear == "plain" else threads)
        logits = tiny.logits(llama, ids, chunk=100)
    assert_close(logits[golden["rows"]], golden["logits"], 1e-4)
    assert_close(logits, tiny.reference(ids), 1e-4)


def test_a_trained_model_gives_the_logits_of_float64(stories):
    ids = np.concatenate([[1], ids_of(99, stories.config.vocab_size)])
    assert_close(stories.logits(stories.llama(), ids), stories.reference(ids))


def test_a_model_with_interleaved_rows_of_query_and_key_gives_the_same_logits():
    tiny, mixed, ids = Tiny(SMALL), Tiny(SMALL), ids_of(30)
    d = tiny.config.head_dim
    for name, rows in mixed.stored.items():
        if "q_proj" in name or "k_proj" in name:
            halves = rows.reshape(-1, 2, d // 2, *rows.shape[1:])
            mixed.stored[name] = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
    mixed.config = replace(mixed.config, rope_interleaved=True)
    assert_close(mixed.logits(mixed.llama(), ids, chunk=7), tiny.reference(ids))


@pytest.mark.parametrize("chunk", [1, 2, 7, 33, 69, 70])
def test_a_prompt_in_chunks_gives_what_it_gives_whole(chunk):
    tiny, ids = Tiny(SMALL), ids_of(70)
    llama = tiny.llama()
    assert_close(tiny.logits(llama, ids, chunk=chunk), tiny.logits(llama, ids))


def test_decoding_after_a_prompt_gives_what_a_prompt_of_all_gives():
    tiny, ids = Tiny(SMALL), ids_of(140)
    llama = tiny.llama()
    cache = llama.new_cache()
    prompt = tiny.logits(llama, ids[:50], cache)
    decoded = tiny.logits(llama, ids[50:], cache, chunk=1)
    assert_close(np.concatenate([prompt, decoded]), tiny.reference(ids))


def test_what_was_truncated_leaves_no_trace():
    tiny, ids = Tiny(SMALL), ids_of(90)
    llama = tiny.llama()
    cache = llama.new_cache()
    tiny.logits(llama, ids[::-1], cache)
    cache.truncate(0)
    tiny.logits(llama, np.concatenate([ids[:40], ids_of(30, seed=1)]), cache)
    cache.truncate(40)
    assert_close(tiny.logits(llama, ids[40:], cache), tiny.reference(ids)[40:])


@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(1, 30)), min_size=2, max_size=4),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_sequences_in_one_pass_do_not_see_each_other(lengths):
    """Each of some cached length, with some new rows: in one pass together and each alone."""
    tiny = Tiny(SMALL)
    llama = tiny.llama()
    texts = [ids_of(cached + new, seed=i) for i, (cached, new) in enumerate(lengths)]
    segments, rows = [], []
    for ids, (cached, new) in zip(texts, lengths, strict=True):
        cache = llama.new_cache()
        if cached:
            tiny.logits(llama, ids[:cached], cache)
        segments.append(Segment(cache, new))
        rows.append(tiny.table[ids[cached:]])
    together = llama.logits(llama.forward(np.concatenate(rows), segments))
    start = 0
    for ids, segment in zip(texts, segments, strict=True):
        assert segment.cache.length == len(ids)
        alone = tiny.reference(ids)
        stop = start + segment.n_rows
        assert_close(together[start:stop], alone[-segment.n_rows :])
        start = stop


@pytest.mark.parametrize("wanted", [[11], [3, 0, 3], [], list(range(12))])
def test_rows_that_are_not_wanted_still_leave_their_keys_and_values(wanted):
    tiny = Tiny(SMALL)
    llama, ids = tiny.llama(), ids_of(13)
    cache = llama.new_cache()
    hidden = llama.forward(tiny.table[ids[:12]], [Segment(cache, 12)], wanted)
    expected = tiny.reference(ids)
    assert hidden.shape == (len(wanted), SMALL["hidden_size"])
    if wanted:
        assert_close(llama.logits(hidden), expected[wanted])
    assert_close(tiny.logits(llama, ids[12:], cache), expected[12:])


def test_every_array_of_a_pass_is_float32(monkeypatch):
    """Operations, linears and sums see float32 alone: one float64 scalar would double the traffic."""

    def checked(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            results = result if isinstance(result, tuple | list) else [result]
            for value in [*args, *kwargs.values(), *results]:
                if isinstance(value, np.ndarray | np.generic) and value.dtype.kind == "f":
                    assert value.dtype == np.float32, function.__name__
            return result

        return call

    class Checked(Solo):
        def all_reduce(self, x):
            assert x.dtype == np.float32
            assert x.flags.c_contiguous
            return x

    for name in ("rms_norm", "rope_table", "rotate", "swiglu", "softmax", "attend"):
        monkeypatch.setattr(model_module, name, checked(getattr(model_module, name)))
    # NumPy scalars are what makes float64 of float32; the configuration of a file has none.
    for case in ("rope_llama3", "rope_linear", "all_biases_tied"):
        tiny = Tiny(json.loads((GOLDEN / case / "config.json").read_text()), stored="bfloat16")
        llama = tiny.llama(checked(plain_linear), Checked())
        assert llama._frequencies.dtype == np.float32
        for n_rows in (1, 5):
            hidden = llama.forward(tiny.table[ids_of(n_rows)], [Segment(llama.new_cache(), n_rows)])
            assert hidden.dtype == llama.logits(hidden).dtype == np.float32
