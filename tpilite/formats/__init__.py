"""Files as others define them: headers checked, tensors as ranges of bytes, nothing said of what they mean.

Begin with `stored.py`, an open file and its tensors; then `safetensors.py` and `gguf.py`. `model_files.py` is
what a user's path leads to, `writing.py` what writing has in common.
May import: `errors`, `closing` and `dtypes`.
Must never know: models, tokenizers, ranks.
"""
