"""How far scores are from others: what the benchmarks of rounding and quantizing measure quality by."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def log_softmax(scores: NDArray[Any]) -> NDArray[np.float64]:  # [..., V] -> [..., V]
    """The logarithms of the probabilities that scores give."""
    wide = scores.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def divergence(
    true: NDArray[np.float64], other: NDArray[np.float64]
) -> NDArray[np.float64]:  # [..., V] x 2 -> [...]
    """The Kullback-Leibler divergence of each position's distribution from the true one, in nats."""
    total: NDArray[np.float64] = (np.exp(true) * (true - other)).sum(axis=-1)
    return total
