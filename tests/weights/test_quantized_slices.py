"""Slices of a model whose matrices are made into blocks on the way."""

import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from checkpoints import hf_config, random_tensors, tiny_config, write_checkpoint
from slice_logits import logits_of_slices

from tpilite.dtypes import BLOCK_SIZES
from tpilite.errors import CheckpointError, SliceError
from tpilite.formats.stored import StoredTensor
from tpilite.linear.block_types import BLOCK_TYPES
from tpilite.linear.matrix import Blocks, as_float32
from tpilite.quantize import recipe
from tpilite.quantize.quantizers import quantize_rows
from tpilite.quantize.recipe import KINDS, Quantized, Recipe
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.partition import EMBEDDING, LM_HEAD
from tpilite.weights.slicer import ensure_slices
from tpilite.weights.slices import Manifest, SliceFolder, node_folder

# Rows of 256 and, of down_proj, of 320, which is no multiple of 256; a head's columns end inside a block.
CONFIG = tiny_config(
    hidden_size=256, intermediate_size=320, num_attention_heads=8, num_key_value_heads=4, head_dim=32
)
IDS = list(np.random.default_rng(7).integers(0, 50, 12))
BY_COLUMNS = ("o_proj.weight", "down_proj.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), CONFIG)


@pytest.fixture
def checkpoint(folder: Path) -> Iterator[Checkpoint]:
    with Checkpoint(folder, recipe=Recipe("q4_k")) as opened:
        yield opened


def values(tensor: StoredTensor) -> np.ndarray:
    """The weights that are the rank's own."""
    array = tensor.array()
    if tensor.dtype not in BLOCK_SIZES:
        return as_float32(array)
    found = as_float32(Blocks(BLOCK_TYPES[tensor.dtype], array, tensor.shape[1]))
    return found if tensor.columns is None else found[:, tensor.columns.start : tensor.columns.stop]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_hold_the_blocks_of_the_whole(world_size: int, checkpoint: Checkpoint, tmp_path: Path) -> None:
    partition = checkpoint.partition(world_size)
    ensure_slices(checkpoint, partition, tmp_path)
    held: dict[str, list[np.ndarray]] = {}
    for rank in range(world_size):
        with SliceFolder(node_folder(tmp_path, rank)) as part:
            part.verify()
            for name, tensor in part.tensors.items():
                held.setdefault(name, []).append(values(tensor))
    with Checkpoint(checkpoint.path) as original:
        for name, tensor in original.tensors.items():
            stored = as_float32(tensor.array())
            if stored.ndim == 1:
                np.testing.assert_array_equal(held[name][0], stored)
                continue
            kind = BLOCK_TYPES[checkpoint.tensors[name].dtype]
            rows = quantize_rows(name, stored, kind)
            found = np.concatenate(held[name], axis=1 if name.endswith(BY_COLUMNS) else 0)
            np.testing.assert_array_equal(found, as_float32(Blocks(kind, rows, stored.shape[1])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_tied", [False, True])
def test_scores_are_those_of_the_weights_values(kind: str, is_tied: bool, tmp_path: Path) -> None:
    config = replace(CONFIG, tie_word_embeddings=is_tied)
    write_checkpoint(tmp_path / "model", config)
    with Checkpoint(tmp_path / "model", recipe=Recipe(kind)) as checkpoint:
        for world_size in (1, 2, 3):
            folder = tmp_path / str(world_size)
            ensure_slices(checkpoint, checkpoint.partition(world_size), folder)
    with SliceFolder(node_folder(tmp_path / "1", 0)) as whole:
        weights = {name: values(tensor) for name, tensor in whole.tensors.items()}
    expected = reference.logits(hf_config(config), weights, np.array(IDS))
    for world_size in (1, 2, 3):
        found = logits_of_slices(tmp_path / str(world_size), world_size, IDS)
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max(), world_size


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "usable_cores", lambda: 2)
    config = tiny_config(hidden_size=512, intermediate_size=4096, vocab_size=9000)
    write_checkpoint(tmp_path / "model", config)
    with Checkpoint(tmp_path / "model", recipe=Recipe("q4_0")) as checkpoint:
        assert checkpoint.fingerprint
        tracemalloc.start()
        try:
            ensure_slices(checkpoint, checkpoint.partition(1), tmp_path / "split")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 12e6


def test_the_manifest_says_what_became_of_what(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with Checkpoint(checkpoint.path) as original:
        origin = original.fingerprint
    (manifest,) = ensure_slices(checkpoint, checkpoint.partition(1), tmp_path)
    assert manifest == Manifest.read(node_folder(tmp_path, 0))
    assert (manifest.version, manifest.origin) == (2, origin)
    assert manifest.fingerprint not in ("", origin)
    types = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), "Q4_K")
    types |= {"embed_tokens": "Q5_K", "down_proj": "Q4_1", "lm_head": "Q5_K"}
    assert manifest.quantized == Quantized(origin, "q4_k", "", types)


def test_what_was_made_is_kept_and_other_bits_are_a_misfit(checkpoint: Checkpoint, tmp_path: Path) -> None:
    partition = checkpoint.partition(1)
    (manifest,) = ensure_slices(checkpoint, partition, tmp_path)
    before = (node_folder(tmp_path, 0) / "manifest.json").stat().st_mtime_ns
    ensure_slices(checkpoint, partition, tmp_path)
    assert (node_folder(tmp_path, 0) / "manifest.json").stat().st_mtime_ns == before
    with Checkpoint(checkpoint.path) as original, Checkpoint(checkpoint.path, recipe=Recipe("q8_0")) as other:
        assert manifest.misfit(other, partition) == (
            "made with --quantize q4_k, and this start is with --quantize q8_0"
        )
        with pytest.raises(SliceError, match="made with --quantize q4_k, and this start is without"):
            ensure_slices(original, partition, tmp_path)


def test_tied_tables_are_made_alike_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_made = 0

    def counted(name: str, rows: np.ndarray, *rest: Any) -> np.ndarray:
        nonlocal n_made
        n_made += len(rows) if name in (EMBEDDING, LM_HEAD) else 0
        return quantize_rows(name, rows, *rest)

    monkeypatch.setattr(recipe, "quantize_rows", counted)
    config = tiny_config(hidden_size=256, head_dim=32, tie_word_embeddings=True)
    write_checkpoint(tmp_path / "model", config)
    with Checkpoint(tmp_path / "model", recipe=Recipe("q4_k")) as checkpoint:
        ensure_slices(checkpoint, checkpoint.partition(2), tmp_path / "split")
        embedding = checkpoint.tensors[EMBEDDING]
        assert checkpoint.nbytes < 2 * embedding.nbytes + sum(
            tensor.nbytes for name, tensor in checkpoint.tensors.items() if "layers" in name
        )
    parts = [SliceFolder(node_folder(tmp_path / "split", rank)) for rank in range(2)]
    heads = [values(part.tensors["lm_head.weight"]) for part in parts]
    np.testing.assert_array_equal(np.concatenate(heads), values(parts[0].tensors[EMBEDDING]))
    assert n_made == config.vocab_size
    for part in parts:
        part.close()


def test_weights_that_cannot_be_quantized_leave_no_slice(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG, "F32")
    tensors["model.layers.1.mlp.down_proj.weight"][7, 300] = np.nan
    write_checkpoint(tmp_path / "model", CONFIG, "F32", tensors=tensors)
    with (
        Checkpoint(tmp_path / "model", recipe=Recipe("q5_k")) as checkpoint,
        pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds weights that"),
    ):
        ensure_slices(checkpoint, checkpoint.partition(1), tmp_path / "split")
    assert list((tmp_path / "split" / "node_0").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "q3_k"}, "found the kind 'q3_k'; expected one of q8_0"),
        ({"kind": ["q8_0"]}, "found the kind"),
        ({"of": "12"}, "expected hashes of 64 digits"),
        ({"calibration": 7}, "expected hashes of 64 digits"),
        ({"types": []}, "expected an object of at most 32 types"),
        ({"types": {f"a{i}": "F32" for i in range(33)}}, "expected an object of at most 32 types"),
        ({"types": {"lm_head": "Q9_9"}}, "found 'Q9_9' as the type of 'lm_head'"),
        ({"types": {"lm_head": {}}}, "found {} as the type"),
        ({"types": {"../up": "F32"}}, "as the type of '../up'"),
        ({"more": 1}, "expected the keys of, kind, calibration, types"),
    ],
    ids=str,
)
def test_a_manifest_that_says_it_wrongly(
    change: dict[str, object], message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (manifest,) = ensure_slices(checkpoint, checkpoint.partition(1), tmp_path)
    value = json.loads(manifest.to_json())
    value["quantized"] |= change
    with pytest.raises(SliceError, match="the manifest's quantized is wrong: ") as raised:
        Manifest.from_json(json.dumps(value).encode())
    assert message in str(raised.value)


def test_version_1_has_no_such_thing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (manifest,) = ensure_slices(checkpoint, checkpoint.partition(1), tmp_path)
    value = json.loads(manifest.to_json()) | {"version": 1}
    with pytest.raises(SliceError, match="the manifest must have exactly the keys"):
        Manifest.from_json(json.dumps(value).encode())
