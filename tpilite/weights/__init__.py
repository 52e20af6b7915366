"""From a file to rows in memory: what a checkpoint holds, who owns which part, and what stays resident.

Begin with `partition.py` (who owns what), then `checkpoint.py` and `slices.py` (the model's files and ours).
What is larger than memory: `residency.py` chooses what stays, `part_table.py` owns what is where, `loader.py`
reads, and `pager.py` keeps the budget.
May import: `model` and `linear`, whose weights it fills in, `quantize`, `machine`, and what they stand on.
Must never know: sockets, requests, text.
"""
