"""The ranks above 0 as processes on this machine: started, watched, and started again when they die."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from tpilite.cli.streams import PROGRAM
from tpilite.closing import Closing
from tpilite.cluster.config import ClusterConfig
from tpilite.engine.config import EngineConfig
from tpilite.errors import ConfigError
from tpilite.machine import auto_budget_bytes, usable_cores

logger = logging.getLogger(__name__)

# A worker that dies so often in a row, each time within a few seconds of the group's forming or before it,
# will do so again. The wait before its next start doubles.
_MAX_DEATHS = 5
_RESTART_S = 1.0
_HEALTHY_S = 10.0

# Workers end by themselves when rank 0 closes its connection to them; after this time they are killed.
_LEAVE_S = 5.0


def share_of(engine: EngineConfig, world_size: int) -> EngineConfig:
    """What each of `world_size` ranks on this machine may use of it."""
    budget = engine.memory_budget
    return replace(
        engine,
        threads=engine.threads or max(1, usable_cores() // world_size),
        memory_budget=auto_budget_bytes() // world_size if budget == "auto" else budget,
    )


def worker_options(port: int, save_dir: Path, engine: EngineConfig, cluster: ClusterConfig) -> list[str]:
    """The options of a worker for the rank 0 that listens on `port` of this machine."""
    budget = engine.memory_budget
    options = {
        "join": f"127.0.0.1:{port}",
        "save_dir": save_dir,
        "memory_budget": f"{budget}B" if isinstance(budget, int) else budget,
        **{name: getattr(engine, name) for name in ("threads", "kv_dtype", "memory_window")},
        **{name: getattr(cluster, name) for name in ("tls_cert", "tls_key", "tls_ca")},
    }
    given = ((f"--{name}", str(value)) for name, value in options.items() if value is not None)
    return ["--once", *chain.from_iterable(given)]


class LocalWorkers(Closing):
    """`n` worker processes, each started again when it dies, until the end of the context.

    `options` are those of `tpilite-node`, without the rank. The token travels in the environment, where
    other users do not see it. A worker's stdin is a pipe of ours: when this process dies in whatever way,
    it closes, and the worker ends.

    A worker whose error will come again ends everything: `on_failure` gets the error, SIGTERM ends what the
    main thread is at, and the end of the context raises it. `last_group_s` is when the last group formed.
    """

    def __init__(
        self,
        n: int,
        options: Sequence[str],
        token: str,
        *,
        last_group_s: Callable[[], float],
        on_failure: Callable[[ConfigError], None],
    ) -> None:
        self._command = [sys.executable, *_program(), *options, "--until_eof"]
        self._environment = dict(os.environ) | {"TPILITE_TOKEN": token}
        self._last_group_s, self._on_failure = last_group_s, on_failure
        self._failure: ConfigError | None = None
        self._closing, self._lock = threading.Event(), threading.Lock()
        self._processes: dict[int, subprocess.Popen[str]] = {
            rank: self._start(rank) for rank in range(1, n + 1)
        }
        self._watchers = [
            threading.Thread(target=self._watch, args=(rank,), name=f"watch-rank-{rank}", daemon=True)
            for rank in self._processes
        ]
        for watcher in self._watchers:
            watcher.start()
        if n:
            pids = ", ".join(f"rank {rank} is process {pid}" for rank, pid in self.pids.items())
            logger.info("on this machine, %s", pids)

    def _start(self, rank: int) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*self._command, "--rank", str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=self._environment,
            start_new_session=True,  # Ctrl-C on this terminal is rank 0's to handle
        )

    def _watch(self, rank: int) -> None:
        n_deaths = 0
        while not self._closing.is_set():
            process, started_s = self._processes[rank], time.monotonic()
            last_words = _pass_on(process)
            code = process.wait()
            if code == 0:  # its session has ended: rank 0 is about to
                return
            formed_s = self._last_group_s()
            worked = formed_s > started_s and time.monotonic() - formed_s > _HEALTHY_S
            n_deaths = 1 if worked else n_deaths + 1
            if code == ConfigError.exit_code:
                self._fail(f"rank {rank} cannot work: {last_words}")
                return
            if last_words:
                sys.stderr.write(f"{PROGRAM}: {last_words}\n")
            if n_deaths == _MAX_DEATHS:
                why = f"exit code {code}" + (f", {last_words}" if last_words else "")
                self._fail(f"rank {rank} ended {n_deaths} times before it had worked ({why})")
                return
            if self._closing.wait(_RESTART_S * 2 ** (n_deaths - 1)):
                return
            with self._lock:
                if self._closing.is_set():
                    return
                _close(process)
                process = self._processes[rank] = self._start(rank)
            again = "rank %d ended (exit code %d) and is started again, as process %d"
            logger.warning(again, rank, code, process.pid)

    def _fail(self, reason: str) -> None:
        """Ends everything for this reason, if nothing else has."""
        with self._lock:
            if self._closing.is_set() or self._failure is not None:
                return
            self._failure = ConfigError(reason)
            self._on_failure(self._failure)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:
            if self._failure is not None:
                raise self._failure

    @property
    def pids(self) -> dict[int, int]:
        """The process of each rank."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def close(self) -> None:
        """Ends the workers, and waits until they have ended."""
        with self._lock:
            self._closing.set()
        for process in self._processes.values():
            _close(process)
        deadline_s = time.monotonic() + _LEAVE_S
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for watcher in self._watchers:
            watcher.join()


def _program() -> list[str]:
    """How this program was started, to start it again: as a script, or as a module of the package."""
    script = Path(sys.argv[0]).absolute()
    return [str(script)] if script.name == "tpilite-node" and script.is_file() else ["-m", "tpilite"]


def _pass_on(process: "subprocess.Popen[str]") -> str:
    """Writes a process's stderr to ours until it ends, and gives the error that it ends with."""
    last_words = ""
    assert process.stderr is not None
    with process.stderr as lines:
        for line in lines:
            if line.startswith(f"{PROGRAM}: "):
                last_words = line.removeprefix(f"{PROGRAM}: ").strip()
            else:
                sys.stderr.write(line)
    return last_words


def _close(process: "subprocess.Popen[str]") -> None:
    """Closes our end of the worker's stdin."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def end_with_stdin() -> None:
    """Ends this process, at once, when its stdin is closed: the one that started it is gone."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1024):
                pass
        os._exit(0)

    threading.Thread(target=watch, name="until-eof", daemon=True).start()
