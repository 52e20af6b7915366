"""The tokenizers that the tests of this folder share."""

import shutil

import pytest
from tokenizer_files import FIXTURES, N_BPE, N_SENTENCEPIECE, loaded, train, write

from tpilite.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def plain_model() -> bytes:
    return train()


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bpe")
    shutil.copy(FIXTURES / "tokenizer.model", folder)
    return loaded(folder, N_BPE)


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory, plain_model: bytes) -> Tokenizer:
    return loaded(write(tmp_path_factory.mktemp("sentencepiece"), plain_model), N_SENTENCEPIECE)


@pytest.fixture(scope="session", params=["bpe", "pieces"])
def either(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)
