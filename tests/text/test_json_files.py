"""tokenizer.json of every family, against the ids that the library `tokenizers` gave; and how it is read."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import FIXTURES, loaded, refused, write

from tpilite.text.tokenizer import Tokenizer

_GOLDEN = json.loads((FIXTURES.parent / "tokenizers.json").read_text(encoding="utf-8"))
_CASES = {case["name"]: case for case in _GOLDEN["cases"]}
_SPACED = {name for name in _CASES if name.startswith(("llama2", "metaspace", "gemma", "no_prefix"))}
# In these a text changes before it is split, or has parts that are no token.
_LOSSY = {"behaviors", "folded", "gpt2_prefix", "unknown", "unknown_fused", "some_bytes", "smollm"}


def made(folder: Path, content: dict[str, Any], vocab_size: int = 1000, **config: object) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return loaded(folder, vocab_size)


def content_of(name: str) -> dict[str, Any]:
    return json.loads(json.dumps(_CASES[name]["tokenizer.json"]))


def words(pieces: list[str], merges: list[Any], **parts: Any) -> dict[str, Any]:
    """A tokenizer.json of these tokens and merges."""
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, **parts}


@pytest.mark.parametrize("name", _CASES)
def test_ids_are_those_of_tokenizers(tmp_path: Path, name: str) -> None:
    tokenizer = made(tmp_path, _CASES[name]["tokenizer.json"])
    for line, ids in zip(_GOLDEN["lines"], _CASES[name]["ids"], strict=True):
        assert tokenizer.encode(line, allow_special=True) == ids, line


@pytest.mark.parametrize("name", sorted(_CASES.keys() - _LOSSY))
def test_text_comes_back(tmp_path: Path, name: str) -> None:
    tokenizer = made(tmp_path, {**content_of(name), "added_tokens": [], "post_processor": None})
    assert (tokenizer.max_token_bytes is None) == name.startswith("qwen")
    for line in _GOLDEN["lines"]:
        text = "".join(char for char in line if "qwen" not in name or char.isascii())
        decoded = tokenizer.decode(tokenizer.encode(text, bos=False))
        assert decoded.lstrip(" ") == text.replace("▁", " " if name in _SPACED else "▁").lstrip(" ")


def test_special_tokens_stay_text_unless_they_are_allowed(tmp_path: Path) -> None:
    tokenizer = made(tmp_path, content_of("gpt2"))
    ids = tokenizer.encode("<|im_start|><think>", bos=False)
    assert tokenizer.specials["<|im_start|>"] not in ids
    assert ids[-1] == tokenizer.encode("<think>", bos=False)[0]
    assert tokenizer.decode(ids) == "<|im_start|><think>"


@pytest.mark.parametrize(
    ("name", "config", "first", "last"),
    [
        ("gpt2", {}, "<|im_start|>", None),
        ("gpt2", {"add_bos_token": False}, None, None),
        ("gpt2_prefix", {}, "<|im_start|>", "<｜end▁of▁x｜>"),  # noqa: RUF001
        ("gpt2_prefix", {"add_eos_token": False}, "<|im_start|>", None),
        ("llama3", {}, None, None),
        ("llama3", {"add_bos_token": True, "bos_token": "<|im_end|>"}, "<|im_end|>", None),
        ("llama3", {"add_bos_token": True, "bos_token": "<none>"}, None, None),
    ],
)
def test_bos_and_eos_stand_where_the_template_or_the_config_says(
    tmp_path: Path, name: str, config: dict[str, object], first: str | None, last: str | None
) -> None:
    tokenizer = made(tmp_path, content_of(name), **config)
    plain = tokenizer.encode("fox", bos=False)
    before = [] if first is None else [tokenizer.specials[first]]
    after = [] if last is None else [tokenizer.specials[last]]
    assert tokenizer.encode("fox") == before + plain + after


def test_rows_beyond_the_tokenizer_have_no_text_and_holes_are_allowed(tmp_path: Path) -> None:
    content = words(["a", "b", "ab"], ["a b"], decoder={"type": "ByteLevel"})
    content["model"]["vocab"]["ab"] = 200_000
    content["added_tokens"] = [{"id": 200_002, "content": "<|x|>", "special": True}]
    tokenizer = made(tmp_path, content, 200_100)
    assert tokenizer.encode("abb<|x|>", allow_special=True) == [200_000, 1, 200_002]
    assert tokenizer.decode([200_000, 7, 200_099, 1]) == "abb"
    refused(tmp_path, 200_000, "has 200001 tokens")


def test_an_added_token_that_the_vocabulary_has_keeps_its_id(tmp_path: Path) -> None:
    content = words(["a", "b", "ab", "<x>"], ["a b"])
    content["added_tokens"] = [{"id": 9, "content": "<x>", "special": True}]
    assert made(tmp_path, content).specials == {"<x>": 3}


def test_merges_whose_tokens_hold_spaces(tmp_path: Path) -> None:
    content = words(["a", "b", " ", " b", "a ", "a b"], [[" ", "b"], ["a", " "], ["a ", "b"]])
    tokenizer = made(tmp_path, content)
    assert tokenizer.encode("a b") == [0, 3]  # "a" and " b" are no merge, though "a " and "b" are one
    assert tokenizer.encode("a a") == [4, 0]


def test_a_byte_level_text_takes_no_more_tokens_than_bytes(tmp_path: Path) -> None:
    tokenizer = made(tmp_path, content_of("gpt2"))
    longest = max(_CASES["gpt2"]["tokenizer.json"]["model"]["vocab"], key=len)
    assert tokenizer.max_token_bytes == max(
        len(longest), *(len(name.encode()) for name in tokenizer.specials)
    )


@pytest.mark.parametrize("text", ["a", "ab", " ", "\n", "漢"])
@pytest.mark.parametrize("name", ["gpt2", "llama2"])
def test_a_hundred_thousand_equal_characters(tmp_path: Path, name: str, text: str) -> None:
    tokenizer = made(tmp_path, content_of(name))
    text *= 100_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_model_beside_it_counts(tmp_path: Path, plain_model: bytes) -> None:
    made(tmp_path, content_of("gpt2"))
    assert loaded(write(tmp_path, plain_model), 1000).encode("fox", bos=False) != []
    assert loaded(tmp_path, 1000).bos_id == 1
