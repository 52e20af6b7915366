"""Compiled products, and the same functions as plain Python, against float64 on the same stored values."""

import sys

import numpy as np
import pytest

from tpilite import compiled
from tpilite import linear as module
from tpilite.linear import FLOAT16_LIFT, InMemory, Linear, Matrix, Plan, as_float32
from tpilite.packing import pack

_PLAIN = compiled.Kernels(compiled._bfloat16, compiled._float16, compiled._packed)


@pytest.fixture(params=["plain", "compiled"])
def kernels(request):
    if request.param == "plain":
        return _PLAIN
    pytest.importorskip("numba")
    return compiled.load()


def weights(dtype, shape=(24, 40)):
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    w[3, 5] = 1e-4  # an exception where it is packed
    return (w.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else w.astype(np.float16)


def check(y, x, w):
    wide, x = as_float32(w).astype(np.float64), x.astype(np.float64)
    assert (np.abs(y - wide @ x) <= 1e-6 * (np.abs(wide) @ np.abs(x))).all()


def test_products_of_stored_rows(kernels):
    x, y = np.random.default_rng(1).standard_normal(40).astype(np.float32), np.empty(24, np.float32)
    w = weights("bf16")
    w.flags.writeable = False
    kernels.bfloat16(w, x, y)
    check(y, x, w)
    w = weights("f16")
    with np.errstate(over="ignore"):  # of plain Python's casts
        kernels.float16(w.view(np.uint16), x, y)
    check(y * FLOAT16_LIFT, x, w)


@pytest.mark.parametrize("rows", [(0, 24), (4, 12), (8, 8)])
def test_products_of_packed_rows(kernels, rows):
    x, w = np.random.default_rng(1).standard_normal(40).astype(np.float32), weights("bf16")
    packed = pack(w, bytearray(w.nbytes * 3 // 4))
    assert packed.exceptions(0, 24)[0].size > 0
    y = np.empty(rows[1] - rows[0], np.float32)
    with np.errstate(over="ignore"):
        kernels.packed(packed.words_of(*rows), x, y, *packed.exceptions(*rows))
    check(np.ldexp(y, packed.gap), x, w[slice(*rows)])


@pytest.mark.parametrize("dtype", ["bf16", "f16", "packed"])
@pytest.mark.parametrize("x_scale", [1e-30, 1.0, 1e30])
def test_linear_uses_them_for_one_row(dtype, x_scale, monkeypatch):
    w = weights("f16" if dtype == "f16" else "bf16", (512, 400))
    stored = pack(w, bytearray(w.nbytes * 3 // 4)) if dtype == "packed" else w
    called = []

    def counted(name):
        kernel = getattr(_PLAIN, name)
        return lambda *args: called.append(name) or kernel(*args)

    with monkeypatch.context() as patch, Linear(2) as linear:
        patch.setattr(
            compiled, "load", lambda: compiled.Kernels(*map(counted, ("bfloat16", "float16", "packed")))
        )
        linear.compile()
        linear.plans = {w.dtype: Plan("bits", 1 << 20, compiled=True)}
        x = (x_scale * np.random.default_rng(2).standard_normal((3, 400))).astype(np.float32)
        matrix = Matrix(512, 400, (InMemory(stored),))
        with np.errstate(over="ignore"):
            check(linear(x[:1], matrix)[0][0], x[0], w)
        assert set(called) == {"bfloat16" if dtype == "bf16" else "float16" if dtype == "f16" else "packed"}
        called.clear()
        for y, row in zip(linear(x, matrix)[0], x, strict=True):
            check(y, row, w)
        assert called == []


def test_what_they_cannot_take_goes_the_other_way(monkeypatch):
    """Infinities of float16, and weights at an odd address."""

    def not_called(*_):
        raise AssertionError("this is not for them")

    monkeypatch.setattr(compiled, "load", lambda: compiled.Kernels(*[not_called] * 3))
    x = np.ones((1, 40), np.float32)
    infinite = weights("f16")
    infinite[1, 1] = np.inf
    odd = np.frombuffer(bytes(1) + weights("bf16").tobytes(), np.uint16, 24 * 40, 1).reshape(24, 40)
    with Linear(1) as linear:
        linear.compile()
        for w in (infinite, odd):
            linear.plans = {w.dtype: Plan("bits", 1 << 20, compiled=True)}
            (y,) = linear(x, Matrix.of(w))
            np.testing.assert_allclose(y[0], as_float32(w).sum(1), rtol=1e-5)


def test_they_are_measured_against_the_other_ways_and_noted_apart(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(module, "_MEASURE_S", 0.0)
    path, dtype = tmp_path / "linear.json", np.dtype(np.uint16)
    with Linear(1, cache=path) as linear:
        linear.prepare([dtype])
        assert not linear.plans[dtype].compiled
        linear.compile()
        linear.prepare([dtype])
        found = linear.plans[dtype]
    assert set(module.json.loads(path.read_text()).popitem()[1]) == {"uint16", "uint16 compiled"}
    with Linear(1, cache=path) as linear:
        linear.compile()
        monkeypatch.setattr(Linear, "_measure", None)
        linear.prepare([dtype])
        assert linear.plans[dtype] == found


def test_without_numba_there_are_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert compiled.load() is None
    with Linear(1) as linear:
        linear.compile()
        w = weights("bf16")
        check(linear(np.ones((1, 40), np.float32), Matrix.of(w))[0][0], np.ones(40), w)
