"""A small model and servers of it, for the tests of this folder."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import CONFIG, client_of, served, write_model

from tpilite import LLM
from tpilite.serving.server import Server


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """The same model, asked directly: what the server must say too."""
    with LLM(folder, threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Server]:
    """A server for the tests that leave it as it was."""
    with LLM(folder, threads=1) as session, served(session, CONFIG) as server:
        yield server


@pytest.fixture
def session(folder: Path) -> Iterator[LLM]:
    with LLM(folder, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def client(shared: Server) -> Iterator[Any]:
    with client_of(shared) as client:
        yield client


@pytest.fixture(autouse=True)
def loud(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A mistake of our own that only the log tells of fails the test."""
    yield
    told = [r for r in caplog.records if r.levelno >= logging.ERROR and "mistake" in r.getMessage()]
    assert not told or "own_is_told" in os.environ.get("PYTEST_CURRENT_TEST", "")
