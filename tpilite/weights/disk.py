"""What a file needs to be on the disk for sure, and the one error for a disk that is full."""

import errno
import os
import shutil
from pathlib import Path

from tpilite.errors import SliceError
from tpilite.machine import format_size


def sync_folder(folder: Path) -> None:
    """Makes the names of a folder's files reach the disk, as fsync does for what is in them."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file whose content is on the disk then; its name is so only after `sync_folder`."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def is_full(error: OSError) -> bool:
    """Whether the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def free_bytes(folder: Path) -> int:
    """The room on the disk of a folder."""
    return shutil.disk_usage(folder).free


def full_error(folder: Path, needed: str) -> SliceError:
    """The error that says what was `needed` on the disk of a folder, and what there is."""
    return SliceError(
        f"the disk of {folder} is full: {needed}, and {format_size(free_bytes(folder), fine=True)} is free; "
        "make room or choose another place with --save_dir (--clean shows slices that are not needed)"
    )


def write_error(folder: Path, error: OSError) -> SliceError:
    """The error for what cannot be written into a folder of slices for another reason than its room."""
    return SliceError(
        f"cannot write {error.filename or folder}: {error.strerror or error}; "
        "choose another place with --save_dir"
    )
