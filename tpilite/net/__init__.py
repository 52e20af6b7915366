"""Ranks that talk over sockets: bytes (`wire`), then I/O (`channel`), then meaning (`group`).

Begin with `wire.py` and `messages.py`, the protocol's specification; then `rendezvous.py` for how a group
forms, and `sums.py` for the algorithms of an all-reduce.
May import: `errors`, `arrays`, `closing` and `collective`, whose operations it implements.
Must never know: models, weights, engines, slices: it moves messages and sums arrays.
"""
