"""Makes tests/fixtures/golden: what Hugging Face transformers computes on tiny random models.

    PYTHONPATH=tests python tools/make_golden.py [CASE...]

Without a case, makes all of them. Development only: needs torch and transformers 5. Each case is a folder
with config.json and golden.npz:

    ids [T]; rows [R] and logits [R, V], the float32 logits of those rows; stored, the dtype of the weights

The weights are not stored: tests/random_weights.py makes them from the seed, which is the case's place among
all of them. A config.json is what transformers writes; those of `OLDER_SPELLING` are as version 4 wrote them.
rope.npz holds tables of cosine and sine at positions up to 131071 for the scalings of published models.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_weights import random_tensors, widened
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

_GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "golden"
_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Against head_dim 16 and theta 500 some wavelengths are kept, some blended, some stretched.
    "original_max_position_embeddings": 32,
}

# name: (what differs from `_SHAPE`, the dtype of the stored weights, the number of ids)
CASES: dict[str, tuple[dict[str, Any], str, int]] = {
    "multi_head": ({"num_key_value_heads": 4}, "float32", 70),
    "grouped_heads": ({"num_attention_heads": 8, "num_hidden_layers": 3}, "float32", 70),
    "one_kv_head": ({"num_key_value_heads": 1}, "float32", 70),
    "head_dim": ({"hidden_size": 40, "head_dim": 16}, "float32", 70),
    "tied": ({"tie_word_embeddings": True}, "float32", 70),
    "attention_bias": ({"attention_bias": True}, "float32", 70),
    "mlp_bias": ({"mlp_bias": True}, "float32", 70),
    "large_eps": ({"rms_norm_eps": 0.1}, "float32", 70),
    "rope_theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, "float32", 70),
    "rope_linear": (
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        "float32",
        70,
    ),
    "rope_llama3": ({"head_dim": 16, "rope_parameters": {**_LLAMA3, "rope_theta": 500.0}}, "float32", 70),
    "bfloat16": ({"dtype": "bfloat16"}, "bfloat16", 70),
    "float16": ({"dtype": "float16"}, "float16", 70),
    "odd_sizes": (
        {
            "hidden_size": 33,
            "head_dim": 6,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 45,
            "vocab_size": 101,
            "dtype": "bfloat16",
        },
        "bfloat16",
        70,
    ),
    "long": ({"max_position_embeddings": 1024}, "float32", 600),
}
OLDER_SPELLING: dict[str, tuple[dict[str, Any], str, int]] = {
    "older_rope_linear": (
        {"rope_theta": 1000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "float32",
        70,
    ),
    "older_rope_llama3": (
        {"head_dim": 16, "rope_theta": 500.0, "rope_scaling": _LLAMA3, "torch_dtype": "bfloat16"},
        "bfloat16",
        70,
    ),
    "all_biases_tied": (
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_theta": 500.0,
            "rope_scaling": None,
            "torch_dtype": "float16",
        },
        "float16",
        70,
    ),
}
_ODD: dict[str, Any] = {
    "hidden_size": 33,
    "head_dim": 6,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 45,
    "vocab_size": 101,
}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 500.0,
    # Against head_dim 16 and theta 500 some pairs are kept, some blended, some stretched.
    "original_max_position_embeddings": 64,
    "beta_fast": 4,
}
_GRANITE: dict[str, Any] = {
    "model_type": "granite",
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, tuple[dict[str, Any], str, int]] = {
    "mistral": ({"model_type": "mistral", "sliding_window": None}, "float32", 70),
    # Seen whole by every layer as long as the text stays within the window.
    "mistral_window": ({"model_type": "mistral", "sliding_window": 70}, "bfloat16", 70),
    "qwen2": ({"model_type": "qwen2", "tie_word_embeddings": True}, "float32", 70),
    "qwen2_odd": ({"model_type": "qwen2", **_ODD}, "bfloat16", 70),
    "qwen2_yarn": ({"model_type": "qwen2", "head_dim": 16, "rope_parameters": _YARN}, "float32", 70),
    "qwen3": ({"model_type": "qwen3", "head_dim": 16}, "float32", 70),
    "qwen3_odd": ({"model_type": "qwen3", "tie_word_embeddings": True, **_ODD}, "bfloat16", 70),
    "qwen3_yarn": (
        {
            "model_type": "qwen3",
            "head_dim": 16,
            "attention_bias": True,
            "rope_parameters": {**_YARN, "attention_factor": 1.3, "beta_slow": 2, "truncate": False},
        },
        "float32",
        70,
    ),
    "smollm3": ({"model_type": "smollm3", "num_hidden_layers": 5, "pad_token_id": None}, "float32", 70),
    "smollm3_odd": (
        {
            "model_type": "smollm3",
            "num_hidden_layers": 3,
            "no_rope_layers": [0, 1, 0],
            "attention_bias": True,
            "mlp_bias": True,
            "pad_token_id": None,
            **_ODD,
        },
        "bfloat16",
        70,
    ),
    "granite": (_GRANITE, "float32", 70),
    "granite_odd": (
        {**_GRANITE, **_ODD, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        "bfloat16",
        70,
    ),
    "yarn_mscale": (
        {"head_dim": 16, "rope_parameters": {**_YARN, "mscale": 1.4, "mscale_all_dim": 0.6}},
        "float32",
        70,
    ),
}
ROPE_CASES: dict[str, dict[str, Any]] = {
    "llama2": {"head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "yi": {"head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0}},
    "llama3.1": {
        "head_dim": 128,
        "rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 8192, "rope_theta": 500000.0},
    },
    "llama3.2": {
        "head_dim": 64,
        "rope_parameters": {
            **_LLAMA3,
            "factor": 32.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        },
    },
    "qwen2.5": {
        "head_dim": 128,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
        },
    },
    "yarn": {
        "head_dim": 64,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "truncate": False,
            "mscale": 0.707,
            "mscale_all_dim": 1.2,
        },
    },
    "linear": {
        "head_dim": 80,
        "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
    },
}
_POSITIONS = [0, 1, 7, 500, 4095, 8192, 32771, 100000, 131071]


def main(wanted: list[str]) -> None:
    for seed, (name, (changes, stored, n_ids)) in enumerate({**CASES, **OLDER_SPELLING, **FAMILIES}.items()):
        if wanted and name not in wanted:
            continue
        folder = _GOLDEN / name
        folder.mkdir(parents=True, exist_ok=True)
        if name in OLDER_SPELLING:
            older = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
            text = json.dumps({**older, **_SHAPE, **changes}, indent=2) + "\n"
        else:
            text = _as_written(AutoConfig.for_model(**{"model_type": "llama", **_SHAPE, **changes}))
        (folder / "config.json").write_text(text)
        ids = np.random.RandomState(seed).randint(0, json.loads(text)["vocab_size"], n_ids)
        rows = np.unique(np.linspace(0, n_ids - 1, 8).astype(int))
        logits = _logits(json.loads(text), seed, stored, ids)[rows]
        np.savez(folder / "golden.npz", ids=ids, rows=rows, logits=logits, seed=seed, stored=stored)
        print(f"{name:20} largest logit {np.abs(logits).max():6.2f}, deviation {logits.std():5.2f}")
    if not wanted:
        _save_rope()


def _save_rope() -> None:
    tables: dict[str, Any] = {"positions": np.array(_POSITIONS)}
    for name, changes in ROPE_CASES.items():
        config = LlamaConfig(**{**_SHAPE, **changes, "max_position_embeddings": 131072})
        cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor([_POSITIONS]))
        half = config.head_dim // 2
        tables[f"{name}.config"] = _as_written(config)
        tables[f"{name}.cos"], tables[f"{name}.sin"] = cos[0, :, :half].numpy(), sin[0, :, :half].numpy()
    np.savez_compressed(_GOLDEN / "rope.npz", **tables)


def _as_written(config: PreTrainedConfig) -> str:
    """config.json as transformers saves it beside a model."""
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return (Path(folder) / "config.json").read_text()


@torch.no_grad()
def _logits(config_json: dict[str, Any], seed: int, stored: str, ids: np.ndarray) -> np.ndarray:
    """The float32 logits [T, V] of the weights that the seed makes, by eager attention."""
    config = AutoConfig.for_model(**config_json)
    config.dtype, config._attn_implementation = torch.float32, "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    tensors = {n: torch.from_numpy(t) for n, t in widened(random_tensors(config_json, seed, stored)).items()}
    if config_json.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()


if __name__ == "__main__":
    main(sys.argv[1:])
