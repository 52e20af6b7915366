"""Conversations to prompts by the model's own chat template, and answers to their parts.

Begin with `format.py`; `template_process.py` runs templates apart, `answers.py` reads what models mark.
May import: `text`, `checks` and `closing`, and what they stand on.
Must never know: weights, maths, ranks, HTTP.
"""
