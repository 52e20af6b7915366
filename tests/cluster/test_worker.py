"""What a worker makes of what it finds: a manifest that is damaged, a port that is blocked."""

import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nodes import free_ports
from slice_transfer import TOKEN, make_slices, serving

from tpilite.cluster import worker as worker_module
from tpilite.cluster.config import ClusterConfig
from tpilite.cluster.worker import Worker, WorkerOptions
from tpilite.engine.config import EngineConfig
from tpilite.net.auth import Security
from tpilite.net.group import GroupEnded
from tpilite.net.rendezvous import Rendezvous
from tpilite.weights.slices import Manifest


def membership(port: int, check: Callable[[], None] = lambda: None) -> Any:
    return SimpleNamespace(rank=1, info={"served": [1], "file_port": port}, check=check)


def worker(cache: Path, port: int = 29700) -> Worker:
    return Worker(("127.0.0.1", port), ClusterConfig(TOKEN), EngineConfig(), WorkerOptions(cache=cache))


def test_a_rank_0_that_is_away_does_not_wear_out_the_wish_for_a_rank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_PREFER_S", 0.0)
    caplog.set_level("INFO")
    (port,) = free_ports(1)
    options: dict[str, Any] = {"terms": {}, "timeout_s": 10, "allreduce": "star", "payload": "f32"}
    rendezvous = Rendezvous(("127.0.0.1", port), Security(TOKEN), world_size=3, **options)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(worker(tmp_path, port)._join, 2)
        while "trying again until it answers" not in caplog.text and not joining.done():
            time.sleep(0.01)
        with rendezvous, joining.result(30) as membership:
            assert membership.rank == 2


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\x00garbage", b"[]"])
def test_a_damaged_manifest_is_fetched_again(raw: bytes, tmp_path: Path) -> None:
    make_slices(tmp_path / "split")
    node = tmp_path / "here" / "node_1"
    node.mkdir(parents=True)
    (node / "manifest.json").write_bytes(raw)
    with serving(tmp_path / "split") as server:
        found = worker(tmp_path)._fetch(membership(server.port), tmp_path / "here")
    assert found == Manifest.read(node) == Manifest.read(tmp_path / "split" / "node_1")


@pytest.mark.parametrize("is_refused", [True, False], ids=["refused", "dropped"])
def test_a_blocked_file_port_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, is_refused: bool
) -> None:
    monkeypatch.setattr(worker_module, "_PATIENCE_S", 0.2)
    caplog.set_level(logging.INFO)
    n_checks = 0

    def check() -> None:
        nonlocal n_checks
        n_checks += 1
        if n_checks == 3:
            raise GroupEnded("rank 0 ended the session")

    with socket.socket() as full:  # what comes to a full backlog is dropped
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            if is_refused:
                full.close()
            with pytest.raises(GroupEnded):
                worker(tmp_path)._fetch(membership(port, check), tmp_path / "here")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert f"not on port {port}" in lines[0]
    assert f"Open TCP port {port} on 127.0.0.1" in lines[0]
