"""A request on its way through the service: its sequences in the engine, and the deltas that come of them."""

import queue
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

from tpilite.chat.answers import AnswerSyntax
from tpilite.engine.engine import Engine, Output
from tpilite.engine.sequence import Sequence, TokenLogprob
from tpilite.errors import ConfigError, TpiliteError


@dataclass(frozen=True)
class Delta:
    """What one more token of a choice brought; `finish_reason` with the last."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None
    n_new: int = 1


class Job:
    """A request being served: its choices' deltas, in the order in which they are made.

    `cancel` takes it out of the service's queue.
    """

    def __init__(self, sequences: list[Sequence], n_prompt: int, cancel: Callable[["Job"], None]) -> None:
        self.n_prompt = n_prompt
        self.n_new = 0  # tokens that `next` has given
        self.n_unfinished = len(sequences)  # choices whose end it has not
        self.sequences = sequences
        self.n_running = 0  # choices in the engine; its thread's
        self.started_s = time.monotonic()
        self.syntax = sequences[0].syntax or AnswerSyntax()
        self._cancel = cancel
        self._deltas: queue.SimpleQueue[Delta | TpiliteError] = queue.SimpleQueue()

    def next(self, timeout_s: float) -> Delta | None:
        """The next delta, or None when none came in this time. Raises the error that ended the job."""
        try:
            item = self._deltas.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(item, TpiliteError):
            raise item
        self.n_new += item.n_new
        self.n_unfinished -= item.finish_reason is not None
        return item

    def cancel(self) -> None:
        """Gives the place up. Does nothing when the job is finished."""
        self._cancel(self)

    def put(self, item: Delta | TpiliteError) -> None:
        """Adds what `next` will give, or raise."""
        self._deltas.put(item)


class _Choice:
    """A sequence in the engine and the job it belongs to.

    The log-probability of a token goes out with the text in which the token begins, so that those of a stop
    text, which is not shown, do not go out either.
    """

    def __init__(self, job: Job, index: int, sequence: Sequence) -> None:
        self.job, self.index, self.sequence = job, index, sequence
        self._n_shown = 0
        self._begins = 0  # where the next token's text does
        self._held: deque[tuple[int, TokenLogprob]] = deque()

    def delta(self, output: Output) -> Delta:
        """What an output of the engine means to the job."""
        sequence = self.sequence
        reason = sequence.finish_reason if output.finished else None
        if sequence.params.logprobs is None:
            return Delta(self.index, output.text, (), reason)
        by_eos = output.finished and output.token_id in sequence.eos_ids
        if not by_eos:
            self._held.append((self._begins, sequence.logprobs[-1]))
        self._begins = sequence.n_decoded
        self._n_shown += len(output.text)
        everything = sequence.decoder is None or by_eos or reason == "length"
        ready = []
        while self._held and (everything or self._held[0][0] < self._n_shown):
            ready.append(self._held.popleft()[1])
        return Delta(self.index, output.text, tuple(ready), reason)


class Running:
    """The choices that the engine is at work on, or has in its queue. For the engine's thread alone."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._choices: dict[int, _Choice] = {}  # by the identity of the sequence

    def __len__(self) -> int:
        return len(self._choices)

    def start(self, job: Job) -> None:
        """Hands a job's sequences to the engine. Raises `ConfigError` where it takes none of them."""
        choices = []
        try:
            for index, sequence in enumerate(job.sequences):
                self._engine.submit(sequence)
                if sequence.finish_reason is not None:
                    job.put(Delta(index, "", (), sequence.finish_reason, n_new=0))
                else:
                    choices.append(_Choice(job, index, sequence))
        except ConfigError:
            for choice in choices:
                self._engine.cancel(choice.sequence)
            raise
        job.n_running = len(choices)
        self._choices.update({id(choice.sequence): choice for choice in choices})

    def deliver(self, outputs: list[Output], complete: Callable[[Job], None]) -> None:
        """Gives what came of a pass to the jobs; `complete` is told of a job before its last is given.

        So who has the whole answer finds it among what was served.
        """
        for output in outputs:
            choice = self._choices.get(id(output.sequence))
            if choice is None:
                continue
            job = choice.job
            if output.finished:
                del self._choices[id(output.sequence)]
                job.n_running -= 1
                if not job.n_running:
                    complete(job)
            job.put(choice.delta(output))

    def take_failed(self) -> list[Job]:
        """The jobs of which a sequence has ended with an error.

        Their other choices end too, and all others where no sequence has.
        """
        choices = self._choices.values()
        failed = list(dict.fromkeys(c.job for c in choices if c.sequence.error is not None))
        self.cancel(failed or [choice.job for choice in choices])
        return failed

    def cancel(self, jobs: Collection[Job]) -> None:
        """Ends the choices of these jobs in the engine."""
        for key, choice in list(self._choices.items()):
            if choice.job in jobs:
                self._engine.cancel(choice.sequence)
                del self._choices[key]

    def cancel_all(self) -> None:
        """Ends every choice in the engine."""
        for choice in self._choices.values():
            self._engine.cancel(choice.sequence)
        self._choices.clear()
