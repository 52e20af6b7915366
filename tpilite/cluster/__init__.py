"""Several machines that run one model: rank 0's side, the others' side, and the transfer of slices.

Begin with `host.py` (rank 0) and `worker.py` (all others); `slice_protocol.py` is what both agree on, and
`splits.py` which slices stand where.
May import: `engine`, `weights`, `net` and what they stand on.
Must never know: HTTP clients of the service, terminals, options.
"""
