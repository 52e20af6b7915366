"""The model cut over several ranks: the same logits, the same text, and nothing said but two sums a layer."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from tiny_model import FAMILIES, GOLDEN, SMALL, Tiny, assert_close, ids_of, plain_linear, weights_of

from tpilite.collective import Message, Solo
from tpilite.errors import PeerLost
from tpilite.model.llama import Llama, Segment
from tpilite.weights.partition import Partition


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
    assert_close(ranks[0][0], alone, 1e-4)


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
    config = json.loads((GOLDEN / case / "config.json").read_text())
    tiny = Tiny(config)
    partition = Partition.of(tiny.config, world_size, ratio)
    _assert_same_text(tiny, partition, ids_of(20))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_gives_the_logits_of_transformers_on_any_number_of_ranks(case, world_size):
    """A prompt in chunks, then a token a pass."""
    config = json.loads((GOLDEN / case / "config.json").read_text())
    golden = np.load(GOLDEN / case / "golden.npz")
    tiny, ids = Tiny(config, int(golden["seed"]), str(golden["stored"])), golden["ids"]

    def work(collective):
        llama = tiny.shard(Partition.of(tiny.config, world_size), collective)
        cache = llama.new_cache()
        prompt = tiny.logits(llama, ids[:60], cache, chunk=23)
        return np.concatenate([prompt, tiny.logits(llama, ids[60:], cache, chunk=1)])

    logits = np.concatenate(run_ranks(world_size, work), axis=1)
    assert_close(logits[golden["rows"]], golden["logits"], 1e-4)


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
    _assert_same_text(tiny, partition, ids_of(9, config["vocab_size"], seed), n_new=5)


def test_two_halves_cut_by_hand_give_the_same_logits():
    """What `Partition` is checked against: Megatron's cut, written out for one layer's shapes."""
    config = {**SMALL, "num_key_value_heads": 2, "num_attention_heads": 4}
    tiny, ids = Tiny(config), ids_of(30)

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

    assert_close(np.concatenate(run_ranks(2, work), axis=1), tiny.reference(ids))


def test_a_pass_makes_two_sums_per_layer_and_says_nothing_else():
    calls = []

    class Counting(Solo):
        def all_reduce(self, x):
            calls.append(x.shape)
            return x

        def broadcast(self, message):
            raise AssertionError

        gather = barrier = broadcast

    tiny = Tiny(SMALL)
    tiny.logits(tiny.llama(collective=Counting()), ids_of(7))
    assert calls == [(7, 24)] * 4


def test_a_lost_rank_leaves_the_caches_at_the_last_whole_pass():
    tiny, ids = Tiny(SMALL), ids_of(30)

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
    assert_close(tiny.logits(llama, ids[20:], cache), tiny.reference(ids)[20:])
