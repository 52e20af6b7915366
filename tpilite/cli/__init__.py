"""The program `tpilite-node`: the composition root, which puts everything together from the options.

Begin with `main.py`; `options.py` has what can be asked for.
May import: everything.
Must never be imported by anything but `__main__` and `bin/tpilite-node`.
"""
