"""config.json as it is published, and as it should never be."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpilite.config.generation import GenerationDefaults
from tpilite.config.hugging_face import config_from_hf, config_of_folder
from tpilite.config.llama import LlamaConfig, RopeScaling, YarnScaling
from tpilite.engine.config import EngineConfig
from tpilite.errors import CheckpointError, ConfigError, TpiliteError
from tpilite.formats.json_file import read_json

_GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"

# The config.json of published models, less the keys about training, software and padding that all have.
_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "use_cache": True,
}
_LLAMA_2 = _COMMON | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
_LLAMA_2_70B = _LLAMA_2 | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
}
_LLAMA_3 = _COMMON | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
_ROPE_3_1 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_LLAMA_3_1 = _LLAMA_3 | {
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": _ROPE_3_1,
}
_LLAMA_3_1_70B = _LLAMA_3_1 | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
_LLAMA_3_2_1B = _LLAMA_3_1 | {
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": _ROPE_3_1 | {"factor": 32.0},
    "tie_word_embeddings": True,
}
_LLAMA_3_2_3B = _LLAMA_3_2_1B | {
    "head_dim": 128,
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
}
_TINYLLAMA = _LLAMA_2 | {
    "attention_bias": False,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
_YI = _LLAMA_2 | {
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "rope_theta": 5000000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 64000,
}
_LLAMA_1 = {
    key: value for key, value in _LLAMA_2.items() if key not in ("num_key_value_heads", "rope_scaling")
}


def _parameters(config):
    """Roughly what a model is named after: its number of weights, in billions."""
    c = config
    attention = 2 * c.hidden_size * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    layer = attention + 3 * c.hidden_size * c.intermediate_size
    heads = 1 if c.tie_word_embeddings else 2
    return (c.num_hidden_layers * layer + heads * c.vocab_size * c.hidden_size) / 1e9


@pytest.mark.parametrize(
    ("published", "billions", "head_dim", "rope_theta", "rope_scaling", "eos"),
    [
        (_LLAMA_1, 6.74, 128, 10000.0, None, (2,)),
        (_LLAMA_2, 6.74, 128, 10000.0, None, (2,)),
        (_LLAMA_2_70B, 68.98, 128, 10000.0, None, (2,)),
        (_LLAMA_3, 8.03, 128, 500000.0, None, (128001,)),
        (_LLAMA_3_1, 8.03, 128, 500000.0, 8.0, (128001, 128008, 128009)),
        (_LLAMA_3_1_70B, 70.55, 128, 500000.0, 8.0, (128001, 128008, 128009)),
        (_LLAMA_3_2_1B, 1.24, 64, 500000.0, 32.0, (128001,)),
        (_LLAMA_3_2_3B, 3.21, 128, 500000.0, 32.0, (128001,)),
        (_TINYLLAMA, 1.10, 64, 10000.0, None, (2,)),
        (_YI, 6.06, 128, 5000000.0, None, (2,)),
    ],
)
def test_published_models_are_read_as_they_are(published, billions, head_dim, rope_theta, rope_scaling, eos):
    config = config_from_hf(published)
    scaling = None if rope_scaling is None else RopeScaling("llama3", rope_scaling, 1.0, 4.0, 8192)
    assert _parameters(config) == pytest.approx(billions, abs=0.006)
    assert (config.head_dim, config.rope_theta, config.rope_scaling) == (head_dim, rope_theta, scaling)
    assert (config.bos_token_id, config.eos_token_ids) == (published["bos_token_id"], eos)
    for name in ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, name) == published[name]


@pytest.mark.parametrize("case", sorted(path.name for path in _GOLDEN.iterdir() if path.is_dir()))
def test_what_transformers_writes_is_read(case):
    written = json.loads((_GOLDEN / case / "config.json").read_text())
    config = config_of_folder(_GOLDEN / case)
    for name in ("hidden_size", "intermediate_size", "vocab_size", "num_key_value_heads"):
        assert getattr(config, name) == written[name]


def test_both_spellings_of_the_rotary_embedding_mean_the_same():
    older = config_from_hf(_LLAMA_3_1)
    rest = {key: value for key, value in _LLAMA_3_1.items() if not key.startswith("rope")}
    newer = config_from_hf(rest | {"rope_parameters": {**_ROPE_3_1, "rope_theta": 500000.0}})
    oldest = config_from_hf(
        rest | {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": None}
    )
    assert newer == older
    assert oldest.rope_scaling == RopeScaling("linear", 2)
    assert oldest.rope_theta == 7.0


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, 5.0),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 6.0}, 6.0),
        ({"rope_parameters": {}, "rope_scaling": {}}, 10000.0),
        ({"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 1.0}}, 5.0),
    ],
)
def test_plain_rotary_embedding_in_all_its_spellings(rope, theta):
    config = config_from_hf(_TINYLLAMA | {"rope_theta": theta} | rope)
    assert (config.rope_theta, config.rope_scaling) == (theta, None)


def test_where_a_file_has_both_spellings_the_older_one_counts_as_in_transformers():
    both = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": _ROPE_3_1}
    assert config_from_hf(_TINYLLAMA | both).rope_scaling == RopeScaling("linear", 2.0)


def test_generation_config_says_where_a_text_ends():
    generation = {"bos_token_id": 5, "eos_token_id": [7, 8], "temperature": 0.6}
    config = config_from_hf(_LLAMA_2, generation)
    assert (config.bos_token_id, config.eos_token_ids) == (5, (7, 8))
    assert config_from_hf(_LLAMA_2, {}).eos_token_ids == (2,)
    assert config_from_hf(_LLAMA_2 | {"eos_token_id": None, "bos_token_id": None}).eos_token_ids == ()


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("model_type", "gemma2", '"gemma2"'),
        ("model_type", "qwen3_moe", '"qwen3_moe"'),
        ("model_type", "granitemoe", '"granitemoe"'),
        ("model_type", None, None),
        ("hidden_act", "gelu", '"gelu"'),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("partial_rotary_factor", 0.5, "0.5"),
        ("attn_logit_softcapping", 50.0, "50.0"),
        ("final_logit_softcapping", 30.0, "30.0"),
        ("num_local_experts", 8, "8"),
        ("rope_scaling", {"type": "dynamic", "factor": 4.0}, '"dynamic"'),
        ("rope_parameters", {"rope_type": "longrope"}, '"longrope"'),
        ("rope_parameters", {"rope_type": ["linear"]}, '["linear"]'),
        ("rope_parameters", {"partial_rotary_factor": 0.25}, "0.25"),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}, "full_attention"),
        ("num_experts", 64, "64"),
        ("n_routed_experts", 64, "64"),
        ("attention_chunk_size", 8192, "8192"),
        ("use_mrope", True, "true"),
        ("layer_types", ["chunked_attention"] * 32, '"chunked_attention"'),
        ("rope_scaling", "linear", '"linear"'),
    ],
)
def test_what_changes_the_maths_and_is_not_supported_is_named(key, value, shown):
    published = _LLAMA_2 | {"architectures": ["MistralForCausalLM"], key: value}
    with pytest.raises(ConfigError) as raised:
        config_from_hf(published)
    assert key in str(raised.value)
    assert (shown or "null") in str(raised.value)
    assert "expected" in str(raised.value)


def test_null_means_the_default():
    names = ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias")
    without = {key: value for key, value in _LLAMA_2.items() if key not in names}
    nulls = dict.fromkeys([*names, "head_dim", "num_key_value_heads", "bos_token_id"])
    config = config_from_hf(_LLAMA_2 | nulls)
    assert config == config_from_hf(without | {"bos_token_id": None})
    assert (config.max_position_embeddings, config.rms_norm_eps) == (2048, 1e-6)


def test_the_architecture_stands_for_a_missing_model_type():
    without = {key: value for key, value in _LLAMA_2.items() if key != "model_type"}
    assert config_from_hf(without) == config_from_hf(_LLAMA_2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, r"hidden_size must be a whole number from 1 .*, found 0"),
        ({"hidden_size": 4096.0}, r"hidden_size .* found 4096\.0"),
        ({"vocab_size": "32000"}, r'vocab_size .* found "32000"'),
        ({"vocab_size": True}, r"vocab_size .* found true"),
        ({"vocab_size": 10**400}, r"vocab_size must be a whole number from 1 to 2147483647, found a num"),
        ({"num_hidden_layers": 2**30}, r"num_hidden_layers must be at most 10000"),
        ({"num_attention_heads": None}, r"num_attention_heads .* found null"),
        ({"num_attention_heads": 30}, r"hidden_size \(4096\) is not a multiple of .* \(30\)"),
        ({"num_key_value_heads": 5}, r"num_attention_heads \(32\) must be a multiple .* \(5\)"),
        ({"head_dim": 127}, r"head_dim must be even .* found 127"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps must be a number above 0, found NaN"),
        ({"rms_norm_eps": "1e-5"}, r'rms_norm_eps .* found "1e-5"'),
        ({"rms_norm_eps": 0}, r"rms_norm_eps .* found 0"),
        ({"rope_theta": 10**400}, r"rope_theta must be a number above 0"),
        ({"rope_theta": True}, r"rope_theta .* found true"),
        ({"rope_theta": None}, r"rope_theta .* found null"),
        ({"tie_word_embeddings": "yes"}, r'tie_word_embeddings must be true or false, found "yes"'),
        ({"attention_bias": 1}, r"attention_bias must be true or false, found 1"),
        ({"eos_token_id": "</s>"}, r'eos_token_id must be a whole number .* found "</s>"'),
        ({"eos_token_id": [2, None]}, r"eos_token_id .* found null"),
        ({"eos_token_id": [True]}, r"eos_token_id .* found true"),
        ({"bos_token_id": -1}, r"bos_token_id .* found -1"),
        ({"bos_token_id": [1]}, r"bos_token_id .* found \[1\]"),
        ({"rope_scaling": {"type": "linear"}}, r"no rope_scaling\.factor, which rope type 'linear' needs"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, r"factor .* found NaN"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, r"factor must be a number >= 1, found 0\.5"),
        ({"rope_scaling": {"type": "linear", "factor": "8"}}, r'factor .* found "8"'),
        ({"rope_scaling": _ROPE_3_1 | {"high_freq_factor": 1.0}}, r"low_freq_factor < high_freq_factor"),
        ({"rope_scaling": _ROPE_3_1 | {"low_freq_factor": None}}, r"low_freq_factor .* found null"),
        ({"rope_scaling": _ROPE_3_1 | {"original_max_position_embeddings": 0}}, r"original_max.* found 0"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(_LLAMA_2 | changes)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_a_missing_size_is_named(key):
    with pytest.raises(ConfigError, match=f"no {key}, which a Llama model needs"):
        config_from_hf({k: v for k, v in _LLAMA_2.items() if k != key})


def _read(config, generation=None):
    """The configuration, or the error that says why there is none; anything else is raised."""
    try:
        return config_from_hf(config, generation)
    except TpiliteError as error:
        return error


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_OF_FAMILIES = "sliding_window use_sliding_window max_window_layers layer_types no_rope_layers"
_KEYS = sorted({*_LLAMA_3_2_1B, "rope_parameters", "num_local_experts", *_OF_FAMILIES.split()})
_ROPE_KEYS = sorted(
    {*_ROPE_3_1, "type", "rope_theta", "partial_rotary_factor", "beta_fast", "mscale", "mscale_all_dim"}
)
_LIKELY = st.sampled_from(
    ["llama", "linear", "llama3", "yarn", "default", 1, 2, 64, 1e-5, 8.0, 10**400, -1, 2**31, [0, 1] * 8]
)
_FAMILIES = st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"])
_ROPE = st.dictionaries(st.sampled_from(_ROPE_KEYS), _JSON | _LIKELY, max_size=6)


@given(
    changes=st.dictionaries(st.sampled_from(_KEYS), _JSON | _LIKELY | _ROPE, max_size=5),
    removed=st.sets(st.sampled_from(_KEYS), max_size=2),
    family=_FAMILIES,
    generation=st.none() | st.dictionaries(st.sampled_from(["eos_token_id", "bos_token_id"]), _JSON),
)
@settings(max_examples=600, deadline=None, derandomize=True)
def test_any_object_is_a_configuration_or_an_error_of_ours(changes, removed, family, generation):
    """Any published file with any keys spoilt; what is taken for good has the types that it promises."""
    published = _LLAMA_3_2_1B | {"model_type": family} | changes
    spoilt = {key: value for key, value in published.items() if key not in removed}
    config = _read(spoilt, generation)
    if isinstance(config, TpiliteError):
        assert "\n" not in str(config)
        return
    assert type(config.bos_token_id) in (int, type(None))
    assert all(type(token_id) is int for token_id in config.eos_token_ids)
    assert type(config.tie_word_embeddings) is type(config.attention_bias) is bool
    assert 0 < config.rms_norm_eps < float("inf")
    assert 0 < config.rope_theta < float("inf")
    hash(config)


@given(_JSON)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_rotary_value_is_a_configuration_or_an_error_of_ours(value):
    for key in ("rope_scaling", "rope_parameters"):
        config = _read(_LLAMA_2 | {key: value})
        assert isinstance(config, LlamaConfig) or "rope" in str(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; a model folder has config.json"),
        (b"", "is not valid JSON"),
        (b'{"hidden_size": 1', "is not valid JSON"),
        (b"\xff\xfe{", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"hidden_size": 1' + b"0" * 5000 + b"}", "JSON|whole number"),
        (b"[1]", "must hold a JSON object, found a list"),
        (b"{}", "model_type"),
    ],
)
def test_a_damaged_config_json_is_an_error_of_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(TpiliteError, match=message) as raised:
        config_of_folder(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_folder_in_the_place_of_a_file_is_an_error_of_ours(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("changes", [{"threads": 0}, {"threads": 1.5}, {"threads": True}])
def test_an_engine_needs_whole_numbers(changes):
    (name,) = changes
    with pytest.raises(ConfigError, match=f"{name} must be a whole number"):
        EngineConfig(**changes)


@pytest.mark.parametrize(
    "name", ["LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaForQuestionAnswering", 7]
)
def test_a_model_with_another_head_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"architectures = .*{name}.* expected LlamaForCausalLM"):
        config_from_hf(_LLAMA_2 | {"architectures": [name]})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, {}),
        ({}, {}),
        ({"temperature": None, "eos_token_id": 2, "max_length": 4096}, {}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "p": 0.9}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0, "p": 0.9}),
        ({"temperature": 1, "top_k": 20, "min_p": 0.05}, {"temperature": 1, "k": 20, "min_p": 0.05}),
        ({"repetition_penalty": 1.05, "top_k": -1}, {"repetition_penalty": 1.05, "k": 0}),
    ],
)
def test_what_the_publisher_means_is_read(content, expected, tmp_path):
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert GenerationDefaults.from_folder(tmp_path).given() == expected


@pytest.mark.parametrize(
    "content",
    [
        {"temperature": "hot"},
        {"top_p": 1.5},
        {"top_p": 0},
        {"top_p": float("nan")},
        {"top_k": 2.5},
        {"top_k": True},
        {"repetition_penalty": -1},
    ],
)
def test_defaults_that_make_no_sense_are_refused_by_name(content, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"generation_config.json has {next(iter(content))} = "):
        GenerationDefaults.from_folder(tmp_path)


def test_what_a_llama_does_not_need_is_not_written_so_that_older_slices_keep_their_fingerprints():
    plain = config_from_hf(_LLAMA_3_2_1B)
    assert list(plain.to_dict()) == [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "bos_token_id",
        "eos_token_ids",
    ]
    assert list(plain.to_dict()["rope_scaling"]) == [
        "rope_type",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": YarnScaling(4.0, 4096, 1.2, truncate=False)},
        {"rope_interleaved": True},
        {"qkv_bias": True, "qk_norm": True, "layers_without_rope": (1, 3), "sliding_window": 7},
        {"attention_multiplier": 0.5, "residual_multiplier": 0.2, "rope_divisors": (1.5,) * 32},
    ],
)
def test_a_configuration_comes_back_from_json(changes):
    config = replace(config_from_hf(_LLAMA_3_2_1B), **changes)
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
