"""Stored tensors put together as the model's weights, whole or one rank's slice: by name, as they lie.

How a matrix comes into memory is not decided here: `matrix_of` turns a stored tensor and its bias into a
`Matrix`, mapped (`mapped`) or paged (the pager's).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from tpilite.arrays import Array
from tpilite.formats.stored import StoredTensor
from tpilite.linear.block_types import BLOCK_TYPES
from tpilite.linear.matrix import Blocks, InMemory, Matrix, Part, Stored, as_float32
from tpilite.model.llama import LayerWeights, LlamaWeights
from tpilite.weights.partition import FINAL_NORM, LM_HEAD, layer_tensor

MatrixOf = Callable[[StoredTensor, Array | None], Matrix]


def as_weights(tensor: StoredTensor, stored: Stored) -> Stored | Blocks:
    """What a tensor stores, of `stored_shape`, as `linear` takes it."""
    block_type = BLOCK_TYPES.get(tensor.dtype)
    return stored if block_type is None else Blocks(block_type, stored, tensor.shape[1])


def matrix_in_parts(tensor: StoredTensor, parts: Iterable[Part], bias: Array | None) -> Matrix:
    """The tensor as a matrix that comes in these parts."""
    n_rows, n_cols = tensor.shape
    if tensor.columns is None:
        return Matrix(n_rows, n_cols, tuple(parts), bias)
    columns = tensor.columns
    return Matrix(n_rows, n_cols, tuple(parts), bias, first_col=columns.start, n_inputs=len(columns))


def mapped(tensor: StoredTensor, bias: Array | None) -> Matrix:
    """The tensor as a memory map that the kernel keeps or drops as it sees fit."""
    return matrix_in_parts(tensor, [InMemory(as_weights(tensor, tensor.array()))], bias)


def assemble(tensors: Mapping[str, StoredTensor], n_layers: int, matrix_of: MatrixOf) -> LlamaWeights:
    """The weights of `n_layers` layers. Norms and biases are read at once: together they are small."""

    def vector(name: str) -> Array:
        # Not through the map: of a file in the page cache, a touch maps half a megabyte around a norm.
        tensor = tensors[name]
        values = np.empty(tensor.stored_shape, tensor.stored_dtype)
        tensor.read_into(values)
        return as_float32(values)

    def vector_if_any(name: str) -> Array | None:
        return vector(name) if name in tensors else None

    def matrix(name: str) -> Matrix:
        return matrix_of(tensors[f"{name}.weight"], vector_if_any(f"{name}.bias"))

    def layer(i: int) -> LayerWeights:
        return LayerWeights(
            input_layernorm=vector(layer_tensor(i, "input_layernorm.weight")),
            q_proj=matrix(layer_tensor(i, "self_attn.q_proj")),
            k_proj=matrix(layer_tensor(i, "self_attn.k_proj")),
            v_proj=matrix(layer_tensor(i, "self_attn.v_proj")),
            o_proj=matrix(layer_tensor(i, "self_attn.o_proj")),
            post_attention_layernorm=vector(layer_tensor(i, "post_attention_layernorm.weight")),
            gate_proj=matrix(layer_tensor(i, "mlp.gate_proj")),
            up_proj=matrix(layer_tensor(i, "mlp.up_proj")),
            down_proj=matrix(layer_tensor(i, "mlp.down_proj")),
            q_norm=vector_if_any(layer_tensor(i, "self_attn.q_norm.weight")),
            k_norm=vector_if_any(layer_tensor(i, "self_attn.k_norm.weight")),
        )

    layers = [layer(i) for i in range(n_layers)]
    return LlamaWeights(layers, vector(FINAL_NORM), matrix_of(tensors[LM_HEAD], None))


class Embedding:
    """Rows of the embedding table by token id, read from the file one row each: the table is no block."""

    def __init__(self, table: StoredTensor) -> None:
        self._table = table

    def __call__(self, ids: Sequence[int]) -> Array:  # ids -> [T, D]
        rows = np.empty((len(ids), *self._table.stored_shape[1:]), self._table.stored_dtype)
        for row, token_id in zip(rows, ids, strict=True):
            self._table.rows(token_id, token_id + 1).read_into(row)
        return as_float32(as_weights(self._table, rows))
