"""A benchmark's checkpoint as GGUF, as it lies or in blocks, with Llama 3's tokenizer or without any.

    python benchmarks/to_gguf.py MODEL_DIR OUT.gguf [--type Q4_K] [--tokenizer tokenizer.model]

Rows of q and k are not reordered as llama.cpp's rotary embedding would want them: the time is the same.
Blocks are made by their largest weight alone: that takes seconds, and random weights have no quality.
"""

import argparse
import re
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.config.llama import LlamaConfig
from tpilite.dtypes import DTYPES
from tpilite.formats.gguf_writer import GgufWriter
from tpilite.formats.stored import StoredTensor
from tpilite.formats.writing import TensorSpec
from tpilite.linear.matrix import as_float32
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.gguf_tensors import gguf_name
from tpilite.weights.partition import LM_HEAD

TYPES = ("Q8_0", "Q4_0", "Q4_K")
_N_SPECIALS = 256  # of Llama 3, behind its byte pairs
_NORMAL, _CONTROL = 1, 3  # GGUF's types of tokens
_ROWS = 1024


def metadata_of(config: LlamaConfig) -> dict[str, Any]:
    """What GGUF says of a model of the llama architecture."""
    return {
        "general.architecture": "llama",
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "no_vocab",
    }


def llama3_vocabulary(path: Path) -> dict[str, Any]:
    """A tokenizer.model of Llama 3 as GGUF has it: the text of each token, and the merges that make them."""
    lines = [line.split() for line in path.read_bytes().splitlines()]
    ranks = {b64decode(token): int(rank) for token, rank in lines}
    names = _byte_names()
    texts = {token: "".join(names[byte] for byte in token) for token in ranks}
    pairs = (_last_merge(token, ranks) for token in ranks)
    n = len(ranks)
    specials = ["<|begin_of_text|>", "<|end_of_text|>"]
    specials += [f"<|reserved_special_token_{i}|>" for i in range(_N_SPECIALS - len(specials))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*texts.values(), *specials],
        "tokenizer.ggml.token_type": np.array([_NORMAL] * n + [_CONTROL] * _N_SPECIALS, np.int32),
        "tokenizer.ggml.merges": [f"{texts[pair[0]]} {texts[pair[1]]}" for pair in pairs if pair],
        "tokenizer.ggml.bos_token_id": n,
        "tokenizer.ggml.eos_token_id": n + 1,
    }


def write_gguf(folder: Path, out: Path, kind: str | None = None, tokenizer: Path | None = None) -> Path:
    """`out`, written from the checkpoint in `folder` unless it is there already."""
    if out.exists():
        return out
    partial = out.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with Checkpoint(folder) as checkpoint:
        config = checkpoint.config
        tensors = dict(checkpoint.tensors)
        if config.tie_word_embeddings:
            del tensors[LM_HEAD]
        metadata = metadata_of(config) | (llama3_vocabulary(tokenizer) if tokenizer else {})
        specs = [TensorSpec(gguf_name(n), _dtype(t, kind), t.shape) for n, t in tensors.items()]
        writer = GgufWriter(partial, specs, metadata)
        for spec, tensor in zip(specs, tensors.values(), strict=True):
            for start in range(0, tensor.shape[0], _ROWS):
                stored = tensor.rows(start, min(start + _ROWS, tensor.shape[0])).array()
                writer.write(stored if spec.dtype == tensor.dtype else _stored_as(spec.dtype, stored))
        writer.close()
    return partial.rename(out)


def _dtype(tensor: StoredTensor, kind: str | None) -> str:
    return "F32" if len(tensor.shape) == 1 else kind or tensor.dtype


def _stored_as(dtype: str, stored: NDArray[Any]) -> NDArray[Any]:
    """Weights as float32, or as blocks."""
    values = as_float32(stored)
    if dtype in DTYPES:
        return values
    blocks = values.reshape(-1, 256 if dtype == "Q4_K" else 32)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    if dtype == "Q8_0":
        codes = np.rint(blocks / (largest / 127)).astype(np.int8)
        return np.hstack([(largest / 127).astype(np.float16).view(np.uint8), codes.view(np.uint8)])
    codes = np.clip(np.rint(blocks / (largest / 8)) + 8, 0, 15).astype(np.uint8)
    if dtype == "Q4_0":
        halves = codes[:, :16] | codes[:, 16:] << 4
        return np.hstack([(largest / 8).astype(np.float16).view(np.uint8), halves])
    # Every group has scale 1 and offset 8 of the block's two.
    pairs = codes.reshape(-1, 4, 2, 32)
    halves = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(blocks), 128)
    units = np.hstack([largest / 8, largest / 8]).astype(np.float16).view(np.uint8)
    small = np.tile(np.array([1] * 4 + [8] * 4 + [0x81] * 4, np.uint8), (len(blocks), 1))
    return np.hstack([units, small, halves])


def _byte_names() -> list[str]:
    """GPT-2's character for each byte: its own where that can be seen, else one from 256 on."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that the merges of lower ranks leave of a token; None where there are not two."""
    parts = re.findall(rb"(?s).", token)
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        if min(pairs) == len(ranks):
            break
        place = pairs.index(min(pairs))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=TYPES, help="of the matrices (as they lie)")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.model of Llama 3")
    args = parser.parse_args()
    print(write_gguf(args.folder, args.out, args.type, args.tokenizer))
