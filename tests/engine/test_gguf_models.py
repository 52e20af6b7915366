"""A GGUF as it lies gives the logits of its weights' values."""

from dataclasses import replace

import numpy as np
import pytest
import reference
from checkpoints import hf_config
from gguf_files import MIXED, WIDE, gguf_config, in_hugging_faces_order, write_gguf_model

from tpilite import LLM
from tpilite.config.llama import RopeScaling
from tpilite.dtypes import BLOCK_SIZES

IDS = list(np.random.default_rng(7).integers(0, 50, 20))


def expected_logits(config, values, ids=IDS):
    return reference.logits(hf_config(config), in_hugging_faces_order(config, values), np.array(ids))


def assert_close(logits, expected):
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("dtypes", "changes"),
    [
        ("F32", {}),
        ("F16", {}),
        ("BF16", {"attention_bias": True, "mlp_bias": True}),
        *((name, {} if size.n_weights == 32 else WIDE) for name, size in BLOCK_SIZES.items()),
        (MIXED, WIDE | {"tie_word_embeddings": False}),
    ],
    ids=str,
)
def test_logits_are_those_of_the_weights_values(dtypes, changes, tmp_path):
    config = gguf_config(**changes)
    values = write_gguf_model(tmp_path / "x.gguf", config, dtypes)
    with LLM(tmp_path / "x.gguf", threads=2, memory_budget="unlimited") as llm:
        assert llm.config == config
        assert_close(llm.logits(IDS), expected_logits(config, values))


def test_rotary_frequencies_are_divided_by_what_a_tensor_says(tmp_path):
    config = gguf_config(rope_divisors=(4.0,) * 8)
    values = write_gguf_model(tmp_path / "x.gguf", config)
    stretched = replace(config, rope_divisors=(), rope_scaling=RopeScaling("linear", 4.0))
    with LLM(tmp_path / "x.gguf", threads=2, memory_budget="unlimited") as llm:
        assert llm.config == config
        assert_close(llm.logits(IDS), expected_logits(stretched, values))


def test_paging_changes_nothing(tmp_path):
    config = gguf_config(**WIDE)
    values = write_gguf_model(tmp_path / "x.gguf", config, "Q4_K")
    with LLM(tmp_path, threads=2, memory_window=2) as llm:
        assert_close(llm.logits(IDS), expected_logits(config, values))
        assert llm.usage.paging.streaming_bytes > 0
