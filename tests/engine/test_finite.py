"""Damaged weights: scores and hidden states that are not finite name their rank and end one request only."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import tiny_config, write_checkpoint
from ranks import run_ranks

from tpilite import LLM, SamplingParams
from tpilite.collective import Collective, Solo
from tpilite.engine.config import EngineConfig
from tpilite.engine.engine import Engine
from tpilite.engine.rank import Rank
from tpilite.engine.sampling import Edits, best, choose
from tpilite.engine.sequence import Sequence
from tpilite.errors import NotFinite
from tpilite.formats.safetensors import TensorFile
from tpilite.model.kept import KV_DTYPES
from tpilite.model.llama import Llama
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.partition import Partition
from tpilite.weights.slicer import ensure_slices
from tpilite.weights.slices import SliceFolder, node_folder

CONFIG = tiny_config(max_position_embeddings=128)
PROMPT = [1, 17, 4, 33]
GREEDY = SamplingParams(temperature=0, length=6, ignore_eos=True)
WAYS = [
    GREEDY,
    SamplingParams(seed=1, length=6, ignore_eos=True),
    SamplingParams(seed=1, p=1.0, temperature=2.0, length=6, ignore_eos=True),
    SamplingParams(temperature=0, length=6, ignore_eos=True, logprobs=2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), CONFIG, "F32", seed=5)


def damage(model: Llama, where: str, value: float) -> Any:
    """Makes one number of what the model computes another, until what is returned is called."""
    if where == "scores":
        before = model.logits

        def logits(x: np.ndarray) -> np.ndarray:
            found = before(x)
            found[:, 3] = value
            return found

        model.logits = logits  # type: ignore[method-assign]
        return lambda: setattr(model, "logits", before)
    inner = model._feed_forward

    def feed_forward(*args: Any) -> np.ndarray:
        found = inner(*args)
        found[-1, 2] = value
        return found

    model._feed_forward = feed_forward  # type: ignore[method-assign]
    return lambda: setattr(model, "_feed_forward", inner)


@pytest.mark.parametrize("params", WAYS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("where", "what"), [("scores", "scores"), ("hidden", "hidden states")])
@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_the_damaged_rank_is_named_and_the_next_request_is_served(
    folder: Path, tmp_path: Path, params: SamplingParams, value: float, where: str, what: str, damaged: int
) -> None:
    partition = Partition.of(CONFIG, 3)
    with Checkpoint(folder) as checkpoint:
        ensure_slices(checkpoint, partition, tmp_path)

    def work(collective: Collective) -> list[Any] | None:
        first_id = partition.vocab_range(collective.rank).start
        with SliceFolder(node_folder(tmp_path, collective.rank)) as slices:
            with Rank(CONFIG, slices.tensors, first_id, collective, EngineConfig(threads=1)) as rank:
                if collective.rank == damaged:
                    mend = damage(rank.runner.model, where, value)
                    execute, n = rank.runner._execute, iter(range(1000))

                    def mended(step: Any, x: Any) -> Any:
                        if next(n) == 1:
                            mend()
                        return execute(step, x)

                    rank.runner._execute = mended  # type: ignore[method-assign]
                if collective.rank:
                    rank.runner.serve()
                    return None
                engine = Engine(CONFIG, rank)
                engine.open()
                found: list[Any] = []
                for _ in range(2):
                    sequence = Sequence(PROMPT, params)
                    try:
                        found.append([output.token_id for output in engine.run(sequence)])
                    except NotFinite as error:
                        found.append((error.rank, str(error), sequence.finish_reason))
                rank.runner.stop()
                return found

    found = run_ranks(3, work)[0]
    assert found is not None
    (rank, text, reason), ids = found
    assert (rank, reason) == (damaged, "error")
    assert text.startswith(f"rank {damaged} computed {what} that are not finite")
    with Checkpoint(folder) as checkpoint:
        with Rank(CONFIG, checkpoint.tensors, 0, Solo(), EngineConfig(threads=1)) as alone:
            engine = Engine(CONFIG, alone)
            engine.open()
            assert [output.token_id for output in engine.run(Sequence(PROMPT, params))] == ids


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, threads=1) as llm:
        yield llm


def test_a_damaged_prompt_row_is_told_and_leaves_no_trace_in_the_caches(llm: LLM) -> None:
    text = llm.generate(PROMPT, GREEDY).ids
    mend = damage(llm.engine.runner.model, "hidden", np.nan)
    with pytest.raises(NotFinite, match="rank 0"):
        llm.generate(PROMPT, GREEDY)
    with pytest.raises(NotFinite, match="rank 0"):
        llm.logits(PROMPT)
    mend()
    assert llm.generate(PROMPT, GREEDY).ids == text


def test_penalties_next_to_nothing_leave_scores_finite() -> None:
    edits = Edits(np.arange(3, dtype=np.int32), np.full(3, 1e-44, np.float32), np.zeros(3, np.float32))
    scores = edits.apply(np.array([5.0, 0.0, -5.0, 1.0], np.float32), 0)
    assert np.isfinite(scores).all()
    params = SamplingParams(p=1.0)
    assert choose(best(scores, 0, 4, 1.0), params, 1, 1) == 0


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
def test_no_cache_makes_numbers_of_what_is_not_finite(
    tmp_path: Path, kv_dtype: str, value: float, projection: str
) -> None:
    write_checkpoint(tmp_path, CONFIG, "F32", seed=5)
    with TensorFile(tmp_path / "model.safetensors") as file, open(file.path, "r+b") as weights:
        weights.seek(file.tensors[f"model.layers.1.self_attn.{projection}.weight"].offset)
        weights.write(np.float32(value).tobytes())
    with LLM(tmp_path, threads=1, kv_dtype=kv_dtype) as llm, pytest.raises(NotFinite, match="rank 0"):
        list(llm.engine.run(llm.start(PROMPT, GREEDY)))
