"""Ranks as threads of one process: they must not see less, or more, of each other than over a wire."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ranks import run_ranks

from tpilite.collective import Message, Solo, ThreadGroup, Timed
from tpilite.errors import PeerLost


def test_sums_are_made_in_rank_order_on_every_rank():
    parts = np.random.RandomState(8).standard_normal((5, 1000)).astype(np.float32)
    expected = parts[0].copy()
    for part in parts[1:]:
        expected += part
    assert expected.tobytes() != parts[::-1].sum(axis=0).tobytes()  # the order shows in the bits

    def work(collective):
        mine = parts[collective.rank].copy()
        assert collective.all_reduce(mine) is mine
        return mine

    assert all(x.tobytes() == expected.tobytes() for x in run_ranks(5, work))


def test_each_rank_may_overwrite_what_it_was_sent_and_what_it_sent():
    def work(collective):
        for turn in range(200):
            mine = np.full(4096, turn, np.float32)
            message = Message({"turn": turn}, mine) if collective.rank == 0 else None
            received = collective.broadcast(message)
            assert received.header == {"turn": turn}
            assert (received.array == turn).all()
            received.array.fill(-1)
            mine.fill(-1)
            given = np.full(4096, turn + collective.rank, np.float32)
            gathered = collective.gather(Message(array=given))
            given.fill(-1)
            for rank, part in enumerate(gathered or ()):
                assert (part.array == turn + rank).all()
        collective.barrier()
        return gathered is not None

    assert run_ranks(3, work) == [True, False, False]


def test_a_rank_that_ends_is_lost_to_the_others():
    group = ThreadGroup(2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(group.ranks[0].all_reduce, np.zeros(4, np.float32))
        group.abort()
        with pytest.raises(PeerLost, match="another rank"):
            waiting.result()


def test_one_rank_alone_gets_back_what_it_gave():
    solo, x, message = Solo(), np.ones(3, np.float32), Message({"a": 1})
    assert solo.all_reduce(x) is x
    assert solo.broadcast(message) is message
    assert solo.gather(message) == [message]


def test_a_timed_collective_counts_and_passes_on():
    class Slow(Solo):
        def all_reduce(self, x):
            time.sleep(0.02)
            x += 1
            return x

        def barrier(self):
            time.sleep(0.01)

    timed = Timed(Slow())
    x = np.zeros((1, 2), np.float32)
    assert timed.all_reduce(x) is x
    assert x.tolist() == [[1, 1]]
    timed.barrier()
    assert (timed.rank, timed.world_size) == (0, 1)
    assert timed.reduced_s >= 0.02
    assert timed.waited_s >= timed.reduced_s + 0.01
    message = Message({"a": 1})
    assert timed.broadcast(message) is message
    assert timed.gather(message) == [message]
