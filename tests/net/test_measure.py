"""What a sum is taken to cost, and what is chosen by that."""

import itertools
import time

import numpy as np
import pytest

from tpilite.collective import Solo
from tpilite.net.measure import cheapest, time_sum


@pytest.mark.parametrize("took_s", [[0.0, 2.0], [2.0, 0.0]])
def test_a_sum_that_is_fast_and_slow_by_turns_counts_as_their_mean(
    took_s: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an exchange of two ranks is, of which one began when the other's part had already come."""
    solo, clock, took = Solo(), [0.0], itertools.cycle(took_s)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(solo, "all_reduce", lambda x: clock.append(clock.pop() + next(took)))
    assert time_sum(solo, np.zeros(1, np.float32)) == 1.0


def test_the_cheapest_algorithm_is_chosen_by_its_measured_costs() -> None:
    # Seconds for sums of 4096, 8192 and 16384 numbers.
    costs = {"star": [1.8, 2.0, 8.0], "direct": [1.0, 2.4, 9.0], "scatter": [3.0, 3.2, 4.0]}
    sizes = (1, 4096, 6000, 7000, 8192, 9000, 12_000, 16_384, 1 << 20)
    assert [cheapest(costs, 4 * n) for n in sizes] == ["direct"] * 3 + ["star"] * 3 + ["scatter"] * 3
    costs = {"star": [1.5, 2.0, 4.0], "direct": [3.0, 2.0, 1.0], "scatter": [9.0] * 3}
    assert cheapest(costs, 4) == "star"
    assert cheapest(costs, 1 << 26) == "direct"
