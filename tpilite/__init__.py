"""tpilite: one Llama model run together by several weak machines, in NumPy."""

from tpilite.version import __version__

__all__ = ["__version__"]
