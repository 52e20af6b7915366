"""What a model is by the metadata of its GGUF file, and by which tensors it has.

Keys that would change the maths and are not supported are errors; keys that do not touch the maths are
ignored.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

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
INTERLEAVED = {"llama": True, "qwen2": False, "qwen3": False, "smollm3": True, "granite": True}

_SMOLLM3_ROPE_INTERVAL = 4  # no key says so: llama.cpp leaves out rotary embedding in every fourth layer
GRANITE = {
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
EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class _Values:
    """What a file says under its architecture's name, checked. `path` is for messages."""

    path: Path
    architecture: str
    metadata: Mapping[str, Any]

    def name(self, key: str) -> str:
        """How messages call a value."""
        return f"{self.path}: {self.architecture}.{key}"

    def get(self, key: str, default: Any = None) -> Any:
        """A number or a text. Raises `ConfigError` where there is none, and no default."""
        found = _plain(self.path, self.metadata, f"{self.architecture}.{key}")
        if found is None and default is None:
            raise ConfigError(f"{self.path} has no {self.architecture}.{key}, which a Llama model needs")
        return default if found is None else found

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        found = self.get(key, default)
        check_whole(self.name(key), found, least)
        return int(found)

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        found = self.get(key, default)
        check_number(self.name(key), found)
        return float(found)

    def number_or_0(self, key: str) -> float:
        """A number above 0, or the 0 that stands for none, as llama.cpp has it."""
        return self.number(key) if self.get(key, 0.0) != 0 else 0.0

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Raises `ConfigError` for a value that is not supported."""
        found = short(self.get(key))
        raise ConfigError(f"{self.name(key)} is {found}, which is not supported; expected {expected}")


def config_from_gguf(
    path: Path, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> LlamaConfig:
    """The configuration that a GGUF's metadata describes; `shapes` are those of its tensors, by its names.

    `path` is for messages. Raises `ConfigError` for an architecture that is not supported, and for what is
    missing or changes the maths. The factors of the rotary frequencies are a tensor, and not looked at here.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in INTERLEAVED:
        raise ConfigError(
            f"{path}: general.architecture is {short(architecture)}, which is not supported; "
            f"expected {', '.join(INTERLEAVED)}"
        )
    values = _Values(path, architecture, metadata)
    _check_supported(values, shapes)
    n_layers = values.whole("block_count")
    if n_layers > MAX_LAYERS:
        values.refuse("block_count", f"at most {MAX_LAYERS}")
    context, theta = values.whole("context_length"), values.number("rope.freq_base", 10000.0)
    scaling = _rope_scaling(values)
    if isinstance(scaling, YarnScaling):
        context = max(context, scaling.context)
        if theta <= 1:
            values.refuse("rope.freq_base", "a number above 1 for yarn")
    vocab_size = shapes[_EMBEDDING][0] if _EMBEDDING in shapes else values.whole("vocab_size")
    return LlamaConfig(
        hidden_size=values.whole("embedding_length"),
        intermediate_size=values.whole("feed_forward_length"),
        num_hidden_layers=n_layers,
        **_heads(values),
        vocab_size=vocab_size,
        max_position_embeddings=context,
        rms_norm_eps=values.number("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_interleaved=INTERLEAVED[architecture],
        layers_without_rope=_layers_without_rope(architecture, n_layers),
        sliding_window=values.whole("attention.sliding_window", 0, least=0) or None,
        tie_word_embeddings="output.weight" not in shapes,
        attention_bias="blk.0.attn_output.bias" in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes and "blk.0.attn_output.bias" not in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
        mlp_bias="blk.0.ffn_down.bias" in shapes,
        bos_token_id=next(_tokens(path, metadata, vocab_size, "bos_token_id"), None),
        eos_token_ids=tuple(dict.fromkeys(_tokens(path, metadata, vocab_size, *EOS_KEYS))),
        **_multipliers(values),
    )


def _plain(path: Path, metadata: Mapping[str, Any], key: str) -> Any:
    """A number, a text or None. Raises `ConfigError` for an array, as for sizes that differ by layer."""
    found = metadata.get(key)
    if not isinstance(found, str | bool | int | float | None):
        raise ConfigError(f"{path}: {key} is an array, which is not supported; expected one value")
    return found


def _tokens(path: Path, metadata: Mapping[str, Any], vocab_size: int, *names: str) -> Iterator[int]:
    """The ids that stand under some names. Those beyond the vocabulary are none, as in llama.cpp."""
    for key in (f"tokenizer.ggml.{name}" for name in names):
        found = _plain(path, metadata, key)
        if found is not None and (type(found) is not int or found < 0):
            raise ConfigError(f"{path}: {key} is {short(found)}; expected the id of a token")
        if found is not None and found < vocab_size:
            yield found


def _check_supported(values: _Values, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `ConfigError` for the first key or tensor that changes the maths and is not supported."""
    for key, supported in _ONLY_SUPPORTED.items():
        if values.get(key, supported[0]) not in supported:
            values.refuse(key, " or ".join(map(short, supported)))
    # By this key llama.cpp leaves Granite's rotary embedding out of all layers.
    if values.architecture == "granite" and values.get("rope.scaling.finetuned", True) is not True:
        values.refuse("rope.scaling.finetuned", "a model with rotary embedding")
    for name in ("output.bias", "rope_factors_long.weight", "blk.0.ffn_gate_exps.weight"):
        if name in shapes:
            raise ConfigError(f"{values.path} has a tensor {name}, which is not supported")


def _heads(values: _Values) -> dict[str, Any]:
    """How many heads there are, and their size: the same of all three kinds and rotated as a whole."""
    num_heads = values.whole("attention.head_count")
    num_kv_heads = values.whole("attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        values.refuse("attention.head_count", f"a multiple of attention.head_count_kv, {num_kv_heads}")
    head_dim = values.whole("attention.key_length", max(values.whole("embedding_length") // num_heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.whole(key, head_dim) != head_dim:
            values.refuse(key, f"the size of a head, {head_dim}")
    if head_dim % 2:
        raise ConfigError(
            f"{values.path} has heads of {head_dim} (by {values.architecture}.embedding_length and "
            "attention.head_count, or attention.key_length); expected an even number, for rotary embedding"
        )
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": head_dim}


def _rope_scaling(values: _Values) -> RopeScaling | YarnScaling | None:
    """How the rotary frequencies are stretched. What has a factor and no type is linear, as in llama.cpp."""
    key = "rope.scaling"
    kind = values.get(f"{key}.type", "linear")
    factor_key = f"{key}.factor" if values.get(f"{key}.factor", 0.0) != 0 else "rope.scale_linear"
    factor = values.number_or_0(factor_key) or 1.0
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if factor < 1:
        values.refuse(factor_key, "a number from 1")
    if kind == "linear":
        return RopeScaling("linear", factor)
    log_multiplier = values.number_or_0(f"{key}.yarn_log_multiplier")
    recommended = yarn_attention_factor(factor, 1.0, log_multiplier)
    fast, slow = values.number(f"{key}.yarn_beta_fast", 32.0), values.number(f"{key}.yarn_beta_slow", 1.0)
    if slow > fast:
        values.refuse(f"{key}.yarn_beta_slow", f"at most yarn_beta_fast, {fast}")
    return YarnScaling(
        factor,
        values.whole(f"{key}.original_context_length", values.whole("context_length")),
        values.number(f"{key}.yarn_attn_factor", recommended) * values.number(f"{key}.attn_factor", 1.0),
        beta_fast=fast,
        beta_slow=slow,
    )


def _layers_without_rope(architecture: str, n_layers: int) -> tuple[int, ...]:
    if architecture != "smollm3":
        return ()
    return tuple(range(_SMOLLM3_ROPE_INTERVAL - 1, min(n_layers, MAX_LAYERS), _SMOLLM3_ROPE_INTERVAL))


def _multipliers(values: _Values) -> dict[str, Any]:
    """Granite's multipliers; 0 is as if there were none, as in llama.cpp."""
    if values.architecture != "granite":
        return {}
    found = {name: values.number_or_0(key) for name, key in GRANITE.items()}
    return {name: number for name, number in found.items() if number != 0}
