"""Which of a folder's files counts as its tokenizer, and files that are refused."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf_files import vocab_of_pairs, write_gguf
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_files import FIXTURES, N_BPE, derandomized, loaded, refused, write

from tpilite.errors import CheckpointError
from tpilite.formats.model_files import ModelFiles
from tpilite.text.load import load_tokenizer


def test_no_tokenizer_files(tmp_path: Path) -> None:
    assert load_tokenizer(ModelFiles(tmp_path), 100) is None


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
        load_tokenizer(ModelFiles(folder), 1000)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text("{}")

    def fails(self: Path) -> bytes:
        if self.exists():
            raise PermissionError(13, "Permission denied")
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_bytes", fails)
    refused(tmp_path, 1000, f"{name} cannot be read: Permission denied")


def test_a_gguf_has_its_own(tmp_path: Path) -> None:
    content = json.loads((FIXTURES / "tokenizer.json").read_text())
    vocab = vocab_of_pairs(content, "llama-bpe")
    path = write_gguf(tmp_path / "x.gguf", {"w": ("F32", (1,), np.zeros(1, np.float32))}, vocab)
    (tmp_path / "tokenizer.json").write_text("another's")
    tokenizer = load_tokenizer(ModelFiles.find(path), 1000)
    assert tokenizer is not None
    assert tokenizer.n_tokens == len(vocab["tokenizer.ggml.tokens"])
    assert tokenizer.decode(tokenizer.encode("the fox", bos=False)) == "the fox"


def changed_json(**changes: object) -> str:
    whole = json.loads((FIXTURES / "tokenizer.json").read_text())
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = whole
        for parent in parents:
            place = place[parent]
        place[key] = value
    return json.dumps(whole)


def split_at(pattern: str, behavior: str = "Isolated", invert: object = False) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def template(single: list[object], special_tokens: dict[str, list[int]]) -> dict[str, object]:
    """A post_processor around a text, which is None among the names in `single`."""
    items = [{"SpecialToken": {"id": name}} if name else {"Sequence": {"id": "A"}} for name in single]
    known = {name: {"id": name, "ids": ids, "tokens": [name]} for name, ids in special_tokens.items()}
    return {"type": "TemplateProcessing", "single": items, "pair": [], "special_tokens": known}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "its model is no object but 'None'"),
        (changed_json(normalizer=[]), "its normalizer is no object"),
        (changed_json(model__type="Unigram"), "the type 'Unigram', which is not supported"),
        (changed_json(model__type="WordPiece"), "the type 'WordPiece', which is not supported"),
        (changed_json(model__dropout=0.1), "dropout = 0.1, which is not supported"),
        (
            changed_json(model__end_of_word_suffix="</w>"),
            "end_of_word_suffix = '</w>', which is not supported",
        ),
        (
            changed_json(normalizer={"type": "Precompiled"}),
            "normalizer 'Precompiled', which is not supported",
        ),
        (changed_json(pre_tokenizer={"type": "Bert"}), "pre_tokenizer 'Bert', which is not supported"),
        (changed_json(decoder={"type": "CTC"}), "decoder 'CTC' .*not supported"),
        (changed_json(post_processor={"type": "Bert"}), "post_processor 'Bert', which is not supported"),
        (changed_json(pre_tokenizer={"type": "Sequence"}), "pretokenizers = 'None', no list"),
        (changed_json(pre_tokenizer={}), "type = 'None', no text"),
        (changed_json(pre_tokenizer=split_at(r"\h")), r"'\\\\h' in a pattern, which is not supported"),
        (changed_json(pre_tokenizer=split_at("(")), "a pattern that cannot be read"),
        (changed_json(pre_tokenizer=split_at("[a[b]--c]")), "a pattern of sets inside sets"),
        (changed_json(pre_tokenizer={**split_at("a"), "pattern": {"Glob": "a"}}), "the pattern .*Glob"),
        (changed_json(pre_tokenizer=split_at("a", behavior="Hidden")), "behavior 'Hidden', which is not"),
        (changed_json(pre_tokenizer=split_at("a", invert=1)), "invert = '1', no true or false"),
        (changed_json(model__vocab=None), "no vocabulary"),
        (changed_json(model__vocab={}), "no vocabulary"),
        (changed_json(model__vocab={"a": 0, "b": "1"}), "no vocabulary"),
        (changed_json(model__vocab={"a": 0, "b": -1}), "no vocabulary"),
        (changed_json(model__vocab={"a": 0, "b": 10**12}), "has 1000000000001 tokens"),
        (changed_json(model__vocab={"a": 0, "b": 0}), "one id for several of its 2 tokens"),
        (changed_json(model__merges=None), "no merges"),
        (changed_json(model__merges=[]), "no merges"),
        (changed_json(model__merges=["a b", "zz qq"]), "the merge '.*', which does not make one token"),
        (changed_json(model__merges=[["a", "b"], 7]), "the merge '.*', which does not make one token"),
        (changed_json(model__merges=["ab"]), "the merge 'ab', which does not make one token"),
        (changed_json(model__unk_token="<none>"), "an unk_token '<none>' that is not in its vocabulary"),
        (changed_json(model__fuse_unk=1), "fuse_unk = '1', no true or false"),
        (changed_json(post_processor=template([["<s>"]], {})), "a template that cannot be read"),
        (changed_json(post_processor=template(["<s>", None], {"<s>": [1, 2]})), "2 tokens before a text"),
        (changed_json(post_processor=template(["<s>", None], {"<s>": [5000]})), "has 5001 tokens"),
        (changed_json(added_tokens=[{"id": 7, "content": "<none>"}]), "with the id 7, which is another"),
        (changed_json(added_tokens={}), "no list of added_tokens"),
        (changed_json(added_tokens=[{"content": "x"}]), "added token"),
        (changed_json(added_tokens=[{"id": -4, "content": "x"}]), "added token"),
        (changed_json(added_tokens=["x"]), "added token"),
    ],
)
def test_json_of_another_kind_or_damaged_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    refused(tmp_path, 1000, words)
