"""The standard streams, which the caller may have closed, or whose disk may be full or reader gone."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tpilite.errors import ConfigError

PROGRAM = "tpilite-node"  # what the line of an error begins with


def set_up_streams() -> None:
    """Makes the three streams ones that can be read and written like any, in UTF-8."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    # Only the interpreter's own: a program that calls ours may have put others in their places.
    if type(sys.stdout) is io.TextIOWrapper:
        lines = sys.stdout.line_buffering
        sys.stdout = _Text(sys.stdout.buffer, encoding="utf-8", errors="replace", line_buffering=lines)
    if type(sys.stderr) is io.TextIOWrapper:
        encoding = sys.stderr.encoding
        sys.stderr = _Messages(
            sys.stderr.buffer, encoding=encoding, errors="backslashreplace", line_buffering=True
        )
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller has closed it
            null = os.fdopen(os.open(os.devnull, os.O_RDWR), "r+b", buffering=0)
            setattr(sys, name, io.TextIOWrapper(null, write_through=True))


class _Text(io.TextIOWrapper):
    """stdout: what cannot be written is a `ConfigError`, and a `BrokenPipeError` where the reader is gone."""

    def write(self, text: str) -> int:
        with self._errors():
            return super().write(text)

    def flush(self) -> None:
        with self._errors():
            super().flush()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What is left goes nowhere: to flush it at the interpreter's end would fail once more.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if isinstance(error, BrokenPipeError):
                raise
            raise ConfigError(f"the text cannot be written to stdout: {error.strerror}") from error


class _Messages(io.TextIOWrapper):
    """stderr: what cannot be written is dropped, so that the text and the exit code stay what they are."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()
