"""What tokenizer_config.json and added_tokens.json say about tokens, and what is refused."""

import base64
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import FIXTURES, N_BPE, loaded, refused, write

_ADDED = json.loads((FIXTURES.parent / "added_tokens.json").read_text(encoding="utf-8"))
_MODEL = base64.b64decode(_ADDED["tokenizer.model"])
_BY_CASE = pytest.mark.parametrize("case", _ADDED["cases"], ids=lambda case: case["name"])


def with_files(folder: Path, model: bytes, files: dict[str, Any]) -> Path:
    (folder / "tokenizer.model").write_bytes(model)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


@_BY_CASE
def test_tokens_beside_a_tokenizer_model_give_the_ids_of_transformers(
    tmp_path: Path, case: dict[str, Any]
) -> None:
    tokenizer = loaded(with_files(tmp_path, _MODEL, case["files"]), 500)
    for text, ids in zip(_ADDED["texts"], case["ids"], strict=True):
        assert tokenizer.encode(text, bos=False, allow_special=True) == ids, text
    assert not {360, 361, 364, 366} & set(tokenizer.encode("<|im_start|><|im_end|><tool><|end|>", bos=False))


def test_added_tokens_of_every_kind_of_file(tmp_path: Path) -> None:
    files = {
        "added_tokens.json": {"<a>": 360, "b": 361, "c": 362, "<old>": 363},
        "special_tokens_map.json": {
            "eos_token": {"content": "<a>"},
            "bos_token": "<s>",
            "additional_special_tokens": ["b"],
        },
        "tokenizer.json": {"added_tokens": [{"id": 363, "content": "<new>", "special": False}], "model": {}},
        "tokenizer_config.json": {
            "added_tokens_decoder": {"364": {"content": "d", "special": True}},
            "bos_token": "d",
        },
    }
    tokenizer = loaded(with_files(tmp_path, _MODEL, files), 500)
    added = {name: i for name, i in tokenizer.specials.items() if i >= 360}
    assert added == {"<a>": 360, "b": 361, "d": 364}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (364, 360)
    assert {362, 363} <= set(tokenizer.encode("c<new>"))


def test_byte_level_ranks_with_tokens_of_tokenizer_json(tmp_path: Path) -> None:
    content = json.loads((FIXTURES / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"].append({"id": 656, "content": "<|im_start|>", "special": True})
    folder = with_files(tmp_path, (FIXTURES / "tokenizer.model").read_bytes(), {"tokenizer.json": content})
    tokenizer = loaded(folder, 700)
    assert tokenizer.specials["<|im_start|>"] == 656
    assert tokenizer.encode("<|im_start|>fox", bos=False, allow_special=True)[0] == 656


def test_a_tokenizer_json_whose_model_comes_first(tmp_path: Path) -> None:
    entry = {"id": 360, "content": '<"model">', "special": True}
    for number, content in enumerate(
        ({"model": {}, "added_tokens": [entry]}, {"added_tokens": [entry], "x": "y", "model": {}})
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        tokenizer = loaded(with_files(folder, _MODEL, {"tokenizer.json": content}), 500)
        assert tokenizer.specials['<"model">'] == 360


@pytest.mark.parametrize("content", ["{", "[]", '{"added_tokens": 7}', '{"added_tokens": [{"id": -1}]}'])
def test_a_damaged_tokenizer_json_beside_a_model_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer.model").write_bytes(_MODEL)
    refused(tmp_path, 500, "tokenizer.json")


def test_tokenizer_config_names_and_adds_tokens(tmp_path: Path, plain_model: bytes) -> None:
    added = {
        "0": {"content": "<unk>", "special": True},
        "2": {"content": "</s>", "special": True},
        "400": {"content": "<|im_end|>", "special": True},
        "401": {"content": "<think>", "special": False},
        "402": {"content": "<|im_end|>!", "special": True},
    }
    folder = write(tmp_path, plain_model, added_tokens_decoder=added, eos_token={"content": "<|im_end|>"})
    tokenizer = loaded(folder, 403)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (1, 400, {2, 400})
    assert tokenizer.n_tokens == 403
    assert tokenizer.specials.get("<unk>") is None
    assert tokenizer.decode([0]) == " \u2047 "  # the unknown piece stands for text, as sentencepiece shows it
    assert tokenizer.encode("<|im_end|>!<|im_end|>", bos=False, allow_special=True) == [402, 400]
    ids = tokenizer.encode("fox<think><|im_end|>", bos=False)
    assert ids.count(401) == 1
    assert 400 not in ids
    assert tokenizer.decode(ids) == "fox<think> <|im_end|>"
    assert tokenizer.decode([400, 401, 400]) == "<think>"


def test_reserved_names_of_llama_3_come_from_tokenizer_config(tmp_path: Path) -> None:
    added = {"408": {"content": "<|reserved_special_token_4|>", "special": True}}
    folder = write(tmp_path, (FIXTURES / "tokenizer.model").read_bytes(), added_tokens_decoder=added)
    tokenizer = loaded(folder, N_BPE)
    assert tokenizer.specials.get("<|eom_id|>") is None
    assert tokenizer.specials.get("<|reserved_special_token_4|>") == 408
    assert tokenizer.eos_ids == {401, 409}


def test_added_tokens_beyond_the_vocabulary_are_left_out(
    tmp_path: Path, plain_model: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path, plain_model)
    (folder / "added_tokens.json").write_text('{"<pad>": 400}')
    with caplog.at_level(logging.WARNING):
        tokenizer = loaded(folder, 400)
    assert tokenizer.specials.get("<pad>") is None
    assert "<pad>" in caplog.text
    assert loaded(folder, 401).specials.get("<pad>") == 400


@pytest.mark.parametrize(
    ("config", "with_bos"),
    [({}, True), ({"add_bos_token": True}, True), ({"add_bos_token": False}, False), ({"x": 1}, True)],
)
def test_bos_as_the_config_says(
    tmp_path: Path, plain_model: bytes, config: dict[str, object], with_bos: bool
) -> None:
    tokenizer = loaded(write(tmp_path, plain_model, **config), 400)
    assert tokenizer.encode("")[:1] == ([1] if with_bos else [])
    assert tokenizer.encode("", bos=False) == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"add_bos_token": "yes"}, "add_bos_token"),
        ({"added_tokens_decoder": [1]}, "no object"),
        ({"added_tokens_decoder": {"x": {"content": "y"}}}, "added token"),
        ({"added_tokens_decoder": {"1": {"content": ""}}}, "added token"),
        ({"added_tokens_decoder": {"1": "y"}}, "added token"),
    ],
)
def test_damaged_settings_are_refused(
    tmp_path: Path, plain_model: bytes, config: dict[str, object], words: str
) -> None:
    refused(write(tmp_path, plain_model, **config), 1000, words)
