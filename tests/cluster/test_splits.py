"""Slices for several partitions in one folder: which go where, and what others may not take away."""

import fcntl
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoints import tiny_config, write_checkpoint

from tpilite.cluster import splits
from tpilite.cluster.splits import Split, find_split, folders_in, split_id
from tpilite.cluster.terms import terms_of
from tpilite.errors import SliceError
from tpilite.quantize.recipe import Recipe
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.partition import Partition
from tpilite.weights.slices import Manifest, SliceFolder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    with Checkpoint(write_checkpoint(tmp_path / "model", tiny_config())) as opened:
        yield opened


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Checkpoint]:
    with Checkpoint(write_checkpoint(tmp_path / "other", tiny_config(), seed=9)) as opened:
        yield opened


def part(checkpoint: Checkpoint, n: int) -> Partition:
    return Partition.of(checkpoint.config, n)


def identity(checkpoint: Checkpoint, n: int) -> str:
    return split_id(terms_of(checkpoint.fingerprint, part(checkpoint, n)))


@contextmanager
def made(checkpoint: Checkpoint, n: int, save_dir: Path, **options: bool) -> Iterator[Split]:
    with Split.of(checkpoint, part(checkpoint, n), save_dir, **options) as split:
        split.make(checkpoint, part(checkpoint, n))
        yield split


def make(checkpoint: Checkpoint, n: int, save_dir: Path, **options: bool) -> Path:
    with made(checkpoint, n, save_dir, **options) as split:
        return split.folder


def files_of(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("**/node_*/*")}


def assert_whole(folder: Path, n: int) -> None:
    for rank in range(n):
        with SliceFolder(folder / f"node_{rank}") as slices:
            slices.verify()
            assert (slices.rank, slices.partition.world_size) == (rank, n)


def test_a_model_in_fewer_bits_stands_beside_itself(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_dir = tmp_path / "split"
    assert make(checkpoint, 2, save_dir, replace=True) == save_dir
    for kind in ("q8_0", "q4_0"):
        with Checkpoint(checkpoint.path, recipe=Recipe(kind)) as quantized:
            for _ in range(2):
                folder = make(quantized, 2, save_dir, replace=True)
                assert folder == save_dir / identity(quantized, 2)
            assert_whole(folder, 2)
    assert make(checkpoint, 2, save_dir, replace=True) == save_dir
    assert len(list(folders_in(save_dir))) == 3
    assert_whole(save_dir, 2)


def test_partitions_stand_side_by_side(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_dir = tmp_path / "split"
    assert make(checkpoint, 2, save_dir) == save_dir
    assert make(checkpoint, 3, save_dir) == save_dir / identity(checkpoint, 3)
    before = files_of(save_dir)
    for _ in range(2):
        assert make(checkpoint, 2, save_dir, replace=True) == save_dir
        assert make(checkpoint, 3, save_dir, replace=True) == save_dir / identity(checkpoint, 3)
    assert files_of(save_dir) == before
    assert_whole(save_dir, 2)
    assert_whole(save_dir / identity(checkpoint, 3), 3)
    assert list(folders_in(save_dir)) == [save_dir, save_dir / identity(checkpoint, 3)]
    for node in (save_dir / "node_0", save_dir / "node_1"):
        shutil.rmtree(node)
    assert make(checkpoint, 3, save_dir) == save_dir / identity(checkpoint, 3)


def test_what_is_made_beside_is_said_with_its_size(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    make(checkpoint, 2, tmp_path)
    assert caplog.text == ""
    make(checkpoint, 3, tmp_path)
    assert "were made for 2 ranks, and this start is for 3: its own are made beside them" in caplog.text
    assert f"takes about {checkpoint.nbytes / 1e6:.2f} MB of the disk" in caplog.text


def test_slices_of_another_model_are_replaced_in_a_model_s_own_folder_alone(
    checkpoint: Checkpoint, other: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    save_dir = tmp_path / "split"
    make(checkpoint, 3, save_dir)
    assert make(other, 2, save_dir) == save_dir / identity(other, 2)
    assert_whole(save_dir, 3)
    caplog.clear()
    with made(checkpoint, 3, save_dir):  # in use: they stay
        assert make(other, 4, save_dir, replace=True) == save_dir / identity(other, 4)
    assert make(other, 3, save_dir, replace=True) == save_dir
    assert "and this start is for 3" not in caplog.text
    assert "were made from other weights" in caplog.text
    assert "they are made again, which takes about" in caplog.text
    assert_whole(save_dir, 3)
    assert {Manifest.read(path).fingerprint for path in save_dir.glob("node_*")} == {other.fingerprint}


def test_split_bin_replaces_what_nobody_uses(checkpoint: Checkpoint, tmp_path: Path) -> None:
    make(checkpoint, 2, tmp_path)
    before = files_of(tmp_path)
    with made(checkpoint, 2, tmp_path):
        beside = make(checkpoint, 3, tmp_path, force=True)
        assert beside == tmp_path / identity(checkpoint, 3)
        assert before.items() <= files_of(tmp_path).items()
        with (
            Split.using(beside),
            pytest.raises(SliceError, match=r"another process uses the slices in .*: end it"),
        ):
            make(checkpoint, 3, tmp_path, force=True)
    assert make(checkpoint, 4, tmp_path, force=True) == tmp_path
    assert_whole(tmp_path, 4)


def test_two_that_make_the_same_make_it_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    second: list[Path] = []
    thread = threading.Thread(target=lambda: second.append(make(checkpoint, 2, tmp_path)))

    def begin_second(done: int, total: int) -> None:
        if not thread.ident:
            thread.start()

    with Split.of(checkpoint, part(checkpoint, 2), tmp_path) as split:
        split.make(checkpoint, part(checkpoint, 2), progress=begin_second)
        before = files_of(tmp_path)
        thread.join()
    assert second == [tmp_path]
    assert files_of(tmp_path) == before
    assert list(folders_in(tmp_path)) == [tmp_path]


def test_two_that_make_different_ones_at_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with (
        Split.of(checkpoint, part(checkpoint, 2), tmp_path) as two,
        Split.of(checkpoint, part(checkpoint, 3), tmp_path) as three,
    ):
        assert two.folder == tmp_path
        assert three.folder == tmp_path / identity(checkpoint, 3)
        three.make(checkpoint, part(checkpoint, 3))
        two.make(checkpoint, part(checkpoint, 2))
        assert_whole(two.folder, 2)
        assert_whole(three.folder, 3)


def die_while_slicing(folder: Path, save_dir: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        split = Split.of(checkpoint, part(checkpoint, 2), save_dir)
        split.make(checkpoint, part(checkpoint, 2), progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("n", [2, 3])
def test_what_a_killed_process_left_is_nobody_s(checkpoint: Checkpoint, n: int, tmp_path: Path) -> None:
    save_dir = tmp_path / "split"
    child = multiprocessing.get_context("spawn").Process(
        target=die_while_slicing, args=(checkpoint.path, save_dir)
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert files_of(save_dir)
    assert make(checkpoint, n, save_dir) == save_dir
    assert_whole(save_dir, n)


def test_a_killed_one_beside_others_goes_on_beside_them(checkpoint: Checkpoint, tmp_path: Path) -> None:
    make(checkpoint, 3, tmp_path)
    beside = make(checkpoint, 2, tmp_path)
    (beside / "node_1" / "manifest.json").unlink()
    assert make(checkpoint, 2, tmp_path) == beside
    assert_whole(beside, 2)
    assert_whole(tmp_path, 3)


def test_a_damaged_manifest_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    make(checkpoint, 2, tmp_path)
    (tmp_path / "node_1" / "manifest.json").write_text("{")
    with pytest.raises(SliceError, match=r"node_1/manifest.json: .* --split_bin makes the slices again"):
        make(checkpoint, 2, tmp_path)
    assert make(checkpoint, 2, tmp_path, force=True) == tmp_path


def test_a_place_that_cannot_be_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SliceError, match=r"cannot write .*file"):
        make(checkpoint, 2, tmp_path / "file")


def test_find_split(checkpoint: Checkpoint, tmp_path: Path) -> None:
    make(checkpoint, 2, tmp_path)
    make(checkpoint, 3, tmp_path)
    (tmp_path / identity(checkpoint, 2)).mkdir()
    assert find_split(tmp_path, identity(checkpoint, 2)) == tmp_path
    assert find_split(tmp_path, identity(checkpoint, 3)) == tmp_path / identity(checkpoint, 3)
    assert find_split(tmp_path, identity(checkpoint, 4)) == tmp_path
    assert find_split(tmp_path / "none", identity(checkpoint, 4)) == tmp_path / "none"


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock = tmp_path / ".used", fcntl.flock

    def removed_first(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(fd, operation)

    with splits.FolderLock(tmp_path, ".used") as first, splits.FolderLock(tmp_path, ".used") as second:
        monkeypatch.setattr(fcntl, "flock", removed_first)
        assert first.take()
        assert path.exists()
        assert not second.take()
