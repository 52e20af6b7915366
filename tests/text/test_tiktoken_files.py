"""Llama 3's files against tiktoken's and Hugging Face tokenizers' own results; and damaged ones."""

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_files import FIXTURES, N_BPE, derandomized, loaded

from tpilite.text import tiktoken_files
from tpilite.text.tiktoken_files import PATTERN
from tpilite.text.tokenizer import Tokenizer


def test_json_alone_gives_the_ids_of_hugging_face(tmp_path: Path, bpe: Tokenizer) -> None:
    shutil.copy(FIXTURES / "tokenizer.json", tmp_path)
    tokenizer = loaded(tmp_path, 512)
    expected = json.loads((FIXTURES / "expected.json").read_text())
    assert len(expected) == 8
    for text, ids in expected:
        assert tokenizer.encode(text, bos=False) == ids
        assert bpe.encode(text, bos=False) == ids
    assert tokenizer.specials == {"<|begin_of_text|>": 400, "<|end_of_text|>": 401, "<|eot_id|>": 402}
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.n_tokens) == (400, {401, 402}, 403)


def test_the_real_llama_3(shared_tokenizers: Path) -> None:
    tokenizer = loaded(shared_tokenizers / "llama3", 128256)
    assert (tokenizer.n_tokens, tokenizer.bos_id) == (128256, 128000)
    assert tokenizer.eos_ids == {128001, 128008, 128009}
    published = {
        "<|finetune_right_pad_id|>": 128004,
        "<|reserved_special_token_2|>": 128005,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|python_tag|>": 128010,
        "<|reserved_special_token_247|>": 128255,
    }
    assert {name: tokenizer.specials.get(name) for name in published} == published
    assert tokenizer.encode("Hello world") == [128000, 9906, 1917]
    text = "größer 🌊  日本\n\n\tx = [1, 2] <|eot_id|> I'LL 1234567"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@derandomized
@given(ids=st.lists(st.integers(0, N_BPE - 1)))
def test_decoding_is_tiktokens_own(ids: list[int], bpe: Tokenizer) -> None:
    lines = (FIXTURES / "tokenizer.model").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    reference = tiktoken.Encoding("reference", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    runs: list[list[int]] = [[]]  # tiktoken shows special tokens; ours end a character and are not shown
    for token_id in ids:
        if token_id < 400:
            runs[-1].append(token_id)
        else:
            runs.append([])
    assert bpe.decode(ids) == "".join(map(reference.decode, runs))


def cut_by_counting(text: str, max_run: int) -> Iterator[str]:
    """The text cut where more than `max_run` characters of one kind, space or not, follow each other."""
    start = run = 0
    for i, character in enumerate(text):
        run = run + 1 if i > start and character.isspace() == text[i - 1].isspace() else 1
        if run > max_run:
            yield text[start:i]
            start, run = i, 1
    yield text[start:]


@derandomized
@given(text=st.text("ab  \n\u3000\x1c", max_size=60))
def test_long_runs_are_cut_as_llamas_code_cuts_them(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken_files, "_MAX_CHARS", 17)
        patch.setattr(tiktoken_files, "_MAX_RUN_CHARS", 3)
        chunks = [text[i : i + 17] for i in range(0, len(text), 17)]
        assert list(tiktoken_files._bounded(text)) == [
            piece for chunk in chunks for piece in cut_by_counting(chunk, 3)
        ]


@pytest.mark.parametrize("character", ["a", " ", "\n"])
def test_a_million_equal_characters(bpe: Tokenizer, character: str) -> None:
    text = character * 1_000_000
    assert bpe.decode(bpe.encode(text)) == text
