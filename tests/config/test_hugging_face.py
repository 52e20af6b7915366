"""How sister families' config.json differ from Llama's: as published, and as they should never be."""

import math

import pytest

from tpilite.config.hugging_face import config_from_hf
from tpilite.config.llama import LlamaConfig, YarnScaling
from tpilite.errors import ConfigError

_SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
}
_MISTRAL_V1 = _SIZES | {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
_QWEN_2 = _SIZES | {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
_QWEN_3 = _SIZES | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
}
_SMOLLM_3 = _SIZES | {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "layer_types": ["full_attention"] * 32,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 8,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
}
_GRANITE_3 = _SIZES | {
    "architectures": ["GraniteForCausalLM"],
    "attention_bias": False,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "granite",
    "residual_multiplier": 0.22,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": True,
}


def _llama(**differs):
    """A Llama of `_SIZES`, but for what differs."""
    return LlamaConfig(**_SIZES | {"head_dim": 128} | differs)


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        (_MISTRAL_V1, _llama(max_position_embeddings=32768, sliding_window=4096)),
        (
            _MISTRAL_V1 | {"sliding_window": None, "rope_theta": 1000000.0, "head_dim": 160},
            _llama(max_position_embeddings=32768, rope_theta=1000000.0, head_dim=160),
        ),
        (_QWEN_2, _llama(max_position_embeddings=32768, rope_theta=1000000.0, qkv_bias=True)),
        (_QWEN_3, _llama(max_position_embeddings=40960, rope_theta=1000000, qk_norm=True)),
        (
            _SMOLLM_3,
            _llama(
                max_position_embeddings=65536,
                rope_theta=5000000.0,
                layers_without_rope=(3, 7, 11, 15, 19, 23, 27, 31),
                tie_word_embeddings=True,
            ),
        ),
        (
            _GRANITE_3,
            _llama(
                max_position_embeddings=131072,
                rope_theta=5000000.0,
                tie_word_embeddings=True,
                embedding_multiplier=12.0,
                attention_multiplier=0.015625,
                residual_multiplier=0.22,
                logits_scaling=8.0,
            ),
        ),
    ],
)
def test_each_family_is_a_llama_but_for_what_its_paper_changes(published, expected):
    assert config_from_hf(published) == expected


def test_what_a_file_leaves_out_is_as_in_transformers():
    def left(published, *keys):
        return config_from_hf({key: value for key, value in published.items() if key not in keys})

    keys = ("max_position_embeddings", "num_key_value_heads", "sliding_window")
    mistral = left(_MISTRAL_V1, *keys)
    assert (mistral.max_position_embeddings, mistral.num_key_value_heads) == (131072, 8)
    assert mistral.sliding_window == 4096
    assert left(_QWEN_2, "use_sliding_window").sliding_window is None
    assert left(_QWEN_3, "head_dim", "num_key_value_heads").num_key_value_heads == 32
    assert left(_QWEN_3 | {"hidden_size": 1024}, "head_dim").head_dim == 128
    smollm = left(_SMOLLM_3, "no_rope_layers", "rope_theta")
    assert smollm.layers_without_rope == (3, 7, 11, 15, 19, 23, 27, 31)
    assert smollm.rope_theta == 2000000.0
    assert left(_GRANITE_3, "attention_multiplier").attention_multiplier == 1.0


def test_keys_that_a_family_does_not_read_change_nothing():
    strange = {"attention_bias": True, "mlp_bias": True, "logits_scaling": 3.0, "no_rope_layers": [0] * 32}
    for published in (_MISTRAL_V1, _QWEN_2):
        assert config_from_hf(published | strange) == config_from_hf(published)
    assert config_from_hf(_QWEN_3 | strange | {"attention_bias": False}) == config_from_hf(_QWEN_3)


@pytest.mark.parametrize(
    ("published", "changes", "window"),
    [
        (_QWEN_2, {"use_sliding_window": True}, 4096),
        (_QWEN_2, {"use_sliding_window": True, "max_window_layers": 32}, None),
        (_QWEN_2, {"use_sliding_window": True, "sliding_window": None}, None),
        (_QWEN_3, {"layer_types": ["full_attention"] * 32, "sliding_window": 99}, None),
        (_QWEN_3, {"layer_types": ["full_attention", "sliding_attention"] * 16, "sliding_window": 99}, 99),
        (_SMOLLM_3, {"layer_types": None, "use_sliding_window": True, "sliding_window": 50}, 50),
        (_MISTRAL_V1, {"layer_types": ["full_attention"] * 32}, 4096),
    ],
)
def test_a_window_counts_where_some_layer_has_it(published, changes, window):
    config = config_from_hf(published | changes)
    assert config.sliding_window == window
    assert config.context == (window or config.max_position_embeddings)


def test_yarn_in_all_its_spellings():
    older = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = config_from_hf(_QWEN_2 | {"rope_scaling": older})
    assert config.rope_scaling == YarnScaling(4.0, 32768, 0.1 * math.log(4) + 1)
    assert config.max_position_embeddings == config.context == 131072
    newer = {"rope_type": "yarn", "rope_theta": 1000000.0} | {k: v for k, v in older.items() if k != "type"}
    without = {key: value for key, value in _QWEN_2.items() if key != "rope_theta"}
    assert config_from_hf(without | {"rope_parameters": newer}) == config
    # Where the training's context is not given, it is the published one.
    assert config_from_hf(_QWEN_2 | {"rope_scaling": {"type": "yarn", "factor": 4.0}}) == config
    outside = {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16384}
    assert config_from_hf(_QWEN_2 | outside).context == 65536
    given = {"attention_factor": 1.0, "beta_fast": 16, "beta_slow": 2, "truncate": False}
    config = config_from_hf(_QWEN_2 | {"rope_scaling": older | given})
    assert config.rope_scaling == YarnScaling(4.0, 32768, 1.0, 16, 2, False)
    deepseek = config_from_hf(_QWEN_2 | {"rope_scaling": older | {"mscale": 1.0, "mscale_all_dim": 1.0}})
    assert deepseek.attention_factor == 1.0


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("published", "changes", "message"),
    [
        (
            _QWEN_2,
            {"rope_scaling": {"type": "yarn"}},
            r"no rope_scaling\.factor, which rope type 'yarn' needs",
        ),
        (_QWEN_2, {"rope_scaling": _YARN | {"factor": "4"}}, r'factor.* found "4"'),
        (_QWEN_2, {"rope_scaling": _YARN | {"factor": 0.5}}, r"factor must be a number >= 1, found 0\.5"),
        (_QWEN_2, {"rope_scaling": _YARN | {"attention_factor": -1}}, r"attention_factor .* found -1"),
        (_QWEN_2, {"rope_scaling": _YARN | {"beta_fast": "x"}}, r'beta_fast .* found "x"'),
        (_QWEN_2, {"rope_scaling": _YARN | {"beta_slow": 64}}, r"beta_slow <= beta_fast, found 64 and 32"),
        (_QWEN_2, {"rope_scaling": _YARN | {"truncate": 1}}, r"truncate must be true or false, found 1"),
        (_QWEN_2, {"rope_scaling": _YARN | {"mscale": "a", "mscale_all_dim": 1}}, r'mscale.* found "a"'),
        (
            _QWEN_2,
            {"rope_scaling": _YARN | {"original_max_position_embeddings": 0.5}},
            r"original_max_position_embeddings must be a whole number .* found 0\.5",
        ),
        (_QWEN_2, {"rope_scaling": _YARN, "rope_theta": 1}, r"'yarn' needs a rope_theta above 1, found 1"),
        (_QWEN_2, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r'"dynamic", which is not supported'),
        (_QWEN_2, {"layer_types": "full_attention"}, r'layer_types = "full_attention"; expected a list'),
        (
            _QWEN_2,
            {"layer_types": ["linear_attention"]},
            r'layer_types with "linear_attention", which is not',
        ),
        (_QWEN_2, {"layer_types": [{}]}, r"layer_types with {}, which is not supported"),
        (
            _QWEN_3,
            {"layer_types": ["sliding_attention"]},
            r"layer_types with 'sliding_attention' and no sliding_window",
        ),
        (_MISTRAL_V1, {"sliding_window": 0}, r"sliding_window must be a whole number from 1 .* found 0"),
        (_MISTRAL_V1, {"sliding_window": "4k"}, r'sliding_window .* found "4k"'),
        (_QWEN_2, {"max_window_layers": "x", "use_sliding_window": True}, r'max_window_layers .* found "x"'),
        (_SMOLLM_3, {"no_rope_layers": [1, 0]}, r"no_rope_layers = \[1, 0\]; expected 0 or 1 for each of 32"),
        (_SMOLLM_3, {"no_rope_layers": [2] * 32}, r"no_rope_layers = \[2, .*; expected 0 or 1"),
        (
            _SMOLLM_3,
            {"no_rope_layers": None, "no_rope_layer_interval": 0},
            r"no_rope_layer_interval must be a whole number from 1 .* found 0",
        ),
        (
            _SMOLLM_3,
            {"no_rope_layers": None, "num_hidden_layers": 2**31 - 1},
            r"num_hidden_layers must be at most",
        ),
        (_GRANITE_3, {"residual_multiplier": 0}, r"residual_multiplier must be a number above 0, found 0"),
        (_GRANITE_3, {"logits_scaling": "8"}, r'logits_scaling must be a number above 0, found "8"'),
    ],
)
def test_a_wrong_value_of_a_family_is_named_with_what_was_expected(published, changes, message):
    with pytest.raises(ConfigError, match=message) as raised:
        config_from_hf(published | changes)
    assert "\n" not in str(raised.value)
