"""What several tests share: optional test material beside the checkout, and a watch over threads."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

_BESIDE = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Trained checkpoints in Hugging Face's format, where the machine has them."""
    return _there(_BESIDE / "models")


@pytest.fixture(scope="session")
def shared_tokenizers() -> Path:
    """The published tokenizer.model files of Llama 2 and 3, where the machine has them."""
    return _there(_BESIDE / "tokenizers")


def _there(path: Path) -> Path:
    if not path.is_dir():
        pytest.skip(f"needs {path}, which this machine does not have")
    return path


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    """Fails where a thread that the test has started is still there at its end."""
    before = set(threading.enumerate())
    yield
    after = [thread for thread in threading.enumerate() if thread not in before]
    for thread in after:  # that of a connection may be about to end
        thread.join(5)
    left = [thread.name for thread in after if thread.is_alive()]
    assert not left, f"threads are left: {left}"
