"""The shape of a Llama model, checked when it is made, whatever file it was read from.

The fields behind `eos_token_ids` say how its sister families differ; left out, the model is a Llama.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tpilite.checks import check_number, check_whole, short
from tpilite.errors import ConfigError

FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")

MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")

_N_LLAMA_FIELDS = 16  # of `LlamaConfig`; the ones behind are the sister families'
_TUPLES = ("eos_token_ids", "layers_without_rope", "rope_divisors")

MAX_LAYERS = 10_000  # Llama 3.1 405B has 126; every layer named costs memory before a file is looked at


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
class YarnScaling:
    """How YaRN stretches the rotary frequencies (arXiv 2309.00071).

    Those that turn more than `beta_fast` times in the training's context stay, those that turn less than
    `beta_slow` times are divided by `factor`, and between the two they blend by their index, from and to
    whole indices where `truncate` says so. Cosine and sine are multiplied by `attention_factor`.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        for name in ("factor", "attention_factor", "beta_fast", "beta_slow"):
            check_number(f"rope scaling {name}", getattr(self, name))
        check_whole("original_max_position_embeddings", self.original_max_position_embeddings, least=1)
        if self.factor < 1:
            raise ConfigError(f"rope scaling factor must be a number >= 1, found {self.factor!r}")
        if self.beta_slow > self.beta_fast:
            raise ConfigError(
                f"rope scaling needs beta_slow <= beta_fast, found {self.beta_slow} and {self.beta_fast}"
            )
        if not isinstance(self.truncate, bool):
            raise ConfigError(f"rope scaling truncate must be true or false, found {short(self.truncate)}")

    @property
    def context(self) -> int:
        """The longest text that the stretched frequencies are for."""
        return int(self.original_max_position_embeddings * self.factor)


def yarn_attention_factor(factor: float, mscale: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    """The attention factor that YaRN recommends for a stretch by `factor` (arXiv 2309.00071, section 3.4).

    `mscale_all_dim` is DeepSeek's: a part of it that attention's own scale already has.
    """
    stretch = math.log(max(factor, 1.0))
    return (0.1 * mscale * stretch + 1) / (0.1 * mscale_all_dim * stretch + 1)


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama model or of a sister family's, by the names of config.json where there are any."""

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
    rope_scaling: RopeScaling | YarnScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    qkv_bias: bool = False  # on q, k and v alone (Qwen 2)
    qk_norm: bool = False  # RMSNorm over each head of q and k (Qwen 3)
    layers_without_rope: tuple[int, ...] = ()  # (SmolLM 3)
    embedding_multiplier: float = 1.0  # this and the next three: Granite
    attention_multiplier: float | None = None  # of queries times keys; None: 1 / sqrt(head_dim)
    residual_multiplier: float = 1.0  # of what each block adds
    logits_scaling: float = 1.0  # what the scores are divided by
    sliding_window: int | None = None  # positions that the narrowest layer sees, its own among them
    rope_divisors: tuple[float, ...] = ()  # of each rotary frequency, from a GGUF file
    # The rows of q and k that rotary embedding turns together are neighbours, not half a head apart: so it is
    # in GGUF files of some architectures.
    rope_interleaved: bool = False

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
        if self.num_hidden_layers > MAX_LAYERS:
            raise ConfigError(
                f"num_hidden_layers must be at most {MAX_LAYERS}, found {self.num_hidden_layers}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embedding, found {self.head_dim}")
        for name in ("rms_norm_eps", "rope_theta", *MULTIPLIERS):
            if name != "attention_multiplier" or self.attention_multiplier is not None:
                check_number(name, getattr(self, name))
        for name in (*FLAGS, "qkv_bias", "qk_norm", "rope_interleaved"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, found {short(getattr(self, name))}")
        self._check_rope()
        if self.bos_token_id is not None:
            check_whole("bos_token_id", self.bos_token_id, least=0)
        for token_id in self.eos_token_ids:
            check_whole("eos_token_id", token_id, least=0)

    def _check_rope(self) -> None:
        """Raises `ConfigError` for what rotary embedding and attention cannot be computed with."""
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1:
            raise ConfigError(f"rope type 'yarn' needs a rope_theta above 1, found {self.rope_theta}")
        if self.rope_divisors and len(self.rope_divisors) != self.head_dim // 2:
            raise ConfigError(
                f"a head_dim of {self.head_dim} needs {self.head_dim // 2} rope frequency factors, "
                f"found {len(self.rope_divisors)}"
            )
        for divisor in self.rope_divisors:
            check_number("each rope frequency factor", divisor)
        for layer in self.layers_without_rope:
            check_whole("each layer without rope", layer, least=0)
        if self.sliding_window is not None:
            check_whole("sliding_window", self.sliding_window, least=1)

    @property
    def attention_factor(self) -> float:
        """What cosine and sine of the rotary angles are multiplied by."""
        return self.rope_scaling.attention_factor if isinstance(self.rope_scaling, YarnScaling) else 1.0

    @property
    def context(self) -> int:
        """The longest text for which every layer sees all that came before, as every layer here does."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field, for a manifest or a hash.

        Sister families' fields are left out where they are a Llama's: slices of earlier versions do not name
        them, and keep their fingerprints.
        """
        later = {field.name: field.default for field in fields(self)[_N_LLAMA_FIELDS:]}
        return {
            name: value for name, value in asdict(self).items() if name not in later or value != later[name]
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "LlamaConfig":
        """The configuration that `to_dict` described. Raises `ConfigError` for anything else."""
        names = [field.name for field in fields(cls)]
        if not set(names[:_N_LLAMA_FIELDS]) <= set(value) <= set(names):
            raise ConfigError("its keys are not those of this version")
        try:
            read = dict(value) | {name: tuple(value[name]) for name in _TUPLES if name in value}
            scaling = value["rope_scaling"]
            if scaling is not None:
                kind = RopeScaling if "rope_type" in scaling else YarnScaling
                read["rope_scaling"] = kind(**scaling)
            return cls(**read)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error
