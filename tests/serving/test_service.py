"""The waiting line before the engine: full, left, failed, drained."""

from typing import Any

import pytest
from servers import CONFIG, Gate, client_of, eventually, figures, get, health, lossy, post, served

from tpilite import LLM
from tpilite.errors import CheckpointError, NotFinite, PeerLost
from tpilite.serving.jobs import Job

openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")


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


def test_who_has_the_whole_answer_finds_it_counted(session: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    put, found = Job.put, []

    def look(job: Job, item: Any) -> None:
        found.append(figures(server))
        put(job, item)

    monkeypatch.setattr(Job, "put", look)
    with served(session, CONFIG) as server, client_of(server) as client:
        client.completions.create(model="tiny", prompt="Once", max_tokens=3)
    assert [each["new_tokens"] for each in found] == [1, 2, 3]
    assert [each["requests_finished"] for each in found] == [0, 0, 1]


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


@pytest.mark.parametrize(("error", "status"), [(NotFinite(1, "scores"), 500), (MemoryError(), 500)])
def test_what_fails_in_a_pass_ends_its_own_request_and_the_next_is_served(
    session: LLM, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 3}

    def failing(step: object, x: object = None) -> None:
        raise error

    with served(session, CONFIG) as server:
        with monkeypatch.context() as patch:
            patch.setattr(session.engine.runner, "_run", failing)
            found, _, answer = post(server, "/v1/completions", body)
        assert (found, answer["error"]["type"]) == (status, "server_error")
        assert health(server)["status"] == "ok"
        assert figures(server)["requests_failed"] == 1
        assert post(server, "/v1/completions", body)[0] == 200
