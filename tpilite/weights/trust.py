"""What is known of files that were read to the last byte, so that the next start need not read them again.

A hash is trusted while the file is the one that was hashed: same device, inode, size, time of change (mtime)
and time of change of anything about it (ctime), both to the nanosecond. A program can set mtime back, but
not ctime. What a disk does to a file by itself changes none of them: only reading finds that (`--verify`).
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

VERIFIED_NAME = ".verified.json"

# Files are read, hashed and written by this much, while it is in the cache. It bounds the memory.
CHUNK_BYTES = 1 << 20

# Kernels tick at 100 Hz or more: two changes within a tick can bear the same ctime.
_TICK_NS = 20_000_000


class KnownHashes:
    """Hashes by name, kept in the file `path`; none is known where that is not there or `trust` is False."""

    def __init__(self, path: Path, *, trust: bool = True) -> None:
        self._path = path
        known: Any = None
        if trust:
            with suppress(OSError, ValueError, RecursionError):
                known = json.loads(path.read_bytes())
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}

    def get(self, name: str, state: list[int]) -> str | None:
        """The hash of a file, or of several, that are in this state; None where it is not known."""
        match self._known.get(name):
            case [known_state, str(found)] if known_state == state:
                return found
        return None

    def put(self, hashes: Mapping[str, tuple[list[int], str]]) -> None:
        """Keeps states and hashes by name. Where nothing can be written, nothing is known the next time."""
        self._known |= {name: list(found) for name, found in hashes.items()}
        new = self._path.with_name(self._path.name + ".part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(self._known))
            new.replace(self._path)
        except OSError as error:
            logger.debug("%s cannot be kept: %s", self._path, error)


def state_of(found: os.stat_result) -> list[int]:
    """What tells a file that was hashed from any other, and from itself after a change."""
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def settle(*found: os.stat_result) -> None:
    """Waits until a change of these files would show: not within the tick of their last one."""
    age_ns = time.time_ns() - max(stat.st_ctime_ns for stat in found)
    if 0 <= age_ns < _TICK_NS:
        time.sleep((_TICK_NS - age_ns) / 1e9)


def hash_file(path: Path, report: Callable[[int], object] | None = None) -> tuple[list[int], str]:
    """The state in which a file was hashed, and its sha256. `report` gets the bytes done."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        found = os.fstat(file.fileno())
        settle(found)
        while n_read := file.readinto(buffer):
            digest.update(buffer[:n_read])
            if report:
                report(file.tell())
    return state_of(found), digest.hexdigest()


class VerifiedFiles:
    """Which files of a folder are whole, each read once. Without `trust`, each is read again."""

    def __init__(self, folder: Path, *, trust: bool = True) -> None:
        self._folder, self._is_reading = folder, False
        self._known = KnownHashes(folder / VERIFIED_NAME, trust=trust)

    def is_whole(
        self, name: str, n_bytes: int, sha256: str, report: Callable[[int], object] | None = None
    ) -> bool:
        """Whether the file is there with these bytes; what cannot be read is not."""
        path = self._folder / name
        try:
            found = path.stat()
            if found.st_size != n_bytes:
                return False
            if self._known.get(name, state_of(found)) == sha256:
                return True
            if not self._is_reading:
                self._is_reading = True
                logger.info("checking the slices in %s", self._folder)
            state, hashed = hash_file(path, report)
        except OSError:
            return False
        if hashed == sha256:
            self._known.put({name: (state, hashed)})
        return hashed == sha256

    def add(self, hashes: Mapping[str, str]) -> None:
        """Keeps the sha256 of files that were just written, or read, by name."""
        with suppress(OSError):  # gone by now
            states = {name: state_of((self._folder / name).stat()) for name in hashes}
            self._known.put({name: (states[name], sha256) for name, sha256 in hashes.items()})
