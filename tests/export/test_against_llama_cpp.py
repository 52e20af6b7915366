"""Files of --export as llama.cpp runs them, where llama-cpp-python is installed."""

from pathlib import Path

import numpy as np
import pytest
from tiny_model import write_golden

from tpilite import LLM
from tpilite.export.gguf_file import export_gguf
from tpilite.quantize.recipe import Recipe
from tpilite.shipped import find_model
from tpilite.weights.checkpoint import Checkpoint

llama_cpp = pytest.importorskip("llama_cpp")

# It rounds activations to eight bits beside weights in blocks, and to bfloat16 beside those.
_ROUNDED = 0.03


def logits_of_llama_cpp(path: Path, ids: list[int]) -> np.ndarray:
    llm = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, n_threads=1, verbose=False)
    llm.eval(ids)
    return np.array(llm.scores[: len(ids)])


@pytest.mark.parametrize(
    "case",
    ["all_biases_tied", "mistral", "qwen2", "qwen3", "smollm3", "granite", "rope_linear", "rope_llama3"],
)
def test_every_family_has_the_same_scores(case: str, tmp_path: Path) -> None:
    folder, found = write_golden(tmp_path, case)
    with Checkpoint(folder) as checkpoint:
        export_gguf(checkpoint, tmp_path / "x.gguf")
    ids = list(found["ids"][:50])
    with LLM(folder, threads=1, memory_budget="unlimited") as llm:
        expected = llm.logits(ids)
    difference = np.abs(logits_of_llama_cpp(tmp_path / "x.gguf", ids) - expected).max()
    assert difference <= _ROUNDED * np.abs(expected).max()


@pytest.mark.parametrize("kind", [None, "q8_0", "q6_k", "q5_k", "q4_k", "q4_0"])
def test_the_model_that_ships_has_the_same_tokens_and_scores(kind: str | None, tmp_path: Path) -> None:
    path, text = (
        tmp_path / "x.gguf",
        'Once upon a time, she said: "Hello,  12 friends!"\n\tCaf\u00e9 \U0001f600',
    )
    with Checkpoint(find_model("fable"), recipe=None if kind is None else Recipe(kind)) as checkpoint:
        export_gguf(checkpoint, path)
    with LLM(path, threads=1, memory_budget="unlimited") as llm:
        ids = llm.encode(text).ids
        expected = llm.logits(ids)
    tokenizer = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    assert tokenizer.tokenize(text.encode(), add_bos=True, special=False) == ids
    difference = np.abs(logits_of_llama_cpp(path, ids) - expected).max()
    assert difference <= _ROUNDED * np.abs(expected).max()
