"""A model's matrices in blocks, made as their rows are read."""

import numpy as np
import pytest
from checkpoints import store, write_tensor_file

from tpilite.dtypes import DTYPES
from tpilite.errors import CheckpointError, ConfigError
from tpilite.formats.safetensors import TensorFile
from tpilite.linear.block_types import BLOCK_TYPES
from tpilite.linear.matrix import as_float32
from tpilite.quantize.quantizers import quantize_rows
from tpilite.quantize.recipe import KINDS, Recipe, type_for

TABLES = {"lm_head.weight", "embed.weight"}


def values(n_rows, n_cols, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal((n_rows, n_cols))).astype(np.float32)


@pytest.fixture
def stored(tmp_path):
    """A function that stores arrays by name and gives their tensors."""
    files = []

    def make(dtype, **arrays):
        path = tmp_path / f"{len(files)}.safetensors"
        entries = [(name.replace("__", "."), dtype, a.shape, [store(a, dtype)]) for name, a in arrays.items()]
        write_tensor_file(path, entries)
        files.append(TensorFile(path))
        return dict(files[-1].tensors)

    yield make
    for file in files:
        file.close()


def blocks_of(tensor):
    blocks = np.empty(tensor.stored_shape, tensor.stored_dtype)
    tensor.read_into(blocks)
    return blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_the_stored_rows(stored, kind, dtype):
    tensors = stored(dtype, up__weight=values(700, 512), norm__weight=values(1, 512)[0])
    made = Recipe(kind).applied(tensors, TABLES)
    assert made["norm.weight"] is tensors["norm.weight"]
    block_type = BLOCK_TYPES[KINDS[kind][0]]
    assert (made["up.weight"].dtype, made["up.weight"].shape) == (block_type.name, (700, 512))
    expected = quantize_rows("up", as_float32(tensors["up.weight"].array()), block_type)
    np.testing.assert_array_equal(blocks_of(made["up.weight"]), expected)
    np.testing.assert_array_equal(blocks_of(made["up.weight"].rows(13, 650).rows(1, 600)), expected[14:613])
    assert made["up.weight"].nbytes == expected.nbytes


def test_no_rows_are_no_blocks(stored):
    made = Recipe("q4_k").applied(stored("BF16", up__weight=values(3, 256)), TABLES)
    assert blocks_of(made["up.weight"].rows(2, 2)).shape == (0, 144)


def test_importance_is_that_of_the_matrix(stored):
    tensors = stored("F32", up__weight=values(4, 256), gate__weight=values(4, 256))
    importance = np.random.default_rng(1).chisquare(1, 256).astype(np.float32)
    made = Recipe("q4_k", "", lambda: {"gate.weight": importance}).applied(tensors, TABLES)
    up, gate = (blocks_of(made[name]) for name in ("up.weight", "gate.weight"))
    rows, kind = values(4, 256), BLOCK_TYPES["Q4_K"]
    np.testing.assert_array_equal(up, quantize_rows("up", rows, kind))
    np.testing.assert_array_equal(gate, quantize_rows("gate", rows, kind, importance))
    assert not np.array_equal(up, gate)


def test_embedding_and_lm_head_are_a_step_finer_and_made_once_where_they_are_one(stored):
    tensors = stored("BF16", embed__weight=values(8, 256), up__weight=values(8, 256))
    tensors["lm_head.weight"] = tensors["embed.weight"]
    made = Recipe("q4_k").applied(tensors, TABLES)
    assert {name: tensor.dtype for name, tensor in made.items()} == {
        "embed.weight": "Q5_K",
        "up.weight": "Q4_K",
        "lm_head.weight": "Q5_K",
    }
    assert made["lm_head.weight"] is made["embed.weight"]


@pytest.mark.parametrize(
    ("kind", "n_columns", "is_table", "expected"),
    [
        ("q8_0", 96, False, "Q8_0"),
        ("q8_0", 96, True, "Q8_0"),
        ("q6_k", 512, False, "Q6_K"),
        ("q6_k", 96, False, "Q8_0"),
        ("q6_k", 512, True, "Q8_0"),
        ("q5_k", 96, False, "Q5_1"),
        ("q5_k", 512, True, "Q6_K"),
        ("q4_k", 96, False, "Q4_1"),
        ("q4_k", 96, True, "Q5_1"),
        ("q4_0", 512, False, "Q4_0"),
        ("q4_0", 96, False, "Q4_0"),
        ("q4_0", 96, True, "Q5_1"),
        ("q4_k", 172, False, None),
        ("q8_0", 172, True, None),
    ],
)
def test_rows_that_are_no_whole_blocks_get_narrower_ones_or_stay(kind, n_columns, is_table, expected):
    assert type_for(kind, n_columns, is_table) == expected


def test_a_matrix_of_other_rows_stays_as_it_is(stored):
    tensors = stored("F16", down__weight=values(4, 172))
    assert Recipe("q4_k").applied(tensors, TABLES) == tensors


def test_what_is_made_has_an_identity_of_its_own():
    recipes = [Recipe("q4_k"), Recipe("q8_0"), Recipe("q4_k", "ab" * 32)]
    found = [recipe.identity(of) for recipe in recipes for of in ("ab", "cd")]
    assert len(set(found)) == 6
    assert Recipe("q4_k", "ab" * 32, lambda: {"x": np.ones(4)}).identity("ab") == found[4]


def test_blocks_are_not_quantized_again(stored):
    made = Recipe("q4_k").applied(stored("F16", up__weight=values(4, 256)), TABLES)
    with pytest.raises(ConfigError, match=r"up\.weight is stored as Q4_K; --quantize needs a model in F32"):
        Recipe("q8_0").applied(made, TABLES)


def test_an_unknown_kind():
    with pytest.raises(ConfigError, match=r"cannot quantize to 'q3_k': expected one of q8_0, .*q4_0"):
        Recipe("q3_k")


def test_weights_that_are_not_finite_are_refused_by_name(stored):
    rows = values(900, 512)
    rows[877, 3] = np.inf
    made = Recipe("q6_k").applied(stored("F32", up__weight=rows), TABLES)
    with pytest.raises(CheckpointError, match=r"up\.weight holds weights that are not finite"):
        blocks_of(made["up.weight"])
