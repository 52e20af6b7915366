"""The keys and values of one sequence, for the heads that this rank owns.

Memory grows with the text, never to the model's full context at once: `reserve` makes room in steps, a
layer at a time, so that the copy of a growing cache is one layer's and not the whole.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tpilite.arrays import Array
from tpilite.model.kept import Kept, keep, kept_dtype

Empty = Callable[[tuple[int, ...], np.dtype[Any]], Kept]

# Each step costs a copy of what is there; a quarter more at a time keeps that near 4 copies per position
# at worst while at most a fifth of the memory lies unused.
_FIRST_POSITIONS = 64
_GROWTH = 1.25


class KVCache:
    """Keys and values [K, S] of each layer, `length` positions of them valid in every layer.

    `dtype` is one of `kept.KV_DTYPES`. `empty` makes the arrays, as `np.empty` does.
    """

    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        max_length: int,
        dtype: str = "f32",
        empty: Empty = np.empty,
    ) -> None:
        self.length = 0
        self.max_length = max_length
        self._empty = empty
        self._dtype = kept_dtype(dtype, head_dim)
        self._keys: list[Kept] = [np.zeros((n_kv_heads, 0), self._dtype) for _ in range(n_layers)]
        self._values = [keys.copy() for keys in self._keys]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in (*self._keys, *self._values))

    @property
    def position_bytes(self) -> int:
        """What one position takes."""
        return sum(self._dtype.itemsize * layer.shape[0] for layer in (*self._keys, *self._values))

    def bytes_for(self, n_positions: int) -> int:
        """`nbytes` once there is room for `n_positions`."""
        return self._capacity_for(n_positions) * self.position_bytes

    def _capacity_for(self, n_positions: int) -> int:
        capacity = self._keys[0].shape[1]
        if n_positions <= capacity:
            return capacity
        return min(self.max_length, max(n_positions, _FIRST_POSITIONS, int(capacity * _GROWTH)))

    def reserve(self, n_positions: int) -> None:
        """Makes room for `n_positions` in all, keeping what is there."""
        assert n_positions <= self.max_length, "the engine checks a request against the context"
        capacity = self._capacity_for(n_positions)
        if capacity == self._keys[0].shape[1]:
            return
        for store in (self._keys, self._values):
            for layer, old in enumerate(store):
                new = self._empty((len(old), capacity), self._dtype)
                new[:, : self.length] = old[:, : self.length]
                store[layer] = new

    def append(self, layer: int, keys: Array, values: Array) -> tuple[Kept, Kept]:  # [T, K, d] -> [K, S]
        """This layer's keys and values up to and with the T new positions, as they are kept: views.

        `length` moves on once per pass, by `advance`, when every layer has its new positions.
        """
        end = self.length + keys.shape[0]
        keep(keys.transpose(1, 0, 2), self._keys[layer][:, self.length : end])
        keep(values.transpose(1, 0, 2), self._values[layer][:, self.length : end])
        return self._keys[layer][:, :end], self._values[layer][:, :end]

    def advance(self, n_positions: int) -> None:
        self.length += n_positions

    def truncate(self, length: int) -> None:
        """Forgets all positions from `length` on."""
        assert length <= self.length
        self.length = length
