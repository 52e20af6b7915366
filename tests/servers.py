"""A small model with a tokenizer and a chat template, and servers of it, for the tests of the service."""

import functools
import io
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sentencepiece
from checkpoints import tiny_config, write_checkpoint

from tpilite.engine.session import Session
from tpilite.llm import LLM
from tpilite.serving.config import ServerConfig
from tpilite.serving.server import Server
from tpilite.serving.service import Service
from tpilite.weights.partition import LM_HEAD
from tpilite.weights.tensor_file import TensorFile

N_PIECES = 400
SENTENCES = [
    "Once upon a time there was a little fox who lived by the river.",
    "The fox was not afraid of the water, and the water was not afraid of the fox.",
    "One day the hare asked: where does the river end? It ends in the sea, said the fox!",
    "They walked and walked, 12 days and 345 steps, until they saw the big blue sea.",
] * 5
# In the manner of Llama 2, in one line.
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ '<<SYS>>' + m['content'] + '<</SYS>>' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@functools.cache
def tokenizer_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=N_PIECES,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_model(folder: Path, *, chat: bool = True, context: int = 256, **config: Any) -> Path:
    """A random model that speaks nonsense of the pieces of `SENTENCES` and hardly ever ends by itself."""
    values = {"vocab_size": N_PIECES, "max_position_embeddings": context, "eos_token_ids": ()}
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
