"""The maths of a Llama, as its papers write it, in float32 on rows [T, D].

Begin with `llama.py`; `ops.py` has the functions without weights, `kv_cache.py` what attention remembers,
and `kept.py` in how many bits.
May import: `config`, `linear`, `collective` for the sums over ranks, and what they stand on.
Must never know: files, sockets, tokens' texts, requests, or where the weights come from.
"""
