"""Which parts of the weights stay in memory: what a part is, and the choices as pure functions.

A matrix is cut into parts of some MiB: whole rows, so one range of a file. A part is *resident*, read once
and kept, or *streamed*, read anew in every pass. Resident parts lie evenly among streamed ones: while they
are used, the disk reads the next ones. They may be packed (`packing`), which is without loss: then a third
more of them fit. The states of the parts are changed by `part_table` alone.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from tpilite.formats.stored import StoredTensor
from tpilite.formats.uncached import buffer_bytes
from tpilite.linear.calls import part_rows
from tpilite.linear.matrix import Weights
from tpilite.linear.packing import ROWS, Packed, packed_bytes

# Where unpacking turns out to be slower than reading, one of so many packed parts is unpacked at a time.
_UNPACKED_OF = 8


@dataclass(eq=False)
class PagedPart:
    """Some rows of a matrix, resident or streamed."""

    tensor: StoredTensor
    index: int  # in the order of use
    of_lm_head: bool  # which a pass that wants no scores does not use
    may_pack: bool  # when it is resident
    open_loaded: "Callable[[PagedPart], AbstractContextManager[Weights]]" = field(repr=False)
    resident: bool = False
    loading: bool = False  # being read or packed to be kept, also when it was evicted meanwhile
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
        if self.array is None and self.may_pack:
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
        return self.open_loaded(self) if self.array is None else nullcontext(self.array)


def cut(tensor: StoredTensor, part_bytes: int) -> Iterator[StoredTensor]:
    """The matrix in parts of about equal size, at most `part_bytes` where rows allow it.

    They begin where NumPy's products may be cut, so that the sums' bits do not depend on paging.
    """
    n_rows, n_cols = tensor.shape
    unit = part_rows(n_cols)
    most = max(unit, part_bytes * n_rows // tensor.nbytes // unit * unit)
    n_parts = -(-n_rows // most)
    step = -(-n_rows // (n_parts * unit)) * unit
    for start in range(0, n_rows, step):
        yield tensor.rows(start, min(start + step, n_rows))


def can_pack(tensor: StoredTensor) -> bool:
    """Whether `packing` takes rows of this kind; whether it saves anything is known when it is tried."""
    return tensor.dtype == "BF16" and tensor.shape[0] % ROWS == 0


def spread(sizes: Sequence[int], room: int) -> list[bool]:
    """Which of the parts of these sizes are to be resident: up to `room` bytes, evenly among the others."""
    share = max(0, room) / sum(sizes)
    due, chosen = 0.0, []
    for size in sizes:
        due += share * size
        chosen.append(due >= size)
        if chosen[-1]:
            due -= size
    return chosen


def choose_evictions(parts: Sequence[PagedPart], room: int) -> list[PagedPart]:
    """The resident parts to evict, the first one first, for the others to fit into `room` bytes.

    The memory of one that is being loaded comes free later, too late for this pass.
    """
    resident = [part.resident for part in parts]
    taken = _taken_bytes(parts)
    chosen = []
    while taken > room and any(resident):
        part = parts[_farthest_from_streamed(resident)]
        resident[part.index] = False
        taken -= 0 if part.loading else part.kept_bytes
        chosen.append(part)
    return chosen


def choose_returns(parts: Sequence[PagedPart], evicted: Sequence[PagedPart], room: int) -> list[PagedPart]:
    """The evicted parts that fit into `room` bytes beside the resident ones, the last evicted first."""
    taken = _taken_bytes(parts)
    chosen = []
    for part in reversed(evicted):
        taken += 0 if part.loading else part.kept_bytes
        if taken > room:
            break
        chosen.append(part)
    return chosen


def choose_unpacking(parts: Sequence[PagedPart], turn: int) -> list[PagedPart]:
    """Some of the packed parts; none before all that is resident is in memory, or where nothing streams.

    Those that are mapped may be packed when they return, and are not yet: they have nothing to unpack.

    Which of them comes first changes with `turn`: the last ones return first once they are evicted, and it
    should not always be the first layers that stream.
    """
    resident = [part for part in parts if part.resident]
    if len(resident) == len(parts) or any(part.array is None for part in resident):
        return []
    some = [part for part in resident if isinstance(part.array, Packed)][::_UNPACKED_OF]
    first = turn % max(1, len(some))
    return some[first:] + some[:first]


def _taken_bytes(parts: Sequence[PagedPart]) -> int:
    """The memory of the resident parts, and of what was evicted while it was being loaded."""
    return sum(part.kept_bytes for part in parts if part.resident or part.loading)


def _farthest_from_streamed(resident: Sequence[bool]) -> int:
    """The resident part with the most parts, in the circle of passes, between it and any streamed one."""
    streamed = [i for i, is_resident in enumerate(resident) if not is_resident]

    def distance(i: int) -> int:
        at = bisect.bisect(streamed, i)
        before, after = streamed[at - 1], streamed[at % len(streamed)]
        return min((i - before) % len(resident), (after - i) % len(resident))

    candidates = [i for i, is_resident in enumerate(resident) if is_resident]
    return max(candidates, key=distance) if streamed else candidates[-1]
