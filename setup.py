"""What setup.cfg cannot say: what is compiled, and left out where there is no compiler."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "tpilite.native._products",
            ["tpilite/native/products.c"],
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
