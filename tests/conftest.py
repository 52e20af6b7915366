"""What all tests share: a home of their own, Ctrl-C, and optional test material beside the checkout."""

import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tpilite.machine import limit_blas_threads

_BESIDE = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home of every test and of what it starts: caches, tokens and notes stay out of the user's."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TPILITE_TOKEN"):
            patch.delenv(name, raising=False)
        yield folder


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as a terminal has it: a shell's background jobs, and all that they start, ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def one_blas_thread() -> None:
    """The BLAS as `Rank` has it."""
    limit_blas_threads()


@pytest.fixture(scope="session")
def shared_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained checkpoints in Hugging Face's format, where the machine has them: a copy, to write beside."""
    return shutil.copytree(_there(_BESIDE / "models"), tmp_path_factory.mktemp("shared") / "models")


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
