"""Text to token ids and back, and conversations to prompts.

Begin with `load.py`, which finds the tokenizer of a model folder, and `chat.py` for the chat formats.
May import: `errors`, `formats` and `config`.
Must never know: weights, maths, ranks, HTTP.
"""
