"""y = x W^T for stored weights of any dtype: the one place where stored weights become numbers.

Begin with `linear.py`; `packing.py` is bfloat16 in twelve bits, `team.py` the threads that share a product.
May import: NumPy and nothing of the package.
Must never know: files, models, sockets, or who else makes the products (compiled ones are handed in).
"""
