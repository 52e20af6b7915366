"""Rank 0's loop: the same text however it is computed, requests served in turn, ranks lost and found."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny_config, write_checkpoint
from ranks import run_ranks

from tpilite.collective import Collective, Solo
from tpilite.engine.config import EngineConfig
from tpilite.engine.engine import Engine
from tpilite.engine.rank import Rank
from tpilite.engine.sampling import SamplingParams
from tpilite.engine.sequence import Sequence
from tpilite.engine.step import Step
from tpilite.errors import ConfigError, PeerLost
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.partition import Partition
from tpilite.weights.slicer import ensure_slices
from tpilite.weights.slices import SliceFolder, node_folder

CONFIG = tiny_config(max_position_embeddings=128)
PROMPT = [1, 17, 4, 33, 8, 21, 40, 3, 11]
GREEDY = SamplingParams(temperature=0, length=20)
SAMPLED = SamplingParams(temperature=1.5, p=0.95, seed=11, length=20)
# What the candidates of a rank cannot cover: it may choose among all of them.
WHOLE = SamplingParams(temperature=2.0, p=1.0, seed=12, length=20)
PENALISED = SamplingParams(
    temperature=0, repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.3, length=20
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), CONFIG, "F32", seed=5)


@pytest.fixture
def rank(folder: Path) -> Iterator[Rank]:
    with Checkpoint(folder) as checkpoint:
        with Rank(CONFIG, checkpoint.tensors, 0, Solo(), EngineConfig(threads=1)) as rank:
            yield rank


def engine_of(rank: Rank, max_rows: int = 256) -> Engine:
    engine = Engine(CONFIG, rank, max_rows=max_rows)
    engine.open()
    return engine


def submit(
    engine: Engine, prompt: list[int], params: SamplingParams, eos_ids: frozenset[int] = frozenset()
) -> Sequence:
    sequence = Sequence(prompt, params, eos_ids)
    engine.submit(sequence)
    return sequence


def ids(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    sequence = submit(engine, prompt, params)
    for _ in engine.run(sequence):
        pass
    return sequence.new_ids


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, WHOLE, PENALISED])
def test_chunks_do_not_change_the_text(rank: Rank, params: SamplingParams) -> None:
    whole = ids(engine_of(rank), PROMPT, params)
    assert len(whole) == 20
    for max_rows in (1, 2, 4):
        assert ids(engine_of(rank, max_rows), PROMPT, params) == whole


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_do_not_change_the_text(rank: Rank, folder: Path, tmp_path: Path, world_size: int) -> None:
    requests = [GREEDY, SAMPLED, WHOLE, PENALISED]
    expected = [ids(engine_of(rank), PROMPT, params) for params in requests]
    expected_logits = engine_of(rank).logits(PROMPT)
    partition = Partition.of(CONFIG, world_size)
    with Checkpoint(folder) as checkpoint:
        ensure_slices(checkpoint, partition, tmp_path)

    def work(collective: Collective) -> tuple[list[list[int]], np.ndarray] | None:
        first_id = partition.vocab_range(collective.rank).start
        with SliceFolder(node_folder(tmp_path, collective.rank)) as slices:
            with Rank(CONFIG, slices.tensors, first_id, collective, EngineConfig(threads=1)) as mine:
                if collective.rank:
                    mine.runner.serve()
                    return None
                engine = engine_of(mine, max_rows=4)
                texts = [ids(engine, PROMPT, params) for params in requests]
                logits = engine.logits(PROMPT)
                mine.runner.stop()
                return texts, logits

    found = run_ranks(world_size, work)[0]
    assert found is not None
    assert found[0] == expected
    assert np.abs(found[1] - expected_logits).max() <= 1e-4 * np.abs(expected_logits).max()


def test_logits_are_those_that_the_text_is_chosen_from(rank: Rank) -> None:
    engine = engine_of(rank, max_rows=4)
    text = ids(engine, PROMPT, GREEDY)
    logits = engine.logits(PROMPT + text)
    assert logits.dtype == np.float32
    assert logits.shape == (len(PROMPT) + 20, CONFIG.vocab_size)
    assert logits[len(PROMPT) - 1 : -1].argmax(axis=1).tolist() == text


def test_a_prompt_that_begins_like_the_last_text_is_not_computed_again(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(rank)
    first = ids(engine, PROMPT, GREEDY)
    longer = [*PROMPT, *first[:10], 5, 6]
    alone = ids(engine_of(rank), longer, GREEDY)

    steps: list[Step] = []
    run = rank.runner.candidates
    monkeypatch.setattr(rank.runner, "candidates", lambda step, x=None: (steps.append(step), run(step, x))[1])
    assert ids(engine, longer, GREEDY) == alone
    assert sum(rows.n_rows for rows in steps[0].rows) == 2
    # The same prompt once more: at least its last row is needed for its scores.
    assert ids(engine, longer, GREEDY) == alone
    # Another text takes the caches' place.
    steps.clear()
    assert ids(engine, [9, 9], GREEDY) == ids(engine_of(rank), [9, 9], GREEDY)
    assert steps[0].free
    n_live = len({rows.sequence_id for step in steps for rows in step.rows})
    assert n_live <= 2


def test_requests_are_served_in_turn(rank: Rank) -> None:
    engine = engine_of(rank)
    alone = [ids(engine_of(rank), [i, 3], GREEDY) for i in (4, 5, 6)]
    sequences = [submit(engine, [i, 3], GREEDY) for i in (4, 5, 6)]
    order = []
    while any(s.finish_reason is None for s in sequences):
        order += [sequences.index(output.sequence) for output in engine.step()]
    assert [s.new_ids for s in sequences] == alone
    assert order == sorted(order)
    assert engine.step() == []


def test_a_cancelled_request_frees_its_place(rank: Rank) -> None:
    engine = engine_of(rank)
    first, second, third = (submit(engine, [i, 3], GREEDY) for i in (4, 5, 6))
    engine.step()
    engine.cancel(second)
    engine.cancel(first)
    assert len(ids(engine, [7], GREEDY)) == 20
    assert (first.finish_reason, second.finish_reason, third.finish_reason) == (
        "cancelled",
        "cancelled",
        "length",
    )
    assert len(first.new_ids) == 1
    assert second.new_ids == []


def test_leaving_the_loop_early_cancels(rank: Rank) -> None:
    engine = engine_of(rank)
    sequence = submit(engine, PROMPT, GREEDY)
    for _ in engine.run(sequence):
        break
    assert sequence.finish_reason == "cancelled"
    assert engine.step() == []


def test_eos_ends_the_text_unless_it_is_ignored(rank: Rank) -> None:
    engine = engine_of(rank)
    free = ids(engine, PROMPT, GREEDY)
    eos = free[7]
    sequence = submit(engine, PROMPT, GREEDY, frozenset({eos}))
    for _ in engine.run(sequence):
        pass
    assert sequence.new_ids == free[: free.index(eos) + 1]
    assert sequence.finish_reason == "stop"
    ignoring = SamplingParams(temperature=0, length=20, ignore_eos=True)
    sequence = submit(engine, PROMPT, ignoring, frozenset({eos}))
    for _ in engine.run(sequence):
        pass
    assert sequence.new_ids == free


def test_the_context_ends_the_text(rank: Rank) -> None:
    engine = engine_of(rank)
    sequence = submit(engine, [3] * 120, SamplingParams(temperature=0))
    for _ in engine.run(sequence):
        pass
    assert len(sequence.new_ids) == 8
    assert sequence.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "length", "text"),
    [
        ([], 1, "empty"),
        ([50], 1, "token id 50 is not in the model's vocabulary of 50"),
        ([-1], 1, "token id -1"),
        ([3] * 128, None, "does not fit the model's context of 128"),
        ([3] * 100, 29, "100 tokens and 29 new ones does not fit"),
    ],
)
def test_what_cannot_be_served_is_refused_before_any_work(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, prompt: list[int], length: int | None, text: str
) -> None:
    monkeypatch.setattr(rank.runner, "_run", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ConfigError, match=text):
        submit(engine_of(rank), prompt, SamplingParams(length=length))
    assert submit(engine_of(rank), [3] * 100, SamplingParams(length=0)).finish_reason == "length"


def test_an_engine_talks_to_no_rank_until_it_is_opened(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank.runner, "statuses", lambda: [{"max_positions": 40}])
    engine = Engine(CONFIG, rank, max_rows=4)
    assert (engine.ranks, engine.context) == ([], 128)
    engine.open()
    assert (len(engine.ranks), engine.context) == (1, 40)


def test_logprobs_are_those_of_the_whole_vocabulary(rank: Rank) -> None:
    engine = engine_of(rank)
    sequence = submit(engine, PROMPT, SamplingParams(temperature=0.7, seed=1, length=5, logprobs=3))
    for _ in engine.run(sequence):
        pass
    logits = engine.logits(PROMPT + sequence.new_ids).astype(np.float64)[len(PROMPT) - 1 : -1]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for found, expected, token_id in zip(sequence.logprobs, logprobs, sequence.new_ids, strict=True):
        assert found.token_id == token_id
        assert math.isclose(found.logprob, expected[token_id], abs_tol=1e-4)
        assert [i for i, _ in found.top] == np.argsort(-expected)[:3].tolist()
        assert np.allclose([p for _, p in found.top], np.sort(expected)[::-1][:3], atol=1e-4)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, WHOLE])
@pytest.mark.parametrize("lost_in_pass", [0, 1, 4, 9])
def test_a_lost_rank_does_not_change_the_text(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, params: SamplingParams, lost_in_pass: int
) -> None:
    expected = ids(engine_of(rank), PROMPT, params)
    recovered = []

    def recover(lost: PeerLost) -> None:
        recovered.append(lost)
        rank.regroup(Solo())

    engine = Engine(CONFIG, rank, max_rows=4, recover=recover)
    run, n_runs = rank.runner._run, iter(range(1000))

    def lossy(step, x=None):  # type: ignore[no-untyped-def]
        if next(n_runs) == lost_in_pass:
            raise PeerLost("rank 1 is gone")
        return run(step, x)

    monkeypatch.setattr(rank.runner, "_run", lossy)
    waiting = submit(engine, [9, 9], GREEDY)
    engine.cancel(waiting)
    assert ids(engine, PROMPT, params) == expected
    assert len(recovered) == 1


def test_without_a_way_to_recover_the_loss_is_the_callers(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise PeerLost("rank 1 is gone")

    monkeypatch.setattr(rank.runner, "_run", lost)
    with pytest.raises(PeerLost, match="rank 1"):
        ids(engine_of(rank), PROMPT, GREEDY)
