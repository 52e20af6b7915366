"""The threads that bring paged weights into memory, in the order of their use, shortly before it."""

import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np

from tpilite.linear.linear import Stored, Weights
from tpilite.linear.packing import Packed, pack, packed_bytes
from tpilite.weights.tensor_file import StoredTensor, TensorFile
from tpilite.weights.uncached import UncachedFile, allocate, buffer_bytes

# A second request is there when the first is done: threads that compute may let a reader wait for a core.
_READERS = 2


@dataclass(eq=False)
class PagedPart:
    """Some rows of a matrix, kept or streamed as the pager decides."""

    tensor: StoredTensor
    index: int  # in the order of use
    in_head: bool  # of lm_head, which a pass that wants no scores does not use
    packs: bool  # when it is resident
    open_by: "Callable[[PagedPart], AbstractContextManager[Weights]]" = field(repr=False)
    resident: bool = False
    on_its_way: bool = False  # of a resident part: being read or packed
    array: Weights | None = field(default=None, repr=False)  # of a resident part, once it is in memory

    @property
    def n_rows(self) -> int:
        return self.tensor.shape[0]

    @property
    def buffer_bytes(self) -> int:
        return buffer_bytes(self.tensor.nbytes)

    @property
    def kept_bytes(self) -> int:
        """The memory of the part when it is resident; before it is packed, the most that this may take."""
        if isinstance(self.array, Packed):
            return self.array.nbytes
        if self.array is None and self.packs:
            return packed_bytes(*self.tensor.shape)
        return self.buffer_bytes

    @property
    def loaded_bytes(self) -> int:
        """The memory that it takes now, as a resident one."""
        if isinstance(self.array, Packed):
            return self.array.nbytes
        return 0 if self.array is None else self.tensor.nbytes

    def open(self) -> AbstractContextManager[Weights]:
        """The rows, there until the context ends. Raises `CheckpointError` where they cannot be read."""
        return nullcontext(self.array) if self.array is not None else self.open_by(self)


@dataclass(eq=False)
class _Load:
    """A part on its way into a buffer, or there."""

    part: PagedPart
    buffer: mmap.mmap
    in_slot: bool
    packs: bool = False  # into memory of its own; the buffer is a slot
    place: int = 0  # where in the buffer the part begins
    done: bool = False
    opened: bool = False
    dropped: bool = False  # nobody waits for it any more
    error: BaseException | None = None

    def rows(self) -> Stored:
        tensor = self.part.tensor
        dtype = tensor.stored_dtype
        flat = np.frombuffer(self.buffer, dtype, tensor.nbytes // dtype.itemsize, self.place)
        flat.flags.writeable = False
        return flat.reshape(tensor.shape)


class Loader:
    """The threads that read parts in the order of their use, round and round, as far as there is room.

    They guess that the parts are opened in that order. Where another one is opened, what was read ahead
    is given up and they go on from there. Errors are raised where the part is opened; opening it
    again tries again.
    """

    def __init__(
        self,
        parts: Sequence[PagedPart],
        n_slots: int,
        slot_bytes: int,
        lock: threading.Condition,
        way: str | None,
        gave_way: list[PagedPart],
    ) -> None:
        self._parts = parts
        self._gave_way = gave_way  # where parts go that were to be resident packed and cannot be
        self._changed = lock
        self._way = way
        self._opening = threading.Lock()
        self._files: dict[TensorFile, UncachedFile] = {}
        self._free = [allocate(slot_bytes) for _ in range(n_slots)]
        self._loads: deque[_Load] = deque()  # in the order of use; the first may be open
        self._n_reading = 0
        self._reading_since_s = 0.0
        self._next = 0
        self._skips_head = self._closed = False
        self.loads = self.read_bytes = self.slots_in_use = 0
        self.load_s = self.wait_s = 0.0
        self.used_s = 0.0  # when the last use of a part ended
        self._threads = [
            threading.Thread(target=self._run, name=f"pager-{i}", daemon=True)
            for i in range(min(_READERS, n_slots - 1))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._free.clear()
        self._loads.clear()
        self.slots_in_use = 0
        for part in self._parts:
            part.array = None
        for file in self._files.values():
            file.close()

    def skip_head(self, skips: bool) -> None:
        """Whether the pass that begins leaves lm_head out."""
        with self._changed:
            self._skips_head = skips
            self._changed.notify_all()

    @contextmanager
    def open(self, part: PagedPart) -> Iterator[Weights]:
        load = self._wait_for(part)
        try:
            if isinstance(load, _Load):
                load.opened = True
                yield load.rows()
            else:
                yield load
        finally:
            self.used_s = time.perf_counter()
            if isinstance(load, _Load):
                with self._changed:
                    self._loads.remove(load)
                    self._drop(load)

    def _wait_for(self, part: PagedPart) -> "_Load | Weights":
        start_s = time.perf_counter()
        with self._changed:
            assert not any(load.opened for load in self._loads), "one part is open at a time"
            while self._loads and self._loads[0].part is not part:
                self._drop(self._loads.popleft())
            if not self._loads:
                self._next = part.index
                self._skips_head &= not part.in_head
                self._changed.notify_all()
            try:
                while not self._closed:
                    if part.array is not None:
                        return part.array
                    load = self._loads[0] if self._loads else None
                    if load is not None and load.error is not None:
                        self._drop(self._loads.popleft())
                        raise load.error
                    if load is not None and load.done:
                        return load
                    self._changed.wait()
                raise RuntimeError("a closed pager's part was opened")
            finally:
                self.wait_s += time.perf_counter() - start_s

    def _drop(self, load: _Load) -> None:
        """Frees the slot of a load that has left the queue; where it is being read, its thread does that."""
        load.dropped = True
        if load.done and load.in_slot:
            self._free.append(load.buffer)
            self.slots_in_use -= 1
            self._changed.notify_all()

    def _run(self) -> None:
        while (load := self._begin()) is not None:
            tensor, packed = load.part.tensor, None
            try:
                try:
                    file = self._file(tensor.file)
                    load.place = file.read(memoryview(load.buffer), tensor.offset, tensor.nbytes)
                finally:
                    with self._changed:
                        self._count_reading(-1)
                if load.packs:
                    packed = pack(load.rows(), allocate(tensor.nbytes * 3 // 4))
            except BaseException as error:  # carried to the pass, which raises it
                load.error = error
            self._end(load, packed)

    def _begin(self) -> _Load | None:
        """The next load, once there is room for it; None at the end."""
        with self._changed:
            while not self._closed:
                load = self._plan()
                if load is not None:
                    self._loads.append(load)
                    self._count_reading(+1)
                    return load
                self._changed.wait()
        return None

    def _plan(self) -> _Load | None:
        if any(load.error for load in self._loads):
            return None
        for _ in self._parts:
            part = self._parts[self._next]
            if part.array is None and not part.on_its_way and not (part.in_head and self._skips_head):
                in_slot = part.packs or not part.resident
                if in_slot and not self._free:
                    return None
                self._next = (self._next + 1) % len(self._parts)
                part.on_its_way = part.resident
                if not in_slot:
                    return _Load(part, allocate(part.buffer_bytes), in_slot)
                self.slots_in_use += 1
                return _Load(part, self._free.pop(), in_slot, packs=part.resident)
            self._next = (self._next + 1) % len(self._parts)
        return None

    def _end(self, load: _Load, packed: Packed | None) -> None:
        part = load.part
        with self._changed:
            self.loads += 1
            load.done = True
            kept: Weights | None = packed
            if load.error is None:
                self.read_bytes += part.tensor.nbytes
                if not load.in_slot:
                    kept = load.rows()
                elif load.packs and packed is None:
                    part.packs = False
                    if part.resident:
                        part.resident = False
                        self._gave_way.append(part)
            if load.packs or not load.in_slot:
                part.on_its_way = False
                if part.resident:
                    part.array = kept
            # What has a place of its own is not waited for here; the rest is used where it is.
            if not load.dropped and (part.array is not None or (load.error is None and not load.in_slot)):
                self._loads.remove(load)
                load.dropped = True
            if load.dropped:
                self._drop(load)
            self._changed.notify_all()

    def _count_reading(self, change: int) -> None:
        """Keeps the time in which at least one part was being read."""
        now_s = time.perf_counter()
        if self._n_reading:
            self.load_s += now_s - self._reading_since_s
        self._n_reading += change
        self._reading_since_s = now_s

    def _file(self, file: TensorFile) -> UncachedFile:
        with self._opening:
            if file not in self._files:
                self._files[file] = UncachedFile(file, self._way)
            return self._files[file]
