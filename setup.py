"""What setup.cfg cannot say: what is compiled, and left out where there is no compiler."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "tpilite._products",
            ["tpilite/products.c"],
            extra_compile_args=["-O3", "-pthread"],
            optional=True,
        ),
        Extension(
            "tpilite.net._exchange", ["tpilite/net/exchange.c"], extra_compile_args=["-O3"], optional=True
        ),
    ]
)
