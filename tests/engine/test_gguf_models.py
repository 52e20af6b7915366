"""A GGUF as it lies gives the logits of its weights' values."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
from checkpoints import hf_config
from gguf_files import (
    MIXED,
    WIDE,
    gguf_config,
    in_ggufs_order,
    in_hugging_faces_order,
    metadata_of,
    vocab_of_pairs,
    write_gguf,
    write_gguf_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import random_tensors
from tiny_model import FAMILIES, GOLDEN

from tpilite import LLM, SamplingParams
from tpilite.config.hugging_face import config_from_hf
from tpilite.config.llama import RopeScaling, YarnScaling
from tpilite.dtypes import BLOCK_SIZES
from tpilite.errors import CheckpointError, TpiliteError
from tpilite.linear.matrix import as_float32
from tpilite.weights.gguf_tensors import gguf_name
from tpilite.weights.partition import LM_HEAD

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


def test_a_model_in_parts_is_that_of_one_file(tmp_path):
    config = gguf_config()
    values = write_gguf_model(tmp_path / "whole.gguf", config, "F32")
    (tmp_path / "parts").mkdir()
    first = tmp_path / "parts" / "x-00001-of-00003.gguf"
    tensors = [
        (gguf_name(name), ("F32", rows.shape, rows)) for name, rows in values.items() if name != LM_HEAD
    ]
    for number in range(3):
        path = first.with_name(f"x-{number + 1:05}-of-00003.gguf")
        said = {"split.no": number, "split.count": 3}
        write_gguf(path, dict(tensors[number::3]), said | (metadata_of(config) if number == 0 else {}))
    expected = expected_logits(config, values)
    for path in (first, first.parent):
        with LLM(path, threads=1, memory_budget="unlimited") as llm:
            assert_close(llm.logits(IDS), expected)
    write_gguf(tmp_path / "parts" / "y-00001-of-00002.gguf", dict(tensors), metadata_of(config))
    write_gguf(tmp_path / "parts" / "y-00002-of-00002.gguf", dict(tensors[:1]), {})
    with pytest.raises(CheckpointError, match=r"both hold 'token_embd\.weight'; download"):
        LLM(tmp_path / "parts" / "y-00001-of-00002.gguf")


_VOCAB = vocab_of_pairs(
    json.loads((GOLDEN.parent / "tokenizers.json").read_text(encoding="utf-8"))["cases"][0]["tokenizer.json"],
    "gpt-2",
    unknown_token_id=1,
    padding_token_id=1,
    eot_token_id=1,
    add_bos_token=False,
)
_SAID = metadata_of(gguf_config(vocab_size=500, rope_scaling=YarnScaling(2.0, 64, 1.0))) | _VOCAB
_SAID |= {"tokenizer.chat_template": "{{ messages[0].content }}", "llama.attention.sliding_window": 64}
_NUMBERS = (
    0,
    1,
    -1,
    7,
    2**31,
    2**32 - 1,
    2**63,
    0.0,
    -1.0,
    0.5,
    1e30,
    float("inf"),
    float("nan"),
    True,
    False,
)
_TEXTS = ("", "x", "\n", "llama", "yarn", "no_vocab")
_LISTS = ([], ["a"], ["a", "b", "a"], [1, 2], np.zeros(3), np.zeros(1))


@given(
    changes=st.dictionaries(
        st.sampled_from(sorted(_SAID)), st.sampled_from([*_NUMBERS, *_TEXTS, *_LISTS]), min_size=1, max_size=2
    ),
    missing=st.sets(st.sampled_from(sorted(_SAID)), max_size=1),
)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_whatever_a_file_says_of_itself_it_is_a_model_or_a_line_that_names_it(changes, missing):
    config = gguf_config(vocab_size=500, num_hidden_layers=1)
    said = {key: value for key, value in (_SAID | changes).items() if key not in missing}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.gguf")
        write_gguf_model(path, config, metadata=said, only=True)
        refused = "x.gguf"
        try:
            with LLM(path, threads=1, memory_budget="unlimited") as llm:
                llm.generate([1, 2], SamplingParams(length=1, seed=0))
        except TpiliteError as error:
            refused = str(error)
    assert "x.gguf" in refused
    assert "\n" not in refused


# Which layers rotate, and between which indices YaRN blends, a GGUF cannot say as freely.
_IN_GGUF = sorted(set(FAMILIES) - {"smollm3_odd", "qwen3_yarn"})
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@pytest.mark.parametrize("family", _IN_GGUF)
def test_a_sister_family_gives_the_logits_of_transformers(family, tmp_path):
    content = json.loads((GOLDEN / family / "config.json").read_text())
    found = np.load(GOLDEN / family / "golden.npz")
    interleaved = content["model_type"] not in ("qwen2", "qwen3")
    config = replace(config_from_hf(content), rope_interleaved=interleaved)
    stored = str(found["stored"])
    rows = in_ggufs_order(config, random_tensors(content, int(found["seed"]), stored))
    tensors = {
        gguf_name(name): (_DTYPES[stored], t.shape, t) if t.ndim == 2 else ("F32", t.shape, as_float32(t))
        for name, t in rows.items()
    }
    write_gguf(tmp_path / "x.gguf", tensors, metadata_of(config))
    with LLM(tmp_path / "x.gguf", threads=1, memory_budget="unlimited") as llm:
        assert llm.config.context == config.context
        assert_close(llm.logits(found["ids"].tolist())[found["rows"]], found["logits"])
