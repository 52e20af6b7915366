"""What a model is: its shape and how its publisher wants it used, from the files that say so.

Begin with `llama.py`, the shape that everything else goes by; `hugging_face.py` reads it from config.json.
May import: `formats`, `checks` and `errors`.
Must never know: weights, tokens, how anything is computed.
"""
