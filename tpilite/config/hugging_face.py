"""What a model is by Hugging Face's config.json and generation_config.json.

Keys that would change the maths and are not supported are errors; keys that do not touch the maths are
ignored.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpilite.checks import check_whole, short
from tpilite.config.llama import FLAGS, LlamaConfig, RopeScaling
from tpilite.errors import ConfigError
from tpilite.formats.json_file import read_json

# Keys of config.json that change the forward pass in ways that `model` does not compute, with the
# values that leave it as it is. Everything else unknown is about training, caching or other software.
_ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish", None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "num_local_experts": (None, 0, 1),
}
_WITH_DEFAULT = ("max_position_embeddings", "rms_norm_eps", *FLAGS)

_LANGUAGE_MODELS = re.compile(r"ForCausalLM|ForConditionalGeneration|^LlamaModel$")


def config_from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> LlamaConfig:
    """The configuration that Hugging Face's config.json (and generation_config.json) describe.

    Raises `ConfigError` for keys that change the maths and are not supported, each by name and value.
    """
    for key, supported in _ONLY_SUPPORTED.items():
        value = config.get(key)
        if key == "model_type" and value is None and config.get("architectures") == ["LlamaForCausalLM"]:
            value = "llama"
        if value not in supported:
            raise ConfigError(
                f"config.json has {key} = {short(value)}, which is not supported; "
                f"expected {' or '.join(repr(v) for v in supported if v is not None) or 'none'}"
            )
    _check_architectures(config.get("architectures"))
    try:
        hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
        intermediate_size, vocab_size = config["intermediate_size"], config["vocab_size"]
        num_hidden_layers = config["num_hidden_layers"]
    except KeyError as missing:
        raise ConfigError(f"config.json has no {missing.args[0]}, which a Llama model needs") from None
    head_dim = config.get("head_dim")
    if head_dim is None:
        check_whole("hidden_size", hidden_size, least=1)
        check_whole("num_attention_heads", num_heads, least=1)
        if hidden_size % num_heads:
            raise ConfigError(
                f"hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({num_heads}) "
                "and config.json gives no head_dim"
            )
        head_dim = hidden_size // num_heads
    generation = generation or {}
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    num_kv_heads = config.get("num_key_value_heads")
    theta, scaling = _rope(config)
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        rope_theta=theta,
        rope_scaling=scaling,
        bos_token_id=generation.get("bos_token_id", config.get("bos_token_id")),
        eos_token_ids=eos_ids,
        **{name: config[name] for name in _WITH_DEFAULT if config.get(name) is not None},
    )


def config_of_folder(folder: Path) -> LlamaConfig:
    """The configuration of a model folder. Raises `CheckpointError` or `ConfigError`."""
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else None
    return config_from_hf(read_json(folder / "config.json"), generation)


def _check_architectures(names: Any) -> None:
    """Raises `ConfigError` for a model whose head does not score tokens: a classifier's, a reward model's."""
    for name in names if isinstance(names, list) else []:
        if not isinstance(name, str) or not _LANGUAGE_MODELS.search(name):
            raise ConfigError(
                f"config.json has architectures = {short(names)}, which is not supported; "
                "expected LlamaForCausalLM: a model whose head scores tokens"
            )


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from either spelling: `rope_theta` + `rope_scaling`, or `rope_parameters`.

    Where a file has both, transformers reads the older one.
    """
    theta = config.get("rope_theta", 10000.0)
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key)
    if rope is None:
        return theta, None
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config.json has {key} = {short(rope)}; expected an object")
    if rope.get("partial_rotary_factor") not in (1, None):
        raise ConfigError(
            f"config.json has {key}.partial_rotary_factor = {short(rope['partial_rotary_factor'])}, "
            "which is not supported; expected 1"
        )
    theta = rope.get("rope_theta", theta)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type not in ("linear", "llama3"):
        raise ConfigError(
            f"config.json has {key}.rope_type = {short(rope_type)}, which is not supported; "
            "expected 'default', 'linear' or 'llama3'"
        )
    fields = ["factor"]
    if rope_type == "llama3":
        fields += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for field in fields:
        if field not in rope:
            raise ConfigError(f"config.json has no {key}.{field}, which rope type {rope_type!r} needs")
    return theta, RopeScaling(rope_type, **{field: rope[field] for field in fields})
