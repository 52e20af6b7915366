"""A Llama forward pass in float64: no cache, no tiles, no ranks, none of tpilite's code.

`logits(config, tensors, ids)` takes config.json as a dict and the checkpoint's tensors by Hugging Face's
names, widened. After arXiv 2302.13971 and 2407.21783.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]


def logits(config: Mapping[str, Any], tensors: Tensors, ids: np.ndarray) -> np.ndarray:  # [T] -> [T, V]
    embedding = tensors["model.embed_tokens.weight"].astype(np.float64)
    eps = config["rms_norm_eps"]
    x = embedding[ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        y = _norm(x, tensors[f"{prefix}.input_layernorm.weight"], eps)
        x = x + _attention(config, tensors, f"{prefix}.self_attn", y)
        y = _norm(x, tensors[f"{prefix}.post_attention_layernorm.weight"], eps)
        gate = _linear(tensors, f"{prefix}.mlp.gate_proj", y)
        up = _linear(tensors, f"{prefix}.mlp.up_proj", y)
        x = x + _linear(tensors, f"{prefix}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    x = _norm(x, tensors["model.norm.weight"], eps)
    return x @ (embedding if config.get("tie_word_embeddings") else tensors["lm_head.weight"]).T


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def _linear(tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    return x @ tensors[f"{name}.weight"].T.astype(np.float64) + tensors.get(f"{name}.bias", 0)


def _attention(config: Mapping[str, Any], tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    n_heads = config["num_attention_heads"]
    n_groups = n_heads // (config.get("num_key_value_heads") or n_heads)
    d = config.get("head_dim") or config["hidden_size"] // n_heads
    q, k, v = (_linear(tensors, f"{name}.{part}_proj", x).reshape(len(x), -1, d) for part in "qkv")
    angles = np.arange(len(x))[:, None] * frequencies(config, d)
    q, k = (part * np.exp(1j * angles)[:, None] for part in (_complex(q), _complex(k)))
    mixed = np.empty((len(x), n_heads, d))
    for head in range(n_heads):
        scores = (q[:, head] @ k[:, head // n_groups].conj().T).real / np.sqrt(d)
        scores[np.triu_indices(len(x), 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        mixed[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, head // n_groups]
    return _linear(tensors, f"{name}.o_proj", mixed.reshape(len(x), -1))


def _complex(x: np.ndarray) -> np.ndarray:
    """Dimension i and i + d/2 of each head as one complex number; their product is that of the vectors."""
    first, second = np.split(x, 2, axis=-1)
    return first + 1j * second


def frequencies(config: Mapping[str, Any], d: int) -> np.ndarray:  # -> [d / 2]
    """Radians per position of each pair of dimensions."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    found = theta ** -(np.arange(d // 2) * 2 / d)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "linear":
        return found / rope["factor"]
    if kind == "llama3":
        for i, wavelength in enumerate(2 * np.pi / found):
            turns = rope["original_max_position_embeddings"] / wavelength
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            blend = 0.0 if turns < low else 1.0 if turns > high else (turns - low) / (high - low)
            found[i] *= blend + (1 - blend) / rope["factor"]
    return found
