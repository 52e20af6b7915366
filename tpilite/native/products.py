"""The products of `linear`, by `products.c`.

For one row of x they read the weights at the memory's own rate, twice as fast as NumPy does; many rows take a
fifth less: benchmarks/RESULTS.md has the figures.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tpilite.arrays import Array
from tpilite.linear.matrix import Blocks, Weights
from tpilite.linear.packing import Packed
from tpilite.linear.products import Product
from tpilite.native.bindings import FOLDER, Unavailable, address, load_library

_DTYPES = {np.dtype(np.uint16): 0, np.dtype(np.float16): 1, np.dtype(np.float32): 2}
_PACKED = 3
_OF_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
_OF_256 = ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
BLOCK_TYPES = {name: _PACKED + 1 + place for place, name in enumerate(_OF_32 + _OF_256)}

# The rows of x are laid out in groups of this many, or of less.
_GROUP = 8

_Pool = ctypes.c_void_p
_Pieces = ctypes.c_void_p
_Address = ctypes.c_void_p
_Int = ctypes.c_int64


class _Piece(ctypes.Structure):
    _fields_ = (
        ("rows", _Address),
        ("out", _Address),
        ("n_rows", _Int),
        ("out_stride", _Int),
        ("dtype", _Int),
        ("row_bytes", _Int),
        ("scale", ctypes.c_float),
        ("places", _Address),
        ("firsts", _Address),
        ("values", _Address),
    )


_FUNCTIONS = {
    "products_run_here": (ctypes.c_int,),
    "products_new_pool": (_Pool, _Int),
    "products_free_pool": (None, _Pool),
    "products_recall": (None, _Pool),
    "products_serve": (_Int, _Pool, _Int),
    "products_multiply_pieces": (None, _Pool, _Pieces, _Int, _Address, _Int, _Int, _Address, ctypes.c_int),
}


def load(folder: Path = FOLDER) -> ctypes.CDLL:
    """The compiled library in `folder`. Raises `Unavailable`, also for a processor that cannot run it."""
    library = load_library("_products", _FUNCTIONS, folder)
    if not library.products_run_here():
        raise Unavailable("compiled products need a processor with AVX2, FMA and F16C")
    return library


class CompiledProducts:
    """`Products` by a loaded library, for `n_threads` threads.

    Blocks are multiplied with AVX-512 where the processor has it; whether it may be used is for tests to say.
    """

    def __init__(self, library: ctypes.CDLL, n_threads: int, allow_avx512: bool = True) -> None:
        self._library = library
        self._allow_avx512 = allow_avx512
        self._pool = library.products_new_pool(n_threads)
        if not self._pool:
            raise MemoryError
        self._panels = np.empty(0, np.float32)

    def serve(self, n_recalls: int) -> int:
        """Helps until there have been other than `n_recalls` recalls, and says how many there have been."""
        return int(self._library.products_serve(self._pool, n_recalls))

    def recall(self) -> None:
        """Brings every thread back from `serve`."""
        self._library.products_recall(self._pool)

    def close(self) -> None:
        """Gives the memory back. No thread may be in `serve`, nor call anything here again."""
        self._library.products_free_pool(self._pool)

    def takes(self, rows: Weights) -> bool:
        """Whether `multiply` knows rows of this kind."""
        return not isinstance(rows, Blocks) or rows.type.name in BLOCK_TYPES

    def multiply(self, x: Array, products: Sequence[Product]) -> None:  # [T, D]
        """Each product's `out` = x rows^T."""
        n_x, n_cols = x.shape
        n_panels = -(-n_x // _GROUP) * _GROUP * n_cols if n_x > 1 else 0
        if self._panels.size < n_panels:
            self._panels = np.empty(n_panels, np.float32)
        pieces = (_Piece * len(products))(*(_piece(product) for product in products))
        self._library.products_multiply_pieces(
            self._pool,
            pieces,
            len(pieces),
            address(x),
            n_x,
            n_cols,
            address(self._panels),
            self._allow_avx512,
        )


def _piece(product: Product) -> _Piece:
    rows, out = product
    where, stride, n_rows = address(out), out.strides[0] // 4, rows.shape[0]
    if isinstance(rows, Packed):
        stored_apart = address(rows.places), address(rows.firsts), address(rows.values)
        return _Piece(address(rows.words), where, n_rows, stride, _PACKED, 0, 2.0**rows.gap, *stored_apart)
    if isinstance(rows, Blocks):
        row_bytes = rows.bytes.strides[0]
        return _Piece(address(rows.bytes), where, n_rows, stride, BLOCK_TYPES[rows.type.name], row_bytes)
    return _Piece(address(rows), where, n_rows, stride, _DTYPES[rows.dtype])
