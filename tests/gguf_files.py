"""GGUF files for the tests of whatever reads one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from block_rows import FLOAT16_PLACES, random_blocks
from checkpoints import family_of, store, tiny_config
from numpy.typing import NDArray

from tpilite.config.llama import LlamaConfig, YarnScaling
from tpilite.dtypes import BLOCK_SIZES
from tpilite.formats.gguf_writer import GgufWriter
from tpilite.formats.writing import TensorSpec
from tpilite.linear.matrix import Blocks, as_float32
from tpilite.weights.gguf_tensors import gguf_name
from tpilite.weights.partition import EMBEDDING, LM_HEAD, tensor_shapes

# As quantizers mix them: rows of 256 where a type needs that, other types for what matters more.
MIXED = {"embed": "Q6_K", "down_proj": "Q6_K", "v_proj": "Q5_K", "gate_proj": "IQ4_XS", "proj": "Q4_K"}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}


def write_gguf(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...], NDArray[Any]]],
    metadata: Mapping[str, Any],
) -> Path:
    """Writes a new GGUF file of tensors (dtype, shape in weights, what is stored) by name."""
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape, _) in tensors.items()]
    writer = GgufWriter(path, specs, metadata)
    try:
        for _, _, stored in tensors.values():
            writer.write(np.ascontiguousarray(stored))
        writer.close()
    finally:
        writer.abandon()
    return path


def gguf_config(**changes: Any) -> LlamaConfig:
    """A Llama whose rows are whole blocks of 32, with grouped KV heads; none of its matrices is large."""
    values: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rms_norm_eps": float(np.float32(1e-5)),
        "rope_interleaved": True,
    }
    return tiny_config(**(values | changes))


def write_gguf_model(
    path: Path,
    config: LlamaConfig,
    dtypes: "str | Mapping[str, str]" = "Q8_0",
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    *,
    only: bool = False,
) -> dict[str, NDArray[np.float32]]:
    """Writes a random Llama as a GGUF, and gives its values by Hugging Face's names, as they are there.

    `dtypes` is that of all matrices, or by the end of a tensor's name; vectors are F32. `metadata` is what
    the file says beside what it must, or with `only` all that it says.
    """
    rng = np.random.default_rng(seed)
    stored, values = {}, {}
    for name, shape in tensor_shapes(config).items():
        if name == LM_HEAD and config.tie_word_embeddings:
            continue
        dtype = "F32"
        if len(shape) == 2:
            dtype = dtypes if isinstance(dtypes, str) else _dtype_of(name, dtypes)
        if dtype in BLOCK_SIZES:
            blocks = random_blocks(rng, dtype, *shape)
            values[name] = as_float32(blocks)
            # As large as keeps activations near one: the codes are any.
            blocks = scaled(blocks, 1 / (np.sqrt(shape[-1]) * max(values[name].std(), 1e-6)))
            values[name], raw = as_float32(blocks), blocks.bytes
        else:
            numbers = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))
            raw = store(numbers if len(shape) == 2 else np.float32(1) + np.float32(0.1) * numbers, dtype)
            values[name] = as_float32(raw)
        stored[gguf_name(name)] = (dtype, shape, raw)
    if config.rope_divisors:
        divisors = np.array(config.rope_divisors, np.float32)
        stored["rope_freqs.weight"] = ("F32", divisors.shape, divisors)
    write_gguf(path, stored, ({} if only else metadata_of(config)) | dict(metadata or {}))
    if config.tie_word_embeddings:
        values[LM_HEAD] = values[EMBEDDING]
    return values


def scaled(blocks: Blocks, factor: float) -> Blocks:
    """Blocks whose scales and offsets are multiplied."""
    rows = blocks.as_blocks().copy()
    for place in FLOAT16_PLACES[blocks.type.name]:
        scales = rows[:, place : place + 2].copy().view("<f2")
        rows[:, place : place + 2] = (scales * np.float16(factor)).astype("<f2").view(np.uint8)
    return Blocks(blocks.type, rows.reshape(blocks.bytes.shape), blocks.n_cols)


def vocab_keys(**values: Any) -> dict[str, Any]:
    """Metadata about a tokenizer, but for what is None."""
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def vocab_of_pairs(content: Mapping[str, Any], pre: str | None, **values: Any) -> dict[str, Any]:
    """What a converter writes of a tokenizer.json."""
    model = content["model"]
    added = {token["id"]: token for token in content["added_tokens"]}
    names = {i: token for token, i in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    tokens = [names.get(i, f"[PAD{i}]") for i in range(max(names) + 3)]
    types = [
        5 if i not in names else (3 if added[i]["special"] else 4) if i in added else 1
        for i in range(len(tokens))
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return vocab_keys(
        model="gpt2", pre=pre, tokens=tokens, token_type=np.array(types, np.int32), merges=merges
    ) | vocab_keys(**values)


def metadata_of(config: LlamaConfig) -> dict[str, Any]:
    """What a GGUF of a model says of itself, by the names of its architecture."""
    family = family_of(config)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    if family == "granite":
        values |= {
            "attention.scale": config.attention_multiplier,
            "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    if config.sliding_window is not None:
        values["attention.sliding_window"] = config.sliding_window
    scaling = config.rope_scaling
    if scaling is not None:
        values["rope.scaling.factor"] = scaling.factor
        values["rope.scaling.type"] = "linear"
    if isinstance(scaling, YarnScaling):
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
            "rope.scaling.yarn_attn_factor": scaling.attention_factor,
            "rope.scaling.yarn_beta_fast": scaling.beta_fast,
            "rope.scaling.yarn_beta_slow": scaling.beta_slow,
        }
    ends = vocab_keys(bos_token_id=config.bos_token_id, eos_token_id=next(iter(config.eos_token_ids), None))
    named = {f"{family}.{key}": value for key, value in values.items()}
    return {"general.architecture": family, **named, **ends}


def _dtype_of(name: str, dtypes: Mapping[str, str]) -> str:
    return next((dtype for part, dtype in dtypes.items() if part in name), "F32")


def in_hugging_faces_order(
    config: LlamaConfig, values: Mapping[str, NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    """The rows of queries and keys with the pairs of rotary embedding half a head apart."""
    return _regrouped(config, values, (config.head_dim // 2, 2))


def in_ggufs_order(config: LlamaConfig, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The rows of queries and keys with these pairs side by side, where `config` has them so."""
    return _regrouped(config, values, (2, config.head_dim // 2))


def _regrouped(
    config: LlamaConfig, values: Mapping[str, NDArray[Any]], groups: tuple[int, int]
) -> dict[str, NDArray[Any]]:
    found = dict(values)
    for name, rows in values.items():
        if config.rope_interleaved and ("q_proj" in name or "k_proj" in name):
            found[name] = rows.reshape(-1, *groups, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
    return found
