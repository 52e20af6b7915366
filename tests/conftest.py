"""What several tests share: where optional test material lies beside the checkout."""

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
