"""Listening, connections, and the end by a signal."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from servers import (
    CONFIG,
    JSON,
    Gate,
    client_of,
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


def test_idle_connections_keep_nobody_out_and_open_streams_stay(
    session: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_CONNECTIONS", 3)
    gate = Gate(session)
    with served(session, CONFIG) as server, client_of(server) as client:
        stream = client.completions.create(model="tiny", prompt="Once", max_tokens=3, stream=True)
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(10)]
        assert health(server)["status"] == "ok"
        gate.open()
        assert [c.choices[0].finish_reason for c in stream][-1] == "length"
        for connection in held:
            connection.close()


def test_too_many_connections_are_told_so(session: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_CONNECTIONS", 2)
    gate = Gate(session)
    with served(session, CONFIG) as server, client_of(server) as client:
        ask = partial(client.completions.create, model="tiny", prompt="Once", max_tokens=3, stream=True)
        streams = [ask(), ask()]
        status, headers, body = split(exchange(server.port, b""))
        assert (status, headers["retry-after"]) == (503, "5")
        assert "connections" in json.loads(body)["error"]["message"]
        gate.open()
        assert [[c.choices[0].finish_reason for c in stream][-1] for stream in streams] == ["length"] * 2
        assert health(server)["status"] == "ok"


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


def test_requests_that_are_none_get_an_error_each(shared: Server) -> None:
    def status(request: bytes) -> int:
        code, headers, body = split(exchange(shared.port, request))
        assert headers["content-type"] == "application/json"
        assert headers["connection"] == "close"
        assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}
        return code

    to = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    assert status(b"\x16\x03\x01\x02\x00 garbage of a TLS client\r\n\r\n") == 400
    assert status(b"GET / HTTP/9.9\r\n\r\n") == 505
    assert status(b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n") == 501
    assert status(b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n") in (414, 431)
    assert status(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000 + b"\r\n") == 431
    assert status(b"GET / HTTP/1.1\r\nA: " + b"b" * 50_000 + b"\r\n\r\n") == 431
    assert status(to + b"Connection: close\r\n\r\n") == 400
    assert status(to + b"Content-Length : 44\r\n\r\n") == 400
    assert status(to + b"a malformed line\r\nContent-Length: 44\r\n\r\n") == 400
    assert status(b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n") == 400
    assert status(to + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef") == 400
    assert status(to + b"Content-Length: -5\r\n\r\n") == 400
    assert status(to + b"Content-Length: 1_0\r\n\r\n") == 400
    assert status(to + b"Content-Length: 99999999\r\n\r\n" + b"x" * 100_000) == 413
    assert status(to + b"Content-Length: 99999999999999999999999\r\n\r\n") == 400


def test_a_connection_serves_requests_one_after_another(shared: Server) -> None:
    body = json.dumps({"model": "tiny", "prompt": "Once", "stream": True, "max_tokens": 2}).encode()
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    two = b"POST /v1/completions HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s" % (JSON, len(body), body)
    last = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = exchange(shared.port, one + two + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert b"data: [DONE]\n\n\r\n0\r\n\r\nHTTP/1.1 200 OK" in answer
    assert answer.endswith(b"}]}")
