"""The memory window: weights that do not fit into memory come from the disk, just in time, in every pass.

Parts of the weights are resident or streamed (`residency`). A streamed part is read into a slot of the window
shortly before its use, and the slot is free again right after it. The order of use is the same in every pass,
so the reading runs ahead, and across a pass's end into the next one, as far as there are free slots
(`part_table`).

Memory is bounded by a budget for the whole process, of which the weights get what the rest leaves: the
interpreter and its libraries (measured), the arrays of a pass (by its rows), the caches, the window. When
these grow, resident parts are evicted one by one; when they shrink, the parts return. Where everything
fits there is no window and nothing is read: the files are mapped, and the kernel keeps them.
"""

import mmap
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tpilite.arrays import Array
from tpilite.closing import Closing
from tpilite.config.llama import LlamaConfig
from tpilite.errors import ConfigError
from tpilite.formats.stored import StoredTensor
from tpilite.linear.matrix import Matrix
from tpilite.machine import format_size, rss_bytes, spare_bytes
from tpilite.model.llama import LlamaWeights
from tpilite.weights.assemble import assemble, mapped, matrix_in_parts
from tpilite.weights.loader import Loader
from tpilite.weights.part_table import PartTable
from tpilite.weights.partition import EMBEDDING, LM_HEAD, layer_tensor
from tpilite.weights.residency import can_pack, cut

# Larger reads are no faster, smaller ones leave the disk idle in between: benchmarks/paging.py measures it.
# A part should also be small beside the budget, so that little of that is lost to the window.
PART_BYTES = 16 << 20
_MIN_PART_BYTES = 1 << 20
_PARTS_PER_BUDGET = 32

# One part in use, one being read, and two with which the disk goes on while resident parts are used.
_WINDOW = 4
MIN_WINDOW = 2

# Packing saves reading and costs unpacking. Where the disk idles for more than this share of a pass of one
# row, the processor is what takes longer; so some parts are unpacked, pass by pass, until both take as long.
_IDLE_SHARE = 0.1
_SHORTEST_MEASURED_S = 0.05  # in shorter passes chance is too large a share

# The page cache is used where it has room for so many times the weights: there may be other ranks here.
_CACHED_TIMES = 4
_CACHED = "plain"

# What a pass takes besides arrays of its rows: tiles of attention scores and what softmax makes of them,
# the threads' and the BLAS's own memory.
_FIXED_WORK_BYTES = 44 << 20
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

    def since(self, before: "PagerUsage") -> "PagerUsage":
        """What paging holds now and has done after `before`."""
        counted = ("passes", "loads", "read_bytes", "load_s", "load_wait_s")
        return replace(self, **{name: getattr(self, name) - getattr(before, name) for name in counted})

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
    and the arrays of a pass; None measures it, here and before every pass. `read_method` is one of
    `formats.uncached.READ_METHODS`. `may_pack` is whether resident bfloat16 may be packed.
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
        read_method: str | None = None,
        may_pack: bool = True,
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
        self._before = _PassBefore(0, 0.0, 0.0)
        self._table = PartTable()

        n_bytes = sum(t.nbytes for name, t in tensors.items() if len(t.shape) == 2 and name != EMBEDDING)
        read_method = read_method or _read_method(n_bytes)
        room = self._room_bytes
        self._maps = window is None and (room is None or n_bytes <= room)
        if room is not None and not self._maps:
            part_bytes = min(part_bytes, max(_MIN_PART_BYTES, room // _PARTS_PER_BUDGET))
        # From the page cache, reading is as fast as unpacking.
        self.weights = self._paged(tensors, config, part_bytes, may_pack and read_method != _CACHED)
        self._slot_bytes = max(part.buffer_bytes for part in self._table.parts)
        self._n_slots = window or _window_for(room, self._slot_bytes)
        self._loader = Loader(self._table, self._n_slots - 1, read_method)
        if self._maps:
            self._table.map_all()
        elif room is not None:
            self._check_room(room)
            if window is None:
                one_row = room + self._work_bytes(max_rows) - self._work_bytes(1)
                self._table.keep_evenly(one_row - self._window_bytes)
                self._make_room(max_rows, 0)

    def start(self) -> None:
        """Begins to read what the first pass will need. The first `begin_pass` does it where nobody has."""
        if not self._maps:
            self._start_loader()

    def close(self) -> None:
        """Ends the loading and gives the memory and the maps back."""
        self._table.close()
        if self._table.window_bytes:
            self._loader.close()

    @property
    def cache_room_bytes(self) -> int | None:
        """The most that all caches together can ever get, with nothing resident; None without a budget."""
        return None if self._room_bytes is None else self._room_bytes - self._window_bytes

    def begin_pass(self, n_rows: int = 1, cache_bytes: int = 0, scores: bool = True) -> None:
        """Makes room for a pass of `n_rows` rows with caches of `cache_bytes`, which may use lm_head or not.

        Raises `ConfigError` where the caches do not fit, and `CheckpointError` where a file was truncated:
        to touch a map of what is no longer there would kill the process.
        """
        for file in self._files.values():
            file.check()
        self.start()
        if self._table.window_bytes:
            self._balance(n_rows)
        self._make_room(n_rows, cache_bytes)
        self._table.skip_lm_head(not scores)
        self._passes += 1

    def usage(self) -> PagerUsage:
        """What there is in memory now, and what was read so far."""
        table, loader = self._table, self._loader
        resident = [part for part in table.parts if part.resident]
        resident_bytes = sum(part.tensor.nbytes for part in resident)
        return PagerUsage(
            budget_bytes=self.budget_bytes,
            window_bytes=table.window_bytes,
            resident_bytes=resident_bytes,
            streaming_bytes=sum(part.tensor.nbytes for part in table.parts) - resident_bytes,
            kept_bytes=sum(part.kept_bytes for part in resident),
            cache_bytes=self._cache_bytes,
            loaded_bytes=sum(part.loaded_bytes for part in resident),
            filled_bytes=table.filled_bytes,
            passes=self._passes,
            loads=loader.loads,
            read_bytes=loader.read_bytes,
            load_s=loader.load_s,
            load_wait_s=table.wait_s,
        )

    @property
    def _room_bytes(self) -> int | None:
        """What the budget leaves to window, weights and caches in the largest pass."""
        if self.budget_bytes is None:
            return None
        return self.budget_bytes - self._base - self._work_bytes(self._max_rows)

    @property
    def _window_bytes(self) -> int:
        return self._n_slots * self._slot_bytes

    def _paged(
        self, tensors: Mapping[str, StoredTensor], config: LlamaConfig, part_bytes: int, may_pack: bool
    ) -> LlamaWeights:
        """The model's weights, whose matrices are parts of the table."""

        def matrix_of(tensor: StoredTensor, bias: Array | None) -> Matrix:
            if not tensor.nbytes:  # of a rank without heads
                return mapped(tensor, bias)
            of_lm_head = tensor is tensors[LM_HEAD]
            parts = [
                self._table.add(rows, of_lm_head, may_pack and can_pack(rows))
                for rows in cut(tensor, part_bytes)
            ]
            return matrix_in_parts(tensor, parts, bias)

        return assemble(tensors, config.num_hidden_layers, matrix_of)

    def _start_loader(self) -> None:
        if not self._table.window_bytes:
            self._table.add_window(self._n_slots, self._slot_bytes)
            self._loader.start()

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

    def _balance(self, n_rows: int) -> None:
        """Unpacks some parts where the disk idled in the pass before, for lack of free slots."""
        before = self._before
        pass_s = self._table.used_s - before.began_s
        idle_s = pass_s - (self._loader.load_s - before.load_s)
        self._before = _PassBefore(n_rows, time.perf_counter(), self._loader.load_s)
        if before.n_rows == 1 and pass_s >= _SHORTEST_MEASURED_S and idle_s >= _IDLE_SHARE * pass_s:
            self._table.unpack_some(self._passes)

    def _make_room(self, n_rows: int, cache_bytes: int) -> None:
        """Evicts resident parts, or lets evicted ones return, until the budget holds."""
        before, self._cache_bytes = self._cache_bytes, cache_bytes
        if self.budget_bytes is None:
            return
        parts = self._table.parts
        runtime = self._base + self._work_bytes(n_rows)
        if self._measures_base:
            loaded = sum(part.loaded_bytes for part in parts)
            runtime = max(runtime, rss_bytes() - loaded - self._table.window_bytes - before)
        room = self.budget_bytes - runtime - cache_bytes
        kept_bytes = sum(part.kept_bytes for part in parts if part.resident)
        if self._maps and not self._table.window_bytes and kept_bytes <= room:
            return
        try:
            self._check_room(room)
        except ConfigError:
            self._cache_bytes = before
            raise
        evicted = self._table.fit(room - self._window_bytes)
        if self._maps:
            for part in evicted:
                _forget(part.tensor)
            self._start_loader()


@dataclass(frozen=True)
class _PassBefore:
    n_rows: int
    began_s: float
    load_s: float  # of reading until then


def _window_for(room: int | None, slot_bytes: int) -> int:
    """The slots of a window that leaves most of `room` to resident parts."""
    sizes = range(_WINDOW, MIN_WINDOW, -1)
    return next((n for n in sizes if room is None or 4 * n * slot_bytes <= room), MIN_WINDOW)


def _work_bytes(
    tensors: Mapping[str, StoredTensor], config: LlamaConfig
) -> Callable[[int], int]:  # rows -> bytes
    """What a pass takes besides weights and caches, by the number of its rows."""

    def n_rows_of(name: str) -> int:
        return tensors[layer_tensor(0, name)].shape[0]

    n_q, n_kv = n_rows_of("self_attn.q_proj.weight"), n_rows_of("self_attn.k_proj.weight")
    n_ffn, n_vocab = n_rows_of("mlp.up_proj.weight"), tensors[LM_HEAD].shape[0]
    # Rows before and after a norm and a matrix; q, rotated q, scaled q, heads; gate, up, silu's own.
    row_floats = 4 * config.hidden_size + max(5 * n_q + 4 * n_kv, 4 * n_ffn)
    fixed = _FIXED_WORK_BYTES + 4 * _ROWS_OF_SCORES * n_vocab
    return lambda n_rows: fixed + 4 * row_floats * n_rows


def _read_method(n_bytes: int) -> str | None:
    """How to read: through the page cache where the machine has room for all of it, and more to spare.

    Then the disk is read once: the kernel keeps what this process may not, and takes it back when somebody
    needs the memory. Elsewhere None, the best there is: pages that are read in a circle are not found again.
    """
    spare = spare_bytes()
    return _CACHED if spare is not None and spare >= _CACHED_TIMES * n_bytes else None


def _forget(tensor: StoredTensor) -> None:
    """Takes a tensor's mapped pages out of memory, but for those that it shares with a neighbour."""
    page = mmap.PAGESIZE
    start, stop = -(-tensor.offset // page) * page, tensor.end // page * page
    if stop > start and hasattr(mmap, "MADV_DONTNEED"):
        tensor.file.map().madvise(mmap.MADV_DONTNEED, start, stop - start)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(tensor.file.fileno(), tensor.offset, tensor.nbytes, os.POSIX_FADV_DONTNEED)
