"""What each algorithm of summing costs on this network: measured when a group forms, to choose by."""

import bisect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tpilite.arrays import Array
from tpilite.collective import Collective, Message
from tpilite.net.sums import ALGORITHMS

# The sums of a decoding step have 8 to 32 KiB, a prompt's have megabytes, which the last two foretell. From
# 16 and 128 KiB alone, one of 32 KiB was foretold by up to a fifth too much, more for some algorithms.
_MEASURED_BYTES = (1 << 14, 1 << 15, 1 << 16)
_MEASURED_S = 0.15

Costs = Mapping[str, Sequence[float]]  # of each algorithm, the seconds of a sum of each of _MEASURED_BYTES


def measure(collective: Collective, use: Callable[[str], None]) -> Costs:
    """What rank 0 found that each algorithm takes, the same on all ranks; every rank calls this.

    `use` has the collective sum by the algorithm that it is given.
    """
    costs: dict[str, list[float]] = {algorithm: [] for algorithm in ALGORITHMS}
    for algorithm in ALGORITHMS:
        for n_bytes in reversed(_MEASURED_BYTES):  # the largest opens TCP's windows for all
            use(algorithm)
            costs[algorithm].insert(0, time_sum(collective, np.zeros(n_bytes // 4, np.float32)))
    return dict(collective.broadcast(None if collective.rank else Message(costs)).header)


def cheapest(costs: Costs, n_bytes: int) -> str:
    """The algorithm that is likely to take the least time for a sum of so many bytes."""
    return min(ALGORITHMS, key=lambda algorithm: _foretell(costs[algorithm], n_bytes))


def time_sum(collective: Collective, x: Array) -> float:
    """Seconds for one sum, the median of as many pairs as rank 0 finds right.

    Pairs, as a rank that begins late finds the others' parts there already, ends early and so waits for
    them in the next sum: one of the two takes up to twice the time, the other next to none.
    """

    def timed() -> float:
        started_s = time.perf_counter()
        collective.all_reduce(x)
        collective.all_reduce(x)
        return (time.perf_counter() - started_s) / 2

    timed()
    guess_s = timed()
    if collective.rank:
        n_pairs = int(collective.broadcast(None).header["n"])
    else:
        n_pairs = min(15, max(3, int(_MEASURED_S / guess_s / 2)))
        collective.broadcast(Message({"n": n_pairs}))
    return statistics.median(timed() for _ in range(n_pairs))


def _foretell(measured_s: Sequence[float], n_bytes: int) -> float:
    """Seconds of a sum: on the line through the two measured ones that it lies between or beyond."""
    i = bisect.bisect(_MEASURED_BYTES[1:-1], n_bytes)
    (x0, x1), (y0, y1) = _MEASURED_BYTES[i : i + 2], measured_s[i : i + 2]
    return y0 + max(0.0, y1 - y0) * (n_bytes - x0) / (x1 - x0)
