"""A rank's slices, brought from the first machine and checked, whatever interrupts it.

What stands in the folder at any moment is enough to go on from: a file is under its own name only when its
sha256 was right and it is on the disk; until then it is NAME.part. `manifest.json` appears last, so a
folder that has it is whole; until then it is manifest.json.part, which says what the other .part files
are parts of. What is known to be whole (`trust`) is not read again.
"""

import contextlib
import fcntl
import hashlib
import http.client
import io
import itertools
import logging
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TypeVar

from tpilite.cluster.config import ClusterConfig
from tpilite.cluster.slice_client import SliceClient, Unreachable
from tpilite.cluster.slice_protocol import etag_of, folder_path
from tpilite.errors import PeerLost, SliceError
from tpilite.machine import format_size
from tpilite.weights.disk import free_bytes, full_error, is_full, sync_folder, write_durably, write_error
from tpilite.weights.slices import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    Progress,
    is_slice_file,
    node_folder,
    remove,
)
from tpilite.weights.trust import VerifiedFiles

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

PART = ".part"
# Large enough that a call costs nothing beside its bytes; it is also what a cut connection loses at most.
_BUFFER_BYTES = 256 * 1024
# Written pages go to the disk while the next bytes come in, so that the fsync at the end of a file finds
# little to do, and they leave the memory, which the model will want.
_WRITE_BACK_BYTES = 16 * 1024 * 1024
# A bad cable or memory module may damage a file once or twice; more often, it is the server's disk.
_MAX_DAMAGED = 3
# The model can be sliced anew while it is fetched, but hardly as often as this.
_MAX_CHANGES = 5
_FIRST_DELAY_S, _MAX_DELAY_S = 0.1, 5.0


def fetch_slices(
    host: str,
    port: int,
    rank: int,
    token: str,
    save_dir: Path,
    *,
    force: bool = False,
    verify: bool = False,
    served: bool = False,
    tls: ssl.SSLContext | None = None,
    progress: Progress | None = None,
    timeout_s: float = ClusterConfig.timeout_s,
    patience_s: float = 60.0,
) -> Path:
    """The folder save_dir/node_{rank} with exactly the slices that the server has for this rank.

    Only what is missing or differs is transferred; `force` transfers all, `verify` reads also what is known
    to be whole. Where the folder is the very one
    that the server has `served` from, it is waited for and checked, and nothing in it is replaced.
    `timeout_s` bounds each wait for the network, `patience_s` the time without any sign of the server,
    through retries, until `PeerLost`.
    A server that is still slicing is waited for as long as it says so.

    Raises `PeerLost` also for a server that has not proved the token or that another could have spoken
    for, `SliceError` for what is wrong with the slices or this disk.
    """
    folder = node_folder(save_dir, rank)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder), SliceClient(host, port, token, tls, timeout_s) as client:
            _Fetch(client, rank, folder, progress, patience_s, served, verify).run(force and not served)
    except OSError as error:
        raise write_error(folder, error) from error
    return folder


class _SlicesChanged(Exception):
    """The server has other slices than its manifest said when we asked."""


class _Fetch:
    """One run of `fetch_slices`. Every OSError that leaves it is the disk's."""

    def __init__(
        self,
        client: SliceClient,
        rank: int,
        folder: Path,
        progress: Progress | None,
        patience_s: float,
        served: bool,
        verify: bool,
    ) -> None:
        self._client, self._rank, self._folder, self._served = client, rank, folder, served
        self._progress, self._patience_s = progress, patience_s
        # One is received into while the other is hashed: without SHA instructions (Raspberry Pi 4) the two
        # one after the other would be slower than the wire.
        self._buffers = [memoryview(bytearray(_BUFFER_BYTES)) for _ in range(2)]
        self._hasher = ThreadPoolExecutor(1, "slice-hash")
        self._verified = VerifiedFiles(folder, trust=not verify)
        # Bytes of whole files, the same with what there is of the current one, and of all.
        self._done_bytes = self._reached_bytes = self._total_bytes = 0
        self._last_sign = time.monotonic()

    def run(self, force: bool) -> None:
        with self._hasher:
            try:
                self._run(force)
            except OSError as error:
                if not is_full(error):
                    raise
                raise self._no_room(self._total_bytes - self._reached_bytes) from error

    def _run(self, force: bool) -> None:
        if force:
            self._remove_all_but(set())
        for _ in range(_MAX_CHANGES):
            with contextlib.suppress(_SlicesChanged):
                self._fetch()
                return
            _log.warning("the slices of rank %d were made anew while they were fetched", self._rank)
        raise SliceError(
            f"the slices on {self._client.name} changed {_MAX_CHANGES} times while they were fetched; "
            "start again when the first machine has settled"
        )

    def _fetch(self) -> None:
        raw = self._patiently(self._get_manifest)
        manifest = Manifest.from_json(raw)
        if manifest.rank != self._rank:
            raise SliceError(
                f"{self._client.name} gave the manifest of rank {manifest.rank}, not {self._rank}"
            )
        files = manifest.files
        self._done_bytes, self._total_bytes = 0, manifest.nbytes
        final, unfinished = self._folder / MANIFEST_NAME, self._folder / (MANIFEST_NAME + PART)
        same = _content(final) == raw
        missing = {name: entry for name, entry in files.items() if not self._have(name, entry)}
        if same and not missing:
            self._report(0)
            return
        if self._served:
            raise SliceError(
                f"{', '.join(missing) or MANIFEST_NAME} in {self._folder}, from where rank 0 serves, is "
                "damaged; make the slices again with --split_bin on rank 0"
            )
        # From here until the end the folder is not whole, and says so before anything is removed from it.
        remove(final)
        keep = files.keys() - missing.keys()
        if _content(unfinished) == raw:
            keep |= {name + PART for name in (*missing, MANIFEST_NAME)}
        self._remove_all_but(keep)
        self._check_room(missing)
        write_durably(unfinished, raw)
        for name, entry in missing.items():
            self._download(name, entry)
            self._done_bytes += entry.size
        unfinished.replace(final)
        sync_folder(self._folder)
        self._report(0)

    def _patiently(self, step: Callable[[], _T]) -> _T:
        """What `step` gives, begun again whenever the connection is lost, until patience is."""
        delay_s, failed_at = _FIRST_DELAY_S, time.monotonic()
        self._last_sign = failed_at
        while True:
            try:
                return step()
            except PeerLost as lost:
                self._client.close()
                if self._last_sign > failed_at:
                    delay_s = _FIRST_DELAY_S
                failed_at = time.monotonic()
                if failed_at + delay_s - self._last_sign > self._patience_s:
                    of = f"of {self._total_bytes} " if self._total_bytes else ""
                    raise type(lost)(
                        f"lost {self._client.name} after {self._reached_bytes} {of}bytes of "
                        f"rank {self._rank}'s slices: {lost}; start again to go on from there"
                    ) from lost
                # Of several in a row the first is news; where a port is blocked, the worker tells it once.
                is_news = delay_s == _FIRST_DELAY_S and not isinstance(lost, Unreachable)
                _log.log(
                    logging.INFO if is_news else logging.DEBUG, "%s; trying again in %.1f s", lost, delay_s
                )
            time.sleep(delay_s)
            delay_s = min(delay_s * 2, _MAX_DELAY_S)

    def _get(self, name: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """The proven answer with the content, after waiting for slices that are not yet made."""
        path, delay_s = folder_path(self._rank) + name, 0.0
        while True:
            response = self._client.get(path, headers)
            status = response.status
            if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                return response
            self._client.read(response, 0)
            if status == HTTPStatus.NOT_FOUND and name != MANIFEST_NAME:
                raise _SlicesChanged
            if status == HTTPStatus.NOT_FOUND:
                raise SliceError(
                    f"{self._client.name} has no rank {self._rank}; is it one of its --world_size?"
                )
            if status != HTTPStatus.SERVICE_UNAVAILABLE:
                raise SliceError(f"{self._client.name} answers {status} for {path}; its own log says why")
            if not delay_s:
                _log.info("waiting for %s to make the slices of rank %d", self._client.name, self._rank)
            retry_after = response.getheader("Retry-After", "")
            asked_s = int(retry_after) if re.fullmatch("[0-9]{1,4}", retry_after) else 0
            # A small model is ready sooner than the server asks to wait.
            delay_s = min(max(2 * delay_s, _FIRST_DELAY_S), max(asked_s, _FIRST_DELAY_S), _MAX_DELAY_S)
            time.sleep(delay_s)
            self._last_sign = time.monotonic()

    def _get_manifest(self) -> bytes:
        response = self._get(MANIFEST_NAME, {})
        raw = self._client.read(response, MAX_MANIFEST_BYTES)
        if response.getheader("ETag") != etag_of(hashlib.sha256(raw).hexdigest()):
            raise PeerLost(f"the manifest from {self._client.name} is not the one that it vouches for")
        return raw

    def _download(self, name: str, entry: FileEntry) -> None:
        """Brings one file to its own name, from where its .part ends."""
        part = self._folder / (name + PART)
        for _ in range(_MAX_DAMAGED):
            with part.open("a+b", buffering=0) as file:
                digest = self._hash(file)
                if file.tell() < entry.size:
                    self._patiently(partial(self._receive, file, name, entry, digest))
                os.fsync(file.fileno())
            if digest.hexdigest() == entry.sha256:
                part.replace(self._folder / name)
                self._verified.add({name: entry.sha256})
                return
            part.unlink()
            _log.warning("%s came damaged from %s", name, self._client.name)
        raise SliceError(
            f"{name} came damaged from {self._client.name} {_MAX_DAMAGED} times: sha256 "
            f"{digest.hexdigest()} instead of {entry.sha256}; make the slices again there (--split_bin)"
        )

    def _receive(self, file: io.FileIO, name: str, entry: FileEntry, digest: "hashlib._Hash") -> None:
        """Appends to `file` and `digest` what is missing, as far as the connection holds."""
        n_have = file.tell()
        etag = etag_of(entry.sha256)
        headers = {"Range": f"bytes={n_have}-", "If-Range": etag} if n_have else {}
        response = self._get(name, headers)
        if response.getheader("ETag") != etag:
            self._client.close()
            raise _SlicesChanged
        expected = f"bytes {n_have}-{entry.size - 1}/{entry.size}" if n_have else None
        found = response.getheader("Content-Range")
        if found != expected or response.length != entry.size - n_have:
            raise PeerLost(
                f"{self._client.name} answers for {name} with {response.length} bytes, range {found}; "
                f"expected {entry.size - n_have} bytes, range {expected}"
            )
        n_written_back = n_have
        hashed = self._hasher.submit(digest.update, b"")
        try:
            for buffer in itertools.cycle(self._buffers):
                if n_have == entry.size:
                    break
                n = self._client.read_into(response, buffer[: entry.size - n_have])
                packet = buffer[:n]
                hashed.result()
                hashed = self._hasher.submit(digest.update, packet)
                while packet:
                    packet = packet[file.write(packet) :]
                n_have += n
                self._last_sign = time.monotonic()
                self._report(n_have)
                if n_have - n_written_back >= _WRITE_BACK_BYTES and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    n_written_back = n_have
        finally:
            hashed.result()

    def _hash(self, file: io.FileIO) -> "hashlib._Hash":
        """The sha256 of all that `file` has; leaves it at its end."""
        digest = hashlib.sha256()
        file.seek(0)
        buffer = self._buffers[0]
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
            self._report(file.tell())
        return digest

    def _have(self, name: str, entry: FileEntry) -> bool:
        """Whether the file is here already, right to the last bit."""
        have = self._verified.is_whole(name, entry.size, entry.sha256, self._report)
        if not have and (self._folder / name).exists():
            _log.warning("%s differs from what %s has", self._folder / name, self._client.name)
        self._done_bytes += entry.size if have else 0
        return have

    def _remove_all_but(self, keep: Set[str]) -> None:
        """Removes slices of ours, whole or in part; what others put into the folder stays."""
        for path in list(self._folder.iterdir()):
            name = path.name.removesuffix(PART)
            if path.name not in keep and is_slice_file(name):
                remove(path)

    def _check_room(self, missing: Mapping[str, FileEntry]) -> None:
        needed = sum(entry.size for entry in missing.values())
        for name in missing:
            with contextlib.suppress(FileNotFoundError):
                needed -= (self._folder / (name + PART)).stat().st_size
        if needed > free_bytes(self._folder):
            raise self._no_room(needed)

    def _no_room(self, needed_bytes: int) -> SliceError:
        needed = format_size(needed_bytes, fine=True)
        return full_error(self._folder, f"the slices of rank {self._rank} take {needed} more")

    def _report(self, n_in_file: int) -> None:
        self._reached_bytes = self._done_bytes + n_in_file
        if self._progress is not None:
            self._progress(self._reached_bytes, self._total_bytes)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a second process from writing the same files. The lock ends with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SliceError(
                f"another process is fetching slices into {folder}; wait for it or stop it"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:  # it is missing, or nothing that we could go on from
        return None
