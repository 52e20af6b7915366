"""Ranks that talk over sockets: bytes (`wire`), then I/O (`channel`), then meaning (`group`).

Begin with `wire.py`, the protocol's specification, and `sums.py` for the ways of an all-reduce.
May import: `errors` and `collective`, whose operations it implements.
Must never know: models, weights, engines, slices: it moves messages and sums arrays.
"""
