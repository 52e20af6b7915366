"""Weights made smaller: blocks of GGML's low-bit types from float32 rows, by least squares.

Begin with `quantizers.py`, one function a type and `quantize_rows` over all; `groups.py` finds the scales.
`recipe.py` makes a whole model's, as its rows are read.
May import: `machine`, `linear`, `formats` and what they stand on.
Must never know: what a tensor is for, ranks.
"""
