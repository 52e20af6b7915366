"""Groups of ranks as threads over socket pairs: sums bit for bit, messages, every way of falling apart."""

import itertools
import socket
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from compiled_code import EXCHANGE, by_both, needs_exchange
from hypothesis import given, settings
from hypothesis import strategies as st

from tpilite.collective import Message
from tpilite.errors import ConfigError, PeerLost, ProtocolError
from tpilite.native.exchange import sums_by
from tpilite.net import messages, wire
from tpilite.net.channel import Channel
from tpilite.net.group import Group, MemberGroup, RankLost, RootGroup, check_options
from tpilite.net.sums import STAR, NewSum, new_sum

ALGORITHMS = ("star", "direct", "scatter")


both = pytest.mark.parametrize("new", by_both(new_sum, sums_by(EXCHANGE), needs_exchange))


def local_groups(
    world_size: int, *, allreduce: str = STAR, payload: str = "f32", new_sum: NewSum = new_sum
) -> list[Group]:
    """The groups of all ranks over socket pairs within this process, one per thread that uses them."""
    channels: list[list[Channel | None]] = [[None] * world_size for _ in range(world_size)]
    for low in range(world_size):
        for high in range(low + 1, world_size):
            a, b = socket.socketpair()
            channels[low][high] = Channel(a, f"rank {high}")
            channels[high][low] = Channel(b, f"rank {low}")
    classes = [RootGroup] + [MemberGroup] * (world_size - 1)
    groups = [cls(rank, channels[rank], payload=payload, new_sum=new_sum) for rank, cls in enumerate(classes)]
    for group in groups:
        group.settle(allreduce)
    return groups


class Ranks:
    """A group whose ranks run a function each, in threads."""

    def __init__(self, world_size: int, **options: Any) -> None:
        self.groups = local_groups(world_size, **options)
        self.pool = ThreadPoolExecutor(world_size)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for group in self.groups:
            group.close()
        self.pool.shutdown()

    def run(self, function: Callable[[Any], Any]) -> list[Any]:
        return [future.result(timeout=60) for future in self.start(function)]

    def start(self, function: Callable[[Any], Any]) -> list[Any]:
        return [self.pool.submit(function, group) for group in self.groups]


def parts(world_size: int, shape: tuple[int, ...], seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(world_size)]


def sum_in_rank_order(arrays: list[Any]) -> Any:
    total = arrays[0].copy()
    for array in arrays[1:]:
        total = total + array
    return total


def bits(array: Any) -> Any:
    return array.view(np.uint32)


@both
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_sums_are_those_of_rank_order_bit_for_bit(algorithm: str, world_size: int, new: NewSum) -> None:
    with Ranks(world_size, allreduce=algorithm, new_sum=new) as ranks:
        for shape in [(1, 64), (3, 37), (1,), (2, 2), (0,), (16, 2048), (1, 64)]:
            arrays = parts(world_size, shape, seed=shape[0])
            expected = sum_in_rank_order(arrays)
            results = ranks.run(lambda group, a=arrays: group.all_reduce(a[group.rank]))
            for result, array in zip(results, arrays, strict=True):
                assert result is array
                np.testing.assert_array_equal(bits(result), bits(expected))


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 40),
    world_size=st.integers(2, 5),
    algorithm=st.sampled_from(ALGORITHMS),
    seed=st.integers(0, 9),
)
def test_any_size_over_any_number_of_ranks(n: int, world_size: int, algorithm: str, seed: int) -> None:
    arrays = parts(world_size, (n,), seed)
    expected = sum_in_rank_order(arrays)
    with Ranks(world_size, allreduce=algorithm) as ranks:
        for result in ranks.run(lambda group: group.all_reduce(arrays[group.rank])):
            np.testing.assert_array_equal(bits(result), bits(expected))


@both
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_sum_larger_than_the_kernels_buffers(algorithm: str, new: NewSum) -> None:
    """Every rank sends before it receives; none may wait for another for ever."""
    arrays = parts(3, (1_500_000,))
    expected = sum_in_rank_order(arrays)
    with Ranks(3, allreduce=algorithm, new_sum=new) as ranks:
        for result in ranks.run(lambda group: group.all_reduce(arrays[group.rank])):
            np.testing.assert_array_equal(bits(result), bits(expected))


@both
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("payload", "tolerance"), [("f16", 2e-3), ("bf16", 1.6e-2), ("q8", 2e-2)])
def test_a_narrower_payload_is_near_and_the_same_on_all_ranks(
    algorithm: str, payload: str, tolerance: float, new: NewSum
) -> None:
    arrays = parts(5, (3, 101))
    expected = sum_in_rank_order([array.astype(np.float64) for array in arrays])
    with Ranks(5, allreduce=algorithm, new_sum=new, payload=payload) as ranks:
        results = ranks.run(lambda group: group.all_reduce(arrays[group.rank]))
    for result in results:
        assert result.dtype == np.float32
        assert np.abs(result - expected).max() <= tolerance * np.abs(expected).max()
        np.testing.assert_array_equal(bits(result), bits(results[0]))


@pytest.mark.parametrize("payload", ["f16", "bf16"])
def test_a_payload_keeps_what_it_can_hold(payload: str) -> None:
    values = np.array([0.0, -0.0, 1.0, -1.5, 256.0, np.inf, -np.inf, np.nan, 1 + 2**-7], np.float32)
    with Ranks(2, allreduce="direct", payload=payload) as ranks:
        results = ranks.run(
            lambda group: group.all_reduce(values.copy() if group.rank else np.zeros_like(values))
        )
    for result in results:
        np.testing.assert_array_equal(result, values)


def test_bfloat16_rounds_to_the_nearest_and_ties_to_even() -> None:
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-9, -1 - 2**-8], np.float32)
    expected = np.array([1, 1 + 2**-6, 1 + 2**-7, 1, -1], np.float32)
    with Ranks(2, payload="bf16") as ranks:
        results = ranks.run(lambda group: group.all_reduce(values.copy() * np.float32(group.rank)))
    np.testing.assert_array_equal(results[0], expected)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 200),
    world_size=st.integers(2, 5),
    algorithm=st.sampled_from(ALGORITHMS),
    seed=st.integers(0, 9),
    damaged=st.none() | st.tuples(st.integers(0, 199), st.sampled_from([np.nan, np.inf, -np.inf])),
)
def test_eight_bits_are_the_same_on_all_ranks_and_hide_nothing_that_is_not_finite(
    n: int, world_size: int, algorithm: str, seed: int, damaged: tuple[int, float] | None
) -> None:
    arrays = parts(world_size, (n,), seed)
    expected = sum_in_rank_order([array.astype(np.float64) for array in arrays])
    if damaged is not None:
        arrays[seed % world_size][damaged[0] % n] = damaged[1]
    with Ranks(world_size, allreduce=algorithm, payload="q8") as ranks:
        results = ranks.run(lambda group: group.all_reduce(arrays[group.rank]))
    for result in results:
        np.testing.assert_array_equal(bits(result), bits(results[0]))
    found = np.isfinite(results[0])
    assert np.abs(results[0] - expected)[found].max(initial=0) <= 0.1 * world_size
    lost = [] if damaged is None else [damaged[0] % n]
    assert not found[lost].any()
    assert np.count_nonzero(~found) <= 32 * len(lost)


@both
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_sum_allocates_nothing_that_grows_with_it(algorithm: str, new: NewSum) -> None:
    """The blocks of one sum are views, tuples and numbers; an array of it would show.

    So large that the 64 KiB through which some versions of NumPy reduce, on each rank, do not.
    """
    n, rounds = 1 << 18, 10
    with Ranks(3, allreduce=algorithm, new_sum=new) as ranks:
        arrays = [np.zeros(n, np.float32) for _ in range(3)]

        def work(group: Group) -> None:
            for _ in range(rounds):
                group.all_reduce(arrays[group.rank])

        ranks.run(work)
        tracemalloc.start()
        try:
            ranks.run(work)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < n * 4 // 2


def test_messages_and_barriers() -> None:
    header = {"step": [1, 2], "text": "é", "none": None}
    arrays = [None, np.arange(6, dtype=np.int64).reshape(2, 3), np.zeros((2, 0), np.float32), np.float32(3)]

    def work(group: Group) -> None:
        for array in arrays:
            given = Message(header, array) if group.rank == 0 else None
            message = group.broadcast(given)
            assert message.header == header
            assert (message.array is None) == (array is None)
            if array is not None:
                np.testing.assert_array_equal(message.array, array)
                assert message.array.dtype == array.dtype
            mine = Message({"rank": group.rank}, np.full((group.rank, 2), group.rank, np.uint16))
            gathered = group.gather(mine)
            assert (gathered is None) == (group.rank > 0)
            for rank, one in enumerate(gathered or ()):
                assert one.header == {"rank": rank}
                np.testing.assert_array_equal(one.array, np.full((rank, 2), rank, np.uint16))
            group.barrier()

    with Ranks(3) as ranks:
        ranks.run(work)


def test_a_barrier_waits_for_all() -> None:
    arrived = []

    def work(group: Group) -> int:
        if group.rank == 2:
            time.sleep(0.1)
        arrived.append(group.rank)
        group.barrier()
        return len(arrived)

    with Ranks(3) as ranks:
        assert ranks.run(work) == [3, 3, 3]


def test_measuring_chooses_one_algorithm_for_all_ranks() -> None:
    def work(group: Group) -> list[str]:
        group.settle("auto")
        x = np.ones(3000, np.float32)
        for _ in range(3):
            group.all_reduce(x)
        assert (x == 27).all()
        return [group.algorithm(n) for n in (1, 4096, 1 << 20)]

    with Ranks(3) as ranks:
        chosen = ranks.run(work)
    assert chosen[0] == chosen[1] == chosen[2]
    assert set(chosen[0]) <= set(ALGORITHMS)


def sums_for_ever(group: Group, x: Any) -> None:
    while True:
        group.all_reduce(x)


@both
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_rank_ends_the_sum_on_all_others(algorithm: str, lost: int, new: NewSum) -> None:
    with Ranks(3, allreduce=algorithm, new_sum=new) as ranks:

        def work(group: Group) -> Any:
            x = np.zeros(1000, np.float32)
            group.all_reduce(x)
            if group.rank == lost:
                group.close()
                return None
            with pytest.raises(PeerLost) as caught:
                sums_for_ever(group, x)  # one whose parts all arrived may still succeed
            with pytest.raises(PeerLost) as again:
                group.barrier()
            assert again.value is caught.value
            return caught.value

        errors = ranks.run(work)
    for rank, error in enumerate(errors):
        if rank != lost and (algorithm != "star" or 0 in (rank, lost)):
            assert isinstance(error, RankLost)
            assert f"rank {error.rank} closed the connection" in str(error) or "broke" in str(error)


@both
@pytest.mark.parametrize("found", [33, 35, 67, 102])
def test_a_frame_of_another_number_of_blocks_ends_the_group(found: int, new: NewSum) -> None:
    hub, leaf = local_groups(2, payload="q8", new_sum=new)
    leaf.channel(0)._sock.sendall(wire.encode(messages.Reduce("q8"), found) + bytes(found))
    with pytest.raises(PeerLost, match=rf"payload='q8'\) with 68 bytes .* with {found} bytes"):
        hub.all_reduce(np.zeros(33, np.float32))
    hub.close()
    leaf.close()


def frame_of_a_sum(n: int) -> bytes:
    return wire.encode(messages.Reduce("f32"), 4 * n) + np.ones(n, np.float32).tobytes()


def test_a_worker_that_closes_at_any_byte_of_its_part() -> None:
    frame = frame_of_a_sum(3)
    for cut in range(len(frame)):
        hub, leaf = local_groups(2)
        socket = leaf.channel(0)._sock
        socket.sendall(frame[:cut])
        leaf.close()
        with pytest.raises(RankLost, match=r"rank 1 closed the connection|broke") as caught:
            hub.all_reduce(np.zeros(3, np.float32))
        assert caught.value.rank == 1
        hub.close()


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (wire.encode(messages.Barrier()), "expected Reduce.* from rank 1, found"),
        (frame_of_a_sum(4), r"with 12 bytes from rank 1, found Reduce\(payload='f32'\) with 16 bytes"),
        (b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n" * 3, "from rank 1, found no frame"),
    ],
)
def test_what_is_no_part_of_the_sum_ends_the_group(sent: bytes, text: str) -> None:
    hub, leaf = local_groups(2)
    leaf.channel(0)._sock.sendall(sent + bytes(64))
    with pytest.raises(PeerLost, match=text):
        hub.all_reduce(np.zeros(3, np.float32))
    with pytest.raises(PeerLost):
        leaf.barrier()
    hub.close()
    leaf.close()


@pytest.mark.parametrize(
    ("header", "payload"),
    [
        (messages.Gather({}, "|O", [1]), 8),
        (messages.Gather({}, "<f4", [3]), 8),
        (messages.Gather({}, "<f4", [-1, -2]), 8),
        (messages.Gather({}, "<f4", [True, 2]), 8),
        (messages.Gather({}, "<f4", ["2"]), 8),
        (messages.Gather({}, "<f4", [2] * 9), 8),
        (messages.Gather({}, "", []), 8),
        (messages.Gather({}, "<f4", [2**62, 4]), 0),
    ],
)
def test_an_array_that_does_not_fit_its_shape(header: messages.Gather, payload: int) -> None:
    hub, leaf = local_groups(2)
    leaf.channel(0).send(header, np.zeros(payload, np.uint8))
    with pytest.raises(ProtocolError, match="expected"):
        hub.gather(Message())
    hub.close()
    leaf.close()


def test_options_are_checked() -> None:
    for allreduce, payload in itertools.product((*ALGORITHMS, "auto"), ("f32", "f16", "bf16", "q8")):
        check_options(allreduce, payload)
    with pytest.raises(ConfigError, match="star, direct, scatter or auto, found 'ring'"):
        check_options("ring", "f32")
    with pytest.raises(ConfigError, match="one of f32, f16, bf16, q8, found 'int8'"):
        check_options("star", "int8")


def test_closing_twice_is_once() -> None:
    hub, leaf = local_groups(2)
    for group in (hub, leaf, hub, leaf):
        group.close()
    assert isinstance(hub.channel(1), Channel)
    with pytest.raises(PeerLost, match="this node ended the session"):
        hub.barrier()
