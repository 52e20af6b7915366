"""Which tensors a Llama model has, and which part of each belongs to which rank: the only place that knows.

One table names every tensor of the architecture by its axes:

    D  hidden size                            F  FFN columns        H  query heads times head size
    V  vocabulary                             d  head size          K  KV heads times head size

D and d are never cut. H and K are cut together, by KV heads, each with the query heads that share it; F by
FFN columns; V by vocabulary rows. What has no axis to cut is on every rank, but for two things that rank 0
has alone: the embedding (it looks the rows up) and the biases of o_proj and down_proj (the ranks' parts are
summed, so they are added once).

Every cut is contiguous and in rank order, so counts per rank say everything.

Rows of block types are cut like any. Columns (of o_proj and down_proj) are cut there too, but blocks are not:
where a rank's columns begin or end inside one, it stores the whole block (`held`) and uses its own columns
alone. FFN columns are cut where blocks end, if that leaves the slowest rank with less.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from typing import Any

from tpilite.config.llama import LlamaConfig
from tpilite.errors import ConfigError

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

_ATTENTION = {"q_proj": "HD", "k_proj": "KD", "v_proj": "KD", "o_proj": "DH"}
_QKV = ("q_proj", "k_proj", "v_proj")
_MLP = {"gate_proj": "FD", "up_proj": "FD", "down_proj": "DF"}
_ON_RANK_0 = (EMBEDDING, "o_proj.bias", "down_proj.bias")

# A rank's FFN columns come in multiples of the largest of these that divides their number and still gives
# every rank a few multiples, so that shares stay near their ratio. Even, as bf16 weights are read in pairs;
# where the model's own number is odd, one rank has to take the odd column.
_COLUMN_UNITS = (32, 16, 8, 4, 2)
_UNITS_PER_RANK = 4


def layer_tensor(layer: int, name: str) -> str:
    """The full name of a tensor of one layer, such as "self_attn.q_proj.weight"."""
    return f"model.layers.{layer}.{name}"


def attention_axes(config: LlamaConfig, layer: int) -> dict[str, str]:
    """The tensors of one layer's attention block: name to axes. The matrices come first."""
    block = layer_tensor(layer, "self_attn")
    biased = tuple(_ATTENTION) if config.attention_bias else _QKV if config.qkv_bias else ()
    norms = {f"{block}.q_norm.weight": "d", f"{block}.k_norm.weight": "d"} if config.qk_norm else {}
    return (
        _block_axes(block, _ATTENTION, biased) | norms | {layer_tensor(layer, "input_layernorm.weight"): "D"}
    )


def mlp_axes(config: LlamaConfig, layer: int) -> dict[str, str]:
    """The tensors of one layer's feed-forward block: name to axes. The matrices come first."""
    return _block_axes(layer_tensor(layer, "mlp"), _MLP, tuple(_MLP) if config.mlp_bias else ()) | {
        layer_tensor(layer, "post_attention_layernorm.weight"): "D"
    }


LM_HEAD_AXES = {LM_HEAD: "VD", FINAL_NORM: "D"}
EMBEDDING_AXES = {EMBEDDING: "VD"}


def tensor_axes(config: LlamaConfig) -> dict[str, str]:
    """Every tensor of the model, name to axes, in the order in which a pass uses them."""
    axes = dict(EMBEDDING_AXES)
    for layer in range(config.num_hidden_layers):
        axes |= attention_axes(config, layer) | mlp_axes(config, layer)
    return axes | LM_HEAD_AXES


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the whole model."""
    alone = Partition.of(config, 1)
    return {name: tuple(map(len, shard)) for name, shard in alone.shards(config, 0).items()}


@dataclass(frozen=True)
class Partition:
    """How many KV heads, FFN columns and vocabulary rows each rank owns, in rank order.

    Two partitions are equal when they cut alike; the ratio that was asked for is kept for messages.
    """

    kv_heads: tuple[int, ...]
    ffn_columns: tuple[int, ...]
    vocab_rows: tuple[int, ...]
    ratio: tuple[float, ...] = field(compare=False)

    def __post_init__(self) -> None:
        counts = (self.kv_heads, self.ffn_columns, self.vocab_rows)
        if not self.ratio or any(len(ranks) != len(self.ratio) for ranks in counts):
            raise ConfigError("a partition needs a count of every kind for each rank")
        if any(type(count) is not int or count < 0 for ranks in counts for count in ranks):
            raise ConfigError("a partition's counts must be whole numbers >= 0")
        _check_ratio(self.ratio, len(self.ratio))

    @classmethod
    def of(
        cls,
        config: LlamaConfig,
        world_size: int,
        ratio: Sequence[float] | None = None,
        *,
        ffn_block: int = 1,
    ) -> "Partition":
        """The shares of `world_size` ranks, in proportion to `ratio` or even.

        KV heads and vocabulary rows are shared out by largest remainder. FFN columns then make up for what
        the whole heads left uneven, so that each rank's weights per layer come near its share; a rank
        without any KV head gets FFN columns and vocabulary rows only. `ffn_block` is how many weights lie
        together in a block of down_proj.
        """
        if world_size < 1:
            raise ConfigError(f"world_size must be at least 1, found {world_size}")
        ratio = tuple(float(share) for share in ratio) if ratio else (1.0,) * world_size
        _check_ratio(ratio, world_size)
        # Fractions, so that every machine comes to the same counts.
        shares = [Fraction(share) / sum(map(Fraction, ratio)) for share in ratio]
        kv_heads = _largest_remainder(config.num_key_value_heads, shares)
        n_queries_per_kv = config.num_attention_heads // config.num_key_value_heads
        head_weights = 2 * (n_queries_per_kv + 1) * config.head_dim * config.hidden_size
        column_weights = 3 * config.hidden_size
        layer_weights = config.num_key_value_heads * head_weights + config.intermediate_size * column_weights
        wanted = [
            max(Fraction(0), share * layer_weights - heads * head_weights)
            for share, heads in zip(shares, kv_heads, strict=True)
        ]

        def slowest(columns: Sequence[int]) -> Fraction:
            """The most that a rank has per layer, against its share."""
            return max(
                (heads * head_weights + config.hidden_size * (2 * n + len(whole_blocks(part, ffn_block))))
                / share
                for share, heads, n, part in zip(shares, kv_heads, columns, _ranges(columns), strict=True)
            )

        units = {_unit(config.intermediate_size, world_size), ffn_block}
        columns = [
            _columns(config.intermediate_size, wanted, unit) for unit in sorted(units - {1}, reverse=True)
        ]
        return cls(
            kv_heads,
            min(columns, key=slowest),
            _largest_remainder(config.vocab_size, shares),
            ratio,
        )

    @property
    def world_size(self) -> int:
        return len(self.ratio)

    def check(self, config: LlamaConfig) -> None:
        """Raises `ConfigError` unless the counts add up to what the model has."""
        for what, counts, expected in (
            ("KV heads", self.kv_heads, config.num_key_value_heads),
            ("FFN columns", self.ffn_columns, config.intermediate_size),
            ("vocabulary rows", self.vocab_rows, config.vocab_size),
        ):
            if sum(counts) != expected:
                raise ConfigError(f"the partition shares out {sum(counts)} {what}; the model has {expected}")

    def vocab_range(self, rank: int) -> range:
        """The vocabulary rows of a rank."""
        return _range(self.vocab_rows, rank)

    def shard(self, config: LlamaConfig, name: str, axes: str, rank: int) -> tuple[range, ...] | None:
        """Which part of a tensor a rank holds, a range for each axis; None when it holds none at all.

        A rank without heads holds matrices of no rows (or no columns), which is not None.
        """
        if rank and name.endswith(_ON_RANK_0):
            return None
        heads, head_dim = _range(self.kv_heads, rank), config.head_dim
        n_queries_per_kv = config.num_attention_heads // config.num_key_value_heads
        ranges = {
            "D": range(config.hidden_size),
            "d": range(head_dim),
            "F": _range(self.ffn_columns, rank),
            "H": _scaled(heads, n_queries_per_kv * head_dim),
            "K": _scaled(heads, head_dim),
            "V": range(config.vocab_size) if name == EMBEDDING else _range(self.vocab_rows, rank),
        }
        return tuple(ranges[axis] for axis in axes)

    def shards(self, config: LlamaConfig, rank: int) -> dict[str, tuple[range, ...]]:
        """Every tensor that a rank holds, and which part of it."""
        shards = {name: self.shard(config, name, axes, rank) for name, axes in tensor_axes(config).items()}
        return {name: shard for name, shard in shards.items() if shard is not None}

    def to_dict(self) -> dict[str, list[Any]]:
        """Plain lists, for a manifest or a handshake."""
        return {name: list(ranks) for name, ranks in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: Any) -> "Partition":
        """The partition that `to_dict` described. Raises `ConfigError` for anything else."""
        keys = {counts.name for counts in fields(cls)}
        if not isinstance(value, Mapping) or set(value) != keys:
            raise ConfigError(f"a partition must have exactly the keys {', '.join(sorted(keys))}")
        if not all(isinstance(ranks, list | tuple) for ranks in value.values()):
            raise ConfigError("a partition's values must be lists")
        return cls(**{key: tuple(ranks) for key, ranks in value.items()})


def _block_axes(block: str, matrices: dict[str, str], biased: Sequence[str]) -> dict[str, str]:
    """The matrices of a block and the biases of those that have one, by full name."""
    axes = {f"{block}.{name}.weight": axes for name, axes in matrices.items()}
    return axes | {f"{block}.{name}.bias": matrices[name][0] for name in biased}


def _check_ratio(ratio: Sequence[float], world_size: int) -> None:
    if len(ratio) != world_size:
        raise ConfigError(
            f"the ratio must have one number for each of {world_size} ranks, found {len(ratio)}"
        )
    for share in ratio:
        # The bound keeps a single rank's share from rounding to nothing, which is what a larger one asks.
        if type(share) not in (int, float) or not 1e-6 <= share <= 1e6:
            raise ConfigError(f"each number of the ratio must be from 1e-6 to 1e6, found {share!r}")


def whole_blocks(part: range, size: int) -> range:
    """The columns of all blocks of `size` that hold any of some columns; none where these are none."""
    start = part.start // size * size
    return range(start, -(-part.stop // size) * size if part else start)


def held(shard: tuple[range, ...], block: int) -> tuple[range, ...]:
    """What is stored of a tensor for a rank whose part is `shard`, in blocks of `block` weights."""
    return shard if len(shard) == 1 else (shard[0], whole_blocks(shard[1], block))


def _unit(n_columns: int, world_size: int) -> int:
    """The multiple in which FFN columns are shared out where they may be cut anywhere."""
    enough = world_size * _UNITS_PER_RANK
    return next(
        (unit for unit in _COLUMN_UNITS if n_columns % unit == 0 and n_columns // unit >= enough),
        _COLUMN_UNITS[-1],
    )


def _columns(n_columns: int, wanted: Sequence[Fraction], unit: int) -> tuple[int, ...]:
    """Each rank's FFN columns, near the proportions of `wanted` and in multiples of `unit`."""
    columns = [unit * count for count in _largest_remainder(n_columns // unit, wanted)]
    # An odd column goes to the last rank that has any: its range ends with the matrix.
    last = max((rank for rank, count in enumerate(columns) if count), default=0)
    columns[last] += n_columns % unit
    return tuple(columns)


def _largest_remainder(total: int, weights: Sequence[Fraction]) -> tuple[int, ...]:
    """`total` in whole parts near the proportions of `weights`; on a tie the lower rank gets more."""
    quotas = [total * weight / sum(weights) for weight in weights]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda rank: counts[rank] - quotas[rank])
    for rank in by_remainder[: total - sum(counts)]:
        counts[rank] += 1
    return tuple(counts)


def _ranges(counts: Sequence[int]) -> list[range]:
    ends = list(itertools.accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _range(counts: Sequence[int], rank: int) -> range:
    return _ranges(counts)[rank]


def _scaled(part: range, factor: int) -> range:
    return range(part.start * factor, part.stop * factor)
