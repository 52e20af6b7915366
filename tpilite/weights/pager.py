"""The memory window: weights that do not fit into memory come from the disk, just in time, in every pass.

Each matrix is cut into parts of some MiB: whole rows, so one range of a file. A part is *resident*, read
once and kept; or it is *streamed*: a thread reads it into a slot of the window shortly before its use, and
the slot is free again right after it. Parts are used in the same order in every pass, so the reading runs
ahead of the pass, and across its end into the next one, as far as there are free slots: that is `loader`'s.
Here it is decided which parts are resident. They lie spread evenly among streamed ones: while they are used,
the disk fills the window. They are kept packed where that is without loss (`packing`): a third more of them,
and so much less to read in every pass.

Memory is bounded by a budget for the whole process, of which the weights get what the rest leaves: the
interpreter and its libraries (measured), the arrays of a pass (by its rows), the caches, the window. When
these grow, resident parts give way one by one; when they shrink, the parts come back. Where everything
fits there is no window and nothing is read: the files are mapped, and the kernel keeps them.
"""

import bisect
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tpilite.arrays import Array
from tpilite.closing import Closing
from tpilite.config import LlamaConfig
from tpilite.errors import ConfigError
from tpilite.linear.linear import Matrix, Weights, block_rows
from tpilite.linear.packing import ROWS
from tpilite.machine import format_size, rss_bytes, spare_bytes
from tpilite.weights.assemble import assemble, mapped
from tpilite.weights.part_table import Loader, PagedPart
from tpilite.weights.partition import EMBEDDING, LM_HEAD
from tpilite.weights.tensor_file import StoredTensor

# Larger reads are no faster, smaller ones leave the disk idle in between: benchmarks/paging.py measures it.
# A part should also be small beside the budget, so that little of that is lost to the window.
PART_BYTES = 16 << 20
_MIN_PART_BYTES = 1 << 20
_PARTS_PER_BUDGET = 32

# One part in use, one being read, and two with which the disk goes on while resident parts are used.
_WINDOW = 4
MIN_WINDOW = 2

# Where the disk idles for more than this share of a decoding pass, unpacking takes longer than the reading
# that it saves: of that many packed parts one is unpacked, pass by pass, until both take as long.
_IDLE_SHARE = 0.1
_UNPACKED_OF = 8
_TELLING_S = 0.05  # passes that are shorter tell nothing

# The page cache is used where it has room for so many times the weights: there may be other ranks here.
_CACHED_TIMES = 4
_CACHED = "plain"

# What a pass takes besides arrays of its rows: tiles of attention scores and what softmax makes of them,
# the threads' and the BLAS's own memory.
_FIXED_WORK_BYTES = 40 << 20
_ROWS_OF_SCORES = 8


@dataclass(frozen=True)
class PagerUsage:
    """What paging holds now and has done so far. Seconds and counts are since the start."""

    budget_bytes: int | None
    window_bytes: int  # the slots, full or not
    resident_bytes: int  # as they are stored
    streaming_bytes: int  # what a pass has to read
    kept_bytes: int  # the memory of the resident parts: less than they are stored in, where they are packed
    cache_bytes: int
    loaded_bytes: int  # of that memory, what is full by now
    filled_bytes: int  # of the window, by now
    passes: int
    loads: int
    read_bytes: int
    load_s: float  # that the disk was being read
    load_wait_s: float  # that passes waited for it

    @property
    def overlap(self) -> float:
        """The share of the reading that went on behind the computing, 0 to 1."""
        return max(0.0, 1 - self.load_wait_s / self.load_s) if self.load_s else 0.0

    def __str__(self) -> str:
        text = "" if self.budget_bytes is None else f"memory budget {format_size(self.budget_bytes)}, "
        text += f"weights {format_size(self.resident_bytes)} resident"
        if self.kept_bytes < self.resident_bytes:
            text += f" (packed into {format_size(self.kept_bytes)})"
        if not self.streaming_bytes:
            return text
        return (
            f"{text} and {format_size(self.streaming_bytes)} streaming, {format_size(self.read_bytes)} read "
            f"in {self.passes} passes, waited {self.load_wait_s:.2f} s of {self.load_s:.2f} s of reading "
            f"(overlap {self.overlap:.0%})"
        )


class Pager(Closing):
    """The `weights` that `tensors` make, within a budget or a window; closed by `with`.

    `budget_bytes` bounds the memory of the process. `window` keeps at most so many blocks (which are parts)
    in memory, and none of them longer than for its use. With neither, everything is mapped and left to the
    kernel. The thread that makes the passes calls `begin_pass` before each.

    `max_rows` is the most rows of a pass. `base_bytes` is what the process needs besides weights, caches
    and the arrays of a pass; None measures it, here and before every pass. `way` is one of `uncached.WAYS`.
    `packs` is whether resident bfloat16 may be packed.
    Raises `ConfigError` where the budget is too small, and says what is needed.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        config: LlamaConfig,
        *,
        budget_bytes: int | None = None,
        window: int | None = None,
        max_rows: int = 1,
        base_bytes: int | None = None,
        part_bytes: int = PART_BYTES,
        way: str | None = None,
        packs: bool = True,
    ) -> None:
        if window is not None and (type(window) is not int or window < MIN_WINDOW):
            raise ConfigError(f"the memory window must be at least {MIN_WINDOW} blocks, found {window!r}")
        self.budget_bytes = budget_bytes
        self._max_rows = max_rows
        self._measures_base = base_bytes is None
        self._base = rss_bytes() if base_bytes is None else base_bytes
        self._work_bytes = _work_bytes(tensors, config)
        self._cache_bytes = self._passes = 0
        self._files = {tensor.file.path: tensor.file for tensor in tensors.values()}
        self._gave_way: list[PagedPart] = []
        self._before = (0, 0.0, 0.0)  # of the pass before: its rows, when it began, the reading until then
        self._loader: Loader | None = None
        self._lock = threading.Condition()  # guards what the parts are; notified when that changes
        self._parts: list[PagedPart] = []

        matrices = [t for name, t in tensors.items() if len(t.shape) == 2 and name != EMBEDDING]
        self._way = way or _way(sum(tensor.nbytes for tensor in matrices))
        packs = packs and self._way != _CACHED  # from there, reading is as fast as unpacking
        room = None if budget_bytes is None else budget_bytes - self._base - self._work_bytes(max_rows)
        self._maps = window is None and (room is None or sum(t.nbytes for t in matrices) <= room)
        if room is not None and not self._maps:
            part_bytes = min(part_bytes, max(_MIN_PART_BYTES, room // _PARTS_PER_BUDGET))
        head = tensors[LM_HEAD]

        def matrix_of(tensor: StoredTensor, bias: Array | None) -> Matrix:
            if not tensor.nbytes:  # of a rank without heads
                return mapped(tensor, bias)
            first = len(self._parts)
            parts = tuple(
                PagedPart(rows, first + i, tensor is head, packs and _packable(rows), self._open)
                for i, rows in enumerate(_cut(tensor, part_bytes))
            )
            self._parts.extend(parts)
            return Matrix(tensor.shape[0], tensor.shape[1], parts, bias)

        self.weights = assemble(tensors, config.num_hidden_layers, matrix_of)
        self._slot_bytes = max(part.buffer_bytes for part in self._parts)
        self._n_slots = window or next(
            (n for n in range(_WINDOW, MIN_WINDOW, -1) if room is None or 4 * n * self._slot_bytes <= room),
            MIN_WINDOW,
        )
        if self._maps:
            for part in self._parts:
                part.resident, part.array = True, part.tensor.array()
            return
        if room is not None:
            self._check_room(room)
            if window is None:
                room += self._work_bytes(max_rows) - self._work_bytes(1)
                _spread(self._parts, room - self._window_bytes)
                self._make_room(max_rows, 0)
        self._start()

    def close(self) -> None:
        """Ends the loading and gives the memory back."""
        if self._loader is not None:
            self._loader.close()

    @property
    def cache_room_bytes(self) -> int | None:
        """The most that all caches together can ever get, with nothing resident; None without a budget."""
        if self.budget_bytes is None:
            return None
        return self.budget_bytes - self._base - self._work_bytes(self._max_rows) - self._window_bytes

    def begin_pass(self, n_rows: int = 1, cache_bytes: int = 0, scores: bool = True) -> None:
        """Makes room for a pass of `n_rows` rows with caches of `cache_bytes`, which may use lm_head or not.

        Raises `ConfigError` where the caches do not fit, and `CheckpointError` where a file was truncated:
        to touch a map of what is no longer there would kill the process.
        """
        for file in self._files.values():
            file.check()
        if self._loader is not None:
            self._balance(n_rows, self._loader)
        self._make_room(n_rows, cache_bytes)
        if self._loader is not None:
            self._loader.skip_head(not scores)
        self._passes += 1

    def usage(self) -> PagerUsage:
        resident = [part for part in self._parts if part.resident]
        resident_bytes = sum(part.tensor.nbytes for part in resident)
        loader = self._loader
        return PagerUsage(
            self.budget_bytes,
            0 if loader is None else self._window_bytes,
            resident_bytes,
            sum(part.tensor.nbytes for part in self._parts) - resident_bytes,
            sum(part.kept_bytes for part in resident),
            self._cache_bytes,
            sum(part.loaded_bytes for part in resident),
            0 if loader is None else loader.slots_in_use * self._slot_bytes,
            self._passes,
            0 if loader is None else loader.loads,
            0 if loader is None else loader.read_bytes,
            0.0 if loader is None else loader.load_s,
            0.0 if loader is None else loader.wait_s,
        )

    def sample(self) -> dict[str, float]:
        """What is in memory now and what was read so far, for a time line."""
        usage = self.usage()
        return {
            "window_bytes": usage.filled_bytes,
            "resident_bytes": usage.loaded_bytes,
            "cache_bytes": usage.cache_bytes,
            "loads": usage.loads,
            "read_bytes": usage.read_bytes,
        }

    @property
    def _window_bytes(self) -> int:
        return self._n_slots * self._slot_bytes

    def _start(self) -> "Loader":
        if self._loader is None:
            self._loader = Loader(
                self._parts, self._n_slots, self._slot_bytes, self._lock, self._way, self._gave_way
            )
        return self._loader

    def _open(self, part: PagedPart) -> AbstractContextManager[Weights]:
        return self._start().open(part)

    def _check_room(self, room: int) -> None:
        """Raises `ConfigError` unless the window fits into what the rest of the process leaves."""
        if room < self._window_bytes:
            assert self.budget_bytes is not None
            raise ConfigError(
                f"the memory budget of {format_size(self.budget_bytes)} is too small: at least "
                f"{format_size(self.budget_bytes - room + self._window_bytes)} are needed, of which "
                f"{format_size(self._base)} for the program, {format_size(self._cache_bytes)} for the text, "
                f"{format_size(self._window_bytes)} for the smallest window and the rest for the work of a "
                "pass; give a larger budget or ask for a shorter text"
            )

    def _balance(self, n_rows: int, loader: "Loader") -> None:
        """Unpacks some parts where the disk idled in the pass before; they give way, and may come back."""
        n_before, began_s, load_s = self._before
        pass_s = loader.used_s - began_s
        idle_s = pass_s - (loader.load_s - load_s)
        self._before = n_rows, time.perf_counter(), loader.load_s
        if n_before != 1 or pass_s < _TELLING_S or idle_s < _IDLE_SHARE * pass_s:
            return
        with self._lock:
            resident = [part for part in self._parts if part.resident]
            if len(resident) == len(self._parts) or any(part.array is None for part in resident):
                return
            some = [part for part in resident if part.packs][::_UNPACKED_OF]
            turn = self._passes % max(1, len(some))  # else it would be the first layers that stream
            for part in some[turn:] + some[:turn]:
                part.packs = part.resident = False
                part.array = None
                self._gave_way.append(part)

    def _make_room(self, n_rows: int, cache_bytes: int) -> None:
        """Lets resident parts give way, or come back, until the budget holds."""
        before, self._cache_bytes = self._cache_bytes, cache_bytes
        if self.budget_bytes is None:
            return
        runtime = self._base + self._work_bytes(n_rows)
        if self._measures_base:
            loaded = sum(part.loaded_bytes for part in self._parts)
            window = 0 if self._loader is None else self._window_bytes
            runtime = max(runtime, rss_bytes() - loaded - window - before)
        room = self.budget_bytes - runtime - cache_bytes
        resident = sum(part.kept_bytes for part in self._parts if part.resident)
        if self._loader is None and self._maps and resident <= room:
            return
        try:
            self._check_room(room)
        except ConfigError:
            self._cache_bytes = before
            raise
        room -= self._window_bytes
        with self._lock:
            while resident > room:
                part = _loneliest(self._parts)
                resident -= part.kept_bytes
                part.resident, part.array = False, None
                if self._maps:
                    _forget(part.tensor)
                self._gave_way.append(part)
            while self._gave_way and resident + self._gave_way[-1].kept_bytes <= room:
                part = self._gave_way.pop()
                part.resident = True
                resident += part.kept_bytes
            self._lock.notify_all()


def _work_bytes(
    tensors: Mapping[str, StoredTensor], config: LlamaConfig
) -> Callable[[int], int]:  # rows -> bytes
    """What a pass takes besides weights and caches, by the number of its rows."""
    prefix = "model.layers.0"
    n_q, n_kv = (tensors[f"{prefix}.self_attn.{name}.weight"].shape[0] for name in ("q_proj", "k_proj"))
    n_ffn, n_vocab = tensors[f"{prefix}.mlp.up_proj.weight"].shape[0], tensors[LM_HEAD].shape[0]
    # Rows before and after a norm and a matrix; q, rotated q, scaled q, heads; gate, up, silu's own.
    row_floats = 4 * config.hidden_size + max(5 * n_q + 4 * n_kv, 4 * n_ffn)
    fixed = _FIXED_WORK_BYTES + 4 * _ROWS_OF_SCORES * n_vocab
    return lambda n_rows: fixed + 4 * row_floats * n_rows


def _cut(tensor: StoredTensor, part_bytes: int) -> Iterator[StoredTensor]:
    """The matrix in parts of about equal size, at most `part_bytes` where rows allow it.

    They begin where `linear` begins a block, so that the sums' bits do not depend on paging.
    """
    n_rows, n_cols = tensor.shape
    unit = block_rows(n_cols)
    most = max(unit, part_bytes * n_rows // tensor.nbytes // unit * unit)
    n_parts = -(-n_rows // most)
    step = -(-n_rows // (n_parts * unit)) * unit
    for start in range(0, n_rows, step):
        yield tensor.rows(start, min(start + step, n_rows))


def _packable(tensor: StoredTensor) -> bool:
    return tensor.dtype == "BF16" and tensor.shape[0] % ROWS == 0


def _way(n_bytes: int) -> str | None:
    """How to read: through the page cache where the machine has room for all of it, and more to spare.

    Then the disk is read once: the kernel keeps what this process may not, and takes it back when somebody
    needs the memory. Elsewhere pages that are read in a circle are never found again: None, the best way.
    """
    spare = spare_bytes()
    return _CACHED if spare is not None and spare >= _CACHED_TIMES * n_bytes else None


def _spread(parts: Sequence[PagedPart], room: int) -> None:
    """Makes parts of up to `room` bytes resident, evenly among the others."""
    share = max(0, room) / sum(part.kept_bytes for part in parts)
    due = 0.0
    for part in parts:
        due += share * part.kept_bytes
        part.resident = due >= part.kept_bytes
        if part.resident:
            due -= part.kept_bytes


def _loneliest(parts: Sequence[PagedPart]) -> PagedPart:
    """The resident part that is farthest from any streaming one."""
    streaming = [part.index for part in parts if not part.resident]

    def distance(part: PagedPart) -> int:
        at = bisect.bisect(streaming, part.index)
        before, after = streaming[at - 1], streaming[at % len(streaming)]
        return min((part.index - before) % len(parts), (after - part.index) % len(parts))

    resident = [part for part in parts if part.resident]
    return max(resident, key=distance) if streaming else resident[-1]


def _forget(tensor: StoredTensor) -> None:
    """Takes a tensor's mapped pages out of memory, but for those that it shares with a neighbour."""
    page = mmap.PAGESIZE
    start, stop = -(-tensor.offset // page) * page, tensor.end // page * page
    if stop > start and hasattr(mmap, "MADV_DONTNEED"):
        tensor.file.map().madvise(mmap.MADV_DONTNEED, start, stop - start)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(tensor.file.fileno(), tensor.offset, tensor.nbytes, os.POSIX_FADV_DONTNEED)
