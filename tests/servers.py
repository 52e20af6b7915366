"""A small model with a tokenizer and a chat template, and servers of it, for the tests of the service."""

import functools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_config, write_checkpoint
from tokenizer_files import N_SENTENCEPIECE, train

from tpilite.engine.sampling import SamplingParams
from tpilite.engine.sequence import Sequence
from tpilite.engine.session import EncodedPrompt, Session
from tpilite.errors import PeerLost
from tpilite.formats.safetensors import TensorFile
from tpilite.llm import LLM
from tpilite.serving.config import ServerConfig
from tpilite.serving.server import Server
from tpilite.serving.service import Recovery, Service
from tpilite.weights.partition import LM_HEAD

HELLO: Any = [{"role": "user", "content": "Where does the river end?"}]
CONFIG = ServerConfig(port=0, model_name="tiny", max_waiting=2, defaults=SamplingParams(seed=1))
JSON = b"Host: localhost\r\nContent-Type: application/json\r\n"
# In the manner of Llama 2, in one line.
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ '<<SYS>>' + m['content'] + '<</SYS>>' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@functools.cache
def tokenizer_model() -> bytes:
    return train()


def write_model(folder: Path, *, chat: bool = True, context: int = 256, **config: Any) -> Path:
    """A random model that speaks nonsense of the pieces of that tokenizer.

    It never ends by itself while the most likely token is taken, as its publisher asks.
    """
    values = {"vocab_size": N_SENTENCEPIECE, "max_position_embeddings": context, "eos_token_ids": ()}
    write_checkpoint(folder, tiny_config(**(values | config)), "F32", seed=3)
    with TensorFile(folder / "model.safetensors") as file, open(file.path, "r+b") as weights:
        specials = file.tensors[LM_HEAD].rows(0, 3)
        weights.seek(specials.offset)
        weights.write(bytes(specials.nbytes))
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    if chat:
        settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    return folder


@contextmanager
def served(session: Session, config: ServerConfig | None = None, **service: Any) -> Iterator[Server]:
    """A server on a free port."""
    config = config or ServerConfig(port=0, model_name="tiny")
    with Service(session, max_waiting=config.max_waiting, **service) as inner:
        with Server(inner, config) as server:
            yield server
            # Streams that a failing test left open would hold the threads.
            inner.close()


@contextmanager
def served_folder(folder: Path, config: ServerConfig | None = None, **service: Any) -> Iterator[Server]:
    with LLM(folder, threads=1) as session, served(session, config, **service) as server:
        yield server


def exchange(port: int, request: bytes, *, until: bytes = b"", timeout_s: float = 10.0) -> bytes:
    """What the server answers to these bytes, until it closes or has said `until`."""
    with socket.create_connection(("127.0.0.1", port), timeout_s) as connection:
        connection.sendall(request)
        answer = b""
        while (piece := connection.recv(65536)) and not (until and until in answer + piece):
            answer += piece
        return answer + piece


def client_of(server: Server, **options: Any) -> Any:
    """OpenAI's client of a server; skips the test where it is missing."""
    openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")
    options = {"api_key": "none", "max_retries": 0, "timeout": 30} | options
    return openai.OpenAI(base_url=f"{server.url}/v1", **options)


class Script:
    """A decoder that gives a text of its own, a few characters for each token."""

    def __init__(self, text: str) -> None:
        self._pieces = iter(text[i : i + 3] for i in range(0, len(text), 3))

    def add(self, _token_id: int) -> str:
        return next(self._pieces, "")

    def finish(self) -> str:
        return ""


def says(session: LLM, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a session's model say a text, whatever its tokens are."""

    def prepared(prompt: EncodedPrompt, params: SamplingParams | None = None) -> Sequence:
        sequence = type(session).prepare(session, prompt, params)
        sequence.decoder = Script(text)
        return sequence

    monkeypatch.setattr(session, "prepare", prepared)


class Gate:
    """Holds an engine before each pass until the test lets it go."""

    def __init__(self, session: LLM) -> None:
        self._passes = threading.Semaphore(0)
        self._is_open = False
        self.n_steps = 0
        self._step = session.engine.step
        session.engine.step = self._held  # type: ignore[method-assign]

    def _held(self) -> Any:
        if not self._is_open:
            assert self._passes.acquire(timeout=30)
        self.n_steps += 1
        return self._step()

    def let(self, n: int = 1) -> None:
        self._passes.release(n)

    def open(self) -> None:
        self._is_open = True
        self._passes.release(1000)


def eventually(condition: Callable[[], Any]) -> Any:
    until_s = time.monotonic() + 30
    while time.monotonic() < until_s:
        if value := condition():
            return value
        time.sleep(0.01)
    pytest.fail("it did not come true within 30 s")


def get(server: Server, path: str, headers: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    return split(
        exchange(server.port, b"GET %s HTTP/1.0\r\nHost: localhost\r\n%s\r\n" % (path.encode(), headers))
    )


def post(server: Server, path: str, body: Any, headers: bytes = JSON) -> tuple[int, dict[str, str], Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = b"POST %s HTTP/1.0\r\n%sContent-Length: %d\r\n\r\n" % (path.encode(), headers, len(raw))
    status, found, answer = split(exchange(server.port, request + raw))
    return status, found, json.loads(answer)


def split(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    top, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = top.decode().split("\r\n")
    return int(first.split()[1]), {k.lower(): v for k, _, v in (x.partition(": ") for x in lines)}, body


def health(server: Server) -> dict[str, Any]:
    return json.loads(get(server, "/health")[2])


def figures(server: Server) -> dict[str, Any]:
    return json.loads(get(server, "/v1/cluster")[2])["figures"]


def lossy(session: LLM, monkeypatch: pytest.MonkeyPatch, recover: Callable[[PeerLost], None]) -> Recovery:
    """A session that loses a rank in its third pass."""
    run, n_runs = session.engine.runner._run, iter(range(1000))

    def losing(step: Any, x: Any = None) -> Any:
        if next(n_runs) == 2:
            raise PeerLost("rank 1 (pi-two) is gone")
        return run(step, x)

    monkeypatch.setattr(session.engine.runner, "_run", losing)
    recovery = Recovery(recover)
    session.engine._recover = recovery
    return recovery
