"""What tokenizer_config.json and added_tokens.json say about tokens, and what is refused."""

import logging
from pathlib import Path

import pytest
from tokenizer_files import FIXTURES, N_BPE, loaded, refused, write


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
