"""What setup.cfg cannot say: what is compiled, and left out where there is no compiler."""

import sys
from glob import glob

from setuptools import Extension, setup

if sys.maxsize < 2**32:
    sys.exit(
        "tpilite needs a 64-bit system and Python: a model's slices are mapped into memory, and NumPy, "
        "sentencepiece, tiktoken and msgpack have no 32-bit wheels"
    )

setup(
    ext_modules=[
        Extension(
            "tpilite.native._products",
            ["tpilite/native/products.c", "tpilite/native/blocks_avx512.c"],
            depends=glob("tpilite/native/*.h"),
            extra_compile_args=["-O3", "-pthread"],
            optional=True,
        ),
        Extension(
            "tpilite.native._exchange",
            ["tpilite/native/exchange.c"],
            extra_compile_args=["-O3"],
            optional=True,
        ),
    ]
)
