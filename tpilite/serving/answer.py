"""Requests for completions answered from a service: at once, or in a stream of server-sent events.

A comment keeps a stream alive while there is nothing to say. A client that hangs up ends its job.
"""

import dataclasses
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tpilite.chat.answers import AnswerReader, AnswerSyntax, Part
from tpilite.errors import TpiliteError
from tpilite.net.http_server import Connection
from tpilite.serving import openai_responses as openai
from tpilite.serving.errors import Json, api_error, unknown_model
from tpilite.serving.jobs import Delta, Job
from tpilite.serving.openai_fields import refuse
from tpilite.serving.openai_requests import Request
from tpilite.serving.openai_responses import ResponseInfo
from tpilite.serving.service import Service

# How often a thread that waits for a token looks whether its client is still there.
_POLL_S = 0.25
# Below the 15 to 60 s after which proxies and clients give a silent connection up.
_KEEP_ALIVE_S = 10.0


class Completions:
    """Answers chats and completions from a service, which calls its model `model_name`."""

    def __init__(self, service: Service, model_name: str) -> None:
        self._service, self._model_name = service, model_name
        self._n_open = 0
        self._lock = threading.Lock()

    @property
    def n_open(self) -> int:
        """How many answers are on their way."""
        return self._n_open

    def start(self, request: Request) -> "Started":
        """Puts a request into the queue. Raises `ApiError`."""
        job = self._start(request)
        name = f"{'chatcmpl' if request.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        info = ResponseInfo(name, int(time.time()), self._model_name, request.is_chat)
        return job, _Answer(self._service, request, info, job.syntax)

    def answer(self, connection: Connection, started: "Started") -> None:
        """Answers a request. Raises `ApiError` before the answer has begun, and `OSError`."""
        job, answer = started
        try:
            with self._counted():
                if answer.request.stream:
                    self._stream(connection, job, answer)
                else:
                    self._collect(connection, job, answer)
        finally:
            job.cancel()

    def _start(self, request: Request) -> Job:
        if request.model != self._model_name:
            raise unknown_model(request.model, self._model_name)
        try:
            if request.messages is not None:
                self._check_options(request)
                return self._service.chat(
                    request.messages,
                    request.params,
                    request.n,
                    request.variables,
                    tools=request.tools,
                    documents=request.documents,
                    continues=request.continues,
                )
            return self._service.complete(request.prompts, request.params, request.n)
        except TpiliteError as error:
            raise api_error(error, is_chat=request.is_chat) from error

    def _check_options(self, request: Request) -> None:
        """Raises `ApiError` for tools and documents that this model has no use for."""
        chat_format = self._service.session.chat_format
        if chat_format is not None and request.tools and not chat_format.calls_tools:
            refuse("tools", "(this model's chat template has none, or another syntax for their calls)")
        with_tools = bool(request.tools)
        if request.documents and not (chat_format and chat_format.takes("documents", with_tools=with_tools)):
            refuse("documents", "(this model's chat template has none)")

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Counts the context among the answers on their way."""
        with self._lock:
            self._n_open += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_open -= 1

    def _collect(self, connection: Connection, job: Job, answer: "_Answer") -> None:
        try:
            for delta in _deltas(job, connection, lambda: None):
                answer.add(delta)
        except TpiliteError as error:
            raise api_error(error, is_chat=answer.request.is_chat) from error
        connection.send(json.dumps(answer.whole(job)).encode(), "application/json")

    def _stream(self, connection: Connection, job: Job, answer: "_Answer") -> None:
        # nginx would otherwise hold events back until it has a buffer full of them.
        connection.begin_stream("text/event-stream; charset=utf-8", {"X-Accel-Buffering": "no"})

        def keep_alive() -> None:
            connection.write(
                b": still working\n\n" if self._service.waiting_for is None else b": waiting\n\n"
            )

        connection.write(_events(answer.opening()))
        try:
            for delta in _deltas(job, connection, keep_alive):
                connection.write(_events(answer.chunks(delta)))
            connection.write(_events(answer.closing(job)) + b"data: [DONE]\n\n")
        except TpiliteError as error:
            connection.write(_events([api_error(error, is_chat=answer.request.is_chat).body]))
        connection.end_stream()


def _deltas(job: Job, connection: Connection, keep_alive: Callable[[], None]) -> Iterator[Delta]:
    """The job's deltas, as long as the client is there. Raises the error that ended the job."""
    said_s = time.monotonic()
    while job.n_unfinished:
        delta = job.next(_POLL_S)
        if connection.is_gone():
            raise ConnectionAbortedError("the client hung up before its answer was complete")
        if delta is not None:
            said_s = time.monotonic()
            yield delta
        elif time.monotonic() - said_s >= _KEEP_ALIVE_S:
            said_s = time.monotonic()
            keep_alive()


class _Answer:
    """A request's deltas as OpenAI's chunks or as one response."""

    def __init__(self, service: Service, request: Request, info: ResponseInfo, syntax: AnswerSyntax) -> None:
        self._texts, self._info = service.texts, info
        n_choices = request.n * max(1, len(request.prompts))
        prompts = [service.texts.decode(p) for p in request.prompts] if request.echo else []
        self._echoes = [prompts[i // request.n] if prompts else "" for i in range(n_choices)]
        self._thinks = syntax.thinking is not None
        self._readers = [AnswerReader(syntax) for _ in range(n_choices)]
        self._parts = [[Part(text=echo)] for echo in self._echoes]
        self._logprobs: list[list[Any]] = [[] for _ in range(n_choices)]
        self._reasons = [""] * n_choices
        self._offsets = [len(echo) for echo in self._echoes]
        # Without what may be megabytes, for as long as the answer takes.
        self.request = dataclasses.replace(
            request, messages=() if request.is_chat else None, prompts=(), tools=(), documents=()
        )

    def add(self, delta: Delta) -> None:
        """Keeps a delta for the whole response."""
        self._parts[delta.index] += self._read(delta)
        self._logprobs[delta.index] += delta.logprobs
        self._reasons[delta.index] = self._reason(delta)

    def whole(self, job: Job) -> Json:
        """The response of all deltas that were added."""
        kept = zip(self._parts, self._logprobs, self._reasons, strict=True)
        choices = [
            openai.choice(self._info, i, parts, self._described(i, logprobs), reason)
            for i, (parts, logprobs, reason) in enumerate(kept)
        ]
        return openai.response(self._info, choices, self._spent(job))

    def opening(self) -> list[Json]:
        """The chunks before any delta."""
        usage = self.request.include_usage
        chunks = openai.opening(self._info, self.request.n, include_usage=usage)
        echoes = [(i, echo) for i, echo in enumerate(self._echoes) if echo]
        return chunks + [
            openai.chunk(self._info, i, Part(text=echo), include_usage=usage) for i, echo in echoes
        ]

    def chunks(self, delta: Delta) -> list[Json]:
        """The chunks of a delta: none where nothing of it is certain yet."""
        usage, reader = self.request.include_usage, self._readers[delta.index]
        n_calls = reader.n_calls
        parts = self._read(delta) or ([Part()] if delta.logprobs else [])
        chunks = []
        for i, part in enumerate(parts):
            told = self._described(delta.index, delta.logprobs if i == len(parts) - 1 else ())
            chunks.append(
                openai.chunk(
                    self._info, delta.index, part, n_calls=n_calls, logprobs=told, include_usage=usage
                )
            )
            n_calls += bool(part.tool)
        if delta.finish_reason is not None:
            reason = self._reason(delta)
            chunks.append(
                openai.chunk(self._info, delta.index, Part(), finish_reason=reason, include_usage=usage)
            )
        return chunks

    def closing(self, job: Job) -> list[Json]:
        """The chunks after all deltas."""
        return [openai.closing(self._info, self._spent(job))] if self.request.include_usage else []

    def _read(self, delta: Delta) -> list[Part]:
        """What a delta makes certain."""
        reader = self._readers[delta.index]
        n_calls = reader.n_calls
        parts = reader.add(delta.text)
        if delta.finish_reason is not None:
            parts += reader.finish()
        if self.request.one_call:
            calls = [part for part in parts if part.tool][: 0 if n_calls else 1]
            parts = [part for part in parts if not part.tool or part in calls]
        return parts

    def _reason(self, delta: Delta) -> str:
        if delta.finish_reason == "length":
            return "length"
        return "tool_calls" if self._readers[delta.index].n_calls else "stop"

    def _spent(self, job: Job) -> Json:
        n_thought = sum(reader.n_thought for reader in self._readers) if self._thinks else None
        return openai.usage(job.n_prompt, job.n_new, n_thought)

    def _described(self, index: int, logprobs: Iterable[Any]) -> Json | None:
        if self.request.params.logprobs is None:
            return None
        if self.request.is_chat:
            return openai.chat_logprobs(logprobs, self._texts.token)
        found, self._offsets[index] = openai.text_logprobs(logprobs, self._texts.token, self._offsets[index])
        return found


Started = tuple[Job, _Answer]


def _events(values: list[Json]) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(value).encode() for value in values)
