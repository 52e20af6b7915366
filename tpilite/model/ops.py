"""The small operations of a Llama block: float32 in, float32 out, NumPy only."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.arrays import Array
from tpilite.config.llama import LlamaConfig, RopeScaling, YarnScaling

_TILE_BYTES = 128 << 10


def rms_norm(x: Array, weight: Array, eps: float) -> Array:  # [T, D], [D] -> [T, D]
    """Each row scaled to a root mean square of one, times `weight` (arXiv 1910.07467)."""
    mean_square = np.einsum("td,td->t", x, x) / np.float32(x.shape[1])
    scale = 1 / np.sqrt(mean_square + np.float32(eps))
    return x * scale[:, None] * weight


def is_finite(x: Array) -> bool:
    """Whether no element is NaN or infinite; the sum of squares says so nearly always, in one call."""
    flat = x.ravel()
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(np.dot(flat, flat)) or bool(np.isfinite(flat).all())


def silu(x: Array) -> Array:  # [...] -> [...]
    """x * sigmoid(x). The tanh form has no exponential that could overflow."""
    half = np.float32(0.5)
    return x * (half * np.tanh(half * x) + half)


def swiglu(gate: Array, up: Array) -> Array:  # [T, F] x 2 -> [T, F]
    """silu(gate) * up (arXiv 2002.05202), in place: `gate` holds the result.

    Some rows at a time, so that what lies between stays in the cache.
    """
    step = max(1, _TILE_BYTES // (4 * max(1, gate.shape[1])))
    for start in range(0, gate.shape[0], step):
        rows = slice(start, start + step)
        np.multiply(silu(gate[rows]), up[rows], out=gate[rows])
    return gate


def softmax(scores: Array) -> Array:  # [..., S] -> [..., S]
    """Softmax over the last axis, in place: `scores` holds the result."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def rope_frequencies(config: LlamaConfig) -> Array:  # -> [d / 2]
    """The angle per position of each pair of a head's dimensions (arXiv 2104.09864)."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies: Array = 1 / np.power(np.float32(config.rope_theta), exponent)
    if config.rope_divisors:
        frequencies /= np.array(config.rope_divisors, np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if isinstance(scaling, YarnScaling):
        return _yarn_frequencies(frequencies, scaling, config.rope_theta)
    if scaling.rope_type == "linear":
        return frequencies / np.float32(scaling.factor)
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: Array, scaling: RopeScaling) -> Array:  # [d / 2] -> [d / 2]
    """Wavelengths short against the training context stay, long ones stretch, those between blend."""
    turns = scaling.original_max_position_embeddings * frequencies / np.float32(2 * math.pi)
    keep = (turns - np.float32(scaling.low_freq_factor)) / np.float32(
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    keep = keep.clip(0, 1)
    stretched: Array = (1 - keep) * frequencies / np.float32(scaling.factor) + keep * frequencies
    return stretched


def _yarn_frequencies(frequencies: Array, scaling: YarnScaling, theta: float) -> Array:  # [d / 2] -> [d / 2]
    """Pairs of many turns in the training context stay, of few stretch, those between blend by index."""
    d = 2 * len(frequencies)

    def pair_of(turns: float) -> float:
        wavelength = scaling.original_max_position_embeddings / turns
        return d * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    beyond = (np.arange(d // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low or 0.001)
    keep = 1 - beyond.clip(0, 1)
    stretched: Array = frequencies / np.float32(scaling.factor) * (1 - keep) + frequencies * keep
    return stretched


def rope_table(
    frequencies: Array, positions: NDArray[Any], factor: float = 1.0
) -> tuple[Array, Array]:  # [d/2], [T] -> [T, 1, d/2]
    """Cosine and sine of each row's angles, times YaRN's attention factor.

    The angle is a float32 product: the models were trained with its rounding, which at position 8000
    already is 5e-4 radians.
    """
    angles = positions.astype(np.float32)[:, None, None] * frequencies
    return np.cos(angles) * factor, np.sin(angles) * factor


def rotate(
    x: Array, table: tuple[Array, Array], interleaved: bool = False
) -> Array:  # [T, H, d] -> [T, H, d]
    """`x` with dimensions i and i + d/2 of every head turned by the row's angle (Hugging Face's pairs).

    With `interleaved`, 2i and 2i + 1 are the pairs. The result has them half a head apart all the same: query
    and key alike, so that their products are the same.
    """
    cos, sin = table
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
