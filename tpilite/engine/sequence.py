"""One request on its way: its tokens, how far the caches have come, and the text it has given so far."""

import secrets
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol

from tpilite.engine.sampling import SamplingParams
from tpilite.engine.usage import Usage


class Decoder(Protocol):
    """Ids to text, one at a time; the pieces add up to the whole text."""

    def add(self, token_id: int) -> str: ...
    def finish(self) -> str: ...


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability and those of the likeliest tokens at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Sequence:
    """The state of one request. `n_cached` positions of `ids` are in the ranks' KV caches."""

    prompt_ids: list[int]
    params: SamplingParams
    eos_ids: frozenset[int] = frozenset()
    decoder: Decoder | None = None
    new_ids: list[int] = field(default_factory=list)
    sequence_id: int = 0  # that of its caches, given by the engine
    n_cached: int = 0
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    seed: int = 0
    text: str = ""
    n_decoded: int = 0  # characters, those held back and those of a stop text included
    started_s: float = field(default_factory=time.perf_counter)
    token_times_s: list[float] = field(default_factory=list)
    usage_before: Usage | None = None  # of rank 0, when its first rows were taken up
    usage: Usage | None = None  # what rank 0 has spent on it; None until it ends
    _held: str = ""

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.new_ids)

    def ids(self, start: int, stop: int) -> list[int]:
        """The ids at these positions, of the prompt and of what was generated."""
        n_prompt = len(self.prompt_ids)
        return self.prompt_ids[start:stop] + self.new_ids[max(0, start - n_prompt) : max(0, stop - n_prompt)]

    def add_text(self, piece: str, *, last: bool = False) -> str:
        """The part of `piece` that may be shown now; ends the sequence where a stop text appears.

        A tail that could be the beginning of a stop text is held back until it is decided.
        """
        self._held += piece
        self.n_decoded += len(piece)
        at, found = _first(self._held, self.params.stop)
        if found:
            shown, self._held = self._held[:at], ""
            self.finish_reason = "stop"
        else:
            n_hold = 0 if last else _open_tail(self._held, self.params.stop)
            cut = len(self._held) - n_hold
            shown, self._held = self._held[:cut], self._held[cut:]
        self.text += shown
        return shown


def _first(text: str, stops: Items[str]) -> tuple[int, bool]:
    """Where the earliest stop text begins, and whether there is one."""
    places = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return (min(places), True) if places else (0, False)


def _open_tail(text: str, stops: Items[str]) -> int:
    """The length of the longest end of `text` that begins a stop text."""
    for n in range(min(len(text), max((len(stop) - 1 for stop in stops), default=0)), 0, -1):
        tail = text[-n:]
        if any(stop.startswith(tail) for stop in stops):
            return n
    return 0
