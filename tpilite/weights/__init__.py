"""From a file to rows in memory: what a checkpoint holds, who owns which part, and what stays resident.

Begin with `partition.py` (who owns what), then `checkpoint.py`, `slices.py` (our format) and `pager.py`.
May import: `model` and `linear`, whose weights it fills in, and `machine` for what memory there is.
Must never know: sockets, requests, text.
"""
