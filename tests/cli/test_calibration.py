"""What a text puts into the columns of each matrix, against a pass in float64 that keeps its inputs."""

from pathlib import Path

import numpy as np
import pytest
import reference
from checkpoints import hf_config, random_tensors, tiny_config, write_checkpoint

from tpilite.cli import calibration
from tpilite.cli.calibration import importance_of
from tpilite.engine.config import EngineConfig
from tpilite.linear.matrix import as_float32
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.partition import tensor_shapes

IDS = list(np.random.default_rng(7).integers(3, 50, 40))
CONFIG = tiny_config()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", CONFIG)


def inputs_of(monkeypatch: pytest.MonkeyPatch, stretches: list[list[int]]) -> dict[str, np.ndarray]:
    """The mean squares of what the reference multiplies with each matrix of the layers."""
    seen: dict[str, list[np.ndarray]] = {}
    multiply = reference._linear

    def watched(tensors: reference.Tensors, name: str, x: np.ndarray) -> np.ndarray:
        seen.setdefault(f"{name}.weight", []).append(x)
        return multiply(tensors, name, x)

    monkeypatch.setattr(reference, "_linear", watched)
    tensors = {name: as_float32(stored) for name, stored in random_tensors(CONFIG).items()}
    for stretch in stretches:
        reference.logits(hf_config(CONFIG), tensors, np.array(stretch))
    return {name: (np.concatenate(rows) ** 2).mean(axis=0) for name, rows in seen.items()}


@pytest.mark.parametrize("engine", [EngineConfig(threads=1), EngineConfig(threads=2, memory_window=2)])
def test_it_is_the_mean_square_of_the_inputs(
    engine: EngineConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MAX_ROWS", 16)
    reports: list[tuple[int, int]] = []
    with Checkpoint(folder) as checkpoint:
        found = importance_of(checkpoint, IDS, engine, lambda *report: reports.append(report))
    assert reports == [(15, 40), (30, 40), (40, 40)]
    matrices = {name for name, shape in tensor_shapes(CONFIG).items() if len(shape) == 2}
    assert found.keys() == matrices - {"model.embed_tokens.weight"}
    stretches = [[1, *IDS[:15]], [1, *IDS[15:30]], [1, *IDS[30:]]]
    for name, expected in inputs_of(monkeypatch, stretches).items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], expected, rtol=1e-3, atol=1e-6)


def test_a_table_is_weighed_by_the_last_hidden_states(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        found = importance_of(checkpoint, IDS[:10], EngineConfig(threads=1))["lm_head.weight"]
        norm = as_float32(checkpoint.tensors["model.norm.weight"].array())
    assert found.shape == (CONFIG.hidden_size,)
    np.testing.assert_allclose((found / norm**2).mean(), 1, rtol=1e-3)
