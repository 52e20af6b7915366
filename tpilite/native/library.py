"""The compiled libraries that lie beside the modules which use them, where pip found a C compiler."""

import ctypes
import logging
from collections.abc import Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

logger = logging.getLogger(__name__)


def load_library(folder: Path, name: str, functions: Mapping[str, tuple[Any, ...]]) -> ctypes.CDLL | None:
    """The library `name` in `folder` with these functions, each with what it returns and what it takes.

    None where there is no such library, or none that can be used.
    """
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.exists():
            break
    else:
        logger.debug("no %s: the package was installed without a compiler", name)
        return None
    try:
        library = ctypes.CDLL(str(path))
        for function, (returned, *taken) in functions.items():
            getattr(library, function).restype = returned
            getattr(library, function).argtypes = taken
    except (OSError, AttributeError) as error:
        logger.warning("%s cannot be used: %s", path, error)
        return None
    return library


def address(array: NDArray[Any]) -> int:
    """Where its first number lies: a third of the time that `array.ctypes` takes."""
    number: int = array.__array_interface__["data"][0]
    return number
