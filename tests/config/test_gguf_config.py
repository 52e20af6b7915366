"""GGUF metadata as llama.cpp's converters write it, and as it should never be."""

from pathlib import Path

import numpy as np
import pytest

from tpilite.config.gguf import config_from_gguf
from tpilite.config.llama import LlamaConfig, RopeScaling, YarnScaling
from tpilite.errors import ConfigError

_SIZES = {
    "block_count": 8,
    "context_length": 32768,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 10000.0,
}
_TIED = {"token_embd.weight": (97, 64)}
_YARN = {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0}


def _config(architecture, shapes=_TIED, plain=None, **changes):
    """The configuration by `_SIZES` but for the changes; None leaves a key out."""
    values = _SIZES | {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {f"{architecture}.{key}": value for key, value in values.items() if value is not None}
    metadata |= {"general.architecture": architecture, **(plain or {})}
    return config_from_gguf(Path("x.gguf"), metadata, shapes)


def _llama(**differs):
    return LlamaConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 97,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        }
        | differs
    )


def test_a_llama_is_read():
    assert _config("llama") == _llama(rope_interleaved=True)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "eot_token_id": 7, "eom_token_id": 2}
    more = {f"tokenizer.ggml.{key}": value for key, value in tokens.items()}
    keys = {"attention__key_length": 32, "attention__value_length": 32, "rope__dimension_count": 32}
    found = _config("llama", _TIED | {"output.weight": (97, 64)}, more, attention__head_count_kv=None, **keys)
    assert found == _llama(
        rope_interleaved=True,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_ids=(2, 7),
    )
    assert _config("llama", {}, vocab_size=50).vocab_size == 50


def test_sister_families_are_read():
    qwen2 = {f"blk.0.attn_{x}.bias": (1,) for x in "qkv"}
    assert _config("qwen2", _TIED | qwen2) == _llama(qkv_bias=True)
    both = _TIED | qwen2 | {"blk.0.attn_output.bias": (1,), "blk.0.ffn_down.bias": (1,)}
    assert _config("llama", both) == _llama(attention_bias=True, mlp_bias=True, rope_interleaved=True)
    assert _config("qwen3", _TIED | {"blk.0.attn_q_norm.weight": (16,)}) == _llama(qk_norm=True)
    assert _config("smollm3") == _llama(layers_without_rope=(3, 7), rope_interleaved=True)
    scales = {"attention__scale": 0.5, "embedding_scale": 12.0, "residual_scale": 0.25, "logit_scale": 8.0}
    assert _config("granite", **scales) == _llama(
        attention_multiplier=0.5,
        embedding_multiplier=12.0,
        residual_multiplier=0.25,
        logits_scaling=8.0,
        rope_interleaved=True,
    )
    assert _config("granite", **dict.fromkeys(scales, 0.0)) == _llama(rope_interleaved=True)
    assert _config("llama", **scales) == _llama(rope_interleaved=True)  # which does not read them
    windowed = _config("llama", attention__sliding_window=4096)
    assert (windowed.sliding_window, windowed.context) == (4096, 4096)


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({}, None),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, None),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"rope__scale_linear": 2.0}, RopeScaling("linear", 2.0)),
        ({"rope__scaling__factor": 0.0}, None),
    ],
)
def test_linear_scaling_in_all_its_spellings(changes, scaling):
    assert _config("llama", **changes).rope_scaling == scaling


def test_yarn_is_read():
    keys = {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 4.0,
        "rope__scaling__original_context_length": 32768,
    }
    config = _config("qwen2", **keys)
    assert config.rope_scaling == YarnScaling(4.0, 32768, 0.1 * np.log(4).item() + 1)
    assert config.context == 131072
    betas = {"rope__scaling__yarn_beta_fast": 16.0, "rope__scaling__yarn_beta_slow": 2.0}
    given = {"rope__scaling__yarn_attn_factor": 1.5, "rope__scaling__attn_factor": 2.0}
    found = _config("llama", **keys, **betas, **given).rope_scaling
    assert found == YarnScaling(4.0, 32768, 3.0, 16.0, 2.0)
    assert _config("llama", **keys, rope__scaling__yarn_log_multiplier=1.0).attention_factor == 1.0
    del keys["rope__scaling__original_context_length"]
    assert _config("llama", **keys).context == 131072


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        (
            "gemma2",
            {},
            r'general\.architecture is "gemma2", which is not supported; expected llama, qwen2, qwen3',
        ),
        ("qwen3moe", {}, r'architecture is "qwen3moe"'),
        ("mistral3", {}, r'architecture is "mistral3"'),
        ("llama", {"block_count": None}, r"x\.gguf has no llama\.block_count, which a Llama model needs"),
        ("llama", {"block_count": "8"}, r'llama\.block_count must be a whole number .* found "8"'),
        ("smollm3", {"block_count": 2**31 - 1}, r"smollm3\.block_count is 2147483647, .* at most 10000"),
        ("llama", {"feed_forward_length": 0}, r"llama\.feed_forward_length must .* found 0"),
        ("llama", {"embedding_length": 1.5}, r"llama\.embedding_length .* found 1\.5"),
        ("llama", {"embedding_length": 36}, r"heads of 9 \(by llama\.embedding_length .* expected an even"),
        (
            "llama",
            {"attention__key_length": 5},
            r"heads of 5 .* or attention\.key_length\); expected an even",
        ),
        ("llama", {"attention__head_count": 0}, r"llama\.attention\.head_count .* found 0"),
        ("llama", {"attention__head_count": 3}, r"llama\.attention\.head_count is 3, .* a multiple of .*, 2"),
        ("llama", {"attention__head_count_kv": "x"}, r'llama\.attention\.head_count_kv must .* found "x"'),
        (
            "llama",
            {"attention__head_count_kv": np.array([1, 2])},
            r"llama\.attention\.head_count_kv is an array",
        ),
        ("llama", {"feed_forward_length": [96, 80]}, r"llama\.feed_forward_length is an array"),
        ("llama", {"rope__scaling__type": ["yarn"]}, r"llama\.rope\.scaling\.type is an array"),
        ("llama", {"attention__key_length": True}, r"llama\.attention\.key_length .* found true"),
        (
            "llama",
            {"attention__value_length": 8},
            r"llama\.attention\.value_length is 8, which is not supported; expected .* 16",
        ),
        ("llama", {"attention__layer_norm_rms_epsilon": 0.0}, r"layer_norm_rms_epsilon must .* found 0\.0"),
        ("llama", {"rope__freq_base": -1.0}, r"llama\.rope\.freq_base must be a number above 0"),
        ("llama", {"rope__dimension_count": 8}, r"rope\.dimension_count is 8, which is not supported"),
        ("llama", {"expert_count": 8}, r"llama\.expert_count is 8, which is not supported; expected 0"),
        ("llama", {"attention__causal": False}, r"attention\.causal is false, which is not supported"),
        ("llama", {"rope__scaling__type": "longrope"}, r'scaling\.type is "longrope", .* "linear" or "yarn"'),
        ("llama", {"rope__scaling__type": "dynamic"}, r'rope\.scaling\.type is "dynamic"'),
        ("llama", {"rope__scaling__factor": -1.0}, r"rope\.scaling\.factor must be a number above 0"),
        ("llama", {"rope__scaling__factor": "x"}, r'rope\.scaling\.factor .* found "x"'),
        ("llama", {"rope__scaling__factor": 0.5}, r"llama\.rope\.scaling\.factor is 0\.5, .* from 1"),
        ("llama", {"rope__scale_linear": 0.5}, r"llama\.rope\.scale_linear is 0\.5, .* from 1"),
        ("llama", _YARN | {"rope__freq_base": 1.0}, r"rope\.freq_base is 1\.0, .* above 1 for yarn"),
        ("llama", _YARN | {"rope__scaling__yarn_beta_slow": 64.0}, r"yarn_beta_slow is 64\.0, .* at most"),
        ("llama", _YARN | {"rope__scaling__original_context_length": 0}, r"original_context_length must"),
        ("llama", _YARN | {"rope__scaling__attn_factor": "x"}, r'attn_factor .* above 0, found "x"'),
        ("llama", _YARN | {"rope__scaling__yarn_log_multiplier": "x"}, r'yarn_log_multiplier .* found "x"'),
        (
            "llama",
            {"rope__scaling__yarn_ext_factor": 0.5},
            r"yarn_ext_factor is 0\.5, which is not supported",
        ),
        ("granite", {"rope__scaling__finetuned": False}, r"scaling\.finetuned is false, .* with rotary"),
        ("granite", {"logit_scale": -1.0}, r"granite\.logit_scale must be a number above 0, found -1\.0"),
        ("llama", {"attention__sliding_window": -4}, r"attention\.sliding_window must be a whole number"),
        ("llama", {"context_length": "x", "rope__scaling__type": "yarn"}, r'context_length .* found "x"'),
    ],
)
def test_what_is_wrong_or_not_supported_is_named(architecture, changes, message):
    with pytest.raises(ConfigError, match=message) as raised:
        _config(architecture, **changes)
    assert str(raised.value).startswith("x.gguf")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["output.bias", "rope_factors_long.weight", "blk.0.ffn_gate_exps.weight"])
def test_tensors_that_change_the_maths_are_named(name):
    with pytest.raises(ConfigError, match=f"a tensor {name}, which is not supported"):
        _config("llama", _TIED | {name: (1,)})


@pytest.mark.parametrize("key", ["bos_token_id", "eot_token_id"])
@pytest.mark.parametrize(
    ("value", "words"), [([1, 2], "an array"), (-1, "-1; expected the id"), (1.0, "1.0; expected the id")]
)
def test_what_is_no_token_is_named(key, value, words):
    with pytest.raises(ConfigError, match=f"x.gguf: tokenizer.ggml.{key} is {words}"):
        _config("llama", plain={f"tokenizer.ggml.{key}": value})


def test_tokens_beyond_the_vocabulary_are_none():
    values = {"bos_token_id": 97, "eos_token_id": 2**32 - 1, "eot_token_id": 96}
    config = _config("llama", plain={f"tokenizer.ggml.{key}": value for key, value in values.items()})
    assert (config.bos_token_id, config.eos_token_ids) == (None, (96,))
