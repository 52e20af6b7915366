"""A benchmark's checkpoint as GGUF, as it lies or in blocks, with another's tokenizer or its own.

    python benchmarks/to_gguf.py MODEL_DIR OUT.gguf [--type Q4_K] [--tokenizer tokenizer.model]

Rows of q and k are not reordered as llama.cpp's rotary embedding would want them: the time is the same.
Blocks are made by their largest weight alone: that takes seconds, and random weights have no quality.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.dtypes import DTYPES
from tpilite.export.architecture import metadata_of
from tpilite.export.vocabulary import vocabulary_of
from tpilite.formats.gguf_writer import GgufWriter
from tpilite.formats.model_files import ModelFiles
from tpilite.formats.stored import StoredTensor
from tpilite.formats.writing import TensorSpec
from tpilite.linear.matrix import as_float32
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.gguf_tensors import gguf_name
from tpilite.weights.partition import LM_HEAD

TYPES = ("Q8_0", "Q4_0", "Q4_K")
_ROWS = 1024


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
        specs = [TensorSpec(gguf_name(n), _dtype(t, kind), t.shape) for n, t in tensors.items()]
        metadata = metadata_of(out, config, {spec.name: spec.shape for spec in specs})
        vocabulary = ModelFiles(folder if tokenizer is None else tokenizer.parent)
        metadata |= vocabulary_of(vocabulary, config.vocab_size)
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=TYPES, help="of the matrices (as they lie)")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.model beside which its settings are")
    args = parser.parse_args()
    print(write_gguf(args.folder, args.out, args.type, args.tokenizer))
