"""The slices of a model: for each rank a folder `node_{rank}` with the part of every tensor that it owns.

Format, version 1. The folder holds `manifest.json` and one safetensors file per block:

    embed.safetensors            the embedding: rank 0's alone, and left out where it is read elsewhere
    layers.{i}.attn.safetensors  attention of layer i, with its input_layernorm
    layers.{i}.mlp.safetensors   feed-forward of layer i, with its post_attention_layernorm
    head.safetensors             the rank's rows of lm_head, with the final norm

Tensors keep Hugging Face's names and the checkpoint's dtype; their shapes are those of the rank's part
(`partition`). A rank without KV heads has tensors of no elements there. In each file the matrices come
first and begin at a multiple of `tensor_file.DATA_ALIGNMENT`.

The manifest is one JSON object of exactly these keys:

    format       "tpilite slice"
    version      1
    rank         whose folder this is
    partition    `Partition.to_dict()`; its counts also say how many ranks there are
    fingerprint  `Checkpoint.fingerprint` of the model that was sliced, 64 hexadecimal digits
    config       the fields of `LlamaConfig`
    files        for each file of the folder its "size" in bytes and its "sha256"

A folder is a slice once its manifest is there. The manifest is written last, by renaming, after everything
that it names has reached the disk; and it is removed first when a slice is made anew. What a killed
process left behind is therefore never taken for a slice, and the next one starts over it.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from tpilite.closing import Closing
from tpilite.config import LlamaConfig, RopeScaling
from tpilite.errors import CheckpointError, ConfigError, SliceError
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.partition import (
    EMBEDDING,
    EMBEDDING_AXES,
    HEAD_AXES,
    Partition,
    attention_axes,
    mlp_axes,
)
from tpilite.weights.tensor_file import (
    DTYPES,
    StoredTensor,
    TensorFile,
    TensorFileWriter,
    TensorSpec,
)

MANIFEST_NAME = "manifest.json"

# A manifest takes some 130 bytes per file; a model of 126 layers (Llama 3.1 405B) has 254 files per rank.
MAX_MANIFEST_BYTES = 1 << 20

# Far above any block, and below where file offsets overflow.
_MAX_FILE_BYTES = 1 << 48

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_log = logging.getLogger(__name__)

_FORMAT, _VERSION = "tpilite slice", 1
_TEMPORARY = MANIFEST_NAME + ".tmp"
_EMBED_FILE, _HEAD_FILE = "embed.safetensors", "head.safetensors"
_BLOCK_FILE = re.compile(r"(embed|head|layers\.(0|[1-9][0-9]{0,5})\.(attn|mlp))\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NODE = re.compile(r"node_(0|[1-9][0-9]{0,5})")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

# Rows are read, hashed and written by this much, while they are in the cache. It bounds the memory.
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says about a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a slice folder holds, and what it was made for."""

    rank: int
    partition: Partition
    fingerprint: str
    config: LlamaConfig
    files: Mapping[str, FileEntry]

    @property
    def nbytes(self) -> int:
        return sum(entry.size for entry in self.files.values())

    def to_json(self) -> bytes:
        value = {
            "format": _FORMAT,
            "version": _VERSION,
            "rank": self.rank,
            "partition": self.partition.to_dict(),
            "fingerprint": self.fingerprint,
            "config": asdict(self.config),
            "files": {name: asdict(entry) for name, entry in self.files.items()},
        }
        return json.dumps(value, indent=1).encode()

    @classmethod
    def from_json(cls, raw: bytes) -> "Manifest":
        """The manifest in a file or from a peer, every field checked. Raises `SliceError`."""
        if len(raw) > MAX_MANIFEST_BYTES:
            raise SliceError(
                f"the manifest has {len(raw)} bytes; expected at most {MAX_MANIFEST_BYTES}: it is damaged"
            )
        try:
            value = json.loads(raw.decode())
        except (ValueError, RecursionError) as error:
            raise SliceError(f"the manifest is not valid JSON ({error}): it is damaged") from error
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            raise SliceError(f"the manifest is not of the format {_FORMAT!r}")
        if value.get("version") != _VERSION:
            raise SliceError(
                f"the manifest is of version {value.get('version')!r:.40}; expected {_VERSION}: "
                "use the same version of tpilite everywhere"
            )
        keys = {"format", "version", "rank", "partition", "fingerprint", "config", "files"}
        if set(value) != keys:
            raise SliceError(f"the manifest must have exactly the keys {', '.join(sorted(keys))}")
        config = _config(value["config"])
        try:
            partition = Partition.from_dict(value["partition"])
            partition.check(config)
        except ConfigError as error:
            raise SliceError(f"the manifest's partition is wrong: {error}") from error
        rank = value["rank"]
        if type(rank) is not int or not 0 <= rank < partition.world_size:
            raise SliceError(
                f"the manifest has rank {rank!r:.40}; expected one of {partition.world_size} ranks from 0"
            )
        if not _is_sha256(value["fingerprint"]):
            raise SliceError(f"the manifest has fingerprint {value['fingerprint']!r:.80}; expected 64 digits")
        return cls(rank, partition, value["fingerprint"], config, _files(value["files"], config, rank))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a slice folder. Raises `SliceError` when there is none or it is damaged."""
        path = folder / MANIFEST_NAME
        try:
            with open(path, "rb") as file:
                raw = file.read(MAX_MANIFEST_BYTES + 1)
        except FileNotFoundError:
            raise SliceError(
                f"{folder} is not a complete slice: it has no {MANIFEST_NAME}; make or download it again"
            ) from None
        except OSError as error:
            raise SliceError(f"{path} cannot be read: {error.strerror}") from error
        try:
            return cls.from_json(raw)
        except SliceError as error:
            raise SliceError(f"{path}: {error}") from error

    def misfit(self, checkpoint: Checkpoint, partition: Partition) -> str | None:
        """What this slice was made for that is not what is asked for now, or None when it fits."""
        found, asked = self.partition, partition
        if found.world_size != asked.world_size:
            return f"made for {found.world_size} ranks, and this start is for {asked.world_size}"
        for field in fields(LlamaConfig):
            is_set, expected = getattr(self.config, field.name), getattr(checkpoint.config, field.name)
            if is_set != expected:
                return f"made with {field.name} = {is_set}, and the model has {expected}"
        if found != asked:
            return f"made for the ratio {_joined(found.ratio)}, and this start is for {_joined(asked.ratio)}"
        if self.fingerprint != checkpoint.fingerprint:
            return f"made from other weights than those in {checkpoint.folder}"
        return None

    def has_all_files(self, folder: Path) -> bool:
        """Whether every file is there with its size."""
        for name, entry in self.files.items():
            try:
                if (folder / name).stat().st_size != entry.size:
                    return False
            except OSError:
                return False
        return True


def node_folder(save_dir: Path, rank: int) -> Path:
    """Where a rank's slice stands in the folder of all of them."""
    return save_dir / f"node_{rank}"


class SliceFolder(Closing):
    """One rank's slice, opened: what `Checkpoint` is for a whole model. Raises `SliceError`.

    `tensors` has Hugging Face's names; the shapes are those of the rank's part. The sizes of all files are
    checked against the manifest; their content only by `verify`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self.config, self.partition = self.manifest.config, self.manifest.partition
        self.rank, self.fingerprint = self.manifest.rank, self.manifest.fingerprint
        self._files: list[TensorFile] = []
        try:
            self.tensors: Mapping[str, StoredTensor] = self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the files. Arrays that were handed out stay valid."""
        for file in self._files:
            file.close()

    def verify(self, progress: Progress | None = None) -> None:
        """Reads every file and raises `SliceError` for the first whose sha256 is not the manifest's."""
        done = 0
        buffer = bytearray(_CHUNK_BYTES)
        for name, entry in self.manifest.files.items():
            digest = hashlib.sha256()
            try:
                with open(self.folder / name, "rb", buffering=0) as file:
                    while n_read := file.readinto(buffer):
                        digest.update(memoryview(buffer)[:n_read])
                        done += n_read
                        if progress:
                            progress(done, self.manifest.nbytes)
            except OSError as error:
                raise SliceError(f"{self.folder / name} cannot be read: {error.strerror}") from error
            if digest.hexdigest() != entry.sha256:
                raise SliceError(
                    f"{self.folder / name} is damaged: its sha256 is not the manifest's; "
                    "make it again with --split_bin or download it again with --force_download"
                )

    def _open(self) -> dict[str, StoredTensor]:
        tensors: dict[str, StoredTensor] = {}
        for name, entry in self.manifest.files.items():
            try:
                file = TensorFile(self.folder / name)
            except CheckpointError as error:
                raise SliceError(str(error)) from error
            self._files.append(file)
            if file.nbytes != entry.size:
                raise SliceError(
                    f"{file.path} has {file.nbytes} bytes; the manifest expects {entry.size}: "
                    "make it again with --split_bin or download it again with --force_download"
                )
            tensors |= file.tensors
        expected = self.partition.shards(self.config, self.rank)
        if _EMBED_FILE not in self.manifest.files:
            expected.pop(EMBEDDING, None)
        for name, shard in expected.items():
            shape = tuple(map(len, shard))
            found = tensors.get(name)
            if found is None or found.shape != shape or found.dtype not in DTYPES:
                is_there = f"{found.dtype} {list(found.shape)}" if found else "nothing"
                raise SliceError(
                    f"{self.folder} holds {is_there} as {name}; its manifest implies the shape "
                    f"{list(shape)}: make the slices again with --split_bin"
                )
        return {name: tensors[name] for name in expected}


def ensure_slices(
    checkpoint: Checkpoint,
    partition: Partition,
    save_dir: Path,
    *,
    force: bool = False,
    ranks: Iterable[int] | None = None,
    embedding: bool = True,
    progress: Progress | None = None,
) -> list[Manifest]:
    """The manifests of the slices in `save_dir` of `ranks` (of all, if None), made where they are missing.

    Slices that are there and fit are kept; `force` makes all anew and removes those of other ranks. Without
    `embedding`, rank 0's slice has none, for a rank 0 that reads it from the checkpoint: so checkpoint and
    slices together take no more than twice the checkpoint. Raises `SliceError` for slices that were
    made for something else, when the disk is full, and when it fails.
    """
    try:
        partition.check(checkpoint.config)
    except ConfigError as error:
        raise SliceError(str(error)) from error
    wanted = list(range(partition.world_size)) if ranks is None else list(ranks)
    with _disk_errors(save_dir, checkpoint.nbytes), _locked(save_dir):
        if force:
            for folder in list(save_dir.iterdir()):
                if _NODE.fullmatch(folder.name) and folder.is_dir():
                    _clear(folder)
                    with contextlib.suppress(OSError):  # it holds something that is not ours
                        folder.rmdir()
        manifests = {rank: _usable(node_folder(save_dir, rank), checkpoint, partition) for rank in wanted}
        missing = {
            rank: node_folder(save_dir, rank)
            for rank, found in manifests.items()
            if found is None or (rank == 0 and embedding and _EMBED_FILE not in found.files)
        }
        if missing:
            manifests |= _Slicer(checkpoint, partition, missing, embedding, progress).make()
    return [manifest for manifest in manifests.values() if manifest is not None]


def _usable(folder: Path, checkpoint: Checkpoint, partition: Partition) -> Manifest | None:
    """The manifest of a slice that can be used as it is; None when there is none."""
    if not (folder / MANIFEST_NAME).exists():
        return None
    try:
        manifest = Manifest.read(folder)
        misfit = manifest.misfit(checkpoint, partition)
    except SliceError as error:
        raise SliceError(f"{error}; --split_bin makes the slices again") from error
    if f"node_{manifest.rank}" != folder.name:
        misfit = f"made for rank {manifest.rank}"
    if misfit:
        raise SliceError(
            f"the slice in {folder} was {misfit}; "
            "--split_bin makes the slices again, another --save_dir keeps these"
        )
    if not manifest.has_all_files(folder):
        _log.warning("%s has lost files or parts of them; making it again", folder)
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
            _clear(folder)
        save_dir = next(iter(self._folders.values())).parent
        if shutil.disk_usage(save_dir).free < self._total:
            raise _disk_full(save_dir, f"what is missing takes {_size(self._total)}")
        try:
            entries = self._write_blocks()
            return {rank: self._write_manifest(rank, files) for rank, files in entries.items()}
        except BaseException:
            for folder in self._folders.values():
                with contextlib.suppress(OSError):
                    _clear(folder)
            raise

    def _write_blocks(self) -> dict[int, dict[str, FileEntry]]:
        """Writes every block, each flushed to the disk while the next one is read and hashed."""
        files: dict[int, dict[str, Future[FileEntry]]] = {rank: {} for rank in self._folders}
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(1, "slices-flush") as flusher:
            flushing: list[Future[FileEntry]] = []
            for file_name, names in _blocks(self._checkpoint.config):
                writers = self._open_writers(file_name, names, stack)
                for name in names:
                    self._copy(name, writers)
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

    def _copy(self, name: str, writers: Mapping[int, TensorFileWriter]) -> None:
        """Reads a tensor's rows once and gives each rank's writer its part of them."""
        tensor = self._checkpoint.tensors[name]
        holders = [(w, self._shards[rank][name]) for rank, w in writers.items() if name in self._shards[rank]]
        row_bytes = tensor.nbytes // tensor.shape[0]
        n_rows = min(tensor.shape[0], max(1, _CHUNK_BYTES // row_bytes))
        buffer = np.empty((n_rows, *tensor.shape[1:]), tensor.stored_dtype)
        for start in range(0, tensor.shape[0], n_rows):
            stop = min(start + n_rows, tensor.shape[0])
            parts = [
                (writer, max(start, shard[0].start), min(stop, shard[0].stop), shard[1:])
                for writer, shard in holders
                if shard[0].start < stop and start < shard[0].stop
            ]
            if not parts:
                continue
            rows = buffer[: stop - start]
            tensor.rows(start, stop).read_into(rows)
            for writer, first, last, columns in parts:
                part = rows[first - start : last - start]
                for cut in columns:
                    part = part[:, cut.start : cut.stop]
                writer.write(np.ascontiguousarray(part))
                self._done += part.nbytes
            if self._progress:
                self._progress(self._done, self._total)

    def _spec(self, name: str, shard: tuple[range, ...]) -> TensorSpec:
        return TensorSpec(name, self._checkpoint.tensors[name].dtype, tuple(map(len, shard)))

    def _write_manifest(self, rank: int, files: dict[str, FileEntry]) -> Manifest:
        folder = self._folders[rank]
        manifest = Manifest(
            rank, self._partition, self._checkpoint.fingerprint, self._checkpoint.config, files
        )
        temporary = folder / _TEMPORARY
        with open(temporary, "xb") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)
        os.replace(temporary, folder / MANIFEST_NAME)
        sync_folder(folder)
        return manifest


def _finish(writer: TensorFileWriter) -> FileEntry:
    return FileEntry(writer.nbytes, writer.close())


def _blocks(config: LlamaConfig) -> Iterator[tuple[str, Iterable[str]]]:
    """The files of a complete slice and the tensors of each, in the order in which a pass uses them."""
    yield _EMBED_FILE, EMBEDDING_AXES
    for layer in range(config.num_hidden_layers):
        yield f"layers.{layer}.attn.safetensors", attention_axes(config, layer)
        yield f"layers.{layer}.mlp.safetensors", mlp_axes(config, layer)
    yield _HEAD_FILE, HEAD_AXES


def _files(value: Any, config: LlamaConfig, rank: int) -> dict[str, FileEntry]:
    if not isinstance(value, dict):
        raise SliceError(f"the manifest's files must be an object, found {value!r:.40}")
    files = {}
    for name, entry in value.items():
        # These become paths, on a peer's word.
        if not _BLOCK_FILE.fullmatch(name) or (name == _EMBED_FILE and rank):
            raise SliceError(f"the manifest names the file {name!r:.80}, which no slice of rank {rank} has")
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            raise SliceError(f"the manifest must give exactly size and sha256 of {name}")
        size, sha256 = entry["size"], entry["sha256"]
        if type(size) is not int or not 0 <= size <= _MAX_FILE_BYTES or not _is_sha256(sha256):
            raise SliceError(f"the manifest gives {name} size {size!r:.40} and sha256 {sha256!r:.80}")
        files[name] = FileEntry(size, sha256)
    # Counted before the names are made: their number is the peer's word too.
    if len(files.keys() - {_EMBED_FILE}) != 2 * config.num_hidden_layers + 1:
        raise SliceError(
            f"the manifest names {len(files)} files; a slice of {config.num_hidden_layers} layers has "
            f"{2 * config.num_hidden_layers + 1}, and rank 0 may have {_EMBED_FILE}"
        )
    for name, _ in _blocks(config):
        if name not in files and name != _EMBED_FILE:
            raise SliceError(f"the manifest does not name {name}, which every slice has")
    return files


def _config(value: Any) -> LlamaConfig:
    try:
        value = dict(value)
        if set(value) != {field.name for field in fields(LlamaConfig)}:
            raise ConfigError("its keys are not those of this version")
        if value["rope_scaling"] is not None:
            value["rope_scaling"] = RopeScaling(**value["rope_scaling"])
        value["eos_token_ids"] = tuple(value["eos_token_ids"])
        return LlamaConfig(**value)
    except (ConfigError, TypeError, ValueError) as error:
        raise SliceError(f"the manifest's config is wrong: {error}") from error


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _clear(folder: Path) -> None:
    """Removes a slice, whole or half made: the manifest first, so that it stops to be one at once."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    sync_folder(folder)
    for path in list(folder.iterdir()):
        if path.name == _TEMPORARY or is_slice_file(path.name):
            path.unlink()


def is_slice_file(name: str) -> bool:
    """Whether a file of a slice folder can have this name: the manifest, or a block of the model."""
    return name == MANIFEST_NAME or _BLOCK_FILE.fullmatch(name) is not None


def sync_folder(folder: Path) -> None:
    """Makes the names of a folder's files reach the disk, as fsync does for what is in them."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _locked(save_dir: Path) -> Iterator[None]:
    """Keeps other processes from making slices in the same folder at the same time."""
    save_dir.mkdir(parents=True, exist_ok=True)
    with open(save_dir / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("waiting for another process that makes slices in %s", save_dir)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _disk_errors(save_dir: Path, n_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise _disk_full(save_dir, f"all slices take about {_size(n_bytes)}") from error
        raise SliceError(f"cannot write {error.filename or save_dir}: {error.strerror or error}") from error


def _disk_full(save_dir: Path, needed: str) -> SliceError:
    free = shutil.disk_usage(save_dir).free
    return SliceError(
        f"the disk of {save_dir} is full: {needed}, and {_size(free)} is free; "
        "make room or choose another place with --save_dir"
    )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"


def _joined(ratio: Iterable[float]) -> str:
    return ",".join(f"{share:g}" for share in ratio)
