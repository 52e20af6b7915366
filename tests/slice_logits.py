"""The scores of a model's slices, each rank on its own alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ranks import run_ranks

from tpilite.collective import Collective
from tpilite.linear.linear import Linear
from tpilite.model.llama import Llama, Segment
from tpilite.weights.assemble import Embedding, assemble, mapped
from tpilite.weights.partition import EMBEDDING
from tpilite.weights.slices import SliceFolder, node_folder


def logits_of_slices(folder: Path, world_size: int, ids: Sequence[int]) -> np.ndarray:
    """The scores [T, V] of all ranks together, each a thread with nothing but its slice in `folder`."""

    def work(collective: Collective) -> np.ndarray:
        with SliceFolder(node_folder(folder, collective.rank)) as part, Linear(1) as linear:
            part.verify()
            weights = assemble(part.tensors, part.config.num_hidden_layers, mapped)
            llama = Llama(part.config, weights, collective, linear)
            with SliceFolder(node_folder(folder, 0)) as first:
                rows = Embedding(first.tensors[EMBEDDING])(ids)
            return llama.logits(llama.forward(rows, [Segment(llama.new_cache(), len(ids))]))

    return np.concatenate(run_ranks(world_size, work), axis=1)
