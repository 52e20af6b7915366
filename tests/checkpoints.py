"""Small random checkpoints in Hugging Face's format, for the tests of whatever reads one."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.config.llama import LlamaConfig, YarnScaling
from tpilite.dtypes import DTYPES
from tpilite.formats.safetensors import TensorFileWriter
from tpilite.formats.writing import TensorSpec
from tpilite.weights.partition import LM_HEAD, tensor_shapes


def tiny_config(**changes: Any) -> LlamaConfig:
    """A Llama of a few thousand weights, with grouped KV heads."""
    values: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "vocab_size": 50,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
    }
    return LlamaConfig(**(values | changes))


def hf_config(config: LlamaConfig) -> dict[str, Any]:
    """The config.json that describes `config`."""
    family = family_of(config)
    value = {
        name: getattr(config, name)
        for name in LlamaConfig.__dataclass_fields__
        if name not in ("rope_scaling", "eos_token_ids", "layers_without_rope")
    }
    value |= {"model_type": family, "architectures": [f"{family.title()}ForCausalLM"], "hidden_act": "silu"}
    if config.attention_multiplier is None:
        del value["attention_multiplier"]
    value["eos_token_id"] = list(config.eos_token_ids) or None
    if family == "smollm3":
        layers = range(config.num_hidden_layers)
        value["no_rope_layers"] = [int(layer not in config.layers_without_rope) for layer in layers]
    if isinstance(config.rope_scaling, YarnScaling):
        value["rope_scaling"] = {"rope_type": "yarn", **vars(config.rope_scaling)}
    elif config.rope_scaling is not None:
        value["rope_scaling"] = dict(vars(config.rope_scaling))
    return value


def family_of(config: LlamaConfig) -> str:
    """The model_type that has what is in `config`."""
    differs = {
        "granite": config.attention_multiplier is not None,
        "qwen2": config.qkv_bias,
        "qwen3": config.qk_norm,
        "smollm3": bool(config.layers_without_rope),
    }
    return next((family for family, does in differs.items() if does), "llama")


def random_tensors(config: LlamaConfig, dtype: str = "BF16", seed: int = 0) -> dict[str, NDArray[Any]]:
    """Weights by name, stored as `dtype` says; of a size that keeps activations near one."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        if name == LM_HEAD and config.tie_word_embeddings:
            continue
        values = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))
        if len(shape) == 1:
            values = np.float32(1) + np.float32(0.1) * values
        tensors[name] = store(values, dtype)
    return tensors


def store(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """`values` as `dtype` stores them; bfloat16 by cutting the low bits off."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return values.astype(DTYPES[dtype])


def write_checkpoint(
    folder: Path,
    config: LlamaConfig,
    dtype: str = "BF16",
    seed: int = 0,
    shards: int = 1,
    tensors: Mapping[str, NDArray[Any]] | None = None,
) -> Path:
    """Writes `tensors`, or a random model's, into `folder`, in one file or in `shards` with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    entries = list((tensors or random_tensors(config, dtype, seed)).items())
    if shards == 1:
        names = {"model.safetensors": entries}
    else:
        names = {f"model-{i + 1:05}-of-{shards:05}.safetensors": entries[i::shards] for i in range(shards)}
        weight_map = {name: shard for shard, part in names.items() for name, _ in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard, part in names.items():
        write_tensor_file(
            folder / shard,
            [(name, dtype, values.shape, [values]) for name, values in part],
            {"format": "pt"},
        )
    return folder


def write_tensor_file(
    path: Path,
    tensors: Iterable[tuple[str, str, tuple[int, ...], Iterable["bytes | NDArray[Any]"]]],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes (name, dtype, shape, pieces) as a new safetensors file and gives its sha256.

    The pieces of a tensor are taken one at a time, so memory holds one of them, whatever the file's size.
    """
    listed = list(tensors)
    writer = TensorFileWriter(path, [TensorSpec(*tensor[:3]) for tensor in listed], metadata or {})
    try:
        for *_, pieces in listed:
            for piece in pieces:
                writer.write(piece)
        return writer.close()
    finally:
        writer.abandon()
