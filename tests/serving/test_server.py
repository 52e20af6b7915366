"""The service over HTTP, by OpenAI's own client and by clients that mean no good."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from servers import exchange, served, write_model

from tpilite import LLM, SamplingParams
from tpilite.errors import CheckpointError, ConfigError, PeerLost
from tpilite.serving import answer, http
from tpilite.serving import server as module
from tpilite.serving.config import ServerConfig, read_api_key
from tpilite.serving.server import Server
from tpilite.serving.service import Recovery

openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")

HELLO: Any = [{"role": "user", "content": "Where does the river end?"}]
CONFIG = ServerConfig(port=0, model_name="tiny", max_waiting=2, defaults=SamplingParams(seed=1))
JSON = b"Host: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
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


def client_of(server: Server, **options: Any) -> Any:
    options = {"api_key": "none", "max_retries": 0, "timeout": 30} | options
    return openai.OpenAI(base_url=f"{server.url}/v1", **options)


@pytest.fixture(scope="module")
def client(shared: Server) -> Iterator[Any]:
    with client_of(shared) as client:
        yield client


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
    for _ in range(1000):
        if value := condition():
            return value
        time.sleep(0.01)
    pytest.fail("it did not come true within 10 s")


def get(server: Server, path: str, headers: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    return split(
        exchange(server.port, b"GET %s HTTP/1.0\r\nHost: localhost\r\n%s\r\n" % (path.encode(), headers))
    )


def post(server: Server, path: str, body: Any, headers: bytes = JSON) -> tuple[int, dict[str, str], Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = b"POST %s HTTP/1.0\r\n%sContent-Length: %d\r\n\r\n" % (path.encode(), headers, len(raw))
    status, found, answer = split(exchange(server.port, head + raw))
    return status, found, json.loads(answer)


def split(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), {k.lower(): v for k, _, v in (x.partition(": ") for x in lines)}, body


def health(server: Server) -> dict[str, Any]:
    return json.loads(get(server, "/health")[2])


def figures(server: Server) -> dict[str, Any]:
    return json.loads(get(server, "/v1/cluster")[2])["figures"]


# ---- OpenAI's client


def test_a_completion_is_what_the_model_says(client: Any, llm: LLM) -> None:
    expected = llm.generate("Once upon", SamplingParams(temperature=0, length=20))
    answer = client.completions.create(model="tiny", prompt="Once upon", temperature=0, max_tokens=20)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == "length"
    n_prompt = len(llm.tokenizer.encode("Once upon"))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n_prompt, 20)
    assert answer.usage.total_tokens == n_prompt + 20
    ids = llm.tokenizer.encode("Once upon")
    by_ids = client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=20, echo=True)
    assert by_ids.choices[0].text == "Once upon" + expected.text
    nothing = client.completions.create(model="tiny", prompt="Once", max_tokens=0, echo=True)
    assert (nothing.choices[0].text, nothing.usage.completion_tokens) == ("Once", 0)


def test_a_chat_is_answered_as_the_model_answers(client: Any, llm: LLM) -> None:
    params = SamplingParams(
        seed=7, temperature=0.8, p=0.9, k=40, min_p=0.01, repetition_penalty=1.1, length=20
    )
    request = llm.start_chat(HELLO, params)
    expected = "".join(llm.run(request))
    fields = {
        "model": "tiny",
        "messages": HELLO,
        "seed": 7,
        "temperature": 0.8,
        "top_p": 0.9,
        "max_completion_tokens": 20,
        "extra_body": {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1},
    }
    answer = client.chat.completions.create(**fields)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(request.prompt_ids)
    chunks = list(
        client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == expected
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == answer.usage
    assert len(chunks) > 10
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat_answer_does_not_begin_with_the_tokenizers_space(client: Any, llm: LLM) -> None:
    word = llm.tokenizer.encode(" river", bos=False)[0]
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=1, logit_bias={str(word): 100}
    )
    assert llm.tokenizer.token_bytes(word).startswith(b" ")
    assert not answer.choices[0].message.content.startswith(" ")


def test_several_choices_have_seeds_of_their_own(client: Any) -> None:
    def texts(**fields: Any) -> list[str]:
        answer = client.completions.create(model="tiny", max_tokens=12, temperature=1, **fields)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    pairs = texts(prompt=["Once", "One"], n=2, seed=5)
    assert pairs[:2] == [texts(prompt="Once", seed=5)[0], texts(prompt="Once", seed=6)[0]]
    assert pairs[2:] == texts(prompt="One", n=2, seed=5)
    assert len(set(pairs)) == 4
    streamed = ["", "", "", ""]
    chunks = client.completions.create(
        model="tiny", max_tokens=12, temperature=1, prompt=["Once", "One"], n=2, seed=5, stream=True
    )
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == pairs


def test_stop_texts_end_the_text_before_them(client: Any, llm: LLM) -> None:
    whole = llm.generate("Once", SamplingParams(temperature=0, length=30)).text
    stop = whole[20:24]
    for stream in (False, True):
        answer = client.completions.create(
            model="tiny",
            prompt="Once",
            temperature=0,
            max_tokens=30,
            stop=["§", stop],
            stream=stream,
            logprobs=0,
        )
        choices = [c.choices[0] for c in (answer if stream else [answer])]
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"
        # What is not shown has no log-probabilities either; its last token may be shown in part.
        tokens = [t for choice in choices if choice.logprobs for t in choice.logprobs.tokens]
        *before, last = (len(re.sub(r"bytes:(\\x..)+", "\ufffd", token)) for token in tokens)
        assert sum(before) < whole.index(stop) <= sum(before) + last


def test_logprobs_are_the_models_own(client: Any, llm: LLM) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    request = llm.start_chat(HELLO, SamplingParams(temperature=0, length=5, logprobs=3))
    for _ in llm.run(request):
        pass
    entries = answer.choices[0].logprobs.content
    assert [e.logprob for e in entries] == pytest.approx([t.logprob for t in request.logprobs], abs=1e-5)
    assert b"".join(bytes(e.bytes) for e in entries) == b"".join(
        llm.tokenizer.token_bytes(i) for i in request.new_ids
    )
    assert all(len(e.top_logprobs) == 3 and e.top_logprobs[0].logprob == e.logprob for e in entries)
    chunks = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.token for e in streamed] == [e.token for e in entries]
    assert [e.logprob for e in streamed] == pytest.approx([e.logprob for e in entries], abs=1e-5)
    text = client.completions.create(model="tiny", prompt="Once", max_tokens=5, temperature=0, logprobs=2)
    logprobs = text.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 5
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)


def test_the_end_of_a_text_is_stop(tmp_path: Path, llm: LLM) -> None:
    eos = llm.generate("Once", SamplingParams(temperature=0, length=8)).ids[7]
    folder = write_model(tmp_path, eos_token_ids=(eos,))
    with LLM(folder, threads=1) as session, served(session, CONFIG) as server, client_of(server) as client:
        answer = client.completions.create(
            model="tiny", prompt="Once", temperature=0, max_tokens=50, logprobs=0
        )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(answer.choices[0].logprobs.tokens) + 1 <= 8


def test_models_are_listed(client: Any) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "tpilite"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt/9")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"model": "gpt-9"}, "model_not_found", "model"),
        ({"messages": [{"role": "user", "content": "river " * 300}]}, "context_length_exceeded", "messages"),
        ({"max_tokens": 250}, "context_length_exceeded", "messages"),
        ({"temperature": 3}, "integer_above_max_value", "temperature"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter", "tools"),
        ({"logit_bias": {"400": 1}}, "invalid_value", "messages"),
        ({"extra_body": {"colour": "red"}}, "unknown_parameter", "colour"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_openais(client: Any, fields: Any, code: str, param: str, stream: bool) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "stream": stream, **fields})
    error = caught.value
    assert error.status_code == (404 if code == "model_not_found" else 400)
    assert (error.code, error.param, error.type) == (code, param, "invalid_request_error")
    assert error.request_id


def test_a_model_without_a_chat_format_says_so(tmp_path: Path) -> None:
    folder = write_model(tmp_path, chat=False)
    with LLM(folder, threads=1) as session, served(session, CONFIG) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match="not made for chat"):
            client.chat.completions.create(model="tiny", messages=HELLO)
        assert client.completions.create(model="tiny", prompt="Once").usage.completion_tokens == 16
        assert not json.loads(get(server, "/v1/cluster")[2])["model"]["chat"]


def test_a_key_is_needed_where_one_is_set(session: LLM) -> None:
    config = ServerConfig(port=0, model_name="tiny", api_key="s3cret")
    with served(session, config) as server:
        with client_of(server, api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                client.completions.create(model="tiny", prompt="Once")
        assert caught.value.code == "invalid_api_key"
        with client_of(server, api_key="s3cret") as client:
            assert client.completions.create(model="tiny", prompt="Once").choices
        for path in ("/v1/models", "/v1/cluster", "/metrics"):
            status, headers, body = get(server, path)
            assert (status, headers["www-authenticate"]) == (401, "Bearer"), path
            assert json.loads(body)["error"]["type"] == "invalid_request_error"
            assert get(server, path, b"Authorization: Bearer s3cret\r\n")[0] == 200
        assert (get(server, "/health")[0], get(server, "/")[0]) == (200, 200)


# ---- clients that come, wait and go


def test_a_full_line_says_when_to_come_back(session: LLM) -> None:
    gate = Gate(session)
    with served(session, CONFIG) as server, client_of(server) as client:
        streams = [
            client.completions.create(model="tiny", prompt="Once", max_tokens=3, stream=True)
            for _ in range(3)
        ]
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="tiny", prompt="Once")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        now = figures(server)
        assert (now["requests_running"], now["requests_waiting"], now["requests_refused"]) == (1, 2, 1)
        gate.open()
        assert [sum(1 for c in s if c.choices[0].finish_reason) for s in streams] == [1, 1, 1]
        assert client.completions.create(model="tiny", prompt="Once").choices
        assert figures(server)["requests_finished"] == 4


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_place_within_a_pass(session: LLM, stream: bool) -> None:
    gate = Gate(session)
    with served(session, CONFIG) as server, client_of(server) as client:
        body = json.dumps({"model": "tiny", "prompt": "Once", "max_tokens": 200, "stream": stream}).encode()
        request = b"POST /v1/completions HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s" % (JSON, len(body), body)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request)
            gate.let(3)
            eventually(lambda: gate.n_steps == 3)
        eventually(lambda: figures(server)["requests_cancelled"] == 1)
        assert figures(server)["requests_running"] == 0
        gate.let()  # for the pass that may have been about to be made
        waiting = client.completions.create(model="tiny", prompt="One", max_tokens=2, stream=True)
        gate.let(2)
        assert [c.choices[0].finish_reason for c in waiting][-1] == "length"
        assert gate.n_steps <= 3 + 1 + 2


def test_a_client_that_waits_in_line_and_leaves_was_never_served(session: LLM) -> None:
    gate = Gate(session)
    with served(session, CONFIG) as server, client_of(server) as client:
        first = client.completions.create(model="tiny", prompt="Once", max_tokens=2, stream=True)
        second = client.completions.create(model="tiny", prompt="One", max_tokens=200, stream=True)
        assert figures(server)["requests_waiting"] == 1
        second.close()
        eventually(lambda: figures(server)["requests_waiting"] == 0)
        gate.open()
        assert [c.choices[0].finish_reason for c in first][-1] == "length"
        assert figures(server)["new_tokens"] == 2


def test_the_clients_time_out_ends_the_work(session: LLM) -> None:
    gate = Gate(session)
    with served(session, CONFIG) as server, client_of(server, timeout=0.5) as client:
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model="tiny", messages=HELLO)
        eventually(lambda: figures(server)["requests_cancelled"] == 1)
        gate.open()


def test_leaving_a_stream_early_ends_the_work(session: LLM) -> None:
    gate = Gate(session)
    with served(session, CONFIG) as server, client_of(server) as client:
        with client.chat.completions.create(model="tiny", messages=HELLO, stream=True) as stream:
            gate.let(2)
            assert next(iter(stream))
        eventually(lambda: figures(server)["requests_cancelled"] == 1)
        gate.open()
        assert client.completions.create(model="tiny", prompt="Once").choices


# ---- ranks lost and found


def lossy(session: LLM, monkeypatch: pytest.MonkeyPatch, recover: Callable[[PeerLost], None]) -> Recovery:
    """A session that loses a rank in its third pass."""
    run, n_runs = session.engine.runner.run, iter(range(1000))

    def losing(step: Any, x: Any = None) -> Any:
        if next(n_runs) == 2:
            raise PeerLost("rank 1 (pi-two) is gone")
        return run(step, x)

    monkeypatch.setattr(session.engine.runner, "run", losing)
    recovery = Recovery(recover)
    session.engine._recover = recovery
    return recovery


def test_a_lost_rank_pauses_streams_and_they_go_on(
    session: LLM, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "_KEEP_ALIVE_S", 0.1)
    back = threading.Event()

    def recover(_lost: PeerLost) -> None:
        assert back.wait(30)
        session.engine.runner.reset()

    recovery = lossy(session, monkeypatch, recover)
    expected = llm.generate("Once", SamplingParams(temperature=0, length=8)).text
    with served(session, CONFIG, recovery=recovery) as server:
        body = json.dumps(
            {"model": "tiny", "prompt": "Once", "temperature": 0, "max_tokens": 8, "stream": True}
        ).encode()
        with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.0\r\n%sContent-Length: %d\r\n\r\n%s" % (JSON, len(body), body)
            )
            text = b""
            while b": waiting\n\n" not in text:
                text += connection.recv(65536)
            assert health(server) == {"status": "waiting", "reason": "rank 1 (pi-two) is gone"}
            assert get(server, "/health")[0] == 503
            assert b"tpilite_up 0" in get(server, "/metrics")[2]
            back.set()
            while piece := connection.recv(65536):
                text += piece
        events = [line[6:] for line in text.decode().split("\n") if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        assert "".join(json.loads(e)["choices"][0]["text"] for e in events) == expected
        assert health(server) == {"status": "ok", "reason": None}


def test_past_the_time_out_streams_end_with_an_error_and_health_says_what_is_missing(
    session: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recover(_lost: PeerLost) -> None:
        raise PeerLost("rank 1 did not come back within 5 s")

    recovery = lossy(session, monkeypatch, recover)
    with served(session, CONFIG, recovery=recovery) as server, client_of(server) as client:
        stream = client.completions.create(model="tiny", prompt="Once", max_tokens=9, stream=True)
        with pytest.raises(openai.APIError, match="rank 1 did not come back"):
            list(stream)
        assert health(server) == {"status": "failed", "reason": "rank 1 did not come back within 5 s"}
        assert figures(server)["requests_failed"] == 1
        # The next request is the next try.
        assert client.completions.create(model="tiny", prompt="Once").choices
        assert health(server)["status"] == "ok"


def test_an_error_of_a_file_is_503_where_nothing_was_streamed_yet(
    session: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged() -> None:
        raise CheckpointError("model.safetensors is shorter than it was")

    with served(session, CONFIG) as server:
        with monkeypatch.context() as patch:
            patch.setattr(session.engine, "step", damaged)
            status, headers, body = post(server, "/v1/completions", {"model": "tiny", "prompt": "Once"})
        assert (status, headers["retry-after"]) == (503, "5")
        assert "shorter than it was" in body["error"]["message"]
        assert health(server)["status"] == "failed"


def test_a_mistake_of_our_own_is_told_and_logged(
    session: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session.engine, "step", lambda: 1 // 0)
    with served(session, CONFIG) as server, client_of(server) as client:
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="mistake of its own"):
                client.completions.create(model="tiny", prompt="Once")
        assert health(server)["status"] == "failed"
    assert "ZeroDivisionError" in caplog.text


# ---- HTTP


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
    assert status(to + b"Connection: close\r\n\r\n") == 411
    assert status(to + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n") == 411
    assert status(to + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef") == 400
    assert status(to + b"Content-Length: -5\r\n\r\n") == 400
    assert status(to + b"Content-Length: 1_0\r\n\r\n") == 400
    assert status(to + b"Content-Length: 99999999\r\n\r\n" + b"x" * 100_000) == 413
    assert status(to + b"Content-Length: 99999999999999999999999\r\n\r\n") == 400


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"[]", b'{"model": NaN}'])
def test_bodies_that_are_no_json_object_are_400(shared: Server, body: bytes) -> None:
    status, _, answer = post(shared, "/v1/chat/completions", body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


def test_paths_and_methods_that_are_not_there(shared: Server) -> None:
    for path in (
        "/nothing",
        "/v1/nothing",
        "/../etc/passwd",
        "/%2e%2e/server.py",
        "//localhost/",
        "/index.html",
    ):
        status, _, body = get(shared, path)
        assert (status, json.loads(body)["error"]["code"]) == (404, "unknown_url"), path
    status, headers, _ = get(shared, "/v1/completions")
    assert (status, headers["allow"]) == (405, "POST")
    status, headers, _ = post(shared, "/v1/models", {})
    assert (status, headers["allow"]) == (405, "GET")
    assert split(exchange(shared.port, b"HEAD / HTTP/1.0\r\nHost: localhost\r\n\r\n"))[2] == b""


def test_a_connection_serves_requests_one_after_another(shared: Server) -> None:
    body = json.dumps({"model": "tiny", "prompt": "Once", "stream": True, "max_tokens": 2}).encode()
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    two = b"POST /v1/completions HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s" % (JSON, len(body), body)
    last = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = exchange(shared.port, one + two + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert b"data: [DONE]\n\n\r\n0\r\n\r\nHTTP/1.1 200 OK" in answer
    assert answer.endswith(b"}]}")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"localhost", 200),
        (b"LOCALHOST.:8080", 200),
        (b"my.localhost", 200),
        (b"127.0.0.1:8080", 200),
        (b"192.168.7.9", 200),
        (b"[::1]:8080", 200),
        (b"[fd00::5]", 200),
        (b"assistant.home", 200),
        (socket.gethostname().encode(), 200),
        (b"evil.example", 403),
        (b"127.0.0.1.evil.example", 403),
        (b"localhost.evil.example:8080", 403),
        (b"user@localhost", 400),
        (b"local host", 400),
        (b"", 400),
        (b"localhost\r\nHost: localhost", 400),
    ],
)
def test_only_names_of_this_machine_reach_it(named: Server, host: bytes, status: int) -> None:
    found = split(exchange(named.port, b"GET /health HTTP/1.0\r\nHost: %s\r\n\r\n" % host))
    assert found[0] == status


@pytest.fixture(scope="module")
def named(folder: Path) -> Iterator[Server]:
    config = ServerConfig(
        port=0, model_name="tiny", host_names=("Assistant.home",), cors_origins=("https://friend.example",)
    )
    with LLM(folder, threads=1) as session, served(session, config) as server:
        yield server


def test_pages_of_other_sites_are_refused_unless_allowed(named: Server, shared: Server) -> None:
    own = b"Origin: http://localhost:8080\r\nHost: localhost:8080\r\n"
    ask = {"model": "tiny", "prompt": "Once", "max_tokens": 1}
    assert post(named, "/v1/completions", ask, own)[0] == 200
    for origin in (b"https://evil.example", b"null", b"http://localhost:9999"):
        status, headers, _ = post(
            named, "/v1/completions", ask, b"Origin: %s\r\nHost: localhost\r\n" % origin
        )
        assert status == 403
        assert "access-control-allow-origin" not in headers
    friend = b"Origin: https://friend.example\r\nHost: localhost\r\n"
    status, headers, _ = post(named, "/v1/completions", ask, friend)
    assert (status, headers["access-control-allow-origin"]) == (200, "https://friend.example")
    preflight = b"OPTIONS /v1/completions HTTP/1.0\r\n%s\r\n" % friend
    status, headers, _ = split(exchange(named.port, preflight))
    assert (status, headers["access-control-allow-methods"]) == (204, "POST")
    assert split(exchange(shared.port, preflight))[0] == 403
    own_preflight = b"OPTIONS /v1/completions HTTP/1.0\r\nHost: localhost\r\n\r\n"
    assert split(exchange(shared.port, own_preflight))[0] == 405


def test_the_page_comes_with_a_strict_policy(shared: Server) -> None:
    status, headers, body = get(shared, "/")
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert b"<!doctype html>" in body.lower()
    again = get(shared, "/", b"If-None-Match: %s\r\n" % headers["etag"].encode())
    assert (again[0], again[2]) == (304, b"")


def test_metrics_are_what_prometheus_reads(shared: Server) -> None:
    def values() -> dict[str, float]:
        status, headers, body = get(shared, "/metrics")
        assert (status, headers["content-type"].split(";")[0]) == (200, "text/plain")
        lines = body.decode().splitlines()
        types = dict(re.findall(r"# TYPE (\w+) (counter|gauge)", body.decode()))
        samples = [line.split(" ") for line in lines if not line.startswith("#")]
        assert {name for name, _ in samples} == types.keys()
        assert all(name.endswith("_total") == (types[name] == "counter") for name, _ in samples)
        return {name: float(value) for name, value in samples}

    before = values()
    post(shared, "/v1/completions", {"model": "tiny", "prompt": "Once", "max_tokens": 7})
    after = values()
    assert after["tpilite_new_tokens_total"] - before["tpilite_new_tokens_total"] == 7
    assert after["tpilite_requests_finished_total"] - before["tpilite_requests_finished_total"] == 1
    assert after["tpilite_compute_seconds_total"] > before["tpilite_compute_seconds_total"]
    assert after["tpilite_resident_memory_bytes"] > 1e6
    assert after["tpilite_up"] == 1


def test_the_cluster_is_described(session: LLM) -> None:
    ranks = [{"rank": 0, "name": "a", "state": "ready"}, {"rank": 1, "name": "b", "state": "missing"}]
    with served(session, CONFIG, cluster_state=lambda: ranks) as server:
        state = json.loads(get(server, "/v1/cluster")[2])
    assert state["ranks"] == ranks
    assert state["model"] == {"id": "tiny", "context": 256, "chat": True}
    with served(session, CONFIG) as server:
        (alone,) = json.loads(get(server, "/v1/cluster")[2])["ranks"]
    assert (alone["rank"], alone["state"]) == (0, "ready")
    assert alone["memory_bytes"] > 1e6


# ---- limits


def test_slow_clients_are_cut_and_hold_nobody_up(session: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_HEADERS_S", 0.3)
    monkeypatch.setattr(http, "_BODY_S", 0.3)
    with served(session, CONFIG) as server:
        starts = [
            b"",
            b"GET / HT",
            b"POST /v1/completions HTTP/1.1\r\n%sContent-Length: 50\r\n\r\n{" % JSON,
        ]
        connections = [socket.create_connection(("127.0.0.1", server.port), 10) for _ in starts]
        for connection, start in zip(connections, starts, strict=True):
            connection.sendall(start)
        assert health(server)["status"] == "ok"
        for connection in connections:
            while connection.recv(65536):
                pass
            connection.close()


def test_a_byte_at_a_time_is_too_slow_a_head(session: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_HEADERS_S", 0.3)
    with served(session, CONFIG) as server:
        with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
            connection.settimeout(0.02)
            for _ in range(500):
                with suppress(TimeoutError, BrokenPipeError):
                    connection.sendall(b"X")
                    assert connection.recv(1) == b""
                    return
            pytest.fail("10 s were not too long")


def test_a_client_that_does_not_read_is_cut(session: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_SEND_S", 0.2)
    with served(session, CONFIG) as server:
        server._listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        body = json.dumps(
            {"model": "tiny", "prompt": ["Once"] * 100, "max_tokens": 200, "stream": True, "logprobs": 5}
        )
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s"
                % (JSON, len(body), body.encode())
            )
            eventually(lambda: figures(server)["requests_cancelled"] == 1)


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


# ---- the end


def test_stopping_finishes_what_is_open_and_takes_nothing_new(session: LLM) -> None:
    gate = Gate(session)
    with served(session, CONFIG) as server, client_of(server) as client:
        service = server._completions._service
        stream = client.completions.create(model="tiny", prompt="Once", max_tokens=5, stream=True)
        gate.let(1)
        assert not service.drain(0.01)
        status, headers, body = post(server, "/v1/completions", {"model": "tiny", "prompt": "Once"})
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "stopping", "5")
        assert (get(server, "/health")[0], health(server)["status"]) == (503, "stopping")
        gate.open()
        assert [c.choices[0].finish_reason for c in stream][-1] == "length"
        assert service.drain(10)


def test_past_the_grace_open_streams_are_told(session: LLM) -> None:
    gate = Gate(session)
    with served(session, CONFIG) as server, client_of(server) as client:
        stream = client.completions.create(model="tiny", prompt="Once", max_tokens=100, stream=True)
        gate.let(3)
        assert next(iter(stream))
        ending = threading.Thread(target=server._completions._service.close)
        ending.start()
        gate.let(1)
        ending.join()
        with pytest.raises(openai.APIError, match="stopped before this answer was complete"):
            list(stream)


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


@pytest.mark.parametrize(
    "fields",
    [
        {"port": 70000},
        {"api_key": ""},
        {"api_key": "a b"},
        {"max_waiting": -1},
        {"grace_s": float("nan")},
        {"cors_origins": ("example.org",)},
    ],
)
def test_settings_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServerConfig(**fields)


def test_a_key_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_api_key(path)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_api_key(path)
    path.write_text("s3cret\n")
    assert read_api_key(path) == "s3cret"


@pytest.fixture(autouse=True)
def loud(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A mistake of our own that only the log tells of fails the test."""
    yield
    told = [r for r in caplog.records if r.levelno >= logging.ERROR and "mistake" in r.getMessage()]
    assert not told or "own_is_told" in os.environ.get("PYTEST_CURRENT_TEST", "")
