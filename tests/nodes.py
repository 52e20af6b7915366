"""`tpilite-node` as its users run it: processes started, read, signalled, ended for sure; and clusters."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from checkpoints import tiny_config, write_checkpoint

from tpilite import LLM, SamplingParams

TOKEN = "of-all-these-tests"
TOKENIZER = Path(__file__).parent / "fixtures" / "tokenizer" / "tokenizer.model"
PROGRAM = [sys.executable, str(Path(__file__).parents[1] / "bin" / "tpilite-node")]

# Of any single wait: far above what it takes on a busy machine, far below where a test run seems to hang.
PATIENCE_S = 30.0


class Node:
    """One process; `out` and `lines` are what it has written to stdout and stderr so far.

    `home` holds its token and its slices, so that the user's own stay out of it. `prefix` is a command that
    runs it somewhere else.
    """

    def __init__(
        self,
        *args: object,
        home: Path,
        token: str | None = None,
        prefix: Sequence[str] = (),
        **environment: str,
    ) -> None:
        home.mkdir(parents=True, exist_ok=True)
        kept = {
            name: os.environ[name]
            for name in ("PATH", "PYTHONPATH", "TMPDIR", "TPILITE_NATIVE")
            if name in os.environ
        }
        if token is not None:
            environment["TPILITE_TOKEN"] = token
        self.process = subprocess.Popen(
            [*prefix, *PROGRAM, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**kept, "HOME": str(home), **environment},
            start_new_session=True,
        )
        self.pid = self.process.pid
        self.out = ""
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._read, args=(stream, take), daemon=True)
            for stream, take in ((self.process.stdout, self._take_out), (self.process.stderr, self._take_err))
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, stream: IO[bytes], take: Callable[[str], None]) -> None:
        rest = b""
        while packet := os.read(stream.fileno(), 65536):
            rest += packet
            # A character of several bytes may come in two packets; what is left then is short.
            text = rest.decode("utf-8", errors="ignore")
            rest = rest[len(text.encode()) :]
            with self._changed:
                take(text)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _take_out(self, text: str) -> None:
        self.out += text

    def _take_err(self, text: str) -> None:
        first, *others = text.split("\n")
        if self.lines:
            self.lines[-1] += first
            self.lines += others
        else:
            self.lines = [first, *others]

    @property
    def err(self) -> str:
        return "\n".join(self.lines)

    def wait_until(self, met: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Waits until what it has written meets a condition; fails when it ends before or takes too long."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while not met():
                over = not any(thread.is_alive() for thread in self._threads)
                if (over and not met()) or time.monotonic() > deadline_s:
                    how = f"ended ({self.process.poll()})" if over else f"ran for {timeout_s:g} s"
                    raise AssertionError(f"the node {how} without {what}:\n{self.out}\n---\n{self.err}")
                self._changed.wait(0.2)

    def wait_for_line(self, text: str, *, times: int = 1, timeout_s: float = PATIENCE_S) -> str:
        """The line of stderr that has `text` in it, or the n-th of them."""

        def found() -> list[str]:
            return [line for line in self.lines if text in line]

        self.wait_until(lambda: len(found()) >= times, f"the line {text!r}", timeout_s)
        return found()[times - 1]

    def wait_for_text(self, n_chars: int) -> None:
        """Waits until that much of the text has been written."""
        self.wait_until(lambda: len(self.out) >= n_chars, f"{n_chars} characters of text")

    def type(self, text: str) -> None:
        """Writes to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def end_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def finish(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit code; fails where it does not end in time."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the node ran for {timeout_s:g} s:\n{self.out}\n---\n{self.err}") from None
        self._join()
        return code

    def kill(self) -> None:
        """As `kill -9`, and waits until it is gone."""
        self.process.kill()
        self.process.wait()
        self._join()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def close(self) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class Nodes:
    """Starts nodes, each with a home of its own, and ends them all at the end of the context."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Node] = []

    def start(self, *args: object, home: str | None = None, **options: object) -> Node:
        node = Node(*args, home=self.folder / (home or f"home{len(self.started)}"), **options)
        self.started.append(node)
        return node

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.started:
            node.close()


@dataclass(frozen=True)
class Story:
    """A model, what is asked of it, and the text that one rank alone makes of that."""

    folder: Path
    ask: tuple[str, ...]
    text: str


def make_story(folder: Path) -> Story:
    """A story of a tiny random model, sampled: a single wrong number would soon choose another token."""
    config = tiny_config(
        vocab_size=656, num_hidden_layers=6, max_position_embeddings=512, bos_token_id=1, eos_token_ids=()
    )
    write_checkpoint(folder, config)
    shutil.copy(TOKENIZER, folder)
    with LLM(folder) as llm:
        # The first that does not soon choose to end.
        told = (llm.generate("It was", SamplingParams(seed=seed, length=70)) for seed in range(100))
        seed, completion = next((i, one) for i, one in enumerate(told) if one.finish_reason == "length")
    ask = ("--prompt", "It was", "--seed", str(seed), "--length", "70")
    return Story(folder, ask, completion.text + "\n")


class Cluster:
    """Rank 0 and what starts others for it, on ports and in homes that stay the same from start to start.

    `prefixes` says by what command the node of a home runs somewhere else, and `address` where rank 0 is.
    """

    host: Node

    def __init__(
        self,
        nodes: Nodes,
        story: Story,
        world_size: int,
        *options: object,
        address: str = "127.0.0.1",
        prefixes: Mapping[str, Sequence[str]] | None = None,
        start: bool = True,
    ) -> None:
        self.nodes, self.story, self.address, self.prefixes = nodes, story, address, prefixes or {}
        self.options = ("--model_path", story.folder, "--world_size", world_size, *options)
        self.broadcast_port, self.file_port = free_ports(2)
        self.host_split = nodes.folder / "host" / "split"
        if start:
            self.start_host()

    def start_host(self, *ask: object) -> Node:
        ports = ("--broadcast_port", self.broadcast_port, "--file_port", self.file_port)
        where = ("--save_dir", self.host_split, "--allreduce", "star")
        self.host = self._start("host", *self.options, *ports, *where, *(ask or self.story.ask))
        return self.host

    def start_worker(self, home: str, *options: object, port: int | None = None) -> Node:
        """A worker that joins at the port of rank 0, or at another one that leads there."""
        return self._start(home, "--join", f"{self.address}:{port or self.broadcast_port}", *options)

    def _start(self, home: str, *args: object) -> Node:
        return self.nodes.start(
            *args, "--threads", 1, home=home, token=TOKEN, prefix=self.prefixes.get(home, ())
        )

    def slices(self, home: str, rank: int) -> Path:
        """Where a worker keeps its slices."""
        (found,) = (self.nodes.folder / home / ".cache" / "tpilite" / "slices").glob(f"*/node_{rank}")
        return found


# The system takes ports of its own choice from 32768 on (Linux), or from 49152 on.
_CHOSEN_PORTS = range(20000, 32768)


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on, for nodes that must know them before the other side is there.

    None of them is the system's to give to another socket before the node comes.
    """
    free: list[int] = []
    for port in random.sample(_CHOSEN_PORTS, len(_CHOSEN_PORTS)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            free.append(port)
        if len(free) == n:
            break
    return free
