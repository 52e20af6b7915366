"""One request on its way: its tokens, how far the caches have come, and the text it has given so far."""

import secrets
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol

from tpilite.chat.answers import AnswerSyntax, open_tail
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
    """The state of one request. `n_cached` positions of `ids` are in the ranks' KV caches.

    Other threads may read it while it is served: `finish_reason` is set when all else is there.
    """

    prompt_ids: list[int]
    params: SamplingParams
    eos_ids: frozenset[int] = frozenset()
    decoder: Decoder | None = None
    syntax: AnswerSyntax | None = None  # of an answer to a conversation
    new_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)  # the text shown for each of `new_ids`
    sequence_id: int = 0  # that of its caches, given by the engine with its place in the queue
    n_cached: int = 0
    finish_reason: str | None = None
    error: Exception | None = None  # what has ended it, where its `finish_reason` is "error"
    logprobs: list[TokenLogprob] = field(default_factory=list)
    seed: int = 0
    n_decoded: int = 0  # characters, those held back and those of a stop text included
    started_s: float = field(default_factory=time.perf_counter)
    token_times_s: list[float] = field(default_factory=list)
    usage_before: Usage | None = None  # of rank 0, when its first rows were taken up
    usage: Usage | None = None  # what rank 0 has spent on it; None until it ends
    stopped: bool = False  # by a stop text
    _held: str = ""  # a tail that could be the beginning of a stop text

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.new_ids)

    @property
    def text(self) -> str:
        """What has been shown so far."""
        return "".join(self.pieces)

    def ids(self, start: int, stop: int) -> list[int]:
        """The ids at these positions, of the prompt and of what was generated."""
        n_prompt = len(self.prompt_ids)
        return self.prompt_ids[start:stop] + self.new_ids[max(0, start - n_prompt) : max(0, stop - n_prompt)]

    def add(self, token_id: int, *, is_end: bool, last: bool) -> str:
        """Adds a new token, an end token or the `last` maybe, and gives the text that may be shown for it."""
        piece = ""
        if self.decoder is not None:
            piece = "" if is_end else self.decoder.add(token_id)
            piece += self.decoder.finish() if last else ""
        shown = self.add_text(piece, last=last)
        self.token_times_s.append(time.perf_counter())
        self.new_ids.append(token_id)
        return shown

    def add_text(self, piece: str, *, last: bool = False) -> str:
        """The part of `piece` that may be shown now: nothing from a stop text on.

        A tail that could be the beginning of a stop text is held back until it is decided.
        """
        self._held += piece
        self.n_decoded += len(piece)
        at, found = _first(self._held, self.params.stop)
        if found:
            shown, self._held = self._held[:at], ""
            self.stopped = True
        else:
            n_hold = 0 if last else open_tail(self._held, self.params.stop)
            cut = len(self._held) - n_hold
            shown, self._held = self._held[:cut], self._held[cut:]
        self.pieces.append(shown)
        return shown


def _first(text: str, stops: Items[str]) -> tuple[int, bool]:
    """Where the earliest stop text begins, and whether there is one."""
    places = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return (min(places), True) if places else (0, False)
