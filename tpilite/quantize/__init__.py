"""Weights made smaller: blocks of GGML's low-bit types from float32 rows, by least squares.

Begin with `quantizers.py`, one function a type and `quantize_rows` over all; `groups.py` finds the scales.
May import: `errors`, `arrays` and `linear`.
Must never know: files, models, ranks.
"""
