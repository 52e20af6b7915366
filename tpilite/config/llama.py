"""The shape of a Llama model, checked when it is made, whatever file it was read from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tpilite.checks import check_number, check_whole, short
from tpilite.errors import ConfigError

FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")

# Fields that slices of earlier versions do not name: what is as in a Llama is not written, so that these are
# read and keep their fingerprints.
_LATER = ("rope_interleaved",)

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
    """The shape of a Llama model, by the names of config.json.

    `rope_interleaved` is about the rows of q_proj and k_proj: the two dimensions that rotary embedding turns
    together are neighbours, as in GGUF files of some architectures, not half a head apart.
    """

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
        for name in (*FLAGS, "rope_interleaved"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, found {short(getattr(self, name))}")
        if self.bos_token_id is not None:
            check_whole("bos_token_id", self.bos_token_id, least=0)
        for token_id in self.eos_token_ids:
            check_whole("eos_token_id", token_id, least=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field, for a manifest or a hash."""
        default = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in _LATER or value != default[name]
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "LlamaConfig":
        """The configuration that `to_dict` described. Raises `ConfigError` for anything else."""
        names = {field.name for field in fields(cls)}
        if not names.difference(_LATER) <= set(value) <= names:
            raise ConfigError("its keys are not those of this version")
        try:
            scaling = value["rope_scaling"]
            return cls(
                **dict(value)
                | {"rope_scaling": None if scaling is None else RopeScaling(**scaling)}
                | {"eos_token_ids": tuple(value["eos_token_ids"])}
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error
