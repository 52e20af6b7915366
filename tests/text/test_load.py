"""Which of a folder's files counts as its tokenizer, and files that are refused."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_files import FIXTURES, N_BPE, derandomized, loaded, refused, write

from tpilite.errors import CheckpointError
from tpilite.text.load import load_tokenizer


def test_no_tokenizer_files(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path, 100) is None


def test_the_original_folder_and_its_precedence(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    shutil.copy(FIXTURES / "tokenizer.model", tmp_path / "original")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert loaded(tmp_path, N_BPE).n_tokens == N_BPE


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, plain_model: bytes) -> None:
    refused(write(tmp_path, plain_model), 399, "has 400 tokens, but config.json says vocab_size = 399")
    refused(write(tmp_path, (FIXTURES / "tokenizer.model").read_bytes()), N_BPE - 1, f"has {N_BPE} tokens")
    (tmp_path / "tokenizer.model").unlink()
    shutil.copy(FIXTURES / "tokenizer.json", tmp_path)
    refused(tmp_path, 402, "has 403 tokens")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"PK\x03\x04 something else entirely", "neither a sentencepiece nor a tiktoken model"),
        (b"IQ== 0\nIg== 1\nIw==", "damaged"),
        (b"IQ== 0\nIg== 2\n", "damaged: 2 ranks do not count 2 tokens from 0"),
        (b"IQ== 0\nIQ== 1\n", "damaged: 2 ranks do not count 1 tokens"),
        (b"IQ== 0\nI 1\n", "damaged"),
        (b"IQ== 0\nIg== one\n", "damaged"),
        (b"IQ== 0\nIg== 1\n", "no token for 254 of the 256 bytes"),
    ],
)
def test_a_damaged_model_is_refused(tmp_path: Path, model: bytes, words: str) -> None:
    refused(write(tmp_path, model), 1000, words)


@derandomized
@given(data=st.data())
def test_damage_never_escapes_as_anything_else(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, plain_model: bytes
) -> None:
    model = bytearray(data.draw(st.sampled_from([plain_model, (FIXTURES / "tokenizer.model").read_bytes()])))
    for _ in range(data.draw(st.integers(1, 4))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    folder = write(tmp_path_factory.mktemp("damaged", numbered=True), bytes(model))
    with contextlib.suppress(CheckpointError):
        load_tokenizer(folder, 1000)


def changed_json(**changes: object) -> str:
    whole = json.loads((FIXTURES / "tokenizer.json").read_text())
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = whole
        for parent in parents:
            place = place[parent]
        place[key] = value
    return json.dumps(whole)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "no model"),
        (changed_json(model__byte_fallback=True), "download tokenizer.model"),
        (changed_json(model__type="Unigram"), "download tokenizer.model"),
        (changed_json(model__type="WordPiece"), "not of the kind of Llama 3"),
        (changed_json(model__ignore_merges=False), "not of the kind of Llama 3"),
        (changed_json(normalizer={"type": "NFC"}), "not of the kind of Llama 3"),
        (changed_json(pre_tokenizer=None), "not of the kind of Llama 3"),
        (changed_json(model__vocab=None), "damaged"),
        (changed_json(model__vocab={"a": 0, "b": "1"}), "damaged"),
        (changed_json(model__vocab={"a": 0, "b": 2}), "damaged"),
        (changed_json(model__vocab={"a": 0, "漢": 1}), "damaged"),
        (changed_json(model__vocab={"a": 0, "b": 1}), "no token for 254"),
        (changed_json(added_tokens={}), "no list of added_tokens"),
        (changed_json(added_tokens=[{"content": "x"}]), "added token"),
        (changed_json(added_tokens=[{"id": -4, "content": "x"}]), "added token"),
        (changed_json(added_tokens=["x"]), "added token"),
    ],
)
def test_json_of_another_kind_or_damaged_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    refused(tmp_path, 1000, words)
