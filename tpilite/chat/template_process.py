"""A model's chat templates, run in a process of their own: see `template_runner.py` for why."""

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tpilite.closing import Closing
from tpilite.errors import CheckpointError, ConfigError

_FOLDER = Path(__file__).parent
# By its file's name, since importing the package would import NumPy and all else. The folder comes last, so
# that none of its names hides another module's.
_START = "import sys; sys.path[:] = sys.argv[1:]; import template_runner; template_runner.main()"


class TemplateProcess(Closing):
    """Named chat templates that can be rendered, by threads too; closed by `with`, or when nobody has it.

    The process starts with its first use.
    """

    def __init__(self, templates: Mapping[str, str]) -> None:
        self._templates = dict(templates)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = _nothing
        self._names: dict[str, frozenset[str]] | None = None

    def names(self) -> Mapping[str, frozenset[str]]:
        """The names of variables that each template reads.

        Raises `CheckpointError` for a template that is damaged, or takes too long to read.
        """
        with self._lock:
            return self._started()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text that a template makes of its variables, which are what JSON can hold.

        Raises `ConfigError` with the template's words for what it refuses, and for what it fails on. Raises
        as `names` does.
        """
        try:
            line = json.dumps({"template": template, "variables": variables}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"a conversation holds what JSON can say and nothing else: {error}") from error
        with self._lock:
            self._started()
            answer = self._ask(line)
        if answer is None:
            raise ConfigError("the model's chat template takes too long on this conversation, and was ended")
        if "refused" in answer:
            raise ConfigError(f"the model's chat template refuses this conversation: {answer['refused']}")
        if "failed" in answer:
            raise ConfigError(f"the model's chat template fails on this conversation: {answer['failed']}")
        text: str = answer["text"]
        return text

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._end()
            self._process = None

    # ---- with the lock held

    def _started(self) -> Mapping[str, frozenset[str]]:
        if self._process is None:
            command = [sys.executable, "-S", "-E", "-c", _START, *sys.path, str(_FOLDER)]
            try:
                # In a session of its own, where Ctrl-C does not reach it.
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:
                raise ConfigError(f"no process can be started for the chat template: {error}") from error
            self._end = weakref.finalize(self, _end, self._process)
            answer = self._ask(json.dumps({"templates": self._templates}).encode())
            if answer is None:
                answer = {"damaged": "it takes too long to read, or jinja2 cannot be imported"}
            if "damaged" in answer:
                self._end()
                self._process = None
                raise CheckpointError(f"the model's chat template is damaged: {answer['damaged']}")
            self._names = {name: frozenset(read) for name, read in answer["names"].items()}
        assert self._names is not None
        return self._names

    def _ask(self, line: bytes) -> dict[str, Any] | None:
        """The answer to a line; None where the process ended instead."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        answer = b""
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            return None
        finally:
            if not answer:  # it ended, or we were interrupted: no more can be asked of it
                self._end()
                self._process = None
        return json.loads(answer) if answer else None


def _nothing() -> None:
    pass


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()
