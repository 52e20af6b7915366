"""The tokenizers of GGUF metadata against those of the files that they were made from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from gguf_files import vocab_keys, vocab_of_pairs
from tokenizer_files import FIXTURES, loaded, train, without_flags, write

from tpilite.errors import CheckpointError
from tpilite.text import gguf_vocab
from tpilite.text.tokenizer import Tokenizer

_GOLDEN = json.loads((FIXTURES.parent / "tokenizers.json").read_text(encoding="utf-8"))
_JSON = {case["name"]: case["tokenizer.json"] for case in _GOLDEN["cases"]}
_LLAMA_CPP = json.loads((FIXTURES.parent / "gguf_tokens.json").read_text())
_PATH = Path("model.gguf")


def from_gguf(path: Path, metadata: dict[str, Any], vocab_size: int) -> Tokenizer:
    tokenizer = gguf_vocab.from_gguf(path, metadata, vocab_size)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize(
    ("family", "pre"),
    [
        ("gpt2", "gpt-2"),
        ("smollm", "smollm"),
        ("smollm", "refact"),
        ("llama3", "llama-bpe"),
        ("llama3", "llama-v3"),
        ("qwen2", "qwen2"),
        ("qwen2", "deepseek-r1-qwen"),
        ("qwen35", "qwen35"),
        ("tekken", "tekken"),
        ("gpt4o", "gpt-4o"),
        ("deepseek3", "deepseek-v3"),
        ("deepseek_coder", "deepseek-coder"),
        ("deepseek_llm", "deepseek-llm"),
    ],
)
def test_pairs_split_by_each_name_give_the_ids_of_tokenizer_json(
    tmp_path: Path, family: str, pre: str
) -> None:
    content = without_flags(_JSON[family], tmp_path)
    right, tokenizer = loaded(tmp_path, 1000), from_gguf(_PATH, vocab_of_pairs(content, pre), 1000)
    for line in _GOLDEN["lines"]:
        for allowed in (True, False):
            ids = right.encode(line, bos=False, allow_special=allowed)
            assert tokenizer.encode(line, bos=False, allow_special=allowed) == ids, line
        assert tokenizer.decode(ids) == right.decode(ids)


@pytest.mark.parametrize("pre", _LLAMA_CPP)
def test_names_without_a_tokenizer_json_give_the_ids_of_llama_cpp(pre: str) -> None:
    golden = _LLAMA_CPP[pre]
    content = _JSON[golden["family"]] | {"added_tokens": []}
    tokenizer = from_gguf(_PATH, vocab_of_pairs(content, pre), 1000)
    for line, ids in zip(filter(None, _GOLDEN["lines"]), golden["ids"], strict=True):
        assert tokenizer.encode(line, bos=False, allow_special=False) == ids, line


def of_sentencepiece(model: bytes, **values: Any) -> dict[str, Any]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())
    types = [
        2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
        for i in ids
    ]
    pieces = [processor.id_to_piece(i) for i in ids]
    scores = np.array([processor.get_score(i) for i in ids], np.float32)
    return vocab_keys(
        model="llama", pre="default", tokens=pieces, scores=scores, token_type=np.array(types, np.int32)
    ) | vocab_keys(**values)


@pytest.mark.parametrize("prefix", [True, False, None])
def test_pieces_and_scores_give_the_ids_of_sentencepiece(tmp_path: Path, prefix: bool | None) -> None:
    model = train(add_dummy_prefix=prefix is not False)
    right = loaded(write(tmp_path, model), 448)
    metadata = of_sentencepiece(model, add_space_prefix=prefix, bos_token_id=1, eos_token_id=2)
    tokenizer = from_gguf(_PATH, metadata, 448)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.n_tokens) == (1, 2, True, 400)
    for line in _GOLDEN["lines"]:
        ids = right.encode(line)
        assert tokenizer.encode(line) == ids
        assert tokenizer.decode(ids) == right.decode(ids)


def test_types_that_are_missing_leave_the_unknown_piece_as_the_file_names_it() -> None:
    metadata = of_sentencepiece(train(), unknown_token_id=0)
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = from_gguf(_PATH, metadata, 400)
    assert tokenizer.encode("\x00", bos=False)[-1] == 0


def ends(**values: Any) -> Tokenizer:
    return from_gguf(_PATH, vocab_of_pairs(_JSON["gpt2"], "gpt-2", **values), 1000)


def test_bos_and_eos_are_those_of_the_file() -> None:
    names = {token["content"]: token["id"] for token in _JSON["gpt2"]["added_tokens"]}
    start, end = names["<|im_start|>"], names["<|im_end|>"]
    assert (ends().bos_id, ends().add_bos, ends().eos_ids) == (None, False, {end})
    tokenizer = ends(bos_token_id=start, eos_token_id=0, add_bos_token=True, add_eos_token=True)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (start, 0, {0, end})
    assert tokenizer.encode("") == [start, 0]
    assert ends(eot_token_id=start, eom_token_id=10**9).eos_ids == {start, end}
    assert not ends(bos_token_id=start).add_bos
    assert from_gguf(_PATH, vocab_of_pairs(_JSON["llama3"], "llama-bpe", bos_token_id=start), 1000).add_bos


def test_a_file_that_does_not_say_how_it_splits_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = from_gguf(_PATH, vocab_of_pairs(_JSON["gpt2"], None), 1000)
    assert "does not say how its tokenizer splits" in caplog.text
    assert tokenizer.decode(tokenizer.encode("a 1234!? b")) == "a 1234!? b"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": "bert"}, r"kind 'bert' \(tokenizer\.ggml\.model\)"),
        ({"model": 7}, r"tokenizer\.ggml\.model = .*; expected text"),
        ({"model": np.zeros(3)}, r"tokenizer\.ggml\.model = .*; expected text"),
        ({"pre": "no-such"}, r"as 'no-such' \(tokenizer.ggml.pre\), which is not known here; known are a.x"),
        ({"pre": 7}, r"pre = .*; expected text"),
        ({"tokens": None}, r"it has none of tokenizer\.ggml\.tokens; expected a list of text"),
        ({"tokens": []}, r"tokens = .*; expected a list of text"),
        ({"tokens": ["a", 1]}, r"tokens = .*; expected a list of text"),
        ({"tokens": ["a", "a", "aa"], "token_type": None}, "different tokens"),
        ({"token_type": [1]}, r"token_type = .*; expected a number for each token"),
        ({"token_type": "x"}, r"token_type = .*; expected a number for each token"),
        ({"token_type": 3}, r"token_type = .*; expected a number for each token"),
        ({"merges": None}, r"it has none of tokenizer\.ggml\.merges; expected a list of text"),
        (
            {"merges": ["zz qq"]},
            r"its tokenizer\.ggml\.merges has the merge 'zz qq', which does",
        ),
        ({"bos_token_id": -1}, r"bos_token_id = .*; expected the id of a token"),
        ({"bos_token_id": "1"}, r"bos_token_id = .*; expected the id of a token"),
        ({"add_bos_token": 1}, r"add_bos_token = .*; expected true or false"),
        ({"model": "llama"}, r"none of tokenizer\.ggml\.scores; expected a number for each token"),
        (
            {"model": "llama", "scores": [float("nan")] * 431},
            r"scores = .*; expected a number for each token",
        ),
        (
            {"model": "llama", "scores": [0.0] * 431, "tokens": ["a"] * 431},
            "are not a sentencepiece",
        ),
    ],
)
def test_damage_is_told_in_one_line(values: dict[str, Any], words: str) -> None:
    metadata = vocab_of_pairs(_JSON["gpt2"], "gpt-2")
    for key, value in values.items():
        metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(CheckpointError, match=words) as caught:
        from_gguf(_PATH, metadata, 1000)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_vocabulary_smaller_than_its_ids_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"has 431 tokenizer\.ggml\.tokens, but a vocabulary of 400"):
        from_gguf(_PATH, vocab_of_pairs(_JSON["gpt2"], "gpt-2"), 400)


@pytest.mark.parametrize("metadata", [{}, {"tokenizer.ggml.model": "no_vocab"}])
def test_a_file_without_a_tokenizer(metadata: dict[str, Any]) -> None:
    assert gguf_vocab.from_gguf(_PATH, metadata, 1000) is None
