"""Checkpoints of any shape with random weights, for benchmarks: what they compute costs what a real one does.

python benchmarks/models.py --model llama3.2-1b --dir /tmp/models
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.config.llama import LlamaConfig, RopeScaling
from tpilite.formats.safetensors import TensorFileWriter
from tpilite.formats.writing import TensorSpec
from tpilite.weights.partition import LM_HEAD, tensor_shapes

PRESETS = {
    "tinyllama-1.1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=32000,
        rms_norm_eps=1e-5,
    ),
    "llama3.2-1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        tie_word_embeddings=True,
    ),
    # The shape on which TPI-LLM's own figures were measured.
    "tpi-207m": LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=32000,
        rms_norm_eps=1e-5,
    ),
}

_CHUNK = 1 << 22


def write_model(folder: Path, config: LlamaConfig, dtype: str = "BF16", seed: int = 0) -> Path:
    """The folder with a checkpoint of `config`'s shape, written unless it is there already."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shapes = tensor_shapes(config)
    if config.tie_word_embeddings:
        del shapes[LM_HEAD]
    specs = [TensorSpec(name, dtype, shape) for name, shape in shapes.items()]
    writer = TensorFileWriter(folder / "model.safetensors", specs, {"format": "pt"})
    for i, spec in enumerate(specs):
        for piece in _values(spec.shape, dtype, seed + i):
            writer.write(piece)
    writer.close()
    (folder / "config.json").write_text(json.dumps(hf_config(config, dtype), indent=2))
    return folder


def hf_config(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The config.json of Hugging Face that describes `config`."""
    value = {name: v for name, v in vars(config).items() if name not in ("rope_scaling", "eos_token_ids")}
    value |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    value["torch_dtype"] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype]
    if config.rope_scaling is not None:
        value["rope_scaling"] = vars(config.rope_scaling)
    return value


def _values(shape: tuple[int, ...], dtype: str, seed: int) -> Iterator[NDArray[Any]]:
    """Normal values that keep activations near one; a stretch of them repeated, to be written fast."""
    n = int(np.prod(shape))
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(min(n, _CHUNK), np.float32)
    values = 1 + values / 10 if len(shape) == 1 else values / np.float32(np.sqrt(shape[-1]))
    if dtype == "BF16":
        stored: NDArray[Any] = (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    else:
        stored = values.astype(np.float16 if dtype == "F16" else np.float32)
    for start in range(0, n, _CHUNK):
        yield stored[: min(_CHUNK, n - start)]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which model a benchmark runs on."""
    parser.add_argument("--model", default="llama3.2-1b", choices=PRESETS, help="the shape (%(default)s)")
    parser.add_argument("--layers", type=int, help="as many layers instead of the preset's")
    parser.add_argument("--dtype", default="BF16", choices=("BF16", "F16", "F32"), help="(%(default)s)")
    default = Path(os.environ.get("TMPDIR", "/tmp")) / "tpilite-benchmarks"
    parser.add_argument("--dir", type=Path, default=default, help="where models are kept (%(default)s)")


def model_of(args: argparse.Namespace) -> Path:
    """The folder of the model that the options name."""
    config = PRESETS[args.model]
    name = f"{args.model}-{args.dtype.lower()}"
    if args.layers:
        config, name = replace(config, num_hidden_layers=args.layers), f"{name}-{args.layers}layers"
    return write_model(args.dir / name, config, args.dtype)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    print(model_of(parser.parse_args()))
