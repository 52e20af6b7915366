"""Tokenizers of folders as GGUF metadata: who reads it gets the same tokens."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import FIXTURES, loaded, train, without_flags, write

from tpilite.errors import ConfigError
from tpilite.export.vocabulary import vocabulary_of
from tpilite.formats.model_files import ModelFiles
from tpilite.shipped import find_model
from tpilite.text.gguf_vocab import from_gguf

_GOLDEN = json.loads((FIXTURES.parent / "tokenizers.json").read_text(encoding="utf-8"))
_JSON = {case["name"]: case["tokenizer.json"] for case in _GOLDEN["cases"]}


def assert_same(folder: Path, vocab_size: int) -> dict[str, Any]:
    """The metadata of the folder's tokenizer, which it has been compared with."""
    right = loaded(folder, vocab_size)
    metadata = vocabulary_of(ModelFiles(folder), vocab_size)
    found = from_gguf(folder, metadata, vocab_size)
    assert found is not None
    assert len(metadata["tokenizer.ggml.tokens"]) == vocab_size
    assert (found.bos_id, found.add_bos) == (right.bos_id, right.add_bos)
    assert right.eos_id in (found.eos_id, None)
    assert found.specials == right.specials
    assert found.eos_ids >= right.eos_ids
    for line in _GOLDEN["lines"]:
        for allowed in (True, False):
            ids = right.encode(line, allow_special=allowed)
            assert found.encode(line, allow_special=allowed) == ids, line
            assert found.decode(ids) == right.decode(ids)
    return metadata


@pytest.mark.parametrize(
    ("family", "pre"),
    [
        ("gpt2", "gpt-2"),
        ("smollm", "starcoder"),
        ("llama3", "llama-bpe"),
        ("qwen2", "qwen2"),
        ("qwen35", "qwen35"),
        ("tekken", "tekken"),
        ("gpt4o", "gpt-4o"),
        ("deepseek3", "deepseek-v3"),
        ("deepseek_coder", "deepseek-coder"),
        ("deepseek_llm", "deepseek-llm"),
    ],
)
def test_pairs_are_called_by_how_they_split(family: str, pre: str, tmp_path: Path) -> None:
    without_flags(_JSON[family], tmp_path)
    metadata = assert_same(tmp_path, 1000)
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", pre)


@pytest.mark.parametrize("add_prefix", [True, False])
def test_pieces_keep_their_scores(add_prefix: bool, tmp_path: Path) -> None:
    metadata = assert_same(write(tmp_path, train(add_dummy_prefix=add_prefix)), 448)
    assert metadata["tokenizer.ggml.add_space_prefix"] is add_prefix


def test_added_tokens_keep_their_names(tmp_path: Path) -> None:
    table = {
        "400": {"content": "<|user|>", "special": True, "normalized": False},
        "402": {"content": "\u00a7word", "special": False, "normalized": False},
    }
    write(tmp_path, train(), added_tokens_decoder=table, eos_token="<|user|>", add_bos_token=False)
    metadata = assert_same(tmp_path, 410)
    assert metadata["tokenizer.ggml.tokens"][400:404] == ["<|user|>", "[PAD401]", "\u00a7word", "[PAD403]"]
    assert metadata["tokenizer.ggml.token_type"][400:404].tolist() == [3, 5, 4, 5]
    assert (metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.add_bos_token"]) == (400, False)


def test_ranks_become_the_merges_that_they_stand_for(tmp_path: Path) -> None:
    write(tmp_path, (FIXTURES / "tokenizer.model").read_bytes())
    metadata = assert_same(tmp_path, 656)
    assert metadata["tokenizer.ggml.pre"] == "llama-bpe"


def test_chat_templates_go_along(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    metadata = vocabulary_of(ModelFiles(write(tmp_path, train(), chat_template=templates)), 448)
    assert metadata["tokenizer.chat_template"] == "{{ 1 }}"
    assert metadata["tokenizer.chat_template.tool_use"] == "{{ 2 }}"


def test_the_model_that_ships(caplog: pytest.LogCaptureFixture) -> None:
    vocabulary_of(ModelFiles.find(find_model("fable")), 1280)
    assert caplog.text == ""


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert vocabulary_of(ModelFiles(tmp_path), 100) == {"tokenizer.ggml.model": "no_vocab"}


def test_what_cannot_be_said_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, train(remove_extra_whitespaces=True))
    with caplog.at_level(logging.WARNING):
        vocabulary_of(ModelFiles(tmp_path), 448)
    assert "cannot be said in a GGUF file as it is: some texts become other tokens, as" in caplog.text


def test_a_vocabulary_without_bytes_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vocabulary_of(ModelFiles(write(tmp_path, train(byte_fallback=False, vocab_size=200))), 448)
    assert "has no tokens of single bytes: llama.cpp ends at a character that is no token" in caplog.text


def test_what_has_no_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path, train(model_type="unigram", vocab_size=300))
    with pytest.raises(ConfigError, match=r"tokenizer\.model is no model of byte pairs"):
        vocabulary_of(ModelFiles(tmp_path), 448)
    (tmp_path / "tokenizer.model").unlink()
    content = copy.deepcopy(_JSON["gpt2"])
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated"},
            content["pre_tokenizer"],
        ],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match="splits texts in a way that GGUF files have no name for"):
        vocabulary_of(ModelFiles(tmp_path), 1000)
