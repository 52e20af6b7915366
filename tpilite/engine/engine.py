"""Rank 0's loop: requests in, passes made with all ranks, tokens chosen, text out as it is made."""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tpilite.arrays import Array
from tpilite.config.llama import LlamaConfig
from tpilite.engine.choice import next_token, wanted_of
from tpilite.engine.config import MAX_ROWS
from tpilite.engine.rank import Rank
from tpilite.engine.scheduler import CachedPrefix, Scheduler
from tpilite.engine.sequence import Sequence
from tpilite.engine.step import Rows, Step, Wanted
from tpilite.engine.usage import Usage
from tpilite.errors import ConfigError, NotFinite, PeerLost

logger = logging.getLogger(__name__)

Recover = Callable[[PeerLost], None]

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


class Engine:
    """Serves requests with rank 0 and all others, one pass a `step`, in the order in which they came.

    For any number of threads: each makes passes for whatever is first in the queue. A pass that fails ends
    what it was made for and nothing else. Where a rank is lost, `recover` puts rank 0 into a new group, and
    the pass is made again from the tokens; so it is after a pass that was interrupted.
    """

    def __init__(
        self, config: LlamaConfig, rank: Rank, *, max_rows: int = MAX_ROWS, recover: Recover | None = None
    ) -> None:
        assert rank.embed is not None, "rank 0 has the embedding"
        self.config = config
        self.runner = rank.runner
        self._rank, self._embed = rank, rank.embed
        self._recover = recover
        self._next_ids = itertools.count(1)
        self.context = config.context  # or less, where a rank's memory allows no more
        self.ranks: list[dict[str, Any]] = []  # what each tells of itself, a few seconds old
        self._asked_s = 0.0
        # What comes and goes between two passes. To append takes no lock, since a generator may be collected,
        # and its sequence cancelled, in the middle of a pass.
        self._submitted: deque[Sequence] = deque()
        self._cancelled: deque[Sequence] = deque()
        self._lock = threading.Lock()  # held through a pass; guards what follows
        self._scheduler = Scheduler(max_rows, on_start=self._take_up)
        self._prefix = CachedPrefix()
        self._is_closed = False
        _tell_of_window(config)
        self._is_whole = True  # the last pass came to its end, on all ranks

    def open(self, lost: PeerLost | None = None) -> None:
        """Begins with a group, before the first request, or with a new one where a rank is lost.

        What was being served is computed again. Every rank is asked how long a text its memory allows.
        """
        while True:
            if lost is not None:
                if self._recover is None:
                    raise lost
                self._recover(lost)
            self._forget_caches()
            try:
                self._ask_status()
            except PeerLost as again:
                lost = again
            else:
                self._is_whole = True
                return

    def close(self) -> None:
        """Ends every sequence with an error, once the pass that is being made is over."""
        with self._lock:
            self._is_closed = True
            self._take_in()
            self._fail(self._scheduler.unfinished, _closed())

    def check(self, sequence: Sequence) -> None:
        """Raises `ConfigError` or its `TooLong` where the sequence could not be served."""
        _check(sequence, self.config, self.context)

    def submit(self, sequence: Sequence) -> None:
        """Puts a new sequence into the queue. Raises what `check` does, before any work."""
        if self._is_closed:
            raise _closed()
        self.check(sequence)
        sequence.sequence_id = next(self._next_ids)
        if sequence.params.length == 0:
            sequence.finish_reason = "length"
        else:
            self._submitted.append(sequence)

    def spent(self, sequence: Sequence) -> Usage:
        """What rank 0 has spent on a sequence so far."""
        if sequence.usage is not None:
            return sequence.usage
        now = self._rank.usage
        return now.since(sequence.usage_before or now)

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence where it is, at the latest before the next pass."""
        if sequence.finish_reason is None:
            self._cancelled.append(sequence)
            if self._lock.acquire(blocking=False):
                try:
                    self._take_in()
                finally:
                    self._lock.release()

    def step(self) -> list[Output]:
        """One pass over the next rows and what came of it; nothing when there is nothing to do.

        Raises what the pass failed with, which is the `error` of the sequences that it has ended.
        """
        outputs = self._pass()
        for output in outputs:
            if output.sequence.error is not None:
                raise output.sequence.error
        return outputs

    def run(self, sequence: Sequence) -> Iterator[Output]:
        """Every output of `sequence` as it is made, by this thread's passes or another's.

        Submits it, if that was not done. Raises its `error`. Closing the iterator early cancels it.
        """
        if not sequence.sequence_id:
            self.submit(sequence)
        n_given = 0
        try:
            ended = False
            while not ended:
                ended = sequence.finish_reason is not None
                for i in range(n_given, n_made := len(sequence.new_ids)):
                    yield Output(sequence, sequence.new_ids[i], sequence.pieces[i], ended and i == n_made - 1)
                n_given = n_made
                if not ended:
                    self._pass()
        finally:
            self.cancel(sequence)
        if sequence.error is not None:
            raise sequence.error

    def logits(self, ids: list[int]) -> Array:  # [T] -> [T, V]
        """The scores after each of `ids`, by themselves from position 0."""
        _check_ids(ids, self.config)
        if len(ids) > self.context:
            raise ConfigError(f"{len(ids)} tokens do not fit the context of {self.context}")
        sequence_id, parts = next(self._next_ids), []
        with self._passing():
            for start in range(0, len(ids), self._scheduler.max_rows):
                chunk = ids[start : start + self._scheduler.max_rows]
                wanted = tuple(Wanted(row, 0, 0.0) for row in range(len(chunk)))
                step = Step((Rows(sequence_id, start, len(chunk)),), wanted, self._prefix.take_free())
                parts.append(self.runner.scores(step, self._embed(chunk)))
            self._prefix.free(sequence_id)
            self._is_whole = True
        return np.concatenate(parts)

    # ---- with the lock held

    @contextmanager
    def _passing(self) -> Iterator[None]:
        """The lock, for a pass that says itself when it has come to its end."""
        with self._lock:
            if self._is_closed:
                raise _closed()
            self._take_in()
            if not self._is_whole:
                self._mend()
            self._is_whole = False
            yield

    def _pass(self) -> list[Output]:
        """A pass and what came of it, of sequences that it has ended with an error too."""
        with self._passing():
            try:
                outputs = self._step()
            except PeerLost as lost:
                self.open(lost)
                return []
            except Exception as error:
                failed = self._scheduler.running
                if not failed:
                    raise
                self._is_whole = isinstance(error, NotFinite)  # which is found out when the pass is over
                return self._fail(failed, error)
            self._is_whole = True
            return outputs

    def _take_in(self) -> None:
        """Puts what was submitted into the queue, and ends what was cancelled."""
        while self._submitted:
            self._scheduler.add(self._submitted.popleft())
        while self._cancelled:
            sequence = self._cancelled.popleft()
            if sequence.finish_reason is None:
                self._finish(sequence, "cancelled")

    def _mend(self) -> None:
        """Forgets all caches after a pass that ended in its middle, where other ranks may still be."""
        if self.runner.collective.world_size > 1:
            self.open(PeerLost("the pass before ended in its middle"))
        else:
            self.runner.reset()
            self._forget_caches()
            self._is_whole = True

    def _fail(self, sequences: list[Sequence], error: Exception) -> list[Output]:
        """Ends sequences with an error. What is in their caches is not used again."""
        for sequence in sequences:
            sequence.error, sequence.n_cached = error, 0
            self._prefix.free(sequence.sequence_id)
            self._finish(sequence, "error")
        return [Output(sequence, -1, "", finished=True) for sequence in sequences]

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
        wanted = tuple(wanted_of(sequence, row) for sequence, row in last)
        reports = self.runner.candidates(Step(rows, wanted, self._prefix.take_free()), self._embed(ids))

        @cache
        def scores() -> Array:  # [R, V], of the step just made
            return self.runner.scores(Step(wanted=wanted))

        chosen = [
            (sequence, next_token(sequence, candidates, lambda index=index: scores()[index]))  # type: ignore[misc]
            for index, ((sequence, _), candidates) in enumerate(zip(last, reports, strict=True))
        ]
        for chunk in chunks:
            chunk.sequence.n_cached += chunk.n_rows
        return [self._accept(sequence, token_id) for sequence, token_id in chosen]

    def _take_up(self, sequence: Sequence) -> None:
        sequence.usage_before = self._rank.usage
        self._prefix.give_to(sequence)

    def _accept(self, sequence: Sequence, token_id: int) -> Output:
        params = sequence.params
        is_end = token_id in sequence.eos_ids and not params.ignore_eos
        is_full = len(sequence.new_ids) + 1 == params.length or sequence.n_tokens + 1 >= self.context
        text = sequence.add(token_id, is_end=is_end, last=is_end or is_full)
        if is_end or sequence.stopped or is_full:
            self._finish(sequence, "stop" if is_end or sequence.stopped else "length")
        return Output(sequence, token_id, text, sequence.finish_reason is not None)

    def _finish(self, sequence: Sequence, reason: str) -> None:
        sequence.usage = self.spent(sequence)
        self._scheduler.remove(sequence)
        if sequence.n_cached:
            self._prefix.keep(sequence)
        sequence.finish_reason = reason

    def _forget_caches(self) -> None:
        self._prefix.clear()
        self._scheduler.restart()

    def _ask_status(self) -> None:
        """Asks every rank how it is, and how long a text its memory allows: the least is the context."""
        self.ranks, self._asked_s = self.runner.statuses(), time.monotonic()
        limits = [found.get("max_positions") for found in self.ranks]
        self.context = min([self.config.context, *(int(limit) for limit in limits if limit is not None)])


def _check(sequence: Sequence, config: LlamaConfig, context: int) -> None:
    params, n_prompt = sequence.params, len(sequence.prompt_ids)
    _check_ids(sequence.prompt_ids, config)
    for token_id in params.logit_bias:
        _check_ids([token_id], config)
    if n_prompt + max(params.length or 0, 1) > context:
        raise TooLong(n_prompt, params.length, context, context < config.context)


def _tell_of_window(config: LlamaConfig) -> None:
    if config.context < config.max_position_embeddings:
        logger.warning(
            "texts are held to %d tokens of this model's %d: of longer ones some of its layers see a sliding "
            "window alone, which is not supported",
            config.context,
            config.max_position_embeddings,
        )


def _check_ids(ids: list[int], config: LlamaConfig) -> None:
    if not ids:
        raise ConfigError("the prompt is empty and this model has no BOS token to begin with")
    for token_id in (min(ids), max(ids)):
        if not 0 <= token_id < config.vocab_size:
            raise ConfigError(f"token id {token_id} is not in the model's vocabulary of {config.vocab_size}")


def _closed() -> ConfigError:
    return ConfigError("this model was closed and serves no more; make a new one")
