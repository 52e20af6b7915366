"""What a model is by the metadata of its GGUF file, and by which tensors it has."""

from collections.abc import Mapping
from typing import Any

from tpilite.checks import check_whole, short
from tpilite.config.llama import LlamaConfig
from tpilite.errors import ConfigError

_EOS = ("eos_token_id", "eot_token_id", "eom_token_id")


def config_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> LlamaConfig:
    """The configuration that a GGUF's metadata describes; `shapes` are those of its tensors, by its names.

    Raises `ConfigError` for an architecture that is not supported, and for what is missing or changes the
    maths.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"the GGUF file is of architecture {short(architecture)}, which is not supported; expected llama"
        )

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"{architecture}.{key}", default)
        if found is None:
            raise ConfigError(f"the GGUF file has no {architecture}.{key}, which a Llama model needs")
        return found

    hidden_size, num_heads = value("embedding_length"), value("attention.head_count")
    check_whole(f"{architecture}.embedding_length", hidden_size, least=1)
    check_whole(f"{architecture}.attention.head_count", num_heads, least=1)
    head_dim = value("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if value(key, head_dim) != head_dim:
            raise ConfigError(
                f"the GGUF file has {architecture}.{key} = {short(value(key))}, which is not supported; "
                f"expected the size of a head, {head_dim}"
            )
    eos = [metadata.get(f"tokenizer.ggml.{name}") for name in _EOS]
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=value("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=shapes["token_embd.weight"][0] if "token_embd.weight" in shapes else value("vocab_size"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_theta=value("rope.freq_base", 10000.0),
        tie_word_embeddings="output.weight" not in shapes,
        attention_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_down.bias" in shapes,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(token for token in eos if token is not None)),
        rope_interleaved=True,
    )
