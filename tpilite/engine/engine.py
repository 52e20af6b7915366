"""Rank 0's loop: requests in, passes made with all ranks, tokens chosen, text out as it is made."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpilite.arrays import Array
from tpilite.config import LlamaConfig
from tpilite.engine.rank import Rank
from tpilite.engine.sampling import N_CANDIDATES, Candidates, best, choose, edits_for
from tpilite.engine.scheduler import Scheduler
from tpilite.engine.sequence import Sequence, TokenLogprob
from tpilite.engine.step import Rows, Step, Wanted
from tpilite.engine.usage import Usage
from tpilite.errors import ConfigError, PeerLost

Recover = Callable[[PeerLost], None]

logger = logging.getLogger(__name__)

# How often every rank is asked for its status, which costs a message to it and one back.
_STATUS_S = 2.0


class TooLong(ConfigError):
    """A prompt of `n_prompt` tokens, and the `n_new` asked for, do not fit the `context`."""

    def __init__(self, n_prompt: int, n_new: int | None, context: int, short_of_memory: bool) -> None:
        asked = f" and {n_new} new ones" if n_new else ""
        whose = (
            "the memory, which holds the keys and values of" if short_of_memory else "the model's context of"
        )
        super().__init__(
            f"a prompt of {n_prompt} tokens{asked} does not fit {whose} {context}; "
            "shorten the prompt or ask for a shorter length"
        )
        self.n_prompt, self.n_new, self.context = n_prompt, n_new, context


@dataclass(frozen=True)
class Output:
    """One new token of a sequence and the text that may be shown for it; `finished` with the last."""

    sequence: Sequence
    token_id: int
    text: str
    finished: bool


@dataclass
class _CachedPrefix:
    """The caches of the sequence served last, kept for a prompt that begins the same (a chat's next turn)."""

    sequence_id: int
    ids: list[int]


class Engine:
    """Serves requests with rank 0 and all others, one pass a `step`. For one thread at a time.

    Where a rank is lost, `recover` puts rank 0 into a new group, and the pass is made again from the tokens.
    """

    def __init__(
        self, config: LlamaConfig, rank: Rank, *, max_rows: int, recover: Recover | None = None
    ) -> None:
        assert rank.embed is not None, "rank 0 has the embedding"
        self.config = config
        self.runner = rank.runner
        self._rank, self._embed = rank, rank.embed
        self._recover = recover
        self._scheduler = Scheduler(max_rows, on_start=self._take_up)
        self._max_rows = max_rows
        self._cached: _CachedPrefix | None = None
        self._free: list[int] = []
        self._next_id = 0
        self.context = config.max_position_embeddings  # or less, where a rank's memory allows no more
        self.ranks: list[dict[str, Any]] = []  # what each tells of itself, a few seconds old
        self._asked_s = 0.0

    def open(self) -> None:
        """Asks every rank for its status, which bounds the context: to be called before the first request."""
        self._begin()

    def check(self, sequence: Sequence) -> None:
        """Raises `ConfigError` or its `TooLong` where the sequence could not be served. For any thread."""
        params, n_prompt = sequence.params, len(sequence.prompt_ids)
        self._check_ids(sequence.prompt_ids)
        for token_id in params.logit_bias:
            self._check_ids([token_id])
        if n_prompt + max(params.length or 0, 1) > self.context:
            short_of_memory = self.context < self.config.max_position_embeddings
            raise TooLong(n_prompt, params.length, self.context, short_of_memory)

    def submit(self, sequence: Sequence) -> None:
        """Puts a new sequence into the queue. Raises what `check` does, before any work."""
        self.check(sequence)
        sequence.sequence_id = self._new_id()
        if sequence.params.length == 0:
            sequence.finish_reason = "length"
        else:
            self._scheduler.add(sequence)

    def spent(self, sequence: Sequence) -> Usage:
        """What rank 0 has spent on a sequence so far."""
        if sequence.usage is not None:
            return sequence.usage
        now = self._rank.usage
        return now.since(sequence.usage_before or now)

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence where it is; its place is free for the next pass."""
        if sequence.finish_reason is None:
            self._finish(sequence, "cancelled")

    def step(self) -> list[Output]:
        """One pass over the next rows and what came of it; nothing when there is nothing to do."""
        try:
            return self._step()
        except PeerLost as lost:
            self._begin(lost)
            return []

    def run(self, sequence: Sequence) -> Iterator[Output]:
        """Every output of `sequence` as it is made. Closing the iterator early cancels it."""
        try:
            while sequence.finish_reason is None:
                yield from (output for output in self.step() if output.sequence is sequence)
        finally:
            self.cancel(sequence)

    def logits(self, ids: list[int]) -> Array:  # [T] -> [T, V]
        """The scores after each of `ids`, by themselves from position 0."""
        self._check_ids(ids)
        if len(ids) > self.context:
            raise ConfigError(f"{len(ids)} tokens do not fit the context of {self.context}")
        sequence_id, parts = self._new_id(), []
        for start in range(0, len(ids), self._max_rows):
            chunk = ids[start : start + self._max_rows]
            wanted = tuple(Wanted(row, 0, 0.0) for row in range(len(chunk)))
            step = Step((Rows(sequence_id, start, len(chunk)),), wanted, self._take_free())
            parts.append(self.runner.scores(step, self._embed(chunk)))
        self._free.append(sequence_id)
        return np.concatenate(parts)

    def _step(self) -> list[Output]:
        chunks = self._scheduler.next()
        if not chunks:
            return []
        if time.monotonic() - self._asked_s > _STATUS_S:
            self._ask_status()
        ids = [i for c in chunks for i in c.sequence.ids(c.start, c.start + c.n_rows)]
        ends = np.cumsum([c.n_rows for c in chunks]) - 1
        last = [(c.sequence, int(end)) for c, end in zip(chunks, ends, strict=True) if c.reaches_end]
        rows = tuple(Rows(c.sequence.sequence_id, c.start, c.n_rows) for c in chunks)
        wanted = tuple(self._wanted(sequence, row) for sequence, row in last)
        reports = self.runner.candidates(Step(rows, wanted, self._take_free()), self._embed(ids))
        scores: Array | None = None
        outputs = []
        for index, ((sequence, _), candidates) in enumerate(zip(last, reports, strict=True)):
            params, position = sequence.params, sequence.n_tokens
            token_id = choose(candidates, params, sequence.seed, position)
            if token_id is None or params.logprobs is not None:
                if scores is None:
                    scores = self.runner.scores(Step(wanted=wanted))  # of the step just made
                everything = self._everything(sequence, scores[index])
                token_id = choose(everything, params, sequence.seed, position)
                assert token_id is not None
                if params.logprobs is not None:
                    sequence.logprobs.append(_logprob(scores[index], token_id, params.logprobs))
            outputs.append((sequence, token_id))
        for chunk in chunks:
            chunk.sequence.n_cached += chunk.n_rows
        return [self._accept(sequence, token_id) for sequence, token_id in outputs]

    def _take_up(self, sequence: Sequence) -> None:
        """Starts a sequence on the kept caches where its prompt begins as they do, else frees them."""
        sequence.usage_before = self._rank.usage
        cached, self._cached = self._cached, None
        if cached is None:
            return
        limit = min(
            len(cached.ids), sequence.n_tokens - 1
        )  # the last row is always computed: it gives scores
        ids = sequence.ids(0, limit)
        shared = next((i for i in range(limit) if cached.ids[i] != ids[i]), limit)
        if shared:
            sequence.sequence_id, sequence.n_cached = cached.sequence_id, shared
        else:
            self._free.append(cached.sequence_id)

    def _wanted(self, sequence: Sequence, row: int) -> Wanted:
        params = sequence.params
        edits = edits_for(params, sequence.prompt_ids, sequence.new_ids)
        n = 1 if params.temperature == 0 else max(N_CANDIDATES, params.k)
        return Wanted(row, n, params.temperature, edits)

    def _everything(self, sequence: Sequence, logits: Array) -> Candidates:
        edits = edits_for(sequence.params, sequence.prompt_ids, sequence.new_ids)
        edited = logits if edits is None else edits.apply(logits, 0)
        return best(edited, 0, len(edited), sequence.params.temperature)

    def _accept(self, sequence: Sequence, token_id: int) -> Output:
        params = sequence.params
        sequence.new_ids.append(token_id)
        sequence.token_times_s.append(time.perf_counter())
        text = ""
        ended = token_id in sequence.eos_ids and not params.ignore_eos
        if sequence.decoder is not None and not ended:
            text = sequence.add_text(sequence.decoder.add(token_id))
        reason = sequence.finish_reason
        if reason is None and ended:
            reason = "stop"
        full = sequence.n_tokens >= self.context
        if reason is None and (len(sequence.new_ids) == params.length or full):
            reason = "length"
        if reason is not None:
            if sequence.decoder is not None and sequence.finish_reason is None:
                text += sequence.add_text(sequence.decoder.finish(), last=True)
            self._finish(sequence, sequence.finish_reason or reason)
        return Output(sequence, token_id, text, reason is not None)

    def _finish(self, sequence: Sequence, reason: str) -> None:
        sequence.usage = self.spent(sequence)
        sequence.finish_reason = reason
        self._scheduler.remove(sequence)
        if sequence.n_cached:
            if self._cached is not None:
                self._free.append(self._cached.sequence_id)
            self._cached = _CachedPrefix(sequence.sequence_id, sequence.ids(0, sequence.n_cached))

    def _begin(self, lost: PeerLost | None = None) -> None:
        """Begins with a group, a new one where a rank is lost: what was being served is computed again.

        The context is the least that any rank's memory allows.
        """
        while True:
            if lost is not None:
                if self._recover is None:
                    raise lost
                self._recover(lost)
            self._cached = None
            self._free.clear()
            self._scheduler.restart()
            try:
                self._ask_status()
            except PeerLost as again:
                lost = again
            else:
                return

    def _ask_status(self) -> None:
        """Asks every rank how it is, and how long a text its memory allows: the least is the context."""
        self.ranks, self._asked_s = self.runner.statuses(), time.monotonic()
        limits = [found.get("max_positions") for found in self.ranks]
        self.context = min(
            [self.config.max_position_embeddings, *(int(limit) for limit in limits if limit is not None)]
        )

    def _check_ids(self, ids: list[int]) -> None:
        if not ids:
            raise ConfigError("the prompt is empty and this model has no BOS token to begin with")
        for token_id in (min(ids), max(ids)):
            if not 0 <= token_id < self.config.vocab_size:
                raise ConfigError(
                    f"token id {token_id} is not in the model's vocabulary of {self.config.vocab_size}"
                )

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _take_free(self) -> tuple[int, ...]:
        free, self._free = tuple(self._free), []
        return free


def _logprob(logits: Array, token_id: int, n_top: int) -> TokenLogprob:
    """The model's own log-probabilities (temperature 1, unedited) of a token and of the likeliest ones."""
    top = best(logits, 0, max(n_top, 1), 1.0)
    likeliest = tuple(
        (int(i), float(score) - top.log_sum_exp)
        for i, score in zip(top.ids[:n_top], top.logits[:n_top], strict=True)
    )
    logprob = float(logits[token_id]) - top.log_sum_exp
    return TokenLogprob(token_id, logprob if math.isfinite(logprob) else -9999.0, likeliest)
