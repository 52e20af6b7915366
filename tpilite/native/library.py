"""Whether compiled code is used, and what it then does instead of NumPy: decided here alone.

It is used if both libraries load and this processor can run them, unless the environment has
TPILITE_NATIVE=0.
"""

import ctypes
import functools
import logging
import os
from typing import NamedTuple

from tpilite.linear.products import Products
from tpilite.native import exchange, products
from tpilite.native.bindings import Unavailable
from tpilite.net import sums

logger = logging.getLogger(__name__)


class _Loaded(NamedTuple):
    products: ctypes.CDLL
    exchange: ctypes.CDLL


def new_products(n_threads: int) -> Products | None:
    """Compiled products by so many threads; None where NumPy makes them."""
    loaded, _ = _decision()
    return None if loaded is None else products.CompiledProducts(loaded.products, n_threads)


def new_sums() -> sums.NewSum:
    """What makes the sums of a group."""
    loaded, _ = _decision()
    return sums.new_sum if loaded is None else exchange.sums_by(loaded.exchange)


def why_not() -> str:
    """Why NumPy does everything; empty where compiled code is used."""
    return _decision()[1]


@functools.cache
def _decision() -> tuple[_Loaded | None, str]:
    """The libraries, or None and why they are not used."""
    if os.environ.get("TPILITE_NATIVE") == "0":
        return None, "TPILITE_NATIVE is 0"
    try:
        return _Loaded(products.load(), exchange.load()), ""
    except Unavailable as error:
        logger.debug("%s", error)
        return None, str(error)
