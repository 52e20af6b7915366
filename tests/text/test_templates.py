"""Where chat templates are found: in a model folder's files, and in a GGUF's metadata."""

import json
from pathlib import Path
from typing import Any

import pytest

from tpilite.errors import CheckpointError
from tpilite.formats.model_files import ModelFiles
from tpilite.text.templates import find_templates, find_token_names

LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def write(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content))


def test_a_template_in_tokenizer_config(tmp_path: Path) -> None:
    write(tmp_path / "tokenizer_config.json", chat_template="one")
    assert find_templates(ModelFiles(tmp_path), LLAMA3) == {"default": "one"}


def test_several_templates_by_name(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    write(tmp_path / "tokenizer_config.json", chat_template=named)
    assert find_templates(ModelFiles(tmp_path), ()) == {"default": "one", "tool_use": "two"}


def test_files_of_their_own_come_first(tmp_path: Path) -> None:
    write(tmp_path / "chat_template.json", chat_template="json")
    assert find_templates(ModelFiles(tmp_path), LLAMA3) == {"default": "json"}
    write(tmp_path / "tokenizer_config.json", chat_template="config")
    assert find_templates(ModelFiles(tmp_path), LLAMA3) == {"default": "config"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    (tmp_path / "chat_template.jinja").write_text("größer", encoding="utf-8")
    assert find_templates(ModelFiles(tmp_path), LLAMA3) == {"default": "größer", "rag": "rag"}


def test_base_models_have_none(tmp_path: Path) -> None:
    assert find_templates(ModelFiles(tmp_path), ()) == {}
    assert find_templates(ModelFiles(tmp_path), LLAMA3).keys() == {"default"}
    write(tmp_path / "tokenizer_config.json", bos_token="<s>")
    assert find_templates(ModelFiles(tmp_path), LLAMA3) == {}


@pytest.mark.parametrize("value", [7, {"default": "x"}, ["x"], [{"name": "default"}], [{"template": "x"}]])
def test_what_is_no_template_is_refused(tmp_path: Path, value: object) -> None:
    write(tmp_path / "tokenizer_config.json", chat_template=value)
    with pytest.raises(CheckpointError, match="has a chat_template that is no text"):
        find_templates(ModelFiles(tmp_path), ())


def gguf(folder: Path, **metadata: Any) -> ModelFiles:
    keys = {f"tokenizer.{key}": value for key, value in metadata.items()}
    files = ModelFiles(folder)
    vars(files)["gguf"] = keys  # what has been read of it
    return files


def test_templates_of_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("a neighbour's")
    several = gguf(
        tmp_path, **{"chat_template": "one", "chat_template.tool_use": "two", "chat_templates": ["tool_use"]}
    )
    assert find_templates(several, LLAMA3) == {"default": "one", "tool_use": "two"}
    assert find_templates(gguf(tmp_path), LLAMA3) == {}
    with pytest.raises(CheckpointError, match=r"damaged: its tokenizer\.chat_template is no text"):
        find_templates(gguf(tmp_path, chat_template=7), ())


def test_what_a_gguf_calls_its_tokens(tmp_path: Path) -> None:
    ids = {"ggml.unknown_token_id": 1, "ggml.padding_token_id": 2}
    assert find_token_names(gguf(tmp_path, **ids, **{"ggml.tokens": ["a", "<unk>"]})) == {
        "unk_token": "<unk>"
    }
    assert find_token_names(gguf(tmp_path, **ids)) == {}


def test_what_a_folder_calls_its_tokens(tmp_path: Path) -> None:
    assert find_token_names(ModelFiles(tmp_path)) == {}
    write(tmp_path / "special_tokens_map.json", unk_token={"content": "<unk>"}, pad_token="<old>")
    write(tmp_path / "tokenizer_config.json", pad_token="<pad>", bos_token=None, add_bos_token=True)
    assert find_token_names(ModelFiles(tmp_path)) == {"unk_token": "<unk>", "pad_token": "<pad>"}
