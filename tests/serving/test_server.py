"""Listening, connections, and the end by a signal."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from servers import (
    CONFIG,
    eventually,
    exchange,
    health,
    served,
    split,
)

from tpilite import LLM
from tpilite.errors import ConfigError
from tpilite.serving import server as module
from tpilite.serving.config import ServerConfig
from tpilite.serving.server import Server

openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")


def test_too_many_connections_are_told_so(session: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_CONNECTIONS", 2)
    with served(session, CONFIG) as server:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        eventually(lambda: len(server._listener._connections) == 2)
        status, headers, body = split(exchange(server.port, b""))
        assert (status, headers["retry-after"]) == (503, "5")
        assert "connections" in json.loads(body)["error"]["message"]
        held.pop().close()
        eventually(lambda: len(server._listener._connections) == 1)
        assert health(server)["status"] == "ok"
        held.pop().close()


def test_nothing_is_left_behind(folder: Path) -> None:
    threads, n_files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    with LLM(folder, threads=1) as session, served(session, CONFIG) as server:
        connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
        assert health(server)["status"] == "ok"
        assert set(threading.enumerate()) - threads
        for connection in connections[:10]:
            connection.close()
    for connection in connections[10:]:
        connection.close()
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) <= n_files


_SERVE = """
import sys, logging, time
from tpilite.llm import LLM
from tpilite.serving.config import ServerConfig
from tpilite.serving.server import serve
logging.basicConfig(level=logging.INFO)
with LLM(sys.argv[1], threads=1) as llm:
    step = llm.engine.step
    llm.engine.step = lambda: (time.sleep(float(sys.argv[2])), step())[1]
    config = ServerConfig(port=0, model_name="tiny", grace_s=float(sys.argv[3]))
    serve(llm, config, ready=lambda url: print(url, flush=True))
print("closed", flush=True)
"""


@pytest.mark.parametrize(
    ("number", "grace_s", "finishes"), [(signal.SIGTERM, 20, True), (signal.SIGINT, 0.1, False)]
)
def test_a_signal_ends_the_process_in_order(
    folder: Path, number: int, grace_s: float, finishes: bool
) -> None:
    command = [sys.executable, "-c", _SERVE, str(folder), "0.02", str(grace_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        url = process.stdout.readline().strip()
        length = 20 if finishes else 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(model="tiny", prompt="Once", max_tokens=length, stream=True)
            chunks = iter(stream)
            assert next(chunks)
            process.send_signal(number)
            if finishes:
                assert [c.choices[0].finish_reason for c in chunks][-1] == "length"
            else:
                with pytest.raises(openai.APIError, match="stopped"):
                    list(chunks)
        assert process.wait(20) == 0
        assert process.stdout.read() == "closed\n"
        assert "Traceback" not in process.stderr.read()


def test_a_taken_port_is_the_users_mistake(session: LLM, shared: Server) -> None:
    with pytest.raises(ConfigError, match="--api_port"):
        with served(session, ServerConfig(port=shared.port)):
            pass
    with pytest.raises(ConfigError, match="cannot listen on nowhere"):
        with served(session, ServerConfig(host="nowhere.invalid", port=0)):
            pass
