"""Stored matrices times vectors, against float64 on the same stored values."""

import itertools
import threading
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
from block_rows import random_blocks
from compiled_code import MAKERS, new_linear
from hypothesis import given, settings
from hypothesis import strategies as st

from tpilite.linear import linear as module
from tpilite.linear import plans
from tpilite.linear.block_types import BLOCK_TYPES
from tpilite.linear.calls import part_rows
from tpilite.linear.linear import Linear
from tpilite.linear.matrix import InMemory, Matrix, as_float32
from tpilite.linear.packing import pack
from tpilite.linear.plans import KERNELS, Plan
from tpilite.linear.thread_pool import ThreadPool

DTYPES = ["bf16", "f16", "f32"]
NAN = {np.dtype(np.uint16): 0x7FC0, np.dtype(np.float16): np.nan, np.dtype(np.float32): np.nan}


def stored(rng, dtype, shape, scale=1.0):
    w = (scale * rng.standard_normal(shape)).astype(np.float32)
    if dtype == "bf16":
        return (w.view(np.uint32) >> 16).astype(np.uint16)
    return w.astype(np.float16 if dtype == "f16" else np.float32)


def any_rows(rng, kind, n_rows, n_cols):
    """Of a stored dtype or a block type."""
    if kind in BLOCK_TYPES:
        return random_blocks(rng, kind, n_rows, n_cols)
    return stored(rng, kind, (n_rows, n_cols))


def rows_of_x(rng, t, n_cols, scale=1.0):
    return (scale * rng.standard_normal((t, n_cols))).astype(np.float32)


def check(y, x, w, bias=None):
    """Within 1e-6 of sum |w||x|, the natural unit of a dot product's rounding."""
    wide, x = as_float32(w).astype(np.float64), x.astype(np.float64)
    expected = x @ wide.T
    unit = np.abs(x) @ np.abs(wide).T
    if bias is not None:
        expected += bias
        unit += np.abs(bias)
    assert y.dtype == np.float32
    assert y.shape == expected.shape
    assert y.flags.c_contiguous
    assert (np.abs(y - expected) <= 1e-6 * unit).all()


class Paged:
    """A part that is there only while it is open: its memory is overwritten with NaN at the end."""

    array = None  # never there by itself

    def __init__(self, array, log):
        self._rows = array
        self.log = log
        self.n_rows = len(array)

    @contextmanager
    def open(self):
        assert not any(what == "open" and part is self for what, part in self.log), "opened once per use"
        opened = sum(what == "open" for what, _ in self.log)
        closed = sum(what == "close" for what, _ in self.log)
        assert opened == closed, "one after another"
        self.log.append(("open", self))
        slot = self._rows.copy()
        try:
            yield slot
        finally:
            slot[...] = NAN[slot.dtype]
            self.log.append(("close", self))


def cut(draw, w, log):
    """The rows of w in parts: some in memory, some paged, some of no rows."""
    cuts = sorted(draw(st.lists(st.integers(0, len(w)), max_size=3)))
    pieces = [w[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(w)], strict=True)]
    return tuple(Paged(piece, log) if draw(st.booleans()) else InMemory(piece) for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_is_the_product_of_the_stored_values(data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    n_cols = draw(st.integers(0, 300) | st.sampled_from([1024, 2047]))
    x = rows_of_x(rng, draw(st.sampled_from([1, 2, 3, 8, 16, 65, 300])), n_cols)
    log, weights, matrices = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        n_rows = draw(st.integers(0, 700))
        weights.append(stored(rng, draw(st.sampled_from(DTYPES)), (n_rows, n_cols)))
        bias = draw(st.sampled_from([None, rows_of_x(rng, 1, n_rows)[0]]))
        matrices.append(Matrix(n_rows, n_cols, cut(draw, weights[-1], log), bias))
    with new_linear(draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from(MAKERS))) as linear:
        results = linear(x, *matrices)
    for y, w, matrix in zip(results, weights, matrices, strict=True):
        check(y, x, w, matrix.bias)
    paged = [part for matrix in matrices for part in matrix.parts if isinstance(part, Paged)]
    if n_cols:
        assert log == [(what, part) for part in paged for what in ("open", "close")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 4, 50, 120])
@pytest.mark.parametrize("makers", [KERNELS, *([maker] for maker in MAKERS if maker not in KERNELS)])
def test_the_bits_depend_on_neither_threads_nor_numpys_way_nor_parts_nor_chunks(makers, dtype, t):
    rng = np.random.default_rng(1)
    w = stored(rng, dtype, (584, 600))
    x = rows_of_x(rng, t, 600)
    unit = part_rows(600)
    paged = Matrix(584, 600, tuple(Paged(w[i : i + unit], []) for i in range(0, 584, unit)))
    assert [part.n_rows for part in paged.parts] == [384, 200]
    results = []
    for n_threads in (1, 2, 3):
        for maker in makers:
            for _ in range(3):
                with new_linear(n_threads, maker) as linear:
                    results += linear(x, Matrix.of(w))
            with new_linear(n_threads, maker) as linear:
                results += linear(x, paged)
                for part in paged.parts:
                    part.log.clear()
    for n_bytes in (1 << 18, 1 << 22) if makers == KERNELS else ():
        with Linear(2, kernel="bits") as linear:
            linear.plans[w.dtype] = Plan("bits", n_bytes)
            results += linear(x, Matrix.of(w))
    assert len({y.tobytes() for y in results}) == 1


@pytest.mark.parametrize("t", [1, 4, 50, 120])
@pytest.mark.parametrize("scale", [1e-20, 0.02, 30.0])
def test_packed_weights_give_the_same_bits(t, scale):
    rng = np.random.default_rng(2)
    w = stored(rng, "bf16", (520, 900), scale)
    packed = pack(w, bytearray(w.nbytes * 3 // 4))
    assert packed.exceptions(0, 520)[0].size > 0
    x = rows_of_x(rng, t, 900)
    for n_threads, maker in itertools.product((1, 2), MAKERS):
        with new_linear(n_threads, maker) as linear:
            expected, found = (linear(x, Matrix(520, 900, (InMemory(rows),)))[0] for rows in (w, packed))
        np.testing.assert_array_equal(found, expected)
        check(found, x, w)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_is_the_product_of_rows_of_block_types_beside_others(data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    n_cols = 256 * draw(st.integers(1, 9))
    x = rows_of_x(rng, draw(st.sampled_from([1, 2, 3, 8, 65])), n_cols)
    kinds = draw(st.lists(st.sampled_from([*BLOCK_TYPES, *DTYPES]), min_size=1, max_size=4))
    weights = [any_rows(rng, kind, draw(st.integers(1, 400)), n_cols) for kind in kinds]
    with new_linear(draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from(MAKERS))) as linear:
        results = linear(x, *(Matrix.of(w) for w in weights))
    for y, w in zip(results, weights, strict=True):
        check(y, x, w)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize("t", [1, 4, 70])
def test_bits_of_block_types_depend_on_neither_threads_nor_parts(kind, t, maker):
    rng = np.random.default_rng(1)
    w, x = random_blocks(rng, kind, 584, 768), rows_of_x(rng, t, 768)
    unit = part_rows(768)
    parts = tuple(InMemory(w[i : i + unit]) for i in range(0, 584, unit))
    assert len(parts) == 2
    results = []
    for n_threads in (1, 2, 3):
        with new_linear(n_threads, maker) as linear:
            results += linear(x, Matrix.of(w))
            results += linear(x, Matrix(584, 768, parts))
            results.append(linear(x, Matrix.of(stored(rng, "bf16", (50, 768))), Matrix.of(w))[1])
    assert len({y.tobytes() for y in results}) == 1
    check(results[0], x, w)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize(("first_col", "n_inputs"), [(0, 300), (300, 212), (100, 57), (0, 512), (40, None)])
def test_a_rank_multiplies_its_own_columns_of_whole_blocks(maker, t, first_col, n_inputs):
    rng = np.random.default_rng(1)
    w = random_blocks(rng, "Q4_K", 60, 512)
    stop = 512 if n_inputs is None else first_col + n_inputs
    x = rows_of_x(rng, t, stop - first_col)
    matrix = Matrix(60, 512, (InMemory(w),), first_col=first_col, n_inputs=n_inputs)
    with new_linear(2, maker) as linear:
        (y,) = linear(x, matrix)
    check(y, x, as_float32(w)[:, first_col:stop])


@pytest.mark.parametrize("maker", MAKERS)
def test_nan_and_infinite_scales_arrive(maker):
    rng = np.random.default_rng(1)
    w = random_blocks(rng, "Q8_0", 3, 64)
    w.bytes[0, :2], w.bytes[1, 34:36] = [0, 0x7E], [0, 0x7C]
    w.bytes[1, 36:] = 3
    for t in (1, 3):
        with new_linear(1, maker) as linear:
            (y,) = linear(np.ones((t, 64), np.float32), Matrix.of(w))
        assert np.isnan(y[:, 0]).all()
        assert (y[:, 1] == np.inf).all()
        assert np.isfinite(y[:, 2]).all()


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("dtype", [np.uint16, np.float16])
def test_every_value_is_widened_exactly(dtype, maker):
    w = np.arange(1 << 16, dtype=np.uint16).view(dtype)[:, None]
    with np.errstate(invalid="ignore"):  # of NaN that signal, as 64-bit ARM does
        w = w[np.isfinite(as_float32(w))][:, None]
    with new_linear(1, maker) as linear:
        (y,) = linear(np.ones((1, 1), np.float32), Matrix.of(w))
    assert (y[0] == as_float32(w)[:, 0]).all()


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 3])
def test_infinities_and_nan_arrive(dtype, maker, t):
    w = np.array([[1, np.inf], [-np.inf, 1], [np.nan, 0], [2, 3]], np.float32)
    w = (
        (w.view(np.uint32) >> 16).astype(np.uint16)
        if dtype == "bf16"
        else w.astype({"f16": np.float16, "f32": np.float32}[dtype])
    )
    with new_linear(2, maker) as linear:
        (y,) = linear(np.ones((t, 2), np.float32), Matrix.of(w))
        (z,) = linear(np.full((t, 2), np.inf, np.float32), Matrix.of(w[3:]))
    np.testing.assert_array_equal(y, [[np.inf, -np.inf, np.nan, 5]] * t)
    assert (z == np.inf).all()


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("x_scale", [1e-30, 1e-6, 1e5, 1e30])
@pytest.mark.parametrize("w_scale", [1e-7, 1e-4, 1e4])
def test_float16_loses_nothing_at_either_end(maker, x_scale, w_scale):
    rng = np.random.default_rng(2)
    w = stored(rng, "f16", (100, 200), w_scale)
    for t in (1, 3):
        x = rows_of_x(rng, t, 200, x_scale)
        with new_linear(1, maker) as linear:
            (y,) = linear(x, Matrix.of(w))
        check(y, x, w)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 3, 6])
def test_weights_may_begin_at_any_byte_of_a_read_only_file(dtype, maker, offset):
    rng = np.random.default_rng(3)
    w = stored(rng, dtype, (90, 77))
    file = bytes(offset) + w.tobytes()
    mapped = np.frombuffer(file, w.dtype, offset=offset, count=w.size).reshape(w.shape)
    assert not mapped.flags.writeable
    for t in (1, 3):
        x = rows_of_x(rng, t, 77)
        with new_linear(2, maker) as linear:
            (y,) = linear(x, Matrix.of(mapped))
        check(y, x, w)


def test_dtypes_take_turns_in_the_same_memory():
    rng = np.random.default_rng(4)
    x = rows_of_x(rng, 1, 50)
    with Linear(1, kernel="bits") as linear:
        for dtype in ["f16", "bf16", "f16", "f32", "bf16"]:
            w = stored(rng, dtype, (30, 50))
            check(linear(x, Matrix.of(w))[0], x, w)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_allocates_its_results_alone(dtype, maker):
    rng = np.random.default_rng(5)
    matrices = [Matrix.of(stored(rng, dtype, (4000, 256))), Matrix.of(stored(rng, dtype, (1000, 256)))]
    x = rows_of_x(rng, 1, 256)
    with new_linear(2, maker) as linear:
        linear(x, *matrices)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            linear(x, *matrices)
            peak = tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()
    # The results are 20 kB, the weights as float32 5 MB; chunks and views are Python objects.
    assert peak < 20_000 + 20_000


def test_threads_are_started_once_and_ended_by_close():
    before = threading.active_count()
    w = Matrix.of(np.ones((3000, 100), np.float32))
    with Linear(3) as linear:
        assert threading.active_count() == before + 2
        for _ in range(5):
            linear(np.ones((1, 100), np.float32), w)
            assert threading.active_count() == before + 2
    assert threading.active_count() == before


@pytest.mark.parametrize("maker", MAKERS)
def test_closed_twice_it_does_no_harm(maker):
    x, w = np.ones((1, 100), np.float32), Matrix.of(np.ones((30, 100), np.float32))
    linear = new_linear(2, maker)
    for _ in range(2):
        linear.close()
    linear.share(1, lambda start, stop: None)
    assert linear._pool._products is None
    if maker != "compiled":
        assert (linear(x, w)[0] == 100).all()


def test_one_thread_is_the_callers():
    before = threading.active_count()
    with Linear(1):
        assert threading.active_count() == before


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_in_any_thread_reaches_the_caller_once_all_are_done(failing):
    pool = ThreadPool(3)
    done = []

    def work(thread):
        if thread == failing:
            raise ValueError("what happened")
        done.append(thread)

    with pytest.raises(ValueError, match="what happened"):
        pool.run(work)
    assert sorted(done) == sorted({0, 1, 2} - {failing})
    pool.run(done.append)
    assert len(done) == 5
    pool.close()


def test_interrupted_it_still_waits_for_its_threads():
    pool = ThreadPool(2)
    release, done = threading.Event(), []

    def work(thread):
        if thread:
            release.wait()
            done.append(thread)
        else:
            threading.Timer(0.05, release.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.run(work)
    assert done == [1]
    pool.close()


def test_an_error_closes_the_part():
    log = []
    part = Paged(np.zeros((4, 3), np.float32), log)
    with Linear(2, kernel="bits") as linear, pytest.raises(ValueError, match="mismatch"):
        linear(np.ones((1, 2), np.float32), Matrix(4, 2, (part,)))
    assert [what for what, _ in log] == ["open", "close"]


@pytest.fixture
def quick(monkeypatch):
    """Measuring on little, for large matrices of little."""
    monkeypatch.setattr(module, "_MEASURED_FROM", 1000)
    monkeypatch.setattr(module, "_MEASURED_COLS", 32)
    monkeypatch.setattr(module, "_MEASURED_BYTES", 4096)
    monkeypatch.setattr(module, "_MEASURE_S", 0.0)


def plan_of(path, dtype="bf16", **options):
    rng = np.random.default_rng(6)
    w, x = stored(rng, dtype, (64, 32)), rows_of_x(rng, 1, 32)
    with Linear(2, cache=path, **options) as linear:
        (y,) = linear(x, Matrix.of(w))
        check(y, x, w)
        return linear.plans.get(w.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_measured_is_noted_for_the_next_time(quick, tmp_path, monkeypatch, dtype):
    path = tmp_path / "cache" / "linear.json"
    plan = plan_of(path, dtype)
    assert plan.kernel in KERNELS
    monkeypatch.setattr(Linear, "_measure", None)
    assert plan_of(path, dtype) == plan


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": 1}'])
def test_a_damaged_note_is_measured_again(quick, tmp_path, text):
    path = tmp_path / "linear.json"
    path.write_text(text)
    plan = plan_of(path)
    assert plan is not None
    assert plan_of(path) == plan


@pytest.mark.parametrize(
    "note",
    [
        ["other", 1 << 20],
        ["bits", 7],
        ["bits"],
        ["bits", 1 << 20, True],
        None,
        ["bits", "x"],
    ],
)
def test_a_note_of_another_version_is_measured_again(quick, tmp_path, note, monkeypatch):
    path = tmp_path / "linear.json"
    plan_of(path)
    notes = plans.json.loads(path.read_text())
    (key,) = notes
    path.write_text(plans.json.dumps({key: {"uint16": note}}))
    monkeypatch.setattr(Linear, "_measure", lambda self, dtype: Plan("cast", 1 << 20))
    assert plan_of(path) == Plan("cast", 1 << 20)


def test_a_place_that_cannot_be_written_does_not_matter(quick, tmp_path):
    (tmp_path / "file").write_text("")
    assert plan_of(tmp_path / "file" / "linear.json") is not None


def test_small_matrices_and_a_forced_way_measure_nothing(tmp_path):
    path = tmp_path / "linear.json"
    assert plan_of(path) is None
    assert plan_of(path, kernel="cast") is None
    assert not path.exists()


def test_bfloat16_is_the_upper_half_of_float32():
    assert as_float32(np.array([0x3F80, 0xC040], np.uint16)).tolist() == [1.0, -3.0]
