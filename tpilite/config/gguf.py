"""What a model is by the metadata of its GGUF file, and by which tensors it has.

Keys that would change the maths and are not supported are errors; keys that do not touch the maths are
ignored.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tpilite.checks import check_number, check_whole, short
from tpilite.config.llama import (
    MAX_LAYERS,
    LlamaConfig,
    RopeScaling,
    YarnScaling,
    yarn_attention_factor,
)
from tpilite.errors import ConfigError

# How the rows of q and k lie is what llama.cpp's `llama_model_rope_type` says: of "norm" the pairs of rotary
# embedding are neighbours, of "neox" half a head apart, as Hugging Face has them. Mistral and Yi are a llama.
_INTERLEAVED = {"llama": True, "qwen2": False, "qwen3": False, "smollm3": True, "granite": True}

_SMOLLM3_ROPE_INTERVAL = 4  # no key says so: llama.cpp leaves out rotary embedding in every fourth layer
_GRANITE = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
# The values that leave the forward pass as `model` computes it; a key that is not there does, too.
_ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "rope.scaling.type": ("none", "linear", "yarn"),
    "rope.scaling.yarn_ext_factor": (1, -1),
}
_EOS = ("eos_token_id", "eot_token_id", "eom_token_id")

_Value = Callable[..., Any]


def config_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> LlamaConfig:
    """The configuration that a GGUF's metadata describes; `shapes` are those of its tensors, by its names.

    Raises `ConfigError` for an architecture that is not supported, and for what is missing or changes the
    maths. The factors of the rotary frequencies are a tensor, and not looked at here.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _INTERLEAVED:
        raise ConfigError(
            f"the GGUF file is of architecture {short(architecture)}, which is not supported; "
            f"expected {', '.join(_INTERLEAVED)}"
        )

    def value(key: str, default: Any = None) -> Any:
        found = _plain(metadata, f"{architecture}.{key}")
        if found is None and default is None:
            raise ConfigError(f"the GGUF file has no {architecture}.{key}, which a Llama model needs")
        return default if found is None else found

    _check_supported(architecture, value, shapes)
    n_layers, num_heads = value("block_count"), value("attention.head_count")
    check_whole(f"{architecture}.block_count", n_layers, least=1)
    context = value("context_length")
    check_whole(f"{architecture}.context_length", context, least=1)
    scaling = _rope_scaling(architecture, value)
    if isinstance(scaling, YarnScaling):
        context = max(context, scaling.context)
    found = [_plain(metadata, f"tokenizer.ggml.{name}") for name in _EOS]
    return LlamaConfig(
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=n_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=value("attention.head_count_kv", num_heads),
        head_dim=_head_dim(architecture, value),
        vocab_size=shapes["token_embd.weight"][0] if "token_embd.weight" in shapes else value("vocab_size"),
        max_position_embeddings=context,
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_theta=value("rope.freq_base", 10000.0),
        rope_scaling=scaling,
        rope_interleaved=_INTERLEAVED[architecture],
        layers_without_rope=_layers_without_rope(architecture, n_layers),
        sliding_window=value("attention.sliding_window", 0) or None,
        tie_word_embeddings="output.weight" not in shapes,
        attention_bias="blk.0.attn_output.bias" in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes and "blk.0.attn_output.bias" not in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
        mlp_bias="blk.0.ffn_down.bias" in shapes,
        bos_token_id=_plain(metadata, "tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(token for token in found if token is not None)),
        **_multipliers(architecture, value),
    )


def _plain(metadata: Mapping[str, Any], key: str) -> Any:
    """A number, a text or None. Raises `ConfigError` for an array, as for sizes that differ by layer."""
    found = metadata.get(key)
    if not isinstance(found, str | bool | int | float | None):
        raise ConfigError(f"the GGUF file has an array as {key}, which is not supported; expected one value")
    return found


def _check_supported(architecture: str, value: _Value, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `ConfigError` for the first key or tensor that changes the maths and is not supported."""
    for key, supported in _ONLY_SUPPORTED.items():
        found = value(key, supported[0])
        if found not in supported:
            raise ConfigError(
                f"the GGUF file has {architecture}.{key} = {short(found)}, which is not supported; "
                f"expected {' or '.join(map(repr, supported))}"
            )
    # By this key llama.cpp leaves Granite's rotary embedding out of all layers.
    if architecture == "granite" and value("rope.scaling.finetuned", True) is not True:
        raise ConfigError(
            "the GGUF file has granite.rope.scaling.finetuned = false, a model without rotary embedding, "
            "which is not supported"
        )
    for name in ("output.bias", "rope_factors_long.weight", "blk.0.ffn_gate_exps.weight"):
        if name in shapes:
            raise ConfigError(f"the GGUF file has a tensor {name}, which is not supported")


def _head_dim(architecture: str, value: _Value) -> int:
    """The size of a head, the same of all three kinds and rotated as a whole."""
    hidden_size, num_heads = value("embedding_length"), value("attention.head_count")
    check_whole(f"{architecture}.embedding_length", hidden_size, least=1)
    check_whole(f"{architecture}.attention.head_count", num_heads, least=1)
    head_dim = value("attention.key_length", hidden_size // num_heads)
    check_whole(f"{architecture}.attention.key_length", head_dim, least=1)
    for key in ("attention.value_length", "rope.dimension_count"):
        check_whole(f"{architecture}.{key}", value(key, head_dim), least=1)
        if value(key, head_dim) != head_dim:
            raise ConfigError(
                f"the GGUF file has {architecture}.{key} = {short(value(key))}, which is not supported; "
                f"expected the size of a head, {head_dim}"
            )
    return int(head_dim)


def _rope_scaling(architecture: str, value: _Value) -> RopeScaling | YarnScaling | None:
    """How the rotary frequencies are stretched. What has a factor and no type is linear, as in llama.cpp."""
    key = "rope.scaling"
    kind = value(f"{key}.type", "linear")
    factor = value(f"{key}.factor", value("rope.scale_linear", 1.0)) or 1.0
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    check_number(f"{architecture}.{key}.factor", factor)
    if kind == "linear":
        return RopeScaling("linear", factor)
    log_multiplier = value(f"{key}.yarn_log_multiplier", 0.0)
    if log_multiplier:
        check_number(f"{architecture}.{key}.yarn_log_multiplier", log_multiplier)
    attention_factor = value(f"{key}.yarn_attn_factor", yarn_attention_factor(factor, 1.0, log_multiplier))
    for name in ("yarn_attn_factor", "attn_factor"):
        check_number(f"{architecture}.{key}.{name}", value(f"{key}.{name}", 1.0))
    return YarnScaling(
        factor,
        value(f"{key}.original_context_length", value("context_length")),
        attention_factor * value(f"{key}.attn_factor", 1.0),
        beta_fast=value(f"{key}.yarn_beta_fast", 32.0),
        beta_slow=value(f"{key}.yarn_beta_slow", 1.0),
    )


def _layers_without_rope(architecture: str, n_layers: int) -> tuple[int, ...]:
    if architecture != "smollm3":
        return ()
    return tuple(range(_SMOLLM3_ROPE_INTERVAL - 1, min(n_layers, MAX_LAYERS), _SMOLLM3_ROPE_INTERVAL))


def _multipliers(architecture: str, value: _Value) -> dict[str, Any]:
    """Granite's multipliers; 0 is as if there were none, as in llama.cpp."""
    if architecture != "granite":
        return {}
    found = {name: value(key, 0.0) for name, key in _GRANITE.items()}
    return {name: number for name, number in found.items() if number != 0}
