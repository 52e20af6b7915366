"""The engine's thread: requests from many threads in, each one's text out by a queue of its own.

One thread alone touches the engine. Others hand it what they want and wait for `Delta`s; a request that
nobody waits for any more leaves its place before the next pass.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tpilite.closing import Closing
from tpilite.engine.engine import Recover
from tpilite.engine.sampling import SamplingParams
from tpilite.engine.session import EncodedPrompt, Session
from tpilite.errors import ConfigError, PeerLost, TpiliteError
from tpilite.serving.errors import Broken, Busy, Stopping
from tpilite.serving.figures import Figures
from tpilite.serving.jobs import Job, Running
from tpilite.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Prompt = str | list[int]
Messages = tuple[Mapping[str, Any], ...]

# A place may be free long before the mean of the jobs so far says.
_MAX_RETRY_S = 60
# Of the prompts of one request together, where the context is shorter: their ids stay until it is answered,
# in some tens of bytes each.
_MAX_PROMPT_TOKENS = 1 << 16


class Recovery:
    """The engine's `recover`; `waiting_for` says why while it is at work, and is None otherwise.

    `states` is what is known then of the ranks above 0.
    """

    def __init__(self, recover: Recover, states: Callable[[], Mapping[int, str]] = dict) -> None:
        self._recover, self.states = recover, states
        self.waiting_for: str | None = None

    def __call__(self, lost: PeerLost) -> None:
        self.waiting_for = str(lost)
        try:
            self._recover(lost)
        finally:
            self.waiting_for = None


class TokenTexts:
    """What a session's tokens read as; nothing where it has no tokenizer."""

    def __init__(self, session: Session) -> None:
        self._tokenizer: Tokenizer | None
        try:
            self._tokenizer = session.tokenizer
        except ConfigError:
            self._tokenizer = None
        self._names = (
            {} if self._tokenizer is None else {i: name for name, i in self._tokenizer.specials.items()}
        )

    def token(self, token_id: int) -> tuple[str, bytes | None]:
        """What a token reads as, and its bytes where it stands for any."""
        raw = b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)
        if raw:
            return raw.decode("utf-8", "replace"), raw
        return self._names.get(token_id, ""), None

    def decode(self, prompt: Prompt) -> str:
        """The text of a prompt."""
        if isinstance(prompt, str):
            return prompt
        return "" if self._tokenizer is None else self._tokenizer.decode(prompt)


class Service(Closing):
    """Serves a session's engine to many threads; closed by `with`. `texts` tells what its tokens read as.

    `max_waiting` requests may wait beside the one that is served. `recovery` is the one that the session's
    engine was given.
    """

    def __init__(self, session: Session, *, max_waiting: int = 64, recovery: Recovery | None = None) -> None:
        self.session = session
        self._max_waiting = max_waiting
        self._recovery = recovery
        self.texts = TokenTexts(session)
        self._changed = threading.Condition()
        # All below is guarded by it; the engine and what belongs to its passes by its thread alone.
        self._inbox: list[Job] = []
        self._unwanted: list[Job] = []
        self._open: dict[Job, None] = {}  # as an ordered set
        self._stopping = self._closing = False
        self._failure: TpiliteError | None = None
        self._figures = Figures()
        self._thread = threading.Thread(target=self._run, name="tpilite-engine", daemon=True)

    def start(self) -> None:
        """Begins to serve."""
        self._thread.start()

    def chat(
        self,
        messages: Messages,
        params: SamplingParams,
        n: int = 1,
        variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Job:
        """The job of answering a conversation `n` times, to the context's end. Raises as `complete` does.

        The options are those of `Session.encode_chat`.
        """
        if self.session.chat_format is None:
            raise ConfigError("this model was not made for chat; use /v1/completions, which continues a text")
        prompt = self.session.encode_chat(messages, variables, **options)
        n_left = self.session.engine.context - len(prompt.ids)
        if params.length is not None and 0 < n_left < params.length:
            params = replace(params, length=n_left)
        return self._submit([prompt], params, n)

    def complete(self, prompts: tuple[Prompt, ...], params: SamplingParams, n: int = 1) -> Job:
        """The job of continuing each prompt `n` times, with one seed more each time.

        Raises `TooLong` and `ConfigError` for what the model cannot do, `Busy`, `Stopping` and `Broken`.
        """
        most = max(self.session.engine.context, _MAX_PROMPT_TOKENS)
        encoded: list[EncodedPrompt] = []
        for prompt in prompts:
            encoded.append(self.session.encode(prompt))
            if sum(len(each.ids) for each in encoded) > most:
                raise ConfigError(f"the prompts together have more than {most} tokens; send fewer at a time")
        return self._submit(encoded, params, n)

    def cancel(self, job: Job) -> None:
        """Ends a job that nobody waits for; its place is free at once and its sequences end before a pass."""
        with self._changed:
            if job in self._open:
                self._figures.n_cancelled += 1
                self._unwanted.append(job)
                self._forget(job)

    def drain(self, timeout_s: float) -> bool:
        """Takes no more requests and waits for the open ones; whether all were finished in this time."""
        with self._changed:
            self._stopping = True
            return self._changed.wait_for(lambda: not self._open, timeout_s)

    def close(self) -> None:
        """Ends open jobs with `Stopping` and the thread after its pass.

        A thread that waits for a lost rank is left to end when the ranks' network is closed.
        """
        with self._changed:
            self._stopping = self._closing = True
            self._changed.notify_all()
        while self._thread.is_alive() and self.waiting_for is None:
            self._thread.join(0.1)
        with self._changed:
            self._end(Stopping("the server was stopped before this answer was complete"), list(self._open))

    def __enter__(self) -> "Service":
        self.start()
        return self

    @property
    def waiting_for(self) -> str | None:
        """Why work has paused; None while it goes on."""
        return None if self._recovery is None else self._recovery.waiting_for

    def health(self) -> dict[str, Any]:
        """The `status`, "ok", "waiting", "failed" or "stopping", and a `reason` where it is not ok."""
        with self._changed:
            failure, stopping = self._failure, self._stopping
        if stopping:
            return {"status": "stopping", "reason": "the server is shutting down"}
        if (waiting_for := self.waiting_for) is not None:
            return {"status": "waiting", "reason": waiting_for}
        if failure is not None:
            return {"status": "failed", "reason": str(failure)}
        return {"status": "ok", "reason": None}

    def figures(self) -> dict[str, float]:
        """Counters since the start and what is so now."""
        read_bytes = self.session.usage.read_bytes
        with self._changed:
            return self._figures.to_dict(len(self._open), read_bytes)

    def ranks(self) -> list[dict[str, Any]]:
        """What is known of each rank: `rank`, `name`, `state`, `memory_bytes`, `resident_share`."""
        recovery = None if self.waiting_for is None else self._recovery
        states = {} if recovery is None else recovery.states()
        ranks = []
        for rank, found in enumerate(self.session.engine.ranks):
            resident, streaming = found.get("resident_bytes", 0), found.get("streaming_bytes", 0)
            ranks.append(
                {
                    "rank": rank,
                    "name": found.get("name", ""),
                    "state": states.get(rank, "ready" if recovery is None else "waiting"),
                    "memory_bytes": found.get("rss_bytes", 0),
                    "resident_share": resident / max(resident + streaming, 1),
                }
            )
        return ranks

    def _submit(self, prompts: list[EncodedPrompt], params: SamplingParams, n: int) -> Job:
        every = [_seeded(params, i) for i in range(n)]
        sequences = [self.session.prepare(prompt, each) for prompt in prompts for each in every]
        job = Job(sequences, sum(len(prompt.ids) for prompt in prompts), self.cancel)
        with self._changed:
            if self._stopping:
                raise Stopping("the server is shutting down; ask again when it is back")
            if isinstance(self._failure, Broken):
                raise self._failure
            if len(self._open) > self._max_waiting:
                self._figures.n_refused += 1
                raise Busy(
                    f"{self._max_waiting} requests are waiting, which is the most; ask again later",
                    min(max(1, round(self._figures.job_s)), _MAX_RETRY_S),
                )
            self._open[job] = None
            self._inbox.append(job)
            self._changed.notify_all()
        return job

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            self._loop()
        # Nothing above this thread would hear of a mistake of ours: the waiting requests must.
        except Exception:
            logger.exception("the engine's thread ended by a mistake of tpilite's own")
            with self._changed:
                self._failure = Broken("the engine failed by a mistake of its own; see the server's log")
                self._end(self._failure, list(self._open))

    def _loop(self) -> None:
        running = Running(self.session.engine)
        usage, delivery_s = self.session.usage, 0.0
        while (taken := self._take(running)) is not None:
            started, cancelled = taken
            if not running:
                usage = self.session.usage  # what came while there was nothing to do is not the next pass's
            began_s = time.perf_counter()
            for job in started:
                self._start(job, running)
            running.cancel(cancelled)
            before_s = time.perf_counter()
            try:
                outputs = self.session.engine.step() if running else []
            except Exception as error:
                self._fail(error, running)
                continue
            after_s = time.perf_counter()
            previous, usage = usage, self.session.usage
            with self._changed:
                self._failure = None
                rest_s = delivery_s + before_s - began_s
                self._figures.count(len(outputs), after_s - before_s, rest_s, previous, usage)
            running.deliver(outputs, self._close_job)
            delivery_s = time.perf_counter() - after_s
        running.cancel_all()

    def _take(self, running: Running) -> tuple[list[Job], list[Job]] | None:
        """The jobs to start and those to end, as soon as there is something to do; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._unwanted or running or self._closing)
            if self._closing:
                return None
            taken = self._inbox, self._unwanted
            self._inbox, self._unwanted = [], []
            return taken

    def _start(self, job: Job, running: Running) -> None:
        try:
            running.start(job)
        except ConfigError as error:
            self._close_job(job, error)
            return
        with self._changed:
            self._figures.n_prompt += job.n_prompt
        if not job.n_running:
            self._close_job(job)

    def _fail(self, error: Exception, running: Running) -> None:
        """Ends the jobs that a failed pass was made for; all of them where it was no single one's fault."""
        failed = running.take_failed()
        told = _logged(error, is_ours_to_stop=not failed)
        with self._changed:
            self._failure = None if failed else told
            self._end(told, failed or list(self._open))

    def _close_job(self, job: Job, error: TpiliteError | None = None) -> None:
        with self._changed:
            if job in self._open:
                self._figures.finish(time.monotonic() - job.started_s)
                self._forget(job)
            if error is not None:
                job.put(error)

    # ---- with the lock held

    def _forget(self, job: Job) -> None:
        del self._open[job]
        self._changed.notify_all()

    def _end(self, error: TpiliteError, jobs: list[Job]) -> None:
        self._inbox = [job for job in self._inbox if job not in jobs]
        for job in jobs:
            if job in self._open:
                self._figures.n_failed += 1
                self._forget(job)
                job.put(error)


def _logged(error: Exception, *, is_ours_to_stop: bool) -> TpiliteError:
    """What waiting requests are told of an error. Raises it where it is a mistake that concerns them all."""
    if isinstance(error, TpiliteError):
        logger.error("%s", error)
        return error
    if is_ours_to_stop:
        raise error
    logger.error("a pass failed, and its request with it", exc_info=error)
    return Broken("the pass for this request failed on the server; see its log")


def _seeded(params: SamplingParams, i: int) -> SamplingParams:
    return params if params.seed is None or i == 0 else replace(params, seed=(params.seed + i) % (1 << 64))
