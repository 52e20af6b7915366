"""What of a folder of slices is no longer needed, and that nothing else is removed."""

import os
from pathlib import Path

import pytest
from checkpoints import tiny_config, write_checkpoint

from tpilite.cluster.clean import Unneeded, unneeded_of_cache, unneeded_of_model
from tpilite.cluster.splits import Split
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.partition import Partition


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [write_checkpoint(folder / name, tiny_config(), seed=i) for i, name in enumerate("ab")]


def make(model: Path, n: int, save_dir: Path, used_at: int) -> Path:
    """Slices for `n` ranks that were used at a time, which is the greater the later."""
    with Checkpoint(model) as checkpoint:
        partition = Partition.of(checkpoint.config, n)
        with Split.of(checkpoint, partition, save_dir) as split:
            split.make(checkpoint, partition)
    os.utime(split.folder / ".used", (used_at, used_at))
    return split.folder


def fingerprint(model: Path) -> str:
    with Checkpoint(model) as checkpoint:
        return checkpoint.fingerprint


def of_model(model: Path, save_dir: Path, own: bool = True) -> list[Unneeded]:
    return list(unneeded_of_model(save_dir, fingerprint(model), own=own))


def test_those_used_last_are_needed(models: list[Path], tmp_path: Path) -> None:
    folders = [make(models[0], n, tmp_path, at) for n, at in ((2, 2000), (3, 3000), (4, 1000))]
    found = of_model(models[0], tmp_path)
    assert [one.folder for one in found] == [folders[2], folders[0]]
    assert found[1].reason.startswith("made for 2 ranks, last used 1970-01-01")
    size = sum(path.stat().st_size for path in tmp_path.glob("node_*/*"))
    assert found[1].nbytes == size
    assert all(one.remove() for one in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == [folders[1].name]
    assert of_model(models[0], tmp_path) == []
    assert make(models[0], 3, tmp_path, 0) == folders[1]


def test_those_of_other_weights_and_unfinished_ones_are_not_needed(
    models: list[Path], tmp_path: Path
) -> None:
    make(models[1], 2, tmp_path, 9000)
    needed = make(models[0], 3, tmp_path, 1000)
    unfinished = make(models[0], 4, tmp_path, 2000)
    for manifest in unfinished.glob("*/manifest.json"):
        manifest.unlink()
    found = {one.folder: one.reason for one in of_model(models[0], tmp_path)}
    assert found == {
        tmp_path: "made from other weights than those that the model has now",
        unfinished: "not finished",
    }
    # In a folder that the user has named, those of another model are not this one's to remove.
    assert [one.folder for one in of_model(models[0], tmp_path, own=False)] == [unfinished]
    # Where there are no weights, nothing could be made again.
    without = list(unneeded_of_model(tmp_path, None, own=True))
    assert [one.folder for one in without] == [unfinished]
    assert needed not in found


def test_what_is_in_use_stays(models: list[Path], tmp_path: Path) -> None:
    first = make(models[0], 2, tmp_path, 1000)
    make(models[0], 3, tmp_path, 2000)
    (one,) = of_model(models[0], tmp_path)
    with Split.using(first):
        os.utime(first / ".used", (1000, 1000))
        assert of_model(models[0], tmp_path) == []
        assert not one.remove()
    before = {path for path in first.glob("**/*") if "node_" in str(path)}
    assert before
    assert one.remove()
    assert not list(first.glob("node_*"))


def test_what_is_not_ours_stays(models: list[Path], tmp_path: Path) -> None:
    save_dir, elsewhere = tmp_path / "split", tmp_path / "elsewhere"
    first = make(models[0], 2, save_dir, 1000)
    make(models[0], 3, save_dir, 2000)
    (first / "node_1").rename(elsewhere)
    (first / "node_1").symlink_to(elsewhere)
    mine = [first / "notes.txt", first / "node_0" / "notes.txt", first / "node_0" / "adapter.safetensors"]
    linked = first / "node_0" / "layers.7.mlp.safetensors"
    linked.symlink_to(elsewhere / "head.safetensors")
    for path in mine:
        path.write_text("mine")
    (first / "node_0" / "layers.9.attn.safetensors.part").write_text("ours")
    (first / "node_0" / ".verified.json").write_text("ours")
    (one,) = of_model(models[0], save_dir)
    assert one.remove()
    left = set(first.glob("node_0/*"))
    assert left == {*mine[1:], linked}
    assert mine[0].exists()
    assert (elsewhere / "manifest.json").exists()


def test_the_cache_of_workers_and_of_models_that_cannot_be_written(
    models: list[Path], tmp_path: Path
) -> None:
    older, newer = "0123456789abcdef", "fedcba9876543210"
    for kind in ("slices", "split"):
        make(models[0], 2, tmp_path / kind / older, 1000)
        make(models[1], 2, tmp_path / kind / newer, 2000)
    make(models[0], 2, tmp_path / "slices" / "something-else", 500)
    found = list(unneeded_of_cache(tmp_path))
    assert [one.folder for one in found] == [tmp_path / "slices" / older, tmp_path / "split" / older]
    assert all(one.remove() for one in found)
    assert not (tmp_path / "slices" / older).exists()
    assert list(unneeded_of_cache(tmp_path)) == []
    assert list(unneeded_of_cache(tmp_path / "nothing")) == []
