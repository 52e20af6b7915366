"""The ranks above 0 as processes on this machine: started, watched, and started again when they die."""

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from tpilite.closing import Closing
from tpilite.cluster.config import ClusterConfig
from tpilite.engine.config import EngineConfig
from tpilite.machine import auto_budget_bytes, physical_cores

logger = logging.getLogger(__name__)

# The wait before a new start doubles for a worker that dies soon each time: it may never work.
_RESTART_S, _MAX_RESTART_S = 1.0, 30.0
_HEALTHY_S = 10.0

# Workers end by themselves when rank 0 closes its connection to them; after this time they are killed.
_LEAVE_S = 5.0


def share_of(engine: EngineConfig, world_size: int) -> EngineConfig:
    """What each of `world_size` ranks on this machine may use of it."""
    budget = engine.memory_budget
    return replace(
        engine,
        threads=engine.threads or max(1, physical_cores() // world_size),
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
    """`n` worker processes, each kept alive until the end of the context.

    `options` are those of `tpilite-node`, without the rank. The token travels in the environment, where
    other users do not see it. A worker's stdin is a pipe of ours: when this process dies in whatever way,
    it closes, and the worker ends.
    """

    def __init__(self, n: int, options: Sequence[str], token: str) -> None:
        self._command = [sys.executable, *_program(), *options, "--until_eof"]
        self._environment = dict(os.environ) | {"TPILITE_TOKEN": token}
        self._closing, self._lock = threading.Event(), threading.Lock()
        self._processes: dict[int, subprocess.Popen[bytes]] = {
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

    def _start(self, rank: int) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [*self._command, "--rank", str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=self._environment,
            start_new_session=True,  # Ctrl-C on this terminal is rank 0's to handle
        )

    def _watch(self, rank: int) -> None:
        delay_s = _RESTART_S
        while not self._closing.is_set():
            started_s = time.monotonic()
            code = self._processes[rank].wait()
            if code == 0:  # its session has ended: rank 0 is about to
                return
            delay_s = _RESTART_S if time.monotonic() - started_s > _HEALTHY_S else delay_s
            if self._closing.wait(delay_s):
                return
            delay_s = min(2 * delay_s, _MAX_RESTART_S)
            with self._lock:
                if self._closing.is_set():
                    return
                _close(self._processes[rank])
                self._processes[rank] = self._start(rank)
                logger.warning(
                    "rank %d ended (exit code %d) and is started again, as process %d",
                    rank,
                    code,
                    self._processes[rank].pid,
                )

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


def _close(process: "subprocess.Popen[bytes]") -> None:
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
