"""What a model is, as the metadata of a GGUF file says it: what `config.gguf` reads, written."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tpilite.arrays import Array
from tpilite.checks import short
from tpilite.config.gguf import EOS_KEYS, GRANITE, INTERLEAVED, config_from_gguf
from tpilite.config.llama import MULTIPLIERS, LlamaConfig, RopeScaling, YarnScaling, yarn_attention_factor
from tpilite.errors import ConfigError
from tpilite.model.ops import rope_frequencies


def architecture_of(config: LlamaConfig) -> str:
    """llama.cpp's name for what the model is."""
    plain = {field.name: field.default for field in fields(config)}
    differs = {
        "granite": any(getattr(config, name) != plain[name] for name in MULTIPLIERS),
        "qwen3": config.qk_norm,
        "qwen2": config.qkv_bias,
        "smollm3": bool(config.layers_without_rope),
    }
    return next((name for name, does in differs.items() if does), "llama")


def metadata_of(path: Path, config: LlamaConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The metadata of the model whose tensors have these `shapes`, by GGUF's names, for the file `path`.

    Raises `ConfigError` where no key can say what the model is.
    """
    architecture = architecture_of(config)
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.sliding_window": config.sliding_window,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
        **_scaling(config),
    }
    if architecture == "granite":
        values |= {GRANITE[name]: getattr(config, name) for name in MULTIPLIERS}
    tokens = {"bos_token_id": config.bos_token_id, **dict(zip(EOS_KEYS, config.eos_token_ids, strict=False))}
    metadata: dict[str, Any] = {"general.architecture": architecture}
    metadata |= {f"{architecture}.{key}": value for key, value in values.items() if value is not None}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in tokens.items() if value is not None}
    _check(path, config, metadata, shapes)
    return metadata


def rope_divisors(config: LlamaConfig) -> tuple[float, ...]:
    """What each rotary frequency is divided by, where a tensor has to say it; else nothing."""
    if config.rope_divisors or not _is_llama3(config):
        return config.rope_divisors
    plain: Array = rope_frequencies(replace(config, rope_scaling=None))
    return tuple((plain / rope_frequencies(config)).tolist())


def _is_llama3(config: LlamaConfig) -> bool:
    return isinstance(config.rope_scaling, RopeScaling) and config.rope_scaling.rope_type == "llama3"


def _scaling(config: LlamaConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None or _is_llama3(config):
        return {}
    if not isinstance(scaling, YarnScaling):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(scaling.factor),
        "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
        "rope.scaling.attn_factor": scaling.attention_factor / yarn_attention_factor(scaling.factor),
        "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
        "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
    }


def _check(
    path: Path, config: LlamaConfig, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises `ConfigError` where who reads the metadata would take the model for another one."""
    expected = replace(
        config,
        rope_scaling=None if _is_llama3(config) else config.rope_scaling,
        rope_divisors=(),
        rope_interleaved=INTERLEAVED[metadata["general.architecture"]],
    )
    found = config_from_gguf(path, metadata, shapes)
    ours, theirs = _flat(expected), _flat(found)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"{path}: a GGUF file cannot say that it has {name} = {short(ours.get(name))} (it would be "
                f"read as {short(theirs.get(name))}); leave out --export"
            )


def _flat(value: Any) -> dict[str, Any]:
    """A configuration's fields and those of its parts, numbers as a file's 32 bits have them."""
    flat: dict[str, Any] = {}
    for field in fields(value):
        found = getattr(value, field.name)
        if isinstance(found, RopeScaling | YarnScaling):
            flat |= {f"{field.name}.{name}": number for name, number in _flat(found).items()}
        elif found is not None:
            flat[field.name] = float(f"{found:.6g}") if isinstance(found, float) else found
    return flat
