"""Which slices are served, and what stands at each path."""

import hashlib
import io
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from tpilite.cluster.slice_protocol import etag_of, folder_path
from tpilite.errors import SliceError
from tpilite.weights.slices import MANIFEST_NAME, Manifest

_log = logging.getLogger(__name__)


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

    def __init__(self, folders: Mapping[int, Path | None]) -> None:
        self._lock = threading.Lock()
        self._content: dict[str, Content] = {}
        self._awaited = {folder_path(rank): (rank, folder) for rank, folder in folders.items()}

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
            others = {path: content for path, content in self._content.items() if _folder(path) != prefix}
            self._content = others | new
            self._awaited.pop(prefix, None)

    def find(self, path: str) -> Content | HTTPStatus:
        """The content at `path`, or the status that says why there is none."""
        with self._lock:
            if path in self._content:
                return self._content[path]
            rank, folder = self._awaited.get(_folder(path), (None, None))
        if rank is None:
            return HTTPStatus.NOT_FOUND
        if folder is None or not (folder / MANIFEST_NAME).exists():
            return HTTPStatus.SERVICE_UNAVAILABLE
        try:
            self.publish(rank, folder)
        except SliceError as error:
            _log.error("cannot serve the slices of rank %d: %s", rank, error)
            return HTTPStatus.INTERNAL_SERVER_ERROR
        with self._lock:
            return self._content.get(path, HTTPStatus.NOT_FOUND)


def _folder(path: str) -> str:
    return path[: path.rfind("/") + 1]
