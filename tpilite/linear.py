"""y = x W^T + b for a stored matrix of any dtype: the one place where stored weights become numbers.

A stored dtype stays stored until it is inside the cache. Arrays of bfloat16, which NumPy does not know,
are uint16 holding its bits; float16 and float32 are themselves. Everything that leaves here is float32.

A `Matrix` comes in parts, each some whole rows, which is to say one contiguous range of a file. A part is
there between entering and leaving it: for weights in memory that is nothing; for paged ones it is the
wait for the disk and the release of the memory. Parts are entered in their order, each once per use.

`Linear` cuts the parts into blocks of rows. A thread takes a block, widens it to float32 in memory of its
own that stays in the cache, and multiplies. A sum's bits depend neither on the threads nor on the blocks;
nor on the parts, if each begins at a multiple of `block_rows`.
"""

import itertools
import json
import logging
import math
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Array = NDArray[np.float32]
Stored = NDArray[Any]  # bfloat16 as uint16, float16, float32

# Blocks are measured as float32. This fits most second-level caches.
_BLOCK_BYTES = 1 << 20

# Larger ones are faster where the caches behind are large: each NumPy call on fresh memory takes some
# microseconds before it streams, and hands the interpreter over twice.
_FEW_ROWS_BLOCK_BYTES = (1 << 18, 1 << 20, 1 << 21, 1 << 22)

# Beside many rows, x is what is large: each product lays it out anew, which needs as many rows to pay off.
_MANY_ROWS = 64
_BLOCK_ROWS_OF_MANY = 256

# Blocks per thread and call, at least: what one thread may wait for the other at the end of a call.
_BLOCKS_PER_THREAD = 4

# Products of up to so many multiplications take OpenBLAS's way for small matrices, which lays out nothing and
# is up to three times faster for few rows. A matrix goes all this way or all the other, since they differ
# in the last bits. Where there is no such way, the smaller products cost nothing.
_SMALL_PRODUCT = 1_000_000
_SMALL_ROWS = 16

WAYS = ("bits", "cast")

# The biases of float32's and float16's exponents differ by this much.
_FLOAT16_EXPONENT_GAP = 112
FLOAT16_LIFT = np.float32(2.0**_FLOAT16_EXPONENT_GAP)
_SIXTEEN, _THIRTEEN = np.uint32(16), np.uint32(13)
_SIGN_AND_VALUE = np.uint32(0x8FFFFFFF)

# A call on fewer weights than this is over before it matters how it is done.
_MEASURED_FROM = 1 << 20
_MEASURED_ON = (8192, 2048)
_MEASURE_S = 0.05  # per question, of which there are two per dtype


class Part(Protocol):
    """Some whole rows of a stored matrix."""

    @property
    def n_rows(self) -> int: ...

    @property
    def array(self) -> Stored | None:
        """The rows, where they are in memory for the whole of this pass; None where `open` brings them."""
        ...

    def open(self) -> AbstractContextManager[Stored]:
        """The rows [n_rows, n_cols], in memory until the context ends."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A part that is always there: an array, or a file's memory map that the kernel pages."""

    array: Stored

    @property
    def n_rows(self) -> int:
        return int(self.array.shape[0])

    def open(self) -> AbstractContextManager[Stored]:
        return nullcontext(self.array)


@dataclass(frozen=True)
class Matrix:
    """A stored matrix [n_rows, n_cols], in parts, with the bias [n_rows] that belongs to it."""

    n_rows: int
    n_cols: int
    parts: tuple[Part, ...]
    bias: Array | None = None

    @classmethod
    def of(cls, array: Stored, bias: Array | None = None) -> "Matrix":
        return cls(array.shape[0], array.shape[1], (InMemory(array),), bias)


def as_float32(stored: Stored) -> Array:
    """The values of stored weights, exactly, in a new array."""
    if stored.dtype == np.uint16:
        wide = stored.astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return stored.astype(np.float32)


def float16_bits(stored: Stored, out: Array) -> Array:
    """Finite float16 values in `out`, of the same shape, exactly but for the factor 1 / `FLOAT16_LIFT`.

    Three integer operations, four times as fast as NumPy's cast where that has no hardware.
    """
    bits = out.view(np.uint32)
    # The sign is extended over the exponent's three upper bits, which float16 does not have.
    np.copyto(out.view(np.int32), stored.view(np.int16))
    np.left_shift(bits, _THIRTEEN, out=bits)
    np.bitwise_and(bits, _SIGN_AND_VALUE, out=bits)
    return out


def block_rows(n_cols: int, n_bytes: int = _BLOCK_BYTES) -> int:
    """How many rows make a block. The BLAS takes rows in groups of up to eight, which must not be cut."""
    return max(8, n_bytes // (4 * n_cols) // 8 * 8)


@dataclass(frozen=True)
class Plan:
    """How blocks of one stored dtype become float32, and how large they are beside few rows of x.

    `cast` is NumPy's own conversion. `bits` moves bits: for bfloat16 in one pass instead of two, for
    float16 by three integer operations, where NumPy's cast is slow (without hardware for it).
    """

    way: str
    block_bytes: int = _BLOCK_BYTES


class Linear:
    """y = x W^T + b for each of the matrices, float32, by `n_threads` threads of which the caller is one.

    The threads live until `close`. One call at a time: the scratch memory belongs to the object. `way`
    forces one of `WAYS`; else the faster one for this machine is measured when a large matrix of a dtype
    first comes, in 0.1 to 0.3 s, and noted in `cache`, a file (default: in the user's cache directory).
    """

    def __init__(self, n_threads: int = 1, way: str | None = None, cache: Path | None = None) -> None:
        assert way is None or way in WAYS
        self.n_threads = n_threads
        self.plans: dict[str, Plan] = {}  # by dtype, once decided
        self._way = way
        self._notes = _Notes(cache, n_threads)
        self._team = _Team(n_threads)
        self._scratch = [_Scratch() for _ in range(n_threads)]
        self._input = _Input()
        self._finite: WeakValueDictionary[int, Part] = WeakValueDictionary()

    def __enter__(self) -> "Linear":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads."""
        self._team.close()

    def __call__(self, x: Array, *matrices: Matrix) -> list[Array]:  # [T, D] -> [T, n_rows] each
        assert all(x.shape[1] == matrix.n_cols for matrix in matrices)
        results = [np.empty((x.shape[0], m.n_rows), np.float32) for m in matrices]
        if x.size:
            self._multiply(x, matrices, results)
        else:
            for y in results:
                y.fill(0)
        for y, matrix in zip(results, matrices, strict=True):
            if matrix.bias is not None:
                y += matrix.bias
        return results

    def share(self, n: int, work: Callable[[int, int], None]) -> None:
        """Calls `work(start, stop)` on ranges that make up 0 to n, each in a thread of its own."""
        size = -(-n // self.n_threads)
        self._team.run(lambda thread: work(min(thread * size, n), min((thread + 1) * size, n)))

    def _multiply(self, x: Array, matrices: tuple[Matrix, ...], results: list[Array]) -> None:
        """What is in memory goes first, all at once: meanwhile the disk brings the paged parts."""
        self._input.set(x)
        here: list[tuple[Part, Stored, Array]] = []
        paged: list[tuple[Part, Array]] = []
        for matrix, y in zip(matrices, results, strict=True):
            start = 0
            for part in matrix.parts:
                out = y[:, start : start + part.n_rows]
                start += part.n_rows
                if part.array is None:
                    paged.append((part, out))
                else:
                    here.append((part, part.array, out))
        if here:
            self._run(self._input, here)
        for part, out in paged:
            with part.open() as rows:
                self._run(self._input, [(part, rows, out)])

    def _run(self, x: "_Input", pieces: list[tuple[Part, Stored, Array]]) -> None:
        """Multiplies all pieces, each thread taking the next block as soon as it is done with one."""
        n_weights = sum(rows.size for _, rows, _ in pieces)
        fair_share = 4 * n_weights // (self.n_threads * _BLOCKS_PER_THREAD)
        blocks: deque[tuple[Stored, Array, str, int, int]] = deque()
        for part, rows, out in pieces:
            plan = self._plan(rows.dtype, n_weights)
            way = plan.way
            if way == "bits" and rows.dtype == np.float16:
                if self._is_finite(part, rows):
                    x.lift()
                else:
                    way = "cast"
            n_bytes = min(plan.block_bytes, max(fair_share, _FEW_ROWS_BLOCK_BYTES[0]))
            step = block_rows(rows.shape[1], n_bytes) if x.n_rows < _MANY_ROWS else _BLOCK_ROWS_OF_MANY
            room = max(min(step, rows.shape[0]), _SMALL_ROWS)
            for scratch in self._scratch:
                scratch.reserve(room * rows.shape[1], room * x.n_rows)
            for start in range(0, rows.shape[0], step):
                blocks.append((rows, out, way, start, start + step))

        def work(thread: int) -> None:
            scratch = self._scratch[thread]
            # Infinities in x or in the weights are the model's affair; they show in the result.
            with np.errstate(all="ignore"):
                while True:
                    try:
                        rows, out, way, start, stop = blocks.popleft()
                    except IndexError:
                        return
                    _multiply_block(x, rows[start:stop], out[:, start:stop], way, scratch)

        self._team.run(work)

    def _is_finite(self, part: Part, rows: Stored) -> bool:
        """Whether float16 rows have neither infinities nor NaN, which `bits` would take for numbers.

        They are looked at when they are first used, and noted for as long as the part lives.
        """
        if self._finite.get(id(part)) is part:
            return True
        step = block_rows(rows.shape[1])
        for start in range(0, rows.shape[0], step):
            bits = rows[start : start + step].view(np.int16)
            if (bits & np.int16(0x7C00)).max() == 0x7C00:
                return False
        self._finite[id(part)] = part
        return True

    def _plan(self, dtype: np.dtype[Any], n_weights: int) -> Plan:
        if (plan := self.plans.get(dtype.name)) is not None:
            return plan
        if self._way is not None:
            return Plan(self._way)
        if n_weights < _MEASURED_FROM:
            return Plan(WAYS[0])
        plan = self._notes.read(dtype.name)
        if plan is None:
            plan = self._measure(dtype)
            self._notes.write(dtype.name, plan)
        self.plans[dtype.name] = plan
        logger.info("%s weights: %s", dtype.name, plan)
        return plan

    def _measure(self, dtype: np.dtype[Any]) -> Plan:
        """The fastest plan, on more weights than caches hold: first which way, then which size of block."""
        values = np.resize(np.linspace(-0.1, 0.1, 4093, dtype=np.float32), _MEASURED_ON)
        stored = values.view(np.uint16)[:, 1::2].copy() if dtype == np.uint16 else values.astype(dtype)
        part, x = InMemory(stored), _Input()
        x.set(values[:1])
        out = np.empty((1, part.n_rows), np.float32)

        def fastest(plans: list[Plan]) -> Plan:
            seconds = dict.fromkeys(plans, math.inf)
            end = time.perf_counter() + _MEASURE_S
            while math.inf in seconds.values() or time.perf_counter() < end:
                for plan in plans:
                    self.plans[dtype.name] = plan
                    start = time.perf_counter()
                    self._run(x, [(part, stored, out)])
                    seconds[plan] = min(seconds[plan], time.perf_counter() - start)
            return min(plans, key=seconds.__getitem__)

        way = fastest([Plan(way) for way in WAYS]).way
        return fastest([Plan(way, n_bytes) for n_bytes in _FEW_ROWS_BLOCK_BYTES])


class _Notes:
    """The plans measured before on this machine, in a file that may as well be missing."""

    def __init__(self, path: Path | None, n_threads: int) -> None:
        self._path = path
        self._key = f"{platform.machine()} {_cpu()} numpy {np.__version__} threads {n_threads}"

    def read(self, dtype: str) -> Plan | None:
        match self._all().get(self._key, {}).get(dtype):
            case [str(way), int(n_bytes)] if way in WAYS and n_bytes in _FEW_ROWS_BLOCK_BYTES:
                return Plan(way, n_bytes)
        return None

    def write(self, dtype: str, plan: Plan) -> None:
        notes = self._all()
        notes.setdefault(self._key, {})[dtype] = [plan.way, plan.block_bytes]
        try:
            path = self._file()
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f"{path.name}.{os.getpid()}")
            new.write_text(json.dumps(notes, indent=1))
            new.replace(path)
        except (OSError, RuntimeError) as error:
            logger.debug("the measured plan is not kept: %s", error)

    def _all(self) -> dict[str, dict[str, Any]]:
        try:
            notes = json.loads(self._file().read_text())
        except (OSError, RuntimeError, ValueError):
            return {}
        if isinstance(notes, dict) and all(isinstance(value, dict) for value in notes.values()):
            return notes
        return {}

    def _file(self) -> Path:
        return self._path or Path.home() / ".cache" / "tpilite" / "linear.json"


def _cpu() -> str:
    """The processor's name, or what there is instead: ARM's Linux has numbers only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for name in ("model name", "CPU part"):
        for line in lines:
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return platform.processor()


class _Input:
    """The rows x of one call as the products take them, in memory that is kept between calls."""

    def __init__(self) -> None:
        self._memory = (np.empty(0, np.float32), np.empty(0, np.float32))
        self.columns: Array  # [D, T]
        self.lifted: Array
        self.n_rows = 0
        self.lift_bits = 0  # of `lifted`; 0 before it is made

    def set(self, x: Array) -> None:
        if self._memory[0].size < x.size:
            self._memory = (np.empty(x.size, np.float32), np.empty(x.size, np.float32))
        shape = x.shape[1], x.shape[0]
        self.columns, self.lifted = (memory[: x.size].reshape(shape) for memory in self._memory)
        if x.shape[0] < _MANY_ROWS:
            self.columns[...] = x.T
        else:  # the BLAS lays it out as it needs it, and one copy more would not help
            self.columns = x.T
        self.n_rows = x.shape[0]
        self.lift_bits = 0

    def lift(self) -> None:
        """Makes `lifted`: x times a power of two, the one that float16's bits lack if there is room for it.

        The sums alone could be lifted instead, but then products of small numbers would lose bits.
        """
        if not self.lift_bits:
            _, exponent = math.frexp(max(self.columns.max(), -self.columns.min()))
            self.lift_bits = min(_FLOAT16_EXPONENT_GAP, 126 - exponent)
            np.multiply(self.columns, np.float32(2.0**self.lift_bits), out=self.lifted)


class _Scratch:
    """One thread's memory, as much as the largest block so far took."""

    def __init__(self) -> None:
        self._wide = np.empty(0, np.uint8)
        self._sums = np.empty(0, np.float32)

    def reserve(self, n_weights: int, n_sums: int) -> None:
        n_bytes = 4 * n_weights + 4  # the last few for `wide` with an offset
        if self._wide.size < n_bytes:
            memory = np.empty(n_bytes + 63, np.uint8)
            self._wide = memory[-memory.ctypes.data % 64 :][:n_bytes]
        if self._sums.size < n_sums:
            self._sums = np.empty(n_sums, np.float32)

    def wide(self, n_weights: int, offset: int = 0) -> NDArray[np.uint32]:
        """So many numbers of four bytes, `offset` bytes behind the beginning, which is a cache line's."""
        return self._wide[offset : offset + 4 * n_weights].view(np.uint32)

    def sums(self, n_rows: int, n_cols: int) -> Array:
        return self._sums[: n_rows * n_cols].reshape(n_rows, n_cols)


def _multiply_block(x: _Input, rows: Stored, out: Array, way: str, scratch: _Scratch) -> None:
    """out = x rows^T for a block of rows: [n, D] -> [T, n]."""
    n, n_cols = rows.shape
    small_rows = _SMALL_PRODUCT // (n_cols * x.n_rows)
    small = small_rows >= _SMALL_ROWS
    enough = small or x.n_rows == 1 or n >= _SMALL_ROWS
    stays = rows.dtype == np.float32 and rows.flags.aligned and enough
    weights = rows if stays else _widen(rows, way, scratch)
    lifted = rows.dtype == np.float16 and way == "bits"
    columns = x.lifted if lifted else x.columns
    if x.n_rows == 1:
        np.dot(weights, columns[:, 0], out=out[0])
    elif small:
        # All products in one call: the interpreter is handed over once, not once for each.
        sums = scratch.sums(n, x.n_rows)
        step = small_rows // 8 * 8
        whole = n // step * step
        shape = (n // step, step)
        np.matmul(
            weights[:whole].reshape(*shape, n_cols), columns, out=sums[:whole].reshape(*shape, x.n_rows)
        )
        np.matmul(weights[whole:], columns, out=sums[whole:])
        out[...] = sums.T
    else:
        if not enough:  # what is left in the scratch memory makes up the rows
            weights = scratch.wide(_SMALL_ROWS * n_cols).view(np.float32).reshape(_SMALL_ROWS, n_cols)
        sums = scratch.sums(len(weights), x.n_rows)
        np.matmul(weights, columns, out=sums)
        out[...] = sums[:n].T
    if lifted and x.lift_bits < _FLOAT16_EXPONENT_GAP:
        out *= np.float32(2.0 ** (_FLOAT16_EXPONENT_GAP - x.lift_bits))


def _widen(rows: Stored, way: str, scratch: _Scratch) -> Array:  # [n, D] -> [n, D]
    """The values of the rows, exactly; those of float16 by `bits` are too small by its exponent gap."""
    wide = scratch.wide(rows.size)
    flat = rows.reshape(-1)
    if rows.dtype == np.uint16 and way == "bits":
        # Each value is written as an integer of four bytes two bytes further on: there it is the upper half
        # of its float32, and its zeros are the lower half of the next. NumPy casts to odd addresses as fast.
        wide[0] = 0
        np.copyto(scratch.wide(rows.size, offset=2), flat)
    elif rows.dtype == np.uint16:
        np.copyto(wide, flat)
        np.left_shift(wide, _SIXTEEN, out=wide)
    elif rows.dtype == np.float16 and way == "bits":
        float16_bits(flat, wide.view(np.float32))
    else:
        np.copyto(wide.view(np.float32), flat)
    return wide.view(np.float32).reshape(rows.shape)


class _Team:
    """Threads that wait for work: `run` returns when every one of them and the caller have done theirs."""

    def __init__(self, n_threads: int) -> None:
        self._inboxes: list[SimpleQueue[_Job | None]] = [SimpleQueue() for _ in range(n_threads - 1)]
        self._threads = [
            threading.Thread(target=_serve, args=(inbox, index), name=f"linear-{index}", daemon=True)
            for index, inbox in enumerate(self._inboxes, start=1)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.put(None)
        for thread in self._threads:
            thread.join()
        self._inboxes, self._threads = [], []

    def run(self, work: Callable[[int], None]) -> None:
        """Calls `work(i)` in thread i, for 0 in the caller's own; raises what the first of them raised."""
        job = _Job(work)
        # One C call, which no Ctrl-C can cut in half: the join below must know who has begun.
        deque(map(SimpleQueue.put, self._inboxes, itertools.repeat(job)), maxlen=0)
        try:
            work(0)
        finally:
            job.join(len(self._inboxes))
        for error in job.outcomes:
            if error is not None:
                raise error


class _Job:
    """One piece of work for all threads, and what became of it in each."""

    def __init__(self, work: Callable[[int], None]) -> None:
        self.work = work
        self.outcomes: list[BaseException | None] = []
        self._wake: SimpleQueue[None] = SimpleQueue()

    def do(self, index: int) -> None:
        outcome = None
        try:
            self.work(index)
        except BaseException as error:  # carried to the caller's thread, which raises it
            outcome = error
        self.outcomes.append(outcome)
        self._wake.put(None)

    def join(self, n_threads: int) -> None:
        """Waits for the threads, also through Ctrl-C: they use memory that the caller is about to release."""
        interrupt = None
        while len(self.outcomes) < n_threads:
            try:
                self._wake.get()
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt


def _serve(inbox: "SimpleQueue[_Job | None]", index: int) -> None:
    while (job := inbox.get()) is not None:
        job.do(index)
