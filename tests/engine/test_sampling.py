"""Choosing tokens: distributions against their definitions, ranks against one rank, and keyed randomness."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpilite.engine.sampling import Candidates, Edits, SamplingParams, best, choose, edits_for, merge, uniform
from tpilite.errors import ConfigError

VOCABULARY = 40


def scores(seed: int, n: int = VOCABULARY) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n) * 3).astype(np.float32)


def distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """What may be chosen and how likely, written out over the whole vocabulary in float64."""
    wide = logits.astype(np.float64) / params.temperature
    p = np.exp(wide - wide.max())
    p /= p.sum()
    order = np.lexsort((np.arange(len(p)), -p))
    if params.k:
        p[order[params.k :]] = 0
        p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= params.p]] = 0
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(p=1.0),
        SamplingParams(p=0.7),
        SamplingParams(temperature=0.5, k=5, p=1.0),
        SamplingParams(temperature=2.0, k=8, p=0.6),
        SamplingParams(p=1.0, min_p=0.2),
    ],
)
def test_tokens_are_drawn_from_the_defined_distribution(params: SamplingParams) -> None:
    logits = scores(1)
    expected = distribution(logits, params)
    everything = best(logits, 0, VOCABULARY, params.temperature)
    n = 4000
    counts = Counter(choose(everything, params, 7, position) for position in range(n))
    found = np.array([counts[i] / n for i in range(VOCABULARY)])
    assert not found[expected == 0].any()
    # Five standard deviations of a binomial share.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / n) + 1e-12).all()


def test_greedy_takes_the_best_and_of_equals_the_lowest_id() -> None:
    logits = np.array([1, 5, 2, 5], np.float32)
    assert choose(best(logits, 0, 1, 0.0), SamplingParams(temperature=0), 1, 1) == 1


@given(
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, VOCABULARY), max_size=6),
    n=st.integers(1, VOCABULARY + 5),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    ties=st.booleans(),
)
def test_ranks_report_what_one_rank_would(
    seed: int, cuts: list[int], n: int, temperature: float, ties: bool
) -> None:
    logits = scores(seed)
    if ties:
        logits = np.round(logits)
    edges = [0, *sorted(cuts), VOCABULARY]
    parts = [best(logits[start:stop], start, n, temperature) for start, stop in itertools.pairwise(edges)]
    merged, alone = merge(parts), best(logits, 0, VOCABULARY, temperature)
    assert len(merged.ids) >= min(n, VOCABULARY)
    n_sure = min(n, VOCABULARY)
    if not ties:
        n_sure = len(merged.ids)
    assert merged.logits[:n_sure].tolist() == alone.logits[:n_sure].tolist()
    assert merged.log_sum_exp == pytest.approx(alone.log_sum_exp, rel=1e-6)
    if merged.complete:
        assert merged.ids.tolist() == alone.ids.tolist()


@given(
    seed=st.integers(0, 300),
    n=st.integers(1, VOCABULARY),
    p=st.sampled_from([0.3, 0.9, 1.0]),
    k=st.integers(0, 5),
)
def test_few_candidates_give_the_same_token_or_say_that_they_do_not_cover(
    seed: int, n: int, p: float, k: int
) -> None:
    logits, params = scores(seed), SamplingParams(p=p, k=k)
    n = max(n, k)
    whole = choose(best(logits, 0, VOCABULARY, 1.0), params, seed, 3)
    assert choose(best(logits, 0, n, 1.0), params, seed, 3) in (whole, None)
    if k:
        assert choose(best(logits, 0, n, 1.0), params, seed, 3) == whole


def test_too_few_candidates_for_a_nucleus_are_noticed() -> None:
    flat = np.zeros(VOCABULARY, np.float32)
    assert choose(best(flat, 0, 10, 1.0), SamplingParams(p=0.9), 1, 1) is None
    assert choose(best(flat, 0, 37, 1.0), SamplingParams(p=0.9), 1, 1) is not None


def test_random_numbers_depend_on_seed_and_position_alone() -> None:
    assert uniform(3, 5) == uniform(3, 5)
    numbers = [uniform(seed, position) for seed in range(20) for position in range(50)]
    assert len(set(numbers)) == 1000
    assert all(0 <= number < 1 for number in numbers)
    assert abs(float(np.mean(numbers)) - 0.5) < 5 / math.sqrt(12 * 1000)


def test_every_seed_of_64_bits_has_numbers_of_its_own() -> None:
    edges = [0, 1, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1]
    for position in (0, 7, 2**31):
        assert len({uniform(seed, position) for seed in edges}) == len(edges)
    assert len({uniform(2**63 + 5, position) for position in range(200)}) == 200
    # What seeds below 2**63 gave before, they give for ever.
    assert [uniform(1, 5), uniform(2**63 - 1, 131072)] == [0.7988550069253694, 0.6246517620401683]


def test_penalties_and_biases_change_what_they_name() -> None:
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={1: 10.0, 3: -1.0}
    )
    edits = edits_for(params, prompt_ids=[0, 2], new_ids=[3, 3])
    assert edits is not None
    logits = np.array([4, 4, -4, 4, 4], np.float32)
    # 0 and 2 were in the prompt, 3 came twice, 1 is only biased, 4 is left alone.
    assert edits.apply(logits, 0).tolist() == [2, 14, -8, 4 / 2 - 0.5 - 2 * 0.25 - 1, 4]
    assert edits.apply(logits[2:4], 2).tolist() == [-8, 0]
    assert logits.tolist() == [4, 4, -4, 4, 4]
    assert edits_for(SamplingParams(), [1], [2]) is None


@given(ids=st.sets(st.integers(0, VOCABULARY - 1)), cut=st.integers(0, VOCABULARY), seed=st.integers(0, 100))
def test_edits_of_the_ranks_are_those_of_the_whole(ids: set[int], cut: int, seed: int) -> None:
    random, logits = np.random.default_rng(seed), scores(seed)
    n = len(ids)
    edits = Edits(
        np.array(sorted(ids), np.int32),
        random.uniform(0.5, 2, n).astype(np.float32),
        random.uniform(-1, 1, n).astype(np.float32),
    )
    joined = np.concatenate([edits.apply(logits[:cut], 0), edits.apply(logits[cut:], cut)])
    assert joined.tolist() == edits.apply(logits, 0).tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -1),
        ("temperature", "hot"),
        ("p", 0),
        ("p", 1.5),
        ("min_p", math.nan),
        ("k", -1),
        ("k", 1.5),
        ("k", True),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 1 << 64),
        ("seed", 1 << 300),
        ("seed", True),
        ("seed", 1.0),
        ("k", 1 << 70),
        ("length", -1),
        ("stop", "text"),
        ("stop", ("",)),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {-1: 1.0}),
    ],
)
def test_values_without_sense_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_candidates_of_a_rank_without_vocabulary_are_none() -> None:
    nothing = best(np.zeros(0, np.float32), 5, 3, 1.0)
    some = best(scores(1), 0, 3, 1.0)
    assert isinstance(nothing, Candidates)
    assert merge([some, nothing]) is some
