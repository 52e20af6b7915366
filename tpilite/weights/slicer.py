"""The slices of a model's ranks, made from its checkpoint in one reading and kept where they fit."""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tpilite.dtypes import block_size
from tpilite.errors import ConfigError, SliceError
from tpilite.formats.safetensors import TensorFile, TensorFileWriter
from tpilite.formats.stored import StoredTensor
from tpilite.formats.writing import TensorSpec
from tpilite.machine import format_size
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.disk import free_bytes, full_error, is_full, sync_folder, write_error
from tpilite.weights.partition import EMBEDDING, LM_HEAD, Partition, held
from tpilite.weights.slices import (
    EMBED_FILE,
    MANIFEST_NAME,
    NODE_NAME,
    TEMPORARY_NAME,
    FileEntry,
    Manifest,
    Progress,
    block_files,
    clear_slice,
    node_folder,
    version_for,
)
from tpilite.weights.trust import CHUNK_BYTES, VerifiedFiles

_log = logging.getLogger(__name__)


def ensure_slices(
    checkpoint: Checkpoint,
    partition: Partition,
    save_dir: Path,
    *,
    force: bool = False,
    ranks: Iterable[int] | None = None,
    embedding: bool = True,
    verify: bool = False,
    progress: Progress | None = None,
) -> list[Manifest]:
    """The manifests of the slices in `save_dir` of `ranks` (of all, if None), made where they are missing.

    Slices that are there, fit and are whole are kept (`verify`: read again, though they are known to be);
    `force` makes all anew and removes those of other ranks. Without
    `embedding`, rank 0's slice has none, for a rank 0 that reads it from the checkpoint: so checkpoint and
    slices together take no more than twice the checkpoint. Raises `SliceError` for slices that were
    made for something else, when the disk is full, and when it fails.
    """
    try:
        partition.check(checkpoint.config)
    except ConfigError as error:
        raise SliceError(str(error)) from error
    wanted = list(range(partition.world_size)) if ranks is None else list(ranks)
    with _disk_errors(save_dir, checkpoint.nbytes):
        save_dir.mkdir(parents=True, exist_ok=True)
        if force:
            for folder in list(save_dir.iterdir()):
                if NODE_NAME.fullmatch(folder.name) and folder.is_dir():
                    clear_slice(folder)
                    with contextlib.suppress(OSError):  # it holds something that is not ours
                        folder.rmdir()
        manifests = {
            rank: _usable(node_folder(save_dir, rank), checkpoint, partition, verify) for rank in wanted
        }
        missing = {
            rank: node_folder(save_dir, rank)
            for rank, found in manifests.items()
            if found is None or (rank == 0 and embedding and EMBED_FILE not in found.files)
        }
        if missing:
            manifests |= _Slicer(checkpoint, partition, missing, embedding, progress).make()
    return [manifest for manifest in manifests.values() if manifest is not None]


def _usable(folder: Path, checkpoint: Checkpoint, partition: Partition, verify: bool) -> Manifest | None:
    """The manifest of a slice that can be used as it is; None when there is none."""
    try:
        manifest = Manifest.find(folder)
    except SliceError as error:
        raise SliceError(f"{error}; --split_bin makes the slices again") from error
    if manifest is None:
        return None
    misfit = manifest.misfit(checkpoint, partition)
    if f"node_{manifest.rank}" != folder.name:
        misfit = f"made for rank {manifest.rank}"
    if misfit:
        raise SliceError(
            f"the slice in {folder} was {misfit}; "
            "--split_bin makes the slices again, another --save_dir keeps these"
        )
    damaged = next(manifest.damaged_files(folder, trust=not verify), None)
    if damaged is not None:
        _log.warning("%s is damaged; making the slices of rank %d again", folder / damaged, manifest.rank)
        return None
    return manifest


class _Slicer:
    """Makes the slices of some ranks, block by block, reading each byte of the checkpoint once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        partition: Partition,
        folders: Mapping[int, Path],
        embedding: bool,
        progress: Progress | None,
    ) -> None:
        self._checkpoint, self._partition = checkpoint, partition
        self._folders, self._progress = folders, progress
        self._shards = {rank: partition.shards(checkpoint.config, rank) for rank in folders}
        if not embedding and 0 in folders:
            del self._shards[0][EMBEDDING]
        self._total = sum(
            self._spec(name, shard).nbytes
            for shards in self._shards.values()
            for name, shard in shards.items()
        )
        self._done = 0

    def make(self) -> dict[int, Manifest]:
        for folder in self._folders.values():
            folder.mkdir(parents=True, exist_ok=True)
            clear_slice(folder)
        save_dir = next(iter(self._folders.values())).parent
        if free_bytes(save_dir) < self._total:
            raise full_error(save_dir, f"what is missing takes {format_size(self._total, fine=True)}")
        try:
            entries = self._write_blocks()
            return {rank: self._write_manifest(rank, files) for rank, files in entries.items()}
        except BaseException:
            for folder in self._folders.values():
                with contextlib.suppress(OSError):
                    clear_slice(folder)
            raise

    def _write_blocks(self) -> dict[int, dict[str, FileEntry]]:
        """Writes every block, each flushed to the disk while the next one is read and hashed."""
        files: dict[int, dict[str, Future[FileEntry]]] = {rank: {} for rank in self._folders}
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(1, "slices-flush") as flusher:
            flushing: list[Future[FileEntry]] = []
            for file_name, names in block_files(self._checkpoint.config):
                writers = self._open_writers(file_name, names, stack)
                for name in names:
                    self._copy(name, self._source(name, stack), writers)
                for future in flushing:  # so that no more than a block waits for the disk
                    future.result()
                flushing = []
                for rank, writer in writers.items():
                    files[rank][file_name] = flusher.submit(_finish, writer)
                    flushing.append(files[rank][file_name])
            return {
                rank: {name: future.result() for name, future in futures.items()}
                for rank, futures in files.items()
            }

    def _open_writers(
        self, file_name: str, names: Iterable[str], stack: contextlib.ExitStack
    ) -> dict[int, TensorFileWriter]:
        """A writer for each rank that holds something of the block."""
        writers = {}
        for rank, shards in self._shards.items():
            specs = [self._spec(name, shards[name]) for name in names if name in shards]
            if specs:
                writers[rank] = TensorFileWriter(self._folders[rank] / file_name, specs, {})
                stack.callback(writers[rank].abandon)
        return writers

    def _source(self, name: str, stack: contextlib.ExitStack) -> StoredTensor:
        """A tensor to copy. A tied table that is made on the way is made once, and then read where it is."""
        tensor = self._checkpoint.tensors[name]
        is_made = self._checkpoint.recipe is not None and EMBEDDING in self._shards.get(0, {})
        if name == LM_HEAD and is_made and tensor is self._checkpoint.tensors[EMBEDDING]:
            return stack.enter_context(TensorFile(self._folders[0] / EMBED_FILE)).tensors[EMBEDDING]
        return tensor

    def _copy(self, name: str, tensor: StoredTensor, writers: Mapping[int, TensorFileWriter]) -> None:
        """Reads a tensor's rows once and gives each rank's writer its part of them."""
        holders = [
            (writer, self._shards[rank][name][0], _stored_columns(tensor, self._shards[rank][name]))
            for rank, writer in writers.items()
            if name in self._shards[rank]
        ]
        n_rows = min(tensor.shape[0], max(1, CHUNK_BYTES // tensor.row_bytes))
        buffer = np.empty((n_rows, *tensor.stored_shape[1:]), tensor.stored_dtype)
        for start in range(0, tensor.shape[0], n_rows):
            stop = min(start + n_rows, tensor.shape[0])
            parts = [
                (writer, max(start, own.start), min(stop, own.stop), columns)
                for writer, own, columns in holders
                if own.start < stop and start < own.stop
            ]
            if not parts:
                continue
            rows = buffer[: stop - start]
            tensor.rows(start, stop).read_into(rows)
            for writer, first, last, columns in parts:
                part = rows[first - start : last - start]
                if columns is not None:
                    part = part[:, columns]
                writer.write(np.ascontiguousarray(part))
                self._done += part.nbytes
            if self._progress:
                self._progress(self._done, self._total)

    def _spec(self, name: str, shard: tuple[range, ...]) -> TensorSpec:
        dtype = self._checkpoint.tensors[name].dtype
        return TensorSpec(name, dtype, tuple(map(len, held(shard, block_size(dtype).n_weights))))

    def _write_manifest(self, rank: int, files: dict[str, FileEntry]) -> Manifest:
        folder = self._folders[rank]
        manifest = Manifest(
            rank,
            self._partition,
            self._checkpoint.fingerprint,
            self._checkpoint.config,
            files,
            version_for(self._checkpoint.config, self._checkpoint.tensors.values()),
            self._checkpoint.quantized,
        )
        temporary = folder / TEMPORARY_NAME
        with open(temporary, "xb") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)
        os.replace(temporary, folder / MANIFEST_NAME)
        sync_folder(folder)
        VerifiedFiles(folder).add({name: entry.sha256 for name, entry in files.items()})
        return manifest


def _stored_columns(tensor: StoredTensor, shard: tuple[range, ...]) -> slice | None:
    """The columns of what is stored of a tensor that a rank gets; None for a vector, which has none."""
    n_weights, n_bytes = block_size(tensor.dtype)
    if len(shard) == 1:
        return None
    part, size = held(shard, n_weights)[1], n_bytes if n_weights > 1 else 1  # of blocks bytes are stored
    return slice(part.start // n_weights * size, part.stop // n_weights * size)


def _finish(writer: TensorFileWriter) -> FileEntry:
    return FileEntry(writer.nbytes, writer.close())


@contextlib.contextmanager
def _disk_errors(save_dir: Path, n_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise full_error(save_dir, f"all slices take about {format_size(n_bytes, fine=True)}") from error
        raise write_error(save_dir, error) from error
