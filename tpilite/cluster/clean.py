"""Slices that nobody needs any more: which they are, and their removal.

Of a model's slices in its own folder, those used last are needed; so are those used last of the cache. All
others can be made or fetched again. What a process works with is needed too. Slices that were brought to a
folder without weights, and those of other models in a `--save_dir`, are left alone.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tpilite.cluster.fetch import PART
from tpilite.cluster.splits import (
    LOCK_NAME,
    USED_NAME,
    FolderLock,
    folders_in,
    manifests_in,
    node_folders,
    take_both,
)
from tpilite.cluster.terms import MARK_NAME
from tpilite.errors import SliceError
from tpilite.weights.content import CONTENT_NAME
from tpilite.weights.slices import MANIFEST_NAME, TEMPORARY_NAME, Manifest, is_slice_file
from tpilite.weights.trust import VERIFIED_NAME


@dataclass(frozen=True)
class Unneeded:
    """A folder of slices that can go, what that brings, and why."""

    folder: Path
    nbytes: int
    reason: str

    def remove(self) -> bool:
        """Removes what is ours in it and gives whether it could: not if a process works with it by now."""
        making, used = FolderLock(self.folder, LOCK_NAME), FolderLock(self.folder, USED_NAME)
        try:
            with making, used:
                if not take_both(making, used):
                    return False
                for node in node_folders(self.folder):
                    for path in _files_of(node):
                        path.unlink()
                    _remove_if_empty(node)
                for name in (MARK_NAME, CONTENT_NAME, USED_NAME, LOCK_NAME):
                    (self.folder / name).unlink(missing_ok=True)
                _remove_if_empty(self.folder)
        except OSError as error:
            raise SliceError(f"cannot remove {error.filename or self.folder}: {error.strerror}") from error
        return True


def unneeded_of_model(save_dir: Path, origin: str | None, *, own: bool) -> Iterator[Unneeded]:
    """What is not needed in the folder for a model's slices.

    `origin` is the hash of the model's weights; None where there are none, and nothing can be made again.
    `own` says that the folder is for this model's slices alone.
    """
    folders = []
    for folder in folders_in(save_dir):
        found = manifests_in(folder)
        if not found or origin in {manifest.origin for manifest in found}:
            folders.append(folder)
        elif own and origin is not None and not _is_in_use(folder):
            yield _unneeded(folder, "made from other weights than those that the model has now")
    yield from _not_used_last(folders)


def unneeded_of_cache(cache: Path) -> Iterator[Unneeded]:
    """What is not needed in the user's cache: slices that a worker fetched, and those made there."""
    yield from _not_used_last(list(folders_in(cache / "slices"))[1:])
    yield from _not_used_last(
        [folder for save_dir in list(folders_in(cache / "split"))[1:] for folder in folders_in(save_dir)]
    )


def _not_used_last(folders: Iterable[Path]) -> Iterator[Unneeded]:
    """Those of some folders of slices that are unfinished, or not the ones that were used last."""
    whole = []
    for folder in folders:
        if manifests_in(folder):
            whole.append((_used_at(folder), folder))
        elif any(any(_files_of(node)) for node in node_folders(folder)) and not _is_in_use(folder):
            yield _unneeded(folder, "not finished")
    for used_at, folder in sorted(whole)[:-1]:
        if not _is_in_use(folder):
            day = time.strftime("%Y-%m-%d %H:%M", time.localtime(used_at))
            yield _unneeded(folder, f"{_made_for(manifests_in(folder)[0])}, last used {day}, others since")


def _unneeded(folder: Path, reason: str) -> Unneeded:
    n_bytes = sum(path.stat().st_size for node in node_folders(folder) for path in _files_of(node))
    return Unneeded(folder, n_bytes, reason)


def _made_for(manifest: Manifest) -> str:
    return f"made for {manifest.partition.world_size} ranks"


def _files_of(node: Path) -> list[Path]:
    """The files in a rank's folder that are ours, the manifest first: without it there is no slice."""
    found = []
    for path in sorted(node.iterdir(), key=lambda path: path.name != MANIFEST_NAME):
        name = path.name.removesuffix(PART)
        is_ours = is_slice_file(name) or name in (VERIFIED_NAME, TEMPORARY_NAME)
        if is_ours and path.is_file() and not path.is_symlink():
            found.append(path)
    return found


def _used_at(folder: Path) -> float:
    """When its slices were used last, or made where that is not known."""
    used = folder / USED_NAME
    paths = [used] if used.exists() else [node / MANIFEST_NAME for node in node_folders(folder)]
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def _is_in_use(folder: Path) -> bool:
    """Whether a process works with its slices, makes or removes them, or they cannot be removed anyway."""
    for name in (USED_NAME, LOCK_NAME):
        if (folder / name).exists():
            with FolderLock(folder, name) as lock:
                try:
                    if not lock.take():
                        return True
                except OSError:
                    return True
    return False


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it holds something that is not ours
        folder.rmdir()
