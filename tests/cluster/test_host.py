"""Rank 0 by itself: a cluster of one."""

import time
from pathlib import Path

from tpilite.cluster.config import ClusterConfig
from tpilite.cluster.host import Host
from tpilite.engine.config import EngineConfig
from tpilite.errors import PeerLost
from tpilite.formats.model_files import ModelFiles
from tpilite.shipped import find_model


def test_it_tells_when_the_last_group_formed(tmp_path: Path) -> None:
    cluster = ClusterConfig("a token for tests", host="127.0.0.1", broadcast_port=0, file_port=0)
    before_s = time.monotonic()
    with Host(
        ModelFiles.find(find_model("fable")), tmp_path / "split", cluster, EngineConfig(threads=1)
    ) as host:
        host.listen()
        host.start()
        first_s = host.formed_s
        assert first_s > before_s
        host.recover(PeerLost("a test"))
        assert host.formed_s > first_s
