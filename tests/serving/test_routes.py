"""Which path does what, and for whom: the key, names of this machine, pages of other sites."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import (
    CONFIG,
    client_of,
    exchange,
    get,
    post,
    served,
    split,
)

from tpilite import LLM
from tpilite.errors import CheckpointError
from tpilite.serving.config import ServerConfig
from tpilite.serving.page import load_page
from tpilite.serving.server import Server
from tpilite.serving.service import Recovery

openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")


def test_models_are_listed(client: Any) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "tpilite"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt/9")
    assert caught.value.code == "model_not_found"


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


@pytest.mark.parametrize("fields", [b"Host: user@localhost", b"Host:", b"Host: localhost\r\nOrigin: /"])
def test_a_host_or_an_origin_that_is_none_ends_the_connection(named: Server, fields: bytes) -> None:
    assert split(exchange(named.port, b"GET /health HTTP/1.1\r\n%s\r\n\r\n" % fields))[0] == 400


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


def test_the_cluster_is_described(session: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    recovery = Recovery(lambda _: None, lambda: {1: "missing"})
    with served(session, CONFIG, recovery=recovery) as server:
        state = json.loads(get(server, "/v1/cluster")[2])
        assert state["model"] == {"id": "tiny", "context": 256, "chat": True}
        (alone,) = state["ranks"]
        assert (alone["rank"], alone["state"], alone["resident_share"]) == (0, "ready", 1.0)
        assert alone["name"]
        assert alone["memory_bytes"] > 1e6
        told = [{"name": "a", "resident_bytes": 3, "streaming_bytes": 1}, {"name": "b", "rss_bytes": 7}, {}]
        monkeypatch.setattr(session.engine, "ranks", told)
        monkeypatch.setattr(recovery, "waiting_for", "rank 1 is gone")
        ranks = json.loads(get(server, "/v1/cluster")[2])["ranks"]
    assert [rank["state"] for rank in ranks] == ["waiting", "missing", "waiting"]
    assert [rank["name"] for rank in ranks] == ["a", "b", ""]
    assert [rank["memory_bytes"] for rank in ranks] == [0, 7, 0]
    assert [rank["resident_share"] for rank in ranks] == [0.75, 0.0, 0.0]


def test_origins_of_any_scheme_and_port_are_allowed_by_name(folder: Path) -> None:
    config = ServerConfig(
        port=0,
        model_name="tiny",
        cors_origins=("app://obsidian.md", "http://localhost:*", "https://[fd00::5]"),
    )

    def status(origin: bytes) -> int:
        return get(server, "/v1/models", b"Origin: %s\r\n" % origin)[0]

    with LLM(folder, threads=1) as session, served(session, config) as server:
        for origin in (
            b"app://obsidian.md",
            b"http://localhost:5173",
            b"http://localhost",
            b"https://[fd00::5]",
        ):
            assert status(origin) == 200, origin
        for origin in (
            b"app://other",
            b"https://localhost:1",
            b"http://localhost.evil:1",
            b"null",
            b"file://",
        ):
            assert status(origin) == 403, origin
        for origin in (b"http://[", b"http://a/", b"http://a b", b"x", b"", b"http://a, http://b"):
            assert status(origin) == 400, origin


def test_a_preflight_grants_what_clients_in_javascript_send(named: Server) -> None:
    asked = b"authorization,content-type,x-stainless-os,X-Stainless-Retry-Count,x-forwarded-host,b@d"
    preflight = (
        b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: https://friend.example\r\n"
        b"Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: %s\r\n"
        b"Connection: close\r\n\r\n"
    )
    status, headers, _ = split(exchange(named.port, preflight % asked))
    assert status == 204
    granted = {"authorization", "content-type", "x-stainless-os", "x-stainless-retry-count"}
    assert set(headers["access-control-allow-headers"].split(", ")) == granted


@pytest.mark.parametrize(("proxies", "status"), [(("127.0.0.1",), 200), (("127.0.0.2",), 403), ((), 403)])
def test_a_forwarded_host_counts_from_a_named_proxy_alone(
    folder: Path, proxies: tuple[str, ...], status: int
) -> None:
    config = ServerConfig(port=0, model_name="tiny", proxies=proxies, host_names=("home.example",))
    headers = b"X-Forwarded-Host: home.example\r\nOrigin: https://home.example\r\n"
    with LLM(folder, threads=1) as session, served(session, config) as server:
        assert get(server, "/v1/models", headers)[0] == status
        evil = b"X-Forwarded-Host: evil.example\r\n"
        assert get(server, "/health", evil)[0] == (403 if status == 200 else 200)


@pytest.mark.parametrize("key", [None, "s3cret"])
def test_health_tells_no_places_to_who_has_shown_no_key(
    session: LLM, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    def damaged() -> None:
        raise CheckpointError(
            "rank 1 (pi-two) at 192.168.1.20:29700 and [fe80::1%eth0]:29700: /models/a/x is short"
        )

    with served(session, ServerConfig(port=0, model_name="tiny", api_key=key)) as server:
        shown = b"Host: localhost\r\nAuthorization: Bearer s3cret\r\n"
        with monkeypatch.context() as patch:
            patch.setattr(session.engine, "step", damaged)
            assert post(server, "/v1/completions", {"model": "tiny", "prompt": "Once"}, shown)[0] == 503
        reason = json.loads(get(server, "/health")[2])["reason"]
        assert reason.startswith("rank 1 (pi-two) at ... and ...: ...")
        assert not re.search("192|fe80|models|29700", reason)
        if key:
            told = get(server, "/health", b"Authorization: Bearer s3cret\r\n")[2]
            assert "/models/" in json.loads(told)["reason"]


@pytest.mark.parametrize(
    ("host", "key", "warns"), [("0.0.0.0", None, True), ("0.0.0.0", "x", False), ("127.0.0.1", None, False)]
)
def test_an_open_port_without_a_key_is_warned_of(
    session: LLM, caplog: pytest.LogCaptureFixture, host: str, key: str | None, warns: bool
) -> None:
    with served(session, ServerConfig(host=host, port=0, api_key=key)):
        pass
    assert ("give it an --api_key" in caplog.text) == warns


def test_the_page_names_nothing_by_an_absolute_path() -> None:
    for name, file in load_page().items():
        if not name.endswith(".svg"):
            assert not re.search(rb"""(?:href|src|action)="/|["'`(]/v1|url\(/""", file.content), name
