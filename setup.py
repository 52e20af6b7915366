"""What setup.cfg cannot say: the products that are compiled, and left out where there is no compiler."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "tpilite._products",
            ["tpilite/products.c"],
            extra_compile_args=["-O3", "-pthread"],
            optional=True,
        )
    ]
)
