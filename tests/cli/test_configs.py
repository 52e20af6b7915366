"""The configurations that options come to: their own defaults where nothing is said, and a local worker's."""

from dataclasses import replace
from pathlib import Path

import pytest

from tpilite.cli.configs import (
    cluster_config,
    engine_config,
    rank_of,
    sampling_params,
    server_config,
    world_size_of,
)
from tpilite.cli.local import share_of, worker_options
from tpilite.cli.options import parse
from tpilite.cluster.config import ClusterConfig
from tpilite.engine.config import EngineConfig
from tpilite.engine.sampling import SamplingParams
from tpilite.errors import ConfigError
from tpilite.serving.config import ServerConfig


def test_what_is_not_said_is_as_the_configurations_have_it() -> None:
    args = parse([])
    assert sampling_params(args) == SamplingParams()
    assert engine_config(args) == EngineConfig()
    assert server_config(args, "m", SamplingParams()) == ServerConfig(model_name="m")
    args = parse(["--token", "secret-of-this-test"])
    assert cluster_config(args, 1, make_token=False) == ClusterConfig("secret-of-this-test")


@pytest.mark.parametrize("budget", [123_456_789, "unlimited"])
def test_a_local_worker_gets_what_rank_0_has(budget: int | str, tmp_path: Path) -> None:
    engine = EngineConfig(threads=3, kv_dtype="f16", memory_budget=budget, memory_window=2)
    cluster = ClusterConfig("secret", tls_cert=tmp_path / "cert", tls_key=tmp_path / "key")
    args = parse(worker_options(4711, tmp_path, engine, cluster))
    assert engine_config(args) == engine
    assert (args.join, args.save_dir, args.once) == ("127.0.0.1:4711", tmp_path, True)
    assert (args.tls_cert, args.tls_key, args.tls_ca) == (cluster.tls_cert, cluster.tls_key, None)


def test_ranks_on_one_machine_share_what_is_free() -> None:
    alone, shared = (share_of(EngineConfig(), world_size) for world_size in (1, 4))
    assert isinstance(alone.memory_budget, int)
    assert isinstance(shared.memory_budget, int)
    assert 3 * shared.memory_budget < alone.memory_budget
    assert shared.threads == max(1, (alone.threads or 0) // 4)
    said = EngineConfig(threads=5, memory_budget=10**9)
    assert share_of(said, 4) == said
    assert share_of(replace(said, memory_budget="unlimited"), 4).memory_budget == "unlimited"


def test_ranks_are_numbered_by_options_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert (rank_of(parse([])), world_size_of(parse([]))) == (3, 5)
    assert (rank_of(parse(["--rank", "1"])), world_size_of(parse(["--world_size", "2"]))) == (1, 2)
    assert world_size_of(parse(["--local", "4"])) == 4
    with pytest.raises(ConfigError, match="--local 4 and --world_size 2 differ"):
        world_size_of(parse(["--local", "4", "--world_size", "2"]))
    with pytest.raises(ConfigError, match="a whole number from 0, found -1"):
        rank_of(parse(["--rank", "-1"]))
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="RANK must be a whole number, found 'first'"):
        rank_of(parse([]))
