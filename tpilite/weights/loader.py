"""The threads that read paged weights, as the table of parts asks for them."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tpilite.closing import Closing
from tpilite.formats.stored import StoredFile
from tpilite.formats.uncached import UncachedFile, allocate
from tpilite.linear.packing import Packed, pack
from tpilite.weights.part_table import Load, PartTable, Purpose

# A second request is there when the first is done: threads that compute may let a reader wait for a core.
_MOST_THREADS = 2


class Loader(Closing):
    """Takes one load after the other from the table and gives each back read, until `close`.

    `n_threads` bounds the threads. Files are read by `read_method`, one of `formats.uncached.READ_METHODS`.
    """

    def __init__(self, table: PartTable, n_threads: int, read_method: str | None) -> None:
        self._table = table
        self._read_method = read_method
        self._lock = threading.Lock()  # guards all that follows
        self._files: dict[StoredFile, UncachedFile] = {}
        self._n_reading = 0
        self._reading_since_s = 0.0
        self.loads = self.read_bytes = 0
        self.load_s = 0.0  # that at least one thread was reading
        self._threads = [
            threading.Thread(target=self._run, name=f"pager-{i}", daemon=True)
            for i in range(min(_MOST_THREADS, n_threads))
        ]

    def start(self) -> None:
        """Begins to read."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Waits for its threads, which end when the table is closed, and closes their files."""
        for thread in self._threads:
            thread.join()
        for file in self._files.values():
            file.close()

    def _run(self) -> None:
        while (load := self._table.claim()) is not None:
            packed: Packed | None = None
            error: BaseException | None = None
            try:
                with self._counted():
                    self._read(load)
                if load.purpose is Purpose.PACK:
                    packed = pack(load.stored(), allocate(load.part.tensor.nbytes * 3 // 4))
            except BaseException as caught:  # carried to the pass, which raises it
                error = caught
            self._table.finish(load, packed, error)

    def _read(self, load: Load) -> None:
        tensor = load.part.tensor
        with self._lock:
            if tensor.file not in self._files:
                self._files[tensor.file] = UncachedFile(tensor.file, self._read_method)
            file = self._files[tensor.file]
        load.place = file.read(memoryview(load.buffer), tensor.offset, tensor.nbytes)
        with self._lock:
            self.read_bytes += tensor.nbytes

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Counts a load, and the time in which at least one part is being read."""
        self._count(+1)
        try:
            yield
        finally:
            self._count(-1)
            with self._lock:
                self.loads += 1

    def _count(self, change: int) -> None:
        with self._lock:
            now_s = time.perf_counter()
            if self._n_reading:
                self.load_s += now_s - self._reading_since_s
            self._n_reading += change
            self._reading_since_s = now_s
