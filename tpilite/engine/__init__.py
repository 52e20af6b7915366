"""One pass after another: from prompts of ids to sampled ids, the same steps on every rank.

Begin with `session.py` (text in, text out), then `engine.py` (rank 0) and `runner.py` (every rank).
May import: `chat`, `weights`, `model`, `native` and what they stand on, and `version`.
Must never know: HTTP, terminals, how ranks were found. A rank receives its collective.
"""
