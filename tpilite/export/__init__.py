"""A model as a GGUF file, for llama.cpp and for us: what `formats`, `config` and `text` read, written.

Begin with `gguf_file.py`; `architecture.py` says what the model is, `vocabulary.py` its tokenizer.
May import: `weights`, `text` and what they stand on.
Must never know: sockets, requests, ranks.
"""
