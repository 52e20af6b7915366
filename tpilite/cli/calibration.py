"""How much each column of a matrix counts: the mean square of what is multiplied with it in a text.

An error in a column of W costs as much as that column's inputs are large, so least squares of W x are least
squares of W with these weights, as far as the inputs are not correlated.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tpilite.arrays import Array
from tpilite.cli.terminal import progress_bar
from tpilite.collective import Solo
from tpilite.engine.config import MAX_ROWS, EngineConfig
from tpilite.engine.rank import Rank
from tpilite.errors import ConfigError
from tpilite.formats.model_files import ModelFiles
from tpilite.linear.matrix import Matrix
from tpilite.model.llama import Linear, LlamaWeights, Segment
from tpilite.model.ops import rms_norm
from tpilite.text.load import load_tokenizer
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.partition import LM_HEAD, layer_tensor

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def importance_in(files: ModelFiles, text: str, engine: EngineConfig) -> Mapping[str, Array]:
    """`importance_of` a model in its files, with a bar. Raises `ConfigError` where it has no tokenizer."""
    with Checkpoint(files) as checkpoint, progress_bar("reading the text of --calibrate", "token") as bar:
        tokenizer = load_tokenizer(files, checkpoint.config.vocab_size)
        if tokenizer is None:
            raise ConfigError(f"{files.path} has no tokenizer, which --calibrate needs")
        return importance_of(checkpoint, tokenizer.encode(text, bos=False), engine, bar)


def importance_of(
    checkpoint: Checkpoint,
    ids: Sequence[int],
    engine: EngineConfig,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Array]:
    """The mean square [n_cols] of each column's inputs, of every matrix by name, over the text of `ids`.

    The text is read in stretches of `MAX_ROWS` tokens, each with BOS before it where the model has one.
    Raises `ConfigError` where the engine's memory is too small for the model.
    """
    config = checkpoint.config
    begin = [] if config.bos_token_id is None else [config.bos_token_id]
    with Rank(config, checkpoint.tensors, 0, Solo(), engine) as rank:
        model, embed = rank.runner.model, rank.embed
        assert embed is not None
        seen = _Seen(model.linear, dict(_named(model.weights)))
        model.linear = seen
        n_rows = max(1, min(MAX_ROWS, model.max_length) - len(begin))
        for start in range(0, len(ids), n_rows):
            stretch = [*begin, *ids[start : start + n_rows]]
            cache = model.new_cache()
            rank.begin_pass(len(stretch), cache.bytes_for(len(stretch)), scores=False)
            hidden = model.forward(embed(stretch), [Segment(cache, len(stretch))])
            seen.note(rms_norm(hidden, model.weights.norm, config.rms_norm_eps), [LM_HEAD])
            if progress:
                progress(min(start + n_rows, len(ids)), len(ids))
        return seen.mean_squares()


def _named(weights: LlamaWeights) -> Iterator[tuple[int, str]]:
    """Which matrix, by its `id`, is called how."""
    for i, layer in enumerate(weights.layers):
        for block, names in (("self_attn", _ATTENTION), ("mlp", _MLP)):
            yield from ((id(getattr(layer, n)), layer_tensor(i, f"{block}.{n}.weight")) for n in names)


class _Seen:
    """What multiplies, and the sums of the squares of what was multiplied with each matrix."""

    def __init__(self, linear: Linear, names: dict[int, str]) -> None:
        self._linear, self._names = linear, names
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._n_rows: dict[str, int] = {}
        self.share = linear.share

    def __call__(self, x: Array, *matrices: Matrix) -> list[Array]:
        self.note(x, [self._names[id(matrix)] for matrix in matrices])
        return self._linear(x, *matrices)

    def note(self, x: Array, names: Iterable[str]) -> None:  # [T, n_cols]
        """Adds what is multiplied with the matrices of these names."""
        squares = np.einsum("tc,tc->c", x, x, dtype=np.float64)
        for name in names:
            self._sums[name] = self._sums.get(name, 0) + squares
            self._n_rows[name] = self._n_rows.get(name, 0) + len(x)

    def mean_squares(self) -> dict[str, Array]:
        return {name: (total / self._n_rows[name]).astype(np.float32) for name, total in self._sums.items()}
