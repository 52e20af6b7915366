"""What a model is by Hugging Face's config.json and generation_config.json.

`_FAMILIES` says how the sister families differ from Llama. Keys that would change the maths and are not
supported are errors; keys that do not touch the maths are ignored.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpilite.checks import check_number, check_whole, short
from tpilite.config.llama import (
    MAX_LAYERS,
    MULTIPLIERS,
    LlamaConfig,
    RopeScaling,
    YarnScaling,
    yarn_attention_factor,
)
from tpilite.errors import ConfigError
from tpilite.formats.json_file import read_json


@dataclass(frozen=True)
class _Family:
    """How the models of one `model_type` differ from Llama.

    `always` is so whatever config.json says; `reads` are the keys that it may change; `left_out` is what
    transformers takes for keys that it does not have.
    """

    always: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    left_out: Mapping[str, Any] = field(default_factory=dict)


_FAMILIES = {
    # arXiv 2302.13971, 2307.09288, 2407.21783; Yi, SmolLM 2 and some of DeepSeek-R1-Distill are Llamas too.
    "llama": _Family(reads=("attention_bias", "mlp_bias")),
    # Attention within a window: arXiv 2310.06825
    "mistral": _Family(
        left_out={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
    ),
    # Biases on queries, keys and values: arXiv 2407.10671, 2412.15115
    "qwen2": _Family(
        always={"qkv_bias": True},
        left_out={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "use_sliding_window": False,
            "max_window_layers": 28,
        },
    ),
    # A norm over each head of queries and keys: arXiv 2505.09388
    "qwen3": _Family(
        always={"qk_norm": True},
        reads=("attention_bias",),
        left_out={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "use_sliding_window": False,
            "max_window_layers": 28,
        },
    ),
    # No rotary embedding in every fourth layer: arXiv 2501.18795
    "smollm3": _Family(
        reads=("attention_bias", "mlp_bias"),
        left_out={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2000000.0,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
        },
    ),
    # Multipliers, so that one learning rate fits models of all widths: arXiv 2408.13359
    "granite": _Family(
        reads=("attention_bias", "mlp_bias", *MULTIPLIERS), left_out={"attention_multiplier": 1.0}
    ),
}
MODEL_TYPES = tuple(_FAMILIES)
_ALL_READ = ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")

# Keys of config.json that change the forward pass in ways that `model` does not compute, with the
# values that leave it as it is. Everything else unknown is about training, caching or other software.
_ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": MODEL_TYPES,
    "hidden_act": ("silu", "swish", None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_chunk_size": (None,),
    "use_mrope": (False, None),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0, 1),
}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_LANGUAGE_MODELS = re.compile(r"ForCausalLM|ForConditionalGeneration|^LlamaModel$")


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def config_from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> LlamaConfig:
    """The configuration that Hugging Face's config.json (and generation_config.json) describe.

    Raises `ConfigError` for keys that change the maths and are not supported, each by name and value.
    """
    if config.get("model_type") is None and config.get("architectures") == ["LlamaForCausalLM"]:
        config = {**config, "model_type": "llama"}
    _check_supported(config)
    family = _FAMILIES[config["model_type"]]
    config = {**family.left_out, **config}
    try:
        sizes = {name: config[name] for name in _SIZES}
    except KeyError as missing:
        raise ConfigError(f"config.json has no {missing.args[0]}, which a Llama model needs") from None
    generation = generation or {}
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    num_heads, num_kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    given = {name: config[name] for name in (*_ALL_READ, *family.reads) if config.get(name) is not None}
    theta, scaling = _rope(config)
    if isinstance(scaling, YarnScaling):
        given["max_position_embeddings"] = _yarn_context(config, scaling)
    return LlamaConfig(
        **sizes,
        **given,
        **family.always,
        num_key_value_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=_head_dim(config),
        rope_theta=theta,
        rope_scaling=scaling,
        layers_without_rope=_layers_without_rope(config),
        sliding_window=_window(config),
        bos_token_id=generation.get("bos_token_id", config.get("bos_token_id")),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def config_of_folder(folder: Path) -> LlamaConfig:
    """The configuration of a model folder. Raises `CheckpointError` or `ConfigError`."""
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else None
    return config_from_hf(read_json(folder / "config.json"), generation)


def _check_supported(config: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for the first key whose value changes the maths in a way that is not supported."""
    for key, supported in _ONLY_SUPPORTED.items():
        value = config.get(key)
        if value not in supported:
            raise ConfigError(
                f"config.json has {key} = {short(value)}, which is not supported; "
                f"expected {' or '.join(repr(v) for v in supported if v is not None) or 'none'}"
            )
    _check_architectures(config.get("architectures"))


def _check_architectures(names: Any) -> None:
    """Raises `ConfigError` for a model whose head does not score tokens: a classifier's, a reward model's."""
    for name in names if isinstance(names, list) else []:
        if not isinstance(name, str) or not _LANGUAGE_MODELS.search(name):
            raise ConfigError(
                f"config.json has architectures = {short(names)}, which is not supported; "
                "expected LlamaForCausalLM: a model whose head scores tokens"
            )


def _head_dim(config: Mapping[str, Any]) -> Any:
    """The size of a head, given or by division; not checked where it is given."""
    if config.get("head_dim") is not None:
        return config["head_dim"]
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    check_whole("hidden_size", hidden_size, least=1)
    check_whole("num_attention_heads", num_heads, least=1)
    if hidden_size % num_heads:
        raise ConfigError(
            f"hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({num_heads}) "
            "and config.json gives no head_dim"
        )
    return hidden_size // num_heads


def _layers_without_rope(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers that SmolLM 3 leaves without rotary embedding: those that `no_rope_layers` gives a 0."""
    if config["model_type"] != "smollm3":
        return ()
    n_layers, rotates = config["num_hidden_layers"], config.get("no_rope_layers")
    check_whole("num_hidden_layers", n_layers, least=1)
    if rotates is None:
        interval = config["no_rope_layer_interval"]
        check_whole("no_rope_layer_interval", interval, least=1)
        return tuple(range(interval - 1, min(n_layers, MAX_LAYERS), interval))
    if not isinstance(rotates, list) or len(rotates) < n_layers or any(r not in (0, 1) for r in rotates):
        raise ConfigError(
            f"config.json has no_rope_layers = {short(rotates)}; "
            f"expected 0 or 1 for each of {n_layers} layers"
        )
    return tuple(layer for layer in range(n_layers) if not rotates[layer])


def _window(config: Mapping[str, Any]) -> int | None:
    """How many positions the narrowest layer sees; None where every layer sees all."""
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise ConfigError(f"config.json has layer_types = {short(kinds)}; expected a list")
    for kind in kinds or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(
                f"config.json has layer_types with {short(kind)}, which is not supported; "
                "expected 'full_attention' or 'sliding_attention'"
            )
    if kinds and config["model_type"] != "mistral":  # whose layers are alike, and do not read it
        applies = "sliding_attention" in kinds
        if applies and window is None:
            raise ConfigError("config.json has layer_types with 'sliding_attention' and no sliding_window")
    else:
        applies = config.get("use_sliding_window", True) is True
        if config["model_type"] in ("qwen2", "qwen3"):  # the windowed layers come last
            for name in ("max_window_layers", "num_hidden_layers"):
                check_whole(name, config[name], least=0)
            applies = applies and config["max_window_layers"] < config["num_hidden_layers"]
    return window if applies else None


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | YarnScaling | None]:
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
    for name, value in rope.items():
        if isinstance(value, Mapping) or (name == "partial_rotary_factor" and value not in (1, None)):
            raise ConfigError(
                f"config.json has {key}.{name} = {short(value)}, which is not supported; "
                "expected one rotary embedding for all layers and the whole of a head"
            )
    theta = rope.get("rope_theta", theta)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in _ROPE_TYPES:
        raise ConfigError(
            f"config.json has {key}.rope_type = {short(rope_type)}, which is not supported; "
            f"expected {', '.join(map(repr, _ROPE_TYPES[:-1]))} or {_ROPE_TYPES[-1]!r}"
        )
    if rope_type == "default":
        return theta, None
    fields = ["factor"]
    if rope_type == "llama3":
        fields += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for name in fields:
        if name not in rope:
            raise ConfigError(f"config.json has no {key}.{name}, which rope type {rope_type!r} needs")
    if rope_type == "yarn":
        return theta, _yarn(config, rope)
    return theta, RopeScaling(rope_type, **{name: rope[name] for name in fields})


def _yarn(config: Mapping[str, Any], rope: Mapping[str, Any]) -> YarnScaling:
    """YaRN's numbers; what is left out is as transformers has it, and 0 is left out for the betas too."""
    trained = rope.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        scales = [rope.get("mscale"), rope.get("mscale_all_dim")]
        for number in (rope["factor"], *filter(None, scales)):
            check_number("rope scaling factor, mscale and mscale_all_dim", number)
        attention_factor = yarn_attention_factor(rope["factor"], *(scales if all(scales) else ()))
    return YarnScaling(
        rope["factor"],
        config.get("original_max_position_embeddings", trained),
        attention_factor,
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        truncate=rope.get("truncate", True),
    )


def _yarn_context(config: Mapping[str, Any], scaling: YarnScaling) -> int:
    """The longest text: who turns YaRN on often leaves `max_position_embeddings` as it was without."""
    published = config.get("max_position_embeddings")
    if published is None:
        published = 1
    check_whole("max_position_embeddings", published, least=1)
    return max(published, scaling.context)
