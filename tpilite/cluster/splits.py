"""Slices for several partitions in one folder, side by side, and who uses which of them.

`save_dir` holds the slices of one model and partition as `node_{rank}`: those that were made there first, or
by `--split_bin`. Those of every other model or partition are beside them, as `{id}/node_{rank}`; the id is
made of the model's fingerprint and the ranks' counts. Slices that fit are used where they are. Where the
model in a folder has changed, the slices in its own `split` can never fit again: they are replaced.

Two lock files in a folder of slices keep processes of one machine apart, and end with their process:

    .used  shared, by everyone who works with slices of this folder; exclusive, by who removes them
    .lock  exclusive, by who makes slices here, or removes them; it holds the id of what is made

Nothing is removed without both of them, so nothing that a process works with.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tpilite.closing import Closing
from tpilite.cluster.terms import terms_of
from tpilite.errors import SliceError
from tpilite.machine import format_size
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.disk import write_error
from tpilite.weights.partition import Partition
from tpilite.weights.slicer import ensure_slices
from tpilite.weights.slices import NODE_NAME, Manifest, Progress, node_folder

logger = logging.getLogger(__name__)

USED_NAME, LOCK_NAME = ".used", ".lock"
_ID = re.compile(r"[0-9a-f]{16}")


def split_id(terms: Mapping[str, Any]) -> str:
    """The name of what a cluster agrees on: the model and its partition."""
    value = [terms.get("model"), terms.get("partition")]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def id_of(manifest: Manifest) -> str:
    """The name of the partition that a slice belongs to."""
    return split_id(terms_of(manifest.fingerprint, manifest.partition))


def folders_in(save_dir: Path) -> Iterator[Path]:
    """`save_dir` and the folders of slices beside those in it."""
    yield save_dir
    with contextlib.suppress(OSError):
        yield from sorted(
            path for path in save_dir.iterdir() if _ID.fullmatch(path.name) and not path.is_symlink()
        )


def node_folders(folder: Path) -> list[Path]:
    """The folders of single ranks' slices, whole or not."""
    with contextlib.suppress(OSError):
        paths = sorted(path for path in folder.iterdir() if NODE_NAME.fullmatch(path.name))
        return [path for path in paths if path.is_dir() and not path.is_symlink()]
    return []


def manifests_in(folder: Path) -> list[Manifest]:
    """What is known of the slices in a folder; what is unfinished or damaged is left out."""
    found = []
    for node in node_folders(folder):
        with contextlib.suppress(SliceError):
            found.append(Manifest.read(node))
    return found


def find_split(save_dir: Path, identity: str) -> Path:
    """Where in `save_dir` the slices of that id are: in itself or beside; itself where there are none."""
    beside = save_dir / identity
    fits = any(id_of(manifest) == identity for manifest in manifests_in(save_dir))
    return beside if beside.is_dir() and not fits else save_dir


class FolderLock(Closing):
    """One of the lock files of a folder, open."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / name
        self._fd: int | None = None

    def share(self) -> None:
        """Locks it together with others. Where nothing can be written, nothing can be removed either."""
        try:
            self._lock(fcntl.LOCK_SH)
            if self._fd is not None:
                os.utime(self._fd)  # tells `clean` when this was used last
        except OSError as error:
            logger.debug("%s cannot be locked: %s", self._path, error)

    def take(self) -> bool:
        """Locks it alone, if nobody else has it."""
        try:
            self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            return False
        return True

    def wait(self) -> None:
        """Locks it alone, as soon as nobody else has it."""
        if not self.take():
            logger.info("waiting for another process that makes slices in %s", self._path.parent)
            self._lock(fcntl.LOCK_EX)

    def read(self) -> str:
        """What the file holds, by whoever has it locked."""
        try:
            return self._path.read_text()
        except (OSError, UnicodeDecodeError):
            return ""

    def write(self, text: str) -> None:
        """Replaces what the file holds, while it is locked."""
        assert self._fd is not None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text.encode(), 0)

    def close(self) -> None:
        """Ends the lock, if there is one."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _lock(self, operation: int) -> None:
        while True:
            if self._fd is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._fd, operation)
            # Who had it before may have removed the file, which others then make and lock again.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._fd), self._path.stat()):
                    return
            self.close()


class Split(Closing):
    """The slices of one model and partition in `folder`, not removed by others until this is closed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._used, self._making = FolderLock(folder, USED_NAME), FolderLock(folder, LOCK_NAME)
        self._anew, self._why = False, ""

    @classmethod
    def using(cls, folder: Path, why: str = "") -> "Split":
        """Those that are or will be in a folder, for others to use as well; `why` says why it is that one."""
        split = cls(folder)
        split._used.share()
        split._why = why
        return split

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        partition: Partition,
        save_dir: Path,
        *,
        force: bool = False,
        replace: bool = False,
    ) -> "Split":
        """The place in `save_dir` for the slices of a partition, which `make` then fills.

        With `force` all are made anew. With `replace`, slices of another model give way to those of this
        one. Raises `SliceError` for a damaged manifest, and where slices in use would have to be removed.
        """
        identity = split_id(terms_of(checkpoint.fingerprint, partition))
        direct, beside = cls(save_dir), cls(save_dir / identity)
        with _write_errors(save_dir):
            if force:
                for split in (direct, beside):
                    if split._take(identity):
                        return split
                raise SliceError(
                    f"another process uses the slices in {beside.folder}: end it, then make them again"
                )
            misfit, is_other_model = _misfit(save_dir, checkpoint, partition)
            is_empty = not manifests_in(save_dir)
            if not is_empty and not misfit:
                return cls.using(save_dir)
            if node_folders(beside.folder):
                return cls.using(beside.folder)
            if (is_empty or (replace and is_other_model)) and direct._take(identity):
                direct._why = misfit and f"the slices in {save_dir} were {misfit}: they are made again"
                return direct
            if is_empty and direct._making.read() == identity:
                return cls.using(save_dir)
            misfit = misfit or "made for something else"
            return cls.using(
                beside.folder, f"the slices in {save_dir} were {misfit}: its own are made beside them"
            )

    def node(self, rank: int) -> Path:
        """The folder of a rank's slice."""
        return node_folder(self.folder, rank)

    def make(
        self,
        checkpoint: Checkpoint,
        partition: Partition,
        *,
        embedding: bool = True,
        verify: bool = False,
        progress: Progress | None = None,
    ) -> list[Manifest]:
        """The manifests of all ranks' slices, made where they are missing: see `ensure_slices`."""
        with _write_errors(self.folder):
            self._used.share()  # again, where the folder was removed meanwhile
            if not self._anew:
                self._making.wait()
            try:
                if self._why:
                    about = format_size(checkpoint.nbytes, fine=True)
                    logger.info("%s, which takes about %s of the disk", self._why, about)
                return ensure_slices(
                    checkpoint,
                    partition,
                    self.folder,
                    force=self._anew,
                    embedding=embedding,
                    verify=verify,
                    progress=progress,
                )
            finally:
                self._anew, self._why = False, ""
                self._making.close()

    def close(self) -> None:
        """Lets others remove these slices."""
        self._making.close()
        self._used.close()

    def _take(self, identity: str) -> bool:
        """Whether the folder was nobody's; then it is ours to fill anew, and ours to use."""
        if not take_both(self._making, self._used):
            return False
        self._used.share()  # while we have the other, nobody gets between
        self._making.write(identity)
        self._anew = True
        return True


def take_both(making: FolderLock, used: FolderLock) -> bool:
    """Whether nobody makes or uses slices in a folder; then both its locks are ours alone."""
    if making.take():
        if used.take():
            return True
        making.close()
    return False


def _misfit(save_dir: Path, checkpoint: Checkpoint, partition: Partition) -> tuple[str, bool]:
    """What the slices directly in a folder were made for instead, if so, and whether for another model."""
    for rank in range(partition.world_size):
        try:
            found = Manifest.find(node_folder(save_dir, rank))
        except SliceError as error:
            raise SliceError(f"{error}; --split_bin makes the slices again") from error
        if found is None:
            continue
        misfit = found.misfit(checkpoint, partition)
        if found.rank != rank:
            misfit = f"made for rank {found.rank} where those of rank {rank} belong"
        if misfit:
            return misfit, found.origin != checkpoint.origin
    return "", False


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(folder, error) from error
