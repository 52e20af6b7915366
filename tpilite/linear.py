"""y = x W^T + b for a stored matrix of any dtype: the one place where stored weights become numbers.

A stored dtype stays stored until it is inside the cache. Arrays of bfloat16, which NumPy does not know,
are uint16 holding its bits; float16 and float32 are themselves. Everything that leaves here is float32.

A `Matrix` comes in parts, each some whole rows, which is to say one contiguous range of a file. A part is
there between entering and leaving it: for weights in memory that is nothing; for paged ones it is the
wait for the disk and the release of the memory. Parts are entered in their order, each once per use.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Stored = NDArray[Any]  # bfloat16 as uint16, float16, float32


class Part(Protocol):
    """Some whole rows of a stored matrix."""

    @property
    def n_rows(self) -> int: ...

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


# A thread's converted block: it must stay in the second-level cache until it is multiplied.
_BLOCK_BYTES = 1 << 20
_HIGH_HALF = np.uint32(0xFFFF0000)
_SIXTEEN = np.uint32(16)


class Linear:
    """y = x W^T + b for each of the matrices, float32, by `n_threads` threads of which the caller is one.

    The threads live until `close`. One call at a time: the scratch memory belongs to the object.
    """

    def __init__(self, n_threads: int = 1) -> None:
        self.n_threads = n_threads
        self._team = _Team(n_threads)
        self._scratch = [_Scratch() for _ in range(n_threads)]
        self._input = _Input()

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
        results = [np.empty((x.shape[0], m.n_rows), np.float32) for m in matrices]
        if x.shape[0] and x.shape[1]:
            self._multiply(x, matrices, results)
        else:
            for y in results:
                y.fill(0)
        for y, matrix in zip(results, matrices, strict=True):
            if matrix.bias is not None:
                y += matrix.bias
        return results

    def _multiply(self, x: Array, matrices: tuple[Matrix, ...], results: list[Array]) -> None:
        """What is in memory goes first, all at once: meanwhile the disk brings the paged parts."""
        self._input.set(x)
        here: list[tuple[Stored, Array]] = []
        paged: list[tuple[Part, Array]] = []
        for matrix, y in zip(matrices, results, strict=True):
            start = 0
            for part in matrix.parts:
                out = y[:, start : start + part.n_rows]
                start += part.n_rows
                if isinstance(part, InMemory):
                    here.append((part.array, out))
                else:
                    paged.append((part, out))
        self._run(here)
        for part, out in paged:
            with part.open() as rows:
                self._run([(rows, out)])

    def _run(self, pieces: list[tuple[Stored, Array]]) -> None:
        """Multiplies all pieces; blocks are the same whatever the threads do, so the bits are as well."""
        blocks = _blocks(pieces)
        x = self._input

        def work(thread: int) -> None:
            scratch = self._scratch[thread]
            for rows, out in blocks:
                _multiply_block(x, rows, out, scratch)

        self._team.run(work)


def _blocks(pieces: list[tuple[Stored, Array]]) -> Iterator[tuple[Stored, Array]]:
    """The pieces cut into cache-sized blocks of rows; `next` is atomic, so threads may share it."""
    blocks = []
    for rows, out in pieces:
        step = max(8, _BLOCK_BYTES // (4 * rows.shape[1]) // 8 * 8)
        for start in range(0, rows.shape[0], step):
            blocks.append((rows[start : start + step], out[:, start : start + step]))
    return iter(blocks)


class _Input:
    """The rows x of one call, laid out for the kernels in memory that is kept between calls."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.float32)
        self.whole = self.even = self.odd = np.empty((0, 0), np.float32)

    def set(self, x: Array) -> None:
        self.whole = x
        n_rows, n_cols = x.shape
        if n_cols % 2:
            return
        if self._memory.size < x.size:
            self._memory = np.empty(x.size, np.float32)
        half = x.size // 2
        self.even = self._memory[:half].reshape(n_rows, -1)
        self.odd = self._memory[half : x.size].reshape(n_rows, -1)
        self.even[...] = x[:, 0::2]
        self.odd[...] = x[:, 1::2]


class _Scratch:
    """One thread's memory, grown to the largest block seen."""

    def __init__(self) -> None:
        self._weights = np.empty(0, np.uint32)
        self._sums = np.empty(0, np.float32)

    def weights(self, size: int) -> NDArray[np.uint32]:
        if self._weights.size < size:
            self._weights = np.empty(size, np.uint32)
        return self._weights[:size]

    def sums(self, size: int) -> Array:
        if self._sums.size < size:
            self._sums = np.empty(size, np.float32)
        return self._sums[:size]


def _multiply_block(x: _Input, rows: Stored, out: Array, scratch: _Scratch) -> None:
    n_rows, n_cols = rows.shape
    if rows.dtype == np.float32 and rows.flags.aligned:
        np.matmul(x.whole, rows.T, out=out)
        return
    buffer = scratch.weights(n_rows * n_cols)
    if rows.dtype == np.uint16 and n_cols % 2 == 0:
        pairs = rows.view(np.uint32)
        half = buffer[: pairs.size].reshape(pairs.shape)
        sums = scratch.sums(out.size).reshape(out.shape)
        np.bitwise_and(pairs, _HIGH_HALF, out=half)
        np.matmul(x.odd, half.view(np.float32).T, out=out)
        np.left_shift(pairs, _SIXTEEN, out=half)
        np.matmul(x.even, half.view(np.float32).T, out=sums)
        out += sums
        return
    buffer = buffer.reshape(rows.shape)
    wide = buffer.view(np.float32)
    if rows.dtype == np.uint16:
        buffer[...] = rows
        np.left_shift(buffer, _SIXTEEN, out=buffer)
    else:
        wide[...] = rows
    np.matmul(x.whole, wide.T, out=out)


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
