"""Tokenizer files for tests: sentencepiece models trained here, and a tiktoken one from the fixtures."""

import copy
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import settings

from tpilite.errors import CheckpointError
from tpilite.formats.model_files import ModelFiles
from tpilite.text.load import load_tokenizer
from tpilite.text.tokenizer import Tokenizer

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizer"
N_BPE = 400 + 256
N_SENTENCEPIECE = 400
SENTENCES = [
    "Once upon a time there was a little fox who lived by the river.",
    "The fox was not afraid of the water, and the water was not afraid of the fox.",
    "One day the hare asked: where does the river end? It ends in the sea, said the fox!",
    "They walked and walked, 12 days and 345 steps, until they saw the big blue sea.",
] * 5

derandomized = settings(derandomize=True, deadline=None, max_examples=150)


def train(sentences: Sequence[str] = SENTENCES, **options: object) -> bytes:
    """A sentencepiece model in the manner of Llama 2's, of 400 pieces."""
    model = io.BytesIO()
    arguments: dict[str, object] = {
        "vocab_size": N_SENTENCEPIECE,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, **{**arguments, **options}
    )
    return model.getvalue()


def write(folder: Path, model: bytes, **config: object) -> Path:
    """`folder` with this tokenizer.model, and tokenizer_config.json where `config` is given."""
    (folder / "tokenizer.model").write_bytes(model)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def without_flags(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A tokenizer.json without the flags of added tokens, which a GGUF has not; it is in `folder` as well."""
    plain = copy.deepcopy(dict(content))
    for token in plain["added_tokens"]:
        token.update(lstrip=False, rstrip=False, single_word=False, normalized=False)
    (folder / "tokenizer.json").write_text(json.dumps(plain), encoding="utf-8")
    return plain


def loaded(folder: Path, vocab_size: int) -> Tokenizer:
    tokenizer = load_tokenizer(ModelFiles(folder), vocab_size)
    assert tokenizer is not None
    return tokenizer


def refused(folder: Path, vocab_size: int, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        load_tokenizer(ModelFiles(folder), vocab_size)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
