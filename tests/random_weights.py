"""Weights of tiny random models, made again from a seed wherever they are needed.

The golden logits were computed on these weights, so the recipe may not change without making them anew:

    u    = np.random.RandomState(crc32(f"{seed} {name}")).random_sample(shape) * 2 - 1
    norm = 1 + u / 2        bias = u / 2        embedding = u
    matrix = u * gain * sqrt(3 / n_cols)        gain = 2 for q_proj and k_proj, 1 for the others

then rounded to float32 and from there stored as float32, float16, or bfloat16 by cutting off the low 16
bits. `RandomState` is frozen by NumPy's promise (NEP 19), and only exact operations follow it. The gain of
the queries and keys makes attention far from uniform.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint, by Hugging Face's names, for what config.json says."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    n_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // n_heads
    q_rows, kv_rows = n_heads * head_dim, (config.get("num_key_value_heads") or n_heads) * head_dim
    matrices = {
        "self_attn.q_proj": (q_rows, hidden),
        "self_attn.k_proj": (kv_rows, hidden),
        "self_attn.v_proj": (kv_rows, hidden),
        "self_attn.o_proj": (hidden, q_rows),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    has_bias = {"attn": config.get("attention_bias"), "mlp": config.get("mlp_bias")}
    biased = [name for name in matrices if has_bias["attn" if "attn" in name else "mlp"]]
    if config["model_type"] == "qwen2":
        biased = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, shape in matrices.items():
            found[f"{prefix}.{name}.weight"] = shape
            if name in biased:
                found[f"{prefix}.{name}.bias"] = shape[:1]
        if config["model_type"] == "qwen3":
            found |= {f"{prefix}.self_attn.{x}_norm.weight": (head_dim,) for x in "qk"}
        found[f"{prefix}.input_layernorm.weight"] = (hidden,)
        found[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = (vocab, hidden)
    return found


def random_tensors(config: Mapping[str, Any], seed: int, stored: str = "float32") -> dict[str, np.ndarray]:
    """A whole checkpoint by Hugging Face's names; bfloat16 as the uint16 of its bits."""
    return {name: _random_tensor(name, shape, seed, stored) for name, shape in shapes(config).items()}


def widened(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values of stored tensors as float32, exactly."""
    return {
        name: (t.astype(np.uint32) << 16).view(np.float32) if t.dtype == np.uint16 else t.astype(np.float32)
        for name, t in tensors.items()
    }


def _random_tensor(name: str, shape: tuple[int, ...], seed: int, stored: str) -> np.ndarray:
    u = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode())).random_sample(shape) * 2 - 1
    if "norm" in name:
        u = 1 + u / 2
    elif name.endswith("bias"):
        u = u / 2
    elif "embed" not in name:
        u = u * ((2 if "q_proj" in name or "k_proj" in name else 1) * math.sqrt(3 / shape[1]))
    values = u.astype(np.float32)
    if stored == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(stored)
