"""The forward pass against transformers and float64, in chunks, in company, and cut over several ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import random_tensors, widened
from ranks import run_ranks
from safetensors.numpy import load_file

from tpilite.collective import Message, Solo
from tpilite.config.hugging_face import config_from_hf
from tpilite.errors import PeerLost
from tpilite.linear.linear import Linear
from tpilite.linear.matrix import Matrix, as_float32
from tpilite.model import llama as model_module
from tpilite.model.llama import LayerWeights, Llama, LlamaWeights, Segment, attend
from tpilite.weights.partition import Partition

_GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
_CASES = sorted(path.name for path in _GOLDEN.iterdir() if path.is_dir())
_SMALL = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 42,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 53,
    "max_position_embeddings": 400,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "mlp_bias": True,
}


def plain_linear(x, *matrices):
    """What `Linear` computes, in the fewest words."""
    results = []
    for matrix in matrices:
        rows = []
        for part in matrix.parts:
            with part.open() as stored:
                rows.append(as_float32(stored))
        y = x @ np.concatenate(rows).T
        results.append(y if matrix.bias is None else y + matrix.bias)
    return results


plain_linear.share = lambda n, work: work(0, n)


def weights_of(tensors, n_layers):
    def matrix(name):
        bias = tensors.get(f"{name}.bias")
        return Matrix.of(tensors[f"{name}.weight"], None if bias is None else as_float32(bias))

    def layer(prefix):
        attention = {f"{x}_proj": matrix(f"{prefix}.self_attn.{x}_proj") for x in "qkvo"}
        mlp = {f"{x}_proj": matrix(f"{prefix}.mlp.{x}_proj") for x in ("gate", "up", "down")}
        names = ("input_layernorm", "post_attention_layernorm")
        norms = {name: as_float32(tensors[f"{prefix}.{name}.weight"]) for name in names}
        return LayerWeights(**norms, **attention, **mlp)

    layers = [layer(f"model.layers.{i}") for i in range(n_layers)]
    return LlamaWeights(layers, as_float32(tensors["model.norm.weight"]), matrix("lm_head"))


class Tiny:
    """A small checkpoint, random unless given, and what runs it."""

    def __init__(self, config, seed=1, stored="float32", tensors=None):
        self.config = config_from_hf(config)
        self.stored = tensors or random_tensors(config, seed, stored)
        self.reference = lambda ids: reference.logits(config, widened(self.stored), ids)
        self.stored.setdefault("lm_head.weight", self.stored["model.embed_tokens.weight"])
        self.table = as_float32(self.stored["model.embed_tokens.weight"])

    def llama(self, linear=plain_linear, collective=None):
        weights = weights_of(self.stored, self.config.num_hidden_layers)
        return Llama(self.config, weights, collective or Solo(), linear)

    def shard(self, partition, collective):
        """The model of one rank: its ranges of every tensor, cut out of the whole."""
        mine = {
            name: np.ascontiguousarray(self.stored[name][tuple(slice(r.start, r.stop) for r in ranges)])
            for name, ranges in partition.shards(self.config, collective.rank).items()
        }
        return Llama(self.config, weights_of(mine, self.config.num_hidden_layers), collective, plain_linear)

    def logits(self, llama, ids, cache=None, chunk=None):
        """The logits of all rows, `chunk` rows a pass."""
        cache, chunk = cache or llama.new_cache(), chunk or len(ids)
        passes = [ids[start : start + chunk] for start in range(0, len(ids), chunk)]
        hidden = [llama.forward(self.table[rows], [Segment(cache, len(rows))]) for rows in passes]
        return llama.logits(np.concatenate(hidden))


def _ids(n_ids, vocab_size=53, seed=0):
    return np.random.RandomState(seed).randint(0, vocab_size, n_ids)


def _assert_close(logits, expected, tolerance=1e-5):
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("linear", ["plain", "threads"])
@pytest.mark.parametrize("case", _CASES)
def test_logits_are_those_of_transformers_and_of_float64(case, linear):
    config = json.loads((_GOLDEN / case / "config.json").read_text())
    golden = np.load(_GOLDEN / case / "golden.npz")
    tiny, ids = Tiny(config, int(golden["seed"]), str(golden["stored"])), golden["ids"]
    with Linear(2) as threads:
        llama = tiny.llama(plain_linear if linear == "plain" else threads)
        logits = tiny.logits(llama, ids, chunk=100)
    _assert_close(logits[golden["rows"]], golden["logits"], 1e-4)
    _assert_close(logits, tiny.reference(ids), 1e-4)


@pytest.fixture(scope="module")
def stories(shared_models):
    """A trained model: its scores are far from random ones."""
    folder = shared_models / "stories260K"
    config = json.loads((folder / "config.json").read_text())
    return Tiny(config, tensors=load_file(folder / "model.safetensors"))


def test_a_trained_model_gives_the_logits_of_float64(stories):
    ids = np.concatenate([[1], _ids(99, stories.config.vocab_size)])
    _assert_close(stories.logits(stories.llama(), ids), stories.reference(ids))


@pytest.mark.parametrize("chunk", [1, 2, 7, 33, 69, 70])
def test_a_prompt_in_chunks_gives_what_it_gives_whole(chunk):
    tiny, ids = Tiny(_SMALL), _ids(70)
    llama = tiny.llama()
    _assert_close(tiny.logits(llama, ids, chunk=chunk), tiny.logits(llama, ids))


def test_decoding_after_a_prompt_gives_what_a_prompt_of_all_gives():
    tiny, ids = Tiny(_SMALL), _ids(140)
    llama = tiny.llama()
    cache = llama.new_cache()
    prompt = tiny.logits(llama, ids[:50], cache)
    decoded = tiny.logits(llama, ids[50:], cache, chunk=1)
    _assert_close(np.concatenate([prompt, decoded]), tiny.reference(ids))


def test_what_was_truncated_leaves_no_trace():
    tiny, ids = Tiny(_SMALL), _ids(90)
    llama = tiny.llama()
    cache = llama.new_cache()
    tiny.logits(llama, ids[::-1], cache)
    cache.truncate(0)
    tiny.logits(llama, np.concatenate([ids[:40], _ids(30, seed=1)]), cache)
    cache.truncate(40)
    _assert_close(tiny.logits(llama, ids[40:], cache), tiny.reference(ids)[40:])


@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(1, 30)), min_size=2, max_size=4),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_sequences_in_one_pass_do_not_see_each_other(lengths):
    """Each of some cached length, with some new rows: in one pass together and each alone."""
    tiny = Tiny(_SMALL)
    llama = tiny.llama()
    texts = [_ids(cached + new, seed=i) for i, (cached, new) in enumerate(lengths)]
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
        _assert_close(together[start:stop], alone[-segment.n_rows :])
        start = stop


@pytest.mark.parametrize("wanted", [[11], [3, 0, 3], [], list(range(12))])
def test_rows_that_are_not_wanted_still_leave_their_keys_and_values(wanted):
    tiny = Tiny(_SMALL)
    llama, ids = tiny.llama(), _ids(13)
    cache = llama.new_cache()
    hidden = llama.forward(tiny.table[ids[:12]], [Segment(cache, 12)], wanted)
    expected = tiny.reference(ids)
    assert hidden.shape == (len(wanted), _SMALL["hidden_size"])
    if wanted:
        _assert_close(llama.logits(hidden), expected[wanted])
    _assert_close(tiny.logits(llama, ids[12:], cache), expected[12:])


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
    monkeypatch.setattr(model_module, "_WIDENED_BYTES", 4 * 2 * 6 * 64)
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


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (6, 3), (8, 2), (3, 1)])
def test_threads_share_the_heads_of_attention(monkeypatch, n_heads, n_kv_heads):
    monkeypatch.setattr(model_module, "_SHARED_FROM", 0)
    config = dict(_SMALL, num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, head_dim=4)
    tiny, ids = Tiny(config), _ids(30)
    with Linear(3) as linear:
        _assert_close(tiny.logits(tiny.llama(linear), ids, chunk=7), tiny.reference(ids))


def test_float16_halves_the_cache_and_costs_what_is_said():
    tiny, ids = Tiny(_SMALL), _ids(40)
    caches, logits = [], []
    for dtype in (np.float32, np.float16):
        llama = tiny.llama()
        llama.kv_dtype = dtype
        caches.append(llama.new_cache())
        logits.append(tiny.logits(llama, ids, cache=caches[-1], chunk=7))
    assert caches[1].nbytes * 2 == caches[0].nbytes
    error = np.abs(logits[1] - logits[0]).max() / np.abs(logits[0]).max()
    assert 0 < error < 2e-3


def test_scores_of_a_long_prompt_stay_within_their_memory(monkeypatch):
    scores_seen = []
    softmax = model_module.softmax
    monkeypatch.setattr(model_module, "softmax", lambda s: scores_seen.append(s.nbytes) or softmax(s))
    q = np.zeros((256, 8, 4), np.float32)
    keys = np.zeros((2, 4000, 4), np.float32)
    attend(q, keys, keys, np.empty_like(q))
    assert max(scores_seen) <= 8 << 20 < sum(scores_seen)


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
        tiny = Tiny(json.loads((_GOLDEN / case / "config.json").read_text()), stored="bfloat16")
        llama = tiny.llama(checked(plain_linear), Checked())
        assert llama._frequencies.dtype == np.float32
        for n_rows in (1, 5):
            hidden = llama.forward(tiny.table[_ids(n_rows)], [Segment(llama.new_cache(), n_rows)])
            assert hidden.dtype == llama.logits(hidden).dtype == np.float32


def greedy(tiny, llama, prompt, n_new):
    """The logits of the prompt and of each new token, and the new tokens: every rank's part of the work."""
    collective = llama.collective
    cache, ids, all_logits, new = llama.new_cache(), list(prompt), [], []
    while len(new) < n_new:
        message = Message(array=tiny.table[ids]) if collective.rank == 0 else None
        x = np.array(collective.broadcast(message).array)  # the received one ends with the next sum
        parts = collective.gather(Message(array=llama.logits(llama.forward(x, [Segment(cache, len(ids))]))))
        if parts is not None:
            all_logits.append(np.concatenate([part.array for part in parts], axis=1))
        token = {"id": int(all_logits[-1][-1].argmax())} if parts is not None else {}
        ids = [collective.broadcast(Message(token) if collective.rank == 0 else None).header["id"]]
        new += ids
    return np.concatenate(all_logits) if all_logits else None, new


def _assert_same_text(tiny, partition, prompt, n_new=12):
    partition.check(tiny.config)
    alone, expected = greedy(tiny, tiny.llama(), prompt, n_new)
    ranks = run_ranks(partition.world_size, lambda c: greedy(tiny, tiny.shard(partition, c), prompt, n_new))
    assert [new for _, new in ranks] == [expected] * partition.world_size
    _assert_close(ranks[0][0], alone, 1e-4)


_CLUSTERS = pytest.mark.parametrize(
    ("world_size", "ratio"),
    [
        (1, None),
        (2, None),
        (2, (3, 1)),
        (3, None),
        (3, (1, 5, 2)),
        (5, None),
        (5, (1, 2, 3, 4, 5)),
        (8, None),
        (8, (1, 1, 9, 1, 1, 3, 1, 1)),
    ],
)


@_CLUSTERS
@pytest.mark.parametrize("case", ["grouped_heads", "odd_sizes", "all_biases_tied", "multi_head"])
def test_any_number_of_ranks_gives_the_same_text(case, world_size, ratio):
    config = json.loads((_GOLDEN / case / "config.json").read_text())
    tiny = Tiny(config)
    partition = Partition.of(tiny.config, world_size, ratio)
    _assert_same_text(tiny, partition, _ids(20))


@_CLUSTERS
def test_any_number_of_ranks_tells_the_same_story(stories, world_size, ratio):
    """With 4 KV heads, so that some ranks of 5 and of 8 have none."""
    partition = Partition.of(stories.config, world_size, ratio)
    _assert_same_text(stories, partition, [1], n_new=40)


@st.composite
def _config_and_partition(draw):
    n_kv_heads = draw(st.integers(1, 4))
    n_heads = n_kv_heads * draw(st.integers(1, 3))
    config = {
        "model_type": "llama",
        "hidden_size": draw(st.integers(5, 40)),
        "intermediate_size": draw(st.integers(1, 50)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": 2 * draw(st.integers(1, 6)),
        "vocab_size": draw(st.integers(10, 60)),
        "rms_norm_eps": 1e-5,
        "rope_theta": draw(st.sampled_from([100.0, 10000.0])),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }
    world_size = draw(st.integers(1, 6))

    def counts(total):
        cuts = sorted(draw(st.lists(st.integers(0, total), min_size=world_size - 1, max_size=world_size - 1)))
        return tuple(stop - start for start, stop in zip([0, *cuts], [*cuts, total], strict=True))

    partition = Partition(
        counts(n_kv_heads),
        counts(config["intermediate_size"]),
        counts(config["vocab_size"]),
        (1.0,) * world_size,
    )
    return config, partition, draw(st.integers(0, 99))


@given(_config_and_partition())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_cut_of_any_model_gives_the_same_text(drawn):
    """Also where ranks own no heads, no FFN columns or no vocabulary rows at all."""
    config, partition, seed = drawn
    tiny = Tiny(config, seed)
    _assert_same_text(tiny, partition, _ids(9, config["vocab_size"], seed), n_new=5)


def test_two_halves_cut_by_hand_give_the_same_logits():
    """What `Partition` is checked against: Megatron's cut, written out for one layer's shapes."""
    config = {**_SMALL, "num_key_value_heads": 2, "num_attention_heads": 4}
    tiny, ids = Tiny(config), _ids(30)

    def half(name, array, rank):
        axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        if "norm" in name:
            return array
        return np.ascontiguousarray(np.split(array, [array.shape[axis] // 2], axis=axis)[rank])

    def work(collective):
        mine = {name: half(name, array, collective.rank) for name, array in tiny.stored.items()}
        for name in tiny.stored:
            if name.endswith(("o_proj.bias", "down_proj.bias")):
                mine[name] = tiny.stored[name] if collective.rank == 0 else None
        llama = Llama(tiny.config, weights_of(mine, 2), collective, plain_linear)
        return tiny.logits(llama, ids)

    _assert_close(np.concatenate(run_ranks(2, work), axis=1), tiny.reference(ids))


def test_a_pass_makes_two_sums_per_layer_and_says_nothing_else():
    calls = []

    class Counting(Solo):
        def all_reduce(self, x):
            calls.append(x.shape)
            return x

        def broadcast(self, message):
            raise AssertionError

        gather = barrier = broadcast

    tiny = Tiny(_SMALL)
    tiny.logits(tiny.llama(collective=Counting()), _ids(7))
    assert calls == [(7, 24)] * 4


def test_a_lost_rank_leaves_the_caches_at_the_last_whole_pass():
    tiny, ids = Tiny(_SMALL), _ids(30)

    class Lossy(Solo):
        sums_left = 4 + 3

        def all_reduce(self, x):
            self.sums_left -= 1
            if self.sums_left < 0:
                raise PeerLost("gone")
            return x

    llama = tiny.llama(collective=Lossy())
    cache = llama.new_cache()
    tiny.logits(llama, ids[:20], cache)
    with pytest.raises(PeerLost):
        tiny.logits(llama, ids[20:], cache)
    assert cache.length == 20
    llama.collective = Solo()
    _assert_close(tiny.logits(llama, ids[20:], cache), tiny.reference(ids)[20:])
