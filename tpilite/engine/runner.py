"""Every rank's part of a pass: the `Step` that rank 0 broadcasts is executed by all, its results gathered."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from tpilite.arrays import Array
from tpilite.collective import Collective, Message
from tpilite.engine.sampling import Candidates, best, merge
from tpilite.engine.step import Rows, Step, Wanted, pack_candidates, unpack_candidates
from tpilite.errors import NotFinite, ProtocolError
from tpilite.model.kv_cache import KVCache
from tpilite.model.llama import Llama, Segment
from tpilite.model.ops import is_finite

Embedding = Callable[[Sequence[int]], Array]  # ids -> [T, D]


_STOP = {"stop": True}
_STATUS = {"survey": True}
_DAMAGED = "not_finite_from"  # in a report, where it is not None
_NONE: Array = np.zeros((0, 0), np.float32)


class Resources(Protocol):
    """What a runner needs of its rank: room in memory before a pass, and its status."""

    def begin_pass(self, n_rows: int, cache_bytes: int, scores: bool) -> None:
        """Makes room for `n_rows` rows beside caches of `cache_bytes`, for a pass with scores or without."""
        ...

    def status(self) -> dict[str, Any]:
        """Plain values for rank 0, which asks every rank now and then."""
        ...


class Runner:
    """One rank's model, the caches of its sequences, and its place among the ranks."""

    def __init__(
        self, model: Llama, vocab_start: int, collective: Collective, resources: Resources | None = None
    ) -> None:
        self.model = model
        self.collective = collective
        self.forward_s = 0.0  # in the model so far, its waits for the disk and for other ranks included
        self._vocab_start = vocab_start
        self._resources = resources
        self._caches: dict[int, KVCache] = {}
        self._logits = _NONE

    def candidates(self, step: Step, x: Array | None = None) -> list[Candidates]:
        """On rank 0: the candidates of each wanted row, after the step is made by all ranks."""
        parts = self._run(step, x)
        reports = [[unpack_candidates(c) for c in part.header["candidates"]] for part in parts]
        for rank, of_rank in enumerate(reports):
            if any(math.isnan(found.log_sum_exp) for found in of_rank):
                raise NotFinite(rank, "scores")
        return [merge(of_row) for of_row in zip(*reports, strict=True)]

    def scores(self, step: Step, x: Array | None = None) -> Array:  # -> [R, V]
        """On rank 0: the whole scores of the R wanted rows, unedited, after the step is made by all ranks."""
        parts = [_array(part) for part in self._run(replace(step, full=True), x)]
        for rank, logits in enumerate(parts):
            if not is_finite(logits):
                raise NotFinite(rank, "scores")
        return np.concatenate(parts, axis=1)

    def _run(self, step: Step, x: Array | None) -> list[Message]:
        self.collective.broadcast(Message(step.to_header(), x))
        parts = self.collective.gather(self._execute(step, x))
        assert parts is not None, "steps are rank 0's"
        # After the first sum that is not finite no rank's hidden states are.
        damaged = [(int(p.header[_DAMAGED]), rank) for rank, p in enumerate(parts) if _DAMAGED in p.header]
        if damaged:
            raise NotFinite(min(damaged)[1], "hidden states")
        return parts

    def serve(self) -> None:
        """On the other ranks: executes what rank 0 broadcasts until it says stop."""
        while True:
            message = self.collective.broadcast(None)
            if message.header == _STOP:
                return
            if message.header == _STATUS:
                self.collective.gather(Message(self._status()))
                continue
            array = None if message.array is None else np.array(message.array, np.float32)
            self.collective.gather(self._execute(Step.from_header(message.header), array))

    def statuses(self) -> list[dict[str, Any]]:
        """On rank 0: the status of every rank, in rank order."""
        self.collective.broadcast(Message(_STATUS))
        parts = self.collective.gather(Message(self._status()))
        assert parts is not None, "statuses are rank 0's to ask for"
        return [dict(part.header) for part in parts]

    def _status(self) -> dict[str, Any]:
        return {} if self._resources is None else self._resources.status()

    def stop(self) -> None:
        """On rank 0: ends every other rank's `serve`."""
        self.collective.broadcast(Message(_STOP))

    def reset(self) -> None:
        """Forgets every cache."""
        self._caches.clear()

    def _execute(self, step: Step, x: Array | None) -> Message:
        for sequence_id in step.free:
            self._caches.pop(sequence_id, None)
        if step.rows:
            if x is None or x.shape != (sum(r.n_rows for r in step.rows), self.model.config.hidden_size):
                raise ProtocolError("rank 0 sent rows whose hidden states are missing or of another shape")
            segments = [self._segment(rows) for rows in step.rows]
            if self._resources is not None:
                self._resources.begin_pass(len(x), self._cache_bytes(segments), bool(step.wanted))
            start_s = time.perf_counter()
            # Where none is wanted one goes on, so that every pass uses all layers in their order.
            wanted = [w.row for w in step.wanted] or [len(x) - 1]
            with np.errstate(all="ignore"):  # what is not finite is found below, and told
                hidden = self.model.forward(x, segments, wanted)
                self._logits = self.model.logits(hidden) if step.wanted else _NONE
            self.forward_s += time.perf_counter() - start_s
        damage = self.model.not_finite_from
        header = {} if damage is None else {_DAMAGED: damage}
        if step.full:
            return Message(header, self._logits)
        reports = zip(step.wanted, self._logits, strict=True)
        return Message(header | {"candidates": [self._report(wanted, logits) for wanted, logits in reports]})

    def _segment(self, rows: Rows) -> Segment:
        cache = self._caches.get(rows.sequence_id)
        if cache is None:
            cache = self._caches[rows.sequence_id] = self.model.new_cache()
        if rows.start > cache.length:
            raise ProtocolError(f"rank 0 sent position {rows.start}; this rank has seen {cache.length}")
        cache.truncate(rows.start)
        return Segment(cache, rows.n_rows)

    def _cache_bytes(self, segments: Sequence[Segment]) -> int:
        """What all caches take once these rows are in them."""
        growing = {id(s.cache): s.cache.bytes_for(s.cache.length + s.n_rows) for s in segments}
        return sum(growing.get(id(cache), cache.nbytes) for cache in self._caches.values())

    def _report(self, wanted: Wanted, logits: Array) -> list[Any]:
        if wanted.edits is not None:
            logits = wanted.edits.apply(logits, self._vocab_start)
        found = best(logits, self._vocab_start, wanted.n, wanted.temperature)
        return pack_candidates(found)


def _array(part: Message) -> Array:
    if part.array is None:
        raise ProtocolError("a rank sent no scores where they were asked for")
    return np.array(part.array, np.float32)
