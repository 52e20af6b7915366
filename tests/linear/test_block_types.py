"""GGML's block types against the values of the `gguf` package, noted and live."""

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tpilite.linear.block_types import BLOCK_TYPES
from tpilite.linear.matrix import Blocks, as_float32

GOLDEN = np.load(Path(__file__).parents[1] / "fixtures" / "block_types.npz")

of_each_type = pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=BLOCK_TYPES)


def assert_same_bits(found, expected):
    """But for NaN, which are all the same."""
    assert found.dtype == np.float32
    assert_array_equal(np.isnan(found), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert_array_equal(found[numbers].view(np.uint32), expected[numbers].view(np.uint32))


def test_the_fixture_has_every_type():
    assert set(GOLDEN) == {name + end for name in BLOCK_TYPES for end in ("", ".values")}


@of_each_type
def test_values_are_those_of_gguf(kind):
    blocks, expected = GOLDEN[kind.name], GOLDEN[f"{kind.name}.values"]
    assert blocks.shape[1] == kind.n_bytes
    assert np.isnan(expected).any()
    assert_same_bits(kind.dequantize(blocks), expected)


@of_each_type
def test_values_are_those_of_gguf_on_many_random_blocks(kind):
    gguf = pytest.importorskip("gguf")
    blocks = np.random.default_rng(0).integers(0, 256, (3000, kind.n_bytes), np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind.name])
    assert_same_bits(kind.dequantize(blocks), expected)


@of_each_type
def test_blocks_may_begin_at_any_byte_of_a_read_only_file(kind):
    blocks, expected = GOLDEN[kind.name], GOLDEN[f"{kind.name}.values"]
    file = bytes(3) + blocks.tobytes()
    mapped = np.frombuffer(file, np.uint8, offset=3).reshape(blocks.shape)
    assert_same_bits(kind.dequantize(mapped), expected)


@of_each_type
def test_rows_of_blocks(kind):
    blocks = GOLDEN[kind.name][:6]
    rows = Blocks(kind, blocks.reshape(3, -1), 2 * kind.n_weights)
    assert rows.shape == (3, 2 * kind.n_weights)
    assert rows.nbytes == blocks.nbytes
    expected = GOLDEN[f"{kind.name}.values"][:6].reshape(rows.shape)
    assert_same_bits(as_float32(rows), expected)
    assert_same_bits(as_float32(rows[1:]), expected[1:])
    assert_same_bits(as_float32(rows[1:1]), expected[1:1])
    assert_same_bits(as_float32(rows[np.array([2, 0, 2])]), expected[[2, 0, 2]])
