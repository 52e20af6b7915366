import errno
import hashlib
import itertools
import os
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from checkpoints import random_tensors, tiny_config, write_checkpoint

from tpilite.config.llama import LlamaConfig, RopeScaling
from tpilite.errors import SliceError
from tpilite.quantize.recipe import Recipe
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.partition import Partition
from tpilite.weights.slicer import ensure_slices
from tpilite.weights.slices import Manifest, SliceFolder, node_folder
from tpilite.weights.trust import VerifiedFiles

BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
BY_COLUMNS = ("o_proj.weight", "down_proj.weight")

EVERYTHING = tiny_config(
    attention_bias=True, mlp_bias=True, rope_scaling=RopeScaling("llama3", 8.0), bos_token_id=None
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    with Checkpoint(write_checkpoint(tmp_path / "model", tiny_config())) as opened:
        yield opened


def model(folder: Path, recipe: Recipe | None = None, **changes: Any) -> Checkpoint:
    return Checkpoint(write_checkpoint(folder, tiny_config(**changes)), recipe=recipe)


as_stored_and_quantized = pytest.mark.parametrize("recipe", [None, Recipe("q8_0")], ids=["stored", "q8_0"])


def whole_again(save_dir: Path, world_size: int) -> dict[str, Any]:
    """The model's tensors, put together from the slices of all ranks by the names of their projections."""
    held: dict[str, list[Any]] = {}
    for rank in range(world_size):
        with SliceFolder(node_folder(save_dir, rank)) as part:
            part.verify()
            assert (part.rank, part.partition.world_size) == (rank, world_size)
            for name, tensor in part.tensors.items():
                held.setdefault(name, []).append(tensor.array())
    whole = {}
    for name, parts in held.items():
        if name.endswith(BY_COLUMNS):
            whole[name] = np.concatenate(parts, axis=1)
        elif any(projection in name for projection in BY_ROWS):
            whole[name] = np.concatenate(parts)
        else:
            alone = "norm" not in name  # the embedding and the biases that are added once
            assert len(parts) == (1 if alone else world_size), name
            for other in parts:
                np.testing.assert_array_equal(other, parts[0])
            whole[name] = parts[0]
    return whole


@pytest.mark.parametrize(
    ("config", "dtype", "ratio"),
    [
        (tiny_config(), "BF16", (1,)),
        (tiny_config(), "F32", (1, 1)),
        (tiny_config(tie_word_embeddings=True), "BF16", (1, 1, 1)),
        (EVERYTHING, "F16", (2, 1, 1)),
        (EVERYTHING, "BF16", (1,) * 5),
        (tiny_config(head_dim=6, intermediate_size=89), "BF16", (3, 0.5) + (1,) * 6),
    ],
)
def test_the_slices_together_are_the_model(
    config: LlamaConfig, dtype: str, ratio: tuple[float, ...], tmp_path: Path
) -> None:
    expected = random_tensors(config, dtype, seed=5)
    if config.tie_word_embeddings:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    with Checkpoint(write_checkpoint(tmp_path / "model", config, dtype, seed=5, shards=2)) as checkpoint:
        partition = Partition.of(config, len(ratio), ratio)
        manifests = ensure_slices(checkpoint, partition, tmp_path / "split")
        found = whole_again(tmp_path / "split", len(ratio))
        assert set(found) == set(expected)
        for name, values in expected.items():
            assert found[name].dtype == values.dtype
            np.testing.assert_array_equal(found[name], values, err_msg=name)
        for rank, manifest in enumerate(manifests):
            assert manifest.rank == rank
            assert (manifest.config, manifest.partition) == (config, partition)
            assert manifest.fingerprint == checkpoint.fingerprint
            assert Manifest.from_json(manifest.to_json()) == manifest


def test_the_files_are_what_the_format_says(checkpoint: Checkpoint, tmp_path: Path) -> None:
    manifests = ensure_slices(checkpoint, Partition.of(checkpoint.config, 2), tmp_path / "split")
    blocks = {f"layers.{i}.{kind}.safetensors" for i in range(2) for kind in ("attn", "mlp")}
    assert set(manifests[0].files) == blocks | {"head.safetensors", "embed.safetensors"}
    assert set(manifests[1].files) == blocks | {"head.safetensors"}
    for rank, manifest in enumerate(manifests):
        folder = tmp_path / "split" / f"node_{rank}"
        assert {path.name for path in folder.iterdir()} == {
            *manifest.files,
            "manifest.json",
            ".verified.json",
        }
        for name, entry in manifest.files.items():
            raw = (folder / name).read_bytes()
            assert entry.size == len(raw)
            assert entry.sha256 == hashlib.sha256(raw).hexdigest()
            with safetensors.safe_open(folder / name, "np") as file:  # the library finds it sound as well
                assert file.keys()


def files_of(save_dir: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in save_dir.glob("node_*/*")}


def test_slices_that_fit_are_kept_and_force_makes_them_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    partition = Partition.of(checkpoint.config, 2)
    first = ensure_slices(checkpoint, partition, tmp_path)
    made = files_of(tmp_path)
    assert ensure_slices(checkpoint, partition, tmp_path) == first
    assert files_of(tmp_path) == made
    assert ensure_slices(checkpoint, partition, tmp_path, force=True) == first
    assert not set(files_of(tmp_path).values()) & set(made.values())


def test_force_leaves_no_slices_of_a_larger_cluster(checkpoint: Checkpoint, tmp_path: Path) -> None:
    ensure_slices(checkpoint, Partition.of(checkpoint.config, 4), tmp_path)
    (tmp_path / "node_3" / "notes.txt").write_text("the user's own")
    ensure_slices(checkpoint, Partition.of(checkpoint.config, 2), tmp_path, force=True)
    assert {path.name for path in tmp_path.glob("node_*")} == {"node_0", "node_1", "node_3"}
    assert [path.name for path in (tmp_path / "node_3").iterdir()] == ["notes.txt"]


def test_only_the_ranks_that_are_asked_for(checkpoint: Checkpoint, tmp_path: Path) -> None:
    partition = Partition.of(checkpoint.config, 3)
    (manifest,) = ensure_slices(checkpoint, partition, tmp_path, ranks=[1])
    assert [path.name for path in tmp_path.glob("node_*")] == ["node_1"]
    made = files_of(tmp_path)
    everything = ensure_slices(checkpoint, partition, tmp_path)
    assert everything[1] == manifest
    assert made.items() <= files_of(tmp_path).items()
    whole_again(tmp_path, 3)


MISFITS = [
    ({}, 3, None, "made for 2 ranks, and this start is for 3"),
    ({}, 2, (2, 1), "made for the ratio 1,1, and this start is for 2,1"),
    ({"rope_theta": 5e5}, 2, None, "made with rope_theta = 10000.0, and the model has 500000.0"),
    ({"seed": 9}, 2, None, "made from other weights than those in .*other"),
]


@pytest.mark.parametrize(("changes", "world_size", "ratio", "text"), MISFITS)
def test_slices_of_something_else_are_refused(
    checkpoint: Checkpoint, changes: dict, world_size: int, ratio: Any, text: str, tmp_path: Path
) -> None:
    ensure_slices(checkpoint, Partition.of(checkpoint.config, 2), tmp_path / "split")
    before = files_of(tmp_path / "split")
    seed = changes.pop("seed", 0)
    config = tiny_config(**changes)
    with Checkpoint(write_checkpoint(tmp_path / "other", config, seed=seed)) as other:
        partition = Partition.of(config, world_size, ratio)
        with pytest.raises(
            SliceError, match=text + r".*; --split_bin makes the slices again, another --save_dir"
        ):
            ensure_slices(other, partition, tmp_path / "split")
        assert files_of(tmp_path / "split") == before
        ensure_slices(other, partition, tmp_path / "split", force=True)
        whole_again(tmp_path / "split", world_size)


def test_a_slice_of_another_rank_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    partition = Partition.of(checkpoint.config, 2)
    ensure_slices(checkpoint, partition, tmp_path)
    (tmp_path / "node_0").rename(tmp_path / "spare")
    (tmp_path / "node_1").rename(tmp_path / "node_0")
    with pytest.raises(SliceError, match="node_0 was made for rank 1"):
        ensure_slices(checkpoint, partition, tmp_path)


def test_a_damaged_manifest_is_refused_until_forced(checkpoint: Checkpoint, tmp_path: Path) -> None:
    partition = Partition.of(checkpoint.config, 2)
    ensure_slices(checkpoint, partition, tmp_path)
    (tmp_path / "node_1" / "manifest.json").write_text("{")
    with pytest.raises(SliceError, match=r"node_1/manifest.json: .* damaged; --split_bin makes"):
        ensure_slices(checkpoint, partition, tmp_path)
    ensure_slices(checkpoint, partition, tmp_path, force=True)
    whole_again(tmp_path, 2)


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: os.truncate(path, 100)])
def test_a_slice_that_lost_a_file_is_made_again(
    checkpoint: Checkpoint, harm: Callable[[Path], None], tmp_path: Path
) -> None:
    partition = Partition.of(checkpoint.config, 2)
    ensure_slices(checkpoint, partition, tmp_path)
    kept = files_of(tmp_path / "node_0")
    harm(tmp_path / "node_1" / "layers.1.attn.safetensors")
    ensure_slices(checkpoint, partition, tmp_path)
    assert files_of(tmp_path / "node_0") == kept
    whole_again(tmp_path, 2)


@pytest.mark.parametrize("tied", [False, True])
def test_without_the_embedding_the_disk_holds_no_more_than_twice_the_checkpoint(
    tied: bool, tmp_path: Path
) -> None:
    with model(tmp_path, hidden_size=256, intermediate_size=704, tie_word_embeddings=tied) as checkpoint:
        partition = Partition.of(checkpoint.config, 2)
        manifests = ensure_slices(checkpoint, partition, tmp_path / "split", embedding=False)
        padding = sum(2 * 4096 for manifest in manifests for _ in manifest.files)
        assert sum(manifest.nbytes for manifest in manifests) <= checkpoint.nbytes + padding
        with SliceFolder(tmp_path / "split" / "node_0") as part:
            assert "model.embed_tokens.weight" not in part.tensors
        # Carried elsewhere, it needs the embedding after all.
        ensure_slices(checkpoint, partition, tmp_path / "split")
        with SliceFolder(tmp_path / "split" / "node_0") as part:
            assert "model.embed_tokens.weight" in part.tensors


def test_memory_is_bounded_and_each_byte_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_read = 0
    preadv = os.preadv

    def counted(fd: int, buffers: Any, offset: int) -> int:
        nonlocal n_read
        n_read += (n := preadv(fd, buffers, offset))
        return n

    with model(tmp_path / "m", hidden_size=512, intermediate_size=8192, vocab_size=9000) as checkpoint:
        assert checkpoint.nbytes > 64e6
        assert checkpoint.fingerprint
        monkeypatch.setattr(os, "preadv", counted)
        reports: list[tuple[int, int]] = []
        partition = Partition.of(checkpoint.config, 3)
        tracemalloc.start()
        try:
            ensure_slices(
                checkpoint, partition, tmp_path / "split", progress=lambda *report: reports.append(report)
            )
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 4e6
        assert n_read == checkpoint.nbytes
        done, totals = zip(*reports, strict=True)
        assert list(done) == sorted(done)
        assert set(totals) == {done[-1]}


class Killed(OSError):
    """From the n-th call on, nothing that the process asks of the disk happens any more."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    calls = [0]
    limit = [10**9]

    def mortal(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] > limit[0]:
                raise Killed
            return call(*args, **kwargs)

        return wrapper

    def arm(n: int) -> None:
        calls[0], limit[0] = 0, n

    for name in ("write", "replace", "unlink", "mkdir", "rmdir"):
        monkeypatch.setattr(os, name, mortal(getattr(os, name)))
    monkeypatch.setattr(os, "fsync", mortal(lambda fd: None))  # counted, and not waited for
    return arm


@as_stored_and_quantized
def test_killed_at_any_moment_the_next_start_goes_on(
    recipe: Recipe | None, kill_at: Callable[[int], None], tmp_path: Path
) -> None:
    with (
        model(tmp_path / "old", num_hidden_layers=1, vocab_size=40) as old,
        model(tmp_path / "new", recipe, num_hidden_layers=1) as new,
    ):
        undisturbed = ensure_slices(new, Partition.of(new.config, 2), tmp_path / "undisturbed")
        for n in itertools.count():
            kill_at(10**9)
            split = tmp_path / f"split{n}"
            if n % 2:  # over slices of something else
                ensure_slices(old, Partition.of(old.config, 3), split)
            kill_at(n)
            try:
                ensure_slices(new, Partition.of(new.config, 2), split, force=True)
                break
            except SliceError:
                pass
            kill_at(10**9)
            for folder in split.glob("node_*"):
                if (folder / "manifest.json").exists():
                    with SliceFolder(folder) as part:
                        part.verify()
                        is_old = part.config == old.config
                    if is_old:
                        (folder / "manifest.json").unlink()
            assert ensure_slices(new, Partition.of(new.config, 2), split) == undisturbed
            for rank in range(2):
                with SliceFolder(node_folder(split, rank)) as part:
                    part.verify()
        assert n > 30


def test_a_full_disk_says_what_is_needed_and_leaves_nothing(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(SliceError, match=r"the disk of .* is full: .* is free; make room or choose another"):
        ensure_slices(checkpoint, Partition.of(checkpoint.config, 2), tmp_path / "split")
    assert not files_of(tmp_path / "split")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "tiny"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize(
    ("vocab_size", "needed"),
    [(2000, "what is missing takes"), (50, "all slices take about")],  # seen at once; only while writing
)
@as_stored_and_quantized
def test_a_disk_that_is_too_small(
    recipe: Recipe | None, vocab_size: int, needed: str, tiny_disk: Path, tmp_path: Path
) -> None:
    with model(tmp_path / "m", recipe, vocab_size=vocab_size) as checkpoint:
        with pytest.raises(SliceError, match=rf"is full: {needed} 0\.\d\d MB, and 0\.0\d MB is free"):
            ensure_slices(checkpoint, Partition.of(checkpoint.config, 3), tiny_disk)
        assert not files_of(tiny_disk)


def test_a_place_that_cannot_be_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SliceError, match=r"cannot write .*file: File exists"):
        ensure_slices(checkpoint, Partition.of(checkpoint.config, 2), tmp_path / "file")


def test_a_damaged_slice_is_made_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    partition = Partition.of(checkpoint.config, 2)
    ensure_slices(checkpoint, partition, tmp_path)
    path = tmp_path / "node_0" / "layers.0.mlp.safetensors"
    right, found = path.read_bytes(), path.stat()
    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    ensure_slices(checkpoint, partition, tmp_path)
    assert path.read_bytes() == right


def test_verify_reads_what_is_known_to_be_whole(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition = Partition.of(checkpoint.config, 2)
    ensure_slices(checkpoint, partition, tmp_path)
    path = tmp_path / "node_1" / "layers.0.mlp.safetensors"
    right = path.read_bytes()
    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    # As if the disk had done it: the note has the state in which the file is now.
    VerifiedFiles(tmp_path / "node_1").add(
        {path.name: Manifest.read(tmp_path / "node_1").files[path.name].sha256}
    )
    ensure_slices(checkpoint, partition, tmp_path)
    assert path.read_bytes() != right
    ensure_slices(checkpoint, partition, tmp_path, verify=True)
    assert path.read_bytes() == right
