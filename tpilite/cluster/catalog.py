"""Which slices are served, and what stands at each path."""

import hashlib
import io
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from tpilite.cluster.slice_protocol import etag_of, folder_path
from tpilite.errors import SliceError
from tpilite.weights.slices import MANIFEST_NAME, Manifest


@dataclass(frozen=True)
class Content:
    """What stands at one path: a file's range of bytes, or bytes."""

    size: int
    sha256: str
    source: Path | bytes

    @property
    def etag(self) -> str:
        """What stands for these bytes and no others."""
        return etag_of(self.sha256)

    def open(self) -> io.FileIO | io.BytesIO:
        """The bytes as a file. Raises `SliceError` where it has not as many as it should."""
        if isinstance(self.source, bytes):
            return io.BytesIO(self.source)
        file = self.source.open("rb", buffering=0)
        size = os.fstat(file.fileno()).st_size
        if size != self.size:
            file.close()
            raise SliceError(f"{self.source} has {size} bytes, its manifest says {self.size}; slice again")
        return file


class Catalog:
    """Content by path. A path from the network is a dictionary's key here and never names a file."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self._lock = threading.Lock()
        self._ranks = {folder_path(rank): rank for rank in ranks}
        self._content: dict[str, dict[str, Content]] = {}  # by the rank's path, then by the whole one
        self.lost: set[int] = set()  # ranks whose slices cannot be read any more

    def publish(self, rank: int, folder: Path) -> None:
        """Has `folder` as that rank's from now on, in place of what was. Raises `SliceError`."""
        manifest = Manifest.read(folder)
        if manifest.rank != rank:
            raise SliceError(f"{folder} holds the slices of rank {manifest.rank}; expected rank {rank}")
        prefix, raw = folder_path(rank), manifest.to_json()
        new = {prefix + MANIFEST_NAME: Content(len(raw), hashlib.sha256(raw).hexdigest(), raw)}
        for name, entry in manifest.files.items():
            new[prefix + name] = Content(entry.size, entry.sha256, folder / name)
        with self._lock:
            self._content[prefix], self._ranks[prefix] = new, rank
            self.lost.discard(rank)

    def find(self, path: str) -> Content | HTTPStatus:
        """The content at `path`, or the status that says why there is none."""
        prefix = path[: path.rfind("/") + 1]
        with self._lock:
            if prefix in self._content:
                return self._content[prefix].get(path, HTTPStatus.NOT_FOUND)
            return HTTPStatus.SERVICE_UNAVAILABLE if prefix in self._ranks else HTTPStatus.NOT_FOUND

    def lose(self, path: str) -> None:
        """Has the slices that `path` belongs to awaited again, until they are published anew."""
        prefix = path[: path.rfind("/") + 1]
        with self._lock:
            if self._content.pop(prefix, None) is not None:
                self.lost.add(self._ranks[prefix])
