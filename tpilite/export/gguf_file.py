"""A checkpoint written as a GGUF file, as it is stored or in fewer bits, so that llama.cpp runs it.

Matrices go in as the checkpoint gives them, piece by piece: blocks are made meanwhile. Vectors become F32,
which llama.cpp needs. Rows of q and k are put where their architecture has the pairs of rotary embedding.
"""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.arrays import Array
from tpilite.config.gguf import INTERLEAVED
from tpilite.config.llama import LlamaConfig
from tpilite.dtypes import BLOCK_SIZES
from tpilite.errors import ConfigError
from tpilite.export.architecture import architecture_of, metadata_of, rope_divisors
from tpilite.export.vocabulary import vocabulary_of
from tpilite.formats.gguf_writer import GgufWriter
from tpilite.formats.stored import StoredTensor
from tpilite.formats.writing import TensorSpec
from tpilite.linear.matrix import as_float32
from tpilite.machine import format_size
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.disk import free_bytes, sync_folder
from tpilite.weights.gguf_tensors import DIVISORS, gguf_name
from tpilite.weights.partition import LM_HEAD
from tpilite.weights.slices import Progress
from tpilite.weights.trust import CHUNK_BYTES

# How llama.cpp calls a file by the type of most of its layers' weights (`llama_ftype`), and blocks' layouts.
_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
}
_QUANTIZATION_VERSION = 2


def export_gguf(checkpoint: Checkpoint, path: Path, progress: Progress | None = None) -> None:
    """Writes a new file `path` that holds the whole model, its tokenizer and its chat templates.

    Its name is there only once the file is whole. Raises `ConfigError` for what a GGUF cannot say, where
    `path` exists, where there is no room, and where it cannot be written.
    """
    if path.exists():
        raise ConfigError(f"{path} exists: remove it, or give --export another name")
    tensors = {gguf_name(name): (name, tensor) for name, tensor in _stored_once(checkpoint)}
    extra = _divisors(checkpoint.config)
    specs = [TensorSpec(name, "F32", array.shape) for name, array in extra.items()]
    specs += [TensorSpec(name, _dtype(tensor), tensor.shape) for name, (_, tensor) in tensors.items()]
    metadata = _metadata(checkpoint, path, specs)
    n_bytes, n_done = sum(spec.nbytes for spec in specs), 0
    unfinished = path.with_name(path.name + ".part")
    with _errors(path):
        unfinished.unlink(missing_ok=True)
        if free_bytes(path.absolute().parent) < n_bytes:
            raise ConfigError(
                f"the disk of {path} is full: the file takes {format_size(n_bytes, fine=True)}; make room or "
                "give --export another place"
            )
        writer = GgufWriter(unfinished, specs, metadata)
        try:
            for array in extra.values():
                writer.write(array)
            for name, tensor in tensors.values():
                for rows in _rows(checkpoint.config, name, tensor):
                    writer.write(rows)
                    n_done += rows.nbytes
                    if progress:
                        progress(n_done, n_bytes)
            writer.close()
            os.replace(unfinished, path)
            sync_folder(path.absolute().parent)
        except BaseException:
            writer.abandon()
            unfinished.unlink(missing_ok=True)
            raise


def _stored_once(checkpoint: Checkpoint) -> Iterator[tuple[str, StoredTensor]]:
    for name, tensor in checkpoint.tensors.items():
        if name != LM_HEAD or not checkpoint.config.tie_word_embeddings:
            yield name, tensor


def _dtype(tensor: StoredTensor) -> str:
    return tensor.dtype if len(tensor.shape) == 2 else "F32"


def _divisors(config: LlamaConfig) -> dict[str, Array]:
    found = rope_divisors(config)
    return {DIVISORS: np.array(found, np.float32)} if found else {}


def _metadata(checkpoint: Checkpoint, path: Path, specs: list[TensorSpec]) -> dict[str, Any]:
    """All metadata: a GGUF's own, or what its folder says."""
    files, config = checkpoint.files, checkpoint.config
    n_weights: Counter[str] = Counter()
    for spec in specs:
        if spec.name.startswith("blk."):
            n_weights[spec.dtype] += math.prod(spec.shape)
    about: dict[str, Any] = {"general.file_type": _FILE_TYPES[n_weights.most_common(1)[0][0]]}
    if any(spec.dtype in BLOCK_SIZES for spec in specs):
        about["general.quantization_version"] = _QUANTIZATION_VERSION
    if files.gguf is not None:
        return {key: value for key, value in files.gguf.items() if not key.startswith("split.")} | about
    vocabulary = vocabulary_of(files, config.vocab_size)
    config = _with_tokens(config, vocabulary)
    shapes: Mapping[str, tuple[int, ...]] = {spec.name: spec.shape for spec in specs}
    return metadata_of(path, config, shapes) | {"general.name": files.name} | about | vocabulary


def _with_tokens(config: LlamaConfig, vocabulary: Mapping[str, Any]) -> LlamaConfig:
    """The configuration with the tokenizer's tokens that begin and end a text, where it has any."""
    begin = vocabulary.get("tokenizer.ggml.bos_token_id", config.bos_token_id)
    ends = [vocabulary.get("tokenizer.ggml.eos_token_id"), *config.eos_token_ids]
    return replace(
        config,
        bos_token_id=begin if begin is not None and begin < config.vocab_size else None,
        eos_token_ids=tuple(dict.fromkeys(i for i in ends if i is not None and i < config.vocab_size)),
    )


def _rows(config: LlamaConfig, name: str, tensor: StoredTensor) -> Iterator[NDArray[Any]]:
    """What is to be written of a tensor, in pieces of whole heads."""
    by_pairs = not config.rope_interleaved and INTERLEAVED[architecture_of(config)]
    half = config.head_dim // 2 if by_pairs and (".q_proj." in name or ".k_proj." in name) else 0
    n_rows = max(1, CHUNK_BYTES // tensor.row_bytes)
    if half:
        n_rows = -(-n_rows // config.head_dim) * config.head_dim
    for start in range(0, tensor.shape[0], n_rows):
        part = tensor.rows(start, min(start + n_rows, tensor.shape[0]))
        rows = np.empty(part.stored_shape, part.stored_dtype)
        part.read_into(rows)
        if len(tensor.shape) == 1:
            rows = as_float32(rows)
        if half:  # what is half a head apart becomes neighbours
            halves = rows.reshape(-1, 2, half, *rows.shape[1:])
            rows = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
        yield rows


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}; give --export another place"
        ) from error
