"""The BLAS under NumPy, held to one thread: the threads that share the work are `linear`'s own.

A BLAS reads its thread count from the environment when it is loaded, which bin/tpilite-node sees to. In a
program that has imported NumPy already, the loaded OpenBLAS is asked by its own function instead. Other
libraries (Accelerate on macOS) decide for themselves there.
"""

import ctypes
import logging
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

# With the name changes of NumPy's own wheels, and as distributions build it.
_SETTERS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)


def limit_blas_threads() -> None:
    """Holds every OpenBLAS that this process has loaded to one thread, from now on and for everybody."""
    found = False
    for path in sorted(_loaded_libraries()):
        library = ctypes.CDLL(path)
        for name in _SETTERS:
            if hasattr(library, name):
                getattr(library, name)(ctypes.c_int(1))
                found = True
    if not found:
        logger.debug("no OpenBLAS found to hold to one thread; its environment variables still count")


def _loaded_libraries() -> set[str]:
    """The files of the OpenBLAS libraries that are loaded, or that NumPy's wheel brings along."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line.split(maxsplit=5)[5] for line in lines if "openblas" in line and "/" in line}
    except OSError:
        folder = Path(np.__file__).parent
        return {str(p) for p in (folder / ".dylibs").glob("*openblas*")}
