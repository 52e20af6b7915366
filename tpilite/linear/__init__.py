"""y = x W^T for stored weights of any dtype: the one place where stored weights become numbers.

Begin with `linear.py`. `matrix.py` is what it multiplies, `chunks.py` how NumPy does it, `block_types.py`
GGML's low-bit types, `packing.py` bfloat16 in twelve bits, `thread_pool.py` the threads, `products.py` what
code that is handed in must do.
May import: NumPy, and `arrays`, `closing` and `dtypes` of the package.
Must never know: files, models, sockets, or who else makes the products (compiled ones are handed in).
"""
