"""What is resident, evicted and brought back, as choices of sizes and states alone."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpilite.formats.stored import StoredTensor
from tpilite.linear.calls import part_rows
from tpilite.linear.packing import pack
from tpilite.weights.residency import (
    PagedPart,
    choose_evictions,
    choose_returns,
    choose_unpacking,
    cut,
    spread,
)


def tensor(n_rows, n_cols=512):
    return StoredTensor("x", "BF16", (n_rows, n_cols), None, 4096, 2 * n_rows * n_cols)


def parts(states):
    """A part for each character: `#` is resident, `.` streams."""
    found = [PagedPart(tensor(8), i, False, False, None) for i in range(len(states))]
    for part, state in zip(found, states, strict=True):
        part.resident = state == "#"
        part.array = part.tensor if part.resident else None  # anything but None: it is in memory
    return found


SIZE = parts(".")[0].kept_bytes


@given(n_rows=st.integers(1, 5000), n_cols=st.integers(1, 3000), part_bytes=st.integers(1, 1 << 20))
def test_parts_are_all_rows_in_order_and_begin_at_blocks(n_rows, n_cols, part_bytes):
    whole, unit = tensor(n_rows, n_cols), part_rows(n_cols)
    found = list(cut(whole, part_bytes))
    assert found[0].offset == whole.offset
    assert found[-1].end == whole.end
    assert all(a.end == b.offset for a, b in itertools.pairwise(found))
    assert all(part.shape[0] % unit == 0 for part in found[:-1])
    assert all(part.nbytes <= part_bytes or part.shape[0] <= unit for part in found)


@given(sizes=st.lists(st.integers(1, 100), min_size=1), room=st.integers(-10, 6000))
def test_what_is_spread_fits_and_all_fit_where_there_is_room(sizes, room):
    chosen = spread(sizes, room)
    resident = [size for size, is_resident in zip(sizes, chosen, strict=True) if is_resident]
    assert sum(resident) <= max(0, room) + 1e-6 * sum(sizes)
    if room >= sum(sizes):
        assert sum(chosen) >= len(sizes) - 1  # a rounding error may cost the last one


@pytest.mark.parametrize(
    ("states", "evicted"),
    [
        (".#####.###", [3, 8]),  # the middle of the longest run first; the last part lies beside the first
        ("####", [3, 1, 0]),
        (".#.#", [1, 3]),
    ],
)
def test_what_is_evicted_is_far_from_what_streams(states, evicted):
    found = parts(states)
    room = SIZE * (states.count("#") - len(evicted))
    assert [part.index for part in choose_evictions(found, room)] == evicted
    assert choose_evictions(found, SIZE * states.count("#")) == []


def test_what_is_evicted_while_it_is_loaded_takes_its_memory_until_it_is_there():
    found = parts(".####")
    middle = found[2]
    middle.loading, middle.array = True, None
    assert choose_evictions(found, 3 * SIZE) == [middle, found[1]]
    middle.resident = False
    assert len(choose_evictions(found, 3 * SIZE)) == 1
    assert choose_evictions(found, 0) == [found[1], found[3], found[4]]
    assert choose_returns(found, [found[0], middle], 4 * SIZE) == [middle], "which takes no more than it does"


def test_the_last_evicted_return_first_and_as_far_as_there_is_room():
    found = parts("#....")
    evicted = [found[i] for i in (1, 4, 2)]
    assert choose_returns(found, evicted, 3 * SIZE) == [found[2], found[4]]
    assert choose_returns(found, evicted, 4 * SIZE - 1) == [found[2], found[4]]
    assert choose_returns(found, evicted, SIZE) == []


def test_one_packed_part_of_eight_is_unpacked_in_turns():
    found = parts("#" * 20 + ".")
    rows = np.full((4, 512), 0x3F80, np.uint16)
    packed = pack(rows, bytearray(rows.nbytes))
    for part in found[:-1]:
        part.may_pack, part.array = True, packed
    assert [part.index for part in choose_unpacking(found, 0)] == [0, 8, 16]
    assert [part.index for part in choose_unpacking(found, 4)] == [8, 16, 0]
    assert choose_unpacking(found[:-1], 0) == [], "nothing streams"
    found[8].array = found[8].tensor
    assert [part.index for part in choose_unpacking(found, 0)] == [0, 9, 17], "8 is mapped"
    found[3].array = None
    assert choose_unpacking(found, 0) == [], "not all is in memory yet"
