"""The slices of a model: for each rank a folder `node_{rank}` with the part of every tensor that it owns.

Format, versions 1 and 2. The folder holds `manifest.json` and one safetensors file per block:

    embed.safetensors            the embedding: rank 0's alone, and left out where it is read elsewhere
    layers.{i}.attn.safetensors  attention of layer i, with its input_layernorm
    layers.{i}.mlp.safetensors   feed-forward of layer i, with its post_attention_layernorm
    head.safetensors             the rank's rows of lm_head, with the final norm

Tensors keep Hugging Face's names and the checkpoint's dtype; their shapes are those of the rank's part
(`partition`). A rank without KV heads has tensors of no elements there. In each file the matrices come
first and begin at a multiple of `formats.safetensors.DATA_ALIGNMENT`.

Tensors of block types keep their blocks as they are: as bytes, dtype `U8` and shape [rows, bytes of a row],
with the block type and the number of weights in a row in the file's `__metadata__` under the tensor's name
("Q4_K 2048": see `formats.safetensors`). Where a rank's columns begin or end inside a block, the slice has
the whole block; which of its columns are the rank's follows from the partition (`partition.held`).

The manifest is one JSON object of exactly these keys:

    format       "tpilite slice"
    version      2 where a tensor is of a block type, or the config has fields that version 1 does not;
                 else 1, which earlier programs read as well
    rank         whose folder this is
    partition    `Partition.to_dict()`; its counts also say how many ranks there are
    fingerprint  `Checkpoint.fingerprint` of the model that was sliced, 64 hexadecimal digits
                 (of slices that earlier versions made: `Checkpoint.sampled_fingerprint`)
    config       `LlamaConfig.to_dict()`: version 1 has the first 16 fields, version 2 also those of the
                 others that are not as a Llama has them
    files        for each file of the folder its "size" in bytes and its "sha256"
    quantized    in version 2 and only where the model was quantized: `Quantized.to_dict()`

A folder is a slice once its manifest is there. The manifest is written last, by renaming, after everything
that it names has reached the disk; and it is removed first when a slice is made anew. What a killed
process left behind is therefore never taken for a slice, and the next one starts over it.

Beside these, `.verified.json` says which files were read and found right (`trust`). It is no part of a slice.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tpilite.closing import Closing
from tpilite.config.llama import LlamaConfig
from tpilite.dtypes import BLOCK_SIZES, DTYPES, block_size
from tpilite.errors import CheckpointError, ConfigError, SliceError
from tpilite.formats.safetensors import TensorFile
from tpilite.formats.stored import StoredTensor
from tpilite.quantize.recipe import Quantized
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.disk import sync_folder
from tpilite.weights.partition import (
    EMBEDDING,
    EMBEDDING_AXES,
    LM_HEAD_AXES,
    Partition,
    attention_axes,
    held,
    mlp_axes,
)
from tpilite.weights.trust import VERIFIED_NAME, VerifiedFiles

MANIFEST_NAME = "manifest.json"

# A manifest takes some 130 bytes per file; a model of 126 layers (Llama 3.1 405B) has 254 files per rank.
MAX_MANIFEST_BYTES = 1 << 20

# Far above any block, and below where file offsets overflow.
_MAX_FILE_BYTES = 1 << 48

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_AGAIN = "make it again with --split_bin or download it again with --force_download"
_FORMAT, _VERSIONS = "tpilite slice", (1, 2)
_N_FIRST_FIELDS = 16  # of the configuration, in version 1
TEMPORARY_NAME = MANIFEST_NAME + ".tmp"
EMBED_FILE, _HEAD_FILE = "embed.safetensors", "head.safetensors"
_BLOCK_FILE = re.compile(r"(embed|head|layers\.(0|[1-9][0-9]{0,5})\.(attn|mlp))\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
NODE_NAME = re.compile(r"node_(0|[1-9][0-9]{0,5})")


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
    version: int = _VERSIONS[0]
    quantized: Quantized | None = None

    @property
    def origin(self) -> str:
        """The fingerprint of the model as its files hold it, whether it was quantized or not."""
        return self.quantized.of if self.quantized else self.fingerprint

    @property
    def nbytes(self) -> int:
        return sum(entry.size for entry in self.files.values())

    def to_json(self) -> bytes:
        value = {
            "format": _FORMAT,
            "version": self.version,
            "rank": self.rank,
            "partition": self.partition.to_dict(),
            "fingerprint": self.fingerprint,
            "config": self.config.to_dict(),
            "files": {name: asdict(entry) for name, entry in self.files.items()},
        }
        if self.quantized is not None:
            value["quantized"] = self.quantized.to_dict()
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
        version = value.get("version")
        if type(version) is not int or version not in _VERSIONS:
            raise SliceError(
                f"the manifest is of version {version!r:.40}; expected 1 or 2: "
                "use the same version of tpilite everywhere"
            )
        keys = {"format", "version", "rank", "partition", "fingerprint", "config", "files"}
        if set(value) - ({"quantized"} if version > 1 else set()) != keys:
            raise SliceError(f"the manifest must have exactly the keys {', '.join(sorted(keys))}")
        config = _config(value["config"])
        try:
            partition = Partition.from_dict(value["partition"])
            partition.check(config)
        except ConfigError as error:
            raise SliceError(f"the manifest's partition is wrong: {error}") from error
        try:
            quantized = Quantized.from_dict(value["quantized"]) if "quantized" in value else None
        except ConfigError as error:
            raise SliceError(f"the manifest's quantized is wrong: {error}") from error
        rank = value["rank"]
        if type(rank) is not int or not 0 <= rank < partition.world_size:
            raise SliceError(
                f"the manifest has rank {rank!r:.40}; expected one of {partition.world_size} ranks from 0"
            )
        if not _is_sha256(value["fingerprint"]):
            raise SliceError(f"the manifest has fingerprint {value['fingerprint']!r:.80}; expected 64 digits")
        files = _files(value["files"], config, rank)
        return cls(rank, partition, value["fingerprint"], config, files, version, quantized)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a slice folder. Raises `SliceError` when there is none or it is damaged."""
        found = cls.find(folder)
        if found is None:
            raise SliceError(
                f"{folder} is not a complete slice: it has no {MANIFEST_NAME}; make or download it again"
            )
        return found

    @classmethod
    def find(cls, folder: Path) -> "Manifest | None":
        """The manifest of a slice folder, if there is one. Raises `SliceError` when it is damaged."""
        path = folder / MANIFEST_NAME
        try:
            with open(path, "rb") as file:
                raw = file.read(MAX_MANIFEST_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise SliceError(f"{path} cannot be read: {error.strerror}; it is damaged") from error
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
        how = [one.how if one else "without --quantize" for one in (self.quantized, checkpoint.quantized)]
        if how[0] != how[1] and self.origin == checkpoint.origin:
            return f"made {how[0]}, and this start is {how[1]}"
        if found != asked:
            return f"made for the ratio {_joined(found.ratio)}, and this start is for {_joined(asked.ratio)}"
        if self.fingerprint == checkpoint.fingerprint:
            return None
        if self.fingerprint == checkpoint.sampled_fingerprint:
            return "made by an earlier version, which did not look at all of the weights"
        return f"made from other weights than those in {checkpoint.path}"

    def damaged_files(
        self, folder: Path, progress: Progress | None = None, *, trust: bool = True
    ) -> Iterator[str]:
        """The files that are not whole; `trust`: those that are known to be whole are not read again."""
        verified, n_done = VerifiedFiles(folder, trust=trust), 0
        for name, entry in self.files.items():

            def report(n_read: int, before: int = n_done) -> None:
                if progress:
                    progress(before + n_read, self.nbytes)

            if not verified.is_whole(name, entry.size, entry.sha256, report):
                yield name
            n_done += entry.size


def node_folder(save_dir: Path, rank: int) -> Path:
    """Where a rank's slice stands in the folder of all of them."""
    return save_dir / f"node_{rank}"


class SliceFolder(Closing):
    """One rank's slice, opened: what `Checkpoint` is for a whole model. Raises `SliceError`.

    `tensors` has Hugging Face's names; the shapes are those of the rank's part. The sizes of all files are
    checked against the manifest; their content by `verify`.
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

    def verify(self, progress: Progress | None = None, *, trust: bool = False) -> None:
        """Raises `SliceError` for the first file whose sha256 is not the manifest's: see `damaged_files`."""
        for name in self.manifest.damaged_files(self.folder, progress, trust=trust):
            raise SliceError(f"{self.folder / name} is damaged: its sha256 is not the manifest's; {_AGAIN}")

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
                    f"{file.path} has {file.nbytes} bytes; the manifest expects {entry.size}: {_AGAIN}"
                )
            tensors |= file.tensors
        expected = self.partition.shards(self.config, self.rank)
        if EMBED_FILE not in self.manifest.files:
            expected.pop(EMBEDDING, None)
        return {name: self._own(name, tensors.get(name), shard) for name, shard in expected.items()}

    def _own(self, name: str, found: StoredTensor | None, shard: tuple[range, ...]) -> StoredTensor:
        """A tensor that is to be a rank's part; of blocks, with the columns of them that are the rank's."""
        is_known = found is not None and (found.dtype in DTYPES or found.dtype in BLOCK_SIZES)
        stored = held(shard, block_size(found.dtype).n_weights) if found and is_known else shard
        shape = tuple(map(len, stored))
        if found is None or not is_known or found.shape != shape:
            is_there = f"{found.dtype} {list(found.shape)}" if found else "nothing"
            raise SliceError(
                f"{self.folder} holds {is_there} as {name}; its manifest implies the shape "
                f"{list(shape)}: make the slices again with --split_bin"
            )
        if stored == shard:
            return found
        first = shard[1].start - stored[1].start
        return replace(found, columns=range(first, first + len(shard[1])))


def version_for(config: LlamaConfig, tensors: Iterable[StoredTensor]) -> int:
    """The version of the format that a model's slices need."""
    has_blocks = any(tensor.dtype in BLOCK_SIZES for tensor in tensors)
    return 2 if has_blocks or len(config.to_dict()) > _N_FIRST_FIELDS else 1


def block_files(config: LlamaConfig) -> Iterator[tuple[str, Iterable[str]]]:
    """The files of a complete slice and the tensors of each, in the order in which a pass uses them."""
    yield EMBED_FILE, EMBEDDING_AXES
    for layer in range(config.num_hidden_layers):
        yield f"layers.{layer}.attn.safetensors", attention_axes(config, layer)
        yield f"layers.{layer}.mlp.safetensors", mlp_axes(config, layer)
    yield _HEAD_FILE, LM_HEAD_AXES


def _files(value: Any, config: LlamaConfig, rank: int) -> dict[str, FileEntry]:
    if not isinstance(value, dict):
        raise SliceError(f"the manifest's files must be an object, found {value!r:.40}")
    files = {}
    for name, entry in value.items():
        # These become paths, on a peer's word.
        if not _BLOCK_FILE.fullmatch(name) or (name == EMBED_FILE and rank):
            raise SliceError(f"the manifest names the file {name!r:.80}, which no slice of rank {rank} has")
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            raise SliceError(f"the manifest must give exactly size and sha256 of {name}")
        size, sha256 = entry["size"], entry["sha256"]
        if type(size) is not int or not 0 <= size <= _MAX_FILE_BYTES or not _is_sha256(sha256):
            raise SliceError(f"the manifest gives {name} size {size!r:.40} and sha256 {sha256!r:.80}")
        files[name] = FileEntry(size, sha256)
    # Counted before the names are made: their number is the peer's word too.
    if len(files.keys() - {EMBED_FILE}) != 2 * config.num_hidden_layers + 1:
        raise SliceError(
            f"the manifest names {len(files)} files; a slice of {config.num_hidden_layers} layers has "
            f"{2 * config.num_hidden_layers + 1}, and rank 0 may have {EMBED_FILE}"
        )
    for name, _ in block_files(config):
        if name not in files and name != EMBED_FILE:
            raise SliceError(f"the manifest does not name {name}, which every slice has")
    return files


def _config(value: Any) -> LlamaConfig:
    try:
        return LlamaConfig.from_dict(dict(value))
    except (ConfigError, TypeError, ValueError) as error:
        raise SliceError(f"the manifest's config is wrong: {error}") from error


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def clear_slice(folder: Path) -> None:
    """Removes the files of a slice, whole or half made, the manifest first: without it there is no slice."""
    remove(folder / MANIFEST_NAME)
    sync_folder(folder)
    for path in list(folder.iterdir()):
        if path.name in (TEMPORARY_NAME, VERIFIED_NAME) or is_slice_file(path.name):
            remove(path)


def remove(path: Path) -> None:
    """Removes a file of a slice, or a folder that stands in its place, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_slice_file(name: str) -> bool:
    """Whether a file of a slice folder can have this name: the manifest, or a block of the model."""
    return name == MANIFEST_NAME or _BLOCK_FILE.fullmatch(name) is not None


def _joined(ratio: Iterable[float]) -> str:
    return ",".join(f"{share:g}" for share in ratio)
