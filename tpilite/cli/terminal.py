"""A person at the terminal, or a pipe: prompts in, text out as it is made, everything else to stderr."""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

from tpilite.chat.answers import AnswerReader, AnswerSyntax, Part
from tpilite.engine.engine import Recover
from tpilite.engine.sampling import SamplingParams
from tpilite.engine.sequence import Sequence
from tpilite.engine.session import Completion, Session
from tpilite.errors import ConfigError, PeerLost

with suppress(ImportError):
    import readline  # noqa: F401  # importing it gives `input` its line editing, where there is one

# A bar for what is over at once would be noise.
_PROGRESS_AFTER_S = 2.0

_CHAT_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"
_TEXT_HELP = "not made for chat: it continues each line as a text; /exit or Ctrl-D ends, Ctrl-C stops"


class Interrupt:
    """Ctrl-C as a request to stop: `requested` is true after the first; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator["Interrupt"]:
        """Notes Ctrl-C until the end of the context."""
        before = signal.getsignal(signal.SIGINT)

        def note(_number: int, _frame: FrameType | None) -> None:
            self.requested = True
            signal.signal(signal.SIGINT, before)

        self.requested = False
        signal.signal(signal.SIGINT, note)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)


def interruptible(recover: Recover) -> Recover:
    """`recover`, but Ctrl-C ends it at once: no next token comes at which an answer could stop."""

    def waiting(lost: PeerLost) -> None:
        if threading.current_thread() is not threading.main_thread():  # the only one that gets signals
            recover(lost)
            return
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            recover(lost)
        finally:
            signal.signal(signal.SIGINT, before)

    return waiting


def _bar(**options: Any) -> "tqdm[NoReturn]":
    return tqdm(**options, delay=_PROGRESS_AFTER_S, leave=False, disable=None)


@contextmanager
def progress_bar(what: str, unit: str = "B") -> Iterator[Callable[[int, int], None]]:
    """A bar that appears after a while, and the function that tells it what is done and in all, in bytes."""
    with _bar(desc=what, unit=unit, unit_scale=True, unit_divisor=1000) as bar:

        def show(n_done: int, n_total: int) -> None:
            bar.total = n_total
            bar.update(n_done - bar.n)

        yield show


def answer(llm: Session, request: Sequence, out: TextIO, interrupt: Interrupt) -> Completion:
    """Serves `request`, its text written to `out` as it is made, until it ends or is interrupted."""
    n_prompt = len(request.prompt_ids)
    reader, screen = AnswerReader(request.syntax or AnswerSyntax()), _Screen(out)
    with _bar(desc="reading the prompt", unit="token", total=n_prompt) as bar:
        while request.finish_reason is None:
            for output in llm.engine.step():
                screen.show(reader.add(output.text))
            if bar.n < n_prompt:
                bar.update(min(request.n_cached, n_prompt) - bar.n)
                if request.n_cached >= n_prompt:
                    bar.close()
            if interrupt.requested:
                llm.engine.cancel(request)
    screen.show(reader.finish())
    return llm.completion(request)


class _Screen:
    """Shows an answer: its text on `out`, what the model thinks before that on stderr, dim on a terminal."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._dim, self._plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
        self._is_thinking = False

    def show(self, parts: Iterable[Part]) -> None:
        """Shows more of it."""
        for part in parts:
            if part.thought:
                print(f"{self._dim}{part.thought}{self._plain}", end="", file=sys.stderr, flush=True)
            elif self._is_thinking:
                print("\n", file=sys.stderr, flush=True)
            self._is_thinking = bool(part.thought)
            self._out.write(part.text)
        self._out.flush()


def converse(
    llm: Session, params: SamplingParams, system: str | None, show: Callable[[Completion], None]
) -> None:
    """A line in, a text out, until the end of the input: a conversation, where the model is made for it."""
    chats = llm.chat_format is not None
    help_text = _CHAT_HELP if chats else _TEXT_HELP
    print(help_text, file=sys.stderr)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while (line := _ask()) is not None:
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(opening)
        elif line.startswith("/"):
            print(help_text, file=sys.stderr)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                request = llm.start_chat(asked, params) if chats else llm.start(line, params)
            except ConfigError as error:
                print(f"{error}\n{help_text}", file=sys.stderr)
                continue
            with Interrupt().listening() as interrupt:
                completion = answer(llm, request, sys.stdout, interrupt)
            print()
            show(completion)
            said = {"role": "assistant", "content": completion.text}
            if completion.thought:
                said["reasoning_content"] = completion.thought
            messages = [*asked, said]


def _ask() -> str | None:
    """The next line typed; None at the end of the input. Ctrl-C at the prompt clears the line."""
    while True:
        try:
            return input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            print(file=sys.stderr)
