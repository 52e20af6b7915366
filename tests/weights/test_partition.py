from collections.abc import Sequence
from fractions import Fraction

import pytest
from checkpoints import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from tpilite.config.llama import LlamaConfig
from tpilite.errors import ConfigError
from tpilite.weights.partition import Partition, tensor_axes, tensor_shapes

LLAMA_2_70B = LlamaConfig(8192, 28672, 2, 64, 8, 128, 32000)


@st.composite
def configs(draw: st.DrawFn) -> LlamaConfig:
    kv_heads = draw(st.integers(1, 12))
    return tiny_config(
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * draw(st.integers(1, 4)),
        head_dim=2 * draw(st.integers(1, 8)),
        hidden_size=draw(st.integers(1, 64)),
        intermediate_size=draw(st.integers(1, 600)),
        vocab_size=draw(st.integers(1, 300)),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


shares = st.integers(1, 9) | st.floats(1e-6, 1e6)
ratios = st.lists(shares, min_size=1, max_size=9)


@given(config=configs(), ratio=ratios)
@settings(deadline=None, max_examples=200)
def test_every_element_is_owned_once_and_in_rank_order(config: LlamaConfig, ratio: list[float]) -> None:
    partition = Partition.of(config, len(ratio), ratio)
    partition.check(config)
    shapes = tensor_shapes(config)
    for name, axes in tensor_axes(config).items():
        shards = [partition.shard(config, name, axes, rank) for rank in range(len(ratio))]
        assert shards[0] is not None
        if any(shard is None for shard in shards[1:]):
            assert name.endswith(("embed_tokens.weight", "o_proj.bias", "down_proj.bias"))
            assert shards[1:] == [None] * (len(ratio) - 1)
            assert tuple(map(len, shards[0])) == shapes[name]
            continue
        for axis, letter in enumerate(axes):
            ranges = [shard[axis] for shard in shards if shard is not None]
            if letter == "D":
                assert ranges == [range(shapes[name][axis])] * len(ratio)
            else:
                assert [i for part in ranges for i in part] == list(range(shapes[name][axis]))


@given(config=configs(), ratio=ratios)
@settings(deadline=None, max_examples=200)
def test_shares_are_near_the_ratio(config: LlamaConfig, ratio: list[float]) -> None:
    partition = Partition.of(config, len(ratio), ratio)
    total = sum(map(Fraction, ratio))
    for counts, n_all in (
        (partition.kv_heads, config.num_key_value_heads),
        (partition.vocab_rows, config.vocab_size),
    ):
        for count, share in zip(counts, ratio, strict=True):
            assert abs(count - n_all * Fraction(share) / total) < 1
    # An odd column is the only thing that makes a rank's number of columns odd.
    assert sum(count % 2 for count in partition.ffn_columns) == config.intermediate_size % 2


def weights_per_layer(config: LlamaConfig, partition: Partition) -> list[int]:
    sizes = [0] * partition.world_size
    for rank in range(partition.world_size):
        for name, shard in partition.shards(config, rank).items():
            if ".0." in name and len(shard) == 2:
                sizes[rank] += len(shard[0]) * len(shard[1])
    return sizes


@pytest.mark.parametrize("ratio", [(1,) * 8, (2, 1, 1), (1,) * 5, (1,) * 12, (4, 3, 2, 1), (1,)])
def test_weights_are_balanced_even_where_heads_do_not_divide(ratio: Sequence[float]) -> None:
    partition = Partition.of(LLAMA_2_70B, len(ratio), ratio)
    sizes = weights_per_layer(LLAMA_2_70B, partition)
    for size, share in zip(sizes, ratio, strict=True):
        assert size == pytest.approx(sum(sizes) * share / sum(ratio), rel=0.02)


def test_known_partitions() -> None:
    even = Partition.of(LLAMA_2_70B, 8)
    assert even == Partition((1,) * 8, (3584,) * 8, (4000,) * 8, (1.0,) * 8)
    assert even == Partition.of(LLAMA_2_70B, 8, [2] * 8)
    more_than_heads = Partition.of(tiny_config(), 6)
    assert more_than_heads.kv_heads == (1, 1, 1, 1, 0, 0)
    assert min(more_than_heads.ffn_columns[4:]) > max(more_than_heads.ffn_columns[:4])
    assert Partition.of(tiny_config(), 3, (2, 1, 1)).kv_heads == (2, 1, 1)
    assert Partition.of(tiny_config(intermediate_size=172), 2).ffn_columns == (88, 84)
    assert Partition.of(tiny_config(), 3).vocab_range(1) == range(17, 34)


def test_a_rank_without_heads_has_matrices_without_rows() -> None:
    config = tiny_config(attention_bias=True)
    shards = Partition.of(config, 5).shards(config, 4)
    shapes = {name: tuple(map(len, shard)) for name, shard in shards.items()}
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (0, 32)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (32, 0)
    assert shapes["model.layers.0.self_attn.k_proj.bias"] == (0,)
    assert shapes["model.layers.0.input_layernorm.weight"] == (32,)
    assert "model.layers.0.self_attn.o_proj.bias" not in shapes


@pytest.mark.parametrize(
    ("world_size", "ratio", "text"),
    [
        (0, None, "world_size must be at least 1, found 0"),
        (3, (1, 1), "one number for each of 3 ranks, found 2"),
        (2, (1, 0), "from 1e-6 to 1e6, found 0.0"),
        (2, (1, -1), "found -1.0"),
        (2, (1, float("nan")), "found nan"),
        (2, (1, float("inf")), "found inf"),
    ],
)
def test_an_impossible_ratio_is_refused(world_size: int, ratio: Sequence[float] | None, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Partition.of(tiny_config(), world_size, ratio)


@given(config=configs(), ratio=ratios)
@settings(deadline=None, max_examples=50)
def test_as_plain_lists_and_back(config: LlamaConfig, ratio: list[float]) -> None:
    partition = Partition.of(config, len(ratio), ratio)
    again = Partition.from_dict(partition.to_dict())
    assert (again, again.ratio) == (partition, partition.ratio)


GOOD = Partition.of(tiny_config(), 2).to_dict()


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        GOOD | {"more": []},
        GOOD | {"kv_heads": [4]},
        GOOD | {"kv_heads": 4},
        GOOD | {"kv_heads": [5, -1]},
        GOOD | {"kv_heads": [2.0, 2.0]},
        GOOD | {"vocab_rows": ["25", "25"]},
        GOOD | {"ratio": ["1", "1"]},
        GOOD | {"ratio": [float("nan"), 1.0]},
        {key: [] for key in GOOD},
    ],
)
def test_what_is_no_partition_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"partition|ratio"):
        Partition.from_dict(value)


@pytest.mark.parametrize("key", ["kv_heads", "ffn_columns", "vocab_rows"])
def test_a_partition_of_another_model_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"the partition shares out 2 .*; the model has"):
        Partition.from_dict(GOOD | {key: [1, 1]}).check(tiny_config())
