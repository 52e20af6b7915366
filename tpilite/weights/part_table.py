"""The states of all paged parts, and their one owner: what is in memory, what is being read, what is next."""

import enum
import mmap
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from tpilite.formats.stored import StoredTensor
from tpilite.formats.uncached import allocate
from tpilite.linear.matrix import Blocks, Stored, Weights
from tpilite.linear.packing import Packed
from tpilite.weights.assemble import as_weights
from tpilite.weights.residency import (
    PagedPart,
    choose_evictions,
    choose_returns,
    choose_unpacking,
    spread,
)


class Purpose(enum.Enum):
    """What becomes of a part that is loaded."""

    STREAM = enum.auto()  # it is used in a slot of the window, which is free again after that
    PACK = enum.auto()  # it is read into a slot, and kept packed, in memory of its own
    KEEP = enum.auto()  # it is read into memory of its own, and kept as it is


@dataclass(eq=False)
class Load:
    """A part that is being read into a buffer, or is there."""

    part: PagedPart
    purpose: Purpose
    buffer: mmap.mmap
    place: int = 0  # where in the buffer the part begins
    done: bool = False
    opened: bool = False
    dropped: bool = False  # no longer in the queue
    error: BaseException | None = None

    def rows(self) -> Stored | Blocks:
        """The rows, once they are read."""
        return as_weights(self.part.tensor, self.stored())

    def stored(self) -> Stored:
        """What is stored of them."""
        tensor = self.part.tensor
        dtype = tensor.stored_dtype
        flat = np.frombuffer(self.buffer, dtype, tensor.nbytes // dtype.itemsize, self.place)
        flat.flags.writeable = False
        return flat.reshape(tensor.stored_shape)


class PartTable:
    """The parts in the order of use. It alone changes them, and it decides what is read next.

    The thread that makes the passes opens parts, and between passes says how much may be resident. The
    loader's threads `claim` loads and `finish` them. Parts are loaded in the order of use, round and round,
    as far as the window has free slots. Where a part is opened out of that order, what was read ahead is
    given up and loading goes on from that part. Errors are raised where the part is opened; opening it again
    tries again.
    """

    def __init__(self) -> None:
        self.parts: list[PagedPart] = []
        self.window_bytes = self.filled_bytes = 0  # of all slots, and of those that are in use
        self.wait_s = 0.0  # that `open` has waited
        self.used_s = 0.0  # when the last use of a part ended
        self._changed = threading.Condition()  # guards all of this; notified when it changes
        self._slot_bytes = 0
        self._free: list[mmap.mmap] = []
        self._queue: deque[Load] = deque()  # in the order of use; the first may be open
        self._next = 0
        self._evicted: list[PagedPart] = []
        self._skips_lm_head = self._closed = False

    # Before the first pass.

    def add(self, tensor: StoredTensor, of_lm_head: bool, may_pack: bool) -> PagedPart:
        """A new part, the last one in the order of use, that streams."""
        part = PagedPart(tensor, len(self.parts), of_lm_head, may_pack, self.open)
        self.parts.append(part)
        return part

    def map_all(self) -> None:
        """Makes every part resident as a memory map, which nobody has to read."""
        for part in self.parts:
            part.resident, part.array = True, as_weights(part.tensor, part.tensor.array())

    def keep_evenly(self, room: int) -> None:
        """Makes parts of up to `room` bytes resident, evenly among the others."""
        chosen = spread([part.kept_bytes for part in self.parts], room)
        for part, resident in zip(self.parts, chosen, strict=True):
            part.resident = resident

    def add_window(self, n_slots: int, slot_bytes: int) -> None:
        """The slots that parts are streamed through."""
        self.window_bytes, self._slot_bytes = n_slots * slot_bytes, slot_bytes
        self._free = [allocate(slot_bytes) for _ in range(n_slots)]

    # For the thread that makes the passes.

    def skip_lm_head(self, skips: bool) -> None:
        """Says whether the pass that begins leaves lm_head out."""
        with self._changed:
            self._skips_lm_head = skips
            self._changed.notify_all()

    def fit(self, room: int) -> list[PagedPart]:
        """Evicts resident parts, or lets evicted ones return, as `room` bytes allow; gives those evicted."""
        with self._changed:
            evicted = choose_evictions(self.parts, room)
            for part in evicted:
                self._evict(part)
            for part in choose_returns(self.parts, self._evicted, room):
                self._evicted.remove(part)
                part.resident = True
            self._changed.notify_all()
        return evicted

    def unpack_some(self, turn: int) -> None:
        """Evicts some of the packed parts, which return unpacked."""
        with self._changed:
            for part in choose_unpacking(self.parts, turn):
                part.may_pack = False
                self._evict(part)

    @contextmanager
    def open(self, part: PagedPart) -> Iterator[Weights]:
        """The rows of a part that is not in memory for good, waited for and there until the context ends."""
        found = self._wait_for(part)
        try:
            yield found.rows() if isinstance(found, Load) else found
        finally:
            self.used_s = time.perf_counter()
            if isinstance(found, Load):
                with self._changed:
                    self._queue.remove(found)
                    self._drop(found)

    def close(self) -> None:
        """Ends all waiting, and gives back the memory of all but what is being read."""
        with self._changed:
            self._closed = True
            while self._queue:
                self._drop(self._queue.popleft())
            self._free.clear()
            for part in self.parts:
                part.array = None
            self._changed.notify_all()

    # For the loader's threads.

    def claim(self) -> Load | None:
        """The next load, once there is room for it; None when the table is closed."""
        with self._changed:
            while not self._closed:
                load = self._plan()
                if load is not None:
                    self._queue.append(load)
                    return load
                self._changed.wait()
        return None

    def finish(self, load: Load, packed: Packed | None, error: BaseException | None) -> None:
        """Takes back a load that was read, `packed` if that was its purpose and worth it, or that failed."""
        part = load.part
        with self._changed:
            load.done, load.error = True, error
            if load.purpose is not Purpose.STREAM:
                part.loading = False
                if error is None and not self._closed:
                    self._keep(load, packed)
            # What is kept needs no place in the queue; what was evicted meanwhile gives back its own memory.
            leaves = part.array is not None or (load.purpose is Purpose.KEEP and error is None)
            if leaves and not load.dropped:
                self._queue.remove(load)
            if leaves or load.dropped:
                self._drop(load)
            self._changed.notify_all()

    # Under the lock.

    def _wait_for(self, part: PagedPart) -> Load | Weights:
        """The part's load once it is read, or its rows where they are kept."""
        start_s = time.perf_counter()
        with self._changed:
            assert self.window_bytes, "the pager was not started"
            assert not any(load.opened for load in self._queue), "one part is open at a time"
            # Reading ahead may have failed, or be about to, for a pass that has ended: it is tried again.
            ahead = [*self._queue]
            for failed in [load for load in ahead if load.error]:
                self._queue.remove(failed)
                self._drop(failed)
            try:
                while not self._closed:
                    if part.array is not None:
                        return part.array
                    load = self._first_for(part)
                    if load is not None and load.error is not None:
                        self._drop(self._queue.popleft())
                        if not any(load is other for other in ahead):
                            raise load.error
                        continue
                    if load is not None and load.done:
                        load.opened = True
                        return load
                    self._changed.wait()
                raise RuntimeError("a closed pager's part was opened")
            finally:
                self.wait_s += time.perf_counter() - start_s

    def _first_for(self, part: PagedPart) -> Load | None:
        """The part's load, now the first in the queue; where it has none, loading goes on from the part."""
        load = next((load for load in self._queue if load.part is part), None)
        if load is None and part.loading:  # its load was dropped, and yet brings it into memory
            return None
        while self._queue and self._queue[0] is not load:
            self._drop(self._queue.popleft())
        if load is None:
            self._next = part.index
            self._skips_lm_head &= not part.of_lm_head
            self._changed.notify_all()
        return load

    def _plan(self) -> Load | None:
        """A load of the next part that is to be read; None where there is none, or no room for it.

        Nor is anything read behind a part that failed, until a part is opened.
        """
        if any(load.error for load in self._queue):
            return None
        for _ in self.parts:
            part = self.parts[self._next]
            if part.array is None and not part.loading and not (part.of_lm_head and self._skips_lm_head):
                return self._load_of(part)
            self._next = (self._next + 1) % len(self.parts)
        return None

    def _load_of(self, part: PagedPart) -> Load | None:
        """A load of the next part; None while it needs a slot and none is free."""
        if part.resident and not part.may_pack:
            load = Load(part, Purpose.KEEP, allocate(part.buffer_bytes))
        elif self._free:
            load = Load(part, Purpose.PACK if part.resident else Purpose.STREAM, self._free.pop())
            self.filled_bytes += self._slot_bytes
        else:
            return None
        part.loading = part.resident
        self._next = (self._next + 1) % len(self.parts)
        return load

    def _keep(self, load: Load, packed: Packed | None) -> None:
        """Makes the loaded rows the part's own, unless it was evicted meanwhile."""
        part = load.part
        if load.purpose is Purpose.PACK and packed is None:  # as it is, it may need more room than there is
            part.may_pack = False
            if part.resident:
                self._evict(part)
        elif part.resident:
            part.array = packed if load.purpose is Purpose.PACK else load.rows()

    def _evict(self, part: PagedPart) -> None:
        part.resident, part.array = False, None
        self._evicted.append(part)

    def _drop(self, load: Load) -> None:
        """Frees the slot of a load that has left the queue; while it is being read, `finish` does that."""
        load.dropped = True
        if load.done and load.purpose is not Purpose.KEEP:
            self.filled_bytes -= self._slot_bytes
            if not self._closed:
                self._free.append(load.buffer)
            self._changed.notify_all()
