"""Whether compiled code is used, and what it then does instead of NumPy: decided here alone.

It is used if it can be imported, both libraries load and this processor can run them, unless the environment
has TPILITE_NATIVE=0. All other modules do without `tpilite.native`.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Callable

from tpilite.linear.products import Products

try:
    from tpilite.native import bindings, products
except ImportError as error:
    _IMPORT_ERROR = f"it cannot be imported: {error}"
else:
    _IMPORT_ERROR = ""

logger = logging.getLogger(__name__)


def new_products(n_threads: int) -> Products | None:
    """Compiled products by so many threads; None where NumPy makes them."""
    return _decision()[0](n_threads)


def exchange_library() -> ctypes.CDLL | None:
    """What makes the exchanges between ranks; None where NumPy and Python make them."""
    return _decision()[1]


def why_not() -> str:
    """Why NumPy does everything; empty where compiled code is used."""
    return _decision()[2]


@functools.cache
def _decision() -> tuple[Callable[[int], Products | None], ctypes.CDLL | None, str]:
    """What makes products, what makes exchanges, and why NumPy does."""
    why = "TPILITE_NATIVE is 0" if os.environ.get("TPILITE_NATIVE") == "0" else _IMPORT_ERROR
    if not why:
        try:
            of_products, of_exchange = products.load(), bindings.load_exchange()
            return functools.partial(products.CompiledProducts, of_products), of_exchange, ""
        except bindings.Unavailable as error:
            why = str(error)
    logger.debug("no compiled code: %s", why)
    return lambda _: None, None, why
