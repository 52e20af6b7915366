"""From scores to a token: what a request asks for, what each rank reports, and the choice on rank 0.

Every rank reports only its best `Candidates` of its own vocabulary rows and the log-sum-exp of all of them,
a few kilobytes, and rank 0 chooses exactly: it knows each candidate's true probability, and where the
candidates do not cover what the request may choose from, `choose` says so and the full scores are fetched.

Random numbers are keyed by (seed, position), so that the text depends neither on the number of ranks, nor
on who else is served, nor on work that had to be done again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.arrays import Array
from tpilite.checks import check_whole, short
from tpilite.config.generation import GenerationDefaults
from tpilite.errors import ConfigError
from tpilite.model.ops import is_finite

_LARGEST = np.float32(1e30)  # of an edited score, so that all stay finite

# Top-p of 0.9 over a trained model's scores is covered by far fewer; 256 cost 2 KiB per rank and token.
N_CANDIDATES = 256


# Used where neither the user nor the model's publisher says anything.
DEFAULTS: dict[str, float] = {"temperature": 1.0, "k": 0, "p": 0.9, "min_p": 0.0, "repetition_penalty": 1.0}
_UNSET: Any = None


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when the text ends. `temperature=0` is greedy; `k=0` and `p=1` do not cut.

    What is left out, or None, is as the model's publisher says, else as in `DEFAULTS`. The names of what was
    left out are in `unset`; until a session knows the model, these have the value of `DEFAULTS`.

    `length` is the most new tokens, None as many as the context holds. `seed` is a whole number
    of 64 bits, None draws one at random. `logprobs` asks for the log-probability of each token and
    of that many of the likeliest beside it.

    Raises `ConfigError` for values that make no sense.
    """

    temperature: float = _UNSET
    k: int = _UNSET
    p: float = _UNSET
    min_p: float = _UNSET
    repetition_penalty: float = _UNSET
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    length: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    unset: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        unset = [name for name in DEFAULTS if getattr(self, name) is None]
        object.__setattr__(self, "unset", frozenset(unset))
        for name in unset:
            object.__setattr__(self, name, DEFAULTS[name])
        _in_range("temperature", self.temperature, 0, 100)
        _in_range("p", self.p, 0, 1, above=True)
        _in_range("min_p", self.min_p, 0, 1)
        _in_range("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        _in_range("presence_penalty", self.presence_penalty, -100, 100)
        _in_range("frequency_penalty", self.frequency_penalty, -100, 100)
        check_whole("k", self.k, least=0)
        for name in ("length", "logprobs"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), least=0)
        if self.seed is not None and not (type(self.seed) is int and 0 <= self.seed < 1 << 64):
            raise ConfigError(f"seed must be a whole number from 0 to 2**64 - 1, found {short(self.seed)}")
        for token_id, bias in self.logit_bias.items():
            check_whole("logit_bias's token id", token_id, least=0)
            _in_range(f"logit_bias of {token_id}", bias, -1000, 1000)
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ConfigError(f"stop must be a tuple of texts that are not empty, found {self.stop!r}")


def taken_from(model: GenerationDefaults, params: SamplingParams) -> dict[str, float]:
    """What the user has left to the model's publisher, who says it."""
    return {name: value for name, value in model.given().items() if name in params.unset}


def _in_range(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (low < value <= high if above else low <= value <= high):
        raise ConfigError(f"{name} must be {'above' if above else 'from'} {low} to {high}, found {value!r}")


@dataclass(frozen=True)
class Edits:
    """Changes to the scores of some tokens before the choice: penalties and biases.

    A score above 0 is divided by `scale`, one below multiplied by it; then `shift` is added.
    """

    ids: NDArray[np.int32]  # [n], ascending
    scale: Array  # [n]
    shift: Array  # [n]

    def apply(self, logits: Array, first_id: int) -> Array:  # [V] -> [V]
        """The scores of the tokens from `first_id` on, edited, in a new array."""
        low, high = np.searchsorted(self.ids, (first_id, first_id + logits.shape[0]))
        where = self.ids[low:high] - first_id
        scale, edited = self.scale[low:high], logits.copy()
        old = logits[where]
        with np.errstate(over="ignore", divide="ignore"):  # by penalties next to nothing
            changed = np.where(old > 0, old / scale, old * scale) + self.shift[low:high]
        edited[where] = changed.clip(-_LARGEST, _LARGEST)
        return edited


def edits_for(params: SamplingParams, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> Edits | None:
    """What `params` changes after these tokens, None where it changes nothing.

    The repetition penalty counts the prompt too (arXiv 1909.05858), the presence and frequency penalties
    only what was generated, as in OpenAI's API.
    """
    scale: dict[int, float] = {}
    shift: dict[int, float] = dict(params.logit_bias)
    if params.repetition_penalty != 1:
        scale = dict.fromkeys((*prompt_ids, *new_ids), params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        ids, counts = np.unique(np.asarray(new_ids, np.int32), return_counts=True)
        for token_id, count in zip(ids.tolist(), counts.tolist(), strict=True):
            penalty = params.presence_penalty + params.frequency_penalty * count
            shift[token_id] = shift.get(token_id, 0.0) - penalty
    if not scale and not shift:
        return None
    edited = sorted(scale.keys() | shift.keys())
    return Edits(
        np.array(edited, np.int32),
        np.array([scale.get(i, 1.0) for i in edited], np.float32),
        np.array([shift.get(i, 0.0) for i in edited], np.float32),
    )


@dataclass(frozen=True)
class Candidates:
    """The best-scored tokens, best first (of equal scores the lower id), and what all scores add up to."""

    ids: NDArray[np.int32]  # [C]
    logits: Array  # [C]
    log_sum_exp: float  # of all logits / temperature (when greedy, of the logits); NaN: they are not finite
    complete: bool  # whether these are all the tokens that there are


def best(logits: Array, first_id: int, n: int, temperature: float) -> Candidates:  # [V] -> [C]
    """The `n` best of the tokens from `first_id` on; none where a score is not finite."""
    if not is_finite(logits):
        return Candidates(np.zeros(0, np.int32), np.zeros(0, np.float32), math.nan, False)
    n = min(n, logits.shape[0])
    if n == 0:
        return Candidates(np.zeros(0, np.int32), np.zeros(0, np.float32), -math.inf, True)
    threshold = np.partition(logits, -n)[-n] if n < logits.shape[0] else -np.inf
    # Every score equal to the threshold takes part, so that ties break by id on any number of ranks.
    ids = np.flatnonzero(logits >= threshold).astype(np.int32)
    order = np.argsort(-logits[ids], kind="stable")[:n]
    ids = ids[order]
    top = float(logits[ids[0]])
    scale = 1 / temperature if temperature else 1.0
    total = float(np.exp((logits - np.float32(top)) * np.float32(scale)).sum(dtype=np.float64))
    return Candidates(ids + np.int32(first_id), logits[ids], top * scale + math.log(total), n == len(logits))


def merge(parts: Sequence[Candidates]) -> Candidates:
    """The candidates of all ranks together, as one rank with the whole vocabulary would name them.

    Only as many are kept as the shortest incomplete part has: below its last score another rank's token
    may be followed by one of this rank's that was not reported.
    """
    parts = [part for part in parts if len(part.ids)]
    if len(parts) == 1:
        return parts[0]
    ids = np.concatenate([part.ids for part in parts])
    logits = np.concatenate([part.logits for part in parts])
    order = np.lexsort((ids, -logits))
    complete = all(part.complete for part in parts)
    if not complete:
        floor = max(float(part.logits[-1]) for part in parts if not part.complete)
        order = order[logits[order] >= floor]
    peak = max(part.log_sum_exp for part in parts)
    total = sum(math.exp(part.log_sum_exp - peak) for part in parts)
    return Candidates(ids[order], logits[order], peak + math.log(total), complete)


def choose(candidates: Candidates, params: SamplingParams, seed: int, position: int) -> int | None:
    """The next token's id, or None where the candidates do not hold every token that may be chosen.

    The order is that of Hugging Face: temperature, the `k` best, the likeliest that reach `p` together,
    those not below `min_p` times the best.
    """
    ids, logits = candidates.ids, candidates.logits
    if params.temperature == 0:
        return int(ids[0])
    scaled = logits.astype(np.float64) / params.temperature
    probability = np.exp(scaled - candidates.log_sum_exp)
    covered = candidates.complete
    if params.k and params.k <= len(ids):
        probability = probability[: params.k]
        probability = probability / probability.sum()
        covered = True
    if params.p < 1:
        before = np.cumsum(probability) - probability
        kept = int(np.count_nonzero(before < params.p))
        covered = covered or kept < len(probability)
        probability = probability[:kept]
    if params.min_p:
        kept = int(np.count_nonzero(probability >= params.min_p * probability[0]))
        covered = covered or kept < len(probability)
        probability = probability[:kept]
    if not covered:
        return None
    total = np.cumsum(probability)
    draw = uniform(seed, position) * total[-1]
    return int(ids[min(int(np.searchsorted(total, draw, side="right")), len(total) - 1)])


def uniform(seed: int, position: int) -> float:
    """A random number in [0, 1) that depends on its two keys alone (Philox, a counter-based generator)."""
    key = np.array([seed, position], np.uint64)  # of a list that holds one above 2**63, NumPy makes floats
    return float(np.random.Generator(np.random.Philox(key=key)).random())
