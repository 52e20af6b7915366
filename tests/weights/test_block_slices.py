"""Slices of a model in block types: blocks as they are, cut along the columns where they end."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from checkpoints import hf_config
from gguf_files import MIXED, WIDE, gguf_config, in_hugging_faces_order, write_gguf_model
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import logits as reference_logits
from slice_logits import logits_of_slices

from tpilite import LLM
from tpilite.dtypes import BLOCK_SIZES, block_size
from tpilite.errors import SliceError
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.partition import Partition, held, whole_blocks
from tpilite.weights.slicer import ensure_slices
from tpilite.weights.slices import Manifest, SliceFolder, node_folder

IDS = list(np.random.default_rng(7).integers(0, 50, 12))


# A head of 16 columns is half a block of 32, and no number of ranks has whole blocks of 256 of 512.
CASES = [
    ("Q4_1", {}, (1,)),
    ("Q4_1", {}, (1, 1)),
    ("Q8_0", {"intermediate_size": 160}, (2, 1, 1)),
    ("Q5_0", {"num_key_value_heads": 4}, (1,) * 4),
    ("Q4_0", {"num_key_value_heads": 1, "intermediate_size": 32}, (1,) * 5),
    ("Q4_K", WIDE, (1, 1)),
    ("Q6_K", WIDE, (1, 1, 1)),
    (MIXED, WIDE | {"tie_word_embeddings": False}, (3, 2, 1)),
    ("Q5_K", WIDE, (1,) * 6),
    ("Q4_K", WIDE | {"num_key_value_heads": 8}, (1,) * 7),
    ("IQ4_XS", WIDE | {"attention_bias": True, "mlp_bias": True}, (1,) * 8),
]


@pytest.mark.parametrize(("dtypes", "changes", "ratio"), CASES, ids=str)
def test_slices_of_blocks_give_the_logits_of_the_whole(dtypes, changes, ratio, tmp_path):
    config = gguf_config(**changes)
    values = write_gguf_model(tmp_path / "x.gguf", config, dtypes)
    with Checkpoint(tmp_path / "x.gguf") as checkpoint:
        manifests = ensure_slices(checkpoint, checkpoint.partition(len(ratio), ratio), tmp_path / "split")
        assert {manifest.version for manifest in manifests} == {2}
        for manifest in manifests:
            assert Manifest.from_json(manifest.to_json()) == manifest
        rows = checkpoint.tensors["model.layers.1.mlp.up_proj.weight"].array()
        shares = [
            part.tensors["model.layers.1.mlp.up_proj.weight"].array()
            for part in (SliceFolder(node_folder(tmp_path / "split", rank)) for rank in range(len(ratio)))
        ]
        np.testing.assert_array_equal(np.concatenate(shares), rows)
    expected = reference_logits(hf_config(config), in_hugging_faces_order(config, values), np.array(IDS))
    found = logits_of_slices(tmp_path / "split", len(ratio), IDS)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@st.composite
def models(draw):
    """A configuration, the types of its matrices, and each rank's share."""
    dtypes = draw(st.sampled_from([*BLOCK_SIZES, MIXED]))
    is_wide = dtypes == MIXED or block_size(dtypes).n_weights == 256
    sizes = {
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "intermediate_size": draw(st.integers(1, 3 if is_wide else 9)) * (256 if is_wide else 32),
        "num_hidden_layers": 1,
        "rope_interleaved": draw(st.booleans()),
    }
    config = gguf_config(**(WIDE | sizes if is_wide else sizes))
    return config, dtypes, draw(st.lists(st.sampled_from([1, 2, 3, 5.5]), min_size=1, max_size=8))


@given(model=models())
@settings(deadline=None, max_examples=30, derandomize=True)
def test_any_type_on_any_number_of_ranks_gives_the_logits_of_one(model):
    config, dtypes, ratio = model
    with tempfile.TemporaryDirectory() as folder:
        path, split = Path(folder, "x.gguf"), Path(folder, "split")
        write_gguf_model(path, config, dtypes)
        with Checkpoint(path) as checkpoint:
            ensure_slices(checkpoint, checkpoint.partition(len(ratio), ratio), split)
        with LLM(path, threads=1, memory_budget="unlimited") as llm:
            one = llm.logits(IDS)
        found = logits_of_slices(split, len(ratio), IDS)
    assert np.abs(found - one).max() <= 1e-5 * np.abs(one).max()


def test_slices_of_numbers_stay_version_1_where_the_model_is_a_llama(tmp_path):
    for interleaved, version in ((True, 2), (False, 1)):
        path = tmp_path / f"{interleaved}.gguf"
        write_gguf_model(path, gguf_config(), "BF16")
        with Checkpoint(path) as checkpoint:
            if not interleaved:
                object.__setattr__(checkpoint.config, "rope_interleaved", False)
            (manifest,) = ensure_slices(checkpoint, checkpoint.partition(1), tmp_path / str(version))
        assert manifest.version == json.loads(manifest.to_json())["version"] == version


def test_a_slice_has_its_type_and_width_in_its_metadata(tmp_path):
    write_gguf_model(tmp_path / "x.gguf", gguf_config(), "Q4_1")
    with Checkpoint(tmp_path / "x.gguf") as checkpoint:
        ensure_slices(checkpoint, checkpoint.partition(2), tmp_path / "split")
    path = node_folder(tmp_path / "split", 1) / "layers.0.mlp.safetensors"
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    name = "model.layers.0.mlp.down_proj.weight"
    width = int(header["__metadata__"][name].removeprefix("Q4_1 "))
    assert header[name]["dtype"] == "U8"
    assert header[name]["shape"] == [64, width // 32 * 20]
    path.write_bytes(raw.replace(f"Q4_1 {width}".encode(), f"Q5_1 {width}".encode(), 1))
    with pytest.raises(SliceError, match=r"which does not make rows of Q5_1"):
        SliceFolder(path.parent)


@given(start=st.integers(0, 600), n=st.integers(0, 600), size=st.sampled_from([1, 32, 256]))
def test_whole_blocks_are_those_that_hold_any_column(start, n, size):
    part = range(start, start + n)
    found = whole_blocks(part, size)
    assert set(found) == {block * size + i for block in {c // size for c in part} for i in range(size)}
    assert held((range(3), part), size) == (range(3), found)


@given(
    world_size=st.integers(1, 8),
    n_blocks=st.integers(1, 80),
    block=st.sampled_from([32, 256]),
    n_kv_heads=st.integers(1, 8),
)
@settings(deadline=None)
def test_ffn_columns_are_cut_where_blocks_end_if_that_leaves_less_to_the_slowest_rank(
    world_size, n_blocks, block, n_kv_heads
):
    config = gguf_config(
        intermediate_size=n_blocks * block, num_key_value_heads=n_kv_heads, num_attention_heads=n_kv_heads
    )

    def most(partition: Partition) -> int:
        stored = [0] * world_size
        for rank in range(world_size):
            for name, shard in partition.shards(config, rank).items():
                if "layers.0" in name and len(shard) == 2:
                    rows, columns = held(shard, block if "down_proj" in name else 1)
                    stored[rank] += len(rows) * len(columns)
        return max(stored)

    partition = Partition.of(config, world_size, ffn_block=block)
    partition.check(config)
    anywhere = Partition.of(config, world_size)
    assert most(partition) <= most(anywhere)
    if partition != anywhere:
        assert all(columns % block == 0 for columns in partition.ffn_columns)


def test_known_cuts_between_blocks():
    # Llama 3 8B in Q4_K_M, 56 blocks of 256; on three ranks only 19 whole blocks would be more than a third.
    config = gguf_config(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128
    )
    assert Partition.of(config, 4, ffn_block=256).ffn_columns == (3584,) * 4
    assert block_size("Q4_K").n_weights == 256
