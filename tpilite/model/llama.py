"""The forward pass of a Llama or a sister family on one rank (arXiv 2302.13971, 2307.09288, 2407.21783).

Rows of several sequences ride in one pass; there is no batch axis. What a rank owns (its heads, FFN
columns, vocabulary rows) is read from the shapes of its weights; the sums that put the ranks' parts
together are the two `all_reduce` of each layer.

    T  rows of this pass           D  hidden size           H  query heads here
    S  cached positions            F  FFN columns here      K  KV heads here
    V  vocabulary rows here        d  head size             G  query heads per KV head
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tpilite.arrays import Array
from tpilite.collective import Collective
from tpilite.config.llama import LlamaConfig
from tpilite.linear.matrix import Matrix
from tpilite.model.kept import Kept, widened
from tpilite.model.kv_cache import Empty, KVCache
from tpilite.model.ops import is_finite, rms_norm, rope_frequencies, rope_table, rotate, softmax, swiglu

# Scores are [H, T, S] floats; a tile of query rows keeps them within this, so that a long prompt costs
# no more memory than a short one.
_SCORE_BYTES = 8 << 20

# Fewer products or elements than this are done before other threads have woken up for them.
_SHARED_FROM = 1 << 19


@dataclass(frozen=True)
class LayerWeights:
    """This rank's part of one layer. A rank without heads has matrices of no rows."""

    input_layernorm: Array  # [D]
    q_proj: Matrix  # [H * d, D]
    k_proj: Matrix  # [K * d, D]
    v_proj: Matrix  # [K * d, D]
    o_proj: Matrix  # [D, H * d]
    post_attention_layernorm: Array  # [D]
    gate_proj: Matrix  # [F, D]
    up_proj: Matrix  # [F, D]
    down_proj: Matrix  # [D, F]
    q_norm: Array | None = None  # [d]
    k_norm: Array | None = None  # [d]


@dataclass(frozen=True)
class LlamaWeights:
    """This rank's part of the model, in the order in which a pass uses it."""

    layers: Sequence[LayerWeights]
    norm: Array  # [D]
    lm_head: Matrix  # [V, D]


class Linear(Protocol):
    """What computes: `linear.Linear`, or a plain reference in the tests."""

    def __call__(self, x: Array, *matrices: Matrix) -> list[Array]:
        """y = x W^T + b for each of the matrices."""
        ...

    def share(self, n: int, work: Callable[[int, int], None]) -> None:
        """Calls `work(start, stop)` on ranges that make up 0 to n, maybe at once."""
        ...


@dataclass(frozen=True)
class Segment:
    """The rows of one sequence in a pass: `n_rows` positions that follow those in its cache."""

    cache: KVCache
    n_rows: int


class Llama:
    """One rank's share of a Llama model."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: LlamaWeights,
        collective: Collective,
        linear: Linear,
        kv_dtype: str = "f32",
        kv_empty: Empty = np.empty,
    ) -> None:
        self.config = config
        self.weights = weights
        self.collective = collective
        self.linear = linear
        self.kv_dtype = kv_dtype
        self._kv_empty = kv_empty
        self.max_length = config.context  # of a cache, or less where memory has no room
        # Which of the last pass's sums was the first to which this rank gave what is not finite, from 1 on;
        # 0 where the rows themselves were not. It tells the rank whose weights are damaged from the others.
        self.not_finite_from: int | None = None
        self._n_sums = 0
        self._frequencies = rope_frequencies(config)

    def new_cache(self) -> KVCache:
        """An empty cache for one sequence, for the KV heads of this rank."""
        head_dim = self.config.head_dim
        n_kv_heads = self.weights.layers[0].k_proj.n_rows // head_dim
        n_layers = len(self.weights.layers)
        return KVCache(n_layers, n_kv_heads, head_dim, self.max_length, self.kv_dtype, self._kv_empty)

    def forward(
        self, x: Array, segments: Sequence[Segment], wanted: Sequence[int] | None = None
    ) -> Array:  # [T, D] -> [len(wanted), D]
        """The last layer's hidden states for the embedded rows `x`, which is overwritten.

        The segments' rows follow each other in `x`; their caches hold the new positions afterwards. Rows
        that are not `wanted` (default: all are) leave the last layer when their keys and values are made.
        """
        eps = self.config.rms_norm_eps
        x *= self.config.embedding_multiplier
        positions = np.concatenate([s.cache.length + np.arange(s.n_rows) for s in segments])
        table = rope_table(self._frequencies, positions, self.config.attention_factor)
        self._n_sums, self.not_finite_from = 0, None if is_finite(x) else 0
        for segment in segments:
            segment.cache.reserve(segment.cache.length + segment.n_rows)
        for layer, w in enumerate(self.weights.layers):
            heads = self._attention(rms_norm(x, w.input_layernorm, eps), w, layer, segments, table)
            if wanted is not None and layer == len(self.weights.layers) - 1:
                x, heads = x[wanted], heads[wanted]
            (part,) = self.linear(heads, w.o_proj)
            x += self._sum(part)
            part = self._feed_forward(rms_norm(x, w.post_attention_layernorm, eps), w)
            x += self._sum(part)
        for segment in segments:
            segment.cache.advance(segment.n_rows)
        return x

    def logits(self, x: Array) -> Array:  # [T, D] -> [T, V]
        """The scores of this rank's vocabulary rows for the hidden states `x`."""
        config = self.config
        (logits,) = self.linear(rms_norm(x, self.weights.norm, config.rms_norm_eps), self.weights.lm_head)
        return logits if config.logits_scaling == 1 else logits / config.logits_scaling

    def _sum(self, part: Array) -> Array:  # [T, D] -> [T, D]
        """The sum of all ranks' parts of what a block adds."""
        if self.config.residual_multiplier != 1:
            part *= self.config.residual_multiplier
        self._n_sums += 1
        if self.not_finite_from is None and not is_finite(part):
            self.not_finite_from = self._n_sums
        return self.collective.all_reduce(part)

    def _attention(
        self,
        x: Array,
        w: LayerWeights,
        layer: int,
        segments: Sequence[Segment],
        table: tuple[Array, Array],
    ) -> Array:  # [T, D] -> [T, H * d]
        n_rows, d, config = x.shape[0], self.config.head_dim, self.config
        q, k, v = (y.reshape(n_rows, -1, d) for y in self.linear(x, w.q_proj, w.k_proj, w.v_proj))
        if w.q_norm is not None and w.k_norm is not None:
            q, k = (_norm_heads(y, norm, config.rms_norm_eps) for y, norm in ((q, w.q_norm), (k, w.k_norm)))
        if layer not in config.layers_without_rope:
            q, k = (rotate(y, table, config.rope_interleaved) for y in (q, k))
        heads = np.empty_like(q)
        start = 0
        for segment in segments:
            rows = slice(start, start + segment.n_rows)
            keys, values = segment.cache.append(layer, k[rows], v[rows])
            self._attend(q[rows], keys, values, heads[rows])
            start += segment.n_rows
        if self.kv_dtype == "f16" and not (is_finite(k) and is_finite(v)):  # it makes numbers of what is none
            heads.fill(np.nan)
        return heads.reshape(n_rows, -1)

    def _attend(self, q: Array, keys: Kept, values: Kept, out: Array) -> None:
        """`attend`, its KV heads shared out to the threads where that pays."""
        n_kv_heads, scale = keys.shape[0], self.config.attention_multiplier
        if n_kv_heads < 2 or q.size * keys.shape[1] < _SHARED_FROM:
            attend(q, keys, values, out, scale)
            return
        n_groups = q.shape[1] // n_kv_heads

        def some(start: int, stop: int) -> None:
            heads = slice(start * n_groups, stop * n_groups)
            attend(q[:, heads], keys[start:stop], values[start:stop], out[:, heads], scale, n_kv_heads)

        self.linear.share(n_kv_heads, some)

    def _feed_forward(self, x: Array, w: LayerWeights) -> Array:  # [T, D] -> [T, D]
        gate, up = self.linear(x, w.gate_proj, w.up_proj)
        if gate.size < _SHARED_FROM:
            swiglu(gate, up)
        else:

            def some(start: int, stop: int) -> None:
                swiglu(gate[start:stop], up[start:stop])

            self.linear.share(len(gate), some)
        (y,) = self.linear(gate, w.down_proj)
        return y


def _norm_heads(x: Array, weight: Array, eps: float) -> Array:  # [T, H, d], [d] -> [T, H, d]
    return rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).reshape(x.shape)


def attend(
    q: Array,
    keys: Kept,
    values: Kept,
    out: Array,
    scale: float | None = None,
    n_shared: int | None = None,
) -> None:  # [T, H, d], [K, S] x 2 -> [T, H, d]
    """Causal attention of the last T of S positions, written to `out`; G query heads share a KV head.

    Queries times keys are multiplied by `scale`, 1 / sqrt(d) if None.
    Where these heads are some of `n_shared` KV heads, they are tiled as all of them would be: how many
    threads share them changes no bit.
    """
    n_rows, n_heads, d = q.shape
    n_kv_heads, n_cached = keys.shape[:2]
    if n_heads == 0:
        return
    n_groups, n_tiled = n_heads // n_kv_heads, n_shared or n_kv_heads
    lifted = np.float32(1 / math.sqrt(d) if scale is None else scale)
    tile = max(1, _SCORE_BYTES // (4 * n_tiled * n_groups * n_cached))
    for start in range(0, n_rows, tile):
        stop = min(start + tile, n_rows)
        t = stop - start
        seen = n_cached - n_rows + stop  # the last row of the tile sees this many positions
        grouped = (q[start:stop] * lifted).reshape(t, n_kv_heads, n_groups, d)
        grouped = grouped.transpose(1, 2, 0, 3).reshape(n_kv_heads, n_groups * t, d)
        scores = np.empty((n_kv_heads, n_groups * t, seen), np.float32)
        for part, lift, k in widened(keys[:, :seen], d, n_tiled):
            np.matmul(grouped * lift, k.transpose(0, 2, 1), out=scores[:, :, part])
        if t > 1:
            hidden = np.arange(seen) > np.arange(seen - t, seen)[:, None]  # [t, S]
            each = scores.reshape(n_kv_heads, n_groups, t, seen)
            np.copyto(each, np.float32(-np.inf), where=hidden)
        softmax(scores)
        mixed = np.zeros((n_kv_heads, n_groups * t, d), np.float32)
        for part, lift, v in widened(values[:, :seen], d, n_tiled):
            mixed += (scores[:, :, part] * lift) @ v
        out[start:stop] = (
            mixed.reshape(n_kv_heads, n_groups, t, d).transpose(2, 0, 1, 3).reshape(t, n_heads, d)
        )
