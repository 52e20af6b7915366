"""What bits of a model's scores do not depend on: docs/design.md says what is promised."""

import numpy as np
import pytest
from checkpoints import tiny_config, write_checkpoint
from compiled_code import by_both, needs_products, new_linear

from tpilite.collective import Solo
from tpilite.linear.calls import blas_repeats
from tpilite.model import kept as kept_module
from tpilite.model import llama as model_module
from tpilite.model.llama import Llama, Segment
from tpilite.weights.assemble import Embedding
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.pager import Pager
from tpilite.weights.partition import EMBEDDING

# Sizes that no kernel's groups of rows divide, and matrices of several parts.
_CONFIG = tiny_config(
    hidden_size=512, intermediate_size=1100, head_dim=64, vocab_size=1003, max_position_embeddings=256
)
_PASSES = (70, 50, 4, 1, 1)  # rows: a prompt in chunks, then a row at a time


@pytest.fixture(scope="module", params=["BF16", "F16", "F32"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    with Checkpoint(write_checkpoint(folder, _CONFIG, request.param)) as opened:
        yield opened


def scores(checkpoint, maker, n_threads, window, kv_dtype):
    """The bits of all scores of a text read in `_PASSES`."""
    embed, found = Embedding(checkpoint.tensors[EMBEDDING]), []
    ids = np.random.default_rng(0).integers(0, _CONFIG.vocab_size, sum(_PASSES))
    with (
        new_linear(n_threads, maker) as linear,
        Pager(checkpoint.tensors, _CONFIG, window=window, part_bytes=1 << 18) as pager,
    ):
        pager.start()
        model = Llama(_CONFIG, pager.weights, Solo(), linear, kv_dtype)
        cache = model.new_cache()
        for n in _PASSES:
            pager.begin_pass(n)
            rows, ids = ids[:n], ids[n:]
            found.append(model.logits(model.forward(embed(rows), [Segment(cache, n)])).tobytes())
    return found


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("maker", by_both("bits", "compiled", needs_products))
def test_threads_and_paging_change_no_bit(checkpoint, maker, kv_dtype, monkeypatch):
    if not blas_repeats():
        pytest.skip("this BLAS does not repeat its own bits")
    monkeypatch.setattr(model_module, "_SHARED_FROM", 0)  # attention, too, is shared out to the threads
    monkeypatch.setattr(model_module, "_SCORE_BYTES", 1 << 17)
    monkeypatch.setattr(kept_module, "_WIDENED_BYTES", 1 << 15)
    expected = scores(checkpoint, maker, 1, None, kv_dtype)
    for n_threads, window in ((2, None), (3, 2), (1, 2), (4, 4)):
        assert scores(checkpoint, maker, n_threads, window, kv_dtype) == expected
