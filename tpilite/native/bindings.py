"""How a compiled library beside these modules becomes callable."""

import ctypes
import logging
from collections.abc import Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

logger = logging.getLogger(__name__)

# Of each function of a library: what it returns, then what it takes.
Functions = Mapping[str, tuple[Any, ...]]

FOLDER = Path(__file__).parent


class Unavailable(Exception):
    """A library that is not there, or that cannot be used; the text says why."""


def load_library(name: str, functions: Functions, folder: Path = FOLDER) -> ctypes.CDLL:
    """The library `name` in `folder`, whose functions can be called. Raises `Unavailable`."""
    paths = [folder / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise Unavailable(f"there is no {name}: the package was installed without a compiler")
    try:
        library = ctypes.CDLL(str(path))
        for function, (returned, *taken) in functions.items():
            getattr(library, function).restype = returned
            getattr(library, function).argtypes = taken
    except AttributeError as error:  # a function that there is not: the file is left from an earlier install
        reason = f"{path} was built for another version; run pip install again"
        logger.info("%s", reason)
        raise Unavailable(reason) from error
    except OSError as error:
        logger.warning("%s cannot be used: %s", path, error)
        raise Unavailable(f"{path} cannot be used: {error}") from error
    return library


def load_exchange(folder: Path = FOLDER) -> ctypes.CDLL:
    """The library in `folder` of `exchange.py`, here for who does not import that. Raises `Unavailable`."""
    pointer, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    functions = {
        "exchange_run": (flag, pointer, flag),
        "exchange_sum": (flag, *[pointer] * 4, size, pointer, size, flag),
    }
    return load_library("_exchange", functions, folder)


def address(array: NDArray[Any]) -> int:
    """Where its first number lies: a third of the time that `array.ctypes` takes."""
    number: int = array.__array_interface__["data"][0]
    return number
