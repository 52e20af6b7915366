"""Sister families as they are used: from a folder, paged, in slices; and how long their texts get."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import tiny_config, write_checkpoint
from ranks import run_ranks
from tiny_model import FAMILIES, assert_close, write_golden

from tpilite.collective import Solo
from tpilite.config.llama import YarnScaling
from tpilite.engine.config import EngineConfig
from tpilite.engine.engine import Engine
from tpilite.engine.rank import Rank
from tpilite.linear.linear import Linear
from tpilite.model.llama import Llama, Segment
from tpilite.weights.assemble import Embedding
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.pager import Pager
from tpilite.weights.partition import EMBEDDING, Partition
from tpilite.weights.slicer import ensure_slices
from tpilite.weights.slices import SliceFolder, node_folder


@pytest.fixture(scope="module", params=FAMILIES)
def golden(request, tmp_path_factory):
    """A family's model folder, and what transformers computes with it."""
    return write_golden(tmp_path_factory.mktemp(request.param), request.param)


def _paged_logits(tensors, config, embed, ids, collective):
    """A prompt in chunks, then a token a pass, two blocks of weights in memory at a time."""
    hidden, x = [], embed(ids)
    with Linear(1) as linear, Pager(tensors, config, window=2) as pager:
        pager.start()
        llama = Llama(config, pager.weights, collective, linear)
        cache = llama.new_cache()
        for n in (23, 23, 14, *[1] * 10):
            pager.begin_pass(n)
            rows, x = x[:n], x[n:]
            hidden.append(llama.logits(llama.forward(rows, [Segment(cache, n)])))
    return np.concatenate(hidden)


def test_a_folder_is_read_and_paged(golden):
    folder, found = golden
    with Checkpoint(folder) as checkpoint:
        embed = Embedding(checkpoint.tensors[EMBEDDING])
        logits = _paged_logits(checkpoint.tensors, checkpoint.config, embed, found["ids"], Solo())
    assert_close(logits[found["rows"]], found["logits"], 1e-4)


def test_slices_are_cut_read_and_paged(golden, tmp_path):
    folder, found = golden
    with Checkpoint(folder) as checkpoint:
        partition = Partition.of(checkpoint.config, 2)
        ensure_slices(checkpoint, partition, tmp_path)
        embed = Embedding(checkpoint.tensors[EMBEDDING])

        def work(collective):
            with SliceFolder(node_folder(tmp_path, collective.rank)) as part:
                assert part.config == checkpoint.config
                return _paged_logits(part.tensors, part.config, embed, found["ids"], collective)

        logits = np.concatenate(run_ranks(2, work), axis=1)
    assert_close(logits[found["rows"]], found["logits"], 1e-4)


@pytest.mark.parametrize(
    ("changes", "context", "told"),
    [
        ({}, 64, ""),
        ({"sliding_window": 64}, 64, ""),
        ({"sliding_window": 40}, 40, "texts are held to 40 tokens of this model's 64"),
        ({"rope_scaling": YarnScaling(4.0, 32, 1.1)}, 128, ""),
    ],
)
def test_a_text_is_as_long_as_every_layer_sees_whole(changes, context, told, tmp_path, caplog):
    folder = write_checkpoint(tmp_path, replace(tiny_config(), **changes))
    with Checkpoint(folder) as checkpoint, caplog.at_level(logging.WARNING):
        with Rank(checkpoint.config, checkpoint.tensors, 0, Solo(), EngineConfig(threads=1)) as rank:
            engine = Engine(checkpoint.config, rank)
            engine.open()
            assert engine.context == rank.runner.model.max_length == context
    assert [line.getMessage()[: len(told)] for line in caplog.records] == [told] * bool(told)
