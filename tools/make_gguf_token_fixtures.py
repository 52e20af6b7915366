"""Writes tests/fixtures/gguf_tokens.json: what llama.cpp makes of hard lines by a GGUF's tokenizer.

    python tools/make_gguf_token_fixtures.py

Development only: needs `llama-cpp-python`. Of the names for how a text is split these are the ones that no
tokenizer.json in the fixtures stands for; what the others give is known from `tokenizers`.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(_TESTS))

from gguf_files import vocab_of_pairs, write_gguf  # noqa: E402

_TRAINED = {"default": "falcon", "seed-coder": "gpt4o"}  # by name, on whose pieces the merges were learned
_SIZES = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32}


def _tokenize(metadata: dict[str, Any], lines: list[str]) -> list[list[int]]:
    """The ids that llama.cpp gives for each line."""
    sizes: dict[str, Any] = {f"llama.{key}": value for key, value in _SIZES.items()}
    sizes |= {"llama.attention.head_count": 1, "llama.attention.layer_norm_rms_epsilon": 1e-5}
    n_tokens = len(metadata["tokenizer.ggml.tokens"])
    embedding = {"token_embd.weight": ("F32", (n_tokens, 32), np.zeros((n_tokens, 32), np.float32))}
    with tempfile.TemporaryDirectory() as folder:
        path = write_gguf(
            Path(folder, "x.gguf"), embedding, {"general.architecture": "llama", **sizes, **metadata}
        )
        model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        return [model.tokenize(line.encode(), add_bos=False, special=False) for line in lines]


def main() -> None:
    golden = json.loads((_TESTS / "fixtures" / "tokenizers.json").read_text(encoding="utf-8"))
    contents = {case["name"]: case["tokenizer.json"] | {"added_tokens": []} for case in golden["cases"]}
    lines = [line for line in golden["lines"] if line]
    found = {
        pre: {"family": family, "ids": _tokenize(vocab_of_pairs(contents[family], pre), lines)}
        for pre, family in _TRAINED.items()
    }
    text = json.dumps(found, separators=(",", ":"))
    (_TESTS / "fixtures" / "gguf_tokens.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
