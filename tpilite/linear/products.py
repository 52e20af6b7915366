"""What `Linear` asks of code that makes products faster than NumPy, where such code is handed in."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tpilite.arrays import Array
from tpilite.linear.matrix import Weights


class Product(NamedTuple):
    """Some rows of a matrix [n, D], stored, and where their products with x [T, D] go."""

    rows: Weights
    out: Array  # [T, n], each row's numbers side by side


class Products(Protocol):
    """Products by several threads: the caller of `multiply` and those that are in `serve`."""

    def takes(self, rows: Weights) -> bool:
        """Whether `multiply` knows rows of this kind; NumPy multiplies the others."""
        ...

    def multiply(self, x: Array, products: Sequence[Product]) -> None:  # [T, D]
        """Each product's `out` = x rows^T."""
        ...

    def serve(self, n_recalls: int) -> int:
        """Helps until there have been other than `n_recalls` recalls, and says how many there have been."""
        ...

    def recall(self) -> None:
        """Brings every thread back from `serve`."""
        ...

    def close(self) -> None:
        """Gives the memory back. No thread may be in `serve`, nor call anything here again."""
        ...
