"""The compiled libraries for tests of them, which TPILITE_NATIVE does not concern."""

import ctypes
from collections.abc import Callable

import pytest

from tpilite.linear.linear import Linear
from tpilite.linear.plans import KERNELS
from tpilite.native import bindings, products
from tpilite.native.bindings import Unavailable
from tpilite.native.products import CompiledProducts


def _loaded(load: Callable[[], ctypes.CDLL]) -> ctypes.CDLL | None:
    try:
        return load()
    except Unavailable:
        return None


PRODUCTS = _loaded(products.load)
EXCHANGE = _loaded(bindings.load_exchange)

needs_products = pytest.mark.skipif(PRODUCTS is None, reason="there are no compiled products here")
needs_exchange = pytest.mark.skipif(EXCHANGE is None, reason="there is no compiled exchange here")


def by_both(numpy: object, compiled: object, needs: pytest.MarkDecorator) -> list[object]:
    """Parameters of a test that both sides must pass."""
    return [pytest.param(numpy, id="numpy"), pytest.param(compiled, id="compiled", marks=needs)]


# Everything that makes products: NumPy by each of its kernels, and compiled code.
MAKERS = [*KERNELS, *(["compiled"] if PRODUCTS else [])]


def new_linear(n_threads: int, maker: str | None = None) -> Linear:
    """A `Linear` whose products one of MAKERS makes, on macOS too; None: NumPy by its fastest kernel."""
    if maker == "compiled":
        assert PRODUCTS is not None
        return Linear(n_threads, CompiledProducts(PRODUCTS, n_threads), blas_for_many=False)
    return Linear(n_threads, kernel=maker)
