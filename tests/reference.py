"""A forward pass of Llama and its sister families in float64: no cache, no ranks, none of tpilite's code.

`logits(config, tensors, ids)` takes config.json as a dict and the checkpoint's tensors by Hugging Face's
names, widened. After arXiv 2302.13971 and 2407.21783; YaRN after 2309.00071, its index range as transformers
rounds it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]


def logits(config: Mapping[str, Any], tensors: Tensors, ids: np.ndarray) -> np.ndarray:  # [T] -> [T, V]
    embedding = tensors["model.embed_tokens.weight"].astype(np.float64)
    eps, residual = config["rms_norm_eps"], config.get("residual_multiplier", 1)
    x = embedding[ids] * config.get("embedding_multiplier", 1)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        y = _norm(x, tensors[f"{prefix}.input_layernorm.weight"], eps)
        x = x + _attention(config, tensors, layer, y) * residual
        y = _norm(x, tensors[f"{prefix}.post_attention_layernorm.weight"], eps)
        gate = _linear(tensors, f"{prefix}.mlp.gate_proj", y)
        up = _linear(tensors, f"{prefix}.mlp.up_proj", y)
        x = x + _linear(tensors, f"{prefix}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up) * residual
    x = _norm(x, tensors["model.norm.weight"], eps)
    head = embedding if config.get("tie_word_embeddings") else tensors["lm_head.weight"]
    return x @ head.T / config.get("logits_scaling", 1)


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def _linear(tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    return x @ tensors[f"{name}.weight"].T.astype(np.float64) + tensors.get(f"{name}.bias", 0)


def _attention(config: Mapping[str, Any], tensors: Tensors, layer: int, x: np.ndarray) -> np.ndarray:
    name = f"model.layers.{layer}.self_attn"
    n_heads = config["num_attention_heads"]
    n_groups = n_heads // (config.get("num_key_value_heads") or n_heads)
    d = config.get("head_dim") or config["hidden_size"] // n_heads
    q, k, v = (_linear(tensors, f"{name}.{part}_proj", x).reshape(len(x), -1, d) for part in "qkv")
    if config["model_type"] == "qwen3":
        q = _norm(q, tensors[f"{name}.q_norm.weight"], config["rms_norm_eps"])
        k = _norm(k, tensors[f"{name}.k_norm.weight"], config["rms_norm_eps"])
    q, k = _complex(q), _complex(k)
    if config["model_type"] != "smollm3" or config["no_rope_layers"][layer]:
        angles = np.arange(len(x))[:, None] * frequencies(config, d)
        q, k = (part * attention_factor(config) * np.exp(1j * angles)[:, None] for part in (q, k))
    mixed = np.empty((len(x), n_heads, d))
    for head in range(n_heads):
        scores = (q[:, head] @ k[:, head // n_groups].conj().T).real * config.get(
            "attention_multiplier", d**-0.5
        )
        scores[np.triu_indices(len(x), 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        mixed[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, head // n_groups]
    return _linear(tensors, f"{name}.o_proj", mixed.reshape(len(x), -1))


def _complex(x: np.ndarray) -> np.ndarray:
    """Dimension i and i + d/2 of each head as one complex number; their product is that of the vectors."""
    first, second = np.split(x, 2, axis=-1)
    return first + 1j * second


def attention_factor(config: Mapping[str, Any]) -> float:
    """What YaRN multiplies cosine and sine by."""
    rope = _rope(config)
    if rope.get("rope_type", rope.get("type")) != "yarn":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    log = np.log(rope["factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return float((0.1 * rope["mscale"] * log + 1) / (0.1 * rope["mscale_all_dim"] * log + 1))
    return float(0.1 * log + 1)


def frequencies(config: Mapping[str, Any], d: int) -> np.ndarray:  # -> [d / 2]
    """Radians per position of each pair of dimensions."""
    rope = _rope(config)
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
    if kind == "yarn":
        original = rope["original_max_position_embeddings"]
        most, least = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
        # The index at which a pair turns so many times in the original context.
        low, high = (d * np.log(original / (2 * np.pi * n)) / (2 * np.log(theta)) for n in (most, least))
        if rope.get("truncate", True):
            low, high = np.floor(low), np.ceil(high)
        low, high = max(low, 0), min(high, d - 1)
        for i in range(d // 2):
            blend = min(1, max(0, (i - low) / (high - low)))
            found[i] *= 1 - blend + blend / rope["factor"]
    return found


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}
