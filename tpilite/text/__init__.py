"""Text to token ids and back, and where a model's chat templates are written.

Begin with `load.py`, which finds the tokenizer of a model folder, then `json_files.py` for the parts of which
most tokenizers are made.
May import: `errors`, `formats` and `config`.
Must never know: weights, maths, ranks, HTTP.
"""
