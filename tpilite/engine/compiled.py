"""The compiled code that is handed to the engine and to the groups: nothing, where it cannot be imported.

All other modules do without `tpilite.native`; its `library` decides whether it is used.
"""

from tpilite.linear.products import Products
from tpilite.net import sums

__all__ = ["new_products", "new_sums", "why_not"]

try:
    from tpilite.native.library import new_products, new_sums, why_not
except ImportError as _error:
    _REASON = f"it cannot be imported: {_error}"

    def new_products(n_threads: int) -> Products | None:  # noqa: ARG001
        """None: NumPy makes the products."""
        return None

    def new_sums() -> sums.NewSum:
        """What makes the sums of a group."""
        return sums.new_sum

    def why_not() -> str:
        """Why NumPy does everything."""
        return _REASON
