"""Threads that share the work of one call, and wait for the next."""

import itertools
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue

from tpilite.linear.products import Products


class ThreadPool:
    """`n_threads` threads, of which the caller of `run` is one.

    Where there are `products`, the other threads help to make them while they wait for work.
    """

    def __init__(self, n_threads: int, products: Products | None = None) -> None:
        self._products = products
        self._inboxes: list[SimpleQueue[_Job | None]] = [SimpleQueue() for _ in range(n_threads - 1)]
        self._threads = [
            threading.Thread(
                target=_serve, args=(inbox, index, products), name=f"linear-{index}", daemon=True
            )
            for index, inbox in enumerate(self._inboxes, start=1)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends the threads."""
        self._send(None)
        self._call()
        for thread in self._threads:
            thread.join()
        self._inboxes, self._threads = [], []
        self._products = None  # whose memory may be gone from now on

    def run(self, work: Callable[[int], None]) -> None:
        """Calls `work(i)` in thread i, for 0 in the caller's own; raises what the first of them raised."""
        job = _Job(work)
        self._send(job)
        try:
            self._call()
            work(0)
        finally:
            job.join(len(self._inboxes), self._call)
        for error in job.outcomes:
            if error is not None:
                raise error

    def _send(self, job: "_Job | None") -> None:
        # One C call, which no Ctrl-C can interrupt: either all threads get the job or none does, so that
        # `join` knows how many to wait for.
        deque(map(SimpleQueue.put, self._inboxes, itertools.repeat(job)), maxlen=0)

    def _call(self) -> None:
        """Makes the threads look into their inboxes; a call too many does no harm."""
        if self._products is not None:
            self._products.recall()


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

    def join(self, n_threads: int, call: Callable[[], None]) -> None:
        """Waits for the threads, also through Ctrl-C: they use memory that the caller is about to release."""
        interrupt = None
        while len(self.outcomes) < n_threads:
            try:
                call()
                self._wake.get()
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt


def _serve(inbox: "SimpleQueue[_Job | None]", index: int, products: Products | None) -> None:
    n_recalls = 0
    while True:
        if products is not None:
            n_recalls = products.serve(n_recalls)
        try:
            job = inbox.get(block=products is None)
        except Empty:
            continue
        if job is None:
            return
        job.do(index)
