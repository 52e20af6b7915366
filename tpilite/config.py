"""What a model is: a frozen dataclass, checked when it is made.

`LlamaConfig` keeps the names of Hugging Face's config.json. Keys there that would change the maths and
are not supported are errors; keys that do not touch the maths are ignored.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpilite.checks import check_number, check_whole, short
from tpilite.errors import CheckpointError, ConfigError

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
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")
_WITH_DEFAULT = ("max_position_embeddings", "rms_norm_eps", *_FLAGS)

_LANGUAGE_MODELS = re.compile(r"ForCausalLM|ForConditionalGeneration|^LlamaModel$")

# The publisher's defaults: our name, that of generation_config.json, and the most that makes sense.
_GENERATION: dict[str, tuple[str, float]] = {
    "temperature": ("temperature", 100),
    "k": ("top_k", 1e9),
    "p": ("top_p", 1),
    "min_p": ("min_p", 1),
    "repetition_penalty": ("repetition_penalty", 100),
}

_MAX_LAYERS = 10_000  # Llama 3.1 405B has 126; every layer named costs memory before a file is looked at


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched for contexts longer than those of the training.

    `linear` divides every frequency by `factor`; `llama3` (Llama 3.1) divides only the low ones and blends
    those in between, by wavelength against `original_max_position_embeddings`.
    """

    rope_type: str  # "linear" or "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3"):
            raise ConfigError(
                f"rope type {self.rope_type!r} is not supported; expected 'default', 'linear' or 'llama3'"
            )
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            check_number(f"rope scaling {name}", getattr(self, name))
        check_whole("original_max_position_embeddings", self.original_max_position_embeddings, least=1)
        if self.factor < 1:
            raise ConfigError(f"rope scaling factor must be a number >= 1, found {self.factor!r}")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                "rope scaling needs 0 < low_freq_factor < high_freq_factor, found "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama model, by the names of config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
            "max_position_embeddings",
        ):
            check_whole(name, getattr(self, name), least=1)
        if self.num_hidden_layers > _MAX_LAYERS:
            raise ConfigError(
                f"num_hidden_layers must be at most {_MAX_LAYERS}, found {self.num_hidden_layers}; "
                "config.json seems damaged"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embedding, found {self.head_dim}")
        for name in ("rms_norm_eps", "rope_theta"):
            check_number(name, getattr(self, name))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, found {short(getattr(self, name))}")
        if self.bos_token_id is not None:
            check_whole("bos_token_id", self.bos_token_id, least=0)
        for token_id in self.eos_token_ids:
            check_whole("eos_token_id", token_id, least=0)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> "LlamaConfig":
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
        return cls(
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

    @classmethod
    def from_folder(cls, folder: Path) -> "LlamaConfig":
        """The configuration of a model folder. Raises `CheckpointError` or `ConfigError`."""
        generation_path = folder / "generation_config.json"
        generation = read_json(generation_path) if generation_path.exists() else None
        return cls.from_hf(read_json(folder / "config.json"), generation)


@dataclass(frozen=True)
class GenerationDefaults:
    """How the model's publisher wants tokens to be chosen; None where generation_config.json says nothing.

    The names are those of `SamplingParams`.
    """

    temperature: float | None = None
    k: int | None = None
    p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> "GenerationDefaults":
        """The defaults of a model folder. Raises `CheckpointError` for values that make no sense."""
        path = folder / "generation_config.json"
        config = read_json(path) if path.exists() else {}
        found = {name: config.get(key) for name, (key, _) in _GENERATION.items()}
        if found["k"] == -1:  # as other programs say that all count
            found["k"] = 0
        for name, (key, most) in _GENERATION.items():
            value = found[name]
            kinds = (int,) if name == "k" else (int, float)
            least = 0 if name in ("temperature", "k", "min_p") else 1e-6
            if value is not None and not (type(value) in kinds and least <= value <= most):
                raise CheckpointError(
                    f"{path} has {key} = {short(value)}; expected a number from {least:g} to {most:g}"
                )
        if config.get("do_sample") is False:
            found["temperature"] = 0.0
        return cls(**found)

    def given(self) -> dict[str, float]:
        """What the file says, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the model's folder. Raises `CheckpointError`."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; a model folder has config.json, *.safetensors and a tokenizer"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found a {type(value).__name__}")
    return value


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
