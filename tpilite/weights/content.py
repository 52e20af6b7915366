"""The identity of a model's weights: a hash of all their bytes, computed once and kept.

The name of the folder that its slices are in and what ranks agree on are made of it, so it is known before
anything is sliced. Two models that differ in one bit are two models. How the tensors are spread over files
does not matter.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tpilite.errors import CheckpointError
from tpilite.formats.stored import StoredFile, StoredTensor, read_exactly
from tpilite.machine import format_size
from tpilite.weights.trust import CHUNK_BYTES, KnownHashes, settle, state_of

logger = logging.getLogger(__name__)

CONTENT_NAME = ".content.json"

# One thread hashes slower than an SSD reads; more of them would read too much at a time from a slow card.
_N_THREADS = 2

# Below this it takes no second anywhere. Above, who waits is told how far it is, as often as this.
_QUIET_BYTES, _REPORT_S = 512 << 20, 5.0


def content_hash(
    path: Path, files: Iterable[StoredFile], tensors: Mapping[str, StoredTensor], known: KnownHashes | None
) -> str:
    """The hash of all tensors of the model at `path`; from `known` while its files are unchanged.

    Raises `CheckpointError` where they change meanwhile.
    """
    files = sorted(files, key=lambda file: file.path)
    stats = [os.fstat(file.fileno()) for file in files]
    state = [number for stat in stats for number in state_of(stat)]
    name = str(path.resolve())
    found = known and known.get(name, state)
    if found:
        return found
    settle(*stats)
    digest = hashlib.sha256()
    for tensor_name, (tensor, content) in _hash_all(path, tensors).items():
        digest.update(json.dumps([tensor_name, tensor.dtype, tensor.shape, content]).encode())
    if state != [number for file in files for number in state_of(os.fstat(file.fileno()))]:
        raise CheckpointError(f"the weights in {path} changed while they were read; start again")
    if known is not None:
        known.put({name: (state, digest.hexdigest())})
    return digest.hexdigest()


def _hash_all(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[StoredTensor, str]]:
    """Every tensor with the hash of its bytes; one that has two names is read once."""
    distinct = list(dict.fromkeys(tensors.values()))
    n_total, n_done = sum(tensor.nbytes for tensor in distinct), 0
    told_s = started_s = time.monotonic()
    if n_total > _QUIET_BYTES:
        size = format_size(n_total, fine=True)
        logger.info("reading all weights in %s once (%s), to know them again", path, size)
    hashes = {}
    with ThreadPoolExecutor(_N_THREADS, "content-hash") as pool:
        try:
            for tensor, content in zip(distinct, pool.map(_hash_tensor, distinct), strict=True):
                hashes[tensor] = content
                n_done += tensor.nbytes
                if time.monotonic() - told_s > _REPORT_S:
                    told_s = time.monotonic()
                    speed = n_done / (told_s - started_s) / 1e6
                    logger.info(
                        "%.0f %% of the weights are read, at %.0f MB/s", 100 * n_done / n_total, speed
                    )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: (tensor, hashes[tensor]) for name, tensor in tensors.items()}


def _hash_tensor(tensor: StoredTensor) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(CHUNK_BYTES, tensor.nbytes)))
    for start in range(0, tensor.nbytes, CHUNK_BYTES):
        part = buffer[: tensor.nbytes - start]
        read_exactly(tensor.file, part, tensor.offset + start)
        digest.update(part)
    return digest.hexdigest()
